"""Leaving out layers, attention and MLPs: the same as plain hooks, and really not computed where nobody looks."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import CausalityError, TraceError
from patchbay.model import Model
from tests import families
from tests.tiny import N_LAYERS, build, places, run_hooked

IDS, OTHER = [1, 5, 9, 3, 7], [2, 2, 8, 30, 11]
ROWS = [IDS, OTHER]


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


def layers_that_ran(model: torch.nn.Module, path: str) -> list[int]:
    """Counts, by hooks of its own on every attention module, which layers compute."""
    ran: list[int] = []
    layers: Any = model.get_submodule(path)
    for number, layer in enumerate(layers):
        part = getattr(layer, "self_attn", None) or layer.attn
        part.register_forward_hook(lambda m, a, o, number=number: ran.append(number))
    return ran


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layers", [[0], [1], [1, 2], [0, 2]])
def test_blocks(family: str, layers: list[int]) -> None:
    """The stream passes a skipped block as it came, and the block does not run."""
    plain = build(family)
    ran = layers_that_ran(plain, "transformer.h" if family == "gpt2" else "model.layers")
    model = pb.local(plain)
    ran.clear()
    with model.trace(ROWS) as run:
        for layer in layers:
            run.blocks[layer].skip()
        run.save(logits=run.logits)
    assert sorted(set(range(N_LAYERS)) - set(ran)) == layers
    assert (run.usage.layers_run, run.usage.saved["skip_layers"]) == (N_LAYERS - len(layers), len(layers))
    with model.trace(ROWS, disabled=["skip_layers"]) as slow:
        for layer in layers:
            slow.blocks[layer].skip()
        slow.save(logits=slow.logits)
    assert slow.usage.layers_run == N_LAYERS
    assert slow.results["logits"].tobytes() == run.results["logits"].tobytes()

    twin = build(family)
    for layer in layers:
        block = twin.get_submodule(f"transformer.h.{layer}" if family == "gpt2" else f"model.layers.{layer}")

        def instead(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        block.register_forward_hook(instead, with_kwargs=True)
    with torch.no_grad():
        expected = twin(input_ids=torch.tensor(ROWS), use_cache=False).logits
    np.testing.assert_allclose(run.results["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_parts(family: str, part: str) -> None:
    """Attention or an MLP that is skipped adds nothing, or the value that is given."""
    vector = np.linspace(-1, 1, 16, dtype=np.float32)
    with model_of(family).trace() as t:
        nothing, given = t.run(ROWS), t.run(ROWS)
        getattr(nothing.blocks[1], part).skip()
        getattr(given.blocks[1], part).skip(vector)
        t.save(nothing=nothing.logits, given=given.logits)
    for name, value in (("nothing", np.zeros(16, np.float32)), ("given", vector)):

        def fill(x: torch.Tensor, value: np.ndarray = value) -> None:
            x.copy_(torch.from_numpy(value).expand_as(x))

        edits: Any = [(f"blocks.1.{part}_out", fill)]
        expected = run_hooked(build(family), places(family), torch.tensor(ROWS), edits, "logits")
        np.testing.assert_allclose(t.results[name], expected, rtol=1e-4, atol=1e-5)


def test_some_rows() -> None:
    """Part of a batch skips: the others are as they were, and the block runs for them."""
    with model_of("llama").trace() as t:
        run, plain, skipped = t.run(ROWS), t.run(ROWS), t.run(ROWS)
        run.blocks[1].skip(rows=[1])
        run.blocks[2].mlp.skip(rows=1)
        skipped.blocks[1].skip()
        skipped.blocks[2].mlp.skip()
        t.save(run=run.logits, plain=plain.logits, skipped=skipped.logits)
    np.testing.assert_allclose(t.results["run"][0], t.results["plain"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(t.results["run"][1], t.results["skipped"][1], rtol=1e-5, atol=1e-6)
    assert "skip_layers" not in t.usage.saved


def test_a_substitute() -> None:
    """`skip(value)` puts a value behind the block; from a later site of the same run it is refused."""
    with model_of("llama").trace() as t:
        a, b = t.run(ROWS), t.run([OTHER, IDS])
        b.blocks[1].skip(a.blocks[1].resid_post)
        t.save(a=a.logits, b=b.logits)
        with pytest.raises(TraceError, match="no part that can be skipped"):
            a.blocks[0].ln1.skip()
        with pytest.raises(TraceError, match="a run is no part"):
            a.skip()
    np.testing.assert_allclose(t.results["b"], t.results["a"], rtol=1e-5, atol=1e-6)
    with pytest.raises(CausalityError), model_of("llama").trace(IDS) as run:
        run.blocks[0].skip(run.blocks[1].resid_post)
        run.logits.save()


def test_what_is_looked_at_inside_runs() -> None:
    """A read inside a skipped block sees what the block computes; then it is not left out."""
    with model_of("llama").trace(IDS) as run:
        run.blocks[1].skip()
        run.save(z=run.blocks[1].attn.z, logits=run.logits)
    with model_of("llama").trace(IDS) as plain:
        plain.save(z=plain.blocks[1].attn.z)
    assert run.usage.layers_run == N_LAYERS
    np.testing.assert_allclose(run.results["z"], plain.results["z"], rtol=1e-5, atol=1e-6)


def test_what_a_block_gives_may_be_seen_before() -> None:
    """A read of the block's own output, above the skip in the program, needs it computed."""
    with model_of("llama").trace(IDS, disabled=["prefix_cache"]) as run:
        own = run.blocks[1].resid_post
        run.blocks[1].skip()
        run.save(own=own, after=run.blocks[1].resid_post, before=run.blocks[1].resid_pre)
    assert run.usage.layers_run == 2  # and the last is not needed
    np.testing.assert_array_equal(run.results["after"], run.results["before"])
    assert np.abs(run.results["own"] - run.results["after"]).max() > 1e-3


def test_a_patch_of_the_whole_stream_needs_nothing_before_it() -> None:
    """Layers whose stream is written over before anybody looks are not run, whatever wrote it."""
    stream = np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)
    with model_of("llama").trace(IDS, disabled=["prefix_cache"]) as run:
        run.blocks[1].resid_post = stream
        run.save(logits=run.logits)
    assert (run.usage.layers_run, run.usage.saved["skip_layers"]) == (1, 2)

    def fill(x: torch.Tensor) -> None:
        x.copy_(torch.from_numpy(stream))

    edits: Any = [("blocks.1.resid_post", fill)]
    expected = run_hooked(build("llama"), places("llama"), torch.tensor([IDS]), edits, "logits")
    np.testing.assert_allclose(run.results["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("disabled", [[], ["shared_prefix"], ["batch_runs"], ["skip_layers"]])
def test_a_sweep_over_layers(disabled: list[str]) -> None:
    """Runs that each skip another block give what each gives alone, however their forwards are shared."""
    model = model_of("llama")
    with model.trace(disabled=disabled) as t:
        t.save(base=t.run(IDS).logits)
        for layer in range(N_LAYERS):
            run = t.run(IDS)
            run.blocks[layer].skip()
            run.blocks[N_LAYERS - 1].resid_post[:, 2] += 1.0
            t.save(**{f"layer{layer}": run.logits})
    for layer in range(N_LAYERS):
        with model.trace(IDS, deterministic=True) as alone:
            alone.blocks[layer].skip()
            alone.blocks[N_LAYERS - 1].resid_post[:, 2] += 1.0
            expected = alone.logits.save()
        np.testing.assert_allclose(t.results[f"layer{layer}"], expected.value, rtol=1e-4, atol=1e-5)


def test_gradients_pass_a_skipped_block() -> None:
    """The gradient at its input is the gradient at its output, and the block keeps nothing."""
    with model_of("llama").trace(IDS) as run:
        h = run.blocks[1].resid_pre
        run.blocks[1].skip()
        after = run.blocks[1].resid_post
        run.save(g=pb.grad(run.logits[0, -1, 3], wrt=[h, after]))
    before, behind = run.results["g"]
    np.testing.assert_array_equal(before, behind)
    assert run.usage.saved["skip_layers"] == 1


@pytest.mark.parametrize("family", ["mistral", "gemma2", "mixtral", "gpt_neox", "olmo2", "cohere", "mamba", "bloom"])
def test_other_families(family: str) -> None:
    """Whether or not a family's layers can be left out, the values are those without leaving out."""
    model = pb.local(families.build(family))
    found = []
    for disabled in ([], ["skip_layers"]):
        with model.trace([IDS], disabled=disabled) as run:
            run.blocks[1].skip()
            run.save(logits=run.logits)
        found.append(run.results["logits"])
    np.testing.assert_array_equal(found[0], found[1])


def test_while_tokens_are_generated() -> None:
    """In a generating run a skip holds at every step, or at the one that is named."""
    with model_of("llama").generate(IDS, max_new_tokens=4, eos=False) as run:
        run.blocks[1].skip()
        run.save(x=run.steps[2].blocks[1].resid_post - run.steps[2].blocks[1].resid_pre)
    ids = list(IDS)
    for _ in range(4):
        with model_of("llama").trace(ids) as step:
            step.blocks[1].skip()
            top = step.logits[0, -1].argmax().save()
        ids.append(int(top.value))
    assert list(run.output.ids) == ids[5:]
    assert not run.results["x"].any()
    with model_of("llama").generate(IDS, max_new_tokens=3, eos=False) as once:
        once.steps[1].blocks[1].skip()
        once.save(x=[s.blocks[1].resid_post - s.blocks[1].resid_pre for s in once.steps])
    assert [bool(x.any()) for x in once.results["x"]] == [True, False, True]
