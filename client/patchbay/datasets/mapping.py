"""Drives a map: feeds windows of rows to a few lanes, sends their batches, outlives failures.

Each lane is a chain of batches: a batch's graph takes the lane's state so far and leaves the next one on the server.
Batch i belongs to lane i modulo the number of lanes, and each lane keeps its order, so that the numbers do not depend
on which answer comes first. A run that breaks off goes on behind the last window that was written down
(`patchbay.datasets.ledger`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from patchbay.datasets.batch_trace import UntoldError
from patchbay.datasets.batching import Batch, Row
from patchbay.datasets.calls import Host, Patience
from patchbay.datasets.finishing import Finish, constant
from patchbay.datasets.ledger import Ledger, Window
from patchbay.datasets.plan import Plan
from patchbay.datasets.progress import MapProgress
from patchbay.datasets.reading import Reader
from patchbay.datasets.results import MapResults, summed
from patchbay.datasets.shards import begin_folder
from patchbay.datasets.state import Lane, State, check_rows, check_same, graph_digest, load_state, lost
from patchbay.datasets.template import STATE, Template, Tracer
from patchbay.errors import GraphError, NotFoundError, ProtocolError, TraceError
from patchbay.inputs import Text
from patchbay.ir.events import Event, Kept
from patchbay.results import RunUsage

if TYPE_CHECKING:
    from patchbay.core import ModelCore, Outcome
    from patchbay.ir.artifacts import ArtifactInfo
    from patchbay.ir.graph import Graph
    from patchbay.model import Edit

_TEMPLATES = 256


class Mapper:
    """One map, from the first row to the results.

    Args:
        core: the model.
        edits: of the model.
        dataset: what yields rows.
        function: makes values and reductions of a run, or of a trace and its rows.
        with_rows: whether it takes the latter.
        plan: how.
        host: calls the user's code.
        notify: is told of progress.

    Raises:
        TraceError: the data set is none.
    """

    def __init__(
        self,
        core: ModelCore,
        edits: Sequence[Edit],
        dataset: Any,
        function: Callable[..., Any],
        with_rows: bool,
        plan: Plan,
        host: Host,
        notify: Callable[[MapProgress], Any],
    ) -> None:
        self._core = core
        self._plan = plan
        self._host = host
        self._notify = notify
        self._patience = Patience(plan.patience_s, self._show)
        self._tracer = Tracer(core, edits, function, with_rows)
        self._reader = Reader(core, dataset, plan, host, self._patience)
        self._templates: OrderedDict[tuple[Any, ...], Template] = OrderedDict()
        self._begun = time.monotonic()
        self._usage = RunUsage()
        self._rows_done = self._batches_done = self._tokens_done = 0
        self._rows_before = 0
        self._tracing = asyncio.Lock()
        self._ledger: Ledger
        #: The first window and its batches, until the lanes are fed.
        self._ahead: tuple[list[Row], list[Batch]] = ([], [])

    # --- the whole ------------------------------------------------------------------------------------------------

    async def run(self) -> MapResults:
        """Does it all.

        Raises:
            TraceError: the data set, the function or the state file cannot be used; see `Model.map`.
            GraphError, ServiceError: as for a trace.
        """
        traffic = await self._core.traffic()
        found = None if self._plan.resume is None else await asyncio.to_thread(load_state, self._plan.resume)
        if found is not None and found.complete:
            self._reader.ends_at(found.rows)
        first = await self._first()
        state = self._begin(found, first)
        self._ledger = ledger = Ledger(self._plan, self._core.stored, state, first)
        broken = True
        try:
            if state.complete:
                await self._skip(1)
                if await self._reader.goes_on():
                    raise TraceError(
                        f"{self._plan.resume} belongs to a map over {state.rows:,} rows, and the data set goes on"
                        " behind them: delete the file to begin anew"
                    )
            else:
                if self._plan.folder is not None and first.collected:
                    await asyncio.to_thread(begin_folder, self._plan.folder, state.shards)
                if found is not None:
                    await ledger.tidy(broken=True)
                await ledger.save()  # from now on a later call knows what is ours
                await self._all_windows()
            tree = await Finish(self._core, self._plan, ledger, first, self._patience).tree()
            broken = False
        finally:
            await ledger.tidy(broken=broken)
        results = MapResults(tree, (), self._usage)
        sent, received = await self._core.traffic()
        results.rows, results.batches = ledger.state.rows, ledger.state.batches
        results.retries = self._patience.retries
        results.sent_bytes, results.received_bytes = sent - traffic[0], received - traffic[1]
        return results

    async def _first(self) -> Template:
        """Reads the first window; the template of its first batch."""
        given = await self._reader.window()
        if not given:
            raise TraceError("the data set is empty: there is nothing to compute")
        await self._learn(given[0])
        rows = await self._tokenized(given)
        batches = self._reader.batches(rows, 0, 0)
        self._ahead = rows, batches
        return await self._traced(batches[0], begins=True)

    async def _learn(self, row: Row) -> None:
        """Finds out from one row what the function needs of each."""
        while True:
            (with_tokens,) = await self._tokenized([row])
            try:
                await self._host(self._tracer.probe, with_tokens)
                break
            except UntoldError as untold:
                await self._tell(untold, new=True)
        self._reader.learnt = self._tracer.learnt

    async def _tell(self, untold: UntoldError, *, new: bool) -> None:
        """Asks for tokens that the function needs."""
        asked, inputs = untold.asked, untold.inputs
        if asked is not None:
            if not new:
                raise TraceError(
                    f"the function needs tokens of {asked.key!r} for this batch and did not for the first row: what it"
                    " makes runs over must not depend on the batch"
                ) from None
            self._tracer.asked[asked] = None
        elif isinstance(inputs, Text):
            await self._patience.call(lambda: self._core.tokenize([inputs]))
        else:
            await self._patience.call(lambda: self._core.inputs_of(inputs))

    def _begin(self, found: State | None, template: Template) -> State:
        """The state to go on from."""
        card = self._core.card
        fresh = State(
            card.name,
            card.revision,
            graph_digest(template),
            self._plan.settings,
            secrets.randbits(52),
            total=self._reader.total,
            lanes=(None,) * self._plan.lanes,
        )
        if found is None:
            return fresh
        if not found.windows:  # nothing was done, so any map may begin; what it left on the server has the salt
            return replace(fresh, salt=found.salt)
        assert self._plan.resume is not None
        check_same(self._plan.resume, found, fresh)
        return found

    # --- rows -----------------------------------------------------------------------------------------------------

    async def _all_windows(self) -> None:
        """Feeds the lanes until the data set ends."""
        queues: list[asyncio.Queue[Batch | None]] = [asyncio.Queue(1) for _ in range(self._plan.lanes)]
        tasks = [asyncio.ensure_future(self._lane(i, queue)) for i, queue in enumerate(queues)]
        tasks.append(asyncio.ensure_future(self._feed(queues)))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._ledger.complete(self._reader.read)

    async def _feed(self, queues: list[asyncio.Queue[Batch | None]]) -> None:
        (rows, batches), self._ahead = self._ahead, ([], [])
        number, next_batch = 0, 0
        state = self._ledger.state
        if state.windows:
            await self._skip(1)
            number, next_batch = state.windows, state.batches
            rows, batches = await self._read(number, next_batch)
        while rows:
            next_batch += len(batches)
            window = Window(number, rows, self._reader.digest, self._reader.read, len(batches), next_batch)
            await self._ledger.open(window)
            for batch in batches:
                await queues[batch.number % len(queues)].put(batch)
            number += 1
            rows, batches = await self._read(number, next_batch)
        for queue in queues:
            await queue.put(None)

    async def _skip(self, windows: int) -> None:
        """Reads on to the end of the windows that are done, `windows` of which were read, and checks the rows."""
        state = self._ledger.state
        for _ in range(windows, state.windows):
            await self._reader.window()
        assert self._plan.resume is not None
        check_rows(self._plan.resume, state, self._reader.digest, self._reader.read)
        self._rows_done = self._rows_before = state.rows
        self._batches_done = state.batches
        self._show()

    async def _read(self, window: int, first_batch: int) -> tuple[list[Row], list[Batch]]:
        rows = await self._tokenized(await self._reader.window())
        return rows, self._reader.batches(rows, first_batch, window)

    async def _tokenized(self, rows: Sequence[Row]) -> list[Row]:
        return await self._reader.tokenized(rows, self._tracer.asked)

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def _lane(self, lane: int, queue: asyncio.Queue[Batch | None]) -> None:
        while (batch := await queue.get()) is not None:
            await self._one(lane, batch, self._ledger.lane(lane))

    async def _one(self, lane: int, batch: Batch, before: Lane | None) -> None:
        """Runs a batch."""
        import numpy as np

        ledger = self._ledger
        folded = 0 if before is None else before.batches
        header = np.array([ledger.state.salt, lane, folded + 1], dtype=np.float64)
        so_far = None if before is None else constant(before)
        template = await self._traced(batch, begins=before is None)
        try:
            outcome, kept = await self._execute(template, template.fill(batch, header, so_far, ledger.tag))
        except NotFoundError as error:
            gone = error.metadata.get("digest")
            if before is not None and gone == before.digest:
                raise lost(error) from None
            if gone not in template.uploaded:
                raise self._core.stored.explain(error, template.graph) from None
            # A large constant of the function's has expired or given way to others: trace it anew, and send it again.
            self._templates.clear()
            template = await self._traced(batch, begins=before is None, again=True)
            outcome, kept = await self._execute(template, template.fill(batch, header, so_far, ledger.tag))
        if template.reductions:
            info = kept[STATE]
            ledger.move(lane, batch, Lane(folded + 1, info.digest, info.shape[0]))
        ledger.take(batch, template, outcome, kept)
        self._usage = summed(self._usage, RunUsage.of(outcome.usage))
        self._rows_done += len(batch.rows)
        self._batches_done += 1
        self._tokens_done += sum(len(tokens) for row in batch.rows for tokens in row.prompts.values())
        self._show()
        await ledger.done(batch)

    async def _traced(self, batch: Batch, *, begins: bool, again: bool = False) -> Template:
        """The template for a batch, its large constants on the server and out of this process's memory."""
        key = (*batch.shape, begins)
        async with self._tracing:  # lanes that meet a new shape at the same time trace it once
            found = self._templates.get(key)
            if found is None:
                found = await self._trace(batch, begins)
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

    async def _trace(self, batch: Batch, begins: bool) -> Template:
        while True:
            try:
                return await self._host(self._tracer.trace, batch, begins, self._plan.keep)  # type: ignore[no-any-return]
            except UntoldError as untold:
                await self._tell(untold, new=False)

    async def _execute(self, template: Template, graph: Graph) -> tuple[Outcome, dict[str, ArtifactInfo]]:
        """Runs a batch's graph; what it kept is under the names that the template has for it."""
        kept: dict[str, ArtifactInfo] = {}

        def note(event: Event) -> None:
            if isinstance(event, Kept):
                kept[event.name.removesuffix(self._ledger.tag)] = event.artifact

        def send() -> Awaitable[Outcome]:
            kept.clear()
            return self._core.execute(graph, self._plan.options, self._plan.timeout_s, note)

        try:
            outcome = await self._patience.call(send)
        except GraphError as error:
            raise template.locate(error) from None
        got: Mapping[str, Any] = {**outcome.values, **kept}
        missing = [output.name for output in template.graph.outputs if output.name not in got]
        if missing:
            raise ProtocolError(f"the server did not send {missing[0]!r}")
        return outcome, kept

    def _show(self) -> None:
        self._notify(
            MapProgress(
                self._rows_done,
                self._reader.total,
                self._batches_done,
                self._tokens_done,
                time.monotonic() - self._begun,
                self._patience.retries,
                self._patience.waiting,
                self._usage.bytes_out,
                self._rows_done - self._rows_before,
            )
        )
