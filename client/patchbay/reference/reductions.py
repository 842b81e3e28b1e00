"""References of patchbay.ir.ops.reductions."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay.reference.arrays import Array, Value, to_numpy_dtype
from patchbay.reference.registry import implements

Axes: TypeAlias = "int | tuple[int, ...] | None"


def _cast(x: Array, dtype: str | None) -> Value:
    """`x` as its sums are to be accumulated: int64 instead of smaller integers and bool."""
    if dtype is not None:
        wanted = to_numpy_dtype(DTYPES[dtype])
        return x.astype(wanted).astype(np.float64) if DTYPES[dtype].is_floating else x.astype(wanted)
    return x if x.dtype.kind == "f" else x.astype(np.int64)


@implements(OPS["sum"])
def _sum(x: Array, *, axis: Axes, keepdims: bool, dtype: str | None) -> Value:
    return np.sum(_cast(x, dtype), axis=axis, keepdims=keepdims)


@implements(OPS["prod"])
def _prod(x: Array, *, axis: Axes, keepdims: bool, dtype: str | None) -> Value:
    return np.prod(_cast(x, dtype), axis=axis, keepdims=keepdims)


@implements(OPS["mean"])
def _mean(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    count = x.size // max(1, np.sum(x, axis=axis).size)
    total = np.sum(x, axis=axis, keepdims=keepdims)
    return total / np.float64(count)


@implements(OPS["var"])
def _var(x: Array, *, axis: Axes, keepdims: bool, correction: float) -> Value:
    return np.var(x, axis=axis, keepdims=keepdims, ddof=correction)


@implements(OPS["std"])
def _std(x: Array, *, axis: Axes, keepdims: bool, correction: float) -> Value:
    return np.std(x, axis=axis, keepdims=keepdims, ddof=correction)


@implements(OPS["max"])
def _max(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    return np.max(x, axis=axis, keepdims=keepdims)


@implements(OPS["min"])
def _min(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    return np.min(x, axis=axis, keepdims=keepdims)


@implements(OPS["any"])
def _any(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    return np.any(x != 0, axis=axis, keepdims=keepdims)


@implements(OPS["all"])
def _all(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    return np.all(x != 0, axis=axis, keepdims=keepdims)


@implements(OPS["count_nonzero"])
def _count_nonzero(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    return np.sum(x != 0, axis=axis, keepdims=keepdims)


@implements(OPS["logsumexp"])
def _logsumexp(x: Array, *, axis: Axes, keepdims: bool) -> Value:
    largest = np.max(x, axis=axis, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0)
    result = np.log(np.sum(np.exp(x - largest), axis=axis, keepdims=True)) + largest
    return result if keepdims else np.squeeze(result, axis)


@implements(OPS["vector_norm"])
def vector_norm(x: Array, *, axis: Axes, keepdims: bool, ord: float) -> Value:
    size = np.abs(x)
    if ord == np.inf:
        return np.max(size, axis=axis, keepdims=keepdims)
    if ord == -np.inf:
        return np.min(size, axis=axis, keepdims=keepdims)
    if ord == 0:
        return np.sum(x != 0, axis=axis, keepdims=keepdims)
    return np.sum(size**ord, axis=axis, keepdims=keepdims) ** (1 / ord)


@implements(OPS["argmax"])
def _argmax(x: Array, *, axis: int | None, keepdims: bool) -> Value:
    return np.argmax(x, axis=axis, keepdims=keepdims)


@implements(OPS["argmin"])
def _argmin(x: Array, *, axis: int | None, keepdims: bool) -> Value:
    return np.argmin(x, axis=axis, keepdims=keepdims)


@implements(OPS["cumulative_sum"])
def _cumulative_sum(x: Array, *, axis: int | None, dtype: str | None) -> Value:
    return np.cumsum(_cast(x, dtype), axis=0 if axis is None else axis)


@implements(OPS["cumulative_prod"])
def _cumulative_prod(x: Array, *, axis: int | None, dtype: str | None) -> Value:
    return np.cumprod(_cast(x, dtype), axis=0 if axis is None else axis)
