"""Kernels of patchbay.ir.ops.nn."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay.ir.ops.nn import class_axis
from patchbay_server.kernels.registry import implements
from patchbay_server.kernels.selection import check_bounds
from patchbay_server.kernels.tensors import promoted_tensors, to_torch_dtype


@implements(OPS["softmax"])
def _softmax(x: torch.Tensor, *, axis: int, dtype: str | None) -> torch.Tensor:
    return F.softmax(x, dim=axis, dtype=None if dtype is None else to_torch_dtype(DTYPES[dtype]))


@implements(OPS["log_softmax"])
def _log_softmax(x: torch.Tensor, *, axis: int, dtype: str | None) -> torch.Tensor:
    return F.log_softmax(x, dim=axis, dtype=None if dtype is None else to_torch_dtype(DTYPES[dtype]))


@implements(OPS["layer_norm"])
def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    normalized_shape: tuple[int, ...] | None,
    eps: float,
) -> torch.Tensor:
    given: list[Any] = [*promoted_tensors(*(t for t in (x, weight, bias) if t is not None)), None, None]
    return F.layer_norm(given[0], normalized_shape or x.shape[-1:], given[1], given[2], eps)


@implements(OPS["rms_norm"])
def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    normalized_shape: tuple[int, ...] | None,
    eps: float | None,
) -> torch.Tensor:
    given: list[Any] = [*promoted_tensors(*(t for t in (x, weight) if t is not None)), None]
    return F.rms_norm(given[0], normalized_shape or x.shape[-1:], given[1], eps)


def _by_class(
    op: str, x: torch.Tensor, target: torch.Tensor, axis: int | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` with its classes on torch's axis, and the target as int64, once it is known to name only classes."""
    dim = class_axis(op, axis, x.ndim)
    target = target.to(torch.int64)
    named = torch.where(target == ignore_index, torch.zeros_like(target), target)
    check_bounds(op, [(named, 0, max(1, x.shape[dim]))])
    return (x.movedim(dim, 1) if x.ndim > 1 else x), target


@implements(OPS["cross_entropy"])
def _cross_entropy(
    input: torch.Tensor, target: torch.Tensor, *, reduction: str, axis: int | None, ignore_index: int
) -> torch.Tensor:
    x, target = _by_class("cross_entropy", input, target, axis, ignore_index)
    return F.cross_entropy(x, target, reduction=reduction, ignore_index=ignore_index)


@implements(OPS["nll_loss"])
def _nll_loss(
    input: torch.Tensor, target: torch.Tensor, *, reduction: str, axis: int | None, ignore_index: int
) -> torch.Tensor:
    x, target = _by_class("nll_loss", input, target, axis, ignore_index)
    return F.nll_loss(x, target, reduction=reduction, ignore_index=ignore_index)


@implements(OPS["kl_div"])
def _kl_div(input: torch.Tensor, target: torch.Tensor, *, reduction: str, log_target: bool) -> torch.Tensor:
    x, y = promoted_tensors(input, target)
    if reduction == "mean":  # torch does the same, and warns that batchmean may have been meant
        return F.kl_div(x, y, reduction="none", log_target=log_target).mean()
    return F.kl_div(x, y, reduction=reduction, log_target=log_target)


@implements(OPS["mse_loss"])
def _mse_loss(input: torch.Tensor, target: torch.Tensor, *, reduction: str) -> torch.Tensor:
    x, y = promoted_tensors(input, target)
    return F.mse_loss(x, y, reduction=reduction)


@implements(OPS["cosine_similarity"])
def _cosine_similarity(x1: torch.Tensor, x2: torch.Tensor, *, axis: int, eps: float) -> torch.Tensor:
    a, b = promoted_tensors(x1, x2)
    return F.cosine_similarity(a, b, dim=axis, eps=eps)


@implements(OPS["normalize"])
def _normalize(x: torch.Tensor, *, p: float, axis: int, eps: float) -> torch.Tensor:
    return F.normalize(x, p=p, dim=axis, eps=eps)


@implements(OPS["linear"])
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    given = promoted_tensors(*(t for t in (x, weight, bias) if t is not None))
    return F.linear(*given)


@implements(OPS["scaled_dot_product_attention"])
def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    q, k, v = promoted_tensors(query, key, value)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
