"""References of patchbay.ir.ops.shape."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from patchbay.ir.ops import OPS
from patchbay.ir.ops.spec import promote_specs
from patchbay.reference.arrays import Array, Value, to_numpy_dtype
from patchbay.reference.registry import implements, spec_of

Axes: TypeAlias = "int | tuple[int, ...] | None"
Shape: TypeAlias = "tuple[int, ...]"


@implements(OPS["reshape"], in_own_dtype=True)
def _reshape(x: Array, *, shape: Shape) -> Value:
    return np.reshape(x, shape)


@implements(OPS["permute_dims"], in_own_dtype=True)
def _permute_dims(x: Array, *, axes: Shape) -> Value:
    return np.transpose(x, axes)


@implements(OPS["matrix_transpose"], in_own_dtype=True)
def _matrix_transpose(x: Array) -> Value:
    return np.swapaxes(x, -1, -2)


@implements(OPS["moveaxis"], in_own_dtype=True)
def _moveaxis(x: Array, *, source: int | Shape, destination: int | Shape) -> Value:
    return np.moveaxis(x, source, destination)


@implements(OPS["swapaxes"], in_own_dtype=True)
def _swapaxes(x: Array, *, axis1: int, axis2: int) -> Value:
    return np.swapaxes(x, axis1, axis2)


@implements(OPS["squeeze"], in_own_dtype=True)
def _squeeze(x: Array, *, axis: int | Shape) -> Value:
    return np.squeeze(x, axis)


@implements(OPS["expand_dims"], in_own_dtype=True)
def _expand_dims(x: Array, *, axis: int) -> Value:
    return np.expand_dims(x, axis)


@implements(OPS["broadcast_to"], in_own_dtype=True)
def _broadcast_to(x: Array, *, shape: Shape) -> Value:
    return np.broadcast_to(x, shape)


def _same(arrays: tuple[Array, ...]) -> list[Array]:
    dtype = to_numpy_dtype(promote_specs("concat", [spec_of(a) for a in arrays]))
    return [a.astype(dtype) for a in arrays]


@implements(OPS["concat"], in_own_dtype=True)
def _concat(*arrays: Array, axis: int | None) -> Value:
    return np.concatenate(_same(arrays), axis)


@implements(OPS["stack"], in_own_dtype=True)
def _stack(*arrays: Array, axis: int) -> Value:
    return np.stack(_same(arrays), axis)


@implements(OPS["flip"], in_own_dtype=True)
def _flip(x: Array, *, axis: Axes) -> Value:
    return np.flip(x, axis)


@implements(OPS["roll"], in_own_dtype=True)
def _roll(x: Array, *, shift: int | Shape, axis: Axes) -> Value:
    return np.roll(x, shift, axis)


@implements(OPS["repeat"], in_own_dtype=True)
def _repeat(x: Array, *, repeats: int, axis: int | None) -> Value:
    return np.repeat(x, repeats, axis)


@implements(OPS["tile"], in_own_dtype=True)
def _tile(x: Array, *, repetitions: Shape) -> Value:
    return np.tile(x, repetitions)


@implements(OPS["tril"], in_own_dtype=True)
def _tril(x: Array, *, k: int) -> Value:
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    return np.where(columns - rows <= k, x, np.zeros_like(x))


@implements(OPS["triu"], in_own_dtype=True)
def _triu(x: Array, *, k: int) -> Value:
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    return np.where(columns - rows >= k, x, np.zeros_like(x))


@implements(OPS["diagonal"], in_own_dtype=True)
def _diagonal(x: Array, *, offset: int) -> Value:
    return np.diagonal(x, max(-x.shape[-2], min(offset, x.shape[-1])), -2, -1)


@implements(OPS["pad"], in_own_dtype=True)
def _pad(x: Array, *, pad: Shape, value: bool | int | float) -> Value:
    widths = [(0, 0)] * (x.ndim - len(pad) // 2) + [pad[i : i + 2] for i in range(len(pad) - 2, -1, -2)]
    result = np.full([e + before + after for e, (before, after) in zip(x.shape, widths, strict=True)], value, x.dtype)
    result[tuple(slice(before, before + e) for e, (before, _) in zip(x.shape, widths, strict=True))] = x
    return result


@implements(OPS["unfold"], in_own_dtype=True)
def _unfold(x: Array, *, axis: int, size: int, step: int) -> Value:
    starts = range(0, x.shape[axis] - size + 1, step)
    windows = [np.moveaxis(x, axis, -1)[..., start : start + size] for start in starts]
    return np.moveaxis(np.stack(windows, -2), -2, axis if axis >= 0 else axis - 1)
