"""References of patchbay.ir.ops.creation."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from patchbay.ir.ops import OPS
from patchbay.ir.ops.creation import arange_bounds
from patchbay.reference.arrays import Value
from patchbay.reference.registry import implements

Number: TypeAlias = "bool | int | float"
Shape: TypeAlias = "tuple[int, ...]"


@implements(OPS["zeros"])
def _zeros(*, shape: Shape, dtype: str | None) -> Value:
    del dtype
    return np.zeros(shape)


@implements(OPS["ones"])
def _ones(*, shape: Shape, dtype: str | None) -> Value:
    del dtype
    return np.ones(shape)


@implements(OPS["full"])
def _full(*, shape: Shape, fill_value: Number, dtype: str | None) -> Value:
    del dtype
    return np.full(shape, fill_value)


@implements(OPS["arange"])
def _arange(*, start: Number, stop: Number | None, step: Number, dtype: str | None) -> Value:
    del dtype
    first, last, distance = arange_bounds({"start": start, "stop": stop, "step": step})
    return np.arange(first, last, distance)


@implements(OPS["eye"])
def _eye(*, n_rows: int, n_cols: int | None, k: int, dtype: str | None) -> Value:
    del dtype
    rows, columns = np.ogrid[:n_rows, : n_rows if n_cols is None else n_cols]
    return columns - rows == k


@implements(OPS["linspace"])
def _linspace(*, start: Number, stop: Number, num: int, endpoint: bool, dtype: str | None) -> Value:
    del dtype
    return np.linspace(start, stop, num, endpoint)
