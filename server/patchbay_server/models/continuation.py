"""Forwards that go on from another one: at a later layer, from a later position, against its keys and values.

A forward over some tokens leaves a `Trunk`: the residual stream between layers, and every layer's keys and values. In
a causal model, a forward over the same tokens that changes something at position p of layer l differs from it nowhere
before that, so it may start there. Whether a model can be run so is proved at load (`continuation_proof`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from patchbay_server.models.ending import Ending, Half, Halves, Handed, ending
from patchbay_server.models.prefixes import Prefix
from patchbay_server.models.taps import Handle, first_tensor, replace_first_tensor

#: Instead of the number of a layer: before the model's first operation.
EMBEDDING = -2


@dataclass(frozen=True, slots=True)
class Reach:
    """Where in the forward a site lies, and what it looks like in one that goes on from another.

    Attributes:
        after: the last layer that is complete when the site is reached; -1 for none, EMBEDDING before the first begins.
        inside: whether the next layer has begun.
        short: axes that hold only the positions from the first one on; the other sequence axes hold all.
    """

    after: int
    inside: bool
    short: tuple[int, ...]

    @property
    def through(self) -> int:
        """The last layer whose keys and values are needed to get here."""
        return self.after + 1 if self.inside else max(self.after, -1)


@dataclass(frozen=True)
class Continuation:
    """How a model goes on from an earlier forward, as proved at load.

    Attributes:
        layers: paths of the layers, in order.
        outputs: for every layer, how many values it returns; 0 where it returns a bare tensor.
        reaches: where every site lies that is right in such forwards.
        growing: whether rows may join between layers; else all start after the same layer.
        beside: whether rows that go on from one row attend to its keys and values without copies of their own.
        ending: how the last layer is computed at some positions alone; None where it is not.
    """

    layers: tuple[str, ...]
    outputs: tuple[int, ...]
    reaches: Mapping[str, Reach]
    growing: bool
    beside: bool
    ending: Ending | None = None


@dataclass(eq=False)
class Trunk:
    """What one forward leaves for others to go on from.

    Attributes:
        streams: the residual stream before the first layer and after each, ``[rows, seq, d_model]``.
        keys, values: of every layer's attention, ``[rows, kv_head, seq, d_head]``, by the model's own numbering.
    """

    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        parts = (*self.streams.values(), *self.keys.values(), *self.values.values())
        return sum(p.numel() * p.element_size() for p in parts)

    def rows(self, start: int, stop: int, seq: int) -> Trunk:
        """The part that belongs to some rows, of `seq` positions; in memory of its own unless it is all there is."""

        def part(value: torch.Tensor, axis: int) -> torch.Tensor:
            if value.shape[0] == stop - start and value.shape[axis] == seq:
                return value
            return value[start:stop].narrow(axis, 0, seq).clone()

        return Trunk(
            {n: part(v, 1) for n, v in self.streams.items()},
            {n: part(v, 2) for n, v in self.keys.items()},
            {n: part(v, 2) for n, v in self.values.items()},
        )

    @classmethod
    def stacked(cls, parts: Sequence[Trunk]) -> Trunk:
        """Several trunks of one length as one."""
        if len(parts) == 1:
            return parts[0]

        def together(name: str) -> dict[int, torch.Tensor]:
            shared = set.intersection(*(set(getattr(p, name)) for p in parts))
            return {n: torch.cat([getattr(p, name)[n] for p in parts]) for n in sorted(shared)}

        return cls(together("streams"), together("keys"), together("values"))


class _Kept(CacheLayerMixin):
    """The keys and values of one layer, kept whole."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class _Earlier(CacheLayerMixin):
    """One layer's keys and values before the first position, for whatever rows are there by then."""

    is_sliding = False

    def __init__(
        self,
        trunk: Trunk,
        layer: int,
        first: int,
        rows: torch.Tensor,
        one_row: int | None,
        beside: bool,
        halves: Halves,
    ) -> None:
        super().__init__()
        self._trunk, self._layer, self._first, self._rows = trunk, layer, first, rows
        self._one_row, self._beside, self._halves = one_row, beside, halves

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        halves = self._halves
        if halves.half is Half.REST:
            return halves.kept[self._layer]
        found = self._all(key_states, value_states)
        if halves.half is Half.KEYS:
            halves.kept[self._layer] = found
            raise Handed
        return found

    def _all(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all positions, or the later ones with a mark that names what comes before."""
        if self._first == 0:
            return key_states, value_states
        keys, values = self._trunk.keys[self._layer], self._trunk.values[self._layer]
        if self._one_row is not None:
            part = slice(self._one_row, self._one_row + 1)
            prefix = Prefix(keys[part, :, : self._first], values[part, :, : self._first])
            if self._beside and key_states.device.type == "cpu":
                return prefix.mark(key_states), value_states
            return prefix.before(key_states, value_states)
        rows = self._rows[: key_states.shape[0]]
        return (
            torch.cat([keys[rows, :, : self._first], key_states], dim=2),
            torch.cat([values[rows, :, : self._first], value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._first + (self._halves.skipped if self._halves.half is Half.REST else 0)

    def get_max_length(self) -> int:
        return -1


@contextmanager
def keeping(
    model: torch.nn.Module, layers: Sequence[str], trunk: Trunk, finished: Callable[[int], None] | None = None
) -> Iterator[dict[str, Any]]:
    """While the body runs, a plain forward given these further arguments leaves in `trunk` what others go on from.

    Args:
        model: the model.
        layers: paths of its layers.
        trunk: where to.
        finished: called with a layer's number once what it leaves has been taken.
    """
    cache = Cache(layer_class_to_replicate=_Kept)

    def take(layer: int, stream: torch.Tensor) -> None:
        trunk.streams[layer] = stream
        if layer < 0:
            return
        for number, kept in enumerate(cache.layers):
            if isinstance(kept, _Kept) and kept.keys is not None and kept.values is not None:
                trunk.keys[number], trunk.values[number] = kept.keys, kept.values
        if finished is not None:
            finished(layer)

    with watched_streams(model, layers, take):
        yield {"past_key_values": cache, "use_cache": True}


@contextmanager
def watched_streams(
    model: torch.nn.Module, layers: Sequence[str], take: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """While the body runs, `take` is given the residual stream before the first layer (as -1) and after each."""
    handles: list[Handle] = []

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        take(-1, next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)))

    def after(number: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            stream = first_tensor(output)
            assert stream is not None
            take(number, stream)

        return hook

    try:
        handles.append(model.get_submodule(layers[0]).register_forward_pre_hook(before, with_kwargs=True))
        for number, path in enumerate(layers):
            handles.append(model.get_submodule(path).register_forward_hook(after(number)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def places(model: torch.nn.Module, rows: int, first: int, stop: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What a forward that computes some positions must be told of them, as far as the model takes it.

    Args:
        model: the model.
        rows: how many rows there are.
        first, stop: the first position, and the one after the last.
        device: where to put it.
    """
    arguments = inspect.signature(model.forward).parameters
    at = torch.arange(first, stop, device=device)
    told = {}
    if "position_ids" in arguments:
        told["position_ids"] = at.unsqueeze(0).expand(rows, -1)
    if "cache_position" in arguments:
        told["cache_position"] = at
    return told


@contextmanager
def continuing(
    model: torch.nn.Module,
    how: Continuation,
    trunk: Trunk,
    tokens: torch.Tensor,
    first: int,
    rows: Sequence[int],
    after: Sequence[int],
    last: int | None = None,
) -> Iterator[dict[str, Any]]:
    """While the body runs, a forward given these arguments computes rows that go on from `trunk`.

    Args:
        model: the model.
        how: what was proved of it.
        trunk: what to go on from.
        tokens: the trunk's tokens, ``[rows, seq]``.
        first: the first position that is computed.
        rows: for every row, the trunk's row that it goes on from.
        after: for every row, the layer after which it starts, none smaller than the one before; EMBEDDING for all rows
            or for none.
        last: the first position that is needed of the last layer's output, where `how` has an ending; None for all.
    """
    device = tokens.device
    begins = after[0]
    picked = torch.tensor(rows, device=device)
    lead = picked if begins == EMBEDDING or not how.growing else picked[:1]
    one_row = rows[0] if len(set(rows)) == 1 else None
    numbers = max(trunk.keys, default=-1) + 1
    halves = Halves(0 if last is None else last - first)
    cache = Cache(
        layers=[
            _Earlier(trunk, n, first, picked, one_row, how.beside, halves) for n in range(max(numbers, len(how.layers)))
        ]
    )
    inputs: dict[str, Any] = {"input_ids": tokens[lead, first:], "past_key_values": cache, "use_cache": True}
    inputs |= places(model, lead.shape[0], first, tokens.shape[1], device)
    joining: dict[int, torch.Tensor] = {}
    for layer in sorted(set(after)):
        joining[layer] = picked[[i for i, a in enumerate(after) if a == layer]]

    def starting(layer: int) -> torch.Tensor:
        return trunk.streams[layer][joining[layer], first:]  # [rows that start here, positions, d_model]

    handles: list[Handle] = []
    bypassed: list[tuple[torch.nn.Module, Any]] = []

    def enter_first(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        if args:
            return (starting(-1), *args[1:]), kwargs
        place = next(k for k, v in kwargs.items() if isinstance(v, torch.Tensor))
        return args, {**kwargs, place: starting(-1)}

    def join(layer: int) -> Callable[[torch.nn.Module, Any, Any], Any]:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            del module, args
            there = first_tensor(output)
            assert there is not None
            return replace_first_tensor(output, torch.cat([there, starting(layer)]))

        return hook

    def bypass(layer: int) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            stream = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            stream = starting(layer) if layer == begins else stream
            return (stream, *([None] * (how.outputs[layer] - 1))) if how.outputs[layer] else stream

        return instead

    try:
        if begins == -1:
            opening = model.get_submodule(how.layers[0])
            handles.append(opening.register_forward_pre_hook(enter_first, with_kwargs=True))
        for number in range(begins + 1):
            module = model.get_submodule(how.layers[number])
            bypassed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = bypass(number)
        for number in joining:
            if number > begins:
                handles.append(model.get_submodule(how.layers[number]).register_forward_hook(join(number)))
        narrow = halves.skipped > 0 and how.ending is not None and begins < len(how.layers) - 1
        with ending(model, how.ending, halves) if narrow and how.ending is not None else nullcontext():
            yield inputs
    finally:
        for handle in handles:
            handle.remove()
        for module, before in bypassed:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
