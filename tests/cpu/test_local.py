"""`pb.local`: what stays of a model when nobody uses it any more."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import ArgumentError
from tests.tiny import build


def engines() -> set[threading.Thread]:
    """The engine threads of local models, those of other tests among them."""
    return {thread for thread in threading.enumerate() if thread.name == "patchbay-engine-local"}


def test_a_local_model_is_let_go() -> None:
    """With the last reference to it the engine's thread ends, and the weights are freed."""
    gc.collect()
    before = engines()
    hf = build("llama")
    freed = weakref.ref(hf)
    model = pb.local(hf)
    with model.trace([1, 2, 3]) as run:
        run.logits.save()
    (mine,) = engines() - before
    del model, run, hf
    gc.collect()
    mine.join(timeout=60)
    assert not mine.is_alive()
    gc.collect()
    assert freed() is None


def test_weights_that_change_between_traces_are_seen() -> None:
    """Nothing computed with a model of the caller's outlives the trace: after a change of weights all is new."""
    hf = build("llama")
    model = pb.local(hf)
    ids = [[1, 5, 9, 3, 7, 2, 8, 4] * 2]

    def patched() -> np.ndarray:
        with model.trace(ids) as run:
            run.blocks[2].resid_post[:, -1] *= 0.5
            logits = run.logits[:, -1].save()
        return logits.value

    first = [patched() for _ in range(3)]
    np.testing.assert_allclose(first[0], first[2], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.data.mul_(3.0)
    changed = patched()
    assert np.abs(changed - first[0]).max() > 1e-2
    np.testing.assert_allclose(changed, _by_hand(hf, ids), rtol=1e-5, atol=1e-5)


def _by_hand(hf: Any, ids: list[list[int]]) -> np.ndarray:
    def halve(module: Any, args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[:, -1] *= 0.5
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = hf.model.layers[2].register_forward_hook(halve)
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor(ids), use_cache=False).logits[:, -1]
    handle.remove()
    return logits.numpy()


def test_what_cannot_be_disabled_is_refused_by_the_client() -> None:
    """The card lists the optimisations; a misspelt one is refused at its line, with the nearest name."""
    model = pb.local(build("llama"))
    for use in (
        lambda: model.trace([1, 2], disabled=["early_stopp"]),
        lambda: model.generate([1, 2], max_new_tokens=2, disabled=["early_stopp"]),
        lambda: model.map([[1, 2]], lambda run: {"x": run.logits[:, -1]}, disabled=["early_stopp"]),
    ):
        with pytest.raises(ArgumentError, match="did you mean 'early_stop'") as caught:
            use()
        assert "test_local.py:" in str(caught.value)
    with model.trace([1, 2], disabled=["early_stop", "windows"]) as run:
        h = run.logits[:, -1].save()
    assert h.value.shape == (1, 32)
