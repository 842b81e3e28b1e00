"""References of patchbay.ir.ops.indexing_ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from patchbay.errors import IndexOutOfRangeError
from patchbay.ir.indexing import Index
from patchbay.ir.ops import OPS
from patchbay.reference.arrays import Array, Value
from patchbay.reference.elementwise import together
from patchbay.reference.registry import Operand, implements


def numpy_index(index: Index, arrays: Sequence[Array]) -> tuple[Any, ...]:
    """`index` as numpy takes it."""
    plain = {"newaxis": None, "ellipsis": ...}
    result: list[Any] = []
    for item in index:
        kind = str(item[0])
        if kind == "array":
            result.append(arrays[int(item[1])])  # type: ignore[arg-type]
        else:
            result.append(item[1] if kind == "int" else slice(*item[1:]) if kind == "slice" else plain[kind])
    return tuple(result)


def _check(op: str, indices: Array, low: int, high: int) -> None:
    if indices.size and (indices.min() < low or indices.max() >= high):
        raise IndexOutOfRangeError(f"{op}: an index is out of range [{low}, {high})")


@implements(OPS["getitem"], in_own_dtype=True)
def _getitem(x: Array, *arrays: Array, index: Index) -> Value:
    try:
        result: Array = x[numpy_index(index, arrays)]
    except IndexError as error:
        raise IndexOutOfRangeError(f"getitem: {error}") from error
    return result


@implements(OPS["set_index"], in_own_dtype=True)
def _set_index(x: Array, value: Operand, *arrays: Array, index: Index, mode: str) -> Value:
    key = numpy_index(index, arrays)
    result = x.copy()
    try:
        if mode == "set":
            result[key] = value
        else:
            wide = x.dtype if x.dtype.kind in "iu" else np.dtype(np.float64)
            before, change = x[key].astype(wide), np.asarray(value).astype(wide)
            result[key] = (before + change if mode == "add" else before * change).astype(x.dtype)
    except IndexError as error:
        raise IndexOutOfRangeError(f"set_index: {error}") from error
    return result


@implements(OPS["take"], in_own_dtype=True)
def _take(x: Array, indices: Array, *, axis: int | None) -> Value:
    extent = x.shape[axis or 0]
    _check("take", indices, -extent, extent)
    return np.take(x, indices, axis or 0)


@implements(OPS["take_along_axis"], in_own_dtype=True)
def _take_along_axis(x: Array, indices: Array, *, axis: int) -> Value:
    extent = x.shape[axis]
    _check("take_along_axis", indices, -extent, extent)
    rest = np.broadcast_shapes(*((*s.shape[: axis % x.ndim], 1, *s.shape[axis % x.ndim + 1 :]) for s in (x, indices)))
    shapes = []
    for array in (x, indices):
        shape = list(rest)
        shape[axis] = array.shape[axis]
        shapes.append(shape)
    return np.take_along_axis(np.broadcast_to(x, shapes[0]), np.broadcast_to(indices, shapes[1]), axis)


@implements(OPS["scatter_add"])
def _scatter_add(x: Array, indices: Array, source: Array, *, axis: int) -> Value:
    _check("scatter_add", indices, -x.shape[axis], x.shape[axis])
    result = x.copy()
    for place in np.ndindex(indices.shape):
        target = list(place)
        target[axis] = indices[place]
        result[tuple(target)] += source[place].astype(x.dtype)
    return result


def _order(x: Array, axis: int, descending: bool) -> Value:
    """Positions in order, equal elements in theirs; descending is the reverse of ascending order of the reverse."""
    if not descending:
        return np.argsort(x, axis=axis, kind="stable")
    return x.shape[axis] - 1 - np.flip(np.argsort(np.flip(x, axis), axis=axis, kind="stable"), axis)


@implements(OPS["sort"])
def _sort(x: Array, *, axis: int, descending: bool) -> Value:
    return np.take_along_axis(x, _order(x, axis, descending), axis)


@implements(OPS["argsort"])
def _argsort(x: Array, *, axis: int, descending: bool) -> Value:
    return _order(x, axis, descending)


@implements(OPS["topk"])
def _topk(x: Array, *, k: int, axis: int, largest: bool) -> tuple[Array, Array]:
    indices = np.take(_order(x, axis, largest), range(k), axis)
    return np.take_along_axis(x, indices, axis), indices


@implements(OPS["searchsorted"])
def _searchsorted(x1: Array, x2: Array, *, side: Any) -> Value:
    ordered, sought = together(x1, x2)
    return np.searchsorted(ordered, sought, side)


@implements(OPS["one_hot"])
def _one_hot(x: Array, *, num_classes: int) -> Value:
    _check("one_hot", x, 0, num_classes)
    return x[..., None] == np.arange(num_classes)


@implements(OPS["embedding"], in_own_dtype=True)
def _embedding(indices: Array, weight: Array) -> Value:
    _check("embedding", indices, 0, weight.shape[0])
    return weight[indices]


@implements(OPS["masked_fill"])
def _masked_fill(x: Array, mask: Array, value: Operand) -> Value:
    together(x, value)
    return np.where(mask, np.asarray(value).astype(x.dtype), x)
