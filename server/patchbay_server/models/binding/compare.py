"""Comparisons that the derivation is made of: equal tensors, linear modules, what a norm computes."""

from __future__ import annotations

import torch

from patchbay_server.models.recording import Call
from patchbay_server.models.taps import NormForm


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal in shape and in every bit."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


#: What norms call the number that they add to the variance.
_EPSILONS = ("variance_epsilon", "eps")


def tolerance(*dtypes: torch.dtype) -> float:
    """How far two ways of computing a value may be apart, of its largest entry, in the coarsest of `dtypes`."""
    eps = max(torch.finfo(d).eps for d in dtypes)
    return 64 * eps if eps < 1e-4 else 6 * eps


def close(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal up to the rounding of the coarser of their dtypes."""
    if a is None or b is None or a.shape != b.shape or not a.is_floating_point() or not b.is_floating_point():
        return False
    scale = float(b.abs().max()) + 1e-12
    return bool((a.float() - b.float()).abs().max() <= tolerance(a.dtype, b.dtype) * scale)


def plus(a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if b is None else a + b


def is_linear(module: torch.nn.Module) -> bool:
    """A leaf that multiplies by one weight matrix (torch's Linear, transformers' Conv1D and their quantized kin)."""
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    if not leaf or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return False
    gains = any(hasattr(module, n) for n in _EPSILONS)  # a norm with gains of its own for each head
    return not gains and not isinstance(module, torch.nn.Embedding)


def norm_form(call: Call) -> NormForm | None:
    """What normalization the called module computes, if it computes one."""
    value, output = call.input, call.output
    weight = getattr(call.module, "weight", None)
    if value is None or output is None or value.shape != output.shape or not value.is_floating_point():
        return None
    if isinstance(weight, torch.Tensor) and weight.shape != value.shape[value.ndim - weight.ndim :]:
        return None
    eps = next(
        (float(e) for n in _EPSILONS if isinstance(e := getattr(call.module, n, None), (int, float))),
        call.eps,
    )
    if eps is None:
        return None
    found: list[tuple[float, NormForm]] = []
    for centered in (False, True):
        for offset in (0.0, 1.0):
            form = NormForm(centered, eps, offset)
            again = form.finish(call.module, form.normalize(value, form.scale_of(value)))
            if close(again, output):
                found.append((float((again.float() - output.float()).detach().abs().mean()), form))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def as_heads(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """`value` as ``[rows, seq, head, d_head]`` when it holds as many elements as `like`."""
    if value.shape == like.shape:
        return value
    if value.shape == like.transpose(1, 2).shape:
        return value.transpose(1, 2)
    if value.shape == like.flatten(2).shape:
        return value.reshape(like.shape)
    return None


def head_starts(features: torch.Tensor, heads: torch.Tensor) -> tuple[int, ...] | None:
    """The feature at which each head's slice begins, or None when some head is not there.

    A slice may agree bit by bit, up to one factor for all (queries that are scaled early), or up to the order of the
    features in it (interleaved rotary embeddings).

    Args:
        features: ``[samples, features]``.
        heads: ``[samples, head, width]``.
    """
    count, width = heads.shape[1:]
    if features.shape[1] < width:
        return None
    starts: list[int] = []
    for head in range(count):
        wanted = heads[:, head]
        exact = (features[0, : features.shape[1] - width + 1] == wanted[0, 0]).nonzero().flatten().tolist()
        start = next((s for s in exact if torch.equal(features[:, s : s + width], wanted)), None)
        if start is None:
            break
        starts.append(start)
    if len(starts) == count:
        return tuple(starts)
    windows = range(0, features.shape[1] - width + 1, width)
    for agree in (_up_to_a_factor, _up_to_order):
        starts = []
        for head in range(count):
            wanted = heads[:, head]
            start = next((s for s in windows if agree(features[:, s : s + width], wanted)), None)
            if start is None:
                break
            starts.append(start)
        if len(starts) == count:
            return tuple(starts)
    return None


def _up_to_a_factor(a: torch.Tensor, b: torch.Tensor) -> bool:
    size = float((a.float() * a.float()).sum())
    factor = float((a.float() * b.float()).sum()) / size if size else 0.0
    return factor > 0 and close(a * factor, b)


def _up_to_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.sort(-1).values, b.sort(-1).values)
