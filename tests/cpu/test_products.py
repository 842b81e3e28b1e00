"""Products by the faster library: the same values, in the forwards that go on from others and in no other."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from patchbay.ir.graph import Graph, Output, Run
from patchbay_server.engine import Engine
from patchbay_server.models import products
from patchbay_server.models.loader import host
from patchbay_server.models.operations import OpPlace, intercept
from patchbay_server.models.products import Products, find_products
from patchbay_server.models.taps import first_tensor
from tests import families
from tests.cpu.test_prefix import IDS, get, read, run, same, sweep

FAMILIES = ("gpt2", "llama", "gpt_neox", "bloom", "opt", "gemma2", "qwen2", "mixtral")


@cache
def engine_of(family: str) -> Engine:
    """An engine whose every product in a layer, however small, is left to the other library."""
    hosted = host(families.build(family), name=family)
    paths = [
        name
        for layer in hosted.layers
        for name, module in hosted.model.get_submodule(layer).named_modules(prefix=layer)
        if type(module) in (torch.nn.Linear, Conv1D)
    ]
    return Engine(replace(hosted, products=Products(tuple(paths), few=1)), layer_cost=2, worthwhile=math.inf)


@pytest.mark.parametrize("site", ["resid_pre", "attn.z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_the_faster_library_give_the_same_values(family: str, site: str) -> None:
    """A sweep with them equals whole forwards by hand, and the sweep without them; nothing is left on the model."""
    engine, graph = engine_of(family), sweep(site, layers=range(2))
    if f"blocks.0.{site}" not in engine.hosted.card:
        assert engine.hosted.card.site(f"blocks.0.{site}").absent
        return
    found, usage = run(engine, graph)
    same(found, run(engine, graph, deterministic=True)[0])
    assert usage.saved["fast_products"] > 0
    plain, without = run(engine, graph, disabled=("fast_products",))
    same(found, plain)
    assert "fast_products" not in without.saved
    assert not any("forward" in module.__dict__ for module in engine.hosted.model.modules())


def test_whole_forwards_keep_the_models_own_products() -> None:
    """A forward that goes on from no other uses none of them: its values are the plain model's to the bit."""
    engine = engine_of("gpt2")
    site = read(f"blocks.{families.N_LAYERS - 1}.resid_post")
    found, usage = run(engine, Graph((Run((IDS,)),), (site, get(0, 1, -1)), (Output("out", 1),)))
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        layer = engine.hosted.model.get_submodule(engine.hosted.layers[-1])
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(first_tensor(output)))
        try:
            engine.hosted.model(torch.tensor([IDS]))
        finally:
            handle.remove()
    assert torch.equal(found["out"], seen[0][:, -1]) and "fast_products" not in usage.saved


def test_a_module_that_is_listened_to_is_left_alone() -> None:
    """Where an operation inside a module or around it is tapped, or its forward is another's, nothing is replaced."""
    engine, taken = engine_of("gpt2"), "transformer.h.0.mlp.c_fc"
    model, chosen = engine.hosted.model, engine.hosted.products
    assert chosen is not None and taken in chosen.paths
    module = model.get_submodule(taken)
    own: Any = lambda value: value  # noqa: E731 - it stands for somebody's replacement
    module.__dict__["forward"] = own
    try:
        with chosen.in_use(model):
            assert module.__dict__["forward"] is own
        assert module.__dict__["forward"] is own
    finally:
        del module.__dict__["forward"]
    place = OpPlace("mul", "a file", "a function", 0, 0)
    handle = intercept(model.get_submodule("transformer.h.0.mlp"), place, None, lambda value: None)
    try:
        with chosen.in_use(model):
            assert "forward" not in module.__dict__
            assert "forward" in model.get_submodule("transformer.h.1.mlp.c_fc").__dict__
    finally:
        handle.remove()


def test_products_are_chosen_by_their_time_and_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is chosen where the other library is faster and right; small weights and other types are not tried."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 8), torch.nn.ReLU())
    holder = torch.nn.ModuleDict({"layer": model})
    monkeypatch.setattr(products, "_FASTER", 0.0)  # any time will do
    found = find_products(holder, ["layer"])
    assert found is not None and found.paths == ("layer.0",)
    monkeypatch.setattr(products, "_product", lambda module: lambda value: torch.zeros(value.shape[0], 512))
    assert find_products(holder, ["layer"]) is None
    monkeypatch.undo()
    monkeypatch.setattr(products, "_FASTER", math.inf)
    assert find_products(holder, ["layer"]) is None
    assert find_products(holder.double(), ["layer"]) is None


def test_few_positions_and_recorded_operations_are_left_to_the_module() -> None:
    """Below the bound, in other types and while gradients are recorded the module's own product is used."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(8, 8)})
    some, layer = torch.randn(2, 3, 8), model["layer"]
    with Products(("layer",), few=4).in_use(model) as done:
        expected = torch.nn.functional.linear(some, layer.weight, layer.bias)  # type: ignore[arg-type]
        assert torch.equal(layer(some), expected) and done == [0]  # gradients are recorded here
        with torch.no_grad():
            assert layer(some[:1]).shape == (1, 3, 8) and done == [0]
            torch.testing.assert_close(layer(some), expected)
            assert done == [6]


class _Adapted(torch.nn.Linear):
    """A product with something added, as adapters put in the place of a model's own modules."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return super().forward(value) + 1.0


def test_a_module_that_was_exchanged_since_is_left_alone() -> None:
    """What is there now is more than a product, or has weights of another type: it works itself."""
    model, some = torch.nn.ModuleDict({"layer": torch.nn.Linear(8, 8)}), torch.randn(2, 3, 8)
    chosen = Products(("layer",), few=1)
    model["layer"] = _Adapted(8, 8)
    with torch.no_grad(), chosen.in_use(model) as done:
        assert torch.equal(model["layer"](some), torch.nn.Module.__call__(model["layer"], some)) and done == [0]
        assert "forward" not in model["layer"].__dict__
    model["layer"] = torch.nn.Linear(8, 8).double()
    with torch.no_grad(), chosen.in_use(model) as done:
        assert model["layer"](some.double()).dtype == torch.float64 and done == [0]
