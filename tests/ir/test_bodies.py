"""Bodies: what a graph with loops may hold, what it costs, and that hostile ones are refused at once."""

from __future__ import annotations

import contextlib
import struct
import time
from typing import Any

import pytest

from patchbay.errors import DTypeError, GraphError, LimitExceededError, ShapeError, UnknownOpError
from patchbay.ir.bodies import MAX_DEPTH, Body, canonical, check_bodies
from patchbay.ir.dtypes import bool_, float32, int64
from patchbay.ir.graph import Graph, Node, Output, TensorData
from patchbay.ir.infer import infer_node
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.price import price
from patchbay.ir.verify import verify
from tests.ir.cards import small_card

CARD = small_card()
VECTOR, NUMBER = TensorSpec((4,), float32), TensorSpec((), float32)
DOUBLE = Body((VECTOR,), (Node("add", (0, 0)),), (1,), (VECTOR,))


def vector(size: int = 4) -> Node:
    return Node("const", (), {"value": TensorData(float32, (size,), struct.pack(f"<{size}f", *[1.0] * size))})


def looped(*bodies: Body, length: Any = 3, body: int | None = None, carry: int = 1, xs: int = 0) -> Graph:
    """A scan of the last body over a constant."""
    attrs = {"body": len(bodies) - 1 if body is None else body, "length": length, "carry": carry, "xs": xs}
    nodes = (vector(), Node("scan", (0,), attrs), Node("item", (1,), {"index": 0}))
    return Graph((), nodes, (Output("a", 2),), bodies)


def calling(inner: int, length: int = 3) -> Body:
    """A body that loops over an earlier one."""
    scan = Node("scan", (0,), {"body": inner, "length": length, "carry": 1, "xs": 0})
    return Body((VECTOR,), (scan, Node("item", (1,), {"index": 0})), (2,), (VECTOR,))


def test_a_valid_loop() -> None:
    """Shapes, steps and operations of a loop are known without running it."""
    verified = verify(looped(DOUBLE, calling(0), length=5), CARD)
    assert verified.specs[1] == (VECTOR,)
    facts = verified.flat.body_facts
    assert [f.depth for f in facts] == [1, 2]
    assert [f.steps for f in facts] == [1, 3 * 1 + 2]
    assert price(verified.flat, verified.flat_specs).flops == 5 * 3 * 4


def body_of(*nodes: Node, params: tuple[TensorSpec, ...] = (VECTOR,), result: int | None = None) -> Body:
    """A body of these nodes that announces a vector."""
    return Body(params, nodes, (len(params) + len(nodes) - 1 if result is None else result,), (VECTOR,))


@pytest.mark.parametrize(
    ("graph", "error", "says", "field"),
    [
        (looped(DOUBLE, body=1), GraphError, "body 1 of a graph with 1", "nodes[1]"),
        (looped(DOUBLE, body=-1), GraphError, "body -1", "nodes[1]"),
        (looped(DOUBLE, length=-1), GraphError, "-1 steps", "nodes[1]"),
        (looped(DOUBLE, length=2**40), GraphError, "steps", "nodes[1]"),
        (looped(DOUBLE, length=True), GraphError, "length", "nodes[1]"),
        (looped(DOUBLE, carry=7), GraphError, "7 values carried", "nodes[1]"),
        (looped(DOUBLE, carry=0, xs=-1), GraphError, "-1 sliced", "nodes[1]"),
        (looped(DOUBLE, carry=0, xs=1), ShapeError, "slice by slice", "nodes[1]"),
        (looped(calling(0)), GraphError, "refers to body 0", "bodies[0].nodes[0]"),
        (looped(calling(1), DOUBLE, body=0), GraphError, "earlier ones only", "bodies[0].nodes[0]"),
        (looped(body_of(Node("add", (0, 1)))), GraphError, "earlier values", "bodies[0].nodes[0]"),
        (looped(body_of(Node("add", (0, -1)))), GraphError, "earlier values", "bodies[0].nodes[0]"),
        (looped(body_of(Node("site.read", (), {"site": "embed"}, 0))), GraphError, "no sites", "bodies[0].nodes[0]"),
        (looped(body_of(Node("site.write", (0,), {"site": "embed"}, 0))), GraphError, "no sites", "bodies[0].nodes[0]"),
        (looped(body_of(Node("param.read", (), {"name": "W"}))), GraphError, "pure", "bodies[0].nodes[0]"),
        (looped(body_of(Node("steps.stack", (0,)))), GraphError, "pure", "bodies[0].nodes[0]"),
        (looped(body_of(Node("exec", (0,)))), UnknownOpError, "exec", "bodies[0].nodes[0]"),
        (looped(body_of(Node("add", (0, 0), {}, 0))), GraphError, "no run", "bodies[0].nodes[0]"),
        (looped(body_of(vector())), GraphError, "no tensors", "bodies[0].nodes[0]"),
        (looped(body_of(Node("const"))), GraphError, "numbers", "bodies[0].nodes[0]"),
        (looped(body_of(Node("sum", (0,)))), ShapeError, "announces", "bodies[0].results[0]"),
        (looped(body_of(Node("add", (0, 0)), result=9)), GraphError, "value 9", "bodies[0].results[0]"),
        (looped(Body((VECTOR,), (), (), ())), GraphError, "gives nothing", "nodes[1]"),
        (looped(Body((VECTOR,), (), (0,), ())), GraphError, "announces 0", "bodies[0]"),
        (looped(Body((NUMBER,), (), (0,), (NUMBER,))), ShapeError, r"value 0 of its body is float32\[\]", "nodes[1]"),
        (looped(Body((VECTOR, VECTOR), (), (0,), (VECTOR,))), GraphError, "takes 2", "nodes[1]"),
        (
            looped(Body((VECTOR,), (Node("sum", (0,)),), (1,), (NUMBER,))),
            ShapeError,
            r"enters a step as float32\[4\] and leaves it as float32\[\]",
            "nodes[1]",
        ),
        (
            looped(Body((VECTOR,), (Node("astype", (0,), {"dtype": "int64"}),), (1,), (TensorSpec((4,), int64),))),
            DTypeError,
            "leaves it as int64",
            "nodes[1]",
        ),
        (
            looped(
                body_of(Node("sum", (0,)), Node("grad", (1, 1)), Node("item", (2,), {"index": 0}), Node("grad", (3, 0)))
            ),
            GraphError,
            "does not depend|announces|parts",
            None,
        ),
    ],
)
def test_broken_bodies(graph: Graph, error: type[Exception], says: str, field: str | None) -> None:
    """Every rule names what is wrong and where; nothing has run."""
    with pytest.raises(error, match=says) as wrong:
        verify(graph, CARD)
    if field is not None:
        assert isinstance(wrong.value, GraphError) and wrong.value.field == field


def test_a_choice_needs_one_bool_and_equal_results() -> None:
    """The condition has no dimensions; both bodies take and give the same."""
    test = Node("const", (), {"value": TensorData(bool_, (), b"\x01")})
    other = Body((VECTOR,), (Node("sum", (0,)),), (1,), (NUMBER,))
    ok = Graph((), (test, vector(), Node("cond", (0, 1), {"then": 0, "otherwise": 0})), (), (DOUBLE, other))
    assert verify(ok, CARD).specs[2] == (VECTOR,)
    for nodes, says in (
        ((test, vector(), Node("cond", (0, 1), {"then": 0, "otherwise": 1})), "where true it gives"),
        ((test, vector(), Node("cond", (1, 1), {"then": 0, "otherwise": 0})), "bool of no dimensions"),
        ((test, vector(3), Node("cond", (0, 1), {"then": 0, "otherwise": 0})), "of its body is"),
    ):
        with pytest.raises(ShapeError, match=says):
            verify(Graph((), nodes, (), (DOUBLE, other)), CARD)


def test_a_map_takes_slices() -> None:
    """The first axis of every mapped value has one extent, and results are stacked along it."""
    number = Body((NUMBER, VECTOR), (Node("multiply", (0, 1)),), (2,), (VECTOR,))
    nodes = (vector(3), vector(4), Node("map", (0, 1), {"body": 0, "mapped": 1}))
    assert verify(Graph((), nodes, (), (number,)), CARD).specs[2] == (TensorSpec((3, 4), float32),)
    for mapped in (0, 2, 3):
        with pytest.raises(GraphError):
            verify(Graph((), (*nodes[:2], Node("map", (0, 1), {"body": 0, "mapped": mapped})), (), (number,)), CARD)


def refused_within(graph: Graph, seconds: float) -> LimitExceededError | GraphError:
    start = time.process_time()
    with pytest.raises(GraphError) as wrong:
        verify(graph, CARD)
    assert time.process_time() - start < seconds
    return wrong.value


def test_loops_in_loops_are_refused_by_their_product() -> None:
    """Seven levels of a million steps each are priced in integers of any size, and refused at once."""
    bodies = [DOUBLE]
    for level in range(MAX_DEPTH - 1):
        bodies.append(calling(level, 10**6))
    wrong = refused_within(looped(*bodies, length=10**6), 0.05)
    assert isinstance(wrong, LimitExceededError) and wrong.limit == "max_loop_steps" and wrong.requested > 10**42


def test_the_limit_on_steps_is_exact_and_named() -> None:
    """At the limit a loop passes; one below, the error names it with both numbers."""
    graph = looped(DOUBLE, calling(0), length=5)  # 5 times (3 additions, the inner loop and its item)
    verify(graph, CARD, Limits(max_loop_steps=25))
    with pytest.raises(LimitExceededError, match="max_loop_steps") as wrong:
        verify(graph, CARD, Limits(max_loop_steps=24))
    assert (wrong.value.limit, wrong.value.allowed, wrong.value.requested) == ("max_loop_steps", 24, 25)


def test_loops_do_not_stand_too_deep() -> None:
    """Depth is bounded whatever the lengths are."""
    bodies = [DOUBLE]
    for level in range(MAX_DEPTH):
        bodies.append(calling(level, 1))
    assert "deep" in str(refused_within(looped(*bodies, length=1), 0.05))


def test_a_body_used_twice_by_each_of_many_is_checked_once_each() -> None:
    """A chain in which every body uses the one before twice (2**k runs) takes time in its nodes, not in its runs."""
    bodies = [DOUBLE]
    for level in range(MAX_DEPTH - 1):
        scans = [Node("scan", (0,), {"body": level, "length": 50, "carry": 1, "xs": 0})] * 2
        items = (Node("item", (1,), {"index": 0}), Node("item", (2,), {"index": 0}))
        bodies.append(Body((VECTOR,), (*scans, *items, Node("add", (3, 4))), (5,), (VECTOR,)))
    assert isinstance(refused_within(looped(*bodies), 0.05), LimitExceededError)


def test_nodes_of_bodies_count() -> None:
    """max_nodes is on the nodes of bodies too, and a body counts as one."""
    many = Body((VECTOR,), tuple(Node("add", (i, i)) for i in range(200)), (200,), (VECTOR,))
    verify(looped(many, length=1), CARD, Limits(max_nodes=204))
    with pytest.raises(LimitExceededError, match="max_nodes"):
        verify(looped(many, length=1), CARD, Limits(max_nodes=203))


def test_memory_of_a_step_counts() -> None:
    """What a step makes beside its results is part of the peak, once for a scan and for as many as run at once."""
    wide = Body(
        (VECTOR,),
        (Node("broadcast_to", (0,), {"shape": (2**20, 4)}), Node("sum", (1,), {"axis": 0})),
        (2,),
        (VECTOR,),
    )
    one = verify(looped(wide, length=1), CARD)
    ten = verify(looped(wide, length=10), CARD)
    peaks = [price(v.flat, v.flat_specs).peak_bytes for v in (one, ten)]
    assert 16 * 2**20 < peaks[0] == peaks[1] < 40 * 2**20
    with pytest.raises(LimitExceededError, match="max_peak_bytes"):
        verify(looped(wide), CARD, Limits(max_peak_bytes=2**20))


def test_equal_bodies_have_one_canonical_number() -> None:
    """Bodies that differ in numbers alone by type are different; those that use equal ones are equal."""

    def scaled(by: object) -> Body:
        return Body(
            (VECTOR,),
            (Node("const", (), {"scalar": by}), Node("multiply", (0, 1))),
            (2,),
            (VECTOR,),  # type: ignore[dict-item]
        )

    bodies = (scaled(2), scaled(2.0), scaled(2), calling(0), calling(2), calling(1))
    assert list(canonical(bodies).values()) == [0, 1, 0, 3, 3, 5]


def test_gradients_in_large_bodies_are_checked_in_time() -> None:
    """Thousands of values to differentiate by, and thousands of gradients, cost little in a body of 20,000 nodes."""
    count = 20_000
    chain = (*(Node("add", (i, i)) for i in range(count)), Node("sum", (count,)))
    metric = count + 1
    for grads in ((Node("grad", (metric, *[0] * 2_000)),), (Node("grad", (metric, 0)),) * 2_000):
        body = Body((VECTOR,), (*chain, *grads), (count,), (VECTOR,))
        start = time.process_time()
        with contextlib.suppress(GraphError):
            verify(looped(body, length=1), CARD)
        assert time.process_time() - start < 2


def test_facts_are_found_anew() -> None:
    """Facts that somebody put into a graph are not believed."""
    honest = looped(DOUBLE, length=10**9)
    facts = check_bodies(Graph(bodies=(DOUBLE,)), CARD, infer_node)
    free = type(facts[0])(facts[0].specs, 0, 0, 1, 0, 0)
    lying = Graph((), honest.nodes, honest.outputs, honest.bodies, (free,))
    with pytest.raises(LimitExceededError, match="max_loop_steps"):
        verify(lying, CARD)
