"""Hypothesis strategies of whole graphs, shared by every room's property tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hypothesis import strategies as st

from patchbay.ir.card import ModelCard
from patchbay.ir.dtypes import float32
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from patchbay.ir.verify import infer_node

_UNARY = ("tanh", "relu", "negative", "abs", "square", "sigmoid", "gelu", "floor")
_BINARY = ("add", "subtract", "multiply", "maximum", "minimum")
_REDUCTIONS = ("sum", "mean", "max", "min")
_NUMBERS = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.5])


@st.composite
def graphs(
    draw: st.DrawFn, card: ModelCard, sites: Sequence[str], *, max_steps: int = 10, ragged: bool = False
) -> Graph:
    """A graph of reads, writes, values that flow between runs, and operations; valid but for causality, which is free.

    Args:
        draw: given by hypothesis.
        card: the model's card.
        sites: names to read and write.
        max_steps: how many things happen.
        ragged: whether rows of a run may differ in length.
    """
    tokens = st.integers(0, card.d_vocab - 1)
    runs: list[Run] = []
    shared = draw(st.integers(2, 5)), draw(st.integers(1, 2))
    for _ in range(draw(st.integers(1, 3))):
        seq, rows = shared if draw(st.booleans()) else (draw(st.integers(1, 5)), draw(st.integers(1, 2)))
        lengths = [draw(st.integers(1, seq)) if ragged else seq for _ in range(rows)]
        runs.append(Run(tuple(tuple(draw(st.lists(tokens, min_size=n, max_size=n))) for n in lengths)))
    nodes: list[Node] = []
    specs: list[ValueSpec] = []
    world = Graph(runs=tuple(runs))

    def add(node: Node) -> int:
        specs.append(infer_node(world, card, node, specs))
        nodes.append(node)
        return len(nodes) - 1

    def tensors() -> list[int]:
        return [i for i, s in enumerate(specs) if isinstance(s, TensorSpec) and s.scalar is None]

    def spec_of(i: int) -> TensorSpec:
        found = specs[i]
        assert isinstance(found, TensorSpec)
        return found

    def read() -> int:
        return add(Node("site.read", (), {"site": draw(st.sampled_from(sites))}, draw(st.integers(0, len(runs) - 1))))

    def index_of(shape: tuple[int, ...]) -> tuple[tuple[str | int | None, ...], ...]:
        items: list[tuple[str | int | None, ...]] = []
        for extent in shape[: draw(st.integers(0, len(shape)))]:
            kind = draw(st.sampled_from(["int", "slice", "all"]))
            if kind == "int" and extent:
                items.append(("int", draw(st.integers(-extent, extent - 1))))
            elif kind == "slice":
                start = draw(st.integers(0, max(extent - 1, 0)))
                items.append(("slice", start, draw(st.integers(start, extent)), draw(st.sampled_from([None, 1, 2]))))
            else:
                items.append(("slice", None, None, None))
        return tuple(items)

    def constant(shape: tuple[int, ...]) -> int:
        size = 1
        for extent in shape:
            size *= extent
        values = [((7 * n) % 11 - 5) / 4 for n in range(size)]
        return add(Node("const", (), {"value": TensorData(float32, shape, struct.pack(f"<{size}f", *values))}))

    def write() -> None:
        run = draw(st.integers(0, len(runs) - 1))
        site = draw(st.sampled_from(sites))
        full = card.site(site).shape(card.extents(runs[run]))
        index = index_of(full)
        part = infer_node(Graph(), card, Node("getitem", (0,), {"index": index}), [TensorSpec(full, float32)])
        assert isinstance(part, TensorSpec)
        fitting = [i for i in tensors() if _fits(spec_of(i).shape, part.shape) and spec_of(i).dtype == float32]
        if fitting and draw(st.booleans()):
            value = draw(st.sampled_from(fitting))
        elif draw(st.booleans()):
            value = constant(part.shape)
        else:
            value = add(Node("const", (), {"scalar": draw(_NUMBERS)}))
        mode = draw(st.sampled_from(["set", "add", "mul"]))
        add(Node("site.write", (value,), {"site": site, "mode": mode, "index": index}, run))

    def compute() -> None:
        choices = tensors()
        if not choices:
            read()
            return
        a = draw(st.sampled_from(choices))
        shape = spec_of(a).shape
        kind = draw(st.sampled_from(["unary", "scalar", "binary", "getitem", "reduce", "softmax"]))
        if kind == "unary":
            add(Node(draw(st.sampled_from(_UNARY)), (a,)))
        elif kind == "scalar":
            number = add(Node("const", (), {"scalar": draw(_NUMBERS)}))
            add(Node(draw(st.sampled_from(_BINARY)), (a, number)))
        elif kind == "binary":
            partners = [i for i in choices if _broadcast(spec_of(i).shape, shape)]
            add(Node(draw(st.sampled_from(_BINARY)), (a, draw(st.sampled_from(partners)))))
        elif kind == "getitem":
            add(Node("getitem", (a,), {"index": index_of(shape)}))
        elif shape and all(shape):
            axis = draw(st.integers(-len(shape), len(shape) - 1))
            if kind == "softmax":
                add(Node("softmax", (a,), {"axis": axis}))
            else:
                attrs = {"axis": axis, "keepdims": draw(st.booleans())}
                add(Node(draw(st.sampled_from(_REDUCTIONS)), (a,), attrs))

    for _ in range(draw(st.integers(1, max_steps))):
        draw(st.sampled_from([read, write, write, compute, compute]))()
    if not tensors():
        read()
    read()
    chosen = draw(st.lists(st.sampled_from(tensors()), min_size=1, max_size=4, unique=True))
    outputs = tuple(Output(f"value_{i}", i) for i in sorted({*chosen, tensors()[-1]}))
    return Graph(tuple(runs), tuple(nodes), outputs)


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False)
    )


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))
