"""Kernels hang off OpSpec objects: `implements` attaches one, `kernel` finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from patchbay.errors import UnknownOpError
from patchbay.ir.ops.spec import OpSpec

#: Called as ``fn(*args, **spec.fill(attrs))``; returns a tensor, or a tuple of them where the spec names `results`.
Kernel: TypeAlias = Callable[..., Any]

_KERNELS: dict[OpSpec, Kernel] = {}


def implements(spec: OpSpec) -> Callable[[Kernel], Kernel]:
    """Attach the decorated function to `spec`; a second kernel for one operation is a mistake."""

    def attach(function: Kernel) -> Kernel:
        assert spec not in _KERNELS, f"{spec.name} has a kernel already"
        _KERNELS[spec] = function
        return function

    return attach


def kernel(spec: OpSpec) -> Kernel:
    """The torch function of a pure operation.

    It takes tensors (and Python numbers, where ``spec.scalars``) that `spec.infer` accepts, and returns exactly the
    shape and dtype that it says. It changes none of its arguments, and gradients flow through it.
    Creation operations make their tensors on torch's default device: run them within ``with torch.device(...)``.

    Raises:
        UnknownOpError: structural operations have none: the engine executes them.
    """
    found = _KERNELS.get(spec)
    if found is None:
        raise UnknownOpError(f"{spec.name} has no kernel")
    return found
