"""Operations that fold axes away, or run along one: sums, extremes, norms, cumulative sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from patchbay.errors import ShapeError
from patchbay.ir.dtypes import DTYPES, DType, bool_, int64
from patchbay.ir.ops.rules import (
    RESULT,
    Result,
    Takes,
    check_takes,
    reduced_shape,
    reduction_axes,
)
from patchbay.ir.ops.spec import AttrSpec, OpSpec, TensorSpec, ValueSpec, input_size_flops, normalize_axis

_AXES = AttrSpec("axis", "axes", None, "axis or axes to fold; all by default")
_ONE_AXIS = AttrSpec("axis", "axis", None, "axis to search; the flattened tensor by default")
_KEEPDIMS = AttrSpec("keepdims", "bool", False, "keep folded axes with extent 1")
_DTYPE = AttrSpec("dtype", "dtype", None, "dtype to cast to first, and of the result")
_CORRECTION = AttrSpec("correction", "float", 0.0, "degrees of freedom taken off (0 as in the array API; torch has 1)")


def _dtype_or(op: str, attrs: Mapping[str, Any], default: DType) -> DType:
    """The `dtype` attribute, checked, or `default`."""
    if attrs.get("dtype") is None:
        return default
    dtype = DTYPES[attrs["dtype"]]
    check_takes(op, dtype, "numeric")
    return dtype


def _reduction(
    name: str,
    doc: str,
    *,
    takes: Takes = "any",
    result: Result | DType = "same",
    nonempty: bool = False,
    attrs: tuple[AttrSpec, ...] = (),
    check: Callable[[TensorSpec, tuple[int, ...], Mapping[str, Any]], None] | None = None,
) -> OpSpec:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        (x,) = args
        check_takes(name, x.dtype, takes)
        axes = reduction_axes(name, attrs["axis"], x, nonempty=nonempty)
        if check is not None:
            check(x, axes, attrs)
        natural = result if isinstance(result, DType) else RESULT[result](x.dtype)
        return TensorSpec(reduced_shape(x.shape, axes, attrs["keepdims"]), _dtype_or(name, attrs, natural))

    return OpSpec(
        name=name,
        params=("x",),
        rule=rule,
        doc=doc,
        category="reductions",
        attrs=(_AXES, _KEEPDIMS, *attrs),
        flops=input_size_flops,
    )


def _check_correction(x: TensorSpec, axes: tuple[int, ...], attrs: Mapping[str, Any]) -> None:
    count, correction = math.prod(x.shape[a] for a in axes), attrs["correction"]
    if not count > correction >= 0:
        raise ShapeError(
            f"var, std: correction {correction} needs more than {correction} elements, {x} has {count} along the axes"
        )


def _check_ord(x: TensorSpec, axes: tuple[int, ...], attrs: Mapping[str, Any]) -> None:
    order = attrs["ord"]
    if math.isnan(order):
        raise ShapeError("vector_norm: ord is NaN")
    if (order < 0 or math.isinf(order)) and math.prod(x.shape[a] for a in axes) == 0:
        raise ShapeError(f"vector_norm: ord {order} of no elements ({x}) is undefined")


def _arg(name: str, doc: str) -> OpSpec:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        (x,) = args
        check_takes(name, x.dtype, "any")
        axes = reduction_axes(name, attrs["axis"], x, nonempty=True)
        return TensorSpec(reduced_shape(x.shape, axes, attrs["keepdims"]), int64)

    return OpSpec(
        name=name,
        params=("x",),
        rule=rule,
        doc=doc,
        category="reductions",
        attrs=(_ONE_AXIS, _KEEPDIMS),
        flops=input_size_flops,
    )


def _cumulative(name: str, doc: str) -> OpSpec:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        (x,) = args
        check_takes(name, x.dtype, "any")
        if attrs["axis"] is None and x.ndim != 1:
            raise ShapeError(f"{name}: axis may be left out only for one dimension, got {x}")
        if attrs["axis"] is not None:
            normalize_axis(name, attrs["axis"], x.ndim)
        return TensorSpec(x.shape, _dtype_or(name, attrs, RESULT["sum"](x.dtype)))

    return OpSpec(
        name=name,
        params=("x",),
        rule=rule,
        doc=doc,
        category="reductions",
        attrs=(AttrSpec("axis", "axis", None, "axis to run along; needed unless x has one dimension"), _DTYPE),
        flops=input_size_flops,
    )


REDUCTIONS = (
    _reduction("sum", "Sum; int64 for integers and bool.", result="sum", attrs=(_DTYPE,)),
    _reduction("prod", "Product; int64 for integers and bool.", result="sum", attrs=(_DTYPE,)),
    _reduction("mean", "Arithmetic mean.", takes="float"),
    _reduction("var", "Variance.", takes="float", attrs=(_CORRECTION,), check=_check_correction),
    _reduction("std", "Standard deviation.", takes="float", attrs=(_CORRECTION,), check=_check_correction),
    _reduction("max", "Largest element; NaN if any is NaN.", nonempty=True),
    _reduction("min", "Smallest element; NaN if any is NaN.", nonempty=True),
    _reduction("any", "Whether any element is nonzero.", result=bool_),
    _reduction("all", "Whether every element is nonzero.", result=bool_),
    _reduction("count_nonzero", "How many elements are nonzero.", result=int64),
    _reduction(
        "logsumexp", "log of the sum of exp(x), without overflow (torch.logsumexp).", takes="float", nonempty=True
    ),
    _reduction(
        "vector_norm",
        "The ord-norm of the elements (array API linalg.vector_norm).",
        takes="float",
        attrs=(AttrSpec("ord", "float", 2.0, "order; inf and -inf for the extremes, 0 counts nonzeros"),),
        check=_check_ord,
    ),
    _arg("argmax", "Position of the largest element, the first among equals; int64."),
    _arg("argmin", "Position of the smallest element, the first among equals; int64."),
    _cumulative("cumulative_sum", "Running sum along an axis; int64 for integers and bool."),
    _cumulative("cumulative_prod", "Running product along an axis; int64 for integers and bool."),
)
