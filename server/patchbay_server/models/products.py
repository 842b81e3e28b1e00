"""The products of a model's layers by the faster of torch's two libraries, as measured at load.

torch multiplies float32 matrices by MKL, which on processors that are not Intel's leaves half of what they can do
unused; oneDNN, which torch carries for other types, does not. Both sum the same products, in another order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from transformers.pytorch_utils import Conv1D

from patchbay_server.models.binding import close
from patchbay_server.models.operations import intercepted

Product: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

#: The modules whose forward is known to be a product and nothing else; their descendants may do more.
_KINDS = (torch.nn.Linear, Conv1D)
#: Elements of a weight from which on a product is more than its overheads.
_LARGE = 2**18
#: Positions that are tried at load, and how often at least and at most.
_TRIED, _LEAST, _MOST = 32, 3, 8
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

        Modules that something else has taken the place of since (an adapter, say), or whose operations somebody
        listens to, are left alone.
        """
        done = [0]
        changed: list[torch.nn.Module] = []
        try:
            for path in self.paths:
                module = model.get_submodule(path)
                if type(module) not in _KINDS or "forward" in module.__dict__ or intercepted(model, path):
                    continue
                module.__dict__["forward"] = _counted(module, self.few, done)
                changed.append(module)
            yield done
        finally:
            for module in changed:
                del module.__dict__["forward"]


def _counted(module: Any, few: int, done: list[int]) -> Product:
    product, plain = _product(module), type(module).forward

    def forward(value: torch.Tensor) -> torch.Tensor:
        count = value.numel() // max(value.shape[-1], 1)
        kinds = {(value.dtype, value.device.type), (module.weight.dtype, module.weight.device.type)}
        recorded = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if count < few or recorded or kinds != {(torch.float32, "cpu")}:
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

    One of each shape is tried: on CPUs, in float32. They are left to oneDNN together or not at all.
    """
    if getattr(torch.ops.mkldnn, "_linear_pointwise", None) is None or not torch.backends.mkldnn.is_available():
        return None
    some: dict[object, Any] = {}
    found: dict[str, object] = {}
    for layer in layers:
        for name, module in model.get_submodule(layer).named_modules(prefix=layer):
            weight = getattr(module, "weight", None)
            if type(module) not in _KINDS or not isinstance(weight, torch.Tensor):
                continue
            if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _LARGE:
                continue
            found[name] = key = (type(module), weight.shape, weight.stride(), module.bias is None)
            some.setdefault(key, module)
    alike = {key for key, module in some.items() if _is_alike(module)}
    if not _are_faster([module for key, module in some.items() if key in alike]):
        return None
    return Products(tuple(name for name, key in found.items() if key in alike))


def _given(module: Any) -> torch.Tensor:
    """Made-up positions for a module."""
    width = module.weight.shape[0 if type(module) is Conv1D else 1]
    return torch.linspace(-1.0, 1.0, _TRIED * width).sin().view(_TRIED, width)


def _is_alike(module: Any) -> bool:
    value = _given(module)
    with torch.no_grad():
        return close(_product(module)(value), type(module).forward(module, value))


def _are_faster(modules: Sequence[Any]) -> bool:
    """Whether oneDNN is quicker by far, all modules together, each at its best of a few tries.

    The thread's own time is measured, so that what else the machine does counts for little.
    """
    plain, fast = [math.inf] * len(modules), [math.inf] * len(modules)
    with torch.no_grad():
        for number in range(_MOST if modules else 0):
            for i, module in enumerate(modules):
                value = _given(module)
                plain[i] = min(plain[i], _seconds(partial(type(module).forward, module), value))
                fast[i] = min(fast[i], _seconds(_product(module), value))
            if number + 1 >= _LEAST and sum(fast) * _FASTER < sum(plain):
                return True
    return False


def _seconds(product: Product, value: torch.Tensor) -> float:
    start = time.thread_time()
    product(value)
    return time.thread_time() - start
