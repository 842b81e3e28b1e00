"""What is known of nodes: found once for nodes that are alike, and the same as if each were looked at by itself."""

from __future__ import annotations

from typing import Any

import pytest

import patchbay as pb
from patchbay.errors import GraphError
from patchbay.ir.facts import AttrTable, Inference, facts_of
from patchbay.ir.graph import Graph, Node
from patchbay.ir.infer import infer_node
from patchbay.ir.price import price
from patchbay.ir.verify import verify
from patchbay.testing import fake_client


def _traced() -> Any:
    """A graph with reads, writes, indices, numbers of every kind, and operations of several parts."""
    trace = fake_client().model("fake").trace()
    run = trace.run([1, 2, 3])
    x = run.embed
    for i in range(20):
        x = pb.ops.softmax(x[:, -2:] * float(i), axis=-1).mean(axis=1, keepdims=True) + run.embed
    values, indices = pb.ops.topk(x, k=1 + 1, axis=-1)
    run.blocks[0].resid_post[:, -1] *= 2
    trace.save(x=x, values=values, indices=indices, y=run.blocks[1].resid_post + True)
    return trace


def test_what_tracing_found_is_what_the_verifier_finds() -> None:
    """Specs, price and workspace of every node are the same, node by node and with the check of all at once."""
    trace = _traced()
    graph, card = trace.graph, trace.builder.card
    alone = verify(Graph(graph.runs, graph.nodes, graph.outputs), card)
    known = verify(graph, card, facts=graph.facts)
    assert known.specs == alone.specs == tuple(graph.specs)
    each = [facts_of(graph, node, alone.specs, alone.specs[i]) for i, node in enumerate(graph.nodes)]
    for found, other in zip(known.facts, each, strict=True):
        assert (found.spec, found.flops, found.workspace, found.nbytes) == (
            *(other.spec, other.flops, other.workspace, other.nbytes),
        )
    assert price(graph, alone.specs) == price(graph, alone.specs, known.facts)


def test_attributes_that_are_equal_but_not_of_one_type_stay_apart() -> None:
    """1, 1.0 and True are three values, and so are 0.0 and -0.0; equal ones become one object."""
    table = AttrTable()
    different: list[Any] = [1, 1.0, True, 0.0, -0.0, "1", (1,), (1.0,), ((True,),), None]
    shared = [table.shared({"a": value}) for value in different]
    assert [repr(attrs["a"]) for attrs in shared] == [repr(value) for value in different]
    assert len({id(attrs) for attrs in shared}) == len(different)
    assert table.shared({"a": (1,)}) is shared[6]


def test_a_mistake_is_found_after_a_node_that_is_right_was_like_it() -> None:
    """An axis that is True is refused although an axis of 1 was taken a moment before."""
    trace = fake_client().model("fake").trace()
    x = trace.run([1, 2, 3]).embed
    inference, table = Inference(trace.builder.card, infer_node), AttrTable()
    specs = [trace.builder.specs[x._node]]
    right = Node("sum", (0,), table.shared({"axis": 1}))
    assert inference.facts(Graph(), right, specs).spec == infer_node(Graph(), trace.builder.card, right, specs)
    with pytest.raises(GraphError, match="axis"):
        inference.facts(Graph(), Node("sum", (0,), table.shared({"axis": True})), specs)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_a_number_that_is_too_large_is_refused_after_one_that_is_not(number: int) -> None:
    """Numbers are taken by their kind, but not those that no message can hold."""
    card = fake_client().model("fake").card
    inference = Inference(card, infer_node)
    inference.facts(Graph(), Node("const", (), {"scalar": 1}), [])
    with pytest.raises(GraphError):
        inference.facts(Graph(), Node("const", (), {"scalar": number}), [])
