"""Kernels of patchbay.ir.ops.reductions."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay_server.kernels.registry import implements
from patchbay_server.kernels.tensors import to_torch_dtype

Axes: TypeAlias = "int | tuple[int, ...] | None"


def _dims(x: torch.Tensor, axis: Axes) -> tuple[int, ...]:
    """`axis` as a tuple of axes, all of them written out: to torch an empty tuple means all or none, by function."""
    if axis is None:
        return tuple(range(x.ndim))
    return (axis,) if isinstance(axis, int) else axis


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else to_torch_dtype(DTYPES[name])


@implements(OPS["sum"])
def _sum(x: torch.Tensor, *, axis: Axes, keepdims: bool, dtype: str | None) -> torch.Tensor:
    if axis is None and not keepdims:
        return torch.sum(x, dtype=_dtype(dtype))
    return torch.sum(x, _dims(x, axis), keepdim=keepdims, dtype=_dtype(dtype))


@implements(OPS["prod"])
def _prod(x: torch.Tensor, *, axis: Axes, keepdims: bool, dtype: str | None) -> torch.Tensor:
    if axis is None and not keepdims:
        return torch.prod(x, dtype=_dtype(dtype))
    wanted = _dtype(dtype)
    if not x.ndim:
        return torch.prod(x, dtype=wanted)
    for dim in _dims(x, axis):  # torch.prod folds one axis at a time
        x = torch.prod(x, dim, keepdim=True, dtype=wanted)
    return x if keepdims else torch.squeeze(x, _dims(x, axis))


@implements(OPS["mean"])
def _mean(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    if axis is None and not keepdims:
        return torch.mean(x)
    return torch.mean(x, _dims(x, axis), keepdim=keepdims)


@implements(OPS["var"])
def _var(x: torch.Tensor, *, axis: Axes, keepdims: bool, correction: float) -> torch.Tensor:
    return torch.var(x, _dims(x, axis), correction=correction, keepdim=keepdims)


@implements(OPS["std"])
def _std(x: torch.Tensor, *, axis: Axes, keepdims: bool, correction: float) -> torch.Tensor:
    return torch.std(x, _dims(x, axis), correction=correction, keepdim=keepdims)


@implements(OPS["max"])
def _max(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    return torch.amax(x, _dims(x, axis), keepdim=keepdims)


@implements(OPS["min"])
def _min(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    return torch.amin(x, _dims(x, axis), keepdim=keepdims)


@implements(OPS["any"])
def _any(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    held = x.to(torch.bool)
    return torch.any(held, _dims(x, axis), keepdim=keepdims) if x.ndim else held


@implements(OPS["all"])
def _all(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    held = x.to(torch.bool)
    return torch.all(held, _dims(x, axis), keepdim=keepdims) if x.ndim else held


@implements(OPS["count_nonzero"])
def _count_nonzero(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    return torch.sum(x != 0, _dims(x, axis), keepdim=keepdims)


@implements(OPS["logsumexp"])
def _logsumexp(x: torch.Tensor, *, axis: Axes, keepdims: bool) -> torch.Tensor:
    return torch.logsumexp(x, _dims(x, axis), keepdim=keepdims)


@implements(OPS["vector_norm"])
def _vector_norm(x: torch.Tensor, *, axis: Axes, keepdims: bool, ord: float) -> torch.Tensor:
    return torch.linalg.vector_norm(x, ord, _dims(x, axis) if x.ndim else None, keepdim=keepdims)


def _extreme(function: Any, x: torch.Tensor, axis: int | None, keepdims: bool) -> torch.Tensor:
    if x.dtype == torch.bool:  # torch orders no bools
        x = x.to(torch.uint8)
    found = function(x, axis, keepdim=keepdims and axis is not None)
    return found.reshape((1,) * x.ndim) if keepdims and axis is None else found


@implements(OPS["argmax"])
def _argmax(x: torch.Tensor, *, axis: int | None, keepdims: bool) -> torch.Tensor:
    return _extreme(torch.argmax, x, axis, keepdims)


@implements(OPS["argmin"])
def _argmin(x: torch.Tensor, *, axis: int | None, keepdims: bool) -> torch.Tensor:
    return _extreme(torch.argmin, x, axis, keepdims)


@implements(OPS["cumulative_sum"])
def _cumulative_sum(x: torch.Tensor, *, axis: int | None, dtype: str | None) -> torch.Tensor:
    return torch.cumsum(x, 0 if axis is None else axis, dtype=_dtype(dtype))


@implements(OPS["cumulative_prod"])
def _cumulative_prod(x: torch.Tensor, *, axis: int | None, dtype: str | None) -> torch.Tensor:
    return torch.cumprod(x, 0 if axis is None else axis, dtype=_dtype(dtype))
