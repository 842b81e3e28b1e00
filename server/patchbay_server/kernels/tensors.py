"""Torch tensors to and from the graph's dtypes and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from patchbay.errors import DTypeError, ProtocolError
from patchbay.ir.dtypes import DTYPES, DType, promote, promote_scalar, scalar_kind
from patchbay.ir.graph import TensorData

_TO_TORCH: Mapping[DType, torch.dtype] = MappingProxyType({d: getattr(torch, d.name) for d in DTYPES.values()})
_FROM_TORCH: Mapping[torch.dtype, DType] = MappingProxyType({t: d for d, t in _TO_TORCH.items()})
_FLOATING = frozenset(t for t in _FROM_TORCH if t.is_floating_point)


def to_torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of the same name."""
    return _TO_TORCH[dtype]


def from_torch_dtype(dtype: torch.dtype) -> DType:
    """The graph's dtype of the same name.

    Raises:
        DTypeError: graphs have no such dtype (complex numbers, quantised integers).
    """
    found = _FROM_TORCH.get(dtype)
    if found is None:
        raise DTypeError(f"{dtype} has no counterpart in a graph")
    return found


def to_tensor(data: TensorData, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of its own on `device`: later changes to it never reach `data`.

    Raises:
        ProtocolError: `data` holds more or fewer bytes than its shape and dtype need.
    """
    count = 1
    for extent in data.shape:
        count *= extent
    if min(data.shape, default=0) < 0 or data.nbytes != count * data.dtype.itemsize:
        raise ProtocolError(
            f"{data.dtype}{list(data.shape)} needs {count * data.dtype.itemsize} bytes, got {data.nbytes}"
        )
    dtype = _TO_TORCH[data.dtype]
    if count == 0:
        return torch.empty(data.shape, dtype=dtype, device=device)
    # A bytearray is the one copy: torch takes writable buffers only, and graphs are immutable.
    flat = torch.frombuffer(bytearray(data.data), dtype=torch.uint8)
    if data.dtype.kind == "bool":
        flat = flat.ne(0)  # any other byte than 0 or 1 is undefined behaviour in a bool tensor
    return flat.view(dtype).reshape(data.shape).to(device)


def to_data(tensor: torch.Tensor) -> TensorData:
    """`tensor` as bytes on the host.

    A contiguous CPU tensor is not copied: the memoryview keeps it alive and must not be written to, nor may the tensor.
    """
    host = tensor.detach().to("cpu").contiguous()
    dtype = from_torch_dtype(host.dtype)
    if host.numel() == 0:
        return TensorData(dtype, tuple(host.shape), memoryview(b""))
    # as_strided, not reshape: a single element may keep any stride, and then has no view as bytes.
    flat = host.as_strided((host.numel(),), (1,))
    return TensorData(dtype, tuple(host.shape), flat.view(torch.uint8).numpy().data.toreadonly())


def number_fits(value: bool | int | float, dtype: DType) -> bool:
    """Whether `dtype` can hold the Python number `value` (a float may be rounded, never an integer)."""
    if isinstance(value, int) and dtype.is_integer:
        bits = 8 * dtype.itemsize
        return 0 <= value < 2**bits if dtype.kind == "uint" else -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
    return not isinstance(value, int) or abs(value) < 2**1023


def common_dtype(*values: torch.Tensor | bool | int | float, floating: bool = False) -> torch.dtype:
    """The dtype that the graph's rule gives `values` together (`floating`: float32 instead of integers and bool).

    Raises:
        DTypeError: a Python integer does not fit into it.
    """
    tensors = [from_torch_dtype(v.dtype) for v in values if isinstance(v, torch.Tensor)]
    result = tensors[0]
    for other in tensors[1:]:
        result = promote(result, other)
    numbers = [v for v in values if not isinstance(v, torch.Tensor)]
    for number in numbers:
        result = promote_scalar(result, scalar_kind(number))
    if floating:
        result = promote_scalar(result, "float")
    for number in numbers:
        if not number_fits(number, result):
            raise DTypeError(f"{number!r} does not fit into {result}")
    return _TO_TORCH[result]


def _agree(values: tuple[torch.Tensor | bool | int | float, ...]) -> bool:
    """Whether `values` are two tensors of one floating dtype, or one and a float, which nothing has to be done to."""
    if len(values) != 2:
        return False
    a, b = values
    if not isinstance(a, torch.Tensor) or a.dtype not in _FLOATING:
        return False
    return type(b) is float or (isinstance(b, torch.Tensor) and b.dtype is a.dtype)


def promoted(*values: torch.Tensor | bool | int | float, floating: bool = False) -> tuple:
    """`values` with every tensor cast to their common dtype; Python numbers stay, to be taken at full precision."""
    if _agree(values):
        return values
    dtype = common_dtype(*values, floating=floating)
    return tuple(v.to(dtype) if isinstance(v, torch.Tensor) else v for v in values)


def promoted_tensors(*values: torch.Tensor | bool | int | float, floating: bool = False) -> tuple[torch.Tensor, ...]:
    """As `promoted`, with Python numbers made tensors: for torch functions that take tensors only."""
    if _agree(values) and all(isinstance(v, torch.Tensor) for v in values):
        return values  # type: ignore[return-value]
    dtype = common_dtype(*values, floating=floating)
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    return tuple(
        v.to(dtype) if isinstance(v, torch.Tensor) else torch.full((), v, dtype=dtype, device=device) for v in values
    )


def as_float(x: torch.Tensor) -> torch.Tensor:
    """`x`, or float32 where it holds integers or bool: what torch's functions of real numbers do by themselves."""
    return x if x.is_floating_point() else x.to(torch.float32)
