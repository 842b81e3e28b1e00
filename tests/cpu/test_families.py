"""Every decoder-only family: what is derived and proved, against plain hooks and transformers' own outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from patchbay.ir.site_names import MEANINGS
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.inputs import forward
from patchbay_server.models.loader import host
from patchbay_server.models.proofs import read_all, write_and_read
from tests.families import FAMILIES, TABLE, build, facts

IDS = torch.tensor([[1, 5, 9, 3, 7, 11], [4, 4, 30, 2, 11, 8], [6, 39, 12, 5, 1, 2]])
INPUTS = {"input_ids": IDS}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def hosted_of(family: str) -> HostedModel:
    return host(build(family), name=family)


@cache
def values_of(family: str) -> dict[str, torch.Tensor]:
    """Every canonical site's value, read in one forward, and the output under "output"."""
    hosted = hosted_of(family)
    values, output = read_all(hosted.model, canonical(hosted), INPUTS)
    return {**values, "output": output}


def canonical(hosted: HostedModel) -> dict[str, Any]:
    return {n: t for n, t in hosted.taps.items() if not n.startswith("module:")}


def plain_of(family: str, **how: Any) -> torch.nn.Module:
    """A twin that Patchbay has never touched."""
    return build(family, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_proves_what_the_table_says(family: str) -> None:
    """Proved, read-only and absent sites are those of the committed table (python -m tests.families rewrites it)."""
    assert facts(hosted_of(family).card) == json.loads(TABLE.read_text())[family]


def test_every_name_that_a_family_offers_is_documented() -> None:
    """Whatever a card calls a canonical site stands in the table of names, with as many extents as its values have."""
    for family in FAMILIES:
        for site in hosted_of(family).card.sites:
            if site.name.startswith("module:"):
                continue
            dims, meaning = MEANINGS[re.sub(r"^blocks\.\d+\.", "blocks.{i}.", site.name)]
            assert meaning
            assert site.absent is not None or len(dims.split(",")) == len(site.dims), (family, site.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_every_site_changes_no_bit_of_the_output(family: str) -> None:
    """With every site read, and with none, the logits are those of a twin that was never hosted, to the bit."""
    hosted, twin = hosted_of(family), plain_of(family)
    with torch.no_grad():
        theirs = twin(input_ids=IDS, use_cache=False).logits
        assert torch.equal(forward(hosted.model, INPUTS), theirs)
    assert torch.equal(values_of(family)["output"], theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_says_how_it_was_proved(family: str) -> None:
    """No canonical site is offered without a proof, and every one that is not writable says why."""
    for site in hosted_of(family).card.sites:
        if site.name.startswith("module:") or site.absent is not None:
            continue
        assert site.proof, site.name
        assert site.writable or any(word in site.doc for word in ("write", "writing", "another value")), site.name


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_and_patterns_equal_transformers_own_outputs(family: str) -> None:
    """resid_pre equals output_hidden_states, pattern equals eager attention's output_attentions."""
    values = values_of(family)
    how = {} if family in ("mamba", "mamba2", "rwkv", "mpt", "gptj", "codegen", "bloom") else {"attention": "eager"}
    twin = plain_of(family, **how)
    with torch.no_grad():
        theirs = twin(input_ids=IDS, use_cache=False, output_hidden_states=True, output_attentions=True)
    n_layers = hosted_of(family).card.n_layers
    compared = 0
    for i in range(n_layers):
        # transformers' recurrent models list what each layer returns; the others what each layer is given
        name = "resid_post" if family in ("mamba", "mamba2", "rwkv") else "resid_pre"
        if name == "resid_post" and i == n_layers - 1:
            continue  # listed after the final norm
        torch.testing.assert_close(values[f"blocks.{i}.{name}"], theirs.hidden_states[i], **CLOSE)
        compared += 1
    patterns = [v for n, v in values.items() if n.endswith("attn.pattern")]
    attentions = [a for a in getattr(theirs, "attentions", None) or () if a is not None and a.ndim == 4]
    if patterns and len(attentions) == len(patterns):
        for ours, expected in zip(patterns, attentions, strict=True):
            torch.testing.assert_close(ours, expected, **CLOSE)
            compared += 1
    assert compared >= n_layers - 1


# --- by hand ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """Where a site of layer 1 is in a family's source.

    Attributes:
        path: module name.
        side: ``"in"``, ``"out"``, or ``"in1"``, ``"in2"`` for further arguments.
        view: from the module's tensor to the site; edits in place reach the tensor.
        factor: what the tensor is multiplied by before it is the site.
    """

    path: str
    side: str
    view: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    factor: float = 1.0


def heads(start: int, stop: int, n: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t[..., start:stop].unflatten(-1, (n, -1))


def third(part: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Queries, keys or values of GPT-NeoX and BLOOM, whose heads each hold all three."""
    return lambda t: t.unflatten(-1, (4, 3, 4))[..., part, :]


def tokens(t: torch.Tensor) -> torch.Tensor:
    return t.view(IDS.shape[0], IDS.shape[1], -1)


_LLAMA = "model.layers.1"
BY_HAND: dict[str, dict[str, ByHand]] = {
    "gpt_neox": {
        "attn.q": ByHand("gpt_neox.layers.1.attention.query_key_value", "out", third(0)),
        "attn.k": ByHand("gpt_neox.layers.1.attention.query_key_value", "out", third(1)),
        "attn.v": ByHand("gpt_neox.layers.1.attention.query_key_value", "out", third(2)),
        "attn.z": ByHand("gpt_neox.layers.1.attention.dense", "in", heads(0, 16, 4)),
        "attn_out": ByHand("gpt_neox.layers.1.attention", "out"),
        "mlp.post": ByHand("gpt_neox.layers.1.mlp.dense_4h_to_h", "in"),
        "mlp_out": ByHand("gpt_neox.layers.1.mlp", "out"),
    },
    "falcon": {
        "attn.q": ByHand("transformer.h.1.self_attention.query_key_value", "out", heads(0, 16, 4)),
        "attn.k": ByHand("transformer.h.1.self_attention.query_key_value", "out", heads(16, 20, 1)),
        "attn.v": ByHand("transformer.h.1.self_attention.query_key_value", "out", heads(20, 24, 1)),
        "attn.z": ByHand("transformer.h.1.self_attention.dense", "in", heads(0, 16, 4)),
        "mlp_out": ByHand("transformer.h.1.mlp", "out"),
    },
    "gemma2": {
        "attn.out": ByHand(f"{_LLAMA}.self_attn", "out"),
        "attn_out": ByHand(f"{_LLAMA}.post_attention_layernorm", "out"),
        "mlp.pre": ByHand(f"{_LLAMA}.mlp.gate_proj", "out"),
        "mlp.pre_linear": ByHand(f"{_LLAMA}.mlp.up_proj", "out"),
        "mlp.out": ByHand(f"{_LLAMA}.mlp", "out"),
        "mlp_out": ByHand(f"{_LLAMA}.post_feedforward_layernorm", "out"),
    },
    "olmo2": {
        "attn.q": ByHand(f"{_LLAMA}.self_attn.q_proj", "out", heads(0, 16, 4)),
        "attn.q_normed": ByHand(f"{_LLAMA}.self_attn.q_norm", "out", heads(0, 16, 4)),
        "attn.k_normed": ByHand(f"{_LLAMA}.self_attn.k_norm", "out", heads(0, 8, 2)),
        "attn_out": ByHand(f"{_LLAMA}.post_attention_layernorm", "out"),
        "mlp_out": ByHand(f"{_LLAMA}.post_feedforward_layernorm", "out"),
    },
    "phi3": {
        "attn.q": ByHand(f"{_LLAMA}.self_attn.qkv_proj", "out", heads(0, 16, 4)),
        "attn.v": ByHand(f"{_LLAMA}.self_attn.qkv_proj", "out", heads(24, 32, 2)),
        "mlp.pre": ByHand(f"{_LLAMA}.mlp.gate_up_proj", "out", lambda t: t[..., :24]),
        "mlp.pre_linear": ByHand(f"{_LLAMA}.mlp.gate_up_proj", "out", lambda t: t[..., 24:]),
        "mlp.post": ByHand(f"{_LLAMA}.mlp.down_proj", "in"),
    },
    "granite": {
        "attn_out": ByHand(f"{_LLAMA}.self_attn", "out", factor=0.7),
        "attn.out": ByHand(f"{_LLAMA}.self_attn", "out"),
        "mlp_out": ByHand(f"{_LLAMA}.mlp", "out", factor=0.7),
    },
    "bloom": {
        "attn.q": ByHand("transformer.h.1.self_attention.query_key_value", "out", third(0)),
        "attn_out": ByHand("transformer.h.1.self_attention.dense", "out"),
        "mlp_out": ByHand("transformer.h.1.mlp.dense_4h_to_h", "out"),
        "mlp.pre": ByHand("transformer.h.1.mlp.dense_h_to_4h", "out"),
    },
    "opt": {
        "attn.q": ByHand("model.decoder.layers.1.self_attn.q_proj", "out", heads(0, 16, 4)),
        "mlp.pre": ByHand("model.decoder.layers.1.fc1", "out", tokens),
        "mlp.post": ByHand("model.decoder.layers.1.fc2", "in", tokens),
        "mlp_out": ByHand("model.decoder.layers.1.fc2", "out", tokens),
    },
    "gptj": {
        "attn.q": ByHand("transformer.h.1.attn.q_proj", "out", heads(0, 16, 4)),
        "attn.z": ByHand("transformer.h.1.attn.out_proj", "in", heads(0, 16, 4)),
        "attn_out": ByHand("transformer.h.1.attn", "out"),
        "mlp_out": ByHand("transformer.h.1.mlp", "out"),
    },
    "mixtral": {
        "mlp.expert_weights": ByHand(f"{_LLAMA}.mlp.experts", "in2", tokens),
        "mlp_out": ByHand(f"{_LLAMA}.mlp", "out"),
        "mlp_in": ByHand(f"{_LLAMA}.mlp", "in"),
    },
    "deepseek_v3": {
        "attn.q": ByHand(f"{_LLAMA}.self_attn.q_b_proj", "out", heads(0, 24, 4)),
        "attn.v": ByHand(f"{_LLAMA}.self_attn.kv_b_proj", "out", lambda t: t[:, 0].unflatten(-1, (4, 8))[..., 4:]),
        "attn.z": ByHand(f"{_LLAMA}.self_attn.o_proj", "in", heads(0, 16, 4)),
    },
    "qwen3_next": {
        "attn.q_normed": ByHand(f"{_LLAMA}.self_attn.q_norm", "out"),
        "attn.z_out": ByHand(f"{_LLAMA}.self_attn.o_proj", "in", heads(0, 16, 4)),
        "attn_out": ByHand(f"{_LLAMA}.self_attn", "out"),
    },
    "mamba": {
        "mixer_out": ByHand("backbone.layers.1.mixer", "out"),
        "mixer_in": ByHand("backbone.layers.1.mixer", "in"),
    },
    "jamba": {
        "attn.k": ByHand(f"{_LLAMA}.self_attn.k_proj", "out", heads(0, 8, 2)),
        "mlp_out": ByHand(f"{_LLAMA}.feed_forward", "out"),
    },
}  # fmt: skip


def run_by_hand(family: str, where: ByHand, new: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The site's value and the logits of an untouched twin under one plain hook, which sets the site when given."""
    twin, seen = plain_of(family), []

    def act(whole: torch.Tensor) -> torch.Tensor | None:
        seen.append((where.view(whole) * where.factor).clone())
        if new is None:
            return None
        changed = whole.clone()
        where.view(changed).copy_(new / where.factor)
        return changed

    def after(module: Any, args: Any, output: Any) -> Any:
        changed = act(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if not args:
            changed = act(kwargs["hidden_states"])
            return None if changed is None else (args, {**kwargs, "hidden_states": changed})
        place = int(where.side[2:] or 0)
        changed = act(args[place])
        return None if changed is None else ((*args[:place], changed, *args[place + 1 :]), kwargs)

    module = twin.get_submodule(where.path)
    if where.side == "out":
        module.register_forward_hook(after)
    else:
        module.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        logits = twin(input_ids=IDS, use_cache=False).logits
    (value,) = seen
    return value, logits


CASES = [(family, site) for family, sites in BY_HAND.items() for site in sites]


@pytest.mark.parametrize(("family", "site"), CASES, ids=lambda v: v)
def test_a_site_equals_a_plain_hook_written_from_the_source(family: str, site: str) -> None:
    """The value read, and the logits after a write, are those of one plain hook on an untouched twin."""
    where, name = BY_HAND[family][site], f"blocks.1.{site}"
    hosted = hosted_of(family)
    value, logits = run_by_hand(family, where, None)
    ours = values_of(family)[name]
    torch.testing.assert_close(ours, value, **CLOSE)
    new = ours.roll(1, 0) * 0.5 + 0.1
    _, expected = run_by_hand(family, where, new)
    _, found = write_and_read(hosted.model, {name: hosted.taps[name]}, INPUTS, {name: new})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found, logits, atol=1e-4)


# --- every site, by what it means ----------------------------------------------------------------------------------


def shares(family: str) -> list[tuple[str, str, str]]:
    """Every (share, stream before it, stream after it) of a family's blocks."""
    names = hosted_of(family).taps
    found = []
    for i in range(hosted_of(family).card.n_layers):
        pre, mid, post = (f"blocks.{i}.{n}" for n in ("resid_pre", "resid_mid", "resid_post"))
        for share in ("attn_out", "mixer_out", "mlp_out"):
            if f"blocks.{i}.{share}" in names:
                later = share == "mlp_out" and mid in names
                found.append((f"blocks.{i}.{share}", mid if later else pre, post if later or mid not in names else mid))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_a_share_takes_it_out_of_the_stream(family: str) -> None:
    """With attn_out, mixer_out or mlp_out set to zero, the stream after it lacks exactly that share."""
    hosted = hosted_of(family)
    found = shares(family)
    assert found
    for share, before, after in found:
        plain = values_of(family)
        names = (share, before, after)
        zero = {share: torch.zeros_like(plain[share])}
        values, _ = write_and_read(hosted.model, {n: hosted.taps[n] for n in names}, INPUTS, zero)
        # In a parallel block the rest of the sum stays; in a sequential one only the stream before is left.
        torch.testing.assert_close(values[after], plain[after] - plain[share], rtol=1e-4, atol=2e-5, msg=share)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writable_site_moves_what_follows_and_takes_back_what_it_gave(family: str) -> None:
    """Writing back what was read leaves the logits as they were; writing other rows changes something after it."""
    hosted, plain = hosted_of(family), values_of(family)
    taps = canonical(hosted)
    layer = f"blocks.{hosted.card.n_layers - 1}."
    names = [s.name for s in hosted.card.sites if s.name in taps and s.writable]
    names = [n for n in names if not n.startswith("blocks.") or n.startswith((layer, "blocks.0."))]
    _, same = write_and_read(hosted.model, {n: taps[n] for n in names}, INPUTS, {n: plain[n] for n in names})
    torch.testing.assert_close(same, plain["output"], rtol=1e-4, atol=5e-5)
    for name in names:
        value = plain[name]
        other = torch.where(torch.isfinite(value), value.roll(1, 0) * 0.75, value)
        _, output = write_and_read(hosted.model, {name: taps[name]}, INPUTS, {name: other})
        assert not torch.equal(output, plain["output"]), name


@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox", "gptj", "falcon", "gemma2", "mixtral", "granite", "opt", "mamba"]
)
def test_every_writable_site_can_be_differentiated(family: str) -> None:
    """A value put at any writable site gets a gradient from the logits."""
    hosted, plain = hosted_of(family), values_of(family)
    taps = canonical(hosted)
    for site in hosted.card.sites:
        if site.name not in taps or not site.writable:
            continue
        leaf = plain[site.name].clone().requires_grad_()
        handle = taps[site.name].attach(hosted.model, lambda _, leaf=leaf: leaf * 1.0, writes=True)
        try:
            output = forward(hosted.model, INPUTS)
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(output.float().logsumexp(-1).sum(), leaf)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, site.name


@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox", "gptj", "gemma2", "bloom", "mixtral", "gpt_oss", "mamba", "jamba"]
)
def test_bfloat16_weights_lose_no_site(family: str) -> None:
    """A model in bfloat16 proves the same sites as in float32."""
    card = host(build(family).to(torch.bfloat16), name=family).card
    assert facts(card)["proved"] == facts(hosted_of(family).card)["proved"]
    assert facts(card)["read_only"] == facts(hosted_of(family).card)["read_only"]


VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ("attn.q", "attn.k", "ln2.scale")),
    ("falcon", {"alibi": True}, ("attn.pattern", "attn.q", "mlp_out")),
    ("falcon", {"parallel_attn": False}, ("resid_mid", "attn.rot_q")),
    ("gpt_neox", {"use_parallel_residual": False}, ("resid_mid", "ln2.normalized")),
    ("opt", {"do_layer_norm_before": False}, ("resid_mid", "ln1.normalized", "mlp_out")),
    ("stablelm", {"use_parallel_residual": True}, ("attn_out", "mlp_out")),
    ("phi", {"qk_layernorm": True}, ("attn.q_normed", "attn.k")),
    ("cohere", {"use_qk_norm": True}, ("attn.q_normed", "attn.k_normed", "attn.q")),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, ("resid_mid", "attn.pattern")),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, ("attn.pattern", "mlp.expert_out")),
]


@pytest.mark.parametrize(("family", "changes", "sites"), VARIANTS, ids=lambda v: next(iter(v), "") if v else "")
def test_other_shapes_of_a_family_need_nothing_of_their_own(
    family: str, changes: dict[str, Any], sites: tuple[str, ...]
) -> None:
    """Options that change how blocks are built are followed too; nothing that was derived fails its proof."""
    card = host(build(family, **changes), name=family).card
    assert {f"blocks.1.{site}" for site in sites} <= {s.name for s in card.sites if s.absent is None}
    assert not [s.name for s in card.sites if s.absent is not None and "not proved" in s.absent]


@pytest.mark.parametrize(
    ("site", "wrong", "why"),
    [
        ("mlp.pre", "mlp.pre_linear", "sign of post"),
        ("attn.q", "attn.k", "attn.rot_q follows it|attn.rot_k follows it"),
        ("attn.v", "attn.k", "pattern times v"),
        ("attn_out", "mlp_out", r"attn_out = resid_mid"),
        ("attn.z", "attn_in", "pattern times v|W_O|never reaches|not fit"),
    ],
)
def test_a_site_bound_to_another_tensor_is_found_out(
    site: str, wrong: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When two taps of one layer are exchanged, the identities fail and the names are not offered."""
    from patchbay_server.models import loader

    derive = loader.derive

    def exchanged(model: torch.nn.Module, recording: Any) -> Any:
        binding = derive(model, recording)
        a, b = binding.sites[f"blocks.1.{site}"], binding.sites[f"blocks.1.{wrong}"]
        binding.sites[a.name], binding.sites[b.name] = replace(a, tap=b.tap), replace(b, tap=a.tap)
        return binding

    monkeypatch.setattr(loader, "derive", exchanged)
    # As many keys as queries, and heads as wide as the model: shapes alone must not give the mistake away.
    card = host(build("llama", num_key_value_heads=4)).card
    refused = [s for s in card.sites if s.absent is not None and s.name in (f"blocks.1.{site}", f"blocks.1.{wrong}")]
    assert refused, "an exchanged site was offered"
    assert any(re.search(why, s.absent or "") for s in refused), [s.absent for s in refused]
    assert f"blocks.0.{site}" in card


def test_result_and_expert_shares_are_computed_only_when_asked() -> None:
    """While nobody reads expert_out the experts are applied once; reading it applies them once more for each slot."""
    hosted = host(build("mixtral"))
    calls: list[int] = []
    experts = hosted.model.get_submodule(f"{_LLAMA}.mlp.experts")
    original = experts.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    experts.forward = counted
    read_all(hosted.model, {"blocks.1.mlp_out": hosted.taps["blocks.1.mlp_out"]}, INPUTS)
    assert len(calls) == 1
    name = "blocks.1.mlp.expert_out"
    values, _ = read_all(hosted.model, {name: hosted.taps[name], "out": hosted.taps["blocks.1.mlp.out"]}, INPUTS)
    assert len(calls) == 4
    torch.testing.assert_close(values[name].sum(2), values["out"], **CLOSE)


def test_a_pass_leaves_no_trace_even_when_it_fails() -> None:
    """An error inside a tapped forward leaves neither hooks nor a function mode behind."""
    hosted = host(build("granite"))
    name = "blocks.0.attn_out"

    def fail(value: torch.Tensor) -> None:
        raise ValueError("stop here")

    handle = hosted.taps[name].attach(hosted.model, fail, writes=False)
    try:
        with torch.no_grad(), pytest.raises(ValueError, match="stop here"):
            forward(hosted.model, INPUTS)
    finally:
        handle.remove()
    with torch.no_grad():
        again = forward(hosted.model, INPUTS)
        assert torch.equal(again, plain_of("granite")(input_ids=IDS, use_cache=False).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hosted.model.modules())
    assert torch.overrides._get_current_function_mode() is None
