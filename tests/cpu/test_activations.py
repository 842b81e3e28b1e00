"""Activations as one kernel each: the same values, in the forwards that go on from others and in no other."""

from __future__ import annotations

import math
from functools import cache, partial

import pytest
import torch
from transformers.activations import ACT2FN

from patchbay_server.engine import Engine
from patchbay_server.models.activations import find_activations, one_kernel
from patchbay_server.models.loader import host
from patchbay_server.models.operations import OpPlace, intercept
from tests import families
from tests.cpu.test_prefix import run, same, sweep


@cache
def engine_of(family: str) -> Engine:
    return Engine(host(families.build(family), name=family), layer_cost=2, worthwhile=math.inf)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "bloom", "phi", "codegen"])
def test_activations_in_one_kernel_give_the_same_values(family: str) -> None:
    """A sweep with them equals whole forwards by hand, and the sweep without them; nothing is left on the model."""
    engine, graph = engine_of(family), sweep("resid_pre", layers=range(2))
    found, usage = run(engine, graph)
    same(found, run(engine, graph, deterministic=True)[0])
    assert usage.saved["one_kernel"] > 0
    plain, without = run(engine, graph, disabled=("one_kernel",))
    same(found, plain)
    assert "one_kernel" not in without.saved
    assert not any("forward" in module.__dict__ for module in engine.hosted.model.modules())


def test_models_whose_activation_is_one_kernel_already_keep_it() -> None:
    """Where the module gives the kernel's own bits there is nothing to gain, and the sweep counts nothing."""
    engine = engine_of("llama")
    assert not engine.hosted.activations
    _, usage = run(engine, sweep("resid_pre", layers=range(2)))
    assert "one_kernel" not in usage.saved


class _Named(torch.nn.Module):
    """A layer with one activation in it, and the weight without which a model has no type."""

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.act, self.weight = activation, torch.nn.Parameter(torch.zeros(1))


class _Almost(torch.nn.Module):
    """GPT-2's activation but for a hundred-thousandth."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(value, approximate="tanh") * (1 + 1e-5)


class _Two(torch.nn.Module):
    """Takes two tensors, and so is no activation."""

    def forward(self, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return value + other


@pytest.mark.parametrize(
    ("name", "known"),
    [("gelu_new", True), ("gelu_fast", True), ("quick_gelu", False), ("relu", False), ("gelu", False)],
)
def test_activations_are_known_by_what_they_compute(name: str, known: bool) -> None:
    """Spelled-out forms of torch's kernels are found; the kernels themselves, and functions torch lacks, are not."""
    model = torch.nn.ModuleDict({"layer": _Named(ACT2FN[name])})
    assert [each.path for each in find_activations(model, ["layer"])] == (["layer.act"] if known else [])


def test_what_only_looks_alike_is_no_activation() -> None:
    """Values that differ by more than rounding, modules of two arguments, and models in other types are left alone."""
    for module in (_Almost(), _Two(), torch.nn.Identity(), torch.nn.Dropout(0.5)):
        assert not find_activations(torch.nn.ModuleDict({"layer": _Named(module)}), ["layer"])
    assert not find_activations(torch.nn.ModuleDict({"layer": _Named(ACT2FN["gelu_new"])}).bfloat16(), ["layer"])


def test_an_activation_that_is_listened_to_is_left_alone() -> None:
    """Where it is tapped, replaced or exchanged, or its values are of another type, it works itself."""
    model = torch.nn.ModuleDict({"layer": _Named(ACT2FN["gelu_new"])})
    layer, some = model["layer"], torch.linspace(-3, 3, 50)
    assert isinstance(layer, _Named)
    found = find_activations(model, ["layer"])
    handle = intercept(layer, OpPlace("mul", "a file", "a function", 0, 0), None, lambda value: None)
    with one_kernel(model, found):
        assert "forward" not in layer.act.__dict__
    handle.remove()
    layer.act.__dict__["forward"] = own = partial(torch.add, other=1.0)
    with one_kernel(model, found):
        assert layer.act.__dict__["forward"] is own
    del layer.act.__dict__["forward"]
    expected = layer.act(some)
    with one_kernel(model, found) as done:
        assert layer.act(some.double()).dtype == torch.float64 and done == [0]
        torch.testing.assert_close(layer.act(some), expected, rtol=1e-6, atol=1e-6)
        assert done == [50]
    assert "forward" not in layer.act.__dict__
    layer.act = torch.nn.ReLU()
    with one_kernel(model, found) as done:
        assert torch.equal(layer.act(some), some.relu()) and done == [0]
