"""Activations that a model spells out in single operations, by torch's one kernel for them.

GPT-2's activation is seven operations over the widest value of a layer. torch has the whole as one, equal but for the
last bits. Modules are known by what they compute, not by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from patchbay_server.models.operations import intercepted

Kernel: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"

#: What may stand for a module that computes the same.
_KERNELS: tuple[Kernel, ...] = (
    partial(torch.nn.functional.gelu, approximate="tanh"),
    torch.nn.functional.gelu,
    torch.nn.functional.silu,
)
#: Rounding errors by which one operation and several may differ, of 1 or of the value, whichever is larger.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Activation:
    """A module that one kernel does.

    Attributes:
        path: its name in the model.
        module: the module that was looked at.
        kernel: what does the same.
    """

    path: str
    module: torch.nn.Module
    kernel: Kernel


def find_activations(model: torch.nn.Module, layers: Sequence[str]) -> tuple[Activation, ...]:
    """The modules inside the layers that one kernel does, and which; in float32.

    Modules that give the kernel's own bits are left out: they call it already.
    """
    first = next(model.parameters(), None)
    if first is None or first.dtype != torch.float32:
        return ()
    found: list[Activation] = []
    for layer in layers:
        for name, module in model.get_submodule(layer).named_modules(prefix=layer):
            if any(True for _ in module.children()) or any(True for _ in module.parameters()):
                continue
            kernel = _kernel_of(module, first.device)
            if kernel is not None:
                found.append(Activation(name, module, kernel))
    return tuple(found)


def _kernel_of(module: torch.nn.Module, device: torch.device) -> Kernel | None:
    some = torch.cat([torch.linspace(-12.0, 12.0, 4_001), torch.tensor([-1e4, -100.0, -0.0, 1e-6, 100.0, 1e4])])
    some = some.to(device).view(1, 1, -1)
    try:
        with torch.no_grad():
            theirs = module(some.clone())
    except Exception:  # noqa: BLE001 - a module that takes something else is no activation
        return None
    if not isinstance(theirs, torch.Tensor) or theirs.shape != some.shape or theirs.dtype != some.dtype:
        return None
    for kernel in _KERNELS:
        ours = kernel(some)
        if torch.equal(ours, theirs):
            return None
        room = _ROUNDINGS * torch.finfo(some.dtype).eps * theirs.abs().clamp(min=1.0)
        if bool(((ours - theirs).abs() <= room).all()):
            return kernel
    return None


@contextmanager
def one_kernel(model: torch.nn.Module, found: Sequence[Activation]) -> Iterator[list[int]]:
    """While the body runs, the modules call their kernels; yields how many elements they did, in one number.

    Modules that something else has taken the place of, or whose operations somebody listens to, are left alone.
    """
    done = [0]
    changed: list[torch.nn.Module] = []
    try:
        for each in found:
            module = model.get_submodule(each.path)
            if module is not each.module or "forward" in module.__dict__ or intercepted(model, each.path):
                continue
            module.__dict__["forward"] = _counted(module, each.kernel, done)
            changed.append(module)
        yield done
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _counted(module: torch.nn.Module, kernel: Kernel, done: list[int]) -> Kernel:
    def forward(value: torch.Tensor) -> torch.Tensor:
        if value.dtype != torch.float32:
            plain: torch.Tensor = type(module).forward(module, value)
            return plain
        done[0] += value.numel()
        result: torch.Tensor = kernel(value)
        return result

    return forward
