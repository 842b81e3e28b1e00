"""A map that breaks off goes on where it was, and ends with the same bits as one that did not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchbay import reduce
from patchbay.datasets import ledger
from patchbay.datasets.results import MapResults
from patchbay.errors import TraceError
from tests.datasets.common import data_set, local_model

DATA = data_set(40, 7)
HOW: dict[str, Any] = {"batch": 3, "window": 7, "lanes": 3}


class BrokenOffError(Exception):
    """What stands for the end of the process."""


def look(run):
    h = run.blocks[1].resid_post
    return {
        "cov": reduce.covariance(h),
        "top": reduce.topk(h, 3, context=1),
        "drawn": reduce.reservoir(h, 5),
        "last": h[:, -1],
        "h": run.embed,
    }


def only_reductions(run):
    h = run.blocks[1].resid_post
    return {
        "cov": reduce.covariance(h),
        "mean": reduce.mean(h, by=run.column("label", ("no", "yes", "perhaps")), groups=3),
    }


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit, through tuples, dicts and rows."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_equal(a[name], b[name])
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    elif hasattr(a, "__len__") and not isinstance(a, str):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def breaking_off(rows: int) -> Callable[[Any], None]:
    """A callback that ends the map once that many rows are done."""

    def note(progress: Any) -> None:
        if progress.rows >= rows:
            raise BrokenOffError

    return note


def mapped(function: Any = look, **how: Any) -> MapResults:
    return local_model().map(how.pop("data", DATA), function, **{**HOW, **how})


@pytest.mark.parametrize("rows", [1, 10, 21, 39])
@pytest.mark.parametrize("function", [look, only_reductions])
def test_a_map_that_broke_off_goes_on(tmp_path: Path, rows: int, function: Any) -> None:
    """The second call does the rest alone, and its results equal those of an uninterrupted one, bit for bit."""
    whole = mapped(function)
    state = tmp_path / "state.json"
    with pytest.raises(BrokenOffError):
        mapped(function, resume=state, progress=breaking_off(rows))
    done = json.loads(state.read_text())["rows"] if state.exists() else 0
    assert done <= rows + 21
    ran: list[int] = []
    found = mapped(function, resume=state, progress=lambda p: ran.append(p.rows))
    assert_equal(dict(found), dict(whole))
    assert found.rows == len(DATA)
    assert min(ran) >= done
    assert found.usage.tokens == sum(len(row["text"]) for row in DATA[done:]) or found.usage.tokens > 0


@pytest.mark.parametrize("step", ["before_shard", "after_shard", "before_state", "after_state"])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_wherever_it_breaks_off_nothing_is_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, at: int
) -> None:
    """The end may come before or after each of the two writes of a window."""
    whole = mapped(to=tmp_path / "whole")
    name = "write_shard" if "shard" in step else "save_state"
    written = getattr(ledger, name)
    left = at

    def breaks(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0 and "before" in step:
            raise BrokenOffError
        made = written(*args)
        if left < 0:
            raise BrokenOffError
        return made

    monkeypatch.setattr(ledger, name, breaks)
    how = {"resume": tmp_path / "state.json", "to": tmp_path / "rows"}
    with pytest.raises(BrokenOffError):
        mapped(**how)
    monkeypatch.setattr(ledger, name, written)
    found = mapped(**how)
    for key in ("cov", "top", "drawn"):
        assert_equal(found[key], whole[key])
    assert_equal(list(found["h"].value("h")), list(whole["h"].value("h")))
    assert_equal(found["h"].value("last"), whole["h"].value("last"))
    files = sorted(p.name for p in (tmp_path / "rows").iterdir())
    assert files == ["index.json", *sorted(s["file"] for s in found["h"].index["shards"])]


def test_a_complete_map_is_not_run_again(tmp_path: Path) -> None:
    """The same call gives the same results at once; a data set that goes on behind them is refused."""
    state = tmp_path / "state.json"
    first = mapped(resume=state)
    again = mapped(resume=state)
    assert_equal(dict(again), dict(first))
    assert again.usage.tokens == 0
    with pytest.raises(TraceError, match="40 rows, now 41"):
        mapped(resume=state, data=[*DATA, [3]])
    with pytest.raises(TraceError, match="goes on behind"):
        mapped(resume=state, data=(row for row in [*DATA, {"text": [3], "label": "no"}]))


def other_layer(run):
    return {"cov": reduce.covariance(run.blocks[2].resid_post)}


def layer(run):
    return {"cov": reduce.covariance(run.blocks[1].resid_post)}


def scaled(factor: float) -> Any:
    weights = np.full(16, factor, dtype=np.float32)
    return lambda run: {"cov": reduce.covariance(run.blocks[1].resid_post * weights)}


def test_another_map_is_refused_and_the_difference_is_named(tmp_path: Path) -> None:
    """Other rows, another graph or constant, other settings, another model: each refused, the file left as it was."""
    state = tmp_path / "state.json"
    with pytest.raises(BrokenOffError):
        mapped(scaled(2.0), resume=state, progress=breaking_off(21))
    before = state.read_text()
    changed = [DATA[1], DATA[0], *DATA[2:]]
    for call, said in [
        (
            lambda: mapped(scaled(2.0), resume=state, data=changed),
            "are not the first rows here",
        ),
        (lambda: mapped(scaled(2.0), resume=state, data=DATA[:30]), "40 rows, now 30"),
        (lambda: mapped(scaled(3.0), resume=state), "the function, or a constant in it"),
        (lambda: mapped(other_layer, resume=state), "the function, or a constant in it"),
        (lambda: mapped(scaled(2.0), resume=state, batch=4), "batch \\(then 3, now 4\\)"),
        (lambda: mapped(scaled(2.0), resume=state, lanes=2), "lanes"),
    ]:
        with pytest.raises(TraceError, match=said):
            call()
        assert state.read_text() == before
    data = json.loads(before)
    state.write_text(json.dumps({**data, "revision": "another"}))
    with pytest.raises(TraceError, match="the model"):
        mapped(scaled(2.0), resume=state)
    state.write_text(before[:-20])
    with pytest.raises(TraceError, match="not the state of a map"):
        mapped(scaled(2.0), resume=state)
    with pytest.raises(TraceError, match="resume is a file"):
        mapped(layer, resume=tmp_path)


def test_states_that_the_server_has_lost_are_named(tmp_path: Path) -> None:
    """The artifacts of a state expire; then the map says so instead of beginning in the middle."""
    state = tmp_path / "state.json"
    with pytest.raises(BrokenOffError):
        mapped(layer, resume=state, progress=breaking_off(21))
    data = json.loads(state.read_text())
    for lane in data["lanes"]:
        local_model().artifacts.delete(lane["digest"])
    with pytest.raises(TraceError, match="begin anew"):
        mapped(layer, resume=state)


def test_nothing_is_left_on_the_server(tmp_path: Path) -> None:
    """Without a state file a map deletes what it kept, also when it fails; with one it keeps one state a lane.

    What a request keeps that was under way when the map broke off is nobody's any more, and expires: one a lane.
    """
    model = local_model()
    before = {a.digest for a in model.artifacts.list()}
    mapped()
    assert {a.digest for a in model.artifacts.list()} == before
    with pytest.raises(BrokenOffError):
        mapped(progress=breaking_off(20))
    adrift = {a.digest for a in model.artifacts.list()} - before
    assert len(adrift) <= HOW["lanes"]
    before |= adrift
    state = tmp_path / "state.json"
    mapped(resume=state)
    left = {a.digest for a in model.artifacts.list()} - before
    assert left == {lane["digest"] for lane in json.loads(state.read_text())["lanes"]}
