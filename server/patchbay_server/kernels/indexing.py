"""Kernels of patchbay.ir.ops.indexing_ops."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from patchbay.ir.indexing import Index
from patchbay.ir.ops import OPS
from patchbay_server.kernels.registry import implements
from patchbay_server.kernels.selection import Mode, check_bounds, index_get, index_put, wrapped
from patchbay_server.kernels.tensors import common_dtype, promoted_tensors


@implements(OPS["getitem"])
def _getitem(x: torch.Tensor, *arrays: torch.Tensor, index: Index) -> torch.Tensor:
    # Contiguous, so that later values do not depend, in their last bit, on whether this one was kept as a view.
    return index_get(x, index, arrays).contiguous()


@implements(OPS["set_index"])
def _set_index(
    x: torch.Tensor, value: torch.Tensor | bool | int | float, *arrays: torch.Tensor, index: Index, mode: Mode
) -> torch.Tensor:
    common_dtype(x, *(() if isinstance(value, torch.Tensor) else (value,)))  # refuses integers that do not fit
    result = x.clone()
    index_put(result, index, arrays, value, mode)
    return result


@implements(OPS["take"])
def _take(x: torch.Tensor, indices: torch.Tensor, *, axis: int | None) -> torch.Tensor:
    dim = (axis or 0) % x.ndim
    extent = x.shape[dim]
    check_bounds("take", [(indices, -extent, extent)])
    flat = torch.index_select(x, dim, wrapped(indices, extent).reshape(-1))
    return flat.reshape((*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]))


@implements(OPS["take_along_axis"])
def _take_along_axis(x: torch.Tensor, indices: torch.Tensor, *, axis: int) -> torch.Tensor:
    extent = x.shape[axis]
    check_bounds("take_along_axis", [(indices, -extent, extent)])
    return torch.take_along_dim(x, wrapped(indices, extent), axis)


@implements(OPS["scatter_add"])
def _scatter_add(x: torch.Tensor, indices: torch.Tensor, source: torch.Tensor, *, axis: int) -> torch.Tensor:
    extent = x.shape[axis]
    check_bounds("scatter_add", [(indices, -extent, extent)])
    return torch.scatter_add(x, axis, wrapped(indices, extent), source.to(x.dtype))


@implements(OPS["sort"])
def _sort(x: torch.Tensor, *, axis: int, descending: bool) -> torch.Tensor:
    return torch.sort(x, dim=axis, descending=descending, stable=True).values


@implements(OPS["argsort"])
def _argsort(x: torch.Tensor, *, axis: int, descending: bool) -> torch.Tensor:
    return torch.argsort(x, dim=axis, descending=descending, stable=True)


@implements(OPS["topk"])
def _topk(x: torch.Tensor, *, k: int, axis: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.topk(x, k, dim=axis, largest=largest)
    return values, indices


@implements(OPS["searchsorted"])
def _searchsorted(x1: torch.Tensor, x2: torch.Tensor, *, side: str) -> torch.Tensor:
    ordered, sought = promoted_tensors(x1, x2)
    return torch.searchsorted(ordered.contiguous(), sought.contiguous(), side=side)


@implements(OPS["one_hot"])
def _one_hot(x: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    check_bounds("one_hot", [(x, 0, num_classes)])
    return F.one_hot(x.to(torch.int64), num_classes)


@implements(OPS["embedding"])
def _embedding(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    check_bounds("embedding", [(indices, 0, weight.shape[0])])
    return F.embedding(indices.to(torch.int64), weight)


@implements(OPS["masked_fill"])
def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: torch.Tensor | bool | int | float) -> torch.Tensor:
    common_dtype(x, *(() if isinstance(value, torch.Tensor) else (value,)))  # refuses integers that do not fit
    return torch.masked_fill(x, mask, value.to(x.dtype) if isinstance(value, torch.Tensor) else value)
