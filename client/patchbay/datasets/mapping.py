"""Drives a map: reads windows of rows, sends batches in a few lanes, outlives failures, keeps what is to be kept.

Each lane is a chain of batches: a batch's graph takes the lane's state so far and leaves the next one on the server.
Batch i belongs to lane i modulo the number of lanes, and each lane keeps its order, so that the numbers do not depend
on which answer comes first. After each window of rows the shards and the state file are written; a run that breaks off
goes on behind the last of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.datasets.batching import Batch, Item, Row, Source, batches_of
from patchbay.datasets.calls import Host, Patience, to_its_end
from patchbay.datasets.progress import MapProgress
from patchbay.datasets.results import MapResults, summed
from patchbay.datasets.shards import Shards, joined, layout_of, write_index, write_shard
from patchbay.datasets.state import (
    Lane,
    State,
    check_rows,
    check_same,
    graph_digest,
    load_state,
    save_state,
)
from patchbay.datasets.template import STATE, Collected, Reduced, Template, Tracer, merged_graph
from patchbay.errors import GraphError, NotFoundError, ProtocolError, ServiceError, TraceError
from patchbay.inputs import Text
from patchbay.ir.events import Event, ExecuteOptions, Kept
from patchbay.results import RunUsage, map_tree
from patchbay.tokens import Tokens
from patchbay.tracing.arrays import to_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.core import ModelCore, Outcome
    from patchbay.ir.artifacts import ArtifactInfo
    from patchbay.ir.graph import Graph
    from patchbay.model import Edit

DEFAULT_BATCH = 32
DEFAULT_MAX_TOKENS = 16_384
DEFAULT_LANES = 4
#: Windows that may be open at once: one being saved, one running, one being read.
_OPEN_WINDOWS = 3
_TEMPLATES = 256
#: How long the end of a map waits for what it kept to be deleted.
_LAST_CHORES_S = 10.0


@dataclass(frozen=True)
class Plan:
    """How a map is to be done; see `Model.map`."""

    batch: int = DEFAULT_BATCH
    max_tokens: int = DEFAULT_MAX_TOKENS
    window: int | None = None
    lanes: int = DEFAULT_LANES
    prepend_bos: bool | None = None
    to: Path | None = None
    keep: bool = False
    resume: Path | None = None
    options: ExecuteOptions = field(default_factory=ExecuteOptions)
    timeout_s: float | None = None
    patience_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("batch", "max_tokens", "lanes", "rows_of_window"):
            if getattr(self, name) < 1:
                raise TraceError(f"map: {name} is at least 1, not {getattr(self, name)}")
        if self.keep and self.to is not None:
            raise TraceError("map: values stay on the server (keep=True) or are written to a folder (to=...), not both")

    @property
    def rows_of_window(self) -> int:
        return 8 * self.batch if self.window is None else self.window

    @property
    def folder(self) -> Path | None:
        """Where values of rows are written: they outlive the process where the map is to."""
        if self.to is not None or self.keep or self.resume is None:
            return self.to
        return self.resume.with_name(self.resume.name + ".values")

    @property
    def settings(self) -> dict[str, Any]:
        """What batches and lanes depend on, for the state file."""
        return {
            "batch": self.batch,
            "max_tokens": self.max_tokens,
            "window": self.rows_of_window,
            "lanes": self.lanes,
            "prepend_bos": self.prepend_bos,
            "to": None if self.to is None else str(self.to),
            "keep": self.keep,
        }


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


class Mapper:
    """One map, from the first row to the results.

    Args:
        core: the model.
        edits: of the model.
        dataset: what yields rows.
        function: makes values and reductions of a run.
        plan: how.
        host: calls the user's code.
        notify: is told of progress.
        tokens_of: tokens of a text by itself, where the function needs them.
    """

    def __init__(
        self,
        core: ModelCore,
        edits: Sequence[Edit],
        dataset: Any,
        function: Callable[[Any], Any],
        plan: Plan,
        host: Host,
        notify: Callable[[MapProgress], Any],
        tokens_of: Callable[[str], Tokens],
    ) -> None:
        if isinstance(dataset, (str, bytes, Mapping)) or not (
            hasattr(dataset, "__iter__") or hasattr(dataset, "__aiter__") or hasattr(dataset, "__getitem__")
        ):
            raise TraceError(
                f"map takes a data set of many rows (a list of texts, a generator, ...), not {type(dataset).__name__}"
            )
        needed = [spec.name for spec in core.card.inputs if spec.required]
        if core.card.takes_tokens and needed:
            raise TraceError(f"map feeds tokens alone, and {core.card.name!r} needs {', '.join(needed)} beside them")
        self._core = core
        self._plan = plan
        self._host = host
        self._notify = notify
        self._tracer = Tracer(core, edits, function, tokens_of)
        self._rows = _Rows(dataset, plan.rows_of_window, host)
        names = None if core.card.takes_tokens else [spec.name for spec in core.card.inputs]
        self._source = Source(plan.prepend_bos, names)
        self._total = len(dataset) if hasattr(dataset, "__len__") else None
        self._found: State | None = None
        self._behind: list[Any] = []
        self._templates: OrderedDict[tuple[int, int, bool], Template] = OrderedDict()
        self._begun = time.monotonic()
        self._open: dict[int, Window] = {}
        self._values: dict[str, list[NDArray[Any]]] = {}
        self._history: list[list[tuple[int, Lane]]] = [[] for _ in range(plan.lanes)]
        self._usage = RunUsage()
        self._rows_done = self._batches_done = self._tokens_done = 0
        self._patience = Patience(plan.patience_s, self._show)
        self._slots = asyncio.Semaphore(_OPEN_WINDOWS)
        self._closing = asyncio.Lock()
        self._tracing = asyncio.Lock()
        self._traffic = (0, 0)
        self._chores: set[asyncio.Future[None]] = set()

    # --- the whole ------------------------------------------------------------------------------------------------

    async def run(self) -> MapResults:
        """Does it all.

        Raises:
            TraceError: the data set, the function or the state file cannot be used; see `Model.map`.
            GraphError, ServiceError: as for a trace.
        """
        self._traffic = await self._core.traffic()
        self._found = None if self._plan.resume is None else await asyncio.to_thread(load_state, self._plan.resume)
        items = await self._next()
        if not items:
            raise TraceError("the data set is empty: there is nothing to compute")
        rows = await self._tokenized(items)
        batches = self._batches(rows, 0, 0)
        first = await self._traced(batches[0], begins=True)
        self._first = first
        self._state = self._begin(first)
        for lane, entry in enumerate(self._state.lanes):
            if entry is not None:
                self._history[lane].append((self._state.windows - 1, entry))
        try:
            if not self._state.complete:
                await self._all_windows(rows, batches)
            else:
                await self._skip(1)
                await self._nothing_left()
            return await self._results(first)
        finally:
            if self._plan.resume is None:
                self._forget([entry.digest for lane in self._history for _, entry in lane])
            if self._chores:
                await asyncio.wait(self._chores, timeout=_LAST_CHORES_S)

    def _begin(self, template: Template) -> State:
        """The state to go on from."""
        card = self._core.card
        fresh = State(
            card.name,
            card.revision,
            graph_digest(template),
            self._plan.settings,
            secrets.randbits(52),
            total=self._total,
            lanes=(None,) * self._plan.lanes,
        )
        if self._found is None:
            return fresh
        assert self._plan.resume is not None
        check_same(self._plan.resume, self._found, fresh)
        return self._found

    async def _all_windows(self, rows: list[Row], batches: list[Batch]) -> None:
        """Feeds the lanes until the data set ends."""
        queues: list[asyncio.Queue[Batch | None]] = [asyncio.Queue(1) for _ in range(self._plan.lanes)]
        tasks = [asyncio.ensure_future(self._lane(i, queue)) for i, queue in enumerate(queues)]
        tasks.append(asyncio.ensure_future(self._feed(rows, batches, queues)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._state = replace(self._state, complete=True, total=self._source.read)
        if self._plan.resume is not None:
            await to_its_end(save_state, self._plan.resume, self._state)

    async def _feed(self, rows: list[Row], batches: list[Batch], queues: list[asyncio.Queue[Batch | None]]) -> None:
        number, next_batch = 0, 0
        if self._state.windows:
            await self._skip(1)
            number, next_batch = self._state.windows, self._state.batches
            rows, batches = await self._read(number, next_batch)
        while rows:
            await self._slots.acquire()
            next_batch += len(batches)
            source = self._source
            self._open[number] = Window(number, rows, source.digest, source.read, len(batches), next_batch)
            for batch in batches:
                await queues[batch.number % len(queues)].put(batch)
            number += 1
            rows, batches = await self._read(number, next_batch)
        for queue in queues:
            await queue.put(None)

    async def _skip(self, windows: int) -> None:
        """Reads on to the end of the windows that are done, `windows` of which were read, and checks the rows."""
        for _ in range(windows, self._state.windows):
            await self._next()
        assert self._plan.resume is not None
        check_rows(self._plan.resume, self._state, self._source.digest, self._source.read)
        self._rows_done, self._batches_done = self._state.rows, self._state.batches
        self._show()

    async def _nothing_left(self) -> None:
        if self._behind or await self._rows.next_window():
            raise TraceError(
                f"{self._plan.resume} belongs to a map over {self._state.rows:,} rows, and the data set goes on behind"
                " them: delete the file to begin anew"
            )

    async def _next(self) -> list[Item]:
        """The next window of rows; those behind the end of a map that was complete are put aside."""
        given = await self._rows.next_window()
        if self._found is not None and self._found.complete:
            room = self._found.rows - self._source.read
            given, self._behind = given[:room], given[room:]
        return self._source.take(given)

    async def _read(self, window: int, first_batch: int) -> tuple[list[Row], list[Batch]]:
        items = await self._next()
        rows = await self._tokenized(items)
        return rows, self._batches(rows, first_batch, window)

    def _batches(self, rows: Sequence[Row], first: int, window: int) -> list[Batch]:
        most = min(self._plan.max_tokens, self._core.card.limits.max_tokens)
        return batches_of(rows, first, window, min(self._plan.batch, self._core.card.limits.max_rows), most)

    async def _tokenized(self, items: Sequence[Item]) -> list[Row]:
        texts = [item.prompt for item in items if isinstance(item.prompt, Text)]
        tokens = iter(await self._patience.call(lambda: self._core.tokenize(texts)) if texts else ())
        rows = []
        for item in items:
            found = item.prompt if isinstance(item.prompt, Tokens) else next(tokens)
            if self._core.card.takes_tokens:
                self._core.check_row(found, f"row {item.number} of the data set")
            rows.append(Row(item.number, found, item.fields, item.inputs))
        return rows

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def _lane(self, lane: int, queue: asyncio.Queue[Batch | None]) -> None:
        before = self._history[lane][-1][1] if self._history[lane] else None
        while (batch := await queue.get()) is not None:
            before = await self._one(lane, batch, before)

    async def _one(self, lane: int, batch: Batch, before: Lane | None) -> Lane | None:
        """Runs a batch; returns the lane's state behind it."""
        import numpy as np

        folded = 0 if before is None else before.batches
        header = np.array([self._state.salt, lane, folded + 1], dtype=np.float64)
        state = None if before is None else _constant(before)
        template = await self._traced(batch, begins=before is None)
        try:
            outcome, kept = await self._execute(template, template.fill(batch, header, state))
        except NotFoundError as error:
            gone = error.metadata.get("digest")
            if before is not None and gone == before.digest:
                raise _lost(error) from None
            if gone not in template.uploaded:
                raise self._core.stored.explain(error, template.graph) from None
            # A large constant of the function's has expired or given way to others: trace it anew, and send it again.
            self._templates.clear()
            template = await self._traced(batch, begins=before is None, again=True)
            outcome, kept = await self._execute(template, template.fill(batch, header, state))
        after = before
        if template.reductions:
            info = kept[STATE]
            after = Lane(folded + 1, info.digest, info.shape[0])
            history = self._history[lane]
            if history and history[-1][0] == batch.window and before is not None:
                self._forget([history.pop()[1].digest])
            history.append((batch.window, after))
        self._take(batch, template, outcome, kept)
        self._usage = summed(self._usage, RunUsage.of(outcome.usage))
        self._rows_done += len(batch.rows)
        self._batches_done += 1
        self._tokens_done += sum(len(row.tokens) for row in batch.rows)
        self._show()
        window = self._open[batch.window]
        window.left -= 1
        if window.left == 0:
            await self._close_windows()
        return after

    async def _traced(self, batch: Batch, *, begins: bool, again: bool = False) -> Template:
        """The template for a batch, its large constants on the server and out of this process's memory."""
        key = (*batch.shape, begins)
        async with self._tracing:  # lanes that meet a new shape at the same time trace it once
            found = self._templates.get(key)
            if found is None:
                found = await self._host(self._tracer.trace, batch, begins, self._plan.keep)
                stored, card = self._core.stored, self._core.card
                graph = found.graph
                named = await self._patience.call(lambda: stored.named(graph, card.name, card.limits, again=again))
                found = found.lightened(named)
                if not found.concrete:
                    self._templates[key] = found
                    while len(self._templates) > _TEMPLATES:
                        self._templates.popitem(last=False)
            else:
                self._templates.move_to_end(key)
        return found

    async def _execute(self, template: Template, graph: Graph) -> tuple[Outcome, dict[str, ArtifactInfo]]:
        kept: dict[str, ArtifactInfo] = {}

        def note(event: Event) -> None:
            if isinstance(event, Kept):
                kept[event.name] = event.artifact

        def send() -> Awaitable[Outcome]:
            kept.clear()
            return self._core.execute(graph, self._plan.options, self._plan.timeout_s, note)

        try:
            outcome = await self._patience.call(send)
        except GraphError as error:
            raise template.locate(error) from None
        missing = [o.name for o in graph.outputs if o.name not in (kept if o.keep else outcome.values)]
        if missing:
            raise ProtocolError(f"the server did not send {missing[0]!r}")
        return outcome, kept

    def _take(self, batch: Batch, template: Template, outcome: Outcome, kept: Mapping[str, ArtifactInfo]) -> None:
        """Puts what came back to the batch's window, row by row."""
        window = self._open[batch.window]
        used: set[str] = set()
        for leaf in template.collected:
            if leaf.output in kept:
                info = kept[leaf.output]
                window.kept.append(
                    {
                        "name": leaf.name,
                        "digest": info.digest,
                        "shape": list(info.shape),
                        "dtype": info.dtype.name,
                        "rows": [row.number for row in batch.rows],
                        "lengths": [len(row.tokens) for row in batch.rows],
                    }
                )
                continue
            whole = to_array(outcome.values[leaf.output].value)
            if leaf.output in used:
                whole = whole.copy()
            used.add(leaf.output)
            rows = window.values.setdefault(leaf.name, {})
            for i, row in enumerate(batch.rows):
                tokens = slice(batch.seq - len(row.tokens), None)
                axes = range(1, whole.ndim)
                where: tuple[Any, ...] = (i, *(tokens if a in leaf.sequence else slice(None) for a in axes))
                rows[row.number] = whole[where]

    # --- windows ----------------------------------------------------------------------------------------------------

    async def _close_windows(self) -> None:
        """Writes down every window that is done and has none open before it."""
        async with self._closing:
            while self._open and (window := self._open[min(self._open)]).left == 0:
                await self._close(window)
                del self._open[window.number]
                self._slots.release()

    async def _close(self, window: Window) -> None:
        state = self._state
        lanes, dropped = [], []
        for history in self._history:
            done = [i for i, (number, _) in enumerate(history) if number <= window.number]
            lanes.append(history[done[-1]][1] if done else None)
            dropped += [entry.digest for _, entry in history[: done[-1]]] if done else []
            del history[: done[-1] if done else 0]
        shards = state.shards
        template = self._first
        if self._plan.folder is not None and template.collected:
            values = {n: [by[row.number] for row in window.rows] for n, by in window.values.items()}
            layouts = {leaf.name: layout_of(leaf.sequence) for leaf in template.collected}
            entry = await to_its_end(write_shard, self._plan.folder, window.number, window.rows, values, layouts)
            shards = (*shards, entry)
        else:
            for name, by in window.values.items():
                self._values.setdefault(name, []).extend(by[row.number] for row in window.rows)
        self._state = replace(
            state,
            windows=window.number + 1,
            rows=window.read,
            batches=window.last_batch,
            data=window.data,
            lanes=tuple(lanes),
            shards=shards,
            kept=(*state.kept, *sorted(window.kept, key=lambda e: (e["rows"][0], e["name"]))),
        )
        if self._plan.resume is not None:
            await to_its_end(save_state, self._plan.resume, self._state)
        self._forget(dropped)

    def _forget(self, digests: Sequence[str]) -> None:
        """Begins to delete states that nothing needs any more; what fails is left to expire."""

        async def delete(digest: str) -> None:
            with contextlib.suppress(ServiceError):
                await self._core.stored.delete(digest)

        for digest in digests:
            task = asyncio.ensure_future(delete(digest))
            self._chores.add(task)
            task.add_done_callback(self._chores.discard)

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _results(self, first: Template) -> MapResults:
        arrays = await self._finished(first)
        values = await asyncio.to_thread(self._collected, first)
        made = {
            i: reduction.result({name: array for (j, name), array in arrays.items() if j == i})
            for i, reduction in enumerate(first.reductions)
        }

        def leaf_of(leaf: object, path: tuple[str, ...]) -> object:
            del path
            if isinstance(leaf, Reduced):
                return made[leaf.index]
            return values[leaf.name] if isinstance(leaf, Collected) else leaf

        tree = map_tree(first.tree, leaf_of)
        results = MapResults(tree, (), self._usage)
        sent, received = await self._core.traffic()
        results.rows, results.batches = self._state.rows, self._state.batches
        results.retries = self._patience.retries
        results.sent_bytes, results.received_bytes = sent - self._traffic[0], received - self._traffic[1]
        return results

    async def _finished(self, template: Template) -> dict[tuple[int, str], NDArray[Any]]:
        """The reductions' arrays: the lanes' states merged on the server."""
        lanes = [lane for lane in self._state.lanes if lane is not None]
        if not lanes:
            return {}
        graph, wanted = merged_graph(self._core, template, [_constant(lane) for lane in lanes])
        try:
            outcome = await self._patience.call(
                lambda: self._core.execute(graph, ExecuteOptions(), self._plan.timeout_s)
            )
        except NotFoundError as error:
            raise _lost(error) from None
        return {(i, name): to_array(outcome.values[output].value) for i, name, output in wanted}

    def _collected(self, template: Template) -> dict[str, Any]:
        """Values of rows: in memory, in a folder, or on the server."""
        if not template.collected:
            return {}
        if self._plan.keep:
            return {leaf.name: self._handles(leaf) for leaf in template.collected}
        folder = self._plan.folder
        if folder is None:
            return {name: joined(arrays) for name, arrays in self._values.items()}
        about = {
            "model": self._core.card.name,
            "revision": self._core.card.revision,
            "values": {
                leaf.name: {"layout": layout_of(leaf.sequence), "sequence_axes": list(leaf.sequence)}
                for leaf in template.collected
            },
        }
        write_index(folder, about, self._state.shards)
        shards = Shards(folder)
        if self._plan.to is not None:
            return {leaf.name: shards for leaf in template.collected}
        return {leaf.name: shards.value(leaf.name) for leaf in template.collected}

    def _handles(self, leaf: Collected) -> list[Any]:
        from patchbay.datasets.results import KeptRows
        from patchbay.ir.artifacts import ArtifactInfo
        from patchbay.ir.dtypes import DTYPES
        from patchbay.tracing.artifacts import Artifact

        handles = []
        for entry in (e for e in self._state.kept if e["name"] == leaf.name):
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            info = ArtifactInfo(entry["digest"], dtype, shape, math.prod(shape) * dtype.itemsize, leaf.name)
            rows, lengths = tuple(entry["rows"]), tuple(entry["lengths"])
            handles.append(KeptRows(Artifact(info, self._core.stored), rows, lengths))
        return handles

    def _show(self) -> None:
        self._notify(
            MapProgress(
                self._rows_done,
                self._total,
                self._batches_done,
                self._tokens_done,
                time.monotonic() - self._begun,
                self._patience.retries,
                self._patience.waiting,
                self._usage.bytes_out,
            )
        )


class _Rows:
    """Takes windows of rows from whatever yields them: in the user's thread, or awaited where it is asynchronous."""

    def __init__(self, dataset: Any, window: int, host: Host) -> None:
        self._awaited: AsyncIterator[Any] | None = dataset.__aiter__() if hasattr(dataset, "__aiter__") else None
        self._iterator = iter(()) if self._awaited is not None else iter(dataset)
        self._window = window
        self._host = host

    async def next_window(self) -> list[Any]:
        """The next rows; fewer, or none, at the end."""
        if self._awaited is None:
            return await self._host(_taken, self._iterator, self._window)  # type: ignore[no-any-return]
        found: list[Any] = []
        while len(found) < self._window:
            try:
                found.append(await self._awaited.__anext__())
            except StopAsyncIteration:
                break
        return found


def _taken(iterator: Iterator[Any], count: int) -> list[Any]:
    return list(islice(iterator, count))


def _constant(lane: Lane) -> dict[str, Any]:
    """Attributes of the constant that is a lane's state."""
    return {"artifact": lane.digest, "shape": (lane.size,), "dtype": "float64"}


def _lost(error: NotFoundError) -> TraceError:
    return TraceError(
        "the server has lost what the map had reduced so far (its artifacts expire, and are deleted when a quota is"
        f" full): begin anew, without the state file. The server says: {error.message}"
    )
