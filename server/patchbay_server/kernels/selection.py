"""Indexing that cannot go wrong on the device: every index is checked before it selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from patchbay.errors import IndexOutOfRangeError
from patchbay.ir.indexing import Index, expand_ellipsis

Mode = Literal["set", "add", "mul"]


def check_bounds(op: str, checks: Sequence[tuple[torch.Tensor, int, int]]) -> None:
    """Raise IndexOutOfRangeError unless low <= element < high for each (indices, low, high).

    On an accelerator all extremes come to the host in one copy, so that this synchronises once.
    """
    filled = [(indices, low, high) for indices, low, high in checks if indices.numel()]
    if not filled:
        return
    extremes = [torch.stack(torch.aminmax(indices)).to(torch.int64) for indices, _, _ in filled]
    for (low, high), (_, least, most) in zip(torch.stack(extremes).tolist(), filled, strict=True):
        if low < least or high >= most:
            wrong = low if low < least else high
            raise IndexOutOfRangeError(f"{op}: index {wrong} is out of range [{least}, {most})")


def wrapped(indices: torch.Tensor, extent: int) -> torch.Tensor:
    """int64 `indices` in which negative ones count from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + extent, indices)


def torch_index(op: str, shape: tuple[int, ...], index: Index, arrays: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """`index` as torch takes it, with bounds checked: numpy's semantics, ints among arrays included."""
    items = expand_ellipsis(op, index, len(shape))
    # Among arrays numpy counts an int, and an array of no dimensions, as an array; torch would select by it first, and
    # so misplace the broadcast axes: hence everything gets as many dimensions as the largest array.
    ndim = max((array.ndim for array in arrays), default=0)
    result: list[Any] = []
    checks: list[tuple[torch.Tensor, int, int]] = []
    axis = 0
    for item in items:
        kind = item[0]
        if kind == "newaxis":
            result.append(None)
            continue
        extent = shape[axis]
        if kind == "slice":
            result.append(slice(*item[1:]))
        elif kind == "int":
            position = int(item[1])  # type: ignore[arg-type]
            if not -extent <= position < extent:
                raise IndexOutOfRangeError(f"{op}: index {position} is out of range for axis {axis} of extent {extent}")
            result.append(torch.full((1,) * ndim, position, device=arrays[0].device) if ndim else position)
        else:
            array = arrays[int(item[1])]  # type: ignore[arg-type]
            checks.append((array, -extent, extent))
            # As int64: torch takes uint8 for a mask.
            result.append(array.to(torch.int64).reshape((1,) * (ndim - array.ndim) + tuple(array.shape)))
        axis += 1
    check_bounds(op, checks)
    return tuple(result)


def index_get(x: torch.Tensor, index: Index, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
    """``x[index]``, a view where torch gives one.

    Raises:
        IndexOutOfRangeError: an index outside its axis.
    """
    return x[torch_index("getitem", tuple(x.shape), index, arrays)]


def index_put(
    x: torch.Tensor,
    index: Index,
    arrays: Sequence[torch.Tensor],
    value: torch.Tensor | bool | int | float,
    mode: Mode = "set",
) -> None:
    """Set, add to or scale ``x[index]`` in place; `value` broadcasts and is cast to x's dtype.

    Positions named twice are written once, as in numpy: ``add`` does not add up.

    Raises:
        IndexOutOfRangeError: an index outside its axis; x is unchanged then.
    """
    key = torch_index("site.write", tuple(x.shape), index, arrays)
    if mode == "add":
        value = x[key] + value
    elif mode == "mul":
        value = x[key] * value
    x[key] = value.to(x.dtype) if isinstance(value, torch.Tensor) else value
