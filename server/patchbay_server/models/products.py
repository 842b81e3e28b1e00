"""The products of a model's layers by the faster of torch's two libraries, as measured at load.

torch multiplies float32 matrices by MKL, which on processors that are not Intel's leaves half of what they can do
unused; oneDNN, which torch carries for other types, does not. Both sum the same products, in another order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.pytorch_utils import Conv1D

from patchbay_server.models.binding import close
from patchbay_server.models.operations import intercepted

Product: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

#: Elements of a weight from which on a product is more than its overheads.
_LARGE = 2**18
#: Positions that are tried at load, and how often.
_TRIED, _TIMES = 64, 4
#: oneDNN must be so many times faster.
_FASTER = 1.25
#: Fewer positions take as long as their weights take to come from memory, by either library.
FEW = 4


@dataclass(frozen=True)
class Products:
    """The modules whose products oneDNN does faster.

    Attributes:
        paths: their names in the model.
        few: fewer positions than this are left to the module.
    """

    paths: tuple[str, ...]
    few: int = FEW

    @contextmanager
    def in_use(self, model: torch.nn.Module) -> Iterator[list[int]]:
        """While the body runs, the modules work so; yields how many positions they did, in one number.

        Modules that something else has taken the place of, or whose operations somebody listens to, are left alone.
        """
        done = [0]
        changed: list[torch.nn.Module] = []
        try:
            for path in self.paths:
                module = model.get_submodule(path)
                if "forward" in module.__dict__ or intercepted(model, path):
                    continue
                module.__dict__["forward"] = _counted(module, self.few, done)
                changed.append(module)
            yield done
        finally:
            for module in changed:
                del module.__dict__["forward"]


def _counted(module: torch.nn.Module, few: int, done: list[int]) -> Product:
    product, plain = _product(module), type(module).forward

    def forward(value: torch.Tensor) -> torch.Tensor:
        count = value.numel() // max(value.shape[-1], 1)
        if count < few or value.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            found: torch.Tensor = plain(module, value)
            return found
        done[0] += count
        return product(value)

    return forward


def _product(module: Any) -> Product:
    """What `module` computes, by oneDNN."""
    transposed = type(module) is Conv1D  # it keeps [in, out]

    def product(value: torch.Tensor) -> torch.Tensor:
        weight = module.weight.t() if transposed else module.weight
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(value, weight, module.bias, "none", [], "")
        return found

    return product


def find_products(model: torch.nn.Module, layers: Sequence[str]) -> Products | None:
    """The modules inside the layers whose products oneDNN does faster, to the same values; None for none.

    Each shape of weight is tried once: on CPUs, in float32.
    """
    if getattr(torch.ops.mkldnn, "_linear_pointwise", None) is None or not torch.backends.mkldnn.is_available():
        return None
    tried: dict[object, bool] = {}
    found: list[str] = []
    for layer in layers:
        for name, module in model.get_submodule(layer).named_modules(prefix=layer):
            weight = getattr(module, "weight", None)
            if type(module) not in (torch.nn.Linear, Conv1D) or not isinstance(weight, torch.Tensor):
                continue
            if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _LARGE:
                continue
            key = (type(module), weight.shape, weight.stride(), module.bias is None)
            if key not in tried:
                tried[key] = _is_faster(module)
            if tried[key]:
                found.append(name)
    return Products(tuple(found)) if found else None


def _is_faster(module: Any) -> bool:
    width = module.weight.shape[0 if type(module) is Conv1D else 1]
    value = torch.linspace(-1.0, 1.0, _TRIED * width).sin().view(_TRIED, width)
    product, best = _product(module), [float("inf")] * 2
    with torch.no_grad():
        for _ in range(_TIMES):
            for number, function in enumerate((lambda x: type(module).forward(module, x), product)):
                start = time.perf_counter()
                outcome = function(value)
                best[number] = min(best[number], time.perf_counter() - start)
                if number == 0:
                    expected = outcome
        return best[1] * _FASTER < best[0] and close(outcome, expected)
