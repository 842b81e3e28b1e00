"""How long results live: as long as somebody looks at them, and no longer."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import patchbay as pb
from patchbay.client import AsyncClient
from patchbay.model import Model
from patchbay.testing import FakeTransport
from tests.tracing.conftest import FRANCE, ITALY


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """The garbage collector stays away: what dies, dies because nobody refers to it."""
    gc.disable()
    yield
    gc.enable()


def saved_by_name(model: Model) -> Any:
    """A result of a trace with two runs."""
    with model.trace() as t:
        first, second = t.run(FRANCE), t.run([ITALY, FRANCE])
        second.blocks[0].resid_post[:, -1] = first.blocks[0].resid_post[:, -1]
        t.save(found={"a": second.logits[:, -1], "b": [first.embed]}, label="x")
    return t.results.found["a"]


def saved_by_itself(model: Model) -> Any:
    """A value of a trace of one run."""
    with model.trace(FRANCE) as run:
        value = run.blocks[1].resid_post.save()
    return value.value


def of_no_run(model: Model) -> Any:
    """A result that no run has part in."""
    with model.trace() as t:
        t.save(x=pb.ops.arange(1_000, dtype="float32"))
    assert "saves x" in repr(t)
    return t.results.x


@pytest.mark.parametrize("make", [saved_by_name, saved_by_itself, of_no_run])
def test_results_end_with_the_last_reference_to_them(model: Model, make: Callable[[Model], Any]) -> None:
    """Once a trace, its runs and its results are let go of, the arrays are gone, without the garbage collector."""
    array = make(model)
    assert array.size
    last = weakref.ref(array)
    del array
    assert last() is None


def test_results_of_an_awaited_trace_end_so_too() -> None:
    """The same for a trace that is awaited."""

    async def use() -> Any:
        async with AsyncClient(FakeTransport()) as client:
            model = await client.model("fake")
            async with model.trace() as t:
                run = await t.run(FRANCE)
                t.save(h=run.blocks[1].resid_post)
            return weakref.ref(t.results.h)

    last = asyncio.run(use())
    gc.collect()  # asyncio's own circles, which hold the trace's frame
    assert last() is None


def test_a_value_keeps_its_trace_and_a_trace_its_runs(model: Model) -> None:
    """Whatever is held still leads to the rest: a value to its numbers, a run to its trace, a trace to all its runs."""
    with model.trace() as t:
        kept = t.run(FRANCE, label="one")
        t.run([ITALY, FRANCE])
        value = kept.logits.save()
    trace, array = t, t.results[next(iter(t.results))]
    del t
    assert value.value is array
    assert kept.trace is trace
    assert [(run.index, run.label, run.rows) for run in trace.runs] == [(0, "one", 1), (1, trace.runs[1].label, 2)]
    assert all(run.trace is trace for run in trace.runs)
    assert trace.runs[0].tokens == kept.tokens
    assert trace.runs[1].mask.shape == (2, trace.runs[1].seq)
