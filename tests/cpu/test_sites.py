"""Canonical sites against the model's own source, written out by hand: attention, norms, per-head results."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from patchbay.errors import SiteNotWritableError, UnknownSiteError
from patchbay.ir.events import TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay_server.engine import Engine
from patchbay_server.kernels import to_data, to_tensor
from patchbay_server.models.loader import host
from tests.tiny import D_HEAD, D_MODEL, N_HEADS, N_LAYERS, build

TOKENS = ((1, 5, 9, 3, 7), (4, 4, 30, 2, 11))
IDS = torch.tensor(TOKENS)
FAMILIES = ("gpt2", "llama")
BLOCK = 1  # the layer that tests look into


@cache
def engine_of(family: str) -> Engine:
    return Engine(host(build(family)))


def run(engine: Engine, *nodes: Node, outputs: tuple[int, ...]) -> list[torch.Tensor]:
    results: dict[str, torch.Tensor] = {}

    def take(event: object) -> None:
        if isinstance(event, TensorValue):
            results[event.name] = to_tensor(event.value)

    graph = Graph((Run(TOKENS),), nodes, tuple(Output(str(o), o) for o in outputs))
    engine.run(engine.prepare(graph), take)
    return [results[str(o)] for o in outputs]


def read(site: str) -> Node:
    return Node("site.read", (), {"site": site}, 0)


def constant(value: torch.Tensor) -> Node:
    data = to_data(value)
    return Node("const", (), {"value": TensorData(data.dtype, data.shape, bytes(data.data))})


def edited(engine: Engine, site: str, value: torch.Tensor) -> torch.Tensor:
    """Logits when `site` is set to `value`."""
    write = Node("site.write", (0,), {"site": site}, 0)
    return run(engine, constant(value), write, read("logits"), outputs=(2,))[0]


Part = Callable[[torch.Tensor], torch.Tensor]


def attention_by_hand(family: str, edits: dict[str, Part], seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a plain twin whose attention is written out here, edited in block BLOCK; `seen` gets the parts."""

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> tuple[Any, None]:
        here = module.layer_idx == BLOCK

        def part(name: str, value: torch.Tensor) -> torch.Tensor:
            if not here:
                return value
            value = edits[name](value) if name in edits else value
            seen[name] = value
            return value

        q = part("rot_q", q.transpose(1, 2)).transpose(1, 2)
        k = part("rot_k", k.transpose(1, 2)).transpose(1, 2)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = part("attn_scores", (q @ k.transpose(2, 3) * scaling).masked_fill(future, -torch.inf))
        pattern = part("pattern", scores.softmax(-1))
        return (pattern @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", sdpa_mask)
    model = build(family, attention="by_hand")
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_internals_read_as_written_out_by_hand(family: str) -> None:
    """Scores, pattern and rotated queries and keys equal an attention written out by hand."""
    engine, seen = engine_of(family), {}
    attention_by_hand(family, {}, seen)
    parts = [
        p for p in ("rot_q", "rot_k", "attn_scores", "pattern") if f"blocks.{BLOCK}.attn.{p}" in engine.hosted.card
    ]
    values = run(engine, *(read(f"blocks.{BLOCK}.attn.{p}") for p in parts), outputs=tuple(range(len(parts))))
    assert {"attn_scores", "pattern"} <= set(parts)
    for part, value in zip(parts, values, strict=True):
        torch.testing.assert_close(value, seen[part], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_pattern_equals_transformers_own_attentions(family: str) -> None:
    """Every layer's pattern equals what transformers' eager attention outputs."""
    engine = engine_of(family)
    with torch.no_grad():
        theirs = build(family, attention="eager")(input_ids=IDS, use_cache=False, output_attentions=True).attentions
    sites = [f"blocks.{i}.attn.pattern" for i in range(N_LAYERS)]
    for ours, expected in zip(run(engine, *map(read, sites), outputs=tuple(range(N_LAYERS))), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_sites_equal_transformers_own_hidden_states(family: str) -> None:
    """resid_pre of every layer equals output_hidden_states, and ln_final's input is the last resid_post."""
    engine = engine_of(family)
    with torch.no_grad():
        hidden = build(family)(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    sites = [f"blocks.{i}.resid_pre" for i in range(N_LAYERS)]
    for ours, expected in zip(run(engine, *map(read, sites), outputs=tuple(range(N_LAYERS))), hidden[:-1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["rot_q", "rot_k", "attn_scores", "pattern"])
def test_attention_internals_write_as_edited_by_hand(family: str, part: str) -> None:
    """Setting scores, pattern, rotated queries or keys does what the same edit in a hand-written attention does."""
    engine = engine_of(family)
    site = f"blocks.{BLOCK}.attn.{part}"
    if site not in engine.hosted.card:
        with pytest.raises(UnknownSiteError, match="rotary"):
            engine.hosted.card.site(site)
        return
    seen: dict[str, torch.Tensor] = {}
    attention_by_hand(family, {}, seen)
    new = torch.roll(seen[part], 1, 0) * 0.5 + (0.1 if part.startswith("rot") else 0.0)
    expected = attention_by_hand(family, {part: lambda _: new}, {})
    found = edited(engine, site, new)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, attention_by_hand(family, {}, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_inside_attention_changes_no_bit(family: str) -> None:
    """Logits read together with every attention internal are the plain model's, bit for bit."""
    engine = engine_of(family)
    inside = [s.name for s in engine.hosted.card.sites if ".attn." in s.name and s.absent is None]
    *_, logits = run(engine, *map(read, inside), read("logits"), outputs=tuple(range(len(inside) + 1)))
    with torch.no_grad():
        assert torch.equal(logits, build(family)(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_result_sums_to_the_attention_output(family: str) -> None:
    """Per-head results, plus the output bias, sum to attn_out; zeroing one head's result removes its share."""
    engine, model = engine_of(family), build(family)
    site = f"blocks.{BLOCK}.attn.result"
    result, out = run(engine, read(site), read(f"blocks.{BLOCK}.attn_out"), outputs=(0, 1))
    assert result.shape == (2, 5, N_HEADS, D_MODEL)
    path = "transformer.h.1.attn.c_proj" if family == "gpt2" else "model.layers.1.self_attn.o_proj"
    bias = getattr(model.get_submodule(path), "bias", None)
    total = result.sum(2) + (0 if bias is None else bias.detach())
    torch.testing.assert_close(total, out, rtol=1e-5, atol=1e-6)
    without = result.clone()
    without[:, :, 2] = 0
    nodes = (constant(without), Node("site.write", (0,), {"site": site}, 0), read(f"blocks.{BLOCK}.attn_out"))
    torch.testing.assert_close(run(engine, *nodes, outputs=(2,))[0], out - result[:, :, 2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [f"blocks.{BLOCK}.ln1", f"blocks.{BLOCK}.ln2", "ln_final"])
def test_norm_internals_by_hand(family: str, norm: str) -> None:
    """scale and normalized equal the formula; writing either recomputes the norm from the edited part."""
    engine, model = engine_of(family), build(family)
    source = {"ln1": f"blocks.{BLOCK}.resid_pre", "ln2": f"blocks.{BLOCK}.resid_mid", "ln_final": "blocks.2.resid_post"}
    key = norm.rpartition(".")[2]
    x, scale, normalized = run(
        engine, read(source[key]), read(f"{norm}.scale"), read(f"{norm}.normalized"), outputs=(0, 1, 2)
    )
    if family == "gpt2":
        path = {"ln1": "transformer.h.1.ln_1", "ln2": "transformer.h.1.ln_2", "ln_final": "transformer.ln_f"}[key]
        centered, eps = x - x.mean(-1, keepdim=True), 1e-5
    else:
        layer = "model.layers.1."
        path = {"ln1": layer + "input_layernorm", "ln2": layer + "post_attention_layernorm", "ln_final": "model.norm"}[
            key
        ]
        centered, eps = x, 1e-6
    expected_scale = (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normalized, centered / expected_scale, rtol=1e-5, atol=1e-6)
    module = model.get_submodule(path)
    weight = module.weight.detach()
    bias = module.bias.detach() if family == "gpt2" else 0.0

    def logits_with(output: torch.Tensor) -> torch.Tensor:
        handle = module.register_forward_hook(lambda *_: output)
        try:
            with torch.no_grad():
                return model(input_ids=IDS, use_cache=False).logits
        finally:
            handle.remove()

    found = edited(engine, f"{norm}.scale", scale * 2)
    torch.testing.assert_close(
        found, logits_with(centered / (expected_scale * 2) * weight + bias), rtol=1e-4, atol=1e-5
    )
    found = edited(engine, f"{norm}.normalized", normalized.roll(1, -1))
    torch.testing.assert_close(found, logits_with(normalized.roll(1, -1) * weight + bias), rtol=1e-4, atol=1e-5)


def test_an_edited_scale_is_what_normalized_is_computed_with() -> None:
    """Doubling ln_final.scale halves ln_final.normalized in the same run."""
    engine = engine_of("llama")
    scale, normalized = run(engine, read("ln_final.scale"), read("ln_final.normalized"), outputs=(0, 1))
    nodes = (constant(scale * 2), Node("site.write", (0,), {"site": "ln_final.scale"}, 0), read("ln_final.normalized"))
    torch.testing.assert_close(run(engine, *nodes, outputs=(2,))[0], normalized / 2, rtol=1e-5, atol=1e-6)


def test_positional_embedding_is_shown_and_written_per_row() -> None:
    """GPT-2's one row of positions reads as one per row; editing one row leaves the other's logits untouched."""
    engine = engine_of("gpt2")
    positions, logits = run(engine, read("pos_embed"), read("logits"), outputs=(0, 1))
    table = build("gpt2").transformer.wpe.weight.detach()[:5]
    assert torch.equal(positions, table.expand(2, 5, D_MODEL))
    changed = positions.clone()
    changed[1] = 0
    found = edited(engine, "pos_embed", changed)
    torch.testing.assert_close(found[0], logits[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[1], logits[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_reads_in_its_declared_shape_and_takes_back_what_it_gave(family: str) -> None:
    """Each site on the card, modules included, has its declared shape and dtype; writing the value read is harmless."""
    engine = engine_of(family)
    offered = [s for s in engine.hosted.card.sites if s.absent is None]
    assert len(offered) > 100
    values = run(engine, *(read(s.name) for s in offered), outputs=tuple(range(len(offered))))
    (logits,) = run(engine, read("logits"), outputs=(0,))
    for site, value in zip(offered, values, strict=True):
        assert tuple(value.shape) == site.shape({"rows": 2, "seq": 5}), site.name
        assert str(value.dtype) == f"torch.{site.dtype.name}", site.name
        torch.testing.assert_close(edited(engine, site.name, value), logits, rtol=1e-4, atol=1e-5, msg=site.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_at_a_canonical_site_reaches_the_logits(family: str) -> None:
    """No canonical site is a dead end: noise written there changes the logits."""
    engine = engine_of(family)
    names = [s.name for s in engine.hosted.card.sites if s.absent is None and not s.name.startswith("module:")]
    values = run(engine, *map(read, names), outputs=tuple(range(len(names))))
    (logits,) = run(engine, read("logits"), outputs=(0,))
    for name, value in zip(names, values, strict=True):
        noisy = torch.where(torch.isfinite(value), value * 1.5 + torch.linspace(-1, 1, value.shape[-1]), value)
        assert not torch.allclose(edited(engine, name, noisy), logits, atol=1e-4), name


def test_hosting_leaves_plain_inference_as_it_was() -> None:
    """A model gives the same bits before and after it is hosted, and carries no hook."""
    model = build("llama")
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
        host(model)
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_absent_site_says_why_and_an_unknown_one_what_is_near() -> None:
    """The card refuses names with the reason or with suggestions."""
    card = engine_of("gpt2").hosted.card
    with pytest.raises(UnknownSiteError, match="not gated"):
        card.site("blocks.0.mlp.pre_linear")
    with pytest.raises(UnknownSiteError, match="blocks.2.resid_post") as error:
        card.site("blocks.9.resid_post")
    assert error.value.suggestions[0] == "blocks.2.resid_post"


def test_a_binding_that_fails_its_proof_is_declared_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a derived tap points at the wrong tensor, its identity fails and the card says so."""
    from patchbay_server.models import loader
    from patchbay_server.models.taps import OutputTap

    def wrong(model: torch.nn.Module, recording: Any) -> Any:
        binding = loader_derive(model, recording)
        site = binding.sites["blocks.1.mlp_out"]
        binding.sites["blocks.1.mlp_out"] = type(site)(
            site.name, OutputTap("model.layers.1.self_attn"), site.dims, site.doc
        )
        return binding

    loader_derive = loader.derive
    monkeypatch.setattr(loader, "derive", wrong)
    card = host(build("llama")).card
    with pytest.raises(UnknownSiteError, match="not proved at load: resid_mid \\+ mlp_out = resid_post"):
        card.site("blocks.1.mlp_out")
    assert "blocks.0.mlp_out" in card


def test_a_read_only_site_refuses_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that the card marks as not writable refuses a write by name."""
    from dataclasses import replace

    hosted = host(build("llama"))
    sites = tuple(replace(s, writable=s.name != "embed", doc="why not") for s in hosted.card.sites)
    hosted.card = replace(hosted.card, sites=sites)
    with pytest.raises(SiteNotWritableError, match="'embed' can be read but not written: why not"):
        edited(Engine(hosted), "embed", torch.zeros(2, 5, D_MODEL))


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(head_dim=D_HEAD, sliding_window=None),
        transformers.Qwen2Config(),
        transformers.Qwen3Config(head_dim=D_HEAD),
    ],
    ids=lambda c: c.model_type,
)
def test_llama_like_families_prove_every_site(config: transformers.PretrainedConfig) -> None:
    """Relatives of Llama need no code of their own: every canonical site but pos_embed is derived and proved."""
    sizes = {"num_hidden_layers": 2, "hidden_size": D_MODEL, "intermediate_size": 24, "num_attention_heads": N_HEADS}
    config.update(
        {**sizes, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    )
    torch.manual_seed(0)
    card = host(transformers.AutoModelForCausalLM.from_config(config)).card
    absent = [s.name for s in card.sites if s.absent is not None]
    assert absent == ["pos_embed"]
