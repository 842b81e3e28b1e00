"""Weights of mixture-of-experts layers by canonical name: the router's, and those of all experts, each proved at load.

``mlp.router.W [d_model, expert]`` makes the router's scores; ``mlp.experts.W_in`` and ``W_gate``
``[expert, d_model, d_mlp]`` and ``mlp.experts.W_out [expert, d_mlp, d_model]`` are every expert's. They are offered
only where an expert, computed from them by hand on made-up tokens, gives what the model's own module gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from patchbay_server.models.binding.compare import close
from patchbay_server.models.taps import ExpertTap, FlatTap, Tap, first_tensor


@dataclass(frozen=True)
class Turned:
    """A parameter with its last two axes swapped, or as it is."""

    path: str
    turned: bool

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        value = model.get_parameter(self.path).detach()
        return value.mT if self.turned else value


@dataclass(frozen=True)
class Half:
    """Half of the last axis of a stacked parameter: the first or second, or every other element.

    Attributes:
        whole: the parameter.
        second: which half.
        interleaved: whether the halves' elements alternate.
    """

    whole: Turned
    second: bool
    interleaved: bool

    def of(self, model: torch.nn.Module) -> torch.Tensor:
        value = self.whole.of(model)
        if self.interleaved:
            return value[..., int(self.second) :: 2]
        size = value.shape[-1] // 2
        return value[..., size:] if self.second else value[..., :size]


_Found = tuple[str, Any, str]


def expert_parameters(
    model: torch.nn.Module, block: str, taps: Mapping[str, Tap], values: Mapping[str, torch.Tensor]
) -> Iterator[_Found]:
    """The parameters of one layer's experts and router, as name, way and axes.

    Args:
        model: the model.
        block: what the layer's names begin with, ``"blocks.3."``.
        taps: the way to every site.
        values: every site's value in one forward.
    """
    tap = taps.get(f"{block}mlp.expert_out")
    inner = tap.inner if isinstance(tap, FlatTap) else tap
    if not isinstance(inner, ExpertTap):
        return
    yield from _router(model, block, inner.path.rpartition(".")[0], values)
    yield from _experts(model, block, inner)


def _router(model: torch.nn.Module, block: str, layer: str, values: Mapping[str, torch.Tensor]) -> Iterator[_Found]:
    scores, given = values.get(f"{block}mlp.router_logits"), values.get(f"module:{layer}.input")
    if scores is None or given is None:
        return
    named = {n: p for n, p in model.get_submodule(layer).named_parameters() if p.is_floating_point()}
    for name, weight in named.items():
        if tuple(weight.shape) != (scores.shape[-1], given.shape[-1]):
            continue
        product = given.float() @ weight.T.float()
        bias = named.get(name.replace("weight", "bias")) if name.endswith("weight") else None
        if bias is not None and bias.shape == scores.shape[-1:] and close(product + bias, scores.float()):
            yield f"{block}mlp.router.W", Turned(f"{layer}.{name}", True), "d_model, expert"
            yield f"{block}mlp.router.b", Turned(f"{layer}.{name.replace('weight', 'bias')}", False), "expert"
            return
        if close(product, scores.float()):
            yield f"{block}mlp.router.W", Turned(f"{layer}.{name}", True), "d_model, expert"
            return


def _experts(model: torch.nn.Module, block: str, tap: ExpertTap) -> Iterator[_Found]:
    module: Any = model.get_submodule(tap.path)
    stacked = {n: p for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    if not {"gate_up_proj", "down_proj"} <= set(stacked) or not getattr(module, "has_gate", True):
        return
    turned = not getattr(module, "is_transposed", False)  # [expert, d_out, d_in], as in torch's Linear
    down = Turned(f"{tap.path}.down_proj", turned)
    both = Turned(f"{tap.path}.gate_up_proj", turned)
    width = down.of(model).shape[-1]
    for interleaved in (False, True):
        gate, up = (Half(both, second, interleaved) for second in (False, True))
        biases: dict[str, Any] = {}
        if "gate_up_proj_bias" in stacked and "down_proj_bias" in stacked:
            whole = Turned(f"{tap.path}.gate_up_proj_bias", False)
            biases = {
                "b_gate": Half(whole, False, interleaved),
                "b_in": Half(whole, True, interleaved),
                "b_out": Turned(f"{tap.path}.down_proj_bias", False),
            }
        found = {"W_gate": gate, "W_in": up, "W_out": down, **biases}
        if _proved(model, module, tap, {n: p.of(model) for n, p in found.items()}, width):
            axes = {"W_gate": "expert, d_model, d_mlp", "W_in": "expert, d_model, d_mlp",
                    "W_out": "expert, d_mlp, d_model", "b_gate": "expert, d_mlp", "b_in": "expert, d_mlp",
                    "b_out": "expert, d_model"}  # fmt: skip
            for name in ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"):
                if name in found:
                    yield f"{block}mlp.experts.{name}", found[name], axes[name]
            return


def _proved(model: torch.nn.Module, module: Any, tap: ExpertTap, parts: Mapping[str, torch.Tensor], width: int) -> bool:
    """Whether every expert computed by hand gives what the module gives for tokens sent to it alone."""
    sample = parts["W_out"]
    tokens = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(sample.device, sample.dtype)
    activation = getattr(module, "act_fn", None)
    for number in range(sample.shape[0]):
        arguments: list[Any] = [None] * 3
        arguments[tap.indices] = torch.full((3, 1), number, device=sample.device)
        arguments[tap.weights] = torch.ones(3, 1, device=sample.device, dtype=sample.dtype)
        arguments = [tokens if a is None else a for a in arguments]
        try:
            made = first_tensor(module.forward(*arguments))
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            return False
        gate, up = (tokens @ parts[n][number] for n in ("W_gate", "W_in"))
        if "b_gate" in parts:
            gate, up = gate + parts["b_gate"][number], up + parts["b_in"][number]
        if hasattr(module, "alpha") and hasattr(module, "limit"):  # gpt-oss
            gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
            hidden = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        elif activation is not None:
            hidden = activation(gate) * up
        else:
            return False
        expected = hidden @ parts["W_out"][number]
        if "b_out" in parts:
            expected = expected + parts["b_out"][number]
        if not close(made, expected):
            return False
    return True
