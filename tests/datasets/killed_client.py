"""A map in a process of its own, for tests that kill it.

``python -m tests.datasets.killed_client TARGET KEY STATE OUT``

Prints the rows that are done after each batch; writes the results at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import patchbay as pb
from patchbay import reduce
from patchbay.datasets.results import MapResults

WORDS = "the capital of france italy spain is paris rome madrid when mary and john went to a store gave".split()
ROWS = 400
HOW: dict[str, Any] = {"batch": 8, "window": 16, "lanes": 3}


def texts() -> Iterator[dict[str, Any]]:
    """Sentences without sense, of 1 to 20 words."""
    rng = np.random.default_rng(5)
    for i in range(ROWS):
        yield {"text": " ".join(rng.choice(WORDS, size=rng.integers(1, 21))), "label": i % 2}


def look(run: Any) -> dict[str, Any]:
    h = run.blocks[1].resid_post
    return {
        "mean": reduce.mean(h, by=run.column("label"), groups=2),
        "cov": reduce.covariance(h[..., :8]),
        "top": reduce.topk(h[..., :4], 3),
        "last": h[:, -1],
    }


def arrays_of(found: MapResults) -> dict[str, np.ndarray]:
    """The results as plain arrays."""
    cov, top = found["cov"], found["top"]
    return {
        "mean": found["mean"], "cov": cov.covariance, "count": np.array(cov.samples), "values": top.values,
        "rows": top.rows, "positions": top.positions, "last": found["last"],
    }  # fmt: skip


def main(target: str, key: str, state: str, out: str) -> None:
    def note(progress: pb.datasets.MapProgress) -> None:
        print(progress.rows, flush=True)

    with pb.connect(target, api_key=key or None) as client:
        found = client.model("tiny").map(texts(), look, resume=state, progress=note, **HOW)
    np.savez(Path(out), **arrays_of(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
