"""Comparisons that the derivation is made of: equal tensors, linear modules, what a norm computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from patchbay_server.models.recording import Call
from patchbay_server.models.taps import NormForm


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal in shape and in every bit."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal up to the rounding of their dtype."""
    if a is None or b is None or a.shape != b.shape or not a.is_floating_point() or not b.is_floating_point():
        return False
    tolerance = 64 * torch.finfo(b.dtype).eps
    scale = float(b.abs().max()) + 1e-12
    return bool((a.float() - b.float()).abs().max() <= tolerance * scale)


def plus(a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if b is None else a + b


def is_linear(module: torch.nn.Module) -> bool:
    """A leaf that multiplies by one weight matrix (torch's Linear, transformers' Conv1D and their quantized kin)."""
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding)


def norm_form(call: Call) -> NormForm | None:
    """What normalization the called module computes, if it computes one."""
    value, output = call.input, call.output
    weight = getattr(call.module, "weight", None)
    if value is None or output is None or value.shape != output.shape or not value.is_floating_point():
        return None
    if isinstance(weight, torch.Tensor) and weight.ndim != 1:
        return None
    eps = next(
        (float(e) for n in ("variance_epsilon", "eps") if isinstance(e := getattr(call.module, n, None), (int, float))),
        None,
    )
    if eps is None:
        return None
    for centered in (False, True):
        for offset in (0.0, 1.0):
            form = NormForm(centered, eps, offset)
            if close(form.finish(call.module, form.normalize(value, form.scale_of(value))), output):
                return form
    return None


def as_heads(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """`value` as ``[rows, seq, head, d_head]`` when it holds as many elements as `like`."""
    if value.shape == like.shape:
        return value
    if value.shape == like.transpose(1, 2).shape:
        return value.transpose(1, 2)
    if value.shape == like.flatten(2).shape:
        return value.reshape(like.shape)
    return None


def holds(output: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether `output` (heads in any layout) agrees with `target` on the positions that `target` has."""
    rows, seq, heads, width = target.shape
    for view in (output, output.transpose(1, 2) if output.ndim == 4 else None):
        if view is None or view.shape[0] != rows or view.numel() != rows * view.shape[1] * heads * width:
            continue
        if close(view.reshape(rows, view.shape[1], heads, width)[:, :seq], target):
            return True
    return False


def slices_equal(calls: list[Call], value: torch.Tensor) -> Iterator[tuple[Call, int]]:
    """Calls, and the feature at which a contiguous slice of their output equals `value` on the positions it has."""
    seq, size = value.shape[1], value.shape[2] * value.shape[3]
    flat = value.reshape(*value.shape[:2], size)
    for call in calls:
        output = call.output
        if output is None or output.ndim != 3 or output.shape[0] != value.shape[0]:
            continue
        for start in range(0, output.shape[-1] - size + 1, value.shape[3]):
            if torch.equal(output[:, :seq, start : start + size], flat):
                yield call, start
