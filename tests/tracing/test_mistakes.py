"""Mistakes of an afternoon in a notebook: each is answered at the line that made it, before anything is sent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import ArgumentError, MissingAttributeError, TraceError, UnknownSiteError, ValueNotReadyError
from patchbay.model import Model
from patchbay.tracing import Run
from tests.tracing.conftest import FRANCE, CountingTransport

HERE = "test_mistakes.py:"


@pytest.fixture
def run(model: Model, transport: CountingTransport) -> Iterator[Run]:
    """A run of a trace that is left without being sent."""
    t = model.trace()
    yield t.run(FRANCE)
    assert not transport.executed


def refused(use: Callable[[], Any], message: str, kind: type[Exception] = ArgumentError) -> None:
    """Assert that `use` is refused, with the line of the mistake."""
    with pytest.raises(kind, match=message) as caught:
        use()
    assert HERE in str(caught.value), caught.value


@dataclass
class Pair:
    """An object of a class of the user's that holds values."""

    first: Any
    second: Any


def objects(*values: Any) -> Any:
    """An array that numpy keeps as it is."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


UNSAVED: dict[str, tuple[Callable[[Run], Any], str]] = {
    "without a name": (lambda run: run.save(run.embed), r"by name, t\.save\(h=value\)"),
    "a block": (lambda run: run.save(x=run.blocks[0]), r"blocks\.0 is a group of sites.*resid_post"),
    "a run": (lambda run: run.save(x=run), "a run is no value"),
    "a module": (lambda run: run.save(x=[run.unembed]), "unembed.* is no value"),
    "a method": (lambda run: run.save(x=run.embed.mean), "not yet called"),
    "a generator": (lambda run: run.save(x=(b.resid_post for b in run.blocks)), "generator.*make a list"),
    "a set": (lambda run: run.save(x={run.embed}), "inside a set"),
    "the values of a dict": (lambda run: run.save(x={"a": run.embed}.values()), "inside a dict_values"),
    "an array of objects": (lambda run: run.save(x=objects(run.embed)), "inside a ndarray"),
    "an object": (lambda run: run.save(x=Pair(run.embed, 1)), "inside a Pair"),
    "a number as a name": (lambda run: run.embed.save(3), "not under the int 3"),
    "an empty name": (lambda run: run.embed.save(""), "a text that is not empty"),
    "keep: swapped": (lambda run: run.keep(run.embed, "x"), r"a name and then what to keep.*not the Proxy"),
    "keep: nothing": (lambda run: run.keep("x", None), "keep takes values of the trace, not None"),
    "keep: an array": (lambda run: run.keep("x", np.zeros(3)), r"model\.artifacts\.put"),
    "keep: a block": (lambda run: run.keep("x", [run.blocks[0]]), "group of sites"),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_what_cannot_be_saved_is_refused(run: Run, name: str) -> None:
    """Before, such a leaf came back as it went in, and nothing was computed."""
    use, message = UNSAVED[name]
    refused(lambda: use(run), message)


GROUPS: dict[str, tuple[Callable[[Run], Any], str]] = {
    "a block assigned": (lambda run: run.blocks.__setitem__(0, 3.0), "blocks is a group of sites"),
    "attention times two": (lambda run: run.blocks[0].attn * 2, r"blocks\.0\.attn is a group.*pattern"),
    "two minus attention": (lambda run: 2 - run.blocks[0].attn, r"blocks\.0\.attn is a group"),
    "a run plus one": (lambda run: run + 1, r"a run is no value.*run\.site"),
    "a run by name": (lambda run: run["blocks.0.resid_post"], r"run\.site\("),
    "a run gone through": (lambda run: list(run), "a run is no value"),
    "a block by text": (lambda run: run.blocks["0"], "an integer, not the str '0'"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_of_sites_is_no_value(run: Run, name: str) -> None:
    """Blocks, parts of blocks and runs say which sites they have."""
    use, message = GROUPS[name]
    refused(lambda: use(run), message)


def test_misspelt_levels_are_suggested(run: Run) -> None:
    """Not only whole sites: a level of names too, with the line."""
    refused(lambda: run.blokcs, "did you mean 'blocks'", UnknownSiteError)
    refused(lambda: run.blocks[0].atn, "did you mean 'attn'", UnknownSiteError)
    refused(lambda: run.blocks[7], "there are 2, 0 to 1", UnknownSiteError)


def test_sites_are_of_runs_and_not_of_traces(model: Model) -> None:
    """A trace says where the run is that has them; other names are misspelt ones, or none."""
    for trace, how in ((model.trace(FRANCE), "with .* as run"), (model.trace(), r"run = t\.run")):
        for name in ("logits", "blocks", "position", "text"):
            refused(lambda trace=trace, name=name: getattr(trace, name), how, MissingAttributeError)  # type: ignore[misc]
        refused(lambda trace=trace: trace.usge, "did you mean 'usage'", MissingAttributeError)  # type: ignore[misc]
        assert not hasattr(trace, "logits") and not hasattr(trace, "_repr_html_")


def test_a_trace_is_entered_once(model: Model, transport: CountingTransport) -> None:
    """A second with block is refused as it begins; one that never began is said to be missing."""
    t = model.trace()
    h = t.run(FRANCE).embed.save()
    with pytest.raises(ValueNotReadyError, match="build it in a with block"):
        _ = h.value
    with t, pytest.raises(TraceError, match="already in a with block"), t:
        pass
    refused(t.__enter__, "has run", TraceError)
    single = model.trace(FRANCE)
    with single as run:
        run.embed.save()
    refused(single.__enter__, "has run", TraceError)
    assert len(transport.executed) == 2


def test_what_comes_back_can_be_pickled_and_copied(model: Model) -> None:
    """Results, usage and cards travel between processes; what belongs to a connection says that it cannot."""
    with model.trace(FRANCE) as run:
        run.save(e=run.embed, parts=[run.logits[:, -1], "text"])
    for again in (pickle.loads(pickle.dumps(run.results)), copy.deepcopy(run.results)):
        np.testing.assert_array_equal(again.e, run.results.e)
        assert again.parts[1] == "text" and again.usage == run.usage and repr(again) == repr(run.results)
    card = pickle.loads(pickle.dumps(model.card))
    assert card == model.card and card.site("logits") == model.card.site("logits")
    for mine in (model, run, run.trace, run.graph, run.blocks[0], pb.testing.fake_client()):
        with pytest.raises(TraceError, match="pickled"):
            pickle.dumps(mine)
        assert copy.deepcopy(mine) is mine
