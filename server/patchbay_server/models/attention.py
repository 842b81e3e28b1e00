"""The attention function that models hosted by Patchbay use: scaled-dot-product attention that can be opened.

While nothing inside is tapped it *is* transformers' sdpa, to the bit. While something is tapped, the taps see rotated
queries and keys, masked scores and the pattern; only when one of them writes does the layer's output come from the
opened computation, so that reading never changes a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Name under which transformers knows this attention function.
IMPLEMENTATION = "patchbay"

#: Attribute of an attention module that holds its taps while a pass runs.
_TAPS = "_patchbay_attention_taps"

Handler: TypeAlias = "Callable[[torch.Tensor], torch.Tensor | None]"

#: What can be tapped, in the order in which it is computed.
PARTS = ("rot_q", "rot_k", "v", "attn_scores", "pattern")


@dataclass(frozen=True)
class AttentionTap:
    """One handler at one part of one attention module.

    Attributes:
        part: one of PARTS.
        handler: called with the value; returns its replacement or None. Layouts: rot_q, rot_k and v
            ``[rows, seq, head, d_head]``; attn_scores and pattern ``[rows, head, query, key]``.
        writes: whether the handler ever returns a replacement.
    """

    part: str
    handler: Handler
    writes: bool


class TapHandle:
    """Removes one attention tap; like torch's RemovableHandle."""

    def __init__(self, module: torch.nn.Module, tap: AttentionTap) -> None:
        self._module, self._tap = module, tap

    def remove(self) -> None:
        taps: list[AttentionTap] = self._module.__dict__.get(_TAPS, [])
        if self._tap in taps:
            taps.remove(self._tap)
        if not taps:
            self._module.__dict__.pop(_TAPS, None)


def tap(module: torch.nn.Module, part: str, handler: Handler, *, writes: bool) -> TapHandle:
    """Attach `handler` to `part` of an attention module until the handle is removed."""
    new = AttentionTap(part, handler, writes)
    module.__dict__.setdefault(_TAPS, []).append(new)
    return TapHandle(module, new)


def taps_of(module: torch.nn.Module) -> Sequence[AttentionTap]:
    """The taps that a module carries now; empty between passes."""
    return module.__dict__.get(_TAPS, ())


def _apply(taps: Sequence[AttentionTap], part: str, value: torch.Tensor) -> torch.Tensor:
    for entry in taps:
        if entry.part == part:
            replacement = entry.handler(value)
            value = value if replacement is None else replacement
    return value


def _apply_transposed(taps: Sequence[AttentionTap], part: str, value: torch.Tensor) -> torch.Tensor:
    """As `_apply`, for taps that see positions before heads; untouched values keep their memory layout."""
    for entry in taps:
        if entry.part == part:
            replacement = entry.handler(value.transpose(1, 2))
            value = value if replacement is None else replacement.transpose(1, 2)
    return value


def attention_scores(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled, biased, capped and masked scores; masked entries are -inf.

    Args:
        module: the attention module, for its grouping of heads and whether it is causal.
        query: ``[rows, head, query, d_head]``.
        key: ``[rows, kv_head, key, d_head]``.
        attention_mask: boolean (True = attend) or additive ``[rows or 1, 1 or head, query, key]``, or None.
        scaling: factor of the products; ``d_head ** -0.5`` when None.
        softcap: Gemma 2's cap, applied before the mask.
        position_bias: T5's bias, added before the mask.

    Returns:
        ``[rows, head, query, key]``.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # [rows, head, query, key]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None:
        if getattr(module, "is_causal", True) and scores.shape[-2] > 1:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~visible, float("-inf"))
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[..., : scores.shape[-1]], float("-inf"))
    else:
        scores = scores + attention_mask[..., : scores.shape[-1]]
    return scores


def tappable_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention-interface signature; returns ``[rows, query, head, d_head]``."""
    taps = taps_of(module)
    if not taps and kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    query = _apply_transposed(taps, "rot_q", query)
    key = _apply_transposed(taps, "rot_k", key)
    value = _apply_transposed(taps, "v", value)
    opened = [t for t in taps if t.part in ("attn_scores", "pattern")]
    softcap, bias = kwargs.get("softcap"), kwargs.get("position_bias")
    # sdpa has no softcap: such models always take the opened computation, which is transformers' eager one.
    takes_opened = softcap is not None or any(t.writes for t in opened)
    output: torch.Tensor | None = None
    if not takes_opened:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if not opened:
            return output, None
    scores = attention_scores(module, query, key, attention_mask, scaling, softcap, bias)
    scores = _apply(opened, "attn_scores", scores)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    pattern = _apply(opened, "pattern", pattern)
    if output is not None:
        return output, None
    groups = query.shape[1] // value.shape[1]
    heads = value.repeat_interleave(groups, dim=1) if groups > 1 else value
    return torch.matmul(pattern, heads).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the function known to transformers; harmless when done twice."""
    AttentionInterface.register(IMPLEMENTATION, tappable_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
