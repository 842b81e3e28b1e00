"""Low-rank adapters as edits, against the same model with the adapter merged into its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import patchbay as pb
from patchbay import methods
from patchbay.errors import TraceError, UnknownSiteError
from tests.tiny import D_MLP, D_MODEL, build

IDS = [1, 5, 9, 3]
RANK, ALPHA = 2, 6.0
MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.2.mlp.down_proj": (D_MLP, D_MODEL)}


def adapter() -> dict[str, torch.Tensor]:
    """Tensors under the names that PEFT gives them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (d_in, d_out) in MODULES.items():
        for part, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.3
    return tensors


def merged(scale: float) -> np.ndarray:
    model = build("llama")
    tensors = adapter()
    with torch.no_grad():
        for module in MODULES:
            a, b = (tensors[f"base_model.model.{module}.lora_{p}.weight"] for p in "AB")
            weight: Any = model.get_submodule(module).weight
            weight += scale * b @ a
        return np.asarray(model(torch.tensor([IDS])).logits.numpy())


def logits(model: Any) -> np.ndarray:
    with model.trace(IDS) as run:
        run.save(out=run.logits)
    return np.asarray(run.results["out"])


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_as_peft_writes_it(rslora: bool, tmp_path: Path) -> None:
    """The edited model computes what the merged one does; the plain one is plain."""
    save_file(adapter(), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = pb.local(build("llama"))
    tuned = model.edited(methods.lora(tmp_path))
    expected = merged(ALPHA / (RANK**0.5 if rslora else RANK))
    np.testing.assert_allclose(logits(tuned), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits(model), build("llama")(torch.tensor([IDS])).logits.detach(), rtol=1e-5, atol=1e-6)
    assert np.abs(logits(tuned) - logits(model)).max() > 1e-2


def test_tensors_by_name_and_its_line_in_the_graph() -> None:
    """Without alpha the scale is 1; a printed graph shows it by name and a digest of its tensors."""
    model = pb.local(build("llama"))
    edit = methods.lora({k: v.numpy() for k, v in adapter().items()}, name="french")
    with model.edited(edit).trace(IDS) as run:
        run.save(out=run.logits)
        shown = str(run.graph)
    np.testing.assert_allclose(run.results["out"], merged(1.0), rtol=1e-4, atol=1e-5)
    assert "french@" in shown
    other = methods.lora({k: v.numpy() * 2 for k, v in adapter().items()}, name="french")
    assert repr(edit) != repr(other)


def test_two_adapters_stack() -> None:
    """The second acts on the model that the first made."""
    model = pb.local(build("llama"))
    tensors = {k: v.numpy() for k, v in adapter().items()}
    halves = [{k: v for k, v in tensors.items() if f"layers.{i}." in k} for i in (0, 2)]
    both = model.edited(methods.lora(halves[0])).edited(methods.lora(halves[1]))
    np.testing.assert_allclose(logits(both), merged(1.0), rtol=1e-4, atol=1e-5)


def test_what_is_no_adapter() -> None:
    """Half a pair, other tensors, a folder without files, a module that the model lacks."""
    tensors = {k: v.numpy() for k, v in adapter().items()}
    with pytest.raises(TraceError, match="one is missing"):
        methods.lora(dict(list(tensors.items())[:1]))
    with pytest.raises(TraceError, match="no low-rank matrix"):
        methods.lora({"model.layers.0.mlp.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(TraceError, match="holds no adapter"):
        methods.lora("nowhere")
    elsewhere = {k.replace("layers.2", "layers.9"): v for k, v in tensors.items()}
    with (
        pytest.raises(UnknownSiteError, match="has no module"),
        pb.local(build("llama")).edited(methods.lora(elsewhere)).trace(IDS) as run,
    ):
        run.save(out=run.logits)
