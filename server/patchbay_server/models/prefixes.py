"""Attention of many rows to one prefix that they share, whose keys and values are not copied for each row.

Rows that go on from one earlier forward see the same keys and values before their own. Attention to the prefix is one
product for all rows; attention to a row's own positions is another; the two are put together by how much each weighs
(the log-sum-exp of its scores), which gives the softmax over both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

#: Attribute of a key tensor that names the prefix which comes before it.
_MARK = "_patchbay_prefix"


@dataclass(eq=False)
class Prefix:
    """Keys and values of one layer before the positions that a forward computes, the same for all of its rows.

    Attributes:
        keys, values: ``[1, kv_head, positions, d_head]``.
        causal: for every mask seen in this forward, whether it hides later positions and nothing else.
    """

    keys: torch.Tensor
    values: torch.Tensor
    causal: dict[int, tuple[torch.Tensor, bool]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def mark(self, key: torch.Tensor) -> torch.Tensor:
        """`key`, for an attention function that asks `prefix_of`."""
        setattr(key, _MARK, self)
        return key

    def before(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' own keys and values behind the prefix, ``[rows, kv_head, prefix + own, d_head]``."""
        rows = key.shape[0]
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key], dim=2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value], dim=2),
        )

    def is_only_causal(self, mask: torch.Tensor | None, queries: int, own: int) -> bool:
        """Whether `mask` shows each of the last of `own` positions the whole prefix, itself and what is between."""
        if mask is None:
            return queries == 1
        known = self.causal.get(id(mask))
        if known is None:
            shown = mask if mask.dtype == torch.bool else mask == 0
            keys = self.length + own
            visible = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
            fits = shown.shape[-2:] == visible.shape and bool((shown == visible).all())
            known = self.causal[id(mask)] = (mask, fits)
        return known[1]


def prefix_of(key: torch.Tensor) -> Prefix | None:
    """The prefix that comes before `key`; None where there is none."""
    found: Prefix | None = getattr(key, _MARK, None)
    return found


def attend_beside(
    prefix: Prefix, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention to a shared prefix and a row's own positions, ``[rows, query, head, d_head]``.

    Args:
        prefix: what all rows see.
        query: ``[rows, head, query, d_head]``, the last of the row's own positions.
        key, value: ``[rows, kv_head, own, d_head]``.
        scale: factor of the products; ``d_head ** -0.5`` when None.
    """
    rows, heads, queries, width = query.shape
    kv_heads, own = key.shape[1:3]
    groups = heads // kv_heads
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # All rows, and all heads of one key head, one after the other: [1, kv_head, groups * rows * query, d_head].
    together = (
        query.reshape(rows, kv_heads, groups, queries, width).permute(1, 2, 0, 3, 4).reshape(1, kv_heads, -1, width)
    )
    earlier, weight = flash(together, prefix.keys, prefix.values, 0.0, False, scale=scale)
    earlier = earlier.reshape(heads, rows, queries, -1).transpose(0, 1)
    weight = weight.reshape(heads, rows, queries).transpose(0, 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    hidden = None
    if 1 < queries < own:
        seen = torch.ones(queries, own, dtype=torch.bool, device=query.device).tril(own - queries)
        hidden = torch.zeros(queries, own, dtype=query.dtype, device=query.device).masked_fill(~seen, float("-inf"))
    later, own_weight = flash(query, key, value, 0.0, queries == own, attn_mask=hidden, scale=scale)
    share = torch.sigmoid(own_weight.reshape(rows, heads, queries) - weight).unsqueeze(-1)
    output = torch.lerp(earlier.float(), later.float(), share.float()).to(query.dtype)
    return output.transpose(1, 2).contiguous()
