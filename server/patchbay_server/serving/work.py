"""The engine thread's loop: take what came in, run the forward that is next, deliver; whatever happens to each request.

Requests that queued while a forward ran go together into the next one. An idle engine waits for nobody: the first
request runs at once.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from patchbay.ir.events import Done, Event, Progress, Started, TensorValue, Usage
from patchbay_server.scheduling import Ticket
from patchbay_server.scheduling.batcher import Batcher, Waiting
from patchbay_server.serving.backend import ExecutionEngine, OpenExecution

#: Progress is for people: at most one such event in this time, so that quick requests and passes cost no messages.
PROGRESS_INTERVAL_S = 0.05
#: After a shared forward, how long the next one waits for those who were just answered and may ask again: this share of
#: the time that it took, and never longer than the second number. Who was served alone is never waited for.
REGROUP_SHARE = 0.03
REGROUP_S = 0.005


class Channel(Protocol):
    """Where a request's events go."""

    def put(self, item: Event | BaseException) -> None:
        """Hand over an event, or the exception that ends the request; from any thread."""


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through the queue and the engine thread.

    Attributes:
        plan: what is run.
        channel: where its events go.
        ticket: its place in the queue.
        nodes: nodes received.
        bytes_in: bytes of the request.
        kept: outputs that stay on the server.
        bytes_out: bytes of the results so far.
        stopped: whether the client is gone, or was told of an error.
    """

    plan: Any
    channel: Channel
    ticket: Ticket
    nodes: int
    bytes_in: int
    kept: frozenset[str] = frozenset()
    bytes_out: int = 0
    stopped: bool = False
    submitted_at: float = field(default_factory=time.perf_counter)
    progress_at: float = field(default_factory=time.perf_counter)

    def emit(self, event: Event) -> None:
        """Pass an event of the engine on to the client."""
        if isinstance(event, TensorValue):
            self.bytes_out += 0 if event.name in self.kept else event.value.nbytes
        elif isinstance(event, Progress):
            now = time.perf_counter()
            if now - self.progress_at < PROGRESS_INTERVAL_S:
                return
            self.progress_at = now
        self.channel.put(event)

    def cancelled(self) -> bool:
        """Whether the engine should stop: the client is gone, or the deadline has passed."""
        return self.stopped

    def stop(self, error: BaseException) -> None:
        """End the request with an error, wherever it is."""
        self.stopped = True
        self.channel.put(error)


@dataclass(eq=False, slots=True)
class _Open:
    """A job that the engine holds open, and since when its next forward waits."""

    job: Job
    execution: OpenExecution
    since: float


class WorkLoop:
    """What the engine thread does.

    Args:
        engine: what runs graphs.
        batcher: which forwards go together.
        inbox: jobs that may start; None ends the loop.
        ended: called with a job, the exception that ended it, what it used and for how many seconds it ran, when the
            engine has let go of it and before the client hears of it; returns the error that the client is told.

    Attributes:
        busy_since: when what runs now began; None while nothing does.
        forwards: forwards run so far.
    """

    def __init__(
        self,
        engine: ExecutionEngine,
        batcher: Batcher,
        inbox: queue.SimpleQueue[Job | None],
        ended: Callable[[Job, BaseException | None, Usage | None, float], BaseException | None],
    ) -> None:
        self._engine, self._batcher, self._inbox, self._ended = engine, batcher, inbox, ended
        self._open: list[_Open] = []
        self._closing = False
        self.busy_since: float | None = None
        self.forwards = 0

    def run(self) -> None:
        """Until None comes in."""
        while not self._closing:
            self._take_in()
            self._drop_stopped()
            if self._open and not self._closing:
                self._advance()
        for each in list(self._open):
            self._let_go(each)

    def _take_in(self) -> None:
        """Open every job that has come in; wait for one while there is nothing to do."""
        arrived: list[Job] = []
        if not self._open:
            first = self._inbox.get()
            if first is None:
                self._closing = True
                return
            arrived.append(first)
        while True:
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._closing = True
            else:
                arrived.append(job)
        for job in arrived:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        if job.stopped:
            self._ended(job, None, None, 0.0)
            return
        self.busy_since = time.perf_counter()
        self._batcher.enter(job.ticket.account)
        each = None
        try:
            job.emit(Started())
            each = _Open(job, self._engine.open(job.plan, job.emit, job.cancelled), self.busy_since)
            self._open.append(each)
            each.execution.begin()
        except BaseException as error:  # noqa: BLE001 - the thread outlives whatever a request did
            if each is None:
                self._batcher.leave(job.ticket.account)
                self._tell(job, None, error, 0.0)
            else:
                self._finish(each, error)
        else:
            if each.execution.ended:
                self._finish(each)
        self.busy_since = None

    def _drop_stopped(self) -> None:
        for each in [each for each in self._open if each.job.stopped]:
            self._finish(each)

    def _advance(self) -> None:
        """One forward, for one job or for several."""
        chosen = self._batcher.pick([_waiting(each) for each in self._open])
        group = [self._open[i] for i in chosen]
        started = self.busy_since = time.perf_counter()
        error: BaseException | None = None
        try:
            self._engine.advance([each.execution for each in group])
        except BaseException as failure:  # noqa: BLE001 - the thread outlives whatever a request did
            error = failure
        now = time.perf_counter()
        self.busy_since = None
        self.forwards += 1
        finished = 0
        for each in group:
            each.since = now
            if error is not None or each.execution.ended:
                self._finish(each, error)
                finished += 1
        if finished > 1:
            self._regroup(finished, min(REGROUP_S, REGROUP_SHARE * (now - started)))

    def _regroup(self, finished: int, patience_s: float) -> None:
        """Wait a moment for those who were just answered together, so that they stay together."""
        deadline = time.perf_counter() + patience_s
        for _ in range(finished):
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            try:
                job = self._inbox.get(timeout=left)
            except queue.Empty:
                return
            if job is None:
                self._closing = True
                return
            self._begin(job)

    def _finish(self, each: _Open, error: BaseException | None = None) -> None:
        execution = each.execution
        self._let_go(each)
        self._tell(each.job, execution.usage, error or execution.error, execution.run_s)

    def _let_go(self, each: _Open) -> None:
        self._open.remove(each)
        self._batcher.leave(each.job.ticket.account)
        each.execution.close()

    def _tell(self, job: Job, usage: Usage | None, error: BaseException | None, run_s: float) -> None:
        told = self._ended(job, error, usage, run_s)
        if told is not None:
            job.stop(told)
        elif usage is not None:
            took = time.perf_counter() - job.submitted_at
            job.emit(
                Done(
                    replace(
                        usage,
                        nodes=usage.nodes or job.nodes,
                        queue_ms=max(0.0, took - run_s) * 1e3,
                        run_ms=run_s * 1e3,
                        bytes_in=job.bytes_in,
                        bytes_out=job.bytes_out,
                    )
                )
            )


def _waiting(each: _Open) -> Waiting:
    wanted = each.execution.wanted
    assert wanted is not None
    return Waiting(
        account=each.job.ticket.account,
        rows=wanted.rows,
        seq=wanted.seq,
        depth=wanted.depth,
        together=wanted.together,
        bound=wanted.bound,
        nbytes=wanted.nbytes,
        since=each.since,
    )
