"""Methods over a data set, against numpy over plain traces of the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import patchbay as pb
from patchbay import methods
from patchbay.datasets import Shards
from tests.datasets.common import fetched, local_model, token_rows
from tests.e2e.served import tokenizer
from tests.tiny import D_MLP, D_MODEL, build

ROWS = token_rows(40, 8)
LABELLED = [{"text": row, "label": "bad" if i % 4 else "good"} for i, row in enumerate(ROWS)]
SITE = "blocks.1.resid_post"


def test_harvested_activations_are_those_of_a_trace(tmp_path: Path) -> None:
    """By site, by function, cast on the server, in memory and in shards."""
    model, whole = local_model(), fetched(local_model(), ROWS, SITE)
    found = methods.harvest(model, ROWS, [SITE, "blocks.0.mlp.post"], batch=7)
    np.testing.assert_allclose(np.concatenate(list(found[SITE])), whole.value[whole.mask], rtol=1e-4, atol=1e-5)
    assert found["blocks.0.mlp.post"][3].shape == (len(ROWS[3]), D_MLP)
    half = methods.harvest(model, ROWS, lambda run: run.blocks[1].resid_post[:, -1], dtype="float16")["value"]
    np.testing.assert_allclose(half, whole.value[:, -1], rtol=2e-3, atol=2e-3)
    assert half.dtype == np.float16
    shards = methods.harvest(model, ROWS, SITE, to=tmp_path / "h", batch=7)[SITE]
    assert isinstance(shards, Shards)
    joined = np.concatenate([shard[SITE] for shard in shards])
    np.testing.assert_array_equal(joined, np.concatenate(list(found[SITE])))


def test_mean_activations_are_what_mean_ablation_puts_in() -> None:
    """Means over all tokens by site, in the shape that an assignment takes."""
    model, whole = local_model(), fetched(local_model(), ROWS, "blocks.1.attn.z")
    means = methods.mean_activations(model, ROWS, ["blocks.1.attn.z", SITE], batch=7)
    np.testing.assert_allclose(means["blocks.1.attn.z"], whole.samples.mean(0), rtol=1e-5, atol=1e-6)
    with model.trace(ROWS[0]) as run:
        run.site("blocks.1.attn.z")[...] = means["blocks.1.attn.z"]
        z = run.blocks[1].attn.z.save()
    np.testing.assert_allclose(z.value[0, 0], means["blocks.1.attn.z"], rtol=1e-6)


def test_a_difference_of_means_by_label() -> None:
    """The second label's mean minus the first's, over tokens or last tokens; labels that nobody has are named."""
    model, whole = local_model(), fetched(local_model(), ROWS, SITE)
    good = np.arange(len(ROWS)) % 4 == 0
    last = whole.value[:, -1].astype(np.float64)
    values = ("bad", "good")
    found = methods.mean_difference(model, LABELLED, SITE, values=values, last=True, batch=7)
    np.testing.assert_allclose(found, last[good].mean(0) - last[~good].mean(0), rtol=1e-4, atol=1e-6)
    found = methods.mean_difference(model, LABELLED, SITE, values=values, batch=7)
    inside = good[whole.rows]
    expected = whole.samples[inside].mean(0) - whole.samples[~inside].mean(0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no row has the label 'good'"):
        methods.mean_difference(model, LABELLED[1:4], SITE, values=values)
    with pytest.raises(ValueError, match="two labels"):
        methods.mean_difference(model, LABELLED, SITE, values=("bad",))


def test_principal_components_are_those_of_an_svd() -> None:
    """Directions, variances and shares equal numpy's of the centred activations; few bytes come back."""
    model, whole = local_model(), fetched(local_model(), ROWS, SITE)
    found = methods.principal_components(model, ROWS, SITE, 3, batch=7)
    x = whole.samples
    centred = x - x.mean(0)
    _, s, vh = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.variances, s[:3] ** 2 / (len(x) - 1), rtol=1e-4)
    np.testing.assert_allclose(found.explained, s[:3] ** 2 / (s**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(found.components * vh[:3], axis=1)), 1, atol=1e-4)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-4, atol=1e-6)
    assert found.samples == len(x)
    assert (found.components[np.arange(3), np.abs(found.components).argmax(1)] > 0).all()
    with pytest.raises(pb.TraceError, match=f"1 to {D_MODEL}"):
        methods.principal_components(model, ROWS, SITE, 17)


def test_max_activating_examples_show_the_tokens_around() -> None:
    """The strongest tokens of each neuron with their neighbours' words and activations."""
    model = pb.local(build("llama"), tokenizer())
    texts = ["the capital of france is paris", "a cat sat on the mat", "rome is a capital", "dog"]
    found = methods.max_activating_examples(model, texts, "blocks.0.mlp.post", 3, neurons=[2, 5], context=1, batch=2)
    assert len(found) == 2
    with model.trace(texts) as run:
        run.save(post=run.blocks[0].mlp.post)
    for neuron, examples in zip((2, 5), found, strict=True):
        post = np.where(np.asarray(run.mask), run.results["post"][..., neuron], -np.inf)
        best = np.sort(post.ravel())[::-1][:3]
        np.testing.assert_allclose([e.value for e in examples], best, rtol=1e-4, atol=1e-5)
        for example in examples:
            words = texts[example.row].split()
            at = example.position
            assert example.tokens == tuple(words[max(0, at - 1) : at + 2])
            assert example.tokens[example.center] == words[at]
            assert example.values[example.center] == example.value
            assert f"row {example.row}" in str(example)
            assert f"[{words[at]}]" in str(example)
    few = methods.max_activating_examples(model, ["dog"], "blocks.0.mlp.post", 3, neurons=[0])
    assert [len(examples) for examples in few] == [1]
