"""A map in a process of its own, for tests that kill it.

``python -m tests.datasets.killed_client TARGET KEY STATE OUT KIND``

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


def pairs() -> Iterator[dict[str, Any]]:
    """Two sentences, one of them with a word more or less, and a word to look for."""
    rng = np.random.default_rng(6)
    for row in texts():
        words = row["text"].split()
        yield {"clean": row["text"], "corrupt": " ".join(rng.permutation(words)) + " a", "answer": rng.choice(WORDS)}


def patch(t: Any, rows: Any) -> dict[str, Any]:
    """The last position of one sentence in the other, and what is drawn after it."""
    clean, said = t.run(rows["clean"]), t.generate(rows["corrupt"], max_new_tokens=3, temperature=1.3, seed=9)
    said.prefill.blocks[1].resid_post[:, -1] = clean.blocks[1].resid_post[:, -1]
    answer = rows["answer"].to_single_token()
    steps = said.all_steps.blocks[1].resid_post.swapaxes(0, 1)
    return {
        "ids": said.generated,
        "mean": reduce.mean(steps, over="steps"),
        "cov": reduce.covariance(steps[..., :8], over="steps"),
        "answered": reduce.count((said.generated == answer[:, None]).sum(axis=1) > 0),
        "clean": clean.blocks[1].resid_post,
    }


#: What the tests map: rows, and what is made of them.
KINDS: dict[str, tuple[Any, Any]] = {"texts": (texts, look), "pairs": (pairs, patch)}


def arrays_of(found: MapResults) -> dict[str, np.ndarray]:
    """The results as plain arrays."""
    if "ids" in found:
        cov, clean = found["cov"], found["clean"]
        return {
            "ids": found["ids"], "mean": found["mean"], "cov": cov.covariance, "count": np.array(cov.samples),
            "answered": np.array(found["answered"]), "clean": clean.padded()[0],
        }  # fmt: skip
    cov, top = found["cov"], found["top"]
    return {
        "mean": found["mean"], "cov": cov.covariance, "count": np.array(cov.samples), "values": top.values,
        "rows": top.rows, "positions": top.positions, "last": found["last"],
    }  # fmt: skip


def main(target: str, key: str, state: str, out: str, kind: str) -> None:
    rows, function = KINDS[kind]

    def note(progress: pb.datasets.MapProgress) -> None:
        print(progress.rows, flush=True)

    with pb.connect(target, api_key=key or None) as client:
        found = client.model("tiny").map(rows(), function, resume=state, progress=note, **HOW)
    np.savez(Path(out), **arrays_of(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
