"""What is under way when a map breaks off: files, locks, what the server keeps, and what the next call makes of it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay import reduce
from patchbay.datasets import Shards, ledger, mapping, state
from patchbay.errors import GraphError, ProtocolError, TraceError
from tests.datasets.common import data_set, local_model, token_rows
from tests.datasets.test_resume import BrokenOffError, assert_equal, breaking_off

ROOT = Path(__file__).resolve().parents[2]
DATA = data_set(40, 7)
HOW: dict[str, Any] = {"batch": 3, "window": 7, "lanes": 3}


def look(run: Any) -> dict[str, Any]:
    h = run.blocks[1].resid_post
    return {"cov": reduce.covariance(h), "last": h[:, -1]}


def names() -> set[str]:
    """Of all artifacts that the model's server keeps."""
    return {artifact.name for artifact in local_model().artifacts.list()}


@pytest.fixture
def salt(monkeypatch: pytest.MonkeyPatch) -> int:
    """The number that the next map marks what it keeps with; one of its own for each test."""
    number = int.from_bytes(os.urandom(6), "little")
    monkeypatch.setattr(mapping.secrets, "randbits", lambda bits: number)
    return number


def left_over(salt: int, name: str = "state") -> Any:
    """An artifact as a request of such a map leaves it whose answer never came."""
    return local_model().artifacts.put(np.random.default_rng().standard_normal(7), name=f"{name}.{salt:014x}")


def test_what_a_map_kept_goes_when_it_breaks_off(salt: int) -> None:
    """States, values of batches that were done, and what requests left whose answers never came: by their names."""
    model = local_model()
    stray, other = left_over(salt), left_over(salt + 1)

    def check(progress: pb.datasets.MapProgress) -> None:
        if progress.rows >= 21:
            assert any(name.endswith(f"{salt:014x}") and name.startswith("value.last") for name in names())
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        model.map(DATA, look, keep=True, progress=check, **HOW)
    left = {artifact.digest: artifact.name for artifact in model.artifacts.list()}
    assert stray.digest not in left
    assert other.digest in left
    ours = [name for name in left.values() if name.endswith(f"{salt:014x}")]
    assert len(ours) <= HOW["lanes"], "but for what is being written in this very moment"


def test_what_a_killed_map_left_goes_when_it_is_taken_up_again(salt: int, tmp_path: Path) -> None:
    """The state file names what is needed; everything else of the map's goes before it goes on."""
    file = tmp_path / "state.json"
    with pytest.raises(BrokenOffError):
        local_model().map(DATA, look, keep=True, resume=file, progress=breaking_off(20), **HOW)
    stray, value = left_over(salt), left_over(salt, "value.last")
    found = local_model().map(DATA, look, keep=True, resume=file, **HOW)
    left = {artifact.digest for artifact in local_model().artifacts.list()}
    assert not left & {stray.digest, value.digest}
    assert all(kept.value.digest in left for kept in found["last"])
    whole = local_model().map(DATA, look, **HOW)
    rows = np.concatenate([kept.value.get() for kept in found["last"]])
    order = np.argsort([row for kept in found["last"] for row in kept.rows])
    np.testing.assert_allclose(rows[order], whole["last"], atol=1e-6)
    assert_equal(found["cov"], whole["cov"])


def test_a_map_that_never_got_anywhere_may_become_another(tmp_path: Path) -> None:
    """A mistake that shows at the first batch is mended, and the call begins: nothing was done that could differ."""
    file = tmp_path / "state.json"
    with pytest.raises(BrokenOffError):
        local_model().map(DATA, look, resume=file, progress=breaking_off(1), batch=3, window=40)
    assert json.loads(file.read_text())["windows"] == 0
    found = local_model().map(DATA, lambda run: {"n": reduce.count(run.mask)}, resume=file, **HOW)
    assert found["n"] == sum(len(row["text"]) for row in DATA)


def test_ctrl_c_ends_a_map_and_the_next_call_goes_on(tmp_path: Path) -> None:
    """A KeyboardInterrupt, in the callback or in the data set: the state file is whole, the results the same."""
    whole = local_model().map(DATA, look, **HOW)
    for where in ("callback", "rows"):
        file = tmp_path / f"{where}.json"

        def rows(where: str = where) -> Iterator[Any]:
            for i, row in enumerate(DATA):
                if where == "rows" and i == 30:
                    raise KeyboardInterrupt
                yield row

        def note(progress: pb.datasets.MapProgress, where: str = where) -> None:
            if where == "callback" and progress.rows >= 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            local_model().map(rows(), look, resume=file, progress=note, **HOW)
        found = local_model().map(iter(DATA), look, resume=file, **HOW)
        assert_equal(dict(found), dict(whole))


ENDLESS = """
import itertools, sys
import patchbay as pb
from patchbay import reduce
from tests.datasets.common import local_model

def rows():
    for i in itertools.count():
        yield [3 + i % 20, 4, 5 + i % 7][: 1 + i % 3]

def note(progress):
    assert progress.total is None and progress.seconds_left is None
    print(progress.rows, flush=True)

try:
    local_model().map(rows(), lambda run: {"n": reduce.count(run.mask)}, batch=16, resume=sys.argv[1], progress=note)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_endless_data_set_is_ended_by_a_signal(tmp_path: Path) -> None:
    """SIGINT ends the process's map at once; the state file says how far it came, and no lock is left."""
    file = tmp_path / "state.json"
    path = os.pathsep.join([str(ROOT), str(ROOT / "client"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.strip().isdecimal() and int(line) >= 1_000:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.wait(60) == 0
    assert rest.split()[-1] == "interrupted"
    done = json.loads(file.read_text())
    assert done["rows"] >= 512 and not done["complete"]
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_two_maps_do_not_write_the_same_place(tmp_path: Path) -> None:
    """The second is refused while the first runs, for a state file and for a folder; then it is welcome."""
    refused: list[str] = []

    def again(progress: pb.datasets.MapProgress) -> None:
        for how in ({"resume": tmp_path / "state.json"}, {"to": tmp_path / "rows"}):
            with pytest.raises(TraceError, match="another map is writing") as error:
                local_model().map(DATA, look, **how)
            refused.append(str(error.value))

    found = local_model().map(DATA, look, resume=tmp_path / "state.json", to=tmp_path / "rows", progress=again, **HOW)
    assert refused
    assert found["last"].value("last").shape[0] == len(DATA)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    local_model().map(DATA, look, resume=tmp_path / "state.json", to=tmp_path / "rows", **HOW)


@pytest.mark.parametrize("writes", [1, 4])
def test_a_full_disk_ends_the_map_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The system's own error; what was written before is whole, and with room the map goes on."""
    whole = local_model().map(DATA, look, **HOW)
    left, real = writes, state.os.fsync

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    file = tmp_path / "state.json"
    monkeypatch.setattr(state.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        local_model().map(DATA, look, resume=file, **HOW)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.setattr(state.os, "fsync", real)
    assert not list(tmp_path.rglob(".*"))
    assert_equal(dict(local_model().map(DATA, look, resume=file, **HOW)), dict(whole))


def test_a_folder_is_not_complete_while_it_is_written_anew(tmp_path: Path) -> None:
    """The index and the shards of an earlier map do not stand beside those of a later one."""
    folder = tmp_path / "rows"
    local_model().map(DATA, look, to=folder, **HOW)
    assert len(Shards(folder)) == 6

    def check(progress: pb.datasets.MapProgress) -> None:
        with pytest.raises(ProtocolError, match="not complete"):
            Shards(folder)

    found = local_model().map(DATA[:10], look, to=folder, progress=check, **HOW)["last"]
    assert found.index["rows"] == 10
    assert sorted(p.name for p in folder.iterdir()) == [
        "index.json",
        "shard-000000.safetensors",
        "shard-000001.safetensors",
    ]


def test_a_changed_loop_is_another_function(tmp_path: Path) -> None:
    """What a loop of the graph does is part of what the state file belongs to, like everything outside it."""
    file = tmp_path / "state.json"

    def looping(more: bool) -> Any:
        def step(carry: Any, _: Any) -> Any:
            return (carry.exp() if more else carry * 0.5), None

        return lambda run: {"m": reduce.mean(pb.scan(step, run.embed[:, -1], length=2)[0])}

    with pytest.raises(BrokenOffError):
        local_model().map(DATA, looping(False), resume=file, progress=breaking_off(20), **HOW)
    with pytest.raises(TraceError, match="the function, or a constant in it"):
        local_model().map(DATA, looping(True), resume=file, **HOW)
    local_model().map(DATA, looping(False), resume=file, **HOW)


async def test_an_awaited_map_that_is_cancelled_goes_on(tmp_path: Path) -> None:
    """Cancelling the task ends it in good order: the lock is free, and the next call goes on."""
    from patchbay.client import AsyncClient
    from patchbay.transport.local import LocalTransport
    from patchbay_server.serving.local import local_servicer
    from tests.tiny import build

    servicer = local_servicer(build("llama"), name="here")
    rows, file = token_rows(60, 6), tmp_path / "state.json"

    def mean(run: Any) -> dict[str, Any]:
        return {"mean": reduce.mean(run.blocks[1].resid_post)}

    try:
        async with AsyncClient(lambda: LocalTransport(servicer)) as client:
            model = await client.model("here")
            whole = await model.map(rows, mean, batch=4, window=8)
            reached = asyncio.Event()
            task = asyncio.ensure_future(
                model.map(rows, mean, batch=4, window=8, resume=file,
                          progress=lambda p: reached.set() if p.rows >= 24 else None)
            )  # fmt: skip
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            seen: list[int] = []
            found = await model.map(rows, mean, batch=4, window=8, resume=file, progress=lambda p: seen.append(p.rows))
    finally:
        servicer.close()
    np.testing.assert_array_equal(found["mean"], whole["mean"])
    assert seen[0] >= 8


def test_an_error_in_a_late_row_ends_the_map_where_it_is(tmp_path: Path) -> None:
    """A row that is no row, far behind: named, and what was done before is kept for a call with a better one."""
    file = tmp_path / "state.json"
    bad = [*DATA[:33], {"text": 4.5}, *DATA[34:]]
    with pytest.raises(TraceError, match="row 33 of the data set"):
        local_model().map(iter(bad), look, resume=file, **HOW)
    assert 0 < json.loads(file.read_text())["rows"] <= 33
    found = local_model().map(iter(DATA), look, resume=file, **HOW)
    assert_equal(dict(found), dict(local_model().map(DATA, look, **HOW)))


def test_a_mistake_that_only_the_server_sees_is_raised_with_its_line() -> None:
    """An index outside a site's extent in a late batch alone: the user's line, and nothing left behind."""
    rows = [[3, 4, 5]] * 9 + [[3, 4]]
    with pytest.raises(GraphError, match=r"test_breaking_off.py:\d+"):
        local_model().map(rows, lambda run: {"a": run.embed[:, 2]}, batch=1, window=2)


def test_rows_that_are_done_are_not_held(tmp_path: Path) -> None:
    """Ten thousand rows of four kilobytes from a generator, reduced: a map holds a few windows of them, not all."""
    import tracemalloc

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(10_000):
            yield {"text": [3 + i % 20] * (1 + i % 3), "note": "x" * 4_000 + str(i)}

    how: dict[str, Any] = {"batch": 128, "window": 256, "resume": tmp_path / "state.json"}
    model = local_model()
    model.map([[3, 4]], lambda run: {"n": reduce.count(run.mask)})  # whatever is imported for it is here
    tracemalloc.start()
    try:
        found = model.map(rows(), lambda run: {"n": reduce.count(run.mask)}, **how)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.rows == 10_000
    assert peak < 0.4 * 10_000 * 4_000, peak


def test_a_state_that_is_long_is_not_written_after_every_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing takes a small share of the time however much a state lists; broken off, the map goes on all the same."""
    written: list[int] = []
    real = ledger.save_state

    def dear(path: Path, state: Any) -> float:
        written.append(state.rows)
        real(path, state)
        return 60.0  # seconds of work, so that none but the first and the last are due

    whole = local_model().map(DATA, look, to=tmp_path / "whole", **HOW)
    monkeypatch.setattr(ledger, "save_state", dear)
    how = {**HOW, "to": tmp_path / "rows", "resume": tmp_path / "state.json"}
    with pytest.raises(BrokenOffError):
        local_model().map(DATA, look, progress=breaking_off(30), **how)
    assert written == [0]
    assert json.loads((tmp_path / "state.json").read_text())["rows"] == 0
    written.clear()
    found = local_model().map(DATA, look, **how)
    assert written == [0, len(DATA)]
    assert_equal(found["cov"], whole["cov"])
    np.testing.assert_array_equal(found["last"].value("last"), whole["last"].value("last"))
    monkeypatch.setattr(ledger, "save_state", real)
    with pytest.raises(BrokenOffError):
        local_model().map(DATA, look, progress=breaking_off(30), **{**how, "resume": tmp_path / "other.json"})
    monkeypatch.setattr(ledger, "save_state", dear)  # from the middle on, none but the last are due
    written.clear()
    again = local_model().map(DATA, look, **{**how, "resume": tmp_path / "other.json"})
    assert 0 < written[0] < written[-1] == len(DATA)
    assert len(written) == 2
    assert_equal(again["cov"], whole["cov"])


def test_a_sequence_that_does_not_say_where_it_ends() -> None:
    """Items and a length are a data set, as torch's are, whatever they do with an index beyond it."""

    class Items:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> list[int]:
            return [3 + index % 5]

    found = local_model().map(Items(), lambda run: {"ids": run.ids[:, 0]}, batch=2)
    assert found["ids"].tolist() == [3, 4, 5, 6, 7]
