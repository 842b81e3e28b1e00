"""The last layer at the positions that are read alone: the values of all of it, with less work."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch

from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay_server.engine import Engine
from patchbay_server.models import ending as module_of_endings
from patchbay_server.models.ending import Ending, Halves, ending, leaves, position_axes
from patchbay_server.models.loader import host
from tests import families
from tests.cpu.test_prefix import IDS, OTHER, SEQ, at, get, read, run, same, scalar, sweep, write

#: Learned and rotary positions, alibi, windows, parallel blocks, experts, latent attention, further norms.
FAMILIES = (
    "gpt2",
    "gpt_neo",
    "gptj",
    "bloom",
    "opt",
    "gemma2",
    "gemma3_text",
    "cohere",
    "mixtral",
    "deepseek_v3",
    "mpt",
)
END = families.N_LAYERS - 1


@cache
def engine_of(family: str) -> Engine:
    """An engine that shares whatever can be shared, and leaves out whatever can be left out."""
    return Engine(host(families.build(family), name=family), layer_cost=0, worthwhile=math.inf)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_reads_the_last_layer_where_it_looks(family: str) -> None:
    """Patched at every layer and position, read at the last: as whole forwards, as without, and nothing stays."""
    engine, graph = engine_of(family), sweep("resid_pre", layers=range(END + 1))
    found, usage = run(engine, graph)
    same(found, run(engine, graph, deterministic=True)[0])
    assert usage.saved["last_layer"] > 0
    plain, without = run(engine, graph, disabled=("last_layer",))
    same(found, plain)
    assert without.saved["last_layer"] == 0 and without.layers_run == usage.layers_run
    assert not any("forward" in module.__dict__ for module in engine.hosted.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_several_positions_behind_the_last_layer(family: str) -> None:
    """Reads of two positions and a write of one behind the layer, by rows that start before, in and behind it."""
    runs = (Run((IDS, OTHER)),) * 5
    before, behind = "blocks.0.resid_post", f"blocks.{END}.resid_post"
    nodes: list[Node] = [scalar(2.0), read(before, 0), read("logits", 0)]
    outputs = [Output("plain", 2)]
    for number, (site, position) in enumerate([(before, 2), (f"blocks.{END}.resid_pre", 1), (behind, -2), (before, 3)]):
        nodes += [write(0, site, number + 1, at(1, position), "mul"), read(behind, number + 1)]
        nodes += [get(len(nodes) - 1, 1, -2), read("logits", number + 1), get(len(nodes) + 1, 1, -1)]
        outputs += [Output(f"stream {number}", len(nodes) - 3), Output(f"logits {number}", len(nodes) - 1)]
    graph = Graph(runs, tuple(nodes), tuple(outputs))
    found, usage = run(engine_of(family), graph)
    same(found, run(engine_of(family), graph, deterministic=True)[0])
    assert usage.saved["last_layer"] > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("read_from", [-1, -2, -5])
def test_forwards_from_the_first_position_on(family: str, read_from: int) -> None:
    """Where nothing came before, and so no mask is there, several positions of the end are what they are among all."""
    nodes: list[Node] = [scalar(2.0), read("embed", 0)]
    last = (at(1, 0)[0], ("slice", read_from, None, None))
    outputs = [Output("plain", 1)]
    for number, site in ((1, "blocks.0.resid_post"), (2, "blocks.0.mlp_out")):
        nodes += [write(0, site, number, at(1, 0), "mul"), read("logits", number)]
        outputs.append(Output(f"logits {number}", len(nodes)))
        nodes.append(Node("getitem", (len(nodes) - 1,), {"index": last}))
    graph = Graph((Run((IDS, OTHER)),) * 3, tuple(nodes), tuple(outputs))
    found, usage = run(engine_of(family), graph)
    same(found, run(engine_of(family), graph, deterministic=True)[0])
    assert (usage.saved["last_layer"] > 0) is (read_from == -1)


@pytest.mark.parametrize("site", ["attn.z", "mlp_out", "attn.pattern"])
def test_what_looks_inside_the_last_layer_has_all_of_it(site: str) -> None:
    """Forwards in which something is read or written inside the layer compute it at every position."""
    engine, graph = engine_of("gpt2"), sweep(site, layers=range(END, END + 1))
    found, usage = run(engine, graph)
    same(found, run(engine, graph, deterministic=True)[0])
    assert usage.saved["shared_prefix"] > 0 and usage.saved["last_layer"] == 0


def test_reads_of_all_positions_have_all_of_it() -> None:
    """Where any run of a forward is read at its first computed position, nothing is left out."""
    nodes = (scalar(2.0), read("blocks.0.resid_post", 0), write(0, "blocks.0.resid_post", 1, at(1, 2), "mul"))
    whole = (*nodes, read("logits", 1))
    graph = Graph((Run((IDS,)),) * 2, whole, (Output("base", 1), Output("out", 3)))
    found, usage = run(engine_of("gpt2"), graph)
    same(found, run(engine_of("gpt2"), graph, deterministic=True)[0])
    assert usage.saved["last_layer"] == 0
    last = Graph((Run((IDS,)),) * 2, (*whole, get(3, 1, -1)), (Output("base", 1), Output("out", 4)))
    assert run(engine_of("gpt2"), last)[1].saved["last_layer"] == SEQ - 3


def test_the_layer_runs_on_the_positions_that_are_read() -> None:
    """What stands behind the layer's keys sees those positions and no more; a layer at all is worth some positions."""
    engine, shapes = engine_of("gpt2"), list[torch.Size]()
    layer = engine.hosted.model.get_submodule(engine.hosted.layers[-1])
    handle = layer.mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape))  # type: ignore[union-attr]
    nodes = (scalar(2.0), write(0, "blocks.0.resid_post", 0, at(1, 2), "mul"), read("logits", 0), get(2, 1, -1))
    graph = Graph((Run((IDS,)), Run((IDS,))), (*nodes, read("embed", 1)), (Output("out", 3), Output("base", 4)))
    try:
        run(engine, graph)
        assert [tuple(shape[:2]) for shape in shapes][-1] == (1, 1)
        shapes.clear()
        costly = Engine(engine.hosted, layer_cost=SEQ, worthwhile=math.inf)
        assert run(costly, graph)[1].saved["last_layer"] == 0
        assert tuple(shapes[-1][:2]) == (1, SEQ - 2)
    finally:
        handle.remove()


def test_an_ending_that_comes_out_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof fails where the second call is given other positions; such a model goes on as before."""
    wrong = lambda value, axis, skipped: value if axis is None else value.narrow(axis, 0, value.shape[axis] - skipped)  # noqa: E731
    monkeypatch.setattr(module_of_endings, "_later", wrong)
    hosted = host(families.build("gpt2"))
    assert hosted.continuation is not None and hosted.continuation.ending is None
    _, usage = run(Engine(hosted, layer_cost=0, worthwhile=math.inf), sweep("resid_pre", layers=range(END + 1)))
    assert usage.saved["last_layer"] == 0 and usage.saved["shared_prefix"] > 0


def test_a_call_that_nothing_was_proved_of_is_left_whole() -> None:
    """A tensor among the arguments that was not there at load: the layer is called once, as it is."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    calls: list[torch.Size] = []
    layer: Any = model["layer"]
    layer.forward = lambda stream, more=None: calls.append(stream.shape) or stream
    some = torch.randn(2, 5, 4)
    with ending(model, Ending("layer", {(0,): 1}), Halves(3)):
        assert layer(some, more=some).shape == some.shape and calls == [some.shape]
    assert layer.__dict__["forward"] is not None


def test_axes_over_positions_are_told_by_two_calls() -> None:
    """Of tensors in tuples and dictionaries; none where two axes change, or one by other numbers."""
    mask, rotation = torch.zeros(1, 1, 3, 8), (torch.zeros(2, 3, 4), torch.zeros(4))
    first = leaves((mask,), {"rotation": rotation, "deep": {"x": [torch.zeros(3)]}, "flag": True})
    assert set(first) == {(0,), ("rotation", 0), ("rotation", 1), ("deep", "x", 0)}
    one = {place: value.shape for place, value in first.items()}
    other = {
        (0,): torch.Size((1, 1, 2, 8)),
        ("rotation", 0): torch.Size((2, 2, 4)),
        ("rotation", 1): torch.Size((4,)),
        ("deep", "x", 0): torch.Size((2,)),
    }
    assert position_axes(one, other, (3, 2)) == {
        (0,): 2,
        ("rotation", 0): 1,
        ("rotation", 1): None,
        ("deep", "x", 0): 0,
    }
    assert position_axes(one, {**other, (0,): torch.Size((1, 1, 2, 7))}, (3, 2)) is None
    assert position_axes(one, {**other, (0,): torch.Size((1, 1, 1, 8))}, (3, 2)) is None
    assert position_axes(one, {place: other[place] for place in list(other)[1:]}, (3, 2)) is None
