"""Modules of the model applied to values of a graph, against calling the same modules of a plain twin."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import GraphError, LimitExceededError, ShapeError, UnknownSiteError
from patchbay.ir.limits import Limits
from patchbay.ir.verify import verify
from patchbay.model import Model
from tests import families, tiny

FAMILIES = ("gpt2", "llama", "gemma2", "mixtral", "mamba", "bloom", "opt")
IDS = [1, 5, 9, 3, 7]


def build(family: str) -> torch.nn.Module:
    return tiny.build(family) if family in ("gpt2", "llama") else families.build(family)


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


def plain(module: torch.nn.Module, value: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        made: Any = module(torch.from_numpy(value))
    return np.asarray((made[0] if isinstance(made, tuple) else made).numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_gives_what_it_gives(family: str) -> None:
    """Whatever a card offers, by canonical name or path, computes what the plain twin's module computes."""
    model, twin = model_of(family), build(family)
    rng = np.random.default_rng(0)
    offered = [c for c in model.card.callables if c.absent is None]
    values = {c.name: rng.standard_normal((2, 4, c.d_in)).astype(np.float32) for c in offered}
    with model.trace() as t:
        t.save(results={c.name: t.apply(c.name, values[c.name]) for c in offered})
    for c in offered:
        expected = plain(twin.get_submodule(c.path), values[c.name])
        found = t.results["results"][c.name].reshape(expected.shape)  # routers flatten rows and positions
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=c.name)
        assert c.params == sum(p.numel() for p in twin.get_submodule(c.path).parameters())
    assert {"ln_final", "blocks.0.ln1" if family != "opt" else "unembed"} <= {c.name for c in offered}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_any_axes_may_stand_before_the_last(family: str) -> None:
    """An MLP treats positions by themselves, so a vector, a matrix or a block of four axes may be given to it."""
    model, twin = model_of(family), build(family)
    value = np.random.default_rng(1).standard_normal((2, 3, 4, 16)).astype(np.float32)
    expected = plain(twin.get_submodule("model.layers.1.mlp"), value.reshape(1, -1, 16)).reshape(value.shape)
    for index in [(), (0,), (0, 1), (0, 1, 2)]:
        found = model.apply("blocks.1.mlp", value[index])
        np.testing.assert_allclose(found, expected[index], rtol=1e-4, atol=1e-5)


def test_attention_takes_whole_rows() -> None:
    """A module that looks at several positions takes [rows, seq, d] and says so before anything is sent."""
    model = model_of("gpt2")
    with model.trace() as t:
        value = t.constant(np.ones((2, 3, 16), np.float32))
        assert t.apply("blocks.1.attn", value).shape == (2, 3, 16)
        with pytest.raises(ShapeError, match=r"several positions: it takes \[rows, seq, 16\]"):
            t.apply("blocks.1.attn", value[0])


def test_what_needs_more_than_a_tensor_is_refused_with_the_reason() -> None:
    """Llama's attention needs position embeddings: the card says so, and using it raises at the line."""
    model = model_of("llama")
    reason = next(c.absent for c in model.card.callables if c.name == "blocks.0.attn")
    assert reason is not None
    assert "position_embeddings" in reason
    with model.trace(IDS) as run:
        for name in ("blocks.0.attn", "model.layers.0.self_attn", "blocks.0"):
            with pytest.raises(GraphError, match=r"cannot be applied to a value: it needs more than one tensor"):
                run.apply(name, run.embed)
        with pytest.raises(GraphError, match="does not map positions to positions"):
            run.apply("model.embed_tokens", run.embed)
        with pytest.raises(UnknownSiteError, match=r"did you mean .*model\.layers\.1\.mlp"):
            run.apply("model.layers.1.mpl", run.embed)
        with pytest.raises(UnknownSiteError, match=r"did you mean .*blocks\.1\.mlp"):
            run.apply("blocks.1.mpl", run.embed)
        with pytest.raises(ShapeError, match="extent 16"):
            run.blocks[0].mlp(run.logits)
        run.save(e=run.embed)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_a_module_inside_its_own_pass_is_not_tapped(family: str) -> None:
    """Sites of the run are neither read nor written while a module is applied, and what is applied is not edited."""
    model, twin = model_of(family), build(family)
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    value = np.random.default_rng(2).standard_normal((3, 7, 16)).astype(np.float32)  # other extents than the run's
    inner = [s for s in ("pre", "post") if f"blocks.1.mlp.{s}" in model.card]
    inner += ["router_logits"] if "blocks.1.mlp.router_logits" in model.card else []
    with model.trace(IDS) as run:
        seen = {}
        for site in inner:
            here = run.site(f"blocks.1.mlp.{site}")
            here[...] += 1.0
            seen[site] = (here, run.site(f"blocks.1.mlp.{site}"), run.apply("blocks.1.mlp", value) + here.sum() * 0)
        run.blocks[1].mlp_out *= 2.0
        run.save(seen=seen, out=run.blocks[1].mlp_out)
    with model.trace(IDS) as alone:
        for site in inner:
            alone.site(f"blocks.1.mlp.{site}")[...] += 1.0
        alone.blocks[1].mlp_out *= 2.0
        alone.save(out=alone.blocks[1].mlp_out)
    expected = plain(twin.get_submodule(f"{layers}.1.mlp"), value)
    for before, after, applied in run.results["seen"].values():
        np.testing.assert_array_equal(after, before + 1.0)
        np.testing.assert_allclose(applied, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run.results["out"], alone.results["out"], rtol=1e-6, atol=1e-6)


def test_ways_to_say_it() -> None:
    """By the trace, the run, the namespace, the module or the model; all are the same node."""
    model = model_of("llama")
    with model.trace(IDS) as run:
        x = run.blocks[0].resid_post
        ways = [
            run.apply("blocks.1.mlp", x),
            run.trace.apply("model.layers.1.mlp", x),
            run.blocks[1].mlp(x),
            run.module("model.layers.1.mlp")(x),
            model.apply("blocks.1.mlp", x),
        ]
        run.save(ways=ways)
    for way in run.results["ways"]:
        np.testing.assert_array_equal(way, run.results["ways"][0])
    assert run.usage.passes == 1
    assert "callable: ln_final, unembed, blocks[i].ln1, blocks[i].ln2, blocks[i].mlp, and modules by path" in str(model)


def test_gradients_pass_through_it() -> None:
    """The gradient of a metric of an applied MLP is autograd's."""
    model, twin = model_of("llama"), build("llama")
    value = np.random.default_rng(3).standard_normal((1, 2, 16)).astype(np.float32)
    with model.trace() as t:
        x = t.constant(value)
        t.save(g=pb.grad((t.apply("blocks.2.mlp", x) ** 2).sum(), wrt=x))
    leaf = torch.from_numpy(value).requires_grad_()
    (expected,) = torch.autograd.grad((twin.get_submodule("model.layers.2.mlp")(leaf) ** 2).sum(), [leaf])
    np.testing.assert_allclose(t.results["g"], expected, rtol=1e-4, atol=1e-5)


def test_its_cost_is_known_before_it_runs() -> None:
    """Two operations for each weight and position, and the limit on operations counts them."""
    model = model_of("llama")
    params = next(c.params for c in model.card.callables if c.name == "blocks.1.mlp")
    assert params == 3 * 16 * 24
    with model.trace() as t:
        t.apply("blocks.1.mlp", np.ones((5, 16), np.float32)).save()
        assert t.estimate().flops == t.estimate(remote=True).flops == 2 * params * 5
    with pytest.raises(LimitExceededError, match="floating-point operations"):
        verify(t.graph, model.card, Limits(max_flops=2 * params * 5 - 1))


async def test_awaited() -> None:
    """An array is applied with await, a value of a trace without."""
    from patchbay.client import AsyncClient
    from patchbay.transport.local import LocalTransport
    from patchbay_server.serving.local import local_servicer

    value = np.ones((2, 16), np.float32)
    async with AsyncClient(LocalTransport(local_servicer(build("llama"), None, name="local"))) as client:
        model = await client.model("local")
        found = await model.apply("ln_final", value)
        async with model.trace([IDS]) as run:
            inside = model.apply("ln_final", run.trace.constant(value)).save()
    np.testing.assert_array_equal(found, inside.value)
    np.testing.assert_allclose(found, plain(build("llama").get_submodule("model.norm"), value), rtol=1e-5, atol=1e-6)
