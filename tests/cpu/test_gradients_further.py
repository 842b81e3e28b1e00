"""Gradients of gradients, through generated steps, at attention's insides; editing, stopping and freezing them."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import GraphError
from patchbay.ir.events import ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph
from patchbay.model import Model
from patchbay.tracing.runs import Run
from patchbay_server.engine import Engine
from patchbay_server.models.loader import host
from tests import families
from tests.tiny import build

FAMILIES = ("gpt2", "llama")
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
IDS, OTHER = [1, 5, 9, 3, 7], [2, 2, 8, 30, 11]


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


def difference(logits: Any) -> Any:
    """Logit difference of two tokens at the last position, summed over rows."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum()


class ByHand:
    """A plain twin whose layer outputs can be taken as leaves and replaced; its attention is differentiable twice."""

    def __init__(self, family: str, attention: str = "eager") -> None:
        self.model = build(family, attention=attention).requires_grad_(False)
        self.layers: Any = self.model.get_submodule(LAYERS[family])

    def logits(self, ids: Any, at: dict[int, Any] | None = None) -> torch.Tensor:
        """Logits, with the output of some layers put through a function of it."""
        handles = []
        for layer, change in (at or {}).items():

            def hook(module: Any, args: Any, output: Any, change: Any = change) -> Any:
                return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

            handles.append(self.layers[layer].register_forward_hook(hook))
        try:
            logits: torch.Tensor = self.model(input_ids=torch.tensor(np.atleast_2d(ids)), use_cache=False).logits
            return logits
        finally:
            for handle in handles:
                handle.remove()

    def leaf(self, ids: Any, layer: int) -> torch.Tensor:
        """A layer's output, as something to differentiate by."""
        seen: list[torch.Tensor] = []

        def keep(value: torch.Tensor) -> torch.Tensor:
            seen.append(value.clone())
            return value

        with torch.no_grad():
            self.logits(ids, {layer: keep})
        return seen[0].requires_grad_()


# --- second order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_gradient(family: str) -> None:
    """A Hessian-vector product, and the gradient of a gradient's norm, equal autograd by hand."""
    vector = np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)
    with model_of(family).trace(IDS) as run:
        h = run.blocks[0].resid_post
        first = pb.grad(difference(run.logits), wrt=h)
        run.save(first=first, hvp=pb.grad((first * vector).sum(), wrt=h), norm=pb.grad((first**2).sum(), wrt=h))
    twin = ByHand(family)
    leaf = twin.leaf(IDS, 0)
    (g,) = torch.autograd.grad(difference(twin.logits(IDS, {0: lambda _: leaf})), [leaf], create_graph=True)
    (hvp,) = torch.autograd.grad((g * torch.from_numpy(vector)).sum(), [leaf], retain_graph=True)
    (norm,) = torch.autograd.grad((g**2).sum(), [leaf])
    for name, expected in (("first", g.detach()), ("hvp", hvp), ("norm", norm)):
        np.testing.assert_allclose(run.results[name], expected, rtol=2e-4, atol=1e-5, err_msg=name)
    assert np.abs(run.results["hvp"]).max() > 1e-3


def test_the_third_derivative() -> None:
    """Orders are not bounded: the third of a cubic is a constant."""
    with model_of("llama").trace() as t:
        x = t.constant(np.array([2.0], np.float32))
        value = x**3
        for _ in range(3):
            value = pb.grad(value.sum(), wrt=x)
        t.save(third=value)
    np.testing.assert_allclose(t.results["third"], [6.0])


def test_through_a_forward_that_a_gradient_was_written_into() -> None:
    """A metric after a step along the gradient, differentiated by the value before the step, as meta-learning does."""
    with model_of("llama").trace() as t:
        a, b = t.run(IDS), t.run(IDS)
        h = a.blocks[1].resid_post
        b.blocks[1].resid_post = h + 0.1 * pb.grad(difference(a.logits), wrt=h)
        t.save(g=pb.grad(difference(b.logits), wrt=h))
    twin = ByHand("llama")
    leaf = twin.leaf(IDS, 1)
    (g,) = torch.autograd.grad(difference(twin.logits(IDS, {1: lambda _: leaf})), [leaf], create_graph=True)
    (expected,) = torch.autograd.grad(difference(twin.logits(IDS, {1: lambda _: leaf + 0.1 * g})), [leaf])
    np.testing.assert_allclose(t.results["g"], expected, rtol=2e-4, atol=1e-5)


# --- editing, stopping, freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_gradient_propagates(family: str) -> None:
    """A gradient that is edited on its way back: what arrives further down is what a tensor's own hook would send."""
    with model_of(family).trace(IDS) as run:
        early, late = run.blocks[0].resid_post, run.blocks[1].resid_post
        edited = pb.ops.set_index(pb.grad(difference(run.logits), wrt=late), (..., slice(0, 4)), 0.0)
        run.save(g=pb.grad((late * pb.ops.stop_gradient(edited)).sum(), wrt=early))
    twin = ByHand(family)
    leaf = twin.leaf(IDS, 0)

    def watched(value: torch.Tensor) -> torch.Tensor:
        hook = value.register_hook
        hook(lambda g: torch.cat([torch.zeros_like(g[..., :4]), g[..., 4:]], -1))  # type: ignore[no-untyped-call]
        return value

    (expected,) = torch.autograd.grad(difference(twin.logits(IDS, {0: lambda _: leaf, 1: watched})), [leaf])
    np.testing.assert_allclose(run.results["g"], expected, rtol=1e-4, atol=1e-6)


def test_straight_through() -> None:
    """Rounded on the way forward, the identity on the way back."""
    with model_of("llama").trace(IDS) as run:
        x = run.blocks[1].resid_post
        run.blocks[1].resid_post = x + pb.ops.stop_gradient(x.round() - x)
        run.save(g=pb.grad(difference(run.logits), wrt=x))
    twin = ByHand("llama")
    leaf = twin.leaf(IDS, 1).detach().round().requires_grad_()
    (expected,) = torch.autograd.grad(difference(twin.logits(IDS, {1: lambda _: leaf})), [leaf])
    np.testing.assert_allclose(run.results["g"], expected, rtol=1e-4, atol=1e-6)


def test_a_weights_gradient_by_way_of_a_change_of_it() -> None:
    """A change of a weight, zero, that acts at its module's output has the weight's own gradient."""
    with model_of("llama").trace([IDS, OTHER]) as run:
        down = run.module("model.layers.1.mlp.down_proj")
        change = run.trace.constant(np.zeros((24, 16), np.float32))
        down.output = down.output + down.input @ change
        run.save(g=pb.grad(difference(run.logits), wrt=change))
    twin = ByHand("llama")
    weight: Any = twin.model.get_parameter("model.layers.1.mlp.down_proj.weight").requires_grad_()
    (expected,) = torch.autograd.grad(difference(twin.logits([IDS, OTHER])), [weight])
    np.testing.assert_allclose(run.results["g"], expected.T, rtol=1e-4, atol=1e-6)


def frozen(run: Run) -> None:
    """Patterns and norm scales as constants to the gradient, as circuit tracing has them."""
    for block in run.blocks:
        block.attn.pattern = pb.ops.stop_gradient(block.attn.pattern)
        block.ln1.scale = pb.ops.stop_gradient(block.ln1.scale)
        block.ln2.scale = pb.ops.stop_gradient(block.ln2.scale)
    run.ln_final.scale = pb.ops.stop_gradient(run.ln_final.scale)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_patterns_and_scales(family: str) -> None:
    """With every pattern and scale frozen and MLPs out of the way, the model is linear in its stream."""
    model = model_of(family)
    with model.trace(IDS) as run:
        frozen(run)
        for block in run.blocks:
            block.mlp_out = pb.ops.stop_gradient(block.mlp_out)
        start = run.blocks[0].resid_pre
        g = pb.grad(difference(run.logits), wrt=start)
        run.save(g=g, start=start, logits=run.logits)
    with model.trace(IDS) as plain:
        frozen_away = pb.grad(difference(plain.logits), wrt=plain.blocks[0].resid_pre)
        plain.save(g=frozen_away, logits=plain.logits)
    # Reading and writing back changes rounding at most; the gradient is another one.
    np.testing.assert_allclose(run.results["logits"], plain.results["logits"], rtol=1e-4, atol=1e-4)
    assert np.abs(run.results["g"] - plain.results["g"]).max() > 1e-3
    # Linear: a nudge of any size changes the metric by the gradient times it, once pattern and scales are put back.
    nudge = np.random.default_rng(1).standard_normal(run.results["start"].shape).astype(np.float32)
    with model.trace() as t:
        base, moved = t.run(IDS), t.run(IDS)
        for i in range(model.card.n_layers):
            for part in ("attn.pattern", "ln1.scale", "ln2.scale"):
                moved.site(f"blocks.{i}.{part}")[...] = base.site(f"blocks.{i}.{part}")
            moved.blocks[i].mlp_out = base.blocks[i].mlp_out
        moved.ln_final.scale = base.ln_final.scale
        moved.blocks[0].resid_pre += nudge
        t.save(change=difference(moved.logits) - difference(base.logits))
    np.testing.assert_allclose(t.results["change"], (run.results["g"] * nudge).sum(), rtol=1e-3, atol=1e-3)


# --- generated steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [[IDS], [IDS, OTHER[:3]]])
def test_through_the_cache_of_generated_steps(family: str, rows: list[list[int]]) -> None:
    """A metric at step 4 differentiated by the prompt's stream and by steps 1 and 3: as in the whole text at once."""
    steps = 5
    with model_of(family).generate(rows, max_new_tokens=steps, eos=False) as run:
        where = {0: run.prefill, 1: run.steps[1], 3: run.steps[3]}
        metric = difference(run.steps[4].logits)
        values = [where[k].blocks[0].resid_post for k in where]
        run.save(g=dict(zip(map(str, where), pb.grad(metric, wrt=values), strict=True)))
    twin = ByHand(family)
    for row, ids in enumerate(rows):
        text = [*ids, *(run.output[row] if len(rows) > 1 else run.output[0]).ids[:4]]
        leaf = twin.leaf(text, 0)
        (whole,) = torch.autograd.grad(difference(twin.logits(text, {0: lambda _, leaf=leaf: leaf})), [leaf])
        n = len(ids)
        for k, expected in (("0", whole[0, :n]), ("1", whole[0, n : n + 1]), ("3", whole[0, n + 2 : n + 3])):
            found = run.results["g"][k][row]
            np.testing.assert_allclose(found[-expected.shape[0] :], expected, rtol=2e-3, atol=2e-5)


def test_a_gradient_at_every_step() -> None:
    """Without a step, metric and value are each step's own; their gradients stack."""
    with model_of("llama").generate(IDS, max_new_tokens=4, eos=False) as run:
        h = run.blocks[1].resid_post
        g = pb.grad(difference(run.logits), wrt=h)
        run.stacked(g[:, -1]).save("g")
    twin = ByHand("llama")
    for k in range(4):
        text = [*IDS, *run.output.ids[:k]]
        leaf = twin.leaf(text, 1)
        (whole,) = torch.autograd.grad(difference(twin.logits(text, {1: lambda _, leaf=leaf: leaf})), [leaf])
        np.testing.assert_allclose(run.results["g"][k, 0], whole[0, -1], rtol=1e-3, atol=1e-5)


def test_teacher_forced_continuation() -> None:
    """The gradient of a continuation's log-probability by the prompt's stream, without generating."""
    text = [*IDS, 8, 4]
    with model_of("gpt2").trace(text) as run:
        h = run.blocks[1].resid_post
        logprobs = run.logits.log_softmax(-1)
        run.save(g=pb.grad(logprobs[0, 4, 8] + logprobs[0, 5, 4], wrt=h))
    twin = ByHand("gpt2")
    leaf = twin.leaf(text, 1)
    expected_logprobs = twin.logits(text, {1: lambda _: leaf}).log_softmax(-1)
    (expected,) = torch.autograd.grad(expected_logprobs[0, 4, 8] + expected_logprobs[0, 5, 4], [leaf])
    np.testing.assert_allclose(run.results["g"], expected, rtol=1e-4, atol=1e-6)


def test_steps_that_never_happen_have_no_gradient() -> None:
    """Where all rows had stopped, a gradient is zero and nothing fails."""
    model = model_of("gpt2")
    with model.generate(IDS, max_new_tokens=1, eos=False) as first:
        pass
    t = model.trace()
    run = t.generate(IDS, max_new_tokens=4, eos=False, stop=[first.output.ids[0]])
    h = run.steps[2].blocks[0].resid_post
    t.save(g=pb.grad(difference(run.steps[3].logits), wrt=h))
    with pytest.warns(UserWarning, match="never happened"):
        t.execute()
    assert not t.results["g"].any()


def test_a_step_does_not_depend_on_later_ones() -> None:
    """Differentiating step 1 by step 3 is refused before anything is sent."""
    with pytest.raises(GraphError, match="does not depend"), model_of("gpt2").generate(IDS, max_new_tokens=5) as run:
        run.save(g=pb.grad(difference(run.steps[1].logits), wrt=run.steps[3].blocks[0].resid_post))


# --- attention's insides, in every family -----------------------------------------------------------------------------

INSIDE = ("q", "k", "v", "z", "pattern", "attn_scores", "rot_q", "rot_k")


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in ("rwkv", "mamba", "mamba2")])
def test_attention_internals_of_every_family(family: str) -> None:
    """A gradient at a part of attention predicts what a small write there, in any direction, does to the metric."""
    model = pb.local(families.build(family))
    layer = next(i for i in reversed(range(model.card.n_layers)) if f"blocks.{i}.attn.z" in model.card)
    ids = [1, 5, 9, 3, 7, 11]
    offered = [p for p in INSIDE if f"blocks.{layer}.attn.{p}" in model.card]
    writable = [p for p in offered if model.card.site(f"blocks.{layer}.attn.{p}").writable]
    assert {"z", "pattern"} <= set(offered) or {"q", "k", "v"} <= set(offered)
    rng = np.random.default_rng(0)
    for part in writable:
        site = f"blocks.{layer}.attn.{part}"
        with model.trace(ids) as run:
            g = pb.grad(difference(run.logits), wrt=run.site(site)).save()
        assert np.isfinite(g.value).all(), part
        nudge = (rng.standard_normal(g.value.shape) * 4e-3).astype(np.float32)
        if part in ("attn_scores", "pattern"):  # what is masked stays so
            nudge = np.tril(nudge)
        with model.trace() as t:
            up, down = t.run(ids), t.run(ids)
            up.site(site)[...] += nudge
            down.site(site)[...] += -nudge
            t.save(change=(difference(up.logits) - difference(down.logits)) / 2)
        scale = float(np.linalg.norm(g.value) * np.linalg.norm(nudge))  # of a change in the steepest direction
        assert abs(t.results["change"] - (g.value * nudge).sum()) <= 0.01 * scale + 3e-6, part


# --- memory -----------------------------------------------------------------------------------------------------------


class Kept:
    """Tensors that autograd keeps, by weak references, and how many were alive at most."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = self.total = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        class Box:
            pass

        box: Any = Box()
        box.tensor = tensor
        self.alive.add(box)
        self.total += 1
        self.most = max(self.most, len(self.alive))
        return box

    @staticmethod
    def unpack(box: Any) -> torch.Tensor:
        tensor: torch.Tensor = box.tensor
        return tensor


def kept_by(graph: Any, disabled: tuple[str, ...] = (), **sizes: Any) -> tuple[Kept, dict[str, int]]:
    """What is kept while a graph runs on a plain engine, and how much was alive as each output was sent."""
    engine = Engine(host(build("llama")), **sizes)
    graph = Graph(graph.runs, graph.nodes, graph.outputs)
    kept, at = Kept(), {}

    def emit(event: Any) -> None:
        if isinstance(event, TensorValue):
            at[event.name] = len(kept.alive)

    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        engine.run(engine.prepare(graph, ExecuteOptions(disabled=disabled)), emit)
    return kept, at


def test_only_what_lies_between_is_kept() -> None:
    """Layers before the value and behind the metric keep nothing."""
    model = model_of("llama")

    def graph(first: int, last: int, behind: bool) -> Any:
        with model.trace(IDS) as run:
            value = run.blocks[first].resid_post
            g = pb.grad((run.blocks[last].resid_post ** 2).sum(), wrt=value)
            run.save(g=g, **({"logits": run.logits} if behind else {}))
        return run.graph

    one, two = kept_by(graph(1, 2, False))[0].total, kept_by(graph(0, 2, False))[0].total
    assert 0 < one < two
    assert kept_by(graph(0, 1, False))[0].total == one  # the first layer costs what the second does
    assert kept_by(graph(0, 1, True))[0].total == one  # and what comes behind the metric costs nothing
    assert two == pytest.approx(2 * one, abs=3)


def test_memory_is_freed_as_soon_as_the_backward_used_it() -> None:
    """Once a gradient is there, nothing recorded for it is alive, also when others follow in further forwards."""
    model = model_of("llama")
    with model.trace() as t:
        for i in range(4):
            run = t.run(IDS)
            h = run.blocks[0].resid_post
            t.save(**{f"g{i}": pb.grad(difference(run.logits) * (i + 1.0), wrt=h), f"logits{i}": run.logits})
    kept, at = kept_by(t.graph, ("batch_runs",))
    alone, _ = kept_by(t.graph, ("batch_runs",), max_pass_tokens=5)
    assert kept.most <= kept.total / 4 + 1
    assert [at[f"g{i}"] for i in range(4)] == [0, 0, 0, 0]
    assert alone.most == kept.most
    assert not kept.alive


def test_two_gradients_of_one_forward_share_what_is_kept() -> None:
    """The first of two metrics leaves the recording for the second, which lets it go."""
    with model_of("llama").trace(IDS) as run:
        h = run.blocks[0].resid_post
        first = pb.grad(run.logits[0, -1, 3], wrt=h)
        second = pb.grad(run.logits[0, -1, 5], wrt=h)
        run.save(first=first, second=second)
    kept, at = kept_by(run.graph)
    assert at["first"] > 0
    assert at["second"] == 0
    assert not kept.alive
