"""Weights in graphs: each canonical parameter against the checkpoint by hand, circuits, attribution, the policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.core import ModelCore
from patchbay.errors import GraphError, TraceError, UnknownSiteError
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.params import POLICIES
from patchbay.ir.verify import verify
from patchbay.model import Model
from patchbay.wire.cards import decode_card, encode_card
from patchbay_server.config import LimitsConfig
from patchbay_server.engine.engine import Engine
from patchbay_server.models.loader import host
from tests.tiny import D_HEAD, D_MLP, D_MODEL, N_HEADS, N_LAYERS, VOCAB, build

IDS = [1, 5, 9, 3]


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


def by_hand(family: str) -> dict[str, torch.Tensor]:
    """Every canonical parameter, written from the source of the two architectures."""
    state = {n: p.detach() for n, p in build(family).named_parameters(remove_duplicate=False)}
    found: dict[str, torch.Tensor] = {}

    def heads_out(matrix: torch.Tensor, heads: int) -> torch.Tensor:  # [d_in, d_out] -> [head, d_in, d_head]
        return matrix.reshape(matrix.shape[0], heads, D_HEAD).permute(1, 0, 2)

    for i in range(N_LAYERS):
        b = f"blocks.{i}."
        if family == "gpt2":
            p = f"transformer.h.{i}."
            for n, letter in enumerate("QKV"):
                columns = slice(n * D_MODEL, (n + 1) * D_MODEL)
                found[f"{b}attn.W_{letter}"] = heads_out(state[p + "attn.c_attn.weight"][:, columns], N_HEADS)
                found[f"{b}attn.b_{letter}"] = state[p + "attn.c_attn.bias"][columns].reshape(N_HEADS, D_HEAD)
            found[b + "attn.W_O"] = state[p + "attn.c_proj.weight"].reshape(N_HEADS, D_HEAD, D_MODEL)
            found[b + "attn.b_O"] = state[p + "attn.c_proj.bias"]
            found[b + "mlp.W_in"], found[b + "mlp.b_in"] = state[p + "mlp.c_fc.weight"], state[p + "mlp.c_fc.bias"]
            found[b + "mlp.W_out"], found[b + "mlp.b_out"] = (
                state[p + "mlp.c_proj.weight"],
                state[p + "mlp.c_proj.bias"],
            )
            for ln, name in (("ln1", "ln_1"), ("ln2", "ln_2")):
                found[f"{b}{ln}.w"], found[f"{b}{ln}.b"] = state[f"{p}{name}.weight"], state[f"{p}{name}.bias"]
        else:
            p = f"model.layers.{i}."
            for letter, heads in (("Q", N_HEADS), ("K", 2), ("V", 2)):
                found[f"{b}attn.W_{letter}"] = heads_out(state[f"{p}self_attn.{letter.lower()}_proj.weight"].T, heads)
            found[b + "attn.W_O"] = state[p + "self_attn.o_proj.weight"].T.reshape(N_HEADS, D_HEAD, D_MODEL)
            found[b + "mlp.W_gate"] = state[p + "mlp.gate_proj.weight"].T
            found[b + "mlp.W_in"] = state[p + "mlp.up_proj.weight"].T
            found[b + "mlp.W_out"] = state[p + "mlp.down_proj.weight"].T
            found[b + "ln1.w"] = state[p + "input_layernorm.weight"]
            found[b + "ln2.w"] = state[p + "post_attention_layernorm.weight"]
    if family == "gpt2":
        found["embed.W_E"], found["pos_embed.W_pos"] = state["transformer.wte.weight"], state["transformer.wpe.weight"]
        found["ln_final.w"], found["ln_final.b"] = state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]
    else:
        found["embed.W_E"], found["ln_final.w"] = state["model.embed_tokens.weight"], state["model.norm.weight"]
    found["unembed.W_U"] = state["lm_head.weight"].T
    found |= {f"param:{n}": p for n, p in state.items()}
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_parameter_is_the_checkpoints(family: str) -> None:
    """Names, shapes and every bit; grouped keys and values keep their own heads; raw ones go by their own names."""
    model, expected = model_of(family), by_hand(family)
    assert {p.name for p in model.card.params} == set(expected)
    with model.trace() as t:
        t.run([1])
        t.save(**{name: t.params[name] for name in expected})
    for name, value in expected.items():
        assert t.results[name].shape == tuple(value.shape), name
        assert t.results[name].tobytes() == value.contiguous().numpy().tobytes(), name
    assert t.usage.layers_run == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_circuits(family: str) -> None:
    """OV and QK circuits of a head, and a value computed from activations and weights, equal numpy by hand."""
    model = model_of(family)
    w = {n: v.numpy() for n, v in by_hand(family).items()}
    shared = N_HEADS // w["blocks.1.attn.W_V"].shape[0]
    with model.trace() as t:
        run = t.run(IDS)
        p = t.params
        ov = p["blocks.1.attn.W_V"][1 // shared] @ p["blocks.1.attn.W_O"][1]
        qk = p["blocks.1.attn.W_Q"][1] @ p["blocks.1.attn.W_K"][1 // shared].mT
        full = p["embed.W_E"] @ ov @ p["unembed.W_U"]
        result = pb.ops.einsum("rshe,hed->rshd", run.blocks[1].attn.z, p["blocks.1.attn.W_O"])
        t.save(ov=ov, qk=qk, full=full, difference=(result - run.blocks[1].attn.result).abs().max())
    ov_hand = w["blocks.1.attn.W_V"][1 // shared] @ w["blocks.1.attn.W_O"][1]
    np.testing.assert_allclose(t.results["ov"], ov_hand, rtol=1e-5, atol=1e-6)
    qk_hand = w["blocks.1.attn.W_Q"][1] @ w["blocks.1.attn.W_K"][1 // shared].T
    np.testing.assert_allclose(t.results["qk"], qk_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(t.results["full"], w["embed.W_E"] @ ov_hand @ w["unembed.W_U"], rtol=1e-4, atol=1e-5)
    assert t.results["difference"] < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_direct_logit_attribution(family: str) -> None:
    """What each layer's parts add to a logit difference, through the frozen final norm, sums to the difference."""
    model = model_of(family)
    w = {n: v.numpy() for n, v in by_hand(family).items()}
    with model.trace(IDS) as run:
        unembed = run.params["unembed.W_U"]
        direction = unembed[:, 3] - unembed[:, 5]
        parts = [run.blocks[0].resid_pre]
        for block in run.blocks:
            parts += [block.attn_out, block.mlp_out]
        stacked = pb.ops.stack(parts)[:, 0, -1]  # [parts, d_model]
        if family == "gpt2":
            stacked = stacked - stacked.mean(-1, keepdims=True)
        scaled = stacked / run.ln_final.scale[0, -1] * run.params["ln_final.w"]
        logits = run.logits[0, -1]
        run.save(each=scaled @ direction, total=logits[3] - logits[5])
    each = run.results["each"]
    bias = w["ln_final.b"] @ (w["unembed.W_U"][:, 3] - w["unembed.W_U"][:, 5]) if family == "gpt2" else 0.0
    assert each.shape == (1 + 2 * N_LAYERS,)
    np.testing.assert_allclose(each.sum() + bias, run.results["total"], rtol=1e-4, atol=1e-5)


def test_weights_have_shapes_before_anything_runs() -> None:
    """They stand beside values like any other, from the trace or from the model, and errors come at the line."""
    model = model_of("llama")
    with model.trace() as t:
        run = t.run(IDS)
        hidden = run.blocks[0].mlp.post @ model.params["blocks.0.mlp.W_out"]
        assert hidden.shape == (1, 4, D_MODEL)
        assert t.params["blocks.0.mlp.W_in"].shape == (D_MODEL, D_MLP)
        t.save(same=(hidden - run.blocks[0].mlp_out).abs().max())
        assert "params['blocks.0.mlp.W_out']" in str(t.graph)
        with pytest.raises(UnknownSiteError, match="did you mean .*'blocks.0.attn.W_O'"):
            t.params["blocks.0.attn.W_0"]
        with pytest.raises(UnknownSiteError, match="no parameter"):
            model.params["blocks.0.attn.b_Q"]
        with pytest.raises(UnknownSiteError, match="did you mean 'embed.W_E'"):
            t.params["W_E"]
        with pytest.raises(TraceError, match=r"begin with t\.params\['unembed\.W_U'\]"):
            model.params["unembed.W_U"][:, 3]
        path = "model.layers.0.mlp.down_proj.weight"
        assert t.params[path].shape == t.params[f"param:{path}"].shape == model.params[path].shape
    assert t.results["same"] < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folded_view_of_the_model_joins_a_trace(family: str) -> None:
    """`model.params.folded` has its shape at once, is what the trace's own is, and is no value by itself."""
    model = model_of(family)
    names = ["blocks.1.attn.W_Q", "blocks.1.attn.b_Q", "blocks.1.mlp.W_in", "unembed.W_U", "unembed.b_U"]
    with model.trace() as t:
        one = t.constant(1.0)
        views = [model.params.folded(name) for name in names]
        pairs = [(one * view, one * t.params.folded(name)) for view, name in zip(views, names, strict=True)]
        assert [view.shape for view in views] == [mine.shape for mine, _ in pairs]
        t.save(pairs=pairs)
    for mine, theirs in t.results["pairs"]:
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(TraceError, match=r"t\.params\.folded\('unembed\.W_U'\)"):
        views[3][:, 0]
    with pytest.raises(GraphError, match="through a norm"):
        model.params.folded("blocks.1.attn.W_O")


def test_they_show_what_there_is() -> None:
    """Tab completion, containment and a table of names with shapes."""
    params = model_of("llama").params
    assert "blocks.2.attn.W_K" in params and "blocks.3.attn.W_K" not in params
    assert "param:lm_head.weight" in params._ipython_key_completions_()
    assert len(params) == len(list(params)) == len(params.keys())
    text = repr(params)
    assert "blocks.{i}.attn.W_K" in text and "[2, 16, 4]" in text and "in the checkpoint" in text
    assert repr(params["unembed.W_U"]) == f"<unembed.W_U: float32[16, {VOCAB}], not in a trace yet>"


def test_gradients_pass_through_weights() -> None:
    """A metric computed with a weight has the gradient that the weight gives it, and no graph changes a weight."""
    model = model_of("llama")
    u = by_hand("llama")["unembed.W_U"].numpy()
    with model.trace(IDS) as run:
        h = run.ln_final.normalized
        metric = (h[0, -1] @ run.params["unembed.W_U"])[7]
        run.save(g=pb.grad(metric, wrt=h))
    np.testing.assert_allclose(run.results["g"][0, -1], u[:, 7], rtol=1e-6)
    with model.trace(IDS) as run:
        w = run.params["unembed.W_U"]
        changed = pb.ops.set_index(w, (0, 0), 5.0)
        run.save(changed=changed, w=run.params["unembed.W_U"])
    assert run.results["changed"][0, 0] == 5.0
    assert run.results["w"].tobytes() == np.ascontiguousarray(u).tobytes()


def test_gradients_with_respect_to_weights_are_refused_with_a_way() -> None:
    """The model never reads a weight that a graph read; the error says what to differentiate by instead."""
    with pytest.raises(GraphError, match="its own weights"), model_of("llama").trace(IDS) as run:
        pb.grad(run.logits[0, -1, 7], wrt=run.params["unembed.W_U"]).save()


def restricted(policy: str) -> Any:
    """What a client of a server of that policy knows, and the engine behind it."""
    hosted = host(build("llama")).with_weights(policy)
    core = ModelCore(None, hosted.card)  # type: ignore[arg-type]
    return core, Engine(hosted, LimitsConfig().graph_limits())


WAYS_OUT = {
    "itself": lambda w: w,
    "sliced": lambda w: w[1:3],
    "reshaped": lambda w: w.reshape((-1,)),
    "transposed": lambda w: w.mT,
    "cast": lambda w: w.astype("float64"),
    "joined": lambda w: pb.ops.concat([w, w]),
    "negated": lambda w: -w,
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_a_parameter_is_no_output_unless_downloadable(way: str) -> None:
    """By default graphs use weights and cannot ask for them: refused on the client, and by a server that is asked."""
    model = model_of("llama")
    with model.trace(IDS) as run:
        run.save(out=WAYS_OUT[way](run.params["unembed.W_U"]))
        graph = run.graph
    used, engine = restricted("used-in-graph")
    with pytest.raises(GraphError, match="not download"):
        verify(graph, used.card)
    with pytest.raises(GraphError, match="not download") as caught:
        engine.prepare(graph, ExecuteOptions())
    assert caught.value.field == "outputs[0]"


def test_used_in_graph_lets_graphs_compute() -> None:
    """What is computed with a weight may be asked for under the default policy, not under `none`."""
    model = model_of("llama")
    with model.trace(IDS) as run:
        run.save(out=run.blocks[0].resid_post @ run.params["unembed.W_U"])
        graph = run.graph
    used, engine = restricted("used-in-graph")
    assert used.card.weights == "used-in-graph" and len(used.card.params) > 20
    engine.prepare(graph, ExecuteOptions())
    none, engine = restricted("none")
    assert none.card.params == ()
    for check in (lambda: verify(graph, none.card), lambda: engine.prepare(graph, ExecuteOptions())):
        with pytest.raises(GraphError, match="may not be used"):
            check()


@pytest.mark.parametrize("policy", POLICIES)
def test_cards_carry_parameters(policy: str) -> None:
    """Names, shapes and the policy survive the wire; a card that says nothing offers nothing."""
    card = replace(model_of("gpt2").card, weights=policy)
    back = decode_card(encode_card(card))
    assert back.params == card.params and back.weights == policy
    message = encode_card(card)
    message.ClearField("weights_policy")
    assert decode_card(message).weights == "none"
    message.weights_policy = "anything"
    with pytest.raises(pb.errors.PatchbayError, match="weights_policy"):
        decode_card(message)
