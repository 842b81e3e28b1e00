"""The asynchronous twin: the same traces with `async with` and `await`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from patchbay.client import AsyncClient
from patchbay.errors import CausalityError, TraceError, ValueNotReadyError
from patchbay.ir.events import Event, ExecuteOptions
from patchbay.ir.graph import Graph
from patchbay.model import AsyncModel
from patchbay.testing import fake_client
from tests.tracing.conftest import FRANCE, ITALY, CountingTransport


@pytest.fixture
async def model(transport: CountingTransport) -> AsyncIterator[AsyncModel]:
    async with AsyncClient(transport) as client:
        yield await client.model("fake")


async def test_one_run(model: AsyncModel) -> None:
    """`async with model.trace(text) as run`."""
    async with model.trace(FRANCE) as run:
        h = run.blocks[1].resid_post[:, -1].save()
    assert h.value.shape == (1, 8)


async def test_many_runs(model: AsyncModel) -> None:
    """`await t.run(text)`, saves, estimates and usage."""
    async with model.trace() as t:
        a, b = await t.run(FRANCE), await t.run(ITALY)
        b.blocks[0].resid_post[:, -1] = a.blocks[0].resid_post[:, -1]
        t.save(p=b.logits[:, -1].softmax(-1))
        assert (await t.estimate()).result_bytes == (await t.estimate(remote=True)).result_bytes == 64
    assert t.results["p"].shape == (1, 16)
    assert t.usage.passes == 2


async def test_an_exception_sends_nothing(model: AsyncModel, transport: CountingTransport) -> None:
    """Leaving the block by an exception, or with a graph that is wrong, executes nothing."""
    with pytest.raises(KeyError):
        async with model.trace(FRANCE) as run:
            h = run.embed.save()
            raise KeyError
    with pytest.raises(CausalityError, match="read: run0"):
        async with model.trace(FRANCE) as run:
            run.blocks[0].resid_post = run.blocks[1].resid_post
            run.embed.save()
    assert transport.executed == []
    with pytest.raises(ValueNotReadyError):
        _ = h.value


async def test_tokens(model: AsyncModel) -> None:
    """Tokenizing and single tokens are awaited."""
    assert (await model.tokenize(FRANCE)).strings[-1] == "is"
    assert len(await model.tokenize([FRANCE, ITALY])) == 2
    assert await model.to_single_token("is") == (await model.tokenize("is")).ids[-1]


async def test_traces_side_by_side(model: AsyncModel) -> None:
    """Many traces of one loop keep their results apart."""

    async def one(i: int) -> float:
        async with model.trace([1 + i % 15]) as run:
            x = (run.embed[0, 0, 0] * 0.0 + i).save()
        return float(x.value)

    assert await asyncio.gather(*(one(i) for i in range(20))) == list(map(float, range(20)))


async def test_progress_is_called_in_the_loop(model: AsyncModel) -> None:
    """Events come as they are read."""
    names: list[str] = []
    async with model.trace(FRANCE, progress=lambda event: names.append(type(event).__name__)) as run:
        run.embed.save()
    assert names == ["Started", "Progress", "TensorValue", "Done"]
    assert threading.current_thread() is threading.main_thread()


async def test_cancelling_closes_the_stream() -> None:
    """A cancelled task closes the transport's iterator, which is how a call is cancelled."""
    started, closed = asyncio.Event(), asyncio.Event()

    class Slow(CountingTransport):
        async def execute(
            self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
        ) -> AsyncIterator[Event]:
            try:
                started.set()
                await asyncio.Event().wait()
                yield  # type: ignore[misc]
            finally:
                closed.set()

    async with AsyncClient(Slow()) as client:
        model = await client.model("fake")

        async def work() -> None:
            async with model.trace(FRANCE) as run:
                run.embed.save()

        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(closed.wait(), 60)


async def test_a_closed_client_says_so(model: AsyncModel, transport: CountingTransport) -> None:
    """After `close` nothing is asked of the transport."""
    await model.core._connection.close()
    with pytest.raises(TraceError, match="closed"):
        await model.tokenize("new")
    assert transport.closed == 1


def test_one_loop_only(transport: CountingTransport) -> None:
    """A connection made in one loop is refused in another, with advice."""
    client = AsyncClient(transport)
    asyncio.run(client.model("fake"))  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="event loop"):
        asyncio.run(client.models())  # type: ignore[arg-type]


async def test_mistakes_name_the_line_that_awaits(model: AsyncModel) -> None:
    """An input that is none, an argument of another type, and the other kind of with block."""
    async with model.trace() as t:
        with pytest.raises(TraceError, match="a run takes a text") as caught:
            await t.run(None)
        assert "test_async.py:" in str(caught.value)
        with pytest.raises(TraceError, match="max_new_tokens is an integer") as caught:
            await t.generate(FRANCE, max_new_tokens="x")  # type: ignore[arg-type]
        assert "test_async.py:" in str(caught.value)
    with pytest.raises(TraceError, match="async with"), model.trace(FRANCE):  # type: ignore[attr-defined]
        pass
    with fake_client() as client, pytest.raises(TraceError, match="this model blocks"):
        async with client.model("fake").trace(FRANCE):  # type: ignore[attr-defined]
            pass
