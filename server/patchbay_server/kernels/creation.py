"""Kernels of patchbay.ir.ops.creation; they make tensors on torch's default device."""

from __future__ import annotations

from typing import TypeAlias

import torch

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay.ir.ops.creation import arange_bounds, natural_dtype
from patchbay_server.kernels.registry import implements
from patchbay_server.kernels.tensors import to_torch_dtype

Number: TypeAlias = "bool | int | float"
Shape: TypeAlias = "tuple[int, ...]"


def _dtype(name: str | None, *values: Number) -> torch.dtype:
    """The dtype called `name`, else what `values` are naturally, else float32."""
    if name is not None:
        return to_torch_dtype(DTYPES[name])
    return to_torch_dtype(natural_dtype(*values)) if values else torch.float32


@implements(OPS["zeros"])
def _zeros(*, shape: Shape, dtype: str | None) -> torch.Tensor:
    return torch.zeros(shape, dtype=_dtype(dtype))


@implements(OPS["ones"])
def _ones(*, shape: Shape, dtype: str | None) -> torch.Tensor:
    return torch.ones(shape, dtype=_dtype(dtype))


@implements(OPS["full"])
def _full(*, shape: Shape, fill_value: Number, dtype: str | None) -> torch.Tensor:
    return torch.full(shape, fill_value, dtype=_dtype(dtype, fill_value))


@implements(OPS["arange"])
def _arange(*, start: Number, stop: Number | None, step: Number, dtype: str | None) -> torch.Tensor:
    first, last, distance = arange_bounds({"start": start, "stop": stop, "step": step})
    wanted = _dtype(dtype, 0, first, last, distance)
    if (last - first) * distance <= 0:  # empty; torch refuses to step away from the stop
        return torch.empty((0,), dtype=wanted)
    return torch.arange(first, last, distance, dtype=wanted)


@implements(OPS["eye"])
def _eye(*, n_rows: int, n_cols: int | None, k: int, dtype: str | None) -> torch.Tensor:
    columns = n_rows if n_cols is None else n_cols
    if k == 0 or not n_rows * columns:
        return torch.eye(n_rows, columns, dtype=_dtype(dtype))
    rows_at = torch.arange(n_rows).unsqueeze(-1)
    return (torch.arange(columns) - rows_at == max(-n_rows, min(k, columns))).to(_dtype(dtype))


@implements(OPS["linspace"])
def _linspace(*, start: Number, stop: Number, num: int, endpoint: bool, dtype: str | None) -> torch.Tensor:
    if endpoint:
        return torch.linspace(start, stop, num, dtype=_dtype(dtype))
    return torch.linspace(start, stop, num + 1, dtype=_dtype(dtype))[:num]
