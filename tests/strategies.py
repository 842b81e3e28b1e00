"""Hypothesis strategies of whole graphs, shared by every room's property tests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from patchbay.ir.bodies import Body
from patchbay.ir.card import ModelCard
from patchbay.ir.dtypes import float32, float64
from patchbay.ir.graph import Attr, Graph, Node, Output, Run, TensorData
from patchbay.ir.infer import infer_node
from patchbay.ir.ops.spec import TensorSpec, ValueSpec

_UNARY = ("tanh", "relu", "negative", "abs", "square", "sigmoid", "gelu", "floor")
_BINARY = ("add", "subtract", "multiply", "maximum", "minimum")
_REDUCTIONS = ("sum", "mean", "max", "min")
_NUMBERS = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.5])


@st.composite
def graphs(
    draw: st.DrawFn,
    card: ModelCard,
    sites: Sequence[str],
    *,
    max_steps: int = 10,
    ragged: bool = False,
    alike: bool = False,
) -> Graph:
    """A graph of reads, writes, values that flow between runs, and operations; valid but for causality, which is free.

    Args:
        draw: given by hypothesis.
        card: the model's card.
        sites: names to read and write.
        max_steps: how many things happen.
        ragged: whether rows of a run may differ in length.
        alike: whether runs are mostly over the same tokens.
    """
    tokens = st.integers(0, card.d_vocab - 1)
    runs: list[Run] = []
    shared = draw(st.integers(2, 5)), draw(st.integers(1, 2))
    for _ in range(draw(st.integers(2 if alike else 1, 3))):
        seq, rows = shared if draw(st.booleans()) else (draw(st.integers(1, 5)), draw(st.integers(1, 2)))
        if alike and runs and draw(st.integers(0, 5)):
            runs.append(runs[0])
            continue
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


@st.composite
def controlled(draw: st.DrawFn, card: ModelCard, *, max_ops: int = 5) -> Graph:
    """A graph without runs whose outputs are the parts of one scan, cond or map over float64 constants.

    Its bodies are random: smooth operations on values of few shapes, loops and choices inside, values taken along.
    Everything stays in a range where float64 tells right from wrong.
    """
    bodies: list[Body] = []
    nodes: list[Node] = []

    def world() -> Graph:
        return Graph(bodies=tuple(bodies))

    def constant(shape: tuple[int, ...], seed: int) -> int:
        size = 1
        for extent in shape:
            size *= extent
        values = [((7 * (n + seed)) % 11 - 5) / 4 for n in range(size)]
        nodes.append(Node("const", (), {"value": TensorData(float64, shape, struct.pack(f"<{size}d", *values))}))
        return len(nodes) - 1

    def body(params: Sequence[TensorSpec], carried: int, depth: int, gives: Sequence[TensorSpec] | None) -> int:
        """A body that carries its first `carried` parameters on; `gives` instead says all that it must give."""
        inside: list[Node] = []
        specs: list[ValueSpec] = list(params)

        def put(node: Node) -> int:
            specs.append(infer_node(world(), card, node, specs))
            inside.append(node)
            return len(specs) - 1

        def number() -> int:
            return put(Node("const", (), {"scalar": draw(_NUMBERS)}))

        def tensors() -> list[int]:
            return [i for i, s in enumerate(specs) if isinstance(s, TensorSpec) and not s.scalar and s.dtype == float64]

        def shape_of(i: int) -> tuple[int, ...]:
            found = specs[i]
            assert isinstance(found, TensorSpec)
            return found.shape

        def compute() -> None:
            a = draw(st.sampled_from(tensors()))
            kinds = (
                ["unary", "number", "binary", "reduce", "loop"] if depth else ["unary", "number", "binary", "reduce"]
            )
            kind = draw(st.sampled_from(kinds))
            if kind == "unary":
                put(Node(draw(st.sampled_from(["tanh", "sigmoid", "sin"])), (a,)))
            elif kind == "number":
                put(Node(draw(st.sampled_from(_BINARY)), (a, number())))
            elif kind == "binary":
                partners = [i for i in tensors() if _broadcast(shape_of(i), shape_of(a))]
                made = put(Node(draw(st.sampled_from(_BINARY)), (a, draw(st.sampled_from(partners)))))
                put(Node("tanh", (made,)))
            elif kind == "reduce":
                axis = draw(st.sampled_from([None, -1])) if shape_of(a) else None
                put(Node(draw(st.sampled_from(["mean", "sum"])), (a,), {"axis": axis}))
            else:
                op, args, attrs = use(tensors(), specs, depth - 1, put)
                made = put(Node(op, args, attrs))
                parts = specs[made]
                assert isinstance(parts, tuple)
                for index in range(len(parts)):
                    put(Node("item", (made,), {"index": index}))

        for _ in range(draw(st.integers(0, max_ops))):
            compute()

        def like(spec: TensorSpec) -> int:
            """A value of this shape, made of whatever there is."""
            fitting = [i for i in tensors() if _fits(shape_of(i), spec.shape)]
            exact = [i for i in fitting if shape_of(i) == spec.shape]
            if exact and draw(st.booleans()):
                return draw(st.sampled_from(exact))
            some = draw(st.sampled_from(tensors()))
            mean = put(Node("mean", (some,), {"axis": None}))
            wide = put(Node("broadcast_to", (mean,), {"shape": spec.shape}))
            if exact:
                wide = put(Node("subtract", (draw(st.sampled_from(exact)), wide)))
            return put(Node("tanh", (wide,)))

        wanted = list(params[:carried]) if gives is None else list(gives)
        results = [like(spec) for spec in wanted]
        if gives is None:
            results += draw(st.lists(st.sampled_from(tensors()), min_size=0 if results else 1, max_size=2))
        returns = [specs[r] for r in results]
        bodies.append(Body(tuple(params), tuple(inside), tuple(results), tuple(returns)))  # type: ignore[arg-type]
        return len(bodies) - 1

    def use(
        values: Sequence[int], specs: Sequence[ValueSpec], depth: int, put: Callable[[Node], int]
    ) -> tuple[str, tuple[int, ...], dict[str, Attr]]:
        def spec_of(i: int) -> TensorSpec:
            found = specs[i]
            assert isinstance(found, TensorSpec)
            return found

        def some(least: int) -> list[int]:
            return draw(st.lists(st.sampled_from(values), min_size=least, max_size=2))

        op = draw(st.sampled_from(["scan", "cond", "map"]))
        long = [i for i in values if spec_of(i).shape]
        if op == "map" and not long:
            op = "cond"
        if op == "cond":
            a = draw(st.sampled_from(values))
            flat = put(Node("mean", (a,), {"axis": None}))
            test = put(Node("less", (flat, put(Node("const", (), {"scalar": 0.1})))))
            taken = some(1)
            params = [spec_of(i) for i in taken]
            then = body(params, 0, depth, None)
            otherwise = body(params, 0, depth, bodies[then].returns)
            return op, (test, *taken), {"then": then, "otherwise": otherwise}
        first = draw(st.sampled_from(long)) if long else None
        length = spec_of(first).shape[0] if first is not None else draw(st.integers(0, 4))
        xs = [i for i in ([] if first is None else [first, *some(0)]) if spec_of(i).shape[:1] == (length,)]
        slices = [TensorSpec(spec_of(i).shape[1:], float64) for i in xs]
        whole = some(0)
        if op == "map":
            number = body([*slices, *map(spec_of, whole)], 0, depth, None)
            return op, (*xs, *whole), {"body": number, "mapped": len(xs)}
        if draw(st.booleans()):
            xs, slices, length = [], [], draw(st.integers(0, 4))
        carry = some(1)
        number = body([*map(spec_of, carry), *slices, *map(spec_of, whole)], len(carry), depth, None)
        attrs: dict[str, Attr] = {"body": number, "length": length, "carry": len(carry), "xs": len(xs)}
        return op, (*carry, *xs, *whole), attrs

    shapes = draw(st.lists(st.sampled_from([(), (3,), (2, 3), (2,)]), min_size=1, max_size=3))
    outer_specs: list[ValueSpec] = []

    def place(node: Node) -> int:
        outer_specs.append(infer_node(world(), card, node, outer_specs))
        if node is not nodes[-1]:
            nodes.append(node)
        return len(nodes) - 1

    for seed, shape in enumerate(shapes):
        constant(shape, seed)
        place(nodes[-1])
    op, args, attrs = use(range(len(nodes)), outer_specs, 2, place)
    loop = place(Node(op, args, attrs))
    parts = outer_specs[loop]
    assert isinstance(parts, tuple)
    outputs = [Output(f"part_{i}", place(Node("item", (loop,), {"index": i}))) for i in range(len(parts))]
    return Graph((), tuple(nodes), tuple(outputs), tuple(bodies))


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False)
    )


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(reversed(a), reversed(b), strict=False))
