"""A small card for tests that need no model."""

from __future__ import annotations

from patchbay.ir.card import CallableSpec, ModelCard, SiteSpec
from patchbay.ir.dtypes import float32
from patchbay.ir.limits import Limits


def small_card(*, causal: bool = True, limits: Limits | None = None) -> ModelCard:
    """Two layers, d_model 4, vocabulary 10, context 8; sites in forward order, one absent, one read-only."""
    names: list[tuple[str, tuple[int | str, ...]]] = [("embed", ("rows", "seq", 4))]
    for i in range(2):
        names += [
            (f"blocks.{i}.resid_pre", ("rows", "seq", 4)),
            (f"blocks.{i}.attn.pattern", ("rows", 2, "query", "key")),
            (f"blocks.{i}.mlp_out", ("rows", "seq", 4)),
            (f"blocks.{i}.resid_post", ("rows", "seq", 4)),
        ]
    names.append(("logits", ("rows", "seq", 10)))
    sites = [SiteSpec(n, d, float32, order, writable=n != "embed", doc="a table") for order, (n, d) in enumerate(names)]
    sites.append(SiteSpec("pos_embed", ("rows",), float32, -1, writable=False, absent="positions enter in attention"))
    return ModelCard(
        name="small",
        family="toy",
        source="toy",
        revision="0",
        dtype=float32,
        n_layers=2,
        d_model=4,
        n_heads=2,
        n_kv_heads=2,
        d_head=2,
        d_mlp=8,
        d_vocab=10,
        n_ctx=8,
        n_params=1,
        causal=causal,
        sites=tuple(sites),
        callables=(CallableSpec("unembed", 4, 10, float32),),
        limits=limits or Limits(),
    )
