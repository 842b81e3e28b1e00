"""What crosses the wire, and what a map costs its client: counted, not timed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay import reduce
from patchbay.datasets.progress import MapProgress, TerminalLine
from patchbay.model import Model
from tests.datasets.common import token_rows
from tests.serving_fixtures import D_MODEL, WORDS, serve_plain

ROWS = [[1 + (t - 3) % len(WORDS) for t in row] for row in token_rows(200, 30)]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The tiny model behind a plain gRPC server: a width of 256, so that activations would be seen."""
    with serve_plain() as served, pb.connect(served.target) as client:
        yield client.model(served.model)


def test_only_what_was_asked_for_crosses_the_wire(model: Model) -> None:
    """Reduced activations stay where they are: what comes back is the results and a little for each batch."""
    tokens = sum(map(len, ROWS))

    def look(run: Any) -> dict[str, Any]:
        h = run.blocks[1].resid_post
        return {"mean": reduce.mean(h), "cov": reduce.covariance(h[..., :64]), "top": reduce.topk(h, 4)}

    found = model.map(ROWS, look, batch=16)
    results = 8 * (D_MODEL + 64 * 64 + 64 + 4 * 4 * D_MODEL)
    activations = 4 * D_MODEL * tokens
    state = 8 * (64 * 64 + D_MODEL * 13)
    assert found.batches == 13
    assert found.received_bytes < results + 2_000 * found.batches + 5_000
    assert found.received_bytes < activations / 8
    assert found.received_bytes < results + state * found.batches / 4, "the lanes' states stay on the server"
    assert found.sent_bytes < 30_000 * found.batches
    whole = model.map(ROWS, lambda run: {"h": run.blocks[1].resid_post}, batch=16)
    assert whole.received_bytes > activations
    x = np.concatenate(list(whole["h"])).astype(np.float64)
    np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-4, atol=1e-6)


def test_states_of_lanes_do_not_grow_the_requests(model: Model) -> None:
    """A batch names its lane's state; the bytes of a request do not depend on how large that is."""
    sent = []
    for width in (8, D_MODEL):
        found = model.map(
            ROWS[:64],
            lambda run: {"cov": reduce.covariance(run.blocks[1].resid_post[..., :width])},  # noqa: B023 - called at once
            batch=8,
            lanes=2,
        )
        sent.append(found.sent_bytes)
    assert abs(sent[0] - sent[1]) < 1_000, sent


def test_a_large_constant_of_the_function_crosses_the_wire_once(model: Model) -> None:
    """A dictionary of 2 MiB that every trace of the function holds is sent once, also when it was lost meanwhile."""
    encoder = np.random.default_rng(0).standard_normal((D_MODEL, 2_048)).astype(np.float32)
    lost = False

    def look(run: Any) -> dict[str, Any]:
        return {"most": reduce.max(run.blocks[1].resid_post @ encoder)}

    def lose(progress: MapProgress) -> None:
        nonlocal lost
        if progress.rows >= 64 and not lost:
            lost = True
            for artifact in model.artifacts.list():
                if artifact.nbytes == encoder.nbytes:
                    model.artifacts.delete(artifact)

    first = model.map(ROWS, look, batch=16)
    assert encoder.nbytes < first.sent_bytes < encoder.nbytes + 30_000 * first.batches
    again = model.map(ROWS, look, batch=16)
    assert again.sent_bytes < 30_000 * first.batches
    # A connection of its own: its lanes wait for nothing that the callback does.
    broken = model.map(ROWS, look, batch=16, lanes=1, progress=lose)
    assert lost
    assert broken.sent_bytes > encoder.nbytes
    for found in (again, broken):
        np.testing.assert_allclose(found["most"], first["most"], rtol=1e-6)


def test_progress_tells_rows_tokens_and_bytes(model: Model) -> None:
    """Every batch is told of, in order; the last says that all rows are done."""
    seen: list[MapProgress] = []
    found = model.map(ROWS, lambda run: {"n": reduce.count(run.mask)}, batch=16, window=32, progress=seen.append)
    assert found["n"] == sum(map(len, ROWS))
    assert [p.rows for p in seen] == sorted(p.rows for p in seen)
    assert (seen[-1].rows, seen[-1].total, seen[-1].batches) == (len(ROWS), len(ROWS), found.batches)
    assert seen[-1].tokens == sum(map(len, ROWS))
    streamed = model.map((row for row in ROWS), lambda run: {"n": reduce.count(run.mask)}, progress=seen.append)
    assert (seen[-1].rows, seen[-1].total) == (len(ROWS), None)
    assert streamed["n"] == found["n"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_and_takes_it_away() -> None:
    """Nothing but carriage returns; nothing at all where the stream is no terminal."""
    here, file = Terminal(), io.StringIO()
    progress = MapProgress(1_200, 5_000, 3, 9_000, 1.5, 2, "waiting for the server (unavailable)", 2_048)
    for stream in (here, file):
        line = TerminalLine(stream)
        line(progress)
        line.close()
    shown = here.getvalue()
    assert "1,200 of 5,000 rows, 6,000 tokens/s, received 2.0 KiB, 2 retries, waiting for the server" in shown
    assert "\n" not in shown
    assert shown.rpartition("\r")[0].endswith(" " * 40)
    assert file.getvalue() == ""
