"""What a map has done: windows that are open, the lanes' states on the server, and the file that says so.

After each window of rows the shards and the state file are written, in this order; what is then named by no state any
more is deleted from the server. A map that breaks off leaves nothing there but what its state file names.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patchbay.arrays import to_array
from patchbay.datasets.calls import to_its_end
from patchbay.datasets.shards import layout_of, stacked, write_shard
from patchbay.datasets.state import Lane, State, save_state
from patchbay.errors import ServiceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.artifacts import StoredArtifacts
    from patchbay.core import Outcome
    from patchbay.datasets.batching import Batch, Row
    from patchbay.datasets.plan import Plan
    from patchbay.datasets.template import Template
    from patchbay.ir.artifacts import ArtifactInfo

#: Windows that may be open at once: one being saved, one running, one being read.
_OPEN_WINDOWS = 3
#: How long the end of a map waits for what it kept to be deleted.
_LAST_CHORES_S = 10.0
#: A map that breaks off looks twice for what it left: a request that was just cancelled may still be writing.
_SWEEPS_S = (0.0, 0.1)
#: A state that takes more than so many seconds of work to write is written less often than after every window: so that
#: writing takes at most this share of the time.
_CHEAP_S, _SHARE = 0.05, 0.05


@dataclass
class Window:
    """Rows that are written together.

    Attributes:
        number: of the window, from 0.
        rows: its rows.
        data: digest of the data set up to its end.
        read: rows of the data set up to its end.
        left: batches that are not done.
        last_batch: number of the first batch behind it.
        values: for each collected value, arrays by the rows' numbers.
        kept: entries of values that stay on the server.
    """

    number: int
    rows: Sequence[Row]
    data: str
    read: int
    left: int
    last_batch: int
    values: dict[str, dict[int, NDArray[Any]]] = field(default_factory=dict)
    kept: list[Mapping[str, Any]] = field(default_factory=list)


class Ledger:
    """What a map has done.

    Args:
        plan: of the map.
        stored: artifacts of its connection.
        state: to go on from.
        template: any template of it.

    Attributes:
        state: what is written down, of windows that are done.
        ragged: values whose rows may differ in shape.
        values: values that stay in memory, in the data set's order: of rows, where these differ in shape, else of whole
            windows, [rows, ...].
    """

    def __init__(self, plan: Plan, stored: StoredArtifacts, state: State, template: Template) -> None:
        self._plan, self._stored = plan, stored
        self._collected = template.collected
        self.ragged = {leaf.name for leaf in template.collected if leaf.sequence or template.concrete}
        self._open: dict[int, Window] = {}
        self._slots = asyncio.Semaphore(_OPEN_WINDOWS)
        self._closing = asyncio.Lock()
        self._chores: set[asyncio.Future[None]] = set()
        #: For each lane its states and the windows whose batches they are of; those that no file names yet.
        self._history: list[list[tuple[int, Lane]]] = [
            [] if lane is None else [(state.windows - 1, lane)] for lane in state.lanes
        ]
        #: When the next state is written, and what can be deleted once it is.
        self._save_at = 0.0
        self._superseded: list[str] = []
        self.state = self._saved = state
        self.values: dict[str, list[NDArray[Any]]] = {}

    @property
    def tag(self) -> str:
        """Behind the names of what this map keeps on the server."""
        return f".{self.state.salt:014x}"

    # --- lanes --------------------------------------------------------------------------------------------------------

    def lane(self, number: int) -> Lane | None:
        """The newest state of a lane."""
        history = self._history[number]
        return history[-1][1] if history else None

    def move(self, number: int, batch: Batch, after: Lane) -> None:
        """A lane has folded a batch."""
        history = self._history[number]
        if history and history[-1][0] == batch.window:
            self._forget([history.pop()[1].digest])
        history.append((batch.window, after))

    # --- windows ------------------------------------------------------------------------------------------------------

    async def open(self, window: Window) -> None:
        """Waits until there is room for one more."""
        await self._slots.acquire()
        self._open[window.number] = window

    def take(self, batch: Batch, template: Template, outcome: Outcome, kept: Mapping[str, ArtifactInfo]) -> None:
        """Puts what came back to the batch's window, row by row."""
        window = self._open[batch.window]
        used: set[str] = set()
        for leaf in template.collected:
            if leaf.output in kept:
                info = kept[leaf.output]
                along = next(iter(leaf.sequence.values()), None)  # whose tokens it follows
                window.kept.append(
                    {
                        "name": leaf.name,
                        "digest": info.digest,
                        "shape": list(info.shape),
                        "dtype": info.dtype.name,
                        "rows": [row.number for row in batch.rows],
                        "lengths": [len(row.tokens if along is None else row.prompts[along]) for row in batch.rows],
                    }
                )
                continue
            whole = to_array(outcome.values[leaf.output].value)
            if leaf.output in used:
                whole = whole.copy()
            used.add(leaf.output)
            rows = window.values.setdefault(leaf.name, {})
            longest = {key: batch.seq_of(key) for key in leaf.sequence.values()}
            for i, row in enumerate(batch.rows):
                where: list[Any] = [i, *[slice(None)] * (whole.ndim - 1)]
                for axis, key in leaf.sequence.items():
                    where[axis] = slice(longest[key] - len(row.prompts[key]), None)
                rows[row.number] = whole[tuple(where)]

    async def done(self, batch: Batch) -> None:
        """A batch is done; writes down every window that is and has none open before it."""
        self._open[batch.window].left -= 1
        if self._open[batch.window].left:
            return
        async with self._closing:
            while self._open and (window := self._open[min(self._open)]).left == 0:
                await self._close(window)
                del self._open[window.number]
                self._slots.release()

    async def _close(self, window: Window) -> None:
        state = self.state
        lanes, dropped = [], []
        for history in self._history:
            done = [i for i, (number, _) in enumerate(history) if number <= window.number]
            lanes.append(history[done[-1]][1] if done else None)
            dropped += [entry.digest for _, entry in history[: done[-1]]] if done else []
            del history[: done[-1] if done else 0]
        shards = state.shards
        if self._plan.folder is not None and self._collected:
            values = {n: [by[row.number] for row in window.rows] for n, by in window.values.items()}
            layouts = {leaf.name: layout_of(leaf.sequence) for leaf in self._collected}
            entry = await to_its_end(write_shard, self._plan.folder, window.number, window.rows, values, layouts)
            shards = (*shards, entry)
        else:
            for name, by in window.values.items():
                rows = [by[row.number] for row in window.rows]
                # One array for a window where rows have one shape: a million small ones would be a lot of memory.
                self.values.setdefault(name, []).extend(rows if name in self.ragged else [stacked(rows)])
        self.state = replace(
            state,
            windows=window.number + 1,
            rows=window.read,
            batches=window.last_batch,
            data=window.data,
            lanes=tuple(lanes),
            shards=shards,
            kept=(*state.kept, *sorted(window.kept, key=lambda e: (e["rows"][0], e["name"]))),
        )
        self._superseded += dropped
        if time.monotonic() >= self._save_at:
            await self.save()

    async def complete(self, rows: int) -> None:
        """The data set is at its end."""
        self.state = replace(self.state, complete=True, total=rows)
        await self.save()

    async def save(self) -> None:
        """Writes the state file, if there is to be one."""
        if self._plan.resume is not None:
            seconds = await to_its_end(save_state, self._plan.resume, self.state)
            self._save_at = time.monotonic() + (seconds / _SHARE if seconds > _CHEAP_S else 0.0)
        self._saved = self.state
        superseded, self._superseded = self._superseded, []
        self._forget(superseded)

    # --- what stays on the server -------------------------------------------------------------------------------------

    def _forget(self, digests: Sequence[str]) -> None:
        """Begins to delete what nothing needs any more; what fails is left to expire."""

        async def delete(digest: str) -> None:
            with contextlib.suppress(ServiceError):
                await self._stored.delete(digest)

        for digest in digests:
            task = asyncio.ensure_future(delete(digest))
            self._chores.add(task)
            task.add_done_callback(self._chores.discard)

    async def tidy(self, *, broken: bool) -> None:
        """Deletes what this map left on the server and no state file names, and waits for it, but not for long.

        Args:
            broken: the map broke off, now or in an earlier call, so that there may be results of requests of which it
                never heard: they are known by their names.
        """
        # What could not be saved may be in the file all the same, or the state before it.
        needed = _named(self.state) | _named(self._saved)
        if self._plan.resume is None:
            needed = set() if broken else {str(entry["digest"]) for entry in self.state.kept}
        left = [*self._superseded, *(entry.digest for lane in self._history for _, entry in lane)]
        self._forget([digest for digest in left if digest not in needed])
        if broken:
            with contextlib.suppress(ServiceError, asyncio.TimeoutError):
                await asyncio.wait_for(self._sweep(needed), _LAST_CHORES_S)
        if self._chores:
            await asyncio.wait(self._chores, timeout=_LAST_CHORES_S)

    async def _sweep(self, needed: set[str]) -> None:
        for pause_s in _SWEEPS_S:
            await asyncio.sleep(pause_s)
            found = [handle.info for handle in await self._stored.list()]
            self._forget([i.digest for i in found if i.name.endswith(self.tag) and i.digest not in needed])
            if self._chores:
                await asyncio.wait(self._chores)


def _named(state: State) -> set[str]:
    """Digests of what a state names."""
    lanes = {lane.digest for lane in state.lanes if lane is not None}
    return lanes | {str(entry["digest"]) for entry in state.kept}
