"""Operations that select, place or order elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import DTypeError, ShapeError
from patchbay.ir import indexing
from patchbay.ir.dtypes import bool_, int64
from patchbay.ir.ops.rules import (
    check_takes,
    promoted,
    require_castable,
    require_ndim,
    require_tensor,
)
from patchbay.ir.ops.spec import (
    AttrSpec,
    FlopsRule,
    OpSpec,
    ShapeRule,
    TensorSpec,
    ValueSpec,
    broadcast_shapes,
    input_size_flops,
    no_flops,
    normalize_axis,
    output_size_flops,
)


def _op(
    name: str,
    params: tuple[str, ...],
    doc: str,
    rule: ShapeRule,
    attrs: tuple[AttrSpec, ...] = (),
    *,
    flops: FlopsRule = no_flops,
    variadic: bool = False,
    optional: int = 0,
    scalars: bool = False,
    results: tuple[str, ...] = (),
) -> OpSpec:
    return OpSpec(
        name=name,
        params=params,
        rule=rule,
        doc=doc,
        category="indexing",
        attrs=attrs,
        flops=flops,
        variadic=variadic,
        optional=optional,
        scalars=scalars,
        results=results,
    )


def _require_indices(op: str, spec: TensorSpec) -> None:
    if spec.scalar is not None or not spec.dtype.is_integer:
        raise DTypeError(f"{op}: indices must be an integer tensor, got {spec}")


def require_broadcastable(op: str, param: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Raise ShapeError unless `shape` broadcasts to exactly `target`."""
    if broadcast_shapes(op, shape, target) != target:
        raise ShapeError(f"{op}: {param} of shape {list(shape)} does not broadcast to {list(target)}")


def _getitem(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    x, *arrays = args
    return TensorSpec(indexing.index_shape("getitem", x.shape, attrs["index"], arrays), x.dtype)


def _set_index(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    x, value, *arrays = args
    require_tensor("set_index", "x", x)
    require_castable("set_index", "value", value, x.dtype)
    if attrs["mode"] != "set":
        check_takes("set_index", x.dtype, "numeric")
    target = indexing.index_shape("set_index", x.shape, attrs["index"], arrays)
    require_broadcastable("set_index", "value", value.shape, target)
    return x


def _take(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    x, indices = args
    _require_indices("take", indices)
    if attrs["axis"] is None and x.ndim != 1:
        raise ShapeError(f"take: axis may be left out only for one dimension, got {x}")
    axis = normalize_axis("take", attrs["axis"] or 0, x.ndim)
    return TensorSpec(x.shape[:axis] + indices.shape + x.shape[axis + 1 :], x.dtype)


def _take_along_axis(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    x, indices = args
    check_takes("take_along_axis", x.dtype, "any")
    _require_indices("take_along_axis", indices)
    axis = normalize_axis("take_along_axis", attrs["axis"], x.ndim)
    if indices.ndim != x.ndim:
        raise ShapeError(f"take_along_axis: {x} and indices {indices} must have as many dimensions")
    left, right = (s[:axis] + s[axis + 1 :] for s in (x.shape, indices.shape))
    rest = broadcast_shapes("take_along_axis", left, right)
    return TensorSpec((*rest[:axis], indices.shape[axis], *rest[axis:]), x.dtype)


def _scatter_add(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    x, indices, source = args
    check_takes("scatter_add", x.dtype, "numeric")
    _require_indices("scatter_add", indices)
    require_castable("scatter_add", "source", source, x.dtype)
    axis = normalize_axis("scatter_add", attrs["axis"], x.ndim)
    fits = indices.shape == source.shape and indices.ndim == x.ndim
    if not fits or any(indices.shape[i] != x.shape[i] for i in range(x.ndim) if i != axis):
        raise ShapeError(
            f"scatter_add: indices {indices} and source {source} must have one shape, and {x}'s but for axis {axis}"
        )
    return x


def _sort_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del out
    x = args[0]
    extent = x.shape[attrs["axis"]] if x.ndim else 1
    return x.size * max(1, math.ceil(math.log2(extent + 1)))


def _sort(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    check_takes("sort", x.dtype, "any")
    normalize_axis("sort", attrs["axis"], x.ndim)
    return x


def _argsort(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    check_takes("argsort", x.dtype, "any")
    normalize_axis("argsort", attrs["axis"], x.ndim)
    return TensorSpec(x.shape, int64)


def _topk(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), k = args, attrs["k"]
    check_takes("topk", x.dtype, "numeric")
    axis = normalize_axis("topk", attrs["axis"], x.ndim)
    if not 0 <= k <= x.shape[axis]:
        raise ShapeError(f"topk: k={k} of axis {axis} of {x}, which has {x.shape[axis]}")
    shape = (*x.shape[:axis], k, *x.shape[axis + 1 :])
    return TensorSpec(shape, x.dtype), TensorSpec(shape, int64)


def _searchsorted(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    promoted("searchsorted", args, "numeric")
    require_ndim("searchsorted", "x1", args[0], 1, 1)
    return TensorSpec(args[1].shape, int64)


def _searchsorted_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del out, attrs
    return args[1].size * max(1, math.ceil(math.log2(args[0].size + 1)))


def _one_hot(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), classes = args, attrs["num_classes"]
    _require_indices("one_hot", x)
    if classes < 1:
        raise ShapeError(f"one_hot: num_classes must be at least 1, got {classes}")
    return TensorSpec((*x.shape, classes), int64)


def _embedding(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    indices, weight = args
    _require_indices("embedding", indices)
    check_takes("embedding", weight.dtype, "any")
    require_ndim("embedding", "weight", weight, 2, 2)
    return TensorSpec((*indices.shape, weight.shape[1]), weight.dtype)


def _masked_fill(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    x, mask, value = args
    require_tensor("masked_fill", "x", x)
    check_takes("masked_fill", x.dtype, "any")
    if mask.scalar is not None or mask.dtype != bool_:
        raise DTypeError(f"masked_fill: the mask must be a bool tensor, got {mask}; compare first")
    require_castable("masked_fill", "value", value, x.dtype)
    if value.ndim:
        raise ShapeError(f"masked_fill: the value must be a number or have no dimensions, got {value} (or use where)")
    return TensorSpec(broadcast_shapes("masked_fill", x.shape, mask.shape), x.dtype)


_INDEX = AttrSpec("index", "index", doc="items as in patchbay.ir.indexing; written x[...] in Python")
_LAST = AttrSpec("axis", "axis", -1, "the axis")
_DESCENDING = AttrSpec("descending", "bool", False, "largest first")

INDEXING = (
    _op(
        "getitem",
        ("x", "indices"),
        "x[...]: basic and integer-array indexing as in numpy.",
        _getitem,
        (_INDEX,),
        variadic=True,
        optional=1,
    ),
    _op(
        "set_index",
        ("x", "value", "indices"),
        "A copy of x in which x[...] is set, added to or scaled; positions named twice are written once, as in numpy.",
        _set_index,
        (_INDEX, AttrSpec("mode", "str", "set", "how value meets what is there", ("set", "add", "mul"))),
        flops=output_size_flops,
        variadic=True,
        optional=1,
        scalars=True,
    ),
    _op(
        "take",
        ("x", "indices"),
        "Positions along an axis, in the order and shape of the indices; negative ones count from the end.",
        _take,
        (AttrSpec("axis", "axis", None, "the axis; needed unless x has one dimension"),),
    ),
    _op(
        "take_along_axis",
        ("x", "indices"),
        "For every place off the axis, its own positions along it (torch.gather, with broadcasting).",
        _take_along_axis,
        (_LAST,),
    ),
    _op(
        "scatter_add",
        ("x", "indices", "source"),
        "x with source added at positions along an axis; repeated ones add up (torch.scatter_add).",
        _scatter_add,
        (_LAST,),
        flops=input_size_flops,
    ),
    _op(
        "sort",
        ("x",),
        "Elements in order along an axis; NaN counts as largest.",
        _sort,
        (_LAST, _DESCENDING),
        flops=_sort_flops,
    ),
    _op(
        "argsort",
        ("x",),
        "Positions that put an axis in order, equal elements in theirs; int64.",
        _argsort,
        (_LAST, _DESCENDING),
        flops=_sort_flops,
    ),
    _op(
        "topk",
        ("x",),
        "The k largest or smallest elements along an axis, in order, and their positions (torch.topk).",
        _topk,
        (AttrSpec("k", "int", doc="how many"), _LAST, AttrSpec("largest", "bool", True, "largest, or smallest")),
        flops=_sort_flops,
        results=("values", "indices"),
    ),
    _op(
        "searchsorted",
        ("x1", "x2"),
        "Where elements of x2 would go in the sorted x1; int64.",
        _searchsorted,
        (AttrSpec("side", "str", "left", "before or after equal ones", ("left", "right")),),
        flops=_searchsorted_flops,
    ),
    _op(
        "one_hot",
        ("x",),
        "A new last axis that is 1 at the position that x names and 0 elsewhere; int64 (torch.nn.functional.one_hot).",
        _one_hot,
        (AttrSpec("num_classes", "int", doc="extent of the new axis"),),
    ),
    _op("embedding", ("indices", "weight"), "Rows of a matrix (torch.nn.functional.embedding).", _embedding),
    _op(
        "masked_fill",
        ("x", "mask", "value"),
        "x with one number where the mask holds (torch.masked_fill).",
        _masked_fill,
        scalars=True,
    ),
)
