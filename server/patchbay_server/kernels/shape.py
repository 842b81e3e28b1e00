"""Kernels of patchbay.ir.ops.shape."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional as F

from patchbay.ir.ops import OPS
from patchbay_server.kernels.registry import implements
from patchbay_server.kernels.tensors import promoted_tensors

Axes: TypeAlias = "int | tuple[int, ...] | None"
Shape: TypeAlias = "tuple[int, ...]"


@implements(OPS["reshape"])
def _reshape(x: torch.Tensor, *, shape: Shape) -> torch.Tensor:
    return torch.reshape(x, shape)


@implements(OPS["permute_dims"])
def _permute_dims(x: torch.Tensor, *, axes: Shape) -> torch.Tensor:
    return torch.permute(x, axes)


@implements(OPS["matrix_transpose"])
def _matrix_transpose(x: torch.Tensor) -> torch.Tensor:
    return x.mT


@implements(OPS["moveaxis"])
def _moveaxis(x: torch.Tensor, *, source: int | Shape, destination: int | Shape) -> torch.Tensor:
    pair = [(axes,) if isinstance(axes, int) else axes for axes in (source, destination)]
    return torch.movedim(x, pair[0], pair[1])


@implements(OPS["swapaxes"])
def _swapaxes(x: torch.Tensor, *, axis1: int, axis2: int) -> torch.Tensor:
    return torch.swapaxes(x, axis1, axis2)


@implements(OPS["squeeze"])
def _squeeze(x: torch.Tensor, *, axis: int | Shape) -> torch.Tensor:
    return torch.squeeze(x, axis)


@implements(OPS["expand_dims"])
def _expand_dims(x: torch.Tensor, *, axis: int) -> torch.Tensor:
    return torch.unsqueeze(x, axis)


@implements(OPS["broadcast_to"])
def _broadcast_to(x: torch.Tensor, *, shape: Shape) -> torch.Tensor:
    return torch.broadcast_to(x, shape)


@implements(OPS["concat"])
def _concat(*arrays: torch.Tensor, axis: int | None) -> torch.Tensor:
    same = promoted_tensors(*arrays)
    if axis is None:
        return torch.cat([x.reshape(-1) for x in same])
    return torch.cat(same, axis)


@implements(OPS["stack"])
def _stack(*arrays: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.stack(promoted_tensors(*arrays), axis)


@implements(OPS["flip"])
def _flip(x: torch.Tensor, *, axis: Axes) -> torch.Tensor:
    return torch.flip(x, tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis)


@implements(OPS["roll"])
def _roll(x: torch.Tensor, *, shift: int | Shape, axis: Axes) -> torch.Tensor:
    if axis is None:
        assert isinstance(shift, int)
        return torch.roll(x, shift % max(1, x.numel()))
    axes = (axis,) if isinstance(axis, int) else axis
    shifts = (shift,) * len(axes) if isinstance(shift, int) else shift
    within = tuple(s % max(1, x.shape[a]) for s, a in zip(shifts, axes, strict=True))
    return torch.roll(x, within, axes) if axes else x


@implements(OPS["repeat"])
def _repeat(x: torch.Tensor, *, repeats: int, axis: int | None) -> torch.Tensor:
    if not x.numel():  # torch multiplies what may not fit into 64 bits
        if axis is None:
            return x.reshape(0)
        return x.reshape([extent * repeats if i == axis % x.ndim else extent for i, extent in enumerate(x.shape)])
    return torch.repeat_interleave(x, repeats, axis)


@implements(OPS["tile"])
def _tile(x: torch.Tensor, *, repetitions: Shape) -> torch.Tensor:
    return torch.tile(x, repetitions)


def _cut(x: torch.Tensor, k: int) -> int:
    """`k` held within the matrix: further out nothing changes, and torch takes 64 bits only."""
    return max(-x.shape[-2] - 1, min(k, x.shape[-1] + 1))


@implements(OPS["tril"])
def _tril(x: torch.Tensor, *, k: int) -> torch.Tensor:
    return torch.tril(x, _cut(x, k))


@implements(OPS["triu"])
def _triu(x: torch.Tensor, *, k: int) -> torch.Tensor:
    return torch.triu(x, _cut(x, k))


@implements(OPS["diagonal"])
def _diagonal(x: torch.Tensor, *, offset: int) -> torch.Tensor:
    return torch.diagonal(x, _cut(x, offset), -2, -1)


@implements(OPS["pad"])
def _pad(x: torch.Tensor, *, pad: Shape, value: bool | int | float) -> torch.Tensor:
    return F.pad(x, pad, value=value)


@implements(OPS["unfold"])
def _unfold(x: torch.Tensor, *, axis: int, size: int, step: int) -> torch.Tensor:
    return x.unfold(axis, size, min(step, x.shape[axis]))  # a longer step says the same, and could overflow a stride
