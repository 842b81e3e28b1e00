"""Weights with no projection of their own name: positions, capped unembeddings, experts, routers; and folded views."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import GraphError
from patchbay.model import Model
from tests import families, tiny

IDS = [1, 5, 9, 3, 7]


@cache
def model_of(family: str) -> Model:
    return pb.local(families.build(family))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt"])
def test_positions(family: str) -> None:
    """Row p of `pos_embed.W_pos` is what position p adds, whatever the table begins with."""
    with model_of(family).trace(IDS) as run:
        run.save(table=run.params["pos_embed.W_pos"], added=run.pos_embed[0])
    np.testing.assert_array_equal(run.results["table"][: len(IDS)], run.results["added"])
    assert run.results["table"].shape[0] >= model_of(family).card.n_ctx


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "recurrent_gemma"])
def test_unembeddings_before_a_cap(family: str) -> None:
    """`unembed.W_U` is there where the logits are capped or scaled: behind it they are what the cap makes of it."""
    model = model_of(family)
    config: Any = families.build(family).config
    with model.trace(IDS) as run:
        before = run.ln_final(run.blocks[-1].resid_post) @ run.params["unembed.W_U"]
        run.save(before=before, logits=run.logits)
    expected = run.results["before"] * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    if cap:
        expected = np.tanh(expected / cap) * cap
    np.testing.assert_allclose(run.results["logits"], expected, rtol=1e-3, atol=1e-4)
    assert np.abs(run.results["before"] - run.results["logits"]).max() > 1e-6


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba"])
def test_experts_and_routers(family: str) -> None:
    """What the chosen experts add, and the router's scores, computed from the weights by hand."""
    model = model_of(family)
    block = next(i for i in range(model.card.n_layers) if f"blocks.{i}.mlp.expert_out" in model.card)
    name = f"blocks.{block}.mlp."
    layer = next(c.path for c in model.card.callables if c.name == f"blocks.{block}.mlp")
    offered = set(model.params.keys())
    with model.trace(IDS) as run:
        x = run.module(layer).input
        p = run.params
        weights = {n: p[name + n] for n in ("experts.W_in", "experts.W_gate", "experts.W_out", "router.W")}
        weights |= {n: p[name + n] for n in ("experts.b_in", "experts.b_gate", "experts.b_out") if name + n in offered}
        parts = {n: run.site(name + n) for n in ("expert_out", "expert_indices", "expert_weights", "router_logits")}
        run.save(x=x, w=weights, **parts)
    r, w = run.results, run.results["w"]
    scores = r["x"] @ w["router.W"]
    bias = r["router_logits"] - scores
    np.testing.assert_allclose(bias, np.broadcast_to(bias[:, :1], bias.shape), rtol=1e-3, atol=1e-4)

    def expert(x: np.ndarray, number: int) -> np.ndarray:
        gate, up = x @ w["experts.W_gate"][number], x @ w["experts.W_in"][number]
        if "experts.b_in" in w:  # gpt-oss
            gate, up = gate + w["experts.b_gate"][number], up + w["experts.b_in"][number]
            gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            return np.asarray(hidden @ w["experts.W_out"][number] + w["experts.b_out"][number])
        return np.asarray((gate / (1 + np.exp(-gate)) * up) @ w["experts.W_out"][number])

    for position in range(len(IDS)):
        for slot, number in enumerate(r["expert_indices"][0, position]):
            expected = r["expert_weights"][0, position, slot] * expert(r["x"][0, position], int(number))
            np.testing.assert_allclose(r["expert_out"][0, position, slot], expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "phi", "mixtral", "gpt_neox", "stablelm"])
def test_folded(family: str) -> None:
    """A folded weight applied to the normalized stream gives what the weight gives behind the norm."""
    model = model_of(family)
    names = set(model.params.keys())
    made = {"attn.W_Q": "attn.q", "attn.W_K": "attn.k", "attn.W_V": "attn.v", "mlp.W_gate": "mlp.pre"}
    made["mlp.W_in"] = "mlp.pre_linear" if "blocks.1.mlp.pre_linear" in model.card else "mlp.pre"
    made["mlp.router.W"] = "mlp.router_logits"
    compared = []
    with model.trace(IDS) as run:
        for weight, site in made.items():
            if f"blocks.1.{weight}" not in names:
                continue
            norm = "ln2" if weight.startswith("mlp") and "blocks.1.ln2.w" in names else "ln1"
            x = run.site(f"blocks.1.{norm}.normalized")
            matrix = run.params.folded(f"blocks.1.{weight}")
            bias = run.params.folded(f"blocks.1.{weight.replace('W', 'b')}")
            found = pb.ops.einsum("rsd,hde->rshe", x, matrix) if matrix.ndim == 3 else x @ matrix
            compared.append((found + bias, run.site(f"blocks.1.{site}")))
        u = run.ln_final.normalized @ run.params.folded("unembed.W_U") + run.params.folded("unembed.b_U")
        compared.append((u, run.logits))
        run.save(compared=compared)
        with pytest.raises(GraphError, match="does not read the stream through a norm"):
            run.params.folded("blocks.1.attn.W_O")
    assert len(run.results["compared"]) >= 3
    for found, expected in run.results["compared"]:
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_a_norm_behind_attention_is_not_folded() -> None:
    """OLMo 2 normalizes what a layer adds, not what it reads: there is nothing to fold."""
    with model_of("olmo2").trace(IDS) as run:
        with pytest.raises(GraphError, match="nothing can be folded"):
            run.params.folded("blocks.0.attn.W_Q")
        run.save(e=run.embed)
    assert run.results["e"].shape[-1] == tiny.D_MODEL
