"""What a node's value is: the shape and dtype that follow from its operation, its attributes and its arguments.

The tracing API asks as each node is made, so that a mistake raises at the user's line; the verifier asks again for all
of a graph, on the client before sending and on the server before running.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchbay.errors import (
    DTypeError,
    GraphError,
    IndexOutOfRangeError,
    ShapeError,
    SiteNotWritableError,
)
from patchbay.ir.artifacts import check_digest, check_form
from patchbay.ir.bodies import INFER
from patchbay.ir.card import ModelCard, SiteSpec
from patchbay.ir.dtypes import bool_, float32, int64, scalar_kind
from patchbay.ir.graph import Graph, Node, Run, TensorData
from patchbay.ir.indexing import index_shape
from patchbay.ir.limits import MAX_DIMS, MAX_TENSOR_SPAN
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import OpSpec, TensorSpec, ValueSpec

#: The value of a node that yields none (``site.write``).
NO_VALUE: tuple[TensorSpec, ...] = ()

#: A site that is behind the cache of keys and values in every model.
CACHED = ".attn.rot_k"
BEHIND_THE_CACHE = (
    "{1} cannot be {0} while tokens are generated, for later forwards take it from the cache; use the site k, which is "
    "turned afterwards"
)

_SCALAR_DTYPES = {"bool": bool_, "int": int64, "float": float32}


@dataclass(frozen=True, slots=True)
class _Context:
    graph: Graph
    card: ModelCard
    specs: Sequence[ValueSpec]  # of the nodes before this one


def infer_node(graph: Graph, card: ModelCard, node: Node, specs: Sequence[ValueSpec]) -> ValueSpec:
    """The value spec of `node`, which may refer to nodes of `specs` and runs of `graph`.

    The tracing API calls this as each node is made; the verifier calls it for all of them.

    Raises:
        GraphError: the most specific subclass; without the node's id, which the caller knows.
    """
    spec = op_spec(node.op)
    arg_specs: list[TensorSpec] = []
    for position, arg in enumerate(node.args):
        value = specs[arg]
        if isinstance(value, TensorSpec):
            arg_specs.append(value)
        elif value == NO_VALUE:
            raise GraphError(f"{node.op}: argument {position} is a write, which has no value")
        elif node.op != "item":
            raise GraphError(f"{node.op}: argument {position} has {len(value)} parts; pick one with item")
    if spec.structural:
        if node.op != "item":
            _check_arity(spec, node)
        value = _STRUCTURAL_INFERENCE[node.op](_Context(graph, card, specs), node, spec, arg_specs)
    elif node.run is not None:
        raise GraphError(f"{node.op} is a pure operation and belongs to no run")
    else:
        return spec.infer(arg_specs, node.attrs)  # which looks at extents too
    _check_representable(node.op, value)
    return value


def _check_representable(op: str, value: ValueSpec) -> None:
    for part in (value,) if isinstance(value, TensorSpec) else value:
        if part.ndim > MAX_DIMS:
            raise ShapeError(f"{op}: the result would have {part.ndim} dimensions; at most {MAX_DIMS} are possible")
        if math.prod(max(extent, 1) for extent in part.shape) * part.dtype.itemsize >= MAX_TENSOR_SPAN:
            raise ShapeError(f"{op}: {part} is larger than any memory")


def _check_arity(spec: OpSpec, node: Node) -> None:
    upper = spec.max_args
    if len(node.args) < spec.min_args or (upper is not None and len(node.args) > upper):
        raise GraphError(f"{spec.name} takes {spec.min_args} or more tensor arguments, got {len(node.args)}")


def _infer_const(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    del ctx, args
    attrs = spec.fill(node.attrs)
    value, scalar, artifact = attrs["value"], attrs["scalar"], attrs["artifact"]
    if sum(given is not None for given in (value, scalar, artifact)) != 1:
        raise GraphError("const takes one of value, scalar and artifact")
    if (attrs["shape"] is None, attrs["dtype"] is None) != (artifact is None,) * 2:
        raise GraphError("const has a shape and a dtype where it names an artifact, and nowhere else")
    if artifact is not None:
        check_digest(artifact)
        return TensorSpec(attrs["shape"], check_form(attrs["dtype"], attrs["shape"]))
    if isinstance(value, TensorData):
        out = TensorSpec(value.shape, value.dtype)
        if any(extent < 0 for extent in value.shape) or out.nbytes != value.nbytes:
            raise ShapeError(f"const: {value.nbytes} bytes do not hold a {out}")
        return out
    kind = scalar_kind(scalar)
    if kind == "int" and not -(2**63) <= scalar < 2**63:
        raise DTypeError("const: a Python integer must fit into 64 bits")
    return TensorSpec((), _SCALAR_DTYPES[kind], scalar=kind)


def _infer_param(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    del args
    found = ctx.card.param(spec.fill(node.attrs)["name"])
    return TensorSpec(found.shape, found.dtype)


def _infer_read(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    del args
    attrs = spec.fill(node.attrs)
    run = _run_of(ctx, node)
    site = ctx.card.site(attrs["site"])
    return TensorSpec(_site_shape(ctx, site, run, attrs["step"]), site.dtype)


def _site_shape(ctx: _Context, site: SiteSpec, run: Run, step: int | None) -> tuple[int, ...]:
    _check_step(run, step)
    try:
        return ctx.card.site_shape(site, run, step or 0)
    except KeyError as missing:
        raise GraphError(f"{site.name} exists only in runs that have the input behind {missing}") from None


def _check_step(run: Run, step: int | None, *, after: int = 0) -> None:
    """`after` is 1 for what exists after the last forward too."""
    if step is None:
        return
    if run.generation is None:
        raise GraphError("a run that generates nothing has no steps")
    if not 0 <= step < run.generation.max_new_tokens + after:
        raise IndexOutOfRangeError(
            f"step {step}: the run generates at most {run.generation.max_new_tokens} tokens, so its steps are 0 to "
            f"{run.generation.max_new_tokens - 1}"
        )


def _infer_tokens(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    del args
    run = _run_of(ctx, node)
    if run.generation is None:
        raise GraphError("run.tokens: the run generates nothing")
    _check_step(run, spec.fill(node.attrs)["step"], after=1)
    return TensorSpec((run.rows, run.generation.max_new_tokens), int64)


def _infer_stack(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    del spec
    run = _run_of(ctx, node)
    if run.generation is None:
        raise GraphError("steps.stack: the run generates nothing")
    if not args or args[0].scalar is not None:
        raise GraphError("steps.stack takes a tensor")
    return TensorSpec((run.generation.max_new_tokens, *args[0].shape), args[0].dtype)


def _infer_write(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    run = _run_of(ctx, node)
    attrs = spec.fill(node.attrs)
    site = ctx.card.site(attrs["site"])
    if not site.writable:
        raise SiteNotWritableError(f"the site {site.name!r} can be read but not written: {site.doc}")
    if run.generation is not None and site.name.endswith(CACHED):
        raise GraphError(BEHIND_THE_CACHE.format("written", site.name))
    full = _site_shape(ctx, site, run, attrs["step"])
    part = index_shape(f"write at {site.name}", full, attrs["index"], args[1:])
    value = args[0]
    if site.dtype.kind != value.dtype.kind and not (
        site.dtype.is_floating and (value.dtype.is_integer or value.scalar)
    ):
        raise DTypeError(f"write at {site.name}: the site holds {site.dtype}, the value is {value}")
    if not _broadcasts_to(value.shape, part):
        where = f"{site.name} has shape {list(full)}" + (f", its selected part {list(part)}" if part != full else "")
        raise ShapeError(f"write at {site.name}: a value of shape {list(value.shape)} does not fit ({where})")
    return NO_VALUE


def _infer_call(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    target = ctx.card.callable(spec.fill(node.attrs)["target"])
    value = args[0]
    if value.scalar is not None or not value.shape or value.shape[-1] != target.d_in:
        raise ShapeError(f"{target.name} takes a value whose last axis has extent {target.d_in}, got {value}")
    if not value.dtype.is_floating:
        raise DTypeError(f"{target.name} takes floating-point values, got {value}")
    if not target.positionwise and value.ndim != 3:
        raise ShapeError(f"{target.name} looks at several positions: it takes [rows, seq, {target.d_in}], got {value}")
    return TensorSpec((*value.shape[:-1], target.d_out), target.dtype)


def _infer_item(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    if len(node.args) != 1:
        raise GraphError(f"item takes one argument, got {len(node.args)}")
    parts = ctx.specs[node.args[0]]
    index: int = spec.fill(node.attrs)["index"]
    if args or isinstance(parts, TensorSpec):
        raise GraphError("item picks from a value with several parts, got a single tensor")
    if not 0 <= index < len(parts):
        raise GraphError(f"item {index} of a value with {len(parts)} parts")
    return parts[index]


def _infer_grad(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    del ctx, node, spec
    metric, *wrt = args
    if metric.scalar is not None or metric.size != 1:
        raise ShapeError(f"grad: the metric must be one number, got {metric}; reduce it first (sum, mean, an index)")
    if not metric.dtype.is_floating:
        raise DTypeError(f"grad: the metric must be floating-point, got {metric}")
    for value in wrt:
        if value.scalar is not None or not value.dtype.is_floating:
            raise DTypeError(f"grad: gradients are taken with respect to floating-point tensors, got {value}")
    return tuple(wrt)


def _infer_control(ctx: _Context, node: Node, spec: OpSpec, args: Sequence[TensorSpec]) -> ValueSpec:
    return INFER[node.op](ctx.graph.bodies, spec.fill(node.attrs), args)


_STRUCTURAL_INFERENCE: dict[str, Callable[[_Context, Node, OpSpec, Sequence[TensorSpec]], ValueSpec]] = {
    "const": _infer_const,
    "param.read": _infer_param,
    "site.read": _infer_read,
    "site.write": _infer_write,
    "call": _infer_call,
    "item": _infer_item,
    "grad": _infer_grad,
    "run.tokens": _infer_tokens,
    "steps.stack": _infer_stack,
    "scan": _infer_control,
    "cond": _infer_control,
    "map": _infer_control,
}


def _run_of(ctx: _Context, node: Node) -> Run:
    if node.run is None or not 0 <= node.run < len(ctx.graph.runs):
        raise GraphError(f"{node.op} needs a run between 0 and {len(ctx.graph.runs) - 1}, got {node.run}")
    return ctx.graph.runs[node.run]


def _broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False)
    )
