"""The grammar of site names: every spelling leads to one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay.errors import UnknownSiteError
from patchbay.ir.sites import (
    ATTENTION_SITES,
    BLOCK_SITES,
    MLP_SITES,
    NORM_SITES,
    TOP_SITES,
    block_of,
    canonical,
    is_module_site,
    module_site,
)

IN_A_BLOCK = [
    *BLOCK_SITES,
    *(f"attn.{s}" for s in ATTENTION_SITES),
    *(f"mlp.{s}" for s in MLP_SITES),
    *(f"{norm}.{s}" for norm in ("ln1", "ln2") for s in NORM_SITES),
]


def hooked(name: str) -> str:
    """TransformerLens's spelling: ``hook_`` before the last part."""
    head, dot, leaf = name.rpartition(".")
    return f"{head}{dot}hook_{leaf}"


@pytest.mark.parametrize("name", [*TOP_SITES, *(f"blocks.3.{s}" for s in IN_A_BLOCK)])
def test_canonical_names_stay_and_transformer_lens_names_lead_to_them(name: str) -> None:
    """Both spellings of every site, with and without the model's depth."""
    for spelling in (name, hooked(name), name.replace("blocks.3", "blocks[3]"), f"  {name} ", (name,)):
        assert canonical(spelling) == name
        assert canonical(spelling, 12) == name
    assert canonical(name.replace("blocks.3", "blocks.-1"), 4) == name


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (("resid_post", 3), "blocks.3.resid_post"),
        (("hook_resid_post", 3), "blocks.3.resid_post"),
        (("z", 3), "blocks.3.attn.z"),
        (("pattern", -1), "blocks.11.attn.pattern"),
        (("post", 0), "blocks.0.mlp.post"),
        (("attn.pattern", 3), "blocks.3.attn.pattern"),
        (("q", 3, "attn"), "blocks.3.attn.q"),
        (("q", 3, "a"), "blocks.3.attn.q"),
        (("post", 3, "m"), "blocks.3.mlp.post"),
        (("normalized", 3, "ln1"), "blocks.3.ln1.normalized"),
        (("resid_pre", 3, None), "blocks.3.resid_pre"),
        (("embed", None), "embed"),
        ("resid_post.3", "blocks.3.resid_post"),
        ("resid_post.-2", "blocks.10.resid_post"),
        ("z.3", "blocks.3.attn.z"),
        ("mlp.post.3", "blocks.3.mlp.post"),
        ("mlp_out.0", "blocks.0.mlp_out"),
        ("hook_embed", "embed"),
        ("ln_final.hook_scale", "ln_final.scale"),
        ("unembed.hook_out", "logits"),
        ("module:model.layers.3.mlp.output", "module:model.layers.3.mlp.output"),
        ("module:transformer.h.0.input", "module:transformer.h.0.input"),
    ],
)
def test_other_spellings(address: Any, name: str) -> None:
    """Cache keys, interp-engine addresses, negative blocks, module paths."""
    assert canonical(address, 12) == name


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "a site is a name"),
        (3, "a site is a name"),
        ((), "tuple"),
        (("z", 1, 2, 3), "tuple"),
        ((3, "z"), "tuple"),
        (("z", "3"), "integer"),
        (("z", True), "integer"),
        (("scale", 3), "ln1 or ln2"),
        ("normalized.3", "ln1 or ln2"),
        ("blocks.x.z", "not a block number"),
        ("blocks.12.resid_post", "12 blocks, 0 to 11"),
        ("blocks.-13.resid_post", "lowest index is -12"),
        ("module:model.layers.3.mlp", "lacks the side"),
    ],
)
def test_what_is_no_site_says_so(address: Any, message: str) -> None:
    """Malformed addresses are unknown sites, with advice."""
    with pytest.raises(UnknownSiteError, match=message):
        canonical(address, 12)


def test_a_negative_block_needs_the_depth() -> None:
    """Without the model there is no end to count from."""
    with pytest.raises(UnknownSiteError, match="number of blocks"):
        canonical("blocks.-1.resid_post")


def test_parts_of_names() -> None:
    """The block of a name, and module names."""
    assert block_of("blocks.3.attn.z") == 3
    assert block_of("ln_final.scale") is None
    assert block_of("blocks.3") is None
    assert module_site("a.b") == "module:a.b.output"
    assert is_module_site(module_site("a.b", "input"))
    assert not is_module_site("embed")
    with pytest.raises(UnknownSiteError, match="'output' and 'input'"):
        module_site("a.b", "weight")


@given(st.one_of(st.text(max_size=30), st.tuples(st.text(max_size=8), st.integers(-99, 99))))
def test_any_text_has_a_stable_spelling_or_is_refused(address: Any) -> None:
    """Canonical spellings are fixed points; nothing but UnknownSiteError comes of nonsense."""
    try:
        name = canonical(address, 12)
    except UnknownSiteError:
        return
    try:
        again = canonical(name, 12)
    except UnknownSiteError:
        return
    assert canonical(again, 12) == again
