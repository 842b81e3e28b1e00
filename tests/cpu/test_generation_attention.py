"""Keys and values while tokens are generated: what is written before the cache stays in it, what is behind is read."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import GraphError
from patchbay.model import Model
from tests import families
from tests.tiny import build

FAMILIES = ("gpt2", "llama")
IDS, SHORT = [1, 5, 9, 3, 7], [2, 8, 30]


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [[IDS], [IDS, SHORT]])
def test_values_inside_attention(family: str, rows: list[list[int]]) -> None:
    """What is written at `attn.v` at every step stays in the cache: as in forwards over the whole text."""
    model = model_of(family)
    with model.generate(rows, max_new_tokens=4, eos=False) as run:
        run.blocks[1].attn.v[..., 1, :] *= -2.0
        run.save(v=[step.blocks[1].attn.v[:, -1] for step in run.steps], last=run.steps[3].logits)
    for row, prompt in enumerate(rows):
        ids = list(prompt)
        for k in range(4):
            with model.trace(ids) as whole:
                whole.blocks[1].attn.v[..., 1, :] *= -2.0
                whole.save(v=whole.blocks[1].attn.v[0, -1], logits=whole.logits[0, -1])
            np.testing.assert_allclose(run.results["v"][k][row], whole.results["v"], rtol=1e-4, atol=1e-5)
            ids.append(int(whole.results["logits"].argmax()))
        np.testing.assert_allclose(run.results["last"][row, 0], whole.results["logits"], rtol=1e-3, atol=1e-4)
        assert list(run.output[row].ids) == ids[-4:]


def test_values_that_exist_only_behind_the_cache() -> None:
    """Latent attention has its values only there: refused by the server, at the user's line."""
    model = pb.local(families.build("deepseek_v3"))
    with pytest.raises(GraphError, match="from the cache") as caught, model.generate(IDS, max_new_tokens=2) as run:
        run.blocks[0].attn.v *= 2.0
    assert "test_generation_attention.py" in str(caught.value)


@pytest.mark.parametrize("rows", [[IDS], [IDS, SHORT]])
def test_rotated_keys_are_read(rows: list[list[int]]) -> None:
    """What the cache gets at each step is that position's key in a forward over the whole text."""
    model = model_of("llama")
    with model.generate(rows, max_new_tokens=4, eos=False) as run:
        run.save(k=[step.blocks[1].attn.rot_k[:, -1] for step in run.steps], all=run.all_steps.blocks[1].attn.rot_k)
    for row, prompt in enumerate(rows):
        text = [*prompt, *run.output[row].ids[:3]]
        with model.trace(text) as whole:
            keys = whole.blocks[1].attn.rot_k.save()
        for k in range(4):
            expected = keys.value[0, len(prompt) - 1 + k]
            np.testing.assert_allclose(run.results["k"][k][row], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(run.results["all"][k, row], expected, rtol=1e-4, atol=1e-5)
