"""Gradients against autograd by hand on a plain twin: through layers, writes, runs, attention and forwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import DTypeError, GraphError, ShapeError
from patchbay.model import Model
from patchbay.tracing.runs import Run
from tests.tiny import VOCAB, Place, build, places

FAMILIES = ("gpt2", "llama")
IDS, OTHER = [1, 5, 9, 3, 7], [2, 2, 8, 30, 11]
#: Sites of one block by depth, and the ends.
SITES = ["embed", "blocks.0.attn.q", "blocks.0.attn.z", "blocks.1.resid_pre", "blocks.1.mlp.post", "blocks.2.attn_out"]


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


def by_hand(
    family: str, ids: Any, sites: list[str], metric: Callable[[torch.Tensor], torch.Tensor]
) -> list[np.ndarray]:
    """Gradients of a metric of the logits by plain hooks that replace each site's value by itself, as a graph node."""
    model, where = build(family), places(family)
    captured: dict[str, torch.Tensor] = {}
    handles = []

    def tap(site: str, place: Place) -> None:
        def act(whole: torch.Tensor) -> torch.Tensor:
            part = place.view(whole)
            captured[site] = part.clone() if part.requires_grad else part.detach().clone().requires_grad_()
            if not place.heads:
                return captured[site]
            flat = captured[site].flatten(-2)
            return torch.cat([whole[..., : place.start], flat, whole[..., place.start + flat.shape[-1] :]], -1)

        def after(module: Any, args: Any, output: Any) -> Any:
            return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)

        def before(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (act(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": act(kwargs["hidden_states"])}

        module = model.get_submodule(place.path)
        handles.append(
            module.register_forward_hook(after)
            if place.side == "out"
            else module.register_forward_pre_hook(before, with_kwargs=True)
        )

    model.requires_grad_(False)
    for site in sites:
        tap(site, where[site])
    logits = model(input_ids=torch.tensor(np.atleast_2d(ids)), use_cache=False).logits
    return [g.numpy() for g in torch.autograd.grad(metric(logits), [captured[s] for s in sites])]


def difference(logits: Any) -> Any:
    """Logit difference of two tokens at the last position, summed over rows."""
    return (logits[:, -1, 3] - logits[:, -1, 5]).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_one_site(family: str, site: str) -> None:
    """The gradient at a site equals autograd by hand."""
    with model_of(family).trace([IDS, OTHER]) as run:
        h = run.site(site)
        g = pb.grad(difference(run.logits), wrt=h).save()
    (expected,) = by_hand(family, [IDS, OTHER], [site], difference)
    np.testing.assert_allclose(g.value, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(g.value).max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_many_sites_at_once(family: str) -> None:
    """One backward gives the gradients of sites at every depth."""
    with model_of(family).trace([IDS]) as run:
        values = [run.site(s) for s in SITES]
        t = run.trace
        t.save(g=pb.grad(difference(run.logits), wrt=values))
    for found, expected in zip(run.results["g"], by_hand(family, [IDS], SITES, difference), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["pattern", "attn_scores", "rot_q", "v", "result"])
def test_inside_attention_by_finite_differences(part: str) -> None:
    """The gradient at an attention internal predicts the metric's change under a small write there."""
    model, site = model_of("llama"), f"blocks.1.attn.{part}"
    with model.trace(IDS) as run:
        value = run.site(site)
        if part in ("pattern", "attn_scores"):
            run.blocks[1].attn.pattern = run.blocks[1].attn.pattern  # opens the computation, so that it is what counts
        metric = difference(run.logits)
        run.save(g=pb.grad(metric, wrt=value), metric=metric)
    g = run.results["g"]
    rng = np.random.default_rng(0)
    nudge = (rng.standard_normal(g.shape) * 1e-3).astype(np.float32)
    with model.trace() as t:
        up, down = t.run(IDS), t.run(IDS)
        up.site(site)[...] += nudge
        down.site(site)[...] += -nudge
        t.save(up=difference(up.logits), down=difference(down.logits))
    measured = (t.results["up"] - t.results["down"]) / 2
    np.testing.assert_allclose(measured, (g * nudge).sum(), rtol=2e-2, atol=2e-6)
    assert np.abs(g).max() > 1e-5


def test_a_read_only_pattern_has_a_gradient_only_where_the_model_uses_it() -> None:
    """Differentiating by a pattern makes the model go on with it: no separate write is needed."""
    model = model_of("llama")

    def gradient(write: bool) -> np.ndarray:
        with model.trace(IDS) as run:
            pattern = run.blocks[1].attn.pattern
            if write:
                run.blocks[1].attn.pattern = pattern
            g = pb.grad(difference(run.logits), wrt=pattern).save()
        return np.asarray(g.value)

    np.testing.assert_allclose(gradient(False), gradient(True), rtol=1e-5, atol=1e-7)
    assert np.abs(gradient(False)).max() > 1e-5


def test_through_a_patch_from_another_run() -> None:
    """The metric of one run differentiated by an activation of another that was patched into it."""
    model = model_of("llama")
    with model.trace() as t:
        a, b = t.run(IDS), t.run(OTHER)
        source = a.blocks[0].resid_post
        b.blocks[1].resid_post[:, -1] = source[:, -1]
        t.save(g=pb.grad(difference(b.logits), wrt=source))
    plain = build("llama").requires_grad_(False)
    leaf = torch.zeros(0)

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal leaf
        leaf = output.detach().clone().requires_grad_()

    handle = plain.model.layers[0].register_forward_hook(keep)
    plain(input_ids=torch.tensor([IDS]), use_cache=False)
    handle.remove()
    patch: Callable[..., torch.Tensor] = lambda m, a, out: torch.cat([out[:, :-1], leaf[:, -1:]], 1)  # noqa: E731
    handle = plain.model.layers[1].register_forward_hook(patch)
    logits = plain(input_ids=torch.tensor([OTHER]), use_cache=False).logits
    handle.remove()
    (expected,) = torch.autograd.grad(difference(logits), [leaf])
    np.testing.assert_allclose(t.results["g"], expected, rtol=1e-5, atol=1e-6)
    assert not t.results["g"][:, :-1].any()


@pytest.mark.parametrize("deterministic", [False, True])
def test_from_a_late_site_into_an_early_one(deterministic: bool) -> None:
    """Gradients flow through two forwards: late of one run into early of the next, back to the first one's start."""
    model = model_of("llama")
    with model.trace(deterministic=deterministic) as t:
        a, b = t.run(IDS), t.run(OTHER)
        start = a.blocks[0].resid_pre
        b.blocks[0].resid_post[:, 0] += a.blocks[2].resid_post[:, -1]
        t.save(g=pb.grad(difference(b.logits), wrt=start))
    assert t.usage.passes == 2
    plain = build("llama").requires_grad_(False)
    leaf = plain.model.embed_tokens(torch.tensor([IDS])).requires_grad_()
    late = plain.model(inputs_embeds=leaf, use_cache=False, output_hidden_states=True)
    captured: list[torch.Tensor] = []
    handle = plain.model.layers[2].register_forward_hook(lambda m, i, o: captured.append(o))
    plain.model(inputs_embeds=leaf, use_cache=False)
    handle.remove()
    assert late.hidden_states is not None

    def add(m: Any, i: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.cat([out[:, :1] + captured[0][:, -1:], out[:, 1:]], 1)

    handle = plain.model.layers[0].register_forward_hook(add)
    logits = plain(input_ids=torch.tensor([OTHER]), use_cache=False).logits
    handle.remove()
    (expected,) = torch.autograd.grad(difference(logits), [leaf])
    np.testing.assert_allclose(t.results["g"], expected, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_forwarded_twice_keeps_its_gradient() -> None:
    """A run resumed for a second forward (its late site waits for another run) still leads back to the value read."""
    model = model_of("llama")

    def program(t: Any) -> tuple[Any, Any]:
        a, b = t.run(IDS), t.run(OTHER)
        start = a.blocks[0].resid_post
        b.blocks[0].resid_post = a.blocks[1].resid_post
        a.blocks[2].resid_post = b.blocks[2].resid_post
        return start, difference(a.logits) + difference(a.blocks[2].resid_mid @ np.ones((16, VOCAB), np.float32))

    with model.trace() as t:
        start, metric = program(t)
        t.save(g=pb.grad(metric, wrt=start), start=start, metric=metric)
    g, base = t.results["g"], t.results["start"]
    nudge = (np.random.default_rng(1).standard_normal(base.shape) * 1e-2).astype(np.float32)
    ends = []
    for sign in (1, -1):
        with model.trace() as t2:
            start, _ = None, None
            a, b = t2.run(IDS), t2.run(OTHER)
            a.blocks[0].resid_post += sign * nudge
            b.blocks[0].resid_post = a.blocks[1].resid_post
            a.blocks[2].resid_post = b.blocks[2].resid_post
            ones = np.ones((16, VOCAB), np.float32)
            t2.save(m=difference(a.logits) + difference(a.blocks[2].resid_mid @ ones))
        ends.append(t2.results["m"])
    np.testing.assert_allclose((ends[0] - ends[1]) / 2, (g * nudge).sum(), rtol=2e-2, atol=1e-5)


def test_attribution_patching_is_one_graph() -> None:
    """(clean - corrupted) times the gradient, summed per position, equals the two-step computation by hand."""
    model = model_of("gpt2")
    with model.trace() as t:
        clean, corrupted = t.run(IDS), t.run(OTHER)
        value = corrupted.blocks[1].resid_pre
        g = pb.grad(difference(corrupted.logits), wrt=value)
        t.save(effect=((clean.blocks[1].resid_pre - value) * g).sum(-1))
    (gradient,) = by_hand("gpt2", [OTHER], ["blocks.1.resid_pre"], difference)
    with torch.no_grad():
        hidden = [
            build("gpt2")(input_ids=torch.tensor([i]), use_cache=False, output_hidden_states=True)
            .hidden_states[1]
            .numpy()
            for i in (IDS, OTHER)
        ]
    np.testing.assert_allclose(t.results["effect"], ((hidden[0] - hidden[1]) * gradient).sum(-1), rtol=1e-4, atol=1e-5)


def test_a_gradient_may_be_written_into_another_run() -> None:
    """A step along the gradient, written at the same site of a second run, raises the metric."""
    model = model_of("llama")
    with model.trace() as t:
        a, b = t.run(IDS), t.run(IDS)
        value = a.blocks[1].resid_post
        before = difference(a.logits)
        b.blocks[1].resid_post = value + 0.05 * pb.grad(before, wrt=value)
        t.save(before=before, after=difference(b.logits))
    assert t.results["after"] > t.results["before"]


def test_several_metrics_share_their_forwards() -> None:
    """Two gradients of two metrics from one run take one forward, and equal each alone."""
    model = model_of("llama")

    def token(run: Run, i: int) -> Any:
        return run.logits[:, -1, i].sum()

    with model.trace(IDS) as run:
        h = run.blocks[0].resid_post
        run.save(g=[pb.grad(token(run, i), wrt=h) for i in (3, 5)])
    assert run.usage.passes == 1
    for i, found in zip((3, 5), run.results["g"], strict=True):
        with model.trace(IDS) as alone:
            g = pb.grad(token(alone, i), wrt=alone.blocks[0].resid_post).save()
        np.testing.assert_allclose(found, g.value, rtol=1e-6, atol=1e-7)


def test_integrated_gradients_as_a_loop_of_runs() -> None:
    """Averaged gradients along the path from a baseline satisfy completeness."""
    model, steps = model_of("llama"), 24
    with model.trace() as t:
        start, end = t.run(OTHER), t.run(IDS)
        low, high = start.blocks[0].resid_post, end.blocks[0].resid_post
        total: Any = 0
        for i in range(steps):
            run = t.run(IDS)
            run.blocks[0].resid_post = low + (high - low) * ((i + 0.5) / steps)
            point = run.blocks[0].resid_post
            total = total + pb.grad(difference(run.logits), wrt=point)
        first = t.run(IDS)
        first.blocks[0].resid_post = low
        t.save(ig=((high - low) * total / steps).sum(), change=difference(end.logits) - difference(first.logits))
    np.testing.assert_allclose(t.results["ig"], t.results["change"], rtol=5e-2, atol=5e-3)


def test_rows_of_unequal_length() -> None:
    """Gradients of a ragged run are each row's own, zero at the padding."""
    model = model_of("llama")
    with model.trace([IDS[:3], OTHER]) as run:
        g = pb.grad(difference(run.logits), wrt=run.blocks[1].resid_pre).save()
    (short,) = by_hand("llama", [IDS[:3]], ["blocks.1.resid_pre"], difference)
    (full,) = by_hand("llama", [OTHER], ["blocks.1.resid_pre"], difference)
    np.testing.assert_allclose(g.value[0, 2:], short[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(g.value[1], full[0], rtol=1e-4, atol=1e-6)
    assert not g.value[0, :2].any()


def test_with_respect_to_a_constant() -> None:
    """A steering vector that the user brings can be differentiated by, as when it is trained."""
    model, vector = model_of("llama"), np.full(16, 0.1, np.float32)
    with model.trace(IDS) as run:
        v = run.trace.constant(vector)
        run.blocks[1].resid_post += v
        run.save(
            g=pb.grad(difference(run.logits), wrt=v), at=pb.grad(difference(run.logits), wrt=run.blocks[1].resid_post)
        )
    np.testing.assert_allclose(run.results["g"], run.results["at"].sum((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"disabled": ("common_subexpressions",)}, {"deterministic": True}])
def test_equal_constants_have_gradients_of_their_own(options: dict[str, Any]) -> None:
    """Two vectors of zeros added at two layers are two values, whether told apart by nothing but where they stand."""
    model, zeros = model_of("llama"), np.zeros(16, np.float32)
    sites = ["blocks.0.resid_post", "blocks.1.resid_post"]
    with model.trace(IDS, **options) as run:
        brought = [run.trace.constant(zeros), run.trace.constant(zeros)]
        made = [run.trace.constant(pb.ops.zeros((16,))) for _ in sites]
        for i in range(2):
            run.blocks[i].resid_post += brought[i] + made[i]
        run.save(brought=pb.grad(difference(run.logits), wrt=brought), made=pb.grad(difference(run.logits), wrt=made))
    for i, expected in enumerate(by_hand("llama", IDS, sites, difference)):
        for found in (run.results["brought"][i], run.results["made"][i]):
            np.testing.assert_allclose(found, expected.sum((0, 1)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"disabled": ("common_subexpressions",)}, {"deterministic": True}])
def test_a_value_read_twice_is_one_value(options: dict[str, Any]) -> None:
    """A gradient with respect to a site's value is through every use of it, through an earlier read of it too."""
    with model_of("llama").trace(IDS, **options) as run:
        first, second = run.blocks[0].resid_post, run.blocks[0].resid_post
        run.save(value=second, gradient=pb.grad((first * second).sum(), wrt=second))
    np.testing.assert_allclose(run.results["gradient"], 2 * run.results["value"], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"disabled": ("common_subexpressions",)}])
def test_inside_a_loop_equal_values_have_gradients_of_their_own(options: dict[str, Any]) -> None:
    """In the body of a loop, what is differentiated by is not merged with what is only equal to it."""
    with model_of("llama").trace(IDS, **options) as run:

        def step(carry: Any, _: Any) -> Any:
            one, other = pb.ops.tanh(carry), pb.ops.tanh(carry)
            return carry, pb.grad((one * other * other).sum(), wrt=one)

        start = run.blocks[0].resid_post[0, -1]
        run.save(gradient=pb.scan(step, start, length=1)[1], start=start)
    np.testing.assert_allclose(run.results["gradient"][0], np.tanh(run.results["start"]) ** 2, rtol=1e-5, atol=1e-7)


def test_stopping_the_gradient_and_freezing_a_pattern() -> None:
    """stop_gradient is a constant to the gradient: with the pattern frozen, queries get none and values still do."""
    model = model_of("llama")
    with model.trace(IDS) as run:
        q, v = run.blocks[1].attn.q, run.blocks[1].attn.v
        run.blocks[1].attn.pattern = pb.ops.stop_gradient(run.blocks[1].attn.pattern)
        gq, gv = pb.grad(difference(run.logits), wrt=[q, v])
        run.save(q=gq, v=gv)
    assert not run.results["q"].any()
    assert np.abs(run.results["v"]).max() > 1e-4


def test_what_has_no_derivative_gives_zero() -> None:
    """Between an argmax and the site there is nothing to differentiate: the gradient is zero, not an error."""
    with model_of("llama").trace(IDS) as run:
        h = run.blocks[1].resid_post
        g = pb.grad(run.logits.argmax(-1).astype("float32").sum(), wrt=h).save()
    assert g.value.shape == (1, 5, 16)
    assert not g.value.any()


def test_mistakes_are_raised_at_their_line() -> None:
    """A metric that is no single number, or not floating, or does not depend on the value."""
    model = model_of("llama")
    with pytest.raises(ShapeError, match="one number") as shape, model.trace(IDS) as run:
        pb.grad(run.logits, wrt=run.embed)
    assert "test_gradients.py" in str(shape.value.location)
    with pytest.raises(DTypeError, match="floating"), model.trace(IDS) as run:
        pb.grad(run.logits.argmax(-1).sum(), wrt=run.embed)
    with (
        pytest.raises(GraphError, match="does not depend on argument 1 .blocks.2.resid_post") as late,
        model.trace(IDS) as run,
    ):
        run.save(g=pb.grad(run.blocks[0].resid_post.sum(), wrt=run.blocks[2].resid_post))
    assert "test_gradients.py" in str(late.value.location)
    with pytest.raises(GraphError, match="index the gradient"), model.trace(IDS) as run:
        run.save(g=pb.grad(difference(run.logits), wrt=run.blocks[0].resid_post[:, -1]))


def test_parameters_and_the_next_request_are_left_as_they_were() -> None:
    """After a gradient no parameter has one, all still may, no recording goes on, and plain results are unchanged."""
    hf = build("llama")
    model = pb.local(hf)
    with model.trace(IDS) as run:
        run.save(g=pb.grad(difference(run.logits), wrt=run.embed))
    assert all(p.requires_grad and p.grad is None for p in hf.parameters())
    with model.trace(IDS) as run:
        logits = run.logits.save()
    with torch.no_grad():
        np.testing.assert_array_equal(
            logits.value, build("llama")(input_ids=torch.tensor([IDS]), use_cache=False).logits
        )


def test_only_layers_after_the_value_are_recorded() -> None:
    """Layers before the earliest differentiated site run without recording."""
    hf = build("llama")
    model = pb.local(hf)
    recording: list[bool] = []
    for layer in hf.model.layers:
        layer.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    with model.trace(IDS) as run:
        run.save(g=pb.grad(difference(run.logits), wrt=run.blocks[1].resid_pre))
    assert recording[:1] == [False]
    assert recording[2] is True
