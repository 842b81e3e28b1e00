"""Models hosted in this process: one engine thread per model, and an event loop that never waits for it.

A request crosses from the loop to the engine thread once and its events cross back through `_Channel`, which wakes the
loop at most once per batch of events; nothing polls. `local_servicer` serves a model to `patchbay.local` in-process;
`patchbay_server.serving.plain` puts a gRPC server before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from patchbay.errors import (
    AbortedError,
    DeadlineExceededError,
    InternalServerError,
    PatchbayError,
    UnavailableError,
)
from patchbay.ir.card import OPTIMISATIONS, ModelCard
from patchbay.ir.events import (
    ChatMessage,
    Done,
    Event,
    ExecuteOptions,
    ModelSummary,
    Queued,
    Started,
    TensorValue,
    TokenizedRow,
    Usage,
)
from patchbay.ir.graph import Graph
from patchbay_server.config import Config, LimitsConfig, SchedulingConfig
from patchbay_server.scheduling import (
    AdmissionLimits,
    Batcher,
    Budget,
    FairQueue,
    RoundRobinQueue,
    Scheduler,
    Ticket,
    VirtualTokenQueue,
)
from patchbay_server.serving.artifacts import TemporaryArtifacts, leave, needs_store, store_of, take
from patchbay_server.serving.backend import Backend, ExecutionEngine, Hosted, no_such_model
from patchbay_server.serving.threads import set_torch_threads, settle_threads, thread_candidates
from patchbay_server.serving.work import Job, WorkLoop
from patchbay_server.store.artifacts import ArtifactStore

if TYPE_CHECKING:
    from patchbay_server.transport.servicer import Servicer

log = logging.getLogger("patchbay.serving")

#: Graphs of at most so many nodes are verified on the event loop itself (a few milliseconds); larger ones beside it.
INLINE_NODES = 1_000
#: Texts of at most so many characters are tokenized on the event loop itself.
INLINE_CHARACTERS = 4_096
#: How long a request's first small events wait for others, and how large a value may be that waits.
GATHER_S, GATHER_BYTES = 0.03, 65_536
#: How long after a device failure the process still answers, so that clients learn why.
EXIT_GRACE_S = 0.5
#: Exit status of a replica whose device failed (EX_SOFTWARE): the supervisor starts another.
EXIT_DEVICE_FAILED = 70
#: Positions of one shared forward, unless configured: on a CPU, and on a GPU.
CPU_FORWARD_TOKENS, FORWARD_TOKENS = 512, 16_384
#: Positions that a GPU puts through in the time of one.
FREE_TOKENS = 128
#: Time beyond the deadline after which a request that is still inside the engine counts as stuck.
STUCK_AFTER_S = 60.0


class _Channel:
    """Events from the engine thread to one coroutine; as large as the results, which `Scheduler.expect` bounds.

    A request that is over in a moment crosses back once: what is small waits for its end, but never for longer than
    `GATHER_S` after the request came. Waking the loop for each event costs a quick request more than its events do.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._gathering = True
        self._nudge = loop.call_later(GATHER_S, self._gathered)
        self._items: deque[Event | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._wake_pending = False

    def put(self, item: Event | BaseException) -> None:
        """Hand over an event, or the exception that ends the request; from any thread."""
        self._items.append(item)
        small = isinstance(item, Started) or (isinstance(item, TensorValue) and item.value.nbytes <= GATHER_BYTES)
        if not (self._wake_pending or (small and self._gathering)):
            self._wake_pending = True
            # A closed loop means that the client is gone with it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._wake_pending = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _gathered(self) -> None:
        self._gathering = False
        self._wake()

    def close(self) -> None:
        """Nobody will ask for events any more."""
        self._nudge.cancel()

    async def get(self) -> Event:
        """The next event; raises the exception that was put."""
        while not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item


class LocalBackend:
    """One model, its engine thread and its queue.

    Args:
        hosted: the model.
        limits: what requests are held to.
        scheduling: which requests go together, and who goes first.
        artifacts: where tensors that stay on the server are kept; None where none are.
        artifact_cache_bytes: of artifacts that stay on the device for their next use; 0: none.
        engine: what runs graphs; None: `patchbay_server.engine.Engine` on the hosted model.
        torch_threads: threads of one forward on the CPU; of several numbers the best when tried; None: torch's own.
        on_device_failure: called from the engine thread after an error that the device will not recover from, when all
            clients have been told. A served replica ends its process there; in-process use only refuses more work.
    """

    def __init__(
        self,
        hosted: Hosted,
        limits: LimitsConfig | None = None,
        *,
        scheduling: SchedulingConfig | None = None,
        artifacts: ArtifactStore | None = None,
        artifact_cache_bytes: int = 2**30,
        engine: ExecutionEngine | None = None,
        torch_threads: int | Sequence[int] | None = None,
        on_device_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        limits = LimitsConfig() if limits is None else limits
        shared = SchedulingConfig() if scheduling is None else scheduling
        attributes = dict(hosted.card.attributes)
        if engine is None:
            from patchbay_server.engine import Engine, TrunkCache
            from patchbay_server.engine.constants import ConstantCache
            from patchbay_server.engine.plan import OPTIMISATIONS as KNOWN

            attributes[OPTIMISATIONS] = ", ".join(KNOWN)
            constants = ConstantCache(artifact_cache_bytes) if artifacts is not None and artifact_cache_bytes else None
            engine = Engine(
                cast(Any, hosted),
                limits.graph_limits(),
                max_pass_tokens=shared.max_pass_tokens,
                trunks=TrunkCache(shared.prefix_cache_bytes),
                constants=constants,
            )
        self._hosted = hosted
        # The limits that hold here and what can be left out, so that clients check their requests before sending.
        self._card = replace(hosted.card, limits=limits.graph_limits(), attributes=attributes)
        self._engine = engine
        self._artifacts = artifacts
        self._deadline_s = limits.deadline_s
        self._torch_threads = torch_threads
        self._on_device_failure = on_device_failure
        fair = shared.fairness == "virtual-tokens"
        weights = shared.account_weights
        waiting: FairQueue[Ticket] = VirtualTokenQueue[Ticket](weights) if fair else RoundRobinQueue[Ticket]()
        self._scheduler = Scheduler(
            AdmissionLimits(
                max_queue_length=limits.max_queue_length,
                max_concurrent_per_account=limits.max_concurrent_per_account,
                slots=shared.max_open_requests,
                max_unread_bytes_per_account=limits.max_unread_bytes_per_account,
            ),
            waiting,
        )
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._failure: BaseException | None = None
        self._closed = False
        budget = budget_of(hosted, shared)
        self._loop = WorkLoop(engine, Batcher(budget, fair=fair, weights=weights), self._inbox, self._ended)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix=f"patchbay-prepare-{hosted.card.name}")
        self._thread = threading.Thread(target=self._work, name=f"patchbay-engine-{hosted.card.name}", daemon=True)
        self._thread.start()

    @property
    def summary(self) -> ModelSummary:
        """The model's line in ListModels."""
        return self._hosted.summary

    @property
    def card(self) -> ModelCard:
        """The model's card, with this server's limits."""
        return self._card

    @property
    def scheduler(self) -> Scheduler:
        """The queue, for tests and figures."""
        return self._scheduler

    def check(self) -> None:
        """Say whether this backend can still serve.

        Raises:
            UnavailableError: the device failed, the engine thread is gone, or a request has been inside the engine for
                longer than its deadline and a minute.
        """
        if self._failure is not None:
            raise UnavailableError("the device of this model failed; the replica is being replaced", retry_after_s=5.0)
        if self._closed or not self._thread.is_alive():
            raise UnavailableError("this model is shutting down", retry_after_s=5.0)
        since = self._loop.busy_since
        if since is not None and time.perf_counter() - since > self._deadline_s + STUCK_AFTER_S:
            raise UnavailableError("the engine is stuck; the replica is being replaced", retry_after_s=5.0)

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        """Tokenize texts with the model's own tokenizer; one row per text, in order."""
        call = functools.partial(self._hosted.tokenize, texts, add_special_tokens=add_special_tokens)
        if prepend_bos is not None:
            call = functools.partial(call, prepend_bos=prepend_bos)
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return call()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._beside, call)

    async def render_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        """Conversations as texts, by the tokenizer's chat template."""
        return await asyncio.get_running_loop().run_in_executor(self._beside, self._hosted.render_chats, chats)

    async def token_strings(self, ids: Sequence[int]) -> TokenizedRow:
        """The text of each token id, as the model's tokenizer shows it."""
        if len(ids) <= INLINE_CHARACTERS:
            return self._hosted.token_strings(ids)
        return await asyncio.get_running_loop().run_in_executor(self._beside, self._hosted.token_strings, ids)

    async def execute(
        self, graph: Graph, options: ExecuteOptions, *, account: str, bytes_in: int = 0
    ) -> AsyncIterator[Event]:
        """Run a graph; closing the iterator cancels. See `patchbay_server.serving.backend.Backend.execute`."""
        self.check()
        loop = asyncio.get_running_loop()
        ticket = Ticket(account)
        self._scheduler.enter(ticket)
        channel = _Channel(loop)
        job: Job | None = None
        deadline: asyncio.TimerHandle | None = None
        try:
            if needs_store(graph):
                graph = await asyncio.to_thread(take, self._artifacts, account, graph)
            prepare = functools.partial(self._engine.prepare, graph, options, account=account)
            if len(graph.nodes) <= INLINE_NODES:
                plan = prepare()
            else:
                plan = await loop.run_in_executor(self._beside, prepare)
            if options.dry_run:
                yield Done(Usage(nodes=len(graph.nodes), bytes_in=bytes_in, cost=plan.cost))
                return
            self._scheduler.expect(ticket, plan.cost.result_bytes)
            kept = frozenset(output.name for output in graph.outputs if output.keep)
            if kept and self._artifacts is not None:
                await asyncio.to_thread(self._artifacts.check_room, account, plan.cost.kept_bytes)
            job = Job(plan, channel, ticket, len(graph.nodes), bytes_in, kept)
            ticket.cost = float(max(1, plan.cost.flops))
            ticket.on_start = lambda: self._inbox.put(job)
            ticket.on_position = lambda position: channel.put(Queued(position))
            self._jobs.add(job)
            self.check()  # the backend may have been closed, or its device have failed, while this was made ready
            deadline = loop.call_later(self._deadline_s, job.stop, self._too_late())
            self._scheduler.submit(ticket)
            while True:
                event = await channel.get()
                if isinstance(event, TensorValue) and event.name in kept and self._artifacts is not None:
                    event = await asyncio.to_thread(leave, self._artifacts, account, event)
                yield event
                if isinstance(event, TensorValue):
                    self._scheduler.read(ticket, event.value.nbytes)
                elif isinstance(event, Done):
                    return
                del event  # it should not be held while the next is awaited
        finally:
            channel.close()
            if deadline is not None:
                deadline.cancel()
            if job is not None:
                job.stopped = True
                self._jobs.discard(job)
            self._scheduler.leave(ticket)

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"the request took longer than the server's limit of {self._deadline_s:g} s (limits.deadline_s), waiting "
            "included; split it, or ask the operator for more",
            reason="DEADLINE",
            metadata={"limit": "deadline_s", "allowed": f"{self._deadline_s:g}"},
        )

    def close(self) -> None:
        """Refuse new work, end what runs, and stop the engine thread."""
        self._closed = True
        for job in list(self._jobs):
            job.stop(UnavailableError("the server is shutting down", retry_after_s=5.0))
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
        self._beside.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        """The engine thread."""
        threads = self._torch_threads
        if isinstance(threads, int):
            set_torch_threads(threads)
        elif threads is not None:
            settle_threads(self._hosted, threads)
        self._loop.run()

    def _ended(self, job: Job, error: BaseException | None, usage: Usage | None, run_s: float) -> PatchbayError | None:
        """The engine has let go of a job; returns what its client is told, where that is not the result."""
        told = None if error is None else self._explain(error)
        cost = None
        if usage is not None and usage.cost.tokens and usage.tokens:  # a generation may have stopped early
            cost = job.ticket.cost * usage.tokens / usage.cost.tokens
        # The slot is free before the client hears of the end, so that its next request does not wait for this one.
        self._scheduler.release(job.ticket, run_s, cost)
        return told

    def _explain(self, error: BaseException) -> PatchbayError:
        """What the client is told; an error that is not ours is logged here and only named there."""
        if self._failure is not None:
            return _device_failed()
        if isinstance(error, PatchbayError):
            # The traceback's frames hold the tensors of the failed request.
            return error.with_traceback(None)
        log.error("a request failed inside the engine", exc_info=error)
        if is_device_failure(error):
            self._fail(error.with_traceback(None))
            return _device_failed()
        return InternalServerError(
            f"the engine failed on this graph ({type(error).__name__}); the server's log has the details",
            reason="ENGINE_FAILURE",
        )

    def _fail(self, error: BaseException) -> None:
        """After the device failed nothing can run here any more: tell everybody, then let the owner end the process."""
        self._failure = error
        for job in list(self._jobs):
            job.stop(_device_failed())
        if self._on_device_failure is not None:
            self._on_device_failure(error)


def _device_failed() -> AbortedError:
    return AbortedError(
        "the device of this model failed and the replica is being replaced; try again in a moment",
        reason="DEVICE_FAILURE",
        retry_after_s=5.0,
    )


def is_device_failure(error: BaseException) -> bool:
    """Whether an error of torch means that this process can no longer use its device (a sticky CUDA error)."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return False
    text = str(error)
    return "AcceleratorError" in names or any(
        sign in text
        for sign in ("CUDA error", "device-side assert", "illegal memory access", "NVLink error", "ECC error")
    )


def exit_replica(error: BaseException) -> None:
    """End this process a moment from now (the clients' last events still leave); whoever supervises starts another."""
    log.critical("unrecoverable device error, this replica exits: %s", error)
    timer = threading.Timer(EXIT_GRACE_S, os._exit, (EXIT_DEVICE_FAILED,))
    timer.daemon = True
    timer.start()


def budget_of(hosted: Hosted, scheduling: SchedulingConfig) -> Budget:
    """What one shared forward is held to: on a CPU larger ones are no faster per position, and keep others waiting."""
    device = getattr(hosted, "device", None)
    on_cpu = device is None or device.type == "cpu"
    tokens = scheduling.max_forward_tokens or (CPU_FORWARD_TOKENS if on_cpu else FORWARD_TOKENS)
    return Budget(tokens=tokens, free_tokens=0 if on_cpu else FREE_TOKENS)


class LocalCatalog:
    """Backends by name."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = dict(sorted(backends.items()))

    async def list_models(self) -> tuple[ModelSummary, ...]:
        """A summary of each model, ordered by name."""
        return tuple(backend.summary for backend in self._backends.values())

    def get(self, name: str) -> Backend:
        """The model called `name`.

        Raises:
            NotFoundError: there is none; the message names those there are.
        """
        backend = self._backends.get(name)
        if backend is None:
            raise no_such_model(name, self._backends)
        return backend


def local_servicer(
    hf_model: Any,
    tokenizer: Any = None,
    name: str = "local",
    *,
    example: Mapping[str, Any] | None = None,
    prefix_cache_bytes: int = 0,
) -> Servicer:
    """A servicer for a transformers model that the caller already holds; `patchbay.local` calls it in-process.

    Its engine thread, and with it the model, stays until the servicer is closed. The process's torch settings are left
    alone, and no key is asked for; the weights are the caller's to read, and to change: so nothing that was computed
    with them is kept for later requests unless `prefix_cache_bytes` says so.
    """
    from patchbay.ir.params import DOWNLOADABLE
    from patchbay_server.models.loader import host
    from patchbay_server.transport.auth import AllowAll
    from patchbay_server.transport.servicer import Servicer

    hosted = host(hf_model, tokenizer, name=name, example=example).with_weights(DOWNLOADABLE)
    # The results are in the caller's own process: only what one request may have is bounded.
    limits, store = LimitsConfig(max_unread_bytes_per_account=2**62), TemporaryArtifacts()
    scheduling = SchedulingConfig(prefix_cache_bytes=prefix_cache_bytes)
    backend = LocalBackend(hosted, limits, scheduling=scheduling, artifacts=store)

    def close() -> None:
        backend.close()
        store.close()

    return Servicer(LocalCatalog({name: backend}), AllowAll(), limits, artifacts=store, on_close=close)


def backends_of(config: Config, hosted: Sequence[Hosted], *, exit_on_device_failure: bool) -> dict[str, LocalBackend]:
    """A backend for each hosted model, with the configuration's limits."""
    threads = thread_candidates(config.torch_threads, sharing=len(hosted))
    # What was loaded stays. A full collection that looks at all of it takes 0.2 s, in which nobody is served.
    gc.collect()
    gc.freeze()
    return {
        model.card.name: LocalBackend(
            model,
            config.limits,
            scheduling=config.scheduling,
            artifacts=store_of(config.artifacts),
            artifact_cache_bytes=config.artifacts.device_cache_bytes,
            torch_threads=threads,
            on_device_failure=exit_replica if exit_on_device_failure else None,
        )
        for model in hosted
    }
