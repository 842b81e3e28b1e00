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

from patchbay_server.models.prefixes import attend_beside, prefix_of

#: Name under which transformers knows this attention function.
IMPLEMENTATION = "patchbay"

#: Attribute of an attention module that holds its taps while a pass runs.
_TAPS = "_patchbay_attention_taps"

#: Attribute of an attention module that holds who observes its calls.
_OBSERVERS = "_patchbay_attention_observers"

Handler: TypeAlias = "Callable[[torch.Tensor], torch.Tensor | None]"
#: Called with query, key, value (as received), the output, and the names of the further tensors received.
Observer: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, frozenset[str]], None]"

#: What can be tapped, in the order in which it is computed.
PARTS = ("rot_q", "rot_k", "v", "attn_scores", "sinks", "pattern", "z")


@dataclass(frozen=True)
class AttentionTap:
    """One handler at one part of one attention module.

    Attributes:
        part: one of PARTS.
        handler: called with the value; returns its replacement or None. Layouts: rot_q, rot_k, v
            and z ``[rows, seq, head, d_head]``; attn_scores and pattern ``[rows, head, query, key]``; sinks
            ``[rows, head, query]``.
        writes: whether the handler ever returns a replacement.
    """

    part: str
    handler: Handler
    writes: bool


class _Handle:
    """Removes one entry from a list that a module carries; like torch's RemovableHandle."""

    def __init__(self, module: torch.nn.Module, attribute: str, entry: object) -> None:
        self._module, self._attribute, self._entry = module, attribute, entry

    def remove(self) -> None:
        entries: list[object] = self._module.__dict__.get(self._attribute, [])
        entries[:] = [e for e in entries if e is not self._entry]
        if not entries:
            self._module.__dict__.pop(self._attribute, None)


def tap(module: torch.nn.Module, part: str, handler: Handler, *, writes: bool) -> _Handle:
    """Attach `handler` to `part` of an attention module until the handle is removed."""
    new = AttentionTap(part, handler, writes)
    module.__dict__.setdefault(_TAPS, []).append(new)
    return _Handle(module, _TAPS, new)


def observe(module: torch.nn.Module, observer: Observer) -> _Handle:
    """Call `observer` after every call of the attention function by `module`, without any influence on it."""
    module.__dict__.setdefault(_OBSERVERS, []).append(observer)
    return _Handle(module, _OBSERVERS, observer)


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


@dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys.

    Attributes:
        mask: boolean (True = attend) or additive ``[rows or 1, 1 or head, query, key]``, or None.
        causal: whether, without a mask, a position sees only itself and earlier ones.
        scale: factor of the products; ``d_head ** -0.5`` when None.
        softcap: Gemma 2's cap, applied before the mask.
        bias: T5's bias, added before the mask.
        sinks: one further score per head, ``[head]``, that joins the softmax and is then dropped.
    """

    mask: torch.Tensor | None
    causal: bool
    scale: float | None = None
    softcap: float | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scaled, biased, capped and masked scores, ``[rows, head, query, key]``; masked entries are -inf.

        Args:
            query: ``[rows, head, query, d_head]``.
            key: ``[rows, kv_head, key, d_head]``.
        """
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key = key.repeat_interleave(groups, dim=1)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.matmul(query, key.transpose(2, 3)) * scale  # [rows, head, query, key]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if self.bias is not None:
            scores = scores + self.bias
        if self.mask is None:
            if self.causal and scores.shape[-2] > 1:
                visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
                scores = scores.masked_fill(~visible, float("-inf"))
        elif self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask[..., : scores.shape[-1]], float("-inf"))
        else:
            scores = scores + self.mask[..., : scores.shape[-1]]
        return scores

    def pattern(self, scores: torch.Tensor, taps: Sequence[AttentionTap]) -> torch.Tensor:
        """Softmax over the keys, and over the head's sink where there is one, whose share is then dropped."""
        if self.sinks is None:
            return torch.softmax(scores, dim=-1, dtype=torch.float32)
        rows, _, queries, _ = scores.shape
        shown = _apply(taps, "sinks", self.sinks.reshape(1, -1, 1).expand(rows, -1, queries))
        combined = torch.cat([scores, shown.unsqueeze(-1)], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values  # as eager gpt-oss does, against overflow
        return torch.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]


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
    prefix = prefix_of(key)
    if prefix is not None:
        odd = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        tapped = bool(taps_of(module)) or _OBSERVERS in module.__dict__
        plain = not (odd or tapped or dropout or query.requires_grad)
        if plain and prefix.is_only_causal(attention_mask, query.shape[2], key.shape[2]):
            return attend_beside(prefix, query, key, value, scaling), None
        key, value = prefix.before(key, value)
    output = _attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    for observer in module.__dict__.get(_OBSERVERS, ()):
        extras = frozenset(n for n, v in kwargs.items() if isinstance(v, torch.Tensor))
        observer(query, key, value, output, extras)
    return output, None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
    **kwargs: Any,
) -> torch.Tensor:
    taps = taps_of(module)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scale, **kwargs)[0]

    # sdpa has neither caps nor sinks: such models always take the opened computation, which is transformers' eager one.
    always = softcap is not None or sinks is not None
    if not taps and not always:
        return plain(query, key, value)
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    scoring = Scoring(mask, causal, scale, softcap, kwargs.get("position_bias"), sinks)
    return _opened(taps, query, key, value, scoring, None if always else plain)


def _opened(
    taps: Sequence[AttentionTap],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    plain: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Attention under taps, ``[rows, query, head, d_head]``; `plain` computes it while nothing inside is written."""
    query = _apply_transposed(taps, "rot_q", query)
    key = _apply_transposed(taps, "rot_k", key)
    value = _apply_transposed(taps, "v", value)
    inside = [t for t in taps if t.part in ("attn_scores", "sinks", "pattern")]
    output = plain(query, key, value) if plain is not None and not any(t.writes for t in inside) else None
    if output is None or inside:
        scores = _apply(inside, "attn_scores", scoring.scores(query, key))
        pattern = _apply(inside, "pattern", scoring.pattern(scores, inside).to(query.dtype))
        if output is None:
            groups = query.shape[1] // value.shape[1]
            heads = value.repeat_interleave(groups, dim=1) if groups > 1 else value
            output = torch.matmul(pattern, heads).transpose(1, 2).contiguous()
    return _apply(taps, "z", output)


def open_fused(
    module: torch.nn.Module, function: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """torch's fused attention as a model called it itself, under the taps of `module`.

    Args:
        module: which carries the taps.
        function: ``torch.nn.functional.scaled_dot_product_attention``.
        args, kwargs: what it was called with.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v = (given.pop(n) for n in ("query", "key", "value"))

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return function(q, k, v, **given).transpose(1, 2)

    scoring = Scoring(given.get("attn_mask"), bool(given.get("is_causal", False)), given.get("scale"))
    return _opened(taps_of(module), q, k, v, scoring, plain).transpose(1, 2)


def register() -> None:
    """Make the function known to transformers; harmless when done twice."""
    AttentionInterface.register(IMPLEMENTATION, tappable_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
