"""Pieces that the shape rules of several families of operations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from patchbay.errors import DTypeError, ShapeError
from patchbay.ir.dtypes import DType, bool_, float32, float64, int64, promote_scalar
from patchbay.ir.ops.spec import (
    AttrSpec,
    FlopsRule,
    OpSpec,
    TensorSpec,
    ValueSpec,
    broadcast_shapes,
    normalize_axes,
    output_size_flops,
    promote_specs,
)

#: What an operation takes, after promotion: ``carry`` every dtype; ``any`` all that can be computed with (no 8-bit
#: floats); ``numeric`` no bool either; ``float`` floating point; ``lapack`` float32 and float64; ``bits`` integers
#: and bool.
Takes = Literal["carry", "any", "numeric", "float", "lapack", "int", "bits", "bool"]
Result = Literal["same", "float", "bool", "sum"]

_TAKES: Mapping[str, tuple[Callable[[DType], bool], str]] = {
    "carry": (lambda d: True, "any dtype"),
    "any": (lambda d: True, "any dtype but the 8-bit floats"),
    "numeric": (lambda d: d.kind != "bool", "numbers, not bool"),
    "float": (lambda d: d.is_floating, "floating point"),
    "lapack": (lambda d: d in (float32, float64), "float32 or float64"),
    "int": (lambda d: d.is_integer, "integers"),
    "bits": (lambda d: not d.is_floating, "integers or bool"),
    "bool": (lambda d: d == bool_, "bool"),
}


def check_takes(op: str, dtype: DType, takes: Takes) -> None:
    """Raise DTypeError unless an operation that takes `takes` can work in `dtype`."""
    holds, wanted = _TAKES[takes]
    if takes != "carry" and dtype.is_low_precision:
        raise DTypeError(f"{op}: {dtype} is stored but not computed with; cast it with astype first")
    if not holds(dtype):
        raise DTypeError(f"{op} takes {wanted}, got {dtype}; cast it with astype first")


def as_float(dtype: DType) -> DType:
    """`dtype` itself when it is floating, else float32, torch's default."""
    return promote_scalar(dtype, "float")


def as_sum(dtype: DType) -> DType:
    """The dtype that sums and products accumulate in: int64 for integers and bool, as the array API has it."""
    return dtype if dtype.is_floating else int64


RESULT: Mapping[str, Callable[[DType], DType]] = {
    "same": lambda d: d,
    "float": as_float,
    "bool": lambda d: bool_,
    "sum": as_sum,
}


def promoted(op: str, args: Sequence[TensorSpec], takes: Takes) -> DType:
    """The common dtype of `args`, once it is known to be one that the operation takes."""
    dtype = promote_specs(op, args)
    check_takes(op, dtype, takes)
    return dtype


def require_tensor(op: str, param: str, spec: TensorSpec) -> None:
    """Raise DTypeError when `spec` is a Python scalar: for operations where only some arguments may be one."""
    if spec.scalar is not None:
        raise DTypeError(f"{op}: {param} must be a tensor, got a Python {spec.scalar}")


def require_ndim(op: str, param: str, spec: TensorSpec, least: int, most: int | None = None) -> None:
    """Raise ShapeError unless `spec` has from `least` to `most` dimensions."""
    if spec.ndim < least or (most is not None and spec.ndim > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        raise ShapeError(f"{op}: {param} must have {wanted} dimensions, got {spec}")


def require_castable(op: str, param: str, value: TensorSpec, target: DType) -> None:
    """Raise DTypeError unless `value` becomes `target` without losing its kind (a float never becomes an integer)."""
    order = {"bool": 0, "uint": 1, "int": 1, "float": 2}
    kind = value.scalar if value.scalar is not None else value.dtype.kind
    if order[kind] > order[target.kind]:
        raise DTypeError(f"{op}: {param} of kind {kind} does not fit into {target}; cast it with astype first")
    if value.scalar is None and value.dtype != target:
        for dtype in (value.dtype, target):
            check_takes(op, dtype, "any")


def require_extents(op: str, shape: tuple[int, ...]) -> None:
    """Raise ShapeError when a wanted shape holds a negative extent."""
    if any(extent < 0 for extent in shape):
        raise ShapeError(f"{op}: shape {list(shape)} holds a negative extent")


def reduced_shape(shape: tuple[int, ...], axes: Sequence[int], keepdims: bool) -> tuple[int, ...]:
    """`shape` without `axes`, or with extent 1 there."""
    if keepdims:
        return tuple(1 if i in axes else extent for i, extent in enumerate(shape))
    return tuple(extent for i, extent in enumerate(shape) if i not in axes)


def reduction_axes(
    op: str, axes: int | tuple[int, ...] | None, x: TensorSpec, *, nonempty: bool = False
) -> tuple[int, ...]:
    """The axes that a reduction runs over.

    Raises:
        ShapeError: an axis out of range or repeated; no axis at all; or, with `nonempty`, no element to reduce.
    """
    if axes == ():
        raise ShapeError(f"{op}: axis=() reduces nothing; leave it out to reduce over all axes")
    normal = normalize_axes(op, axes, x.ndim)
    if nonempty and math.prod(x.shape[a] for a in normal) == 0:
        raise ShapeError(f"{op}: {x} has no element along the axes to reduce")
    return normal


def elementwise(
    name: str,
    params: tuple[str, ...],
    doc: str,
    *,
    takes: Takes = "numeric",
    result: Result = "same",
    attrs: tuple[AttrSpec, ...] = (),
    flops: FlopsRule = output_size_flops,
) -> OpSpec:
    """An operation on corresponding elements; of several arguments, some may be Python scalars."""

    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        del attrs
        dtype = promoted(name, args, takes)
        return TensorSpec(broadcast_shapes(name, *(a.shape for a in args)), RESULT[result](dtype))

    return OpSpec(
        name=name,
        params=params,
        rule=rule,
        doc=doc,
        category="elementwise",
        attrs=attrs,
        flops=flops,
        scalars=len(params) > 1,
    )


def flops_per_output(count: int) -> FlopsRule:
    """A cost rule: `count` operations per output element."""

    def flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
        return count * output_size_flops(args, out, attrs)

    return flops
