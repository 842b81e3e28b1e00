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
from patchbay.errors import (
    ArgumentError,
    MissingAttributeError,
    PatchbayError,
    TraceError,
    UnknownSiteError,
    ValueNotReadyError,
)
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
    "a number as a name": (lambda run: run.embed.save(3), "is a text, not the int 3"),
    "an empty name": (lambda run: run.embed.save(""), "1 to 1024 characters, not 0"),
    "a very long name": (lambda run: run.embed.save("a" * 2000), "1 to 1024 characters, not 2000"),
    "half a character": (lambda run: run.save(**{"\ud800": run.embed}), "half a character"),
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
    refused(lambda: run.block, "did you mean 'blocks'", UnknownSiteError)
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
    handle = model.artifacts.put([1.0], name="one")
    for mine in (handle, model, run, run.trace, run.graph, run.blocks[0], pb.testing.fake_client()):
        with pytest.raises(TraceError, match="pickled"):
            pickle.dumps(mine)
        assert copy.deepcopy(mine) is mine


MODEL: dict[str, tuple[Callable[[Model], Any], str]] = {
    "an optimisation as a text": (lambda m: m.trace(FRANCE, disabled="early_stop"), "disabled is a list of names"),
    "no list of optimisations": (lambda m: m.trace(FRANCE, disabled=None), "disabled is a list of names"),
    "a number as optimisation": (lambda m: m.trace(FRANCE, disabled=[3]), "is a text, not the int 3"),
    "deterministic as a text": (lambda m: m.trace(FRANCE, deterministic="no"), "True or False, not the str 'no'"),
    "a negative time": (lambda m: m.trace(FRANCE, timeout_s=-1), "timeout_s is a number from 0 up"),
    "no time": (lambda m: m.trace(FRANCE, timeout_s=0), "above 0"),
    "no number of seconds": (lambda m: m.trace(FRANCE, timeout_s=float("nan")), "timeout_s is a number"),
    "progress that is no function": (lambda m: m.trace(FRANCE, progress=True), "progress is a function"),
    "prepend_bos as a text": (lambda m: m.trace(FRANCE, prepend_bos="yes"), "prepend_bos is True or False"),
    "prepend_bos of no input": (lambda m: m.trace(prepend_bos=True), r"give it to t\.run"),
    "a label that is a number": (lambda m: m.trace().run(FRANCE, label=3), "label is a text"),
    "a run of nothing": (lambda m: m.trace().run(None), "a run takes a text"),
    "a run of several kinds": (lambda m: m.trace().run(["a", 3]), "a run takes a text"),
    "ids beyond the vocabulary": (lambda m: m.trace().run([1, 99]), "token id 99"),
    "a long text": (lambda m: m.trace().run("a " * 100), "101 tokens"),
    "tokens of a number": (lambda m: m.tokenize(5), "a text or a list of texts, not the int 5"),
    "tokens of numbers": (lambda m: m.tokenize([1, 2]), "a text or a list of texts"),
    "a token of a number": (lambda m: m.to_single_token(5), "is a text, not the int 5"),
    "a token of two words": (lambda m: m.to_single_token("two words"), "is 2 tokens"),
    "strings of a text": (lambda m: m.token_strings("Paris"), "a list of token ids"),
    "strings of one id": (lambda m: m.token_strings(5), "a list of token ids"),
    "strings of a table": (lambda m: m.token_strings(np.zeros((2, 2), int)), "an array of 2 axes"),
    "a graph that is none": (lambda m: m.run(3), "run takes a graph"),
    "a trace for its graph": (lambda m: m.run(m.trace()), r"model\.run\(t\.graph\)"),
    "an edit that is none": (lambda m: m.edited(3), "an edit is a function of"),
    "an edit of no run": (lambda m: m.edited(lambda: None), r"called with \(run\)"),
    "apply: swapped": (lambda m: m.apply(np.zeros((1, 8)), "unembed"), "the module's name is a text"),
    "generate: no number": (lambda m: run_of(m, max_new_tokens="5"), "max_new_tokens is an integer from 1 up"),
    "generate: nothing": (lambda m: run_of(m, max_new_tokens=0), "max_new_tokens is an integer from 1 up"),
    "generate: half a token": (lambda m: run_of(m, max_new_tokens=2.5), "max_new_tokens is an integer"),
    "generate: yes": (lambda m: run_of(m, max_new_tokens=True), "max_new_tokens is an integer"),
    "generate: hot": (lambda m: run_of(m, temperature="hot"), "temperature is a number"),
    "generate: cold": (lambda m: run_of(m, temperature=-1), "temperature is a number from 0 up"),
    "generate: top_p": (lambda m: run_of(m, top_p=2), "a probability above 0, at most 1"),
    "generate: top_k": (lambda m: run_of(m, top_k=1.5), "top_k is an integer from 0 up"),
    "generate: seed": (lambda m: run_of(m, seed="a"), "seed is an integer"),
    "generate: a large seed": (lambda m: run_of(m, seed=2**63), "seed is below"),
    "generate: eos": (lambda m: run_of(m, eos="no"), "eos is True or False"),
    "generate: stop": (lambda m: run_of(m, stop=1.5), "stop takes texts"),
    "generate: stop by name": (lambda m: run_of(m, stop={"a": 1}), "stop takes texts"),
    "generate: misspelt": (lambda m: run_of(m, temperature_=1.0), "did you mean 'temperature'"),
    "generate: stream": (lambda m: m.generate(FRANCE, max_new_tokens=2, stream=3), "stream is True.*not the int 3"),
    "a function by name": (lambda m: pb.function("probe"), r"by keyword: @pb\.function\(name='probe'\)"),
    "a function that is none": (lambda m: pb.function(3), "not the int 3"),
    "a name that is a number": (lambda m: pb.function(name=3), "name is a text"),
    "a version that is a number": (lambda m: pb.function(version=2), "version is a text"),
    "a time beyond all clocks": (lambda m: m.trace(FRANCE, timeout_s=1e12), "at most 100,000,000"),
    "a client's time": (lambda m: pb.connect("localhost:1", timeout_s=0), "above 0"),
    "half a character in a label": (lambda m: m.trace().run(FRANCE, label="\udcff"), "half a character"),
    "an artifact by number": (lambda m: m.artifacts.get(3), "a handle, a digest or a name"),
    "an artifact without a name": (lambda m: m.artifacts.delete(None), "a handle, a digest or a name"),
    "a number as its name": (lambda m: m.artifacts.put([1.0], name=3), "the name of an artifact is a text"),
    "a graph of an open file": (lambda m: pb.load_graph(3), "is a path, not the int 3"),
    "a graph to an open file": (lambda m: pb.save_graph(m.trace(), 3), "is a path, not the int 3"),
    "an address that is a port": (lambda m: pb.connect(9000), "address is a text, not the int 9000"),
    "a model without a name": (lambda m: pb.testing.fake_client().model(None), "the name of a model is a text"),
}


def run_of(model: Model, **how: Any) -> Any:
    """A generating run."""
    return model.trace().generate(FRANCE, **{"max_new_tokens": 2, **how})


@pytest.mark.parametrize("name", MODEL)
def test_arguments_are_refused_at_their_line(model: Model, transport: CountingTransport, name: str) -> None:
    """Of what is asked of a model, of a way of generating, of functions of the package."""
    use, message = MODEL[name]
    refused(lambda: use(model), message, TraceError)
    assert not transport.executed


RUN: dict[str, tuple[Callable[[Run], Any], str]] = {
    "the place of a number": (lambda run: run.position(3), "is a text, not the int 3"),
    "a place that is not there": (lambda run: run.position("Germany"), "does not stand in"),
    "the probability of nothing": (lambda run: run.logprob(None), "a continuation is a text"),
    "an unknown site": (lambda run: run.site("resid_pots"), "has no site"),
    "an unknown module": (lambda run: run.module("transformer.h.0"), "has no module"),
    "an unknown callable": (lambda run: run.apply("unembedd", run.embed), "did you mean 'unembed'"),
    "skip of a run": (lambda run: run.skip(), "no part that can be skipped"),
    "a constant of text": (lambda run: run.trace.constant("a"), "^constant: str 'a'"),
    "an axis in the middle": (lambda run: run.embed.softmax(0.5), "axis must be an axis, an integer"),
    "torch's dim": (lambda run: run.embed.softmax(dim=-1), "dim is called axis here"),
    "torch's keepdim": (lambda run: run.embed.sum(keepdim=True), "keepdim is called keepdims here"),
    "concat of two": (lambda run: pb.ops.concat(run.embed, run.embed), r"in one list: pb\.ops\.concat\(\[a, b\]\)"),
    "einsum backwards": (lambda run: pb.ops.einsum(run.embed, "abc->ab"), "equation comes first"),
    "a stack of nothing": (lambda run: pb.ops.stack([]), "at least one tensor"),
    "an unknown dtype": (lambda run: run.embed.astype("float12"), "not one of the dtypes"),
    "a large integer": (lambda run: run.embed + 2**80, "an integer of 64 bits"),
    "set_index of an array": (lambda run: pb.ops.set_index(np.zeros(3), 0, 1.0), "works on values of a trace"),
    "axes of a tensordot": (lambda run: pb.ops.tensordot(run.embed, run.embed, "ab"), "a pair of lists of axes"),
    "a gradient of a number": (lambda run: pb.grad(3.0, run.embed), "not the float 3.0"),
    "a gradient by a name": (lambda run: pb.grad(run.logits.sum(), "embed"), "not the str 'embed'"),
    "a gradient by a block": (lambda run: pb.grad(run.logits.sum(), run.blocks[0]), "group of sites"),
    "a gradient by nothing": (lambda run: pb.grad(run.logits.sum(), []), "wrt is empty"),
    "a gradient by None": (lambda run: pb.grad(run.logits.sum(), None), "not None"),
}


@pytest.mark.parametrize("name", RUN)
def test_calls_in_a_trace_are_refused_at_their_line(run: Run, name: str) -> None:
    """Of what is asked of runs, values, operations and gradients."""
    use, message = RUN[name]
    refused(lambda: use(run), message, PatchbayError)
