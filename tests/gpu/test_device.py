"""The same experiments on a GPU and, as their twin, on the CPU: values, element types, kernels, memory."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay_server.models import attention
from tests.tiny import VOCAB, build

IDS = [[1, 5, 9, 3, 7], [2, 2, 8, 30, 11]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; its twin ran on the CPU"),
            ],
        ),
    ],
)
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def placed(family: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(family).to(device=device, dtype=dtype)


def ids_on(device: str) -> torch.Tensor:
    return torch.tensor(IDS, device=device)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_and_a_read_equal_hooks_by_hand(family: str, device: str, dtype: torch.dtype) -> None:
    """Steering the stream after layer 1 gives the logits that a plain hook gives, in the model's own element type."""
    hf = placed(family, device, dtype)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    model = pb.local(placed(family, device, dtype))
    with model.trace(IDS) as run:
        run.blocks[1].resid_post[:, -1] += direction.float().cpu().numpy().astype(np.float32)
        after = run.blocks[2].resid_pre.save()
        logits = run.logits.save()

    seen: list[torch.Tensor] = []

    def steer(module: Any, args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[:, -1] += direction
        seen.append(value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    layers = hf.transformer.h if family == "gpt2" else hf.model.layers
    handle = layers[1].register_forward_hook(steer)
    with torch.no_grad():
        by_hand = hf(input_ids=ids_on(device), use_cache=False).logits
    handle.remove()
    expected = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
    assert logits.value.dtype == expected
    allowed = TOLERANCE[dtype]
    for ours, theirs in ((after, seen[0]), (logits, by_hand)):
        np.testing.assert_allclose(
            ours.value.astype(np.float32), theirs.float().cpu().numpy(), rtol=allowed, atol=allowed
        )


@on_each_device
@in_each_dtype
def test_greedy_generation_equals_generate(device: str, dtype: torch.dtype) -> None:
    """Token for token what transformers generates on the same device."""
    hf = placed("llama", device, dtype)
    theirs = hf.generate(
        ids_on(device),
        attention_mask=torch.ones_like(ids_on(device)),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    model = pb.local(placed("llama", device, dtype))
    with model.generate(IDS, max_new_tokens=8, eos=False) as run:
        tokens = run.generated.save()
    assert tokens.value.tolist() == theirs[:, len(IDS[0]) :].tolist()


@on_each_device
def test_a_gradient_equals_autograd(device: str) -> None:
    """The derivative of a logit with respect to the stream after layer 0."""
    hf = placed("llama", device)
    model = pb.local(placed("llama", device))
    with model.trace(IDS) as run:
        stream = run.blocks[0].resid_post
        gradient = pb.grad(run.logits[:, -1, 3].sum(), wrt=[stream])[0].save()

    held: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        held.append(value.detach().requires_grad_())
        return (held[0], *output[1:]) if isinstance(output, tuple) else held[0]

    handle = hf.model.layers[0].register_forward_hook(keep)
    metric = hf(input_ids=ids_on(device), use_cache=False).logits[:, -1, 3].sum()
    handle.remove()
    (expected,) = torch.autograd.grad(metric, held)
    np.testing.assert_allclose(gradient.value, expected.cpu().numpy(), rtol=1e-5, atol=1e-6)


@on_each_device
def test_fused_attention_is_kept_where_nothing_inside_is_looked_at(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the stream, or z, leaves every layer its fused kernel; writing a pattern opens that layer alone."""
    model = pb.local(placed("llama", device))
    fused: list[str] = []
    plain = attention.sdpa_attention_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        fused.append("")
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    with model.trace(IDS) as run:
        run.blocks[1].attn.z.save()
        run.logits.save()
    assert len(fused) == 3
    fused.clear()
    with model.trace(IDS) as run:
        run.blocks[1].attn.pattern[:, 0] = 0.0
        run.logits.save()
    assert len(fused) == 2


@on_each_device
def test_many_traces_leave_the_device_as_it_was(device: str) -> None:
    """After a warm-up, fifty traces with results of 1 MiB each leave no tensor behind."""
    model = pb.local(placed("llama", device))

    def experiment() -> None:
        with model.trace(IDS) as run:
            wide = run.blocks[0].resid_post.sum() + pb.ops.zeros((512, 512))
            wide.save()
            run.logits.save()

    def held() -> int:
        gc.collect()
        if device == "cuda":
            return torch.cuda.memory_allocated()
        return sum(t.nbytes for t in gc.get_objects() if issubclass(type(t), torch.Tensor))

    for _ in range(5):
        experiment()
    before = held()
    for _ in range(50):
        experiment()
    assert held() <= before + 2**18


@on_each_device
def test_an_index_beyond_the_axis_is_refused_before_the_device_sees_it(device: str) -> None:
    """Data that indexes past an axis is an error of that request; the device goes on."""
    model = pb.local(placed("llama", device))
    with pytest.raises(pb.GraphError), model.trace(IDS) as run:
        run.logits[:, run.blocks[0].resid_post.argmax() + VOCAB].save()
    with model.trace(IDS) as run:
        logits = run.logits.save()
    assert np.isfinite(logits.value).all()
