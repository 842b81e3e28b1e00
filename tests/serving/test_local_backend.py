"""LocalBackend with a scripted engine: events, accounting, cancellation, deadlines and failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from patchbay.errors import (
    AbortedError,
    DeadlineExceededError,
    InternalServerError,
    NotFoundError,
    RequestCancelledError,
    ResourceExhaustedError,
    ShapeError,
    UnavailableError,
)
from patchbay.ir.card import ModelCard
from patchbay.ir.dtypes import float32
from patchbay.ir.events import (
    Cost,
    Done,
    Event,
    ExecuteOptions,
    ModelSummary,
    Progress,
    Queued,
    Started,
    TensorValue,
    TokenizedRow,
    Usage,
)
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay_server.config import LimitsConfig, SchedulingConfig
from patchbay_server.engine.running import Wanted
from patchbay_server.serving import local, work
from patchbay_server.serving.local import LocalBackend, LocalCatalog, is_device_failure
from patchbay_server.serving.threads import choose_torch_threads

VALUE = TensorData(float32, (2,), bytes(8))
OPTIONS = ExecuteOptions()


@dataclass
class Hosted:
    """A model that is only a name."""

    card: ModelCard = field(
        default_factory=lambda: ModelCard("m", "f", "s", "r", float32, 1, 2, 1, 1, 2, 2, 3, 4, 5, True, ())
    )
    summary: ModelSummary = field(default_factory=lambda: ModelSummary("m", "f", "s", 5, 1, 2))

    def tokenize(self, texts: Any, *, add_special_tokens: bool = True) -> tuple[TokenizedRow, ...]:
        return tuple(
            TokenizedRow((len(t), threading.get_ident()), (t, ""), ((0, 1),) * 2, (add_special_tokens,) * 2)
            for t in texts
        )


@dataclass
class Plan:
    script: Callable[[Callable[[Event], None], Callable[[], bool]], None]
    cost: Cost = field(default_factory=lambda: Cost(flops=7))


@dataclass
class Execution:
    """One forward, in which the plan's script runs."""

    plan: Plan
    emit: Callable[[Event], None]
    cancelled: Callable[[], bool]
    usage: Usage | None = None
    error: BaseException | None = None
    run_s: float = 1e-9

    @property
    def wanted(self) -> Wanted:
        return Wanted(1, 1, 1, None, False, 0)

    @property
    def ended(self) -> bool:
        return self.usage is not None

    def begin(self) -> None:
        """Nothing comes before the forward."""

    def close(self) -> None:
        """Nothing is held."""


class Engine:
    """Runs what the next plan says; `gate` lets a test hold a run open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.runs = 0
        self.script: Callable[[Callable[[Event], None], Callable[[], bool]], None] = self.value
        self.prepare_error: Exception | None = None
        self.prepared_on: int | None = None
        self.cost = Cost(flops=7)

    def prepare(self, graph: Graph, options: ExecuteOptions, *, account: str | None = None) -> Plan:
        self.prepared_on = threading.get_ident()
        if self.prepare_error is not None:
            raise self.prepare_error
        return Plan(self.script, self.cost)

    def open(self, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> Execution:
        return Execution(plan, emit, cancelled)

    def advance(self, group: Sequence[Execution]) -> None:
        for each in group:
            self.runs += 1
            each.plan.script(each.emit, each.cancelled)
            each.usage = Usage(tokens=3, cost=each.plan.cost)

    @staticmethod
    def value(emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        emit(Progress(1, 1))
        emit(TensorValue("x", VALUE))

    def hold(self, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        """Stay inside until the gate opens or the request is cancelled (as the engine asks between layers)."""
        self.entered.set()
        while not self.gate.wait(0.001):
            if cancelled():
                self.entered.clear()
                raise RequestCancelledError("stopped between layers")


def graph(nodes: int = 0) -> Graph:
    """A graph of which only the length matters here."""
    return Graph(nodes=(Node("zeros", (), {"shape": ()}),) * nodes)


@pytest.fixture(autouse=True)
def every_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Progress event is left out for coming too soon."""
    monkeypatch.setattr(work, "PROGRESS_INTERVAL_S", 0.0)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def make(engine: Engine) -> Iterator[Callable[..., LocalBackend]]:
    made: list[LocalBackend] = []

    def build(on_device_failure: Callable[[BaseException], None] | None = None, **limits: Any) -> LocalBackend:
        one = SchedulingConfig(max_open_requests=1)
        backend = LocalBackend(
            Hosted(), LimitsConfig(**limits), scheduling=one, engine=engine, on_device_failure=on_device_failure
        )
        made.append(backend)
        return backend

    yield build
    engine.gate.set()
    for backend in made:
        backend.close()
        assert not backend._thread.is_alive()


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def held(backend: LocalBackend, engine: Engine, account: str = "a") -> AsyncIterator[Event]:
    """An execution that is inside the engine."""
    engine.script = engine.hold
    events = backend.execute(graph(), OPTIONS, account=account)
    assert await anext(events) == Started()
    return events


async def test_events_in_order_with_usage(make: Callable[..., LocalBackend]) -> None:
    """A run gives Started, its events, and Done with bytes and times filled in."""
    events = await collect(make().execute(graph(4), OPTIONS, account="a", bytes_in=11))
    assert events[:3] == [Started(), Progress(1, 1), TensorValue("x", VALUE)]
    assert isinstance(events[3], Done)
    usage = events[3].usage
    assert (usage.tokens, usage.bytes_in, usage.bytes_out, usage.nodes, usage.cost.flops) == (3, 11, 8, 4, 7)
    assert usage.queue_ms > 0
    assert usage.run_ms > 0


async def test_progress_is_for_people(make: Callable[..., LocalBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress that follows too soon on the last is left out; values never are."""
    monkeypatch.setattr(work, "PROGRESS_INTERVAL_S", 3600.0)
    events = await collect(make().execute(graph(), OPTIONS, account="a"))
    assert [type(e) for e in events] == [Started, TensorValue, Done]


async def test_dry_run_only_prices(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """A dry run is Done alone, with the cost; the engine does not run."""
    events = await collect(make().execute(graph(), ExecuteOptions(dry_run=True), account="a"))
    assert events == [Done(Usage(cost=Cost(flops=7)))]
    assert engine.runs == 0


async def test_large_graphs_are_prepared_beside_the_loop(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """Small graphs are verified on the loop, large ones on another thread."""
    backend = make()
    await collect(backend.execute(graph(1), OPTIONS, account="a"))
    assert engine.prepared_on == threading.get_ident()
    await collect(backend.execute(graph(local.INLINE_NODES + 1), OPTIONS, account="a"))
    assert engine.prepared_on != threading.get_ident()


async def test_a_refused_graph_leaves_no_trace(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """An error of the verifier reaches the caller as itself, and its place in the queue is free again."""
    backend = make(max_concurrent_per_account=1)
    engine.prepare_error = ShapeError("no", node=1)
    for _ in range(3):
        with pytest.raises(ShapeError):
            await collect(backend.execute(graph(), OPTIONS, account="a"))
    assert backend.scheduler.admitted("a") == 0


async def test_the_thread_survives_any_exception(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """Errors of ours arrive as themselves, others as INTERNAL without their text; the next request is served."""
    backend = make()

    def raising(error: BaseException) -> Callable[..., None]:
        def script(emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
            raise error

        return script

    engine.script = raising(ShapeError("ours"))
    with pytest.raises(ShapeError, match="ours"):
        await collect(backend.execute(graph(), OPTIONS, account="a"))
    for error in (RuntimeError("secret path"), MemoryError("secret"), SystemExit(3), KeyboardInterrupt()):
        engine.script = raising(error)
        with pytest.raises(InternalServerError) as caught:
            await collect(backend.execute(graph(), OPTIONS, account="a"))
        assert "secret" not in str(caught.value)
        assert type(error).__name__ in str(caught.value)
    engine.script = engine.value
    assert len(await collect(backend.execute(graph(), OPTIONS, account="a"))) == 4
    assert backend.scheduler.running == 0


async def test_waiting_requests_hear_their_position(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """A request behind another is told 1 before it starts."""
    backend = make()
    first = await held(backend, engine)
    engine.script = engine.value
    second = backend.execute(graph(), OPTIONS, account="b")
    assert await anext(second) == Queued(1)
    engine.gate.set()
    assert [type(e) for e in await collect(second)] == [Started, Progress, TensorValue, Done]
    assert isinstance((await collect(first))[-1], Done)


async def test_closing_a_running_request_stops_the_engine(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """When the client is gone, the engine hears so between layers, and the next request runs."""
    backend = make()
    events = await held(backend, engine)
    await events.aclose()  # type: ignore[attr-defined]
    engine.script = engine.value
    assert isinstance((await collect(backend.execute(graph(), OPTIONS, account="a")))[-1], Done)
    assert not engine.entered.is_set()


async def test_cancelling_the_task_stops_the_engine(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """Cancelling the coroutine that reads the events (what gRPC does) frees the engine and the account."""
    backend = make()
    engine.script = engine.hold
    task = asyncio.create_task(collect(backend.execute(graph(), OPTIONS, account="a")))
    await asyncio.get_running_loop().run_in_executor(None, engine.entered.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.scheduler.admitted("a") == 0
    engine.script = engine.value
    assert isinstance((await collect(backend.execute(graph(), OPTIONS, account="a")))[-1], Done)


async def test_a_cancelled_waiting_request_leaves_the_queue(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """A request that is cancelled while it waits never runs."""
    backend = make()
    first = await held(backend, engine)
    engine.script = engine.value
    second = backend.execute(graph(), OPTIONS, account="b")
    assert await anext(second) == Queued(1)
    await second.aclose()  # type: ignore[attr-defined]
    assert backend.scheduler.waiting == 0
    engine.gate.set()
    await collect(first)
    assert engine.runs == 1


async def test_deadline_while_running(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """A request inside the engine past the server's deadline is stopped and says which limit it was."""
    backend = make(deadline_s=0.02)
    engine.script = engine.hold
    with pytest.raises(DeadlineExceededError) as caught:
        await collect(backend.execute(graph(), OPTIONS, account="a"))
    assert caught.value.metadata["limit"] == "deadline_s"


async def test_deadline_while_waiting(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """The deadline counts waiting too; the expired request never runs."""
    backend = make(deadline_s=0.02)
    engine.script = engine.hold
    ends = await asyncio.gather(
        *(collect(backend.execute(graph(), OPTIONS, account=a)) for a in "ab"), return_exceptions=True
    )
    assert [type(e) for e in ends] == [DeadlineExceededError] * 2
    assert engine.runs == 1
    assert backend.scheduler.waiting == 0


async def test_full_queue(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """With the engine busy and no room to wait, a request is refused with a time to retry."""
    backend = make(max_queue_length=0)
    first = await held(backend, engine)
    with pytest.raises(ResourceExhaustedError) as caught:
        await collect(backend.execute(graph(), OPTIONS, account="b"))
    assert caught.value.retry_after_s is not None
    engine.gate.set()
    await collect(first)


async def test_a_reader_that_stalls_keeps_its_account_from_more(
    make: Callable[..., LocalBackend], engine: Engine
) -> None:
    """Results that wait to be read count against their account alone, until they are read or their client is gone."""
    backend = make(max_unread_bytes_per_account=12)
    engine.cost = Cost(flops=7, result_bytes=8)
    stalled = backend.execute(graph(), OPTIONS, account="a")
    assert await anext(stalled) == Started()  # and then it asks for nothing
    with pytest.raises(ResourceExhaustedError) as caught:
        await collect(backend.execute(graph(), OPTIONS, account="a"))
    assert caught.value.reason == "RESULTS_NOT_READ"
    assert caught.value.retry_after_s is not None
    assert isinstance((await collect(backend.execute(graph(), OPTIONS, account="b")))[-1], Done)
    while not isinstance(await anext(stalled), TensorValue):
        pass
    with pytest.raises(ResourceExhaustedError):  # the value is on its way to the client
        await collect(backend.execute(graph(), OPTIONS, account="a"))
    assert isinstance(await anext(stalled), Done)  # it arrived
    assert isinstance((await collect(backend.execute(graph(), OPTIONS, account="a")))[-1], Done)
    await collect(stalled)
    gone = backend.execute(graph(), OPTIONS, account="a")
    await anext(gone)
    await cast(Any, gone).aclose()
    assert backend.scheduler.unread("a") == 0


async def test_asking_for_the_price_makes_no_room(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """A dry run gives no results, so that it is answered whatever waits to be read."""
    backend = make(max_unread_bytes_per_account=12)
    engine.cost = Cost(flops=7, result_bytes=8)
    stalled = backend.execute(graph(), OPTIONS, account="a")
    await anext(stalled)
    (done,) = await collect(backend.execute(graph(), ExecuteOptions(dry_run=True), account="a"))
    assert isinstance(done, Done)
    await collect(stalled)


class AcceleratorError(RuntimeError):
    """Stands for torch.AcceleratorError, which only a device can raise."""


async def test_device_failure_ends_the_replica(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """After a sticky device error everybody is told to try again, the owner ends the process, nothing more is taken."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[BaseException] = loop.create_future()
    backend = make(on_device_failure=lambda error: loop.call_soon_threadsafe(ended.set_result, error))
    first = await held(backend, engine)
    engine.script = engine.value
    second = backend.execute(graph(), OPTIONS, account="b")
    assert await anext(second) == Queued(1)

    def broken(emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> None:
        raise AcceleratorError("CUDA error: device-side assert triggered")

    engine.script = broken
    third = backend.execute(graph(), OPTIONS, account="c")
    assert await anext(third) == Queued(2)
    engine.gate.set()
    await collect(first)
    await collect(second)
    with pytest.raises(AbortedError) as caught:
        await collect(third)
    assert caught.value.reason == "DEVICE_FAILURE"
    with pytest.raises(UnavailableError):
        await collect(backend.execute(graph(), OPTIONS, account="d"))
    with pytest.raises(UnavailableError):
        backend.check()
    # The owner is told last, by the engine's thread.
    assert type(await ended) is AcceleratorError


def test_what_counts_as_a_device_failure() -> None:
    """Running out of memory is survivable; asserts and illegal accesses on the device are not."""
    out_of_memory = type("OutOfMemoryError", (RuntimeError,), {})
    assert not is_device_failure(out_of_memory("CUDA error: out of memory"))
    assert not is_device_failure(RuntimeError("shape mismatch"))
    assert is_device_failure(RuntimeError("CUDA error: an illegal memory access was encountered"))


async def test_closing_ends_what_waits(make: Callable[..., LocalBackend], engine: Engine) -> None:
    """Closing tells every open request that the server is going."""
    backend = make()
    first = await held(backend, engine)
    second = backend.execute(graph(), OPTIONS, account="b")
    assert await anext(second) == Queued(1)
    await asyncio.get_running_loop().run_in_executor(None, backend.close)
    for events in (first, second):
        with pytest.raises(UnavailableError):
            await collect(events)


async def test_closing_while_a_graph_is_prepared(
    make: Callable[..., LocalBackend], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was being made ready when the server closed hears so, instead of waiting for an engine thread."""
    backend, prepare = make(), engine.prepare

    def closing(*args: Any, **kwargs: Any) -> Plan:
        backend.close()
        return prepare(*args, **kwargs)

    monkeypatch.setattr(engine, "prepare", closing)
    with pytest.raises(UnavailableError, match="shutting down"):
        await asyncio.wait_for(collect(backend.execute(graph(local.INLINE_NODES + 1), OPTIONS, account="a")), 60)
    assert backend.scheduler.admitted("a") == backend.scheduler.waiting == backend.scheduler.running == 0


async def test_many_concurrent_requests_each_get_their_own(make: Callable[..., LocalBackend]) -> None:
    """Fifty requests of five accounts at once all end with their own value and Done."""
    backend = make()
    results = await asyncio.gather(
        *(collect(backend.execute(graph(), OPTIONS, account=f"a{i % 5}")) for i in range(50))
    )
    assert all(isinstance(r[-1], Done) and TensorValue("x", VALUE) in r for r in results)
    assert backend.scheduler.waiting == backend.scheduler.running == 0


async def test_two_event_loops_share_a_backend(make: Callable[..., LocalBackend]) -> None:
    """A backend serves coroutines of several loops (a sync and an async client in one process)."""
    backend = make()

    def elsewhere() -> list[Event]:
        return asyncio.run(collect(backend.execute(graph(), OPTIONS, account="b")))

    here, there = await asyncio.gather(
        collect(backend.execute(graph(), OPTIONS, account="a")),
        asyncio.get_running_loop().run_in_executor(None, elsewhere),
    )
    assert isinstance(here[-1], Done)
    assert isinstance(there[-1], Done)


async def test_long_texts_are_tokenized_beside_the_loop(make: Callable[..., LocalBackend]) -> None:
    """Short texts are tokenized at once, long ones on another thread."""
    backend = make()
    (short,) = await backend.tokenize(["hi"])
    (long,) = await backend.tokenize(["x" * (local.INLINE_CHARACTERS + 1)], add_special_tokens=False)
    assert short.ids[1] == threading.get_ident()
    assert long.ids[1] != threading.get_ident()
    assert long.special == (False, False)


def test_card_carries_the_servers_limits(make: Callable[..., LocalBackend]) -> None:
    """The card that clients get holds the limits of the configuration."""
    assert make(max_nodes=5).card.limits.max_nodes == 5


async def test_catalog_names_what_there_is(make: Callable[..., LocalBackend]) -> None:
    """An unknown model is NOT_FOUND with the nearest name, or with all names."""
    catalog = LocalCatalog({"tiny-llama": make()})
    assert [s.name for s in await catalog.list_models()] == ["m"]
    with pytest.raises(NotFoundError, match="did you mean 'tiny-llama'"):
        catalog.get("tiny-lama")
    with pytest.raises(NotFoundError, match="it hosts: tiny-llama"):
        catalog.get("zzz")


def test_torch_threads_leave_a_core_for_the_service() -> None:
    """One core fewer than there are, never none; the configuration wins."""
    assert [choose_torch_threads(None, cores) for cores in (1, 2, 16)] == [1, 1, 15]
    assert choose_torch_threads(4, 2) == 4
    assert choose_torch_threads(None) >= 1
