"""Rows of unequal length: stored padded on the right, shown padded on the left.

On the right, padding cannot change a causal model's values and needs no mask; on the left, ``[:, -1]`` is the last
token of every row, which is what users expect. Padding reads as zero and ignores writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from patchbay_server.engine.steps import Slot


def own_rows(value: torch.Tensor, axes: Sequence[int], slot: Slot) -> torch.Tensor:
    """A run's rows of a forward's value, cut to its length but still padded on the right; a view."""
    if slot.flat is not None:  # [1, some positions of every row, ...]
        rows = slot.stop - slot.start
        return value[0, slot.flat : slot.flat + rows * slot.seq].unflatten(0, (rows, slot.seq))
    part = value[slot.start : slot.stop]
    for axis in axes:
        if part.shape[axis] != slot.extent(axis):
            part = part.narrow(axis, 0, slot.extent(axis))
    return part


def seen_rows(value: torch.Tensor, axes: Sequence[int], slot: Slot) -> torch.Tensor:
    """A run's rows of a forward's value, as its user sees them; a view where they lie together already.

    Always contiguous: kernels round differently over strided memory, and a value must not depend on how it was stored.

    Args:
        value: ``[rows, ...]`` of the whole forward.
        axes: its axes over token positions.
        slot: the run's rows.
    """
    part = own_rows(value, axes, slot)
    return left_padded(part, axes, slot) if slot.ragged and axes else part.contiguous()


def left_padded(part: torch.Tensor, axes: Sequence[int], slot: Slot) -> torch.Tensor:
    """A copy of a run's rows with every row's positions moved to the end of its sequence axes."""
    shown = torch.zeros_like(part, memory_format=torch.contiguous_format)
    for row, length in enumerate(slot.lengths):
        source, target = part[row], shown[row]
        for axis in axes:
            source = source.narrow(axis - 1, 0, length)
            target = target.narrow(axis - 1, slot.seq - length, length)
        target.copy_(source)
    return shown


def write_back(part: torch.Tensor, shown: torch.Tensor, axes: Sequence[int], slot: Slot) -> None:
    """Put the positions that `left_padded` showed back where they came from, in place."""
    for row, length in enumerate(slot.lengths):
        source, target = shown[row], part[row]
        for axis in axes:
            source = source.narrow(axis - 1, slot.seq - length, length)
            target = target.narrow(axis - 1, 0, length)
        target.copy_(source)
