"""Torch's own functions for the operations that loops run most, where shapes and dtypes leave nothing to decide.

A kernel looks at its arguments' dtypes every time; inside a loop they are the same at every step, and known before the
first. What is found here gives the same bits as the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from patchbay.ir.ops.spec import TensorSpec, ValueSpec

#: Of two tensors of one dtype, or of a floating-point tensor and a number.
_BINARY: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
    {
        "add": torch.add,
        "subtract": torch.sub,
        "multiply": torch.mul,
        "divide": torch.div,
        "equal": torch.eq,
        "not_equal": torch.ne,
        "less": torch.lt,
        "less_equal": torch.le,
        "greater": torch.gt,
        "greater_equal": torch.ge,
    }
)
#: Of two tensors of one dtype.
_TENSORS: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
    {"maximum": torch.maximum, "minimum": torch.minimum, "matmul": torch.matmul}
)

#: Of a number and a tensor.
_SWAPPED: Mapping[str, Callable[..., torch.Tensor]] = MappingProxyType(
    {"add": lambda a, b: torch.add(b, a), "multiply": lambda a, b: torch.mul(b, a)}
)


def direct(
    op: str, attrs: Mapping[str, Any], args: Sequence[ValueSpec], out: ValueSpec
) -> Callable[..., torch.Tensor] | None:
    """Torch's function for an operation on values of these specs; None where its kernel has something to decide."""
    if attrs or len(args) != 2:
        return None
    a, b = args
    if not isinstance(a, TensorSpec) or not isinstance(b, TensorSpec) or not isinstance(out, TensorSpec):
        return None
    if a.scalar is not None and b.scalar is None and b.dtype.is_floating and b.dtype.itemsize >= 4:
        return _SWAPPED.get(op)
    if a.scalar is not None or not a.dtype.is_floating or a.dtype.itemsize < 4:
        return None
    if b.scalar is None and a.dtype == b.dtype:
        return _BINARY.get(op) or _TENSORS.get(op)
    return _BINARY.get(op) if b.scalar is not None else None
