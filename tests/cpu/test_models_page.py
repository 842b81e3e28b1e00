"""docs/models.md: its programs run, and what it says of families is what their cards say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from tests.modalities import FAMILIES, build, given, inputs_of

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.mixed = torch.nn.Conv2d(6, 8, 3)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.relu(self.mixed(torch.relu(self.conv(image)))).mean((2, 3)))
        return scores


def test_a_module_of_ones_own() -> None:
    """The page's program hosts a network by an example, silences a channel and raises another."""
    (program,) = (p for p in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "pb.local(net" in p)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "pb": pb,
        "torch": torch,
        "net": _Net(),
        "images": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32),
        "noise": np.random.default_rng(1).normal(scale=0.1, size=(1, 3, 16, 16)).astype(np.float32),
    }
    exec(program, names)
    assert names["scores"].value.shape == (2, 4)
    assert names["found"].activations[-1] > names["found"].activations[0]


def test_every_family_it_names_is_tested() -> None:
    """The families said to be compared with transformers are those of the test."""
    listed = re.search(r"test_modalities\.py`\): (.*?)\.", PAGE, re.S)
    assert listed is not None
    assert re.split(r",\s+", listed[1]) == list(FAMILIES)


@pytest.mark.parametrize("family", ["bert", "t5", "vit", "clip", "llava", "whisper"])
def test_inputs_are_as_it_says(family: str) -> None:
    """Each form of input in the page's list is one that a model of that kind takes."""
    served = pb.local(build(family))
    inputs = given(inputs_of(family))
    named = set(inputs) if isinstance(inputs, dict) else set()
    (forms,) = (p for p in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "input_features" in p)
    documented = [set(re.findall(r'"(\w+)":', line)) for line in forms.splitlines()]
    assert named in documented
    with served.trace(inputs) as run:
        name = next(s.name for s in served.card.sites if s.absent is None and s.name.endswith("resid_post"))
        run.site(name).save()
    assert run.rows == 2


def test_reasons_are_as_it_says() -> None:
    """What the page calls absent is absent, with that reason."""
    for family, site, reason in (
        ("bert", "ln_final.scale", "no norm follows"),
        ("t5", "encoder.pos_embed", "positions enter in attention"),
        ("modernbert", "blocks.0.ln1.scale", "no norm"),
    ):
        spec = next(s for s in pb.local(build(family)).card.sites if s.name == site)
        assert spec.absent is not None and reason in spec.absent
    ends = {"ln_final", "unembed"}
    assert not ends & {c.name for c in pb.local(build("bert")).card.callables}
