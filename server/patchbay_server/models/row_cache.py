"""Keys and values of many generating rows in one place: rows come and go at every step, each with a length of its own.

Rows are aligned at their newest position, so that one step writes one column for all of them, whatever their lengths;
what a shorter row has before its beginning is masked. A row's positions lie side by side, as they do alone, so windows
over the latest positions are right too. Buffers grow by half, so a step does not copy what is already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from patchbay_server.models.continuation import Trunk

#: Columns that are made at least when the buffers grow.
_COLUMNS = 64
#: Rows that nobody owns are tolerated up to this share before the others are moved together.
_DEAD = 0.25


@dataclass(eq=False)
class Seat:
    """Neighbouring rows of a `RowCache` that belong to one run.

    Attributes:
        start: the first.
        lengths: positions of each that are there.
        stepped: whether the step under way has been made for them.
    """

    start: int
    lengths: list[int]
    stepped: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.lengths)

    @property
    def stop(self) -> int:
        """Behind the last."""
        return self.start + len(self.lengths)


@dataclass(frozen=True, eq=False)
class Known:
    """How every row of a forward begins, as an earlier one computed it.

    Attributes:
        trunk: what that forward left.
        row: its row.
        length: positions that are the same.
    """

    trunk: Trunk
    row: int
    length: int

    def before(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all positions, from those of the later ones, ``[rows, kv_head, later, d_head]``."""

        def whole(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
            part = earlier[self.row : self.row + 1, :, : self.length]
            return torch.cat([part.expand(later.shape[0], -1, -1, -1), later], dim=2)

        return whole(self.trunk.keys[layer], keys), whole(self.trunk.values[layer], values)


class PromptCache(Cache):  # type: ignore[misc]
    """Given to a forward over prompts, it leaves keys and values of some of its rows in their seats.

    Args:
        takers: pairs of the first row in the forward, the cache, and the seat there that the rows go to.
        known: how all rows begin, where the forward computes only what comes after that.
        leaving: rows of which keys and values are kept for later prompts: the row, its length, and where to.
    """

    def __init__(
        self,
        takers: Sequence[tuple[int, RowCache, Seat]],
        known: Known | None = None,
        leaving: Sequence[tuple[int, int, Trunk]] = (),
    ) -> None:
        super().__init__(layers=[])
        self._takers, self._known, self._leaving = takers, known, leaving
        self._length = 0 if known is None else known.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rows' parts; the forward goes on with all that there is."""
        del args, kwargs
        if self._known is not None:
            key_states, value_states = self._known.before(layer_idx, key_states, value_states)
        for row, length, trunk in self._leaving:
            trunk.keys[layer_idx] = key_states[row : row + 1, :, :length].clone()
            trunk.values[layer_idx] = value_states[row : row + 1, :, :length].clone()
        for first, cache, seat in self._takers:
            cache.keep(layer_idx, seat, key_states[first : first + seat.rows], value_states[first : first + seat.rows])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that are not computed."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All keys, the first of them at 0."""
        return self._length + query_length, 0


class RowCache(Cache):  # type: ignore[misc]
    """The cache of one batch of rows.

    Attributes:
        seats: who is in it.
        copied: elements moved so far, for whoever wants to see that steps do not copy.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seats: list[Seat] = []
        self.copied = 0
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [rows, kv_head, columns, d_head] each
        self._rows = self._columns = 0
        self._end = 0  # the column of the next position
        self._now = slice(0, 0)  # rows of the forward under way
        self._visible = 0  # columns before `_end` that it sees

    # --- who is in it

    @property
    def used(self) -> int:
        """Rows up to the last that somebody owns."""
        return max((seat.stop for seat in self.seats), default=0)

    def admit(self, lengths: Sequence[int]) -> Seat:
        """Neighbouring rows for prompts of these lengths; `PromptCache` fills them."""
        if not self.seats:
            self._end = 0
        start = self._place(len(lengths))
        seat = Seat(start, list(lengths))
        rows = self._rows
        while rows < seat.stop:
            rows = max(1, 2 * rows)
        if rows > self._rows or max(lengths) > self._end:
            self._lay_out(rows, max(self._end, *lengths))
        for keys, values in self._buffers.values():
            keys[seat.start : seat.stop].zero_()  # whatever was there before is not even multiplied by zero
            values[seat.start : seat.stop].zero_()
        self.seats.append(seat)
        return seat

    def leave(self, seat: Seat) -> None:
        """Give rows back; the last to leave gives the memory back too. Idempotent."""
        if seat not in self.seats:
            return
        self.seats.remove(seat)
        self._stepped()
        if not self.seats:
            self._buffers.clear()
            self._rows = self._columns = 0

    def _place(self, rows: int) -> int:
        """The first row of the first gap that is wide enough."""
        at = 0
        for seat in sorted(self.seats, key=lambda seat: seat.start):
            if seat.start - at >= rows:
                return at
            at = seat.stop
        return at

    # --- steps

    def begin(self, seats: Sequence[Seat]) -> tuple[list[int], torch.Tensor, torch.Tensor | None]:
        """Prepare the next step of some seats: of all, or of one.

        Returns:
            the first row of each seat in the forward; int64 positions ``[rows, 1]``; and bool ``[rows, keys]``, what
            each row sees, or None where each sees everything. Both tensors are on the host.
        """
        if not any(seat.stepped for seat in self.seats):
            self._tidy()
            if self._end == self._columns:
                self._lay_out(self._rows, self._longest())
        assert len(seats) in (1, len(self.seats))
        # Whoever is alone in a forward takes all of its rows for its own: none of those that left may be among them.
        self._now = slice(0, self.used) if len(seats) > 1 else slice(seats[0].start, seats[0].stop)
        self._visible = max(max(seat.lengths) for seat in seats)
        lengths = torch.zeros(self._now.stop - self._now.start, dtype=torch.long)
        starts = [seat.start - self._now.start for seat in seats]
        for start, seat in zip(starts, seats, strict=True):
            lengths[start : start + seat.rows] = torch.tensor(seat.lengths)
        seen = None
        if bool((lengths != self._visible).any()):
            seen = torch.arange(self._visible + 1)[None] >= self._visible - lengths[:, None]
        return starts, lengths[:, None], seen

    def end(self, seats: Sequence[Seat]) -> None:
        """The step was made for these; when it was made for all, the next can begin."""
        for seat in seats:
            seat.lengths = [length + 1 for length in seat.lengths]
            seat.stepped = True
        self._stepped()

    def _stepped(self) -> None:
        if self.seats and all(seat.stepped for seat in self.seats):
            self._end += 1
            for seat in self.seats:
                seat.stepped = False

    # --- what models ask of a cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the newest position; returns all that is seen, ``[rows, kv_head, keys, d_head]``, without copying it."""
        del args, kwargs
        keys, values = self._buffers[layer_idx]
        keys[self._now, :, self._end] = key_states[:, :, 0]
        values[self._now, :, self._end] = value_states[:, :, 0]
        span = slice(self._end - self._visible, self._end + 1)
        return keys[self._now, :, span], values[self._now, :, span]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys before the newest."""
        return self._visible

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All keys, the first of them at 0."""
        return self._visible + query_length, 0

    # --- where things lie

    def keep(self, layer: int, seat: Seat, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take a prompt's keys and values of one layer, ``[rows, kv_head, seq, d_head]``, padded on the right."""
        if layer not in self._buffers:
            self._buffers[layer] = tuple(  # type: ignore[assignment]
                part.new_zeros(self._rows, part.shape[1], self._columns, part.shape[3]) for part in (keys, values)
            )
        for held, part in zip(self._buffers[layer], (keys, values), strict=True):
            for row, length in enumerate(seat.lengths):
                held[seat.start + row, :, self._end - length : self._end] = part[row, :, :length]

    def _longest(self) -> int:
        return max((max(seat.lengths) for seat in self.seats), default=0)

    def _lay_out(self, rows: int, end: int) -> None:
        """New buffers in which the next position comes at `end`."""
        kept, old_end = self._longest(), self._end
        self._rows, self._end = rows, end
        self._columns = end + max(_COLUMNS, end // 2)
        for layer, parts in self._buffers.items():
            new = []
            for old in parts:
                buffer = old.new_zeros(rows, old.shape[1], self._columns, old.shape[3])
                buffer[: old.shape[0], :, end - kept : end] = old[:, :, old_end - kept : old_end]
                self.copied += old.shape[0] * old.shape[1] * kept * old.shape[3]
                new.append(buffer)
            self._buffers[layer] = (new[0], new[1])

    def _tidy(self) -> None:
        """Move the last rows into gaps that those who left have made, so that few rows are computed for nobody."""
        while (gap := self._gap()) is not None:
            at, size = gap
            movable = [seat for seat in self.seats if seat.start > at and seat.rows <= size]
            if not movable:
                break
            self._move(max(movable, key=lambda seat: seat.start), at)
        if self.used - sum(seat.rows for seat in self.seats) > _DEAD * self.used:
            at = 0
            for seat in sorted(self.seats, key=lambda seat: seat.start):
                if seat.start != at:
                    self._move(seat, at)
                at = seat.stop

    def _gap(self) -> tuple[int, int] | None:
        """The first run of rows that nobody owns, before somebody's: where it begins and how long it is."""
        at = 0
        for seat in sorted(self.seats, key=lambda seat: seat.start):
            if seat.start > at:
                return at, seat.start - at
            at = seat.stop
        return None

    def _move(self, seat: Seat, at: int) -> None:
        for parts in self._buffers.values():
            for buffer in parts:
                moved = buffer[seat.start : seat.stop, :, : self._end].clone()
                buffer[at : at + seat.rows, :, : self._end] = moved
                self.copied += moved.numel()
        seat.start = at
