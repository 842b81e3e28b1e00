"""`patchbay.scan`, `cond` and `vmap`: loops, choices and maps that the server runs, described by plain functions.

The function is called once, while the graph is built, with stand-ins for what it will be given; the nodes that it makes
become a body of the graph (`patchbay.ir.bodies`). Values of the trace that it mentions are taken along by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from patchbay.arguments import check_function, integer, refused, seen
from patchbay.arrays import as_array, to_data
from patchbay.errors import DTypeError, GraphError, ShapeError, TraceError
from patchbay.ir.dtypes import DType, bool_, promote_scalar, scalar_kind
from patchbay.ir.ops.spec import TensorSpec
from patchbay.places import here
from patchbay.tracing.fragments import trace_of
from patchbay.tracing.proxy import Proxy, lift
from patchbay.tracing.trees import flatten, flatten_like, kind_of, unflatten

if TYPE_CHECKING:
    from patchbay.tracing.scopes import Scope
    from patchbay.tracing.trace import BaseTrace


def scan(
    fn: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any = None, length: int | None = None
) -> tuple[Any, Any]:
    """A loop that the server runs: ``carry, y = fn(carry, x)`` for every x, as jax.lax.scan.

        def step(w, _):
            loss = ((acts @ w - target) ** 2).mean()
            return w - 0.1 * pb.grad(loss, wrt=w), loss

        w, losses = pb.scan(step, t.constant(np.zeros(64, "float32")), length=200)

    The loop's length is part of the graph, so its price is known and held to the server's limits before it runs.

    Args:
        fn: one step, of operations on values alone: it reads and writes at no run. It is called once, when the graph is
            built. Values of the trace that it mentions, and arrays, are taken along. `pb.grad` works inside.
        init: what the first step carries: a value of the trace, an array, a number, or tuples, lists and dicts of
            them. Numbers become tensors of no dimensions (float32, int64 or bool).
        xs: what is taken slice by slice along its first axis: a value, or a tree; None for nothing.
        length: how many steps; may be left out where `xs` says so.

    Returns:
        What the last step carried on, as a tree like `init`; and what the steps gave (None in it stays None), each
        value stacked along a new first axis.

    Raises:
        ShapeError, DTypeError: what is carried changes its shape or dtype from step to step, or `xs` differ in length.
        GraphError: a step reads or writes at a run, or gives something else than a pair.
        TraceError: nothing tells which trace the loop belongs to.
    """
    check_function("scan: fn", fn, "carry", "x")
    if length is not None:
        length = integer("scan: length", length, least=0)
    trace = _trace_for("scan", fn, (init, xs))
    carried, carry_tree = flatten(init)
    sliced, xs_tree = flatten(xs)
    enters = [_tensor(trace, leaf) for leaf in carried]
    over = [_tensor(trace, leaf) for leaf in sliced]
    steps = _length(over, length)
    builder = trace.builder
    with builder.body("scan") as scope:
        c = [_param(trace, scope, p._spec, f"carry{i or ''}") for i, p in enumerate(enters)]
        x = [_param(trace, scope, TensorSpec(p.shape[1:], p.dtype), f"x{i or ''}") for i, p in enumerate(over)]
        gives = fn(unflatten(carry_tree, c), unflatten(xs_tree, x))
        if not isinstance(gives, tuple) or len(gives) != 2:
            raise GraphError(
                f"scan: a step gives a pair, what it carries on and what it gives (or None), got {kind_of(gives)}",
                location=here(),
            )
        leaves = flatten_like("scan: what a step carries on", gives[0], carry_tree)
        new = [_tensor(trace, leaf, like=p.dtype) for leaf, p in zip(leaves, enters, strict=True)]
        _check_carried(trace, enters, new)
        y_leaves, y_tree = flatten(gives[1])
        results = [p._node for p in (*new, *(_tensor(trace, leaf) for leaf in y_leaves))]
    if not results:
        raise GraphError("scan: the loop carries nothing and gives nothing", location=here())
    captured = builder.captured(scope, results)
    attrs = {"body": builder.add_body(scope, results, captured), "length": steps, "carry": len(c), "xs": len(x)}
    parts = _parts(trace, "scan", (*(p._node for p in (*enters, *over)), *captured), attrs, len(results))
    return unflatten(carry_tree, parts[: len(c)]), unflatten(y_tree, parts[len(c) :])


def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], *operands: Any) -> Any:
    """``true_fn(*operands)`` where `pred` is true, else ``false_fn(*operands)``; the other is not run. As jax.lax.cond.

    To choose element by element, use `patchbay.where`.

    Args:
        pred: one bool: a value of the trace of no dimensions, or a Python bool.
        true_fn: as the function of `scan`; values of the trace that it mentions are taken along.
        false_fn: likewise; it gives the same tree of the same shapes and dtypes.
        operands: values, arrays, numbers, or trees of them.

    Raises:
        ShapeError, DTypeError: the two give different shapes or dtypes, or `pred` is not one bool.
        GraphError: they give different trees, or read or write at a run.
        TraceError: nothing tells which trace it belongs to.
    """
    for name, fn in (("true_fn", true_fn), ("false_fn", false_fn)):
        check_function(f"cond: {name}", fn, *(f"operand{i or ''}" for i in range(len(operands))))
    trace = _trace_for("cond", (true_fn, false_fn), (pred, operands))
    builder = trace.builder
    leaves, tree = flatten(operands)
    values = [_tensor(trace, leaf) for leaf in leaves]
    condition = _tensor(trace, pred)
    if condition.shape or condition.dtype != bool_:
        raise ShapeError(
            f"cond: the condition must be one bool, got {condition._spec}; to choose element by element, use pb.where",
            location=here(),
        )
    scopes: list[Scope] = []
    given: list[list[Any]] = []
    trees: list[Any] = []
    for fn in (true_fn, false_fn):
        with builder.body("cond") as scope:
            taken = [_param(trace, scope, p._spec, f"operand{i or ''}") for i, p in enumerate(values)]
            gives = fn(*unflatten(tree, taken))
            if not trees:
                found, first = flatten(gives)
                trees.append(first)
            else:
                found = flatten_like("cond: what false_fn gives", gives, trees[0])
            # A number takes the dtype of what the other function gives there.
            likes = [_dtype(p) for p in given[0]] if given else [None] * len(found)
            given.append([_tensor(trace, leaf, like=like) for leaf, like in zip(found, likes, strict=True)])
            scopes.append(scope)
    for i, (a, b) in enumerate(zip(*given, strict=True)):
        if a._spec != b._spec:
            wrong = ShapeError if a.shape != b.shape else DTypeError
            raise wrong(
                f"cond: result {i} is {_made(trace, a)} where true, and {_made(trace, b)} where false", location=here()
            )
    results = [[p._node for p in side] for side in given]
    if not results[0]:
        raise GraphError("cond: the functions give nothing", location=here())
    captured = list(dict.fromkeys(n for s, r in zip(scopes, results, strict=True) for n in builder.captured(s, r)))
    then, otherwise = (builder.add_body(s, r, captured) for s, r in zip(scopes, results, strict=True))
    args = (condition._node, *(p._node for p in values), *captured)
    return unflatten(trees[0], _parts(trace, "cond", args, {"then": then, "otherwise": otherwise}, len(results[0])))


def vmap(fn: Callable[..., Any], in_axes: int | None | Sequence[int | None] = 0) -> Callable[..., Any]:
    """`fn` applied to every slice of its arguments along an axis, its results stacked along a new first axis.

    As jax.vmap: it means a loop in which no step depends on another, and the server runs the steps side by side where
    that changes nothing but rounding.

    Args:
        fn: as the function of `scan`; values of the trace that it mentions are taken along whole.
        in_axes: the axis of each argument, or one for all; None for an argument that every step takes whole. In an
            argument that is a tree, the axis is that of each of its values.

    Returns:
        A function of as many arguments: values, arrays, or trees of them.

    Raises:
        ShapeError: the mapped axes differ in extent, or are missing (when the function is called).
        GraphError: no argument is mapped, or `fn` reads or writes at a run.
    """
    if not callable(fn):
        raise refused(f"vmap: fn is a function, not {seen(fn)}; vmap(fn)(x) applies it to x")
    said = _axes(in_axes)

    def mapped(*args: Any) -> Any:
        check_function("vmap: fn", fn, *(f"x{i or ''}" for i in range(len(args))))
        trace = _trace_for("vmap", fn, args)
        axes = said if isinstance(said, tuple) else (said,) * len(args)
        if len(axes) != len(args):
            raise refused(f"vmap: in_axes says {len(axes)} axes for {len(args)} arguments")
        builder = trace.builder
        flat = [flatten(arg) for arg in args]
        over: list[Proxy] = []
        whole: dict[tuple[int, int], Proxy] = {}
        for i, ((leaves, _), axis) in enumerate(zip(flat, axes, strict=True)):
            for k, leaf in enumerate(leaves):
                value = _tensor(trace, leaf)
                if axis is None:
                    whole[i, k] = value
                else:
                    over.append(_first_axis(value, axis))
        if not over:
            raise GraphError("vmap: no argument is mapped over; say its axis in in_axes", location=here())
        _length(over, None, "vmap")
        with builder.body("vmap") as scope:
            slices = iter(
                [_param(trace, scope, TensorSpec(p.shape[1:], p.dtype), f"x{i or ''}") for i, p in enumerate(over)]
            )
            taken = [
                unflatten(tree, [whole[i, k] if (i, k) in whole else next(slices) for k in range(len(leaves))])
                for i, (leaves, tree) in enumerate(flat)
            ]
            found, tree = flatten(fn(*taken))
            results = [_tensor(trace, leaf)._node for leaf in found]
        if not results:
            raise GraphError("vmap: the function gives nothing", location=here())
        captured = builder.captured(scope, results)
        attrs = {"body": builder.add_body(scope, results, captured), "mapped": len(over)}
        return unflatten(tree, _parts(trace, "map", (*(p._node for p in over), *captured), attrs, len(results)))

    return mapped


def where(condition: Any, x1: Any, x2: Any) -> Proxy:
    """`x1` where `condition` is true, else `x2`, element by element with broadcasting; as `patchbay.ops.where`."""
    from patchbay.tracing.functions import functions

    chosen: Proxy = functions()["where"](condition, x1, x2)
    return chosen


# --- values -------------------------------------------------------------------------------------------------------


def _tensor(trace: BaseTrace, value: object, like: DType | None = None) -> Proxy:
    """`value` as a tensor of the trace; a Python number takes the dtype `like` where that can hold its kind."""
    if isinstance(value, (bool, int, float)):
        array = as_array([value])[0:1].reshape(())
        if like is not None and promote_scalar(like, scalar_kind(value)) == like:
            array = as_array(array, like)
        return Proxy(trace, trace.builder.constant(to_data(array)))
    node = lift(trace, value)
    spec = trace.builder.specs[node]
    assert isinstance(spec, TensorSpec)
    return Proxy(trace, node)


def _dtype(value: Proxy) -> DType:
    return value.dtype


def _param(trace: BaseTrace, scope: Scope, spec: TensorSpec, name: str) -> Proxy:
    return Proxy(trace, trace.builder.add_param(scope, TensorSpec(spec.shape, spec.dtype), name))


def _parts(trace: BaseTrace, op: str, args: tuple[int, ...], attrs: dict[str, Any], count: int) -> list[Proxy]:
    node = trace.builder.add(op, args, attrs)
    return [Proxy(trace, trace.builder.add("item", (node,), {"index": i})) for i in range(count)]


def _axes(in_axes: Any) -> int | None | tuple[int | None, ...]:
    """
    Raises:
        ArgumentError: neither an axis, None, nor a sequence of these.
    """
    if isinstance(in_axes, (list, tuple)):
        return tuple(None if axis is None else integer("vmap: an axis", axis) for axis in in_axes)
    return None if in_axes is None else integer("vmap: in_axes", in_axes)


def _first_axis(value: Proxy, axis: int) -> Proxy:
    if not -value.ndim <= axis < value.ndim:
        raise ShapeError(f"vmap: axis {axis} of a value of shape {list(value.shape)}", location=here())
    axis %= value.ndim
    if axis == 0:
        return value
    return value._transposed((axis, *(i for i in range(value.ndim) if i != axis)))


def _length(over: Sequence[Proxy], length: int | None, op: str = "scan") -> int:
    for p in over:
        if not p.shape:
            raise ShapeError(f"{op}: {p._trace.builder.describe(p._node)} has no axis to take slices along")
    extents = {p.shape[0] for p in over}
    if length is None and not extents:
        raise GraphError(f"{op}: without xs, say how many steps: length=100", location=here())
    steps = extents.copy().pop() if length is None else length
    if extents - {steps}:
        shown = ", ".join(str(list(p.shape)) for p in over)
        raise ShapeError(f"{op}: {steps} steps over values of shapes {shown}", location=here())
    return steps


def _check_carried(trace: BaseTrace, enters: Sequence[Proxy], leaves: Sequence[Proxy]) -> None:
    for i, (a, b) in enumerate(zip(enters, leaves, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            wrong = ShapeError if a.shape != b.shape else DTypeError
            raise wrong(
                f"scan: what is carried keeps its shape and dtype; carried value {i} enters a step as {a._spec} and "
                f"leaves it as {_made(trace, b)}",
                location=trace.builder.location(b._node),
            )


def _made(trace: BaseTrace, value: Proxy) -> str:
    builder = trace.builder
    return f"{value._spec} ({builder.describe(value._node)}, made at {builder.location(value._node)})"


# --- which trace it is --------------------------------------------------------------------------------------------


def _trace_for(what: str, fns: Any, values: object) -> BaseTrace:
    """The trace of the values, or else of the values that the functions mention."""
    found = trace_of(values)
    if found is not None:
        return found
    traces: list[BaseTrace] = []
    for fn in fns if isinstance(fns, tuple) else (fns,):
        for value in _mentioned(fn):
            other = trace_of(value)
            if other is not None and other.builder.closed is None and other not in traces:
                traces.append(other)
    if len(traces) != 1:
        raise TraceError(
            f"{what}: none of its arguments is a value of a trace, so nothing tells where it belongs; make one with "
            "t.constant(...)",
            location=here(),
        )
    return traces[0]


def _mentioned(fn: Any, depth: int = 3) -> Iterator[object]:
    """What a function takes from around it: its closure, the globals that it names, its defaults."""
    fn = getattr(fn, "__wrapped__", fn)
    if hasattr(fn, "func") and hasattr(fn, "args"):  # functools.partial
        yield from (fn.args, getattr(fn, "keywords", {}))
        fn = fn.func
    bound = getattr(fn, "__self__", None)
    if bound is not None:
        yield bound
        fn = getattr(fn, "__func__", fn)
    if not isinstance(fn, FunctionType):
        return
    around: list[object] = [fn.__defaults__, fn.__kwdefaults__]
    for cell in fn.__closure__ or ():
        try:
            around.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    around += [fn.__globals__[name] for name in _names(fn.__code__) if name in fn.__globals__]
    for value in around:
        if isinstance(value, FunctionType) and depth:
            yield from _mentioned(value, depth - 1)
        else:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


__all__ = ["cond", "scan", "vmap", "where"]
