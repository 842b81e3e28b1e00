"""The engine thread's loop: who shares the next forward, who waits how long, and that everybody gets their own."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from patchbay.errors import DeadlineExceededError, GraphError, PatchbayError
from patchbay.ir.dtypes import float32
from patchbay.ir.events import Done, Event, ExecuteOptions, Started, TensorValue, Usage
from patchbay.ir.graph import Generation, Graph, Node, Output, Run, TensorData
from patchbay_server.config import LimitsConfig, SchedulingConfig
from patchbay_server.engine import Engine
from patchbay_server.engine.running import Wanted
from patchbay_server.kernels import to_tensor
from patchbay_server.models.loader import host
from patchbay_server.scheduling import Batcher, Budget, Ticket
from patchbay_server.serving.local import LocalBackend
from patchbay_server.serving.work import Job, WorkLoop
from tests.tiny import D_MODEL, VOCAB, build

# --- with a scripted engine


@dataclass
class Execution:
    """Wants so many forwards of 32 positions."""

    name: str
    left: int
    usage: Usage | None = None
    error: BaseException | None = None
    run_s: float = 0.0
    closed: bool = False

    @property
    def wanted(self) -> Wanted | None:
        return None if self.ended else Wanted(1, 32, 12, "tokens", False, 0)

    @property
    def ended(self) -> bool:
        return self.usage is not None or self.error is not None

    def begin(self) -> None:
        """Nothing comes before the first forward."""

    def close(self) -> None:
        self.closed = True


@dataclass
class Scripted:
    """Notes who shared each forward; `during` is called in the middle of it."""

    during: Callable[[int], None] = lambda forward: None
    forwards: list[list[str]] = field(default_factory=list)
    opened: list[Execution] = field(default_factory=list)

    def prepare(self, graph: Any, options: Any, *, account: str | None = None) -> Any:
        raise NotImplementedError

    def open(self, plan: tuple[str, int], emit: Any, cancelled: Any) -> Execution:
        self.opened.append(Execution(*plan))
        return self.opened[-1]

    def advance(self, group: Sequence[Execution]) -> None:
        self.forwards.append([each.name for each in group])
        self.during(len(self.forwards))
        for each in group:
            each.left -= 1
            if not each.left:
                each.usage = Usage()


class Sink(list[Any]):
    """A channel that keeps what it is given."""

    put = list.append


class Desk:
    """A loop on a scripted engine; `run` works until the inbox says so."""

    def __init__(self, **what: Any) -> None:
        self.engine = Scripted()
        self.inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.ended: list[tuple[str, BaseException | None]] = []
        self.batcher = Batcher(Budget(tokens=1024, free_tokens=0), **what)
        self.loop = WorkLoop(self.engine, self.batcher, self.inbox, self.note)

    def note(self, job: Job, error: BaseException | None, usage: Usage | None, run_s: float) -> BaseException | None:
        self.ended.append((job.plan[0], error))
        return error

    def put(self, name: str, forwards: int = 1, account: str = "a") -> Job:
        job = Job((name, forwards), Sink(), Ticket(account), 0, 0)
        self.inbox.put(job)
        return job


def test_what_queued_while_a_forward_ran_goes_together() -> None:
    """The first request runs at once and alone; those that came meanwhile share the next forward."""
    desk = Desk()

    def during(forward: int) -> None:
        if forward == 1:
            for name in "bcd":
                desk.put(name)
        elif forward == 2:
            desk.inbox.put(None)

    desk.engine.during = during
    first = desk.put("a")
    desk.loop.run()
    assert desk.engine.forwards == [["a"], ["b", "c", "d"]]
    assert [type(event) for event in first.channel] == [Started, Done]  # type: ignore[attr-defined]


def test_a_flood_delays_another_account_by_one_forward() -> None:
    """However many requests one account has open, another's first forward is the next, without the flood's rows."""
    desk = Desk()

    def during(forward: int) -> None:
        if forward == 5:
            desk.put("mine", account="me")
        elif forward == 8:
            desk.inbox.put(None)

    desk.engine.during = during
    for number in range(40):
        desk.put(f"flood{number}", forwards=1000, account="flood")
    desk.loop.run()
    sizes = [len(names) for names in desk.engine.forwards]
    assert "mine" in desk.engine.forwards[5]
    assert sizes[5] == 1
    assert sizes[:5] == [32] * 5


def test_a_request_that_is_gone_is_dropped_between_forwards() -> None:
    """It takes part in no further forward, and what it held is let go."""
    desk = Desk()
    jobs = [desk.put(name, forwards=5) for name in "ab"]

    def during(forward: int) -> None:
        if forward == 2:
            jobs[0].stopped = True
        if forward == 5:
            desk.inbox.put(None)

    desk.engine.during = during
    desk.loop.run()
    assert desk.engine.forwards == [["a", "b"]] * 2 + [["b"]] * 3
    assert desk.engine.opened[0].closed
    assert desk.ended[0] == ("a", None)
    assert not desk.batcher.tokens._active


def test_a_failing_engine_ends_the_forwards_requests_and_no_others() -> None:
    """What `advance` raises is told to those who shared the forward; whoever waited is served."""
    desk = Desk()
    boom = RuntimeError("boom")

    def during(forward: int) -> None:
        if forward == 1:
            desk.put("c")
            raise boom
        desk.inbox.put(None)

    desk.engine.during = during
    for name in "ab":
        desk.put(name)
    desk.loop.run()
    assert desk.ended == [("a", boom), ("b", boom), ("c", None)]


def test_closing_while_the_loop_waits_for_those_just_answered() -> None:
    """The end may come in at any moment, also while the loop looks whether those just answered ask again."""
    desk = Desk()
    desk.engine.during = lambda forward: desk.inbox.put(None)
    for name in "ab":
        desk.put(name)
    desk.loop.run()
    assert desk.ended == [("a", None), ("b", None)]


def test_closing_lets_go_of_everything() -> None:
    """None in the inbox ends the loop in between two forwards; open executions are closed."""
    desk = Desk()
    desk.engine.during = lambda forward: desk.inbox.put(None)
    for name in "ab":
        desk.put(name, forwards=9)
    desk.loop.run()
    assert desk.engine.forwards == [["a", "b"]]
    assert all(each.closed for each in desk.engine.opened)


# --- with a model


@pytest.fixture(scope="module")
def hosted() -> Any:
    return host(build("llama"))


@pytest.fixture
def backend(hosted: Any) -> Iterator[LocalBackend]:
    limits = LimitsConfig(max_concurrent_per_account=64)
    made = LocalBackend(hosted, limits, scheduling=SchedulingConfig(max_open_requests=12), torch_threads=1)
    yield made
    made.close()
    assert not made._thread.is_alive()


async def result(
    backend: LocalBackend, graph: Graph, account: str = "a", **options: Any
) -> tuple[dict[str, torch.Tensor], Usage]:
    values: dict[str, torch.Tensor] = {}
    async for event in backend.execute(graph, ExecuteOptions(**options), account=account):
        if isinstance(event, TensorValue):
            values[event.name] = to_tensor(event.value)
        elif isinstance(event, Done):
            return values, event.usage
    raise AssertionError("no Done")


def graph_of(number: int, kind: str) -> Graph:
    """One of the kinds that are mixed: a read of many rows or few, a patch, a generation, a mistake in the data."""
    chance = random.Random(number)
    ids = tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 9)))
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(number)).numpy().tobytes()
    constant = Node("const", (), {"value": TensorData(float32, (D_MODEL,), vector)})
    write = Node("site.write", (0,), {"site": "blocks.1.resid_post", "mode": "add", "index": ()}, 0)
    if kind == "read":
        site = chance.choice(["blocks.0.resid_mid", "blocks.2.resid_post", "logits"])
        rows = (ids,) * chance.randint(1, 3)
        return Graph((Run(rows),), (Node("site.read", (), {"site": site}, 0),), (Output("x", 0),))
    if kind == "patch":
        last = Node("site.read", (), {"site": "logits"}, 0)
        return Graph((Run((ids,)),), (constant, write, last), (Output("x", 2),))
    if kind == "wrong":
        nodes = (
            Node("site.read", (), {"site": "blocks.0.resid_post"}, 0),
            Node("argmax", (0,), {"axis": -1}),
            Node("const", (), {"value": TensorData(float32, (1,), bytes(4))}),
            Node("take", (2, 1), {"axis": 0}),
        )
        return Graph((Run((ids * 3,)),), nodes, (Output("x", 3),))
    how = Generation(max_new_tokens=chance.randint(2, 9), eos=False, temperature=chance.choice([0.0, 1.0]), seed=number)
    tokens = Node("run.tokens", (), {"step": how.max_new_tokens}, 0)
    return Graph((Run((ids,), generation=how),), (constant, write, tokens), (Output("x", 2),))


async def test_under_load_everybody_gets_their_own(backend: LocalBackend, hosted: Any) -> None:
    """A hundred requests of five accounts, some wrong, some cancelled: each of the others gets its value alone."""
    engine = Engine(hosted)
    chance = random.Random(7)
    kinds = [chance.choice(["read", "read", "patch", "generate", "generate", "wrong"]) for _ in range(100)]

    def expected(number: int) -> torch.Tensor | type[Exception]:
        values: list[torch.Tensor] = []
        plan = engine.prepare(graph_of(number, kinds[number]), ExecuteOptions(disabled=("continuous_batching",)))

        def take(event: Event) -> None:
            if isinstance(event, TensorValue):
                values.append(to_tensor(event.value))

        try:
            engine.run(plan, take)
        except GraphError as error:
            return type(error)
        return values[0]

    saved = dict.fromkeys(("cobatch", "continuous_batching"), 0)

    async def one(number: int) -> None:
        graph, account = graph_of(number, kinds[number]), f"account{number % 5}"
        if number % 9 == 0:  # goes away as soon as it has begun
            events = backend.execute(graph, ExecuteOptions(), account=account)
            async for event in events:
                if isinstance(event, Started):
                    break
            await events.aclose()  # type: ignore[attr-defined]
            return
        try:
            found, usage = await result(backend, graph, account)
        except GraphError as error:
            assert expected_values[number] is type(error)
            return
        wanted = expected_values[number]
        assert isinstance(wanted, torch.Tensor)
        torch.testing.assert_close(found["x"], wanted, rtol=2e-4, atol=2e-4)
        assert usage.queue_ms >= 0 < usage.run_ms
        for name in saved:
            saved[name] += usage.saved.get(name, 0)

    expected_values = [expected(number) for number in range(100)]
    await asyncio.gather(*map(one, range(100)))
    assert saved["cobatch"] > 0
    assert saved["continuous_batching"] > 0
    assert backend.scheduler.waiting == backend.scheduler.running == 0
    # a hook that stayed would see this
    again, _ = await result(backend, graph_of(1, "read"))
    torch.testing.assert_close(again["x"], _value_of(engine, graph_of(1, "read")), rtol=2e-4, atol=2e-4)


def _value_of(engine: Engine, graph: Graph) -> torch.Tensor:
    values: list[torch.Tensor] = []

    def take(event: Event) -> None:
        if isinstance(event, TensorValue):
            values.append(to_tensor(event.value))

    engine.run(engine.prepare(graph), take)
    return values[0]


async def test_a_deadline_in_the_middle_of_a_shared_forward(backend: LocalBackend, hosted: Any) -> None:
    """A request whose time is over in the middle of a forward hears so; who shared it gets the right values."""
    gate, entered = threading.Event(), threading.Event()
    held: list[int] = []

    def hold(module: Any, args: Any) -> None:
        held.append(1)
        if len(held) == 1:
            entered.set()
            gate.wait(30)
        elif len(held) == 2:  # in the shared forward, between two layers
            late = next(job for job in backend._jobs if job.ticket.account == "late")
            late.stop(DeadlineExceededError("too late"))

    handle = hosted.model.model.layers[1].register_forward_pre_hook(hold)
    try:
        first = asyncio.create_task(result(backend, graph_of(3, "patch")))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait)
        others = [asyncio.create_task(result(backend, graph_of(3, "patch"), a)) for a in ("b", "late", "c")]
        while len(backend._jobs) < 4:
            await asyncio.sleep(0)
        gate.set()
        ends = await asyncio.gather(first, *others, return_exceptions=True)
    finally:
        handle.remove()
    assert isinstance(ends[2], DeadlineExceededError)
    expected = _value_of(Engine(hosted), graph_of(3, "patch"))
    for end in (ends[0], ends[1], ends[3]):
        assert not isinstance(end, BaseException)
        torch.testing.assert_close(end[0]["x"], expected, rtol=2e-4, atol=2e-4)
    assert len(held) == 2  # the three went together


async def test_the_loop_answers_while_a_forward_runs(backend: LocalBackend, hosted: Any) -> None:
    """Small calls are answered by the dozen while one forward is under way, and the forward goes on meanwhile."""
    answered, enough = 0, threading.Event()
    rounds: list[int] = []

    def busy(module: Any, args: Any) -> None:
        weight = torch.randn(192, 192)
        while not enough.is_set() and len(rounds) < 20_000:
            rounds.append(1)
            weight = torch.tanh(weight @ weight)  # real work, as a large layer does it

    handle = hosted.model.model.layers[0].register_forward_pre_hook(busy)
    try:
        task = asyncio.create_task(result(backend, graph_of(5, "read")))
        while not rounds:
            await asyncio.sleep(0)
        before = len(rounds)
        while answered < 24 and not task.done():
            with pytest.raises(PatchbayError):
                await backend.tokenize(["a text for a model without a tokenizer"])
            answered += 1
            await asyncio.sleep(0)
        enough.set()
        await task
    finally:
        enough.set()
        handle.remove()
    assert answered == 24
    assert len(rounds) >= before
