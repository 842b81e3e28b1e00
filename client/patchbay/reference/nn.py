"""References of patchbay.ir.ops.nn."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from patchbay.errors import IndexOutOfRangeError
from patchbay.ir.ops import OPS
from patchbay.ir.ops.nn import class_axis
from patchbay.ir.ops.spec import promote_specs
from patchbay.reference.arrays import Array, Value, to_numpy_dtype
from patchbay.reference.reductions import vector_norm
from patchbay.reference.registry import implements, spec_of


def log_softmax(x: Array, axis: int) -> Value:
    """x - log(sum(exp(x))) along an axis, with the largest element taken off first."""
    if not x.shape[axis]:
        return x
    shifted = x - np.max(x, axis=axis, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))


@implements(OPS["softmax"])
def _softmax(x: Array, *, axis: int, dtype: str | None) -> Value:
    del dtype
    return np.exp(log_softmax(x, axis))


@implements(OPS["log_softmax"])
def _log_softmax(x: Array, *, axis: int, dtype: str | None) -> Value:
    del dtype
    return log_softmax(x, axis)


def _last(x: Array, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    return tuple(range(-len(shape or (1,)), 0))


@implements(OPS["layer_norm"])
def _layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    normalized_shape: tuple[int, ...] | None,
    eps: float,
) -> Value:
    axes = _last(x, normalized_shape)
    centred = x - np.mean(x, axis=axes, keepdims=True)
    result = centred / np.sqrt(np.mean(centred**2, axis=axes, keepdims=True) + eps)
    return result * (1 if weight is None else weight) + (0 if bias is None else bias)


@implements(OPS["rms_norm"], in_own_dtype=True)
def _rms_norm(
    x: Array, weight: Array | None = None, *, normalized_shape: tuple[int, ...] | None, eps: float | None
) -> Value:
    if eps is None:
        dtype = promote_specs("rms_norm", [spec_of(t) for t in (x, weight) if t is not None])
        eps = float(ml_dtypes.finfo(to_numpy_dtype(dtype)).eps)  # type: ignore[no-untyped-call]
    wide = x.astype(np.float64)
    result = wide / np.sqrt(np.mean(wide**2, axis=_last(x, normalized_shape), keepdims=True) + eps)
    return result * (1 if weight is None else weight.astype(np.float64))


def _losses(op: str, log_probs: Array, target: Array, reduction: str, axis: int, ignore_index: int) -> Value:
    counted = target != ignore_index
    safe = np.where(counted, target, 0)
    classes = log_probs.shape[axis]
    if safe.size and (safe.min() < 0 or safe.max() >= max(1, classes)):
        raise IndexOutOfRangeError(f"{op}: a target is out of range [0, {classes})")
    picked = np.take_along_axis(log_probs, np.expand_dims(safe, axis).astype(np.int64), axis).squeeze(axis)
    losses = np.where(counted, -picked, 0.0)
    if reduction == "none":
        return losses
    total = np.sum(losses)
    return total if reduction == "sum" else total / np.float64(np.sum(counted))


@implements(OPS["cross_entropy"])
def _cross_entropy(input: Array, target: Array, *, reduction: str, axis: int | None, ignore_index: int) -> Value:
    dim = class_axis("cross_entropy", axis, input.ndim)
    return _losses("cross_entropy", log_softmax(input, dim), target, reduction, dim, ignore_index)


@implements(OPS["nll_loss"])
def _nll_loss(input: Array, target: Array, *, reduction: str, axis: int | None, ignore_index: int) -> Value:
    dim = class_axis("nll_loss", axis, input.ndim)
    return _losses("nll_loss", input, target, reduction, dim, ignore_index)


def _fold(losses: Array, reduction: str) -> Value:
    if reduction == "none":
        return losses
    if reduction == "mean":
        return np.sum(losses) / np.float64(losses.size)
    return np.sum(losses) / (np.float64(losses.shape[0]) if reduction == "batchmean" else 1)


@implements(OPS["kl_div"])
def _kl_div(input: Array, target: Array, *, reduction: str, log_target: bool) -> Value:
    if log_target:
        return _fold(np.exp(target) * (target - input), reduction)
    entropy = np.where(target == 0, 0.0, target * np.log(np.where(target == 0, 1.0, target)))
    return _fold(entropy - target * input, reduction)


@implements(OPS["mse_loss"])
def _mse_loss(input: Array, target: Array, *, reduction: str) -> Value:
    return _fold((input - target) ** 2, reduction)


def _norm(x: Array, axis: int) -> Value:
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=True))


@implements(OPS["cosine_similarity"])
def _cosine_similarity(x1: Array, x2: Array, *, axis: int, eps: float) -> Value:
    a, b = np.broadcast_arrays(x1, x2)
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.sum(a / np.maximum(_norm(a, axis), eps) * (b / np.maximum(_norm(b, axis), eps)), axis=axis)


@implements(OPS["normalize"])
def _normalize(x: Array, *, p: float, axis: int, eps: float) -> Value:
    return x / np.maximum(vector_norm(x, axis=axis, keepdims=True, ord=p), eps)


@implements(OPS["linear"])
def _linear(x: Array, weight: Array, bias: Array | None = None) -> Value:
    result = x.astype(np.float64) @ weight.astype(np.float64).T
    return result if bias is None else result + bias


@implements(OPS["scaled_dot_product_attention"])
def _scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Value:
    if enable_gqa:
        key, value = (np.repeat(x, query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.astype(np.float64) @ np.swapaxes(key, -1, -2) * scale
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:]).astype(bool), scores, -np.inf)
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    largest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = np.sum(weights, axis=-1, keepdims=True)
    # As in torch, a query that may look nowhere gets zeros.
    return np.where(total == 0, 0, weights / np.where(total == 0, 1, total)) @ value
