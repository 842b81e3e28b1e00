"""The last layer at the positions that are read: keys and values of all positions, the rest of it for those alone.

What the last layer makes of a position is seen there and nowhere else, but for the position's key and value. So its
forward is called twice: with all positions until it hands over keys and values, then with the last ones alone, which
attend to them. What the layer is given for each position (masks, rotations) is found by what changes its shape with
the number of positions, and the whole is proved at load (`continuation_proof`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import torch

from patchbay_server.models.taps import first_tensor, replace_first_tensor

#: Where a tensor lies among a call's arguments: position or keyword, then places inside tuples, lists and dictionaries.
Place: TypeAlias = "tuple[int | str, ...]"


@dataclass(frozen=True)
class Ending:
    """How the last layer is computed at some positions, as proved at load.

    Attributes:
        path: the layer.
        axes: of every tensor that it is given, the axis over the computed positions; None where it has none.
        entrance: the sites that the last layer is entered through; they are visited before its forward is called.
    """

    path: str
    axes: Mapping[Place, int | None]
    entrance: frozenset[str] = frozenset()


class Half(Enum):
    """Which part of the last layer is under way."""

    NONE = 0
    KEYS = 1  # until keys and values are there
    REST = 2  # at the last positions, against them


class Handed(Exception):  # noqa: N818 - a signal, not an error
    """Keys and values of all positions are there; unwinds the layer's first call."""


@dataclass(eq=False)
class Halves:
    """What both calls of the last layer have in common.

    Attributes:
        skipped: computed positions that the second call leaves out.
        half: the call under way.
        kept: keys and values of all positions, by the model's own number of the layer.
    """

    skipped: int
    half: Half = Half.NONE
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Place, torch.Tensor]:
    """The tensors among a call's arguments, by their places."""
    found: dict[Place, torch.Tensor] = {}

    def walk(value: Any, place: Place) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif isinstance(value, (tuple, list)):
            for number, item in enumerate(value):
                walk(item, (*place, number))
        elif type(value) is dict:
            for name, item in value.items():
                walk(item, (*place, name))

    walk(args, ())
    walk(dict(kwargs), ())
    return found


def position_axes(
    one: Mapping[Place, torch.Size], other: Mapping[Place, torch.Size], positions: tuple[int, int]
) -> Mapping[Place, int | None] | None:
    """The axes over computed positions of a call's tensors, from the shapes of two calls; None where it is unclear.

    Args:
        one, other: shapes by place.
        positions: how many positions each call computed.
    """
    if one.keys() != other.keys():
        return None
    axes: dict[Place, int | None] = {}
    for place, shape in one.items():
        if len(shape) != len(other[place]):
            return None
        differ = [i for i, sizes in enumerate(zip(shape, other[place], strict=True)) if sizes[0] != sizes[1]]
        if len(differ) > 1 or any((shape[i], other[place][i]) != positions for i in differ):
            return None
        axes[place] = differ[0] if differ else None
    return axes


@contextmanager
def ending(model: torch.nn.Module, how: Ending, halves: Halves) -> Iterator[None]:
    """While the body runs, the last layer leaves out `halves.skipped` positions but for their keys and values.

    Its output has all positions: those that were left out hold what the layer was given.
    """
    module = model.get_submodule(how.path)
    before = module.__dict__.get("forward")
    forward = module.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        given = leaves(args, kwargs)
        stream = next(iter(given.values()))
        # From position 0 on, models take no mask: torch then lets the first of few positions see the first key alone,
        # but a single one, which is the last, sees all of them.
        proved = given.keys() == how.axes.keys() or (given.keys() < how.axes.keys() and _is_last(stream, halves))
        if not proved:
            return forward(*args, **kwargs)
        try:
            halves.half = Half.KEYS
            try:
                return forward(*args, **kwargs)  # no keys were handed over: this was all of the layer
            except Handed:
                pass
            halves.half = Half.REST
            few = {place: _later(value, how.axes[place], halves.skipped) for place, value in given.items()}
            output = forward(*_with(args, few), **_with(kwargs, few))
        finally:
            halves.half = Half.NONE
            halves.kept.clear()
        own = first_tensor(output)
        assert own is not None
        return replace_first_tensor(output, torch.cat([stream[:, : halves.skipped], own], dim=1))

    module.__dict__["forward"] = instead
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _is_last(stream: torch.Tensor, halves: Halves) -> bool:
    return stream.shape[1] == halves.skipped + 1


def _later(value: torch.Tensor, axis: int | None, skipped: int) -> torch.Tensor:
    return value if axis is None else value.narrow(axis, skipped, value.shape[axis] - skipped)


def _with(value: Any, new: Mapping[Place, torch.Tensor], place: Place = ()) -> Any:
    """`value`, a call's arguments, with other tensors at some places."""
    if place in new:
        return new[place]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_with(item, new, (*place, number)) for number, item in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(_with(item, new, (*place, number)) for number, item in enumerate(value))
    if type(value) is dict:
        return {name: _with(item, new, (*place, name)) for name, item in value.items()}
    return value
