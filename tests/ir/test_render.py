"""Graphs as text: every kind of node, and whatever a graph may hold."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.ir.bodies import Body
from patchbay.ir.dtypes import bfloat16, float32, int64
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.render import render, show_index, site_path, statement
from patchbay.testing import fake_card
from tests.strategies import graphs

SMALL = TensorData(float32, (2,), struct.pack("<2f", 1.5, -2))
INTEGERS = TensorData(int64, (2,), struct.pack("<2q", 1, 2))
SLICE = ("slice", None, None, None)

NODES = (
    (Node("const", (), {"value": SMALL}), "%0 = float32[2](1.5, -2)"),
    (Node("const", (), {"value": INTEGERS}), "%1 = int64[2](1, 2)"),
    (Node("const", (), {"scalar": 2.0}), "%2 = 2.0"),
    (Node("site.read", (), {"site": "blocks.2.attn.z"}, 0), "%3 = run0.blocks[2].attn.z"),
    (Node("getitem", (3,), {"index": (SLICE, ("int", -1))}), "%4 = %3[:, -1]"),
    (Node("getitem", (3, 1), {"index": (("ellipsis",), ("newaxis",), ("array", 0))}), "%5 = %3[..., None, %1]"),
    (Node("add", (3, 2)), "%6 = %3 + %2"),
    (Node("sum", (6,), {"axis": -1, "keepdims": True}), "%7 = sum(%6, axis=-1, keepdims=True)"),
    (Node("topk", (6,), {"k": 3}), "%8 = topk(%6, k=3)"),
    (Node("item", (8,), {"index": 1}), "%9 = %8[1]"),
    (Node("call", (6,), {"target": "unembed"}), "%10 = unembed(%6)"),
    (Node("site.write", (6,), {"site": "embed", "mode": "set", "index": ()}, 1), "run1.embed = %6"),
    (Node("site.write", (6,), {"site": "embed", "mode": "add", "index": (("int", 0),)}, 1), "run1.embed[0] += %6"),
    (
        Node("site.write", (6, 1), {"site": "module:a.b.output", "mode": "mul", "index": (("array", 0),)}, 1),
        "run1.module('a.b').output[%1] *= %6",
    ),
    (Node("set_index", (3, 6), {"index": (SLICE, ("int", 0))}), "%14 = set_index(%3, %6, index=[:, 0])"),
    (Node("const", (), {"value": TensorData(bfloat16, (1,), bytes(2))}), "%15 = bfloat16[1](...)"),
)
GRAPH = Graph(
    (Run(((1, 2, 3),), "a text"), Run(((1,), (1, 2)))),
    tuple(n for n, _ in NODES),
    (Output("p", 4),),
)


@pytest.mark.parametrize(("position", "text"), list(enumerate(text for _, text in NODES)))
def test_each_kind_of_node_reads_like_python(position: int, text: str) -> None:
    """One line a node, values assigned once."""
    assert statement(GRAPH, position) == text


def test_the_whole_graph() -> None:
    """A heading, runs with their lengths, nodes, outputs; specs and places when given."""
    lines = render(GRAPH).splitlines()
    assert lines[0] == "graph of 2 runs, 16 nodes, 1 output"
    assert lines[1] == "  run 0: 'a text'  1 row of 3 tokens"
    assert lines[2] == "  run 1: 2 rows of 1 to 2 tokens"
    assert lines[-1] == "  return p = %4"
    assert len(lines) == 1 + 2 + 16 + 1
    specs: list[object] = [TensorSpec((2,), float32)] * 16
    specs[11] = ()
    full = render(GRAPH, specs=specs, locations=[f"f.py:{i}" for i in range(16)]).splitlines()
    assert full[3].split("  ")[1] == "%0 = float32[2](1.5, -2)"
    assert "float32[2]" in full[3]
    assert full[3].endswith("# f.py:0")
    assert "float32[2]" not in full[14]
    assert render(Graph()) == "graph of 0 runs, 0 nodes, 0 outputs"


def test_long_graphs_lose_their_middle() -> None:
    """`max_nodes` bounds the text and says what is left out."""
    graph = Graph((), tuple(Node("const", (), {"scalar": i}) for i in range(1000)))
    lines = render(graph, max_nodes=10).splitlines()
    assert len(lines) == 12
    assert "  ... (990 more nodes)" in lines
    assert lines[1] == "  %0 = 0"
    assert lines[-1] == "  %999 = 999"


def test_sites_and_indices() -> None:
    """Canonical names as Python writes them."""
    assert site_path("blocks.10.mlp.post") == "blocks[10].mlp.post"
    assert site_path("ln_final.scale") == "ln_final.scale"
    assert show_index((("slice", 1, None, 2), ("slice", None, 3, None)), []) == "[1::2, :3]"
    assert show_index((), []) == ""


@settings(max_examples=50)
@given(st.data())
def test_generated_graphs_render(data: st.DataObject) -> None:
    """One line for every node, run and output, whatever the graph."""
    card = fake_card()
    graph = data.draw(graphs(card, [s.name for s in card.sites]))
    text = render(graph)
    assert len(text.splitlines()) == 1 + len(graph.runs) + len(graph.nodes) + len(graph.outputs)


@pytest.mark.parametrize(
    "node",
    [
        Node("site.write", ()),
        Node("site.read", ()),
        Node("item", ()),
        Node("no_such_op", (0, 99), {"index": (("what", 1), "odd", ())}),
        Node("getitem", (0,), {"index": (("array", 7),)}),
    ],
)
def test_malformed_graphs_render_too(node: Node) -> None:
    """Text is for looking at what is wrong, so it never fails."""
    assert render(Graph((), (node,)))


def test_bodies_stand_indented_under_the_loop_that_runs_them() -> None:
    """Numbers stand where they are used; a body used again is not told again; what is missing does not matter."""
    vector = TensorSpec((2,), float32)
    double = Body((vector,), (Node("const", (), {"scalar": 2.0}), Node("multiply", (0, 1))), (2,), (vector,))
    inner = Node("map", (0,), {"body": 0, "mapped": 1})
    outer = Body((vector, vector), (inner, Node("item", (2,), {"index": 0}), Node("add", (3, 1))), (4,), (vector,))
    scan = Node("scan", (0, 0), {"body": 1, "length": 3, "carry": 1})
    nodes = (Node("const", (), {"value": SMALL}), scan, Node("map", (0,), {"body": 0, "mapped": 1}), Node("scan", (0,)))
    assert render(Graph((), nodes, (), (double, outer))).splitlines()[1:] == [
        "  %0 = float32[2](1.5, -2)",
        "  %1 = scan[body 1, 3 steps](%0; with %0)",
        "    body 1 ($0 float32[2], $1 float32[2]):",
        "      $2 = map[body 0](over $0)",
        "        body 0 ($0 float32[2]):",
        "          $2 = $0 * 2.0",
        "          gives $2",
        "      $3 = $2[0]",
        "      $4 = $3 + $1",
        "      gives $4",
        "  %2 = map[body 0](over %0)",
        "  %3 = scan[body None, None steps](with %0)",
    ]


def test_bodies_nested_without_end_are_shown_so_far() -> None:
    """A graph that no verifier would pass is still text."""
    vector = TensorSpec((2,), float32)

    def inside(k: int) -> Node:
        return Node("map", (0,), {"body": k, "mapped": 1})

    bodies = tuple(Body((vector,), (inside(max(k - 1, 0)),), (1,), (vector,)) for k in range(5_000))
    text = render(Graph((), (Node("const", (), {"value": SMALL}), inside(4_999)), (), bodies))
    assert "body 4999" in text and text.count("body") < 100
