"""Indexing that cannot go wrong on the device: every index is checked before it selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from patchbay.errors import IndexOutOfRangeError
from patchbay.ir.indexing import Index, arrays_lead, expand_ellipsis

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
            start, stop, step = slice(*item[1:]).indices(extent)
            result.append(slice(start, stop, min(step, max(extent, 1))))  # torch cannot take every 64-bit number
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


def located(
    op: str, x: torch.Tensor, index: Index, arrays: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """A view of `x` and what to index it with in torch to reach ``x[index]``.

    Raises:
        IndexOutOfRangeError: an index outside its axis.
    """
    key = torch_index(op, tuple(x.shape), index, arrays)
    joined = [position for position, part in enumerate(key) if isinstance(part, torch.Tensor)]
    together = bool(joined) and joined == list(range(joined[0], joined[-1] + 1))
    if not together or joined[0] == 0 or not arrays_lead(index):
        return x, key
    # Only an ellipsis of no axes stands between the arrays: numpy puts the broadcast axes first, torch does not see it.
    axes = [position - sum(part is None for part in key[:position]) for position in joined]
    front = tuple(key[position] for position in joined)
    rest = tuple(part for position, part in enumerate(key) if position not in joined)
    return x.movedim(axes, tuple(range(len(axes)))), front + rest


def index_get(x: torch.Tensor, index: Index, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
    """``x[index]``, a view where torch gives one.

    Raises:
        IndexOutOfRangeError: an index outside its axis.
    """
    view, key = located("getitem", x, index, arrays)
    return view[key]


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
    view, key = located("index_put", x, index, arrays)
    if mode == "add":
        value = view[key] + value
    elif mode == "mul":
        value = view[key].clone() * value  # a copy: the gradient of value needs what was there before
    view[key] = value.to(x.dtype) if isinstance(value, torch.Tensor) else value
