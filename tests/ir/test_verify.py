"""Valid graphs pass; every broken rule is refused with the most specific error, the node and the field."""

from __future__ import annotations

import math
import struct
from dataclasses import fields, replace
from typing import Any

import pytest

from patchbay.errors import (
    CausalityError,
    DTypeError,
    GraphError,
    IndexOutOfRangeError,
    LimitExceededError,
    ShapeError,
    SiteNotWritableError,
    UnknownOpError,
    UnknownSiteError,
)
from patchbay.ir.card import InputSpec, SiteSpec
from patchbay.ir.dtypes import DType, bool_, float32, int64
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.ir.infer import NO_VALUE
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.verify import verify
from tests.ir.cards import small_card

CARD = small_card()
RUN = Run(((1, 2, 3), (4, 5, 6)))


def floats(*shape: int) -> Node:
    size = 1
    for extent in shape:
        size *= extent
    return Node("const", (), {"value": TensorData(float32, shape, struct.pack(f"<{size}f", *([1.0] * size)))})


def read(site: str, run: int = 0) -> Node:
    return Node("site.read", (), {"site": site}, run)


def write(value: int, site: str, run: int = 0, **attrs: Any) -> Node:
    return Node("site.write", (value,), {"site": site, **attrs}, run)


def check(*nodes: Node, runs: tuple[Run, ...] = (RUN,), outputs: tuple[Output, ...] = (), limits: Limits | None = None):
    return verify(Graph(runs, nodes, outputs), CARD, limits)


def test_specs_of_every_kind_of_node() -> None:
    """Reads take the run's extents, writes have no value, calls change the last axis, items pick parts."""
    verified = check(
        read("blocks.1.resid_post"),
        write(0, "blocks.1.resid_post", mode="add"),
        Node("call", (0,), {"target": "unembed"}),
        Node("topk", (2,), {"k": 3}),
        Node("item", (3,), {"index": 1}),
        Node("const", (), {"scalar": 2.0}),
        Node("multiply", (0, 5)),
        outputs=(Output("a", 4),),
    )
    assert verified.specs[0] == TensorSpec((2, 3, 4), float32)
    assert verified.specs[1] == NO_VALUE
    assert verified.specs[2] == TensorSpec((2, 3, 10), float32)
    assert verified.specs[4] == TensorSpec((2, 3, 3), int64)
    assert verified.specs[6] == TensorSpec((2, 3, 4), float32)


BROKEN: list[tuple[str, type[GraphError], str, int | None, tuple[Node, ...]]] = [
    ("unknown op", UnknownOpError, "multply.*multiply", 1, (read("embed"), Node("multply", (0, 0)))),
    ("unknown site", UnknownSiteError, "resid_pst.*resid_post", 0, (read("blocks.0.resid_pst"),)),
    ("absent site", UnknownSiteError, "positions enter in attention", 0, (read("pos_embed"),)),
    ("read-only site", SiteNotWritableError, "a table", 1, (floats(4), write(0, "embed"))),
    ("forward reference", GraphError, "refers to node 1", 0, (Node("tanh", (1,)), read("embed"))),
    ("self reference", GraphError, "refers to node 0", 0, (Node("tanh", (0,)),)),
    ("negative reference", GraphError, "refers to node -1", 0, (Node("tanh", (-1,)),)),
    (
        "a write as argument",
        GraphError,
        "no value",
        2,
        (floats(4), write(0, "logits", index=(("ellipsis",), ("slice", 0, 4, None))), Node("tanh", (1,))),
    ),
    ("a tuple as argument", GraphError, "item", 2, (read("logits"), Node("topk", (0,), {"k": 2}), Node("tanh", (1,)))),
    ("item of a tensor", GraphError, "single tensor", 1, (read("logits"), Node("item", (0,), {"index": 0}))),
    (
        "item past the parts",
        GraphError,
        "2 parts",
        2,
        (read("logits"), Node("topk", (0,), {"k": 2}), Node("item", (1,), {"index": 2})),
    ),
    ("shapes", ShapeError, "broadcast", 2, (read("embed"), floats(5), Node("add", (0, 1)))),
    ("write shape", ShapeError, "does not fit", 1, (floats(5), write(0, "blocks.0.mlp_out"))),
    (
        "write dtype",
        DTypeError,
        "holds float32",
        2,
        (read("embed"), Node("greater", (0, 0)), write(1, "blocks.0.mlp_out")),
    ),
    (
        "write index",
        IndexOutOfRangeError,
        "index 7",
        1,
        (floats(4), write(0, "blocks.0.mlp_out", index=(("int", 0), ("int", 7)))),
    ),
    ("write mode", GraphError, "set, add, mul", 1, (floats(4), write(0, "blocks.0.mlp_out", mode="xor"))),
    ("no such run", GraphError, "between 0 and 0, got 1", 0, (read("embed", 1),)),
    ("pure op in a run", GraphError, "belongs to no run", 1, (read("embed"), Node("tanh", (0,), {}, 0))),
    ("read without a run", GraphError, "needs a run", 0, (Node("site.read", (), {"site": "embed"}),)),
    (
        "unknown attribute",
        GraphError,
        "no attribute 'depth'",
        1,
        (read("embed"), Node("softmax", (0,), {"axis": -1, "depth": 1})),
    ),
    (
        "attribute of another kind",
        GraphError,
        "must be an axis",
        1,
        (read("embed"), Node("softmax", (0,), {"axis": "last"})),
    ),
    ("missing attribute", GraphError, "needs the attribute 'site'", 0, (Node("site.read", (), {}, 0),)),
    ("too few arguments", GraphError, "takes 2", 1, (read("embed"), Node("add", (0,)))),
    ("an empty const", GraphError, "one of value, scalar and artifact", 0, (Node("const"),)),
    (
        "const of the wrong size",
        ShapeError,
        "do not hold",
        0,
        (Node("const", (), {"value": TensorData(float32, (3,), b"1234")}),),
    ),
    (
        "const of negative extent",
        ShapeError,
        "do not hold",
        0,
        (Node("const", (), {"value": TensorData(float32, (-1,), b"")}),),
    ),
    (
        "a scalar too large",
        GraphError,
        "must be a bool, a float, or an integer",
        0,
        (Node("const", (), {"scalar": 2**64}),),
    ),
    (
        "a scalar where a tensor belongs",
        DTypeError,
        "Python scalar",
        1,
        (Node("const", (), {"scalar": 1.0}), Node("softmax", (0,))),
    ),
    (
        "unknown callable",
        UnknownSiteError,
        "has no callable 'lm'",
        1,
        (read("embed"), Node("call", (0,), {"target": "lm"})),
    ),
    ("call on another width", ShapeError, "extent 4", 1, (read("logits"), Node("call", (0,), {"target": "unembed"}))),
]


@pytest.mark.parametrize(("error", "match", "node", "nodes"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_rule_is_refused_at_its_node(
    error: type[GraphError], match: str, node: int, nodes: tuple[Node, ...]
) -> None:
    """The error is of the most specific class, says what is wrong, and carries the node's id and field."""
    with pytest.raises(error, match=f"(?s){match}") as caught:
        check(*nodes)
    assert type(caught.value) is error
    assert caught.value.node == node
    assert caught.value.field is not None and caught.value.field.startswith(f"nodes[{node}]")


@pytest.mark.parametrize(
    ("outputs", "match"),
    [
        ((Output("a", 0), Output("a", 1)), "two outputs"),
        ((Output("a", 9),), "does not exist"),
        ((Output("a", 3),), "is a write"),
        ((Output("a", 2),), "2 parts"),
    ],
)
def test_outputs_name_single_values_once(outputs: tuple[Output, ...], match: str) -> None:
    """Duplicate names, missing nodes, writes and tuples are no outputs."""
    nodes = (read("logits"), Node("tanh", (0,)), Node("topk", (0,), {"k": 2}), write(1, "logits"))
    with pytest.raises(GraphError, match=match):
        check(*nodes, outputs=outputs)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (Run(()), "no rows"),
        (Run(((),)), "no tokens"),
        (Run(((1,) * 9,)), "at most 8"),
        (Run(((1, 10),)), "10 is outside"),
        (Run(((1, -1),)), "-1 is outside"),
    ],
)
def test_runs_hold_token_ids_of_the_vocabulary(run: Run, match: str) -> None:
    """Empty runs, rows beyond the context and ids outside the vocabulary are refused before any work."""
    with pytest.raises(GraphError, match=match) as error:
        check(runs=(run,))
    assert error.value.field is not None and error.value.field.startswith("runs[0]")


def test_ragged_rows_need_a_model_that_takes_them() -> None:
    """Where padding could be seen, unequal rows are refused."""
    graph = Graph((Run(((1, 2), (3,))),), (read("embed"),))
    verify(graph, CARD)
    with pytest.raises(GraphError, match="one length"):
        verify(graph, replace(CARD, ragged=False))


PIXELS = InputSpec("pixel_values", ("rows", 2), float32)
IDS = InputSpec("decoder_input_ids", ("rows", "dec_seq"), int64, required=False, below=10)
SEEING = replace(
    CARD,
    inputs=(PIXELS, IDS),
    sites=(*CARD.sites, SiteSpec("decoder.embed", ("rows", "dec_seq", 4), float32, 99)),
)


def given(**inputs: TensorData) -> Run:
    return Run(((1, 2, 3),), inputs=tuple(inputs.items()))


def pixels(*shape: int, dtype: DType = float32) -> TensorData:
    return TensorData(dtype, shape, bytes(4 * math.prod(shape) * dtype.itemsize // 4))


def ids(*values: int) -> TensorData:
    return TensorData(int64, (1, len(values)), struct.pack(f"<{len(values)}q", *values))


def test_named_inputs_give_sites_their_extents() -> None:
    """A decoder's own tokens set the extent of its sites; without them such a site does not exist in the run."""
    graph = Graph((given(pixel_values=pixels(1, 2), decoder_input_ids=ids(1, 2, 3, 4)),), (read("decoder.embed"),))
    assert verify(graph, SEEING).specs[0] == TensorSpec((1, 4, 4), float32)
    with pytest.raises(GraphError, match=r"decoder.embed exists only in runs that have the input behind 'dec_seq'"):
        verify(Graph((given(pixel_values=pixels(1, 2)),), (read("decoder.embed"),)), SEEING)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (given(), "lacks the input 'pixel_values'"),
        (given(pixel_values=pixels(1, 2), audio=pixels(1, 2)), "no input 'audio'"),
        (given(pixel_values=pixels(1, 3)), r"is \[rows, 2\]"),
        (given(pixel_values=pixels(2, 2)), r"is \[rows, 2\]"),
        (given(pixel_values=TensorData(float32, (1, 2), b"123")), "do not hold"),
        (given(pixel_values=TensorData(float32, (1, -2), b"")), "do not hold"),
        (given(pixel_values=pixels(1, 2, dtype=int64)), "holds float32"),
        (given(pixel_values=pixels(1, 2), decoder_input_ids=ids(1, 10)), "outside 0 to 9"),
        (given(pixel_values=pixels(1, 2), decoder_input_ids=ids(-1)), "outside 0 to 9"),
        (Run(inputs=(("pixel_values", pixels(1, 2)),)), "takes token ids"),
        (Run(((1,),), inputs=(("pixel_values", pixels(1, 2)), ("pixel_values", pixels(1, 2)))), "input twice"),
    ],
)
def test_inputs_are_those_of_the_card(run: Run, match: str) -> None:
    """Missing, unknown, misshapen, mistyped and out-of-range inputs are refused before any work."""
    with pytest.raises(GraphError, match=match):
        verify(Graph((run,), (read("embed"),)), SEEING)


def test_inputs_count_towards_the_bytes_of_constants() -> None:
    """A large image is charged like a large constant."""
    run = given(pixel_values=pixels(1, 2))
    with pytest.raises(LimitExceededError, match="max_const_bytes"):
        verify(Graph((run,), (read("embed"),)), SEEING, Limits(max_const_bytes=7))


LIMIT_CASES: dict[str, tuple[int, tuple[Node, ...]]] = {
    "max_nodes": (1, (read("embed"), read("embed"))),
    "max_runs": (0, (read("embed"),)),
    "max_rows": (1, (read("embed"),)),
    "max_tokens": (5, (read("embed"),)),
    "max_const_bytes": (15, (floats(4),)),
    "max_result_bytes": (95, (read("embed"),)),
    "max_peak_bytes": (191, (read("embed"), Node("tanh", (0,)))),
    "max_flops": (23, (read("embed"), Node("negative", (0,)))),
}


# max_loop_steps needs bodies: tests/ir/test_bodies.py
@pytest.mark.parametrize("limit", [f.name for f in fields(Limits) if f.name != "max_loop_steps"])
def test_every_limit_is_enforced_and_named(limit: str) -> None:
    """Just past a limit the error names it with both numbers; at the limit the graph passes."""
    allowed, nodes = LIMIT_CASES[limit]
    outputs = (Output("out", len(nodes) - 1),)
    with pytest.raises(LimitExceededError, match=limit) as error:
        check(*nodes, outputs=outputs, limits=Limits(**{limit: allowed}))
    assert (error.value.limit, error.value.allowed) == (limit, allowed)
    check(*nodes, outputs=outputs, limits=Limits(**{limit: error.value.requested}))


@pytest.mark.parametrize(
    "bomb",
    [
        (floats(1), Node("broadcast_to", (0,), {"shape": (10**9, 10**9)})),
        (floats(1024), *(Node("concat", (i, i), {"axis": 0}) for i in range(60))),
        (floats(4096, 1), Node("matmul", (0, 2)), Node("const")),
        (floats(100_000), Node("outer", (0, 0)), Node("sum", (1,))),
        (floats(64, 64), Node("einsum", (0, 0, 0), {"equation": "ab,cd,ef->abcdef"})),
        (floats(64, 64), Node("tile", (0,), {"repetitions": (10**6, 10**6)})),
    ],
    ids=["expand", "doubling", "malformed", "huge intermediate, small output", "einsum", "tile"],
)
def test_bombs_are_refused_from_their_shapes_alone(bomb: tuple[Node, ...]) -> None:
    """Shapes of terabytes cost nothing to refuse: nothing is allocated."""
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(GraphError):
        check(*bomb, outputs=(Output("out", len(bomb) - 1),))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_write_that_needs_a_later_site_is_refused_with_both_nodes() -> None:
    """The causality error carries the write and the read that comes too late."""
    with pytest.raises(CausalityError, match="blocks.0.mlp_out.*blocks.1.resid_post") as error:
        check(read("blocks.1.resid_post"), write(0, "blocks.0.mlp_out"), read("logits"))
    assert (error.value.node, error.value.related) == (1, (0,))


def test_a_circle_through_two_runs_is_refused() -> None:
    """Late of a into early of b, late of b into early of a: no order exists."""
    nodes = (
        read("blocks.1.mlp_out", 0),
        write(0, "blocks.0.mlp_out", 1),
        read("blocks.1.mlp_out", 1),
        write(2, "blocks.0.mlp_out", 0),
    )
    with pytest.raises(CausalityError, match="by way of other runs") as error:
        check(*nodes, runs=(RUN, RUN))
    assert error.value.node in (1, 3) and error.value.related


def test_a_bool_const_is_a_bool() -> None:
    """Python scalars keep their kind: a bool is not an int."""
    assert check(Node("const", (), {"scalar": True})).specs[0] == TensorSpec((), bool_, scalar="bool")


def test_verification_of_many_nodes_does_not_recurse() -> None:
    """A chain of 20,000 nodes is verified without deep recursion."""
    nodes = (read("embed"), *(Node("tanh", (i,)) for i in range(20_000)))
    assert len(check(*nodes).specs) == 20_001
