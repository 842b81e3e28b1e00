"""Writes of constants by many requests at one site, as one operation: ``[k, d]`` vectors indexed by row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ConstantWrite:
    """All that a call does at a site, where that is to write the same constant at every position of its rows.

    Attributes:
        mode: ``"add"``, ``"mul"`` or ``"set"``.
        value: makes the constant, whose shape is the site's behind rows and positions.
        done: called once it was written.
    """

    mode: str
    value: Callable[[], torch.Tensor]
    done: Callable[[], None]


def write_all(
    site_value: torch.Tensor, writes: Sequence[tuple[ConstantWrite, torch.Tensor, slice]]
) -> tuple[torch.Tensor, bool]:
    """A site's value with all writes made, each at its own rows, as each would have made its own alone.

    Args:
        site_value: ``[rows, seq, ...]``; left as it is.
        writes: what each call writes, its constant, and its rows; no row twice.

    Returns:
        the new value, and whether it has memory of its own.
    """
    by_mode: dict[str, list[tuple[torch.Tensor, slice]]] = defaultdict(list)
    for write, constant, rows in writes:
        by_mode[write.mode].append((constant, rows))
    result, owned = site_value, False
    for mode, parts in by_mode.items():
        table = torch.stack([constant.to(site_value.dtype) for constant, _ in parts]).unsqueeze(1)  # [k, 1, ...]
        places = [row for _, part in parts for row in range(part.start, part.stop)]
        which = [number for number, (_, part) in enumerate(parts) for _ in range(part.start, part.stop)]
        vectors = table
        if which != list(range(len(parts))):
            vectors = table[torch.tensor(which, device=site_value.device)]  # [rows, 1, ...]
        if places == list(range(site_value.shape[0])):
            result, owned = _met(result, vectors, mode), True
            continue
        at = torch.tensor(places, device=site_value.device)
        if not owned:
            result, owned = site_value.clone(), True
        result[at] = _met(result[at], vectors, mode)
    return result, owned


def _met(current: torch.Tensor, vectors: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "add":
        return current + vectors
    if mode == "mul":
        return current * vectors
    return vectors.expand(current.shape).clone()
