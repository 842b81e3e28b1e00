"""Loops, choices and maps: random bodies against the reference interpreter and against plain Python loops in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchbay as pb
from patchbay.errors import GraphError
from patchbay.ir.bodies import Body
from patchbay.ir.dtypes import float64
from patchbay.ir.graph import Graph, Node, Output, TensorData
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.verify import verify
from patchbay.model import Model
from patchbay.reference import evaluate_control
from patchbay_server.engine.loops import Loops
from patchbay_server.engine.optimize import optimize
from patchbay_server.kernels import to_tensor
from tests.ir.cards import small_card
from tests.strategies import controlled
from tests.tiny import build

CARD = small_card()
SWITCHES = ("loop_invariants", "side_by_side", "dead_code", "common_subexpressions", "liveness")


@cache
def llama() -> Model:
    return pb.local(build("llama"))


def the_loop(graph: Graph) -> Node:
    return next(n for n in graph.nodes if n.op in ("scan", "cond", "map"))


def inputs_of(graph: Graph) -> list[Any]:
    """Constants by node, what is computed of them before the loop by plain torch."""
    values: list[Any] = []
    for node in graph.nodes:
        if node.op == "const":
            data = node.attrs.get("value")
            values.append(node.attrs["scalar"] if data is None else to_tensor(data))  # type: ignore[arg-type]
        elif node.op == "mean":
            values.append(values[node.args[0]].mean())
        elif node.op == "less":
            values.append(values[node.args[0]] < values[node.args[1]])
        else:
            break
    return values


PLAIN: dict[str, Callable[..., Any]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": lambda a, b: torch.maximum(a, torch.as_tensor(b, dtype=a.dtype)),
    "minimum": lambda a, b: torch.minimum(a, torch.as_tensor(b, dtype=a.dtype)),
    "less": lambda a, b: a < b,
    "mean": lambda a, axis: a.mean() if axis is None else a.mean(axis),
    "sum": lambda a, axis: a.sum() if axis is None else a.sum(axis),
    "broadcast_to": lambda a, shape: a.expand(shape),
}


def by_hand(graph: Graph, node: Node, args: Sequence[Any]) -> list[Any]:
    """The loop as a researcher would write it in Python over torch tensors."""

    def run(number: int, given: Sequence[Any]) -> list[Any]:
        values = list(given)
        for each in graph.bodies[number].nodes:
            inside = [values[a] for a in each.args]
            if each.op == "const":
                values.append(each.attrs["scalar"])
            elif each.op == "item":
                values.append(inside[0][each.attrs["index"]])
            elif each.op in ("scan", "cond", "map"):
                values.append(by_hand(graph, each, inside))
            else:
                values.append(PLAIN[each.op](*inside, **each.attrs))
        return [values[r] for r in graph.bodies[number].results]

    a: dict[str, Any] = dict(node.attrs)
    if node.op == "cond":
        return run(a["then"] if bool(args[0]) else a["otherwise"], args[1:])
    carried, sliced = (a["carry"], a["xs"]) if node.op == "scan" else (0, a["mapped"])
    length = a["length"] if node.op == "scan" else len(args[0])
    carry, rows = list(args[:carried]), []
    for i in range(length):
        gave = run(a["body"], [*carry, *(x[i] for x in args[carried : carried + sliced]), *args[carried + sliced :]])
        carry = gave[:carried]
        rows.append(gave[carried:])
    specs = graph.bodies[a["body"]].returns[carried:]
    stacks = [
        torch.stack([row[k] for row in rows]) if rows else torch.empty((0, *spec.shape), dtype=torch.float64)
        for k, spec in enumerate(specs)
    ]
    return [*carry, *stacks]


def loops_of(graph: Graph, disabled: Sequence[str] = ()) -> Loops:
    return Loops(verify(graph, CARD).flat, torch.device("cpu"), {}, lambda: None, disabled)


@given(controlled(CARD), st.sets(st.sampled_from(SWITCHES)))
@settings(max_examples=60, deadline=None)
def test_random_bodies_against_reference_and_plain_loops(graph: Graph, disabled: set[str]) -> None:
    """Every part of any loop equals the reference's and the plain loop's, whatever is switched off."""
    node = the_loop(graph)
    values = inputs_of(graph)
    args = [values[a] for a in node.args]
    with torch.no_grad():
        found = loops_of(graph, tuple(disabled)).run(node.op, node.attrs, args)
        plain = by_hand(graph, node, args)
    reference = evaluate_control(node.op, node.attrs, [np.asarray(a) for a in args], graph.bodies)
    assert len(found) == len(plain) == len(reference)
    for a, b, c in zip(found, plain, reference, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(a.numpy(), c, rtol=1e-9, atol=1e-9)


@given(controlled(CARD), st.sets(st.sampled_from(SWITCHES)))
@settings(max_examples=40, deadline=None)
def test_gradients_through_random_bodies(graph: Graph, disabled: set[str]) -> None:
    """The gradient of a number made of a loop's parts equals autograd's through the plain loop."""
    node = the_loop(graph)
    values = inputs_of(graph)

    def gradients(run: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
        args = [v.clone().requires_grad_(v.is_floating_point()) for v in (values[a] for a in node.args)]
        parts = [p for p in run(args) if p.requires_grad]
        leaves = [a for a in args if a.requires_grad]
        if not parts or not leaves:
            return []
        total = sum((p.sin().sum() for p in parts), start=torch.zeros((), dtype=torch.float64))
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]

    engine = gradients(lambda args: loops_of(graph, tuple(disabled)).run(node.op, node.attrs, args))
    plain = gradients(lambda args: by_hand(graph, node, args))
    assert len(engine) == len(plain)
    for a, b in zip(engine, plain, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-8, atol=1e-9)


def descending(graph: Graph, node: Node) -> tuple[Graph, Node, list[int]] | None:
    """A scan whose step differentiates a number made of another loop by what it is given, and goes down the slope.

    Returns it with the values that it takes: those of the loop, all carried; None where no value has a gradient.
    """
    specs = verify(graph, CARD).specs
    args = [a for a in node.args if isinstance(s := specs[a], TensorSpec) and s.dtype == float64]
    if not args or node.op == "cond":
        return None
    params = tuple(specs[a] for a in args)
    nodes: list[Node] = [Node(node.op, tuple(range(len(args))), node.attrs)]
    here = len(args)
    total = None
    for i in range(len(specs[graph.nodes.index(node)])):  # type: ignore[arg-type]
        nodes.append(Node("item", (here,), {"index": i}))
        nodes.append(Node("sin", (len(args) + len(nodes) - 1,)))
        nodes.append(Node("sum", (len(args) + len(nodes) - 1,)))
        value = len(args) + len(nodes) - 1
        if total is not None:
            nodes.append(Node("add", (total, value)))
            value += 1
        total = value
    assert total is not None
    nodes.append(Node("grad", (total, *range(len(args)))))
    slopes, results = len(args) + len(nodes) - 1, []
    for i in range(len(args)):
        nodes.append(Node("item", (slopes,), {"index": i}))
        nodes.append(Node("subtract", (i, len(args) + len(nodes) - 1)))
        results.append(len(args) + len(nodes) - 1)
    body = Body(params, tuple(nodes), (*results, total), (*params, TensorSpec((), float64)))  # type: ignore[arg-type]
    attrs = {"body": len(graph.bodies), "length": 3, "carry": len(args), "xs": 0}
    before = graph.nodes[: graph.nodes.index(node)]
    scan = Node("scan", tuple(args), attrs)
    return Graph((), (*before, scan), (), (*graph.bodies, body)), scan, args


@given(controlled(CARD), st.sets(st.sampled_from(SWITCHES)))
@settings(max_examples=60, deadline=None)
def test_gradients_inside_bodies_that_hold_random_loops(graph: Graph, disabled: set[str]) -> None:
    """Three steps down the slope of a number made of any loop end where autograd by hand ends."""
    node = the_loop(graph)
    made = descending(graph, node)
    if made is None:
        return
    outer, scan, args = made
    values = inputs_of(graph)
    try:
        loops = loops_of(outer, tuple(disabled))
    except GraphError as error:
        assert "does not depend" in str(error)
        return
    with torch.no_grad():
        found = loops.run("scan", scan.attrs, [values[a] for a in args])
    carry, seen = [values[a] for a in args], []
    for _ in range(3):
        leaves = [c.detach().clone().requires_grad_() for c in carry]
        parts = by_hand(graph, node, leaves)
        total = sum((p.sin().sum() for p in parts), start=torch.zeros((), dtype=torch.float64))
        seen.append(total.detach())
        slopes = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
        carry = [c if g is None else c - g for c, g in zip(carry, slopes, strict=True)]
    for a, b in zip(found, [*carry, torch.stack(seen)], strict=True):
        np.testing.assert_allclose(a.numpy(), b.detach().numpy(), rtol=1e-7, atol=1e-8)


@given(controlled(CARD))
@settings(max_examples=40, deadline=None)
def test_whole_graphs_through_the_engine(graph: Graph) -> None:
    """Sent, planned and executed, any loop gives what the reference says."""
    node = the_loop(graph)
    values = inputs_of(graph)
    reference = evaluate_control(node.op, node.attrs, [np.asarray(values[a]) for a in node.args], graph.bodies)
    results = llama().run(graph)
    for i, part in enumerate(reference):
        np.testing.assert_allclose(results[f"part_{i}"], part, rtol=1e-9, atol=1e-9)


def test_equal_bodies_and_loops_merge_on_the_server() -> None:
    """Two loops over bodies that are written twice are one; a body that differs in a number's type alone is another."""
    vector = TensorSpec((2,), float64)

    def scaled(by: float) -> Body:
        number = Node("const", (), {"scalar": by})
        return Body((vector,), (number, Node("multiply", (0, 1))), (2,), (vector,))

    def outer(inner: int) -> Body:
        scan = Node("scan", (0,), {"body": inner, "length": 2, "carry": 1, "xs": 0})
        return Body((vector,), (scan, Node("item", (1,), {"index": 0})), (2,), (vector,))

    bodies = (scaled(2.0), scaled(2.0), scaled(2), outer(0), outer(1), outer(2))
    x = Node("const", (), {"value": TensorData(float64, (2,), np.ones(2).tobytes())})
    loops = [Node("scan", (0,), {"body": b, "length": 3, "carry": 1, "xs": 0}) for b in (3, 4, 5)]
    items = [Node("item", (1 + i,), {"index": 0}) for i in range(3)]
    outputs = tuple(Output(f"x{i}", 4 + i) for i in range(3))
    graph = Graph((), (x, *loops, *items), outputs, bodies)
    small = optimize(verify(graph, CARD).flat, CARD).graph
    assert [n.attrs["body"] for n in small.nodes if n.op == "scan"] == [3, 5]
    assert [o.node for o in small.outputs] == [3, 3, 4]
    for name, value in llama().run(graph).items():
        np.testing.assert_array_equal(value, np.full(2, 64.0), err_msg=name)
