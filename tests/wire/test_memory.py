"""Memory of large results: used again once nobody looks at it, and never before."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from patchbay.arrays import shared_data, view_of
from patchbay.errors import ProtocolError
from patchbay.ir.dtypes import bfloat16, float32
from patchbay.ir.events import Done, Event, ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Graph, TensorData
from patchbay.transport.grpc import GrpcTransport
from patchbay.wire.events import EventDecoder, encode_event
from patchbay.wire.memory import KEPT_ABOVE_BYTES, MAX_SLACK, ResultMemory
from tests.wire.conftest import KEY
from tests.wire.fakes import FakeBackend

SIZE = KEPT_ABOVE_BYTES


def taken(memory: ResultMemory, size: int = SIZE) -> Any:
    """An array over memory that was taken, as results are."""
    return np.frombuffer(memory.take(size), np.uint8)


def address_of(array: Any) -> int:
    """Where it lies."""
    found: int = array.__array_interface__["data"][0]
    return found


def messages_of(values: Any) -> list[bytes]:
    """What says that a result is `values`."""
    event = TensorValue("x", shared_data(values))
    return [message.SerializeToString(deterministic=True) for message in encode_event(event)]


def received(messages: list[bytes], memory: ResultMemory | None) -> Any:
    """The result that they say, as the user gets it."""
    decoder = EventDecoder(memory=memory)
    (event,) = [event for message in messages if (event := decoder.feed_bytes(message)) is not None]
    assert isinstance(event, TensorValue)
    return view_of(event.value)


def test_a_result_lies_where_one_lay_that_is_gone() -> None:
    """The memory of a result that nobody looks at any more is the next one's."""
    memory = ResultMemory()
    first = taken(memory)
    where = address_of(first)
    del first
    assert memory.kept_bytes == SIZE
    second = taken(memory)
    assert address_of(second) == where
    assert memory.kept_bytes == 0


@pytest.mark.parametrize(
    "look",
    [
        lambda data: np.frombuffer(data, np.uint8)[7:9],
        lambda data: np.frombuffer(data, np.float32).reshape(2, -1).T,
        lambda data: np.frombuffer(data, np.float32).reshape(-1, 2)[:, 0].view(np.int32),
        lambda data: view_of(TensorData(bfloat16, (SIZE // 2,), data))[:2],
        lambda data: data[3:].cast("B"),
        lambda data: np.frombuffer(data, np.uint8).data,
        lambda data: np.asarray(data),
    ],
    ids=["slice", "transposed", "strided", "bfloat16", "cast", "memoryview", "asarray"],
)
def test_whatever_looks_at_a_result_keeps_its_memory(look: Callable[[memoryview], Any]) -> None:
    """While a view of any kind is left, the next result lies elsewhere; when it is gone, the memory is back."""
    memory = ResultMemory()
    view = look(memory.take(SIZE))
    gc.collect()
    other = taken(memory)
    other[:] = 255
    assert not np.shares_memory(np.asarray(view), other)
    assert memory.kept_bytes == 0
    del view
    gc.collect()
    assert memory.kept_bytes == SIZE


def test_results_are_the_same_with_and_without_memory_that_is_used_again() -> None:
    """A hundred results of changing sizes, some of them held for a while: each keeps its values as long as it lives."""
    chooser = random.Random(5)
    memory = ResultMemory(3 * SIZE)
    held: list[tuple[Any, Any]] = []
    again = 0
    for number in range(100):
        count = SIZE // 4 + chooser.choice([0, 0, 1, 1_000, SIZE // 20, SIZE])
        messages = messages_of(np.arange(number, number + count, dtype=np.float32))
        before = memory.kept_bytes
        found, plain = received(messages, memory), received(messages, None)
        again += memory.kept_bytes < before
        assert found.dtype == plain.dtype
        np.testing.assert_array_equal(found, plain)
        held.append((found, plain))
        del found, plain
        while len(held) > chooser.randrange(4):
            kept, same = held.pop(chooser.randrange(len(held)))
            np.testing.assert_array_equal(kept, same)
    assert again > 30


def test_after_a_result_that_broke_off_the_next_one_is_whole() -> None:
    """What came before a damaged chunk is never seen: the next result, in the same memory, has its own values."""
    memory = ResultMemory()
    values = np.arange(SIZE // 4, dtype=np.float32)
    messages = messages_of(values)
    damaged = bytearray(messages[3])
    damaged[100] ^= 1
    with pytest.raises(ProtocolError, match="damaged"):
        received([*messages[:3], bytes(damaged)], memory)
    gc.collect()
    assert memory.kept_bytes == SIZE
    np.testing.assert_array_equal(received(messages_of(values[::-1].copy()), memory), values[::-1])


def test_nearly_the_same_sizes_take_turns_and_others_do_not() -> None:
    """Memory serves results a little smaller than itself; larger and much smaller ones get memory of their own."""
    memory = ResultMemory()
    large = SIZE * 2
    first = taken(memory, large)
    where = address_of(first)
    del first
    second = taken(memory, int(large / MAX_SLACK) + 1)
    assert address_of(second) == where
    del second
    for size in (large + 1, int(large / MAX_SLACK) - 1):
        other = taken(memory, size)
        assert memory.kept_bytes >= large
        del other
    assert address_of(taken(memory, large)) == where


def test_no_more_is_kept_than_allowed_and_the_oldest_goes_first() -> None:
    """Beyond the bound the memory that has waited longest is let go, and memory beyond it is not kept at all."""
    memory = ResultMemory(2 * SIZE)
    results = [taken(memory, SIZE + step) for step in range(3)]
    while results:
        del results[0]
    assert memory.kept_bytes == SIZE + 2  # three of them are a few bytes too many, and so are two
    assert len(taken(memory, 3 * SIZE)) == 3 * SIZE
    assert memory.kept_bytes == SIZE + 2


@pytest.mark.parametrize(("size", "most"), [(SIZE - 1, 2**30), (SIZE, 0), (SIZE, SIZE - 1)])
def test_small_results_and_switched_off(size: int, most: int) -> None:
    """Results that are small, or larger than what is kept, are ordinary memory; with 0 all of them are."""
    memory = ResultMemory(most)
    array = taken(memory, size)
    array[:] = 3
    del array
    assert memory.kept_bytes == 0


def test_closing_lets_go_and_leaves_results_alone() -> None:
    """After the connection is closed nothing is kept, and results that are in use are as they were."""
    memory = ResultMemory()
    kept, used = taken(memory), taken(memory)
    used[:] = 7
    del kept
    memory.close()
    assert memory.kept_bytes == 0
    assert used.min() == used.max() == 7
    del used
    assert memory.kept_bytes == 0


def test_results_may_end_in_any_thread() -> None:
    """Results that other threads let go of while more are received come back, and nobody's values are touched."""
    memory = ResultMemory(8 * SIZE)
    errors: list[str] = []
    held: list[tuple[int, Any]] = []
    done = threading.Event()

    def let_go() -> None:
        while not done.is_set() or held:
            try:
                number, array = held.pop()
            except IndexError:
                continue
            if array[0] != number or array[-1] != number:
                errors.append(f"{number} became {array[0]}")

    threads = [threading.Thread(target=let_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        array = taken(memory)
        array[:: SIZE // 64] = array[-1] = number
        held.append((number, array))
        del array
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert SIZE <= memory.kept_bytes <= 8 * SIZE


def test_a_result_in_new_memory_takes_no_more_than_itself() -> None:
    """Values of exactly the least size that is kept come back as they were sent, in an array of their own size."""
    values = np.arange(SIZE // 4, dtype=np.float32)
    found = received(messages_of(values), ResultMemory())
    assert found.nbytes == SIZE
    assert shared_data(found).dtype == float32
    np.testing.assert_array_equal(found, values)


async def test_over_a_connection_results_are_the_same_either_way(
    backend: FakeBackend, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten executions of two results: equal with memory that is used again and without, and so are earlier ones."""
    sent: list[Any] = []

    def events(graph: Graph, options: ExecuteOptions) -> list[Event]:
        sent[:] = [np.random.default_rng(len(held) + i).standard_normal(SIZE // 8 + i) for i in range(2)]
        return [*(TensorValue(name, shared_data(a)) for name, a in zip("ab", sent, strict=True)), Done(Usage())]

    held: list[tuple[Any, Any]] = []
    monkeypatch.setattr(backend, "events", events)
    connections = [GrpcTransport(address, api_key=KEY), GrpcTransport(address, api_key=KEY, kept_bytes=0)]
    places = set()
    for _ in range(10):
        for transport in connections:
            async for event in transport.execute("fake", Graph((), (), ()), ExecuteOptions()):
                if isinstance(event, TensorValue):
                    held.append((view_of(event.value), sent["ab".index(event.name)]))
                    if transport is connections[0]:
                        places.add(address_of(held[-1][0]))
        for found, expected in held:
            np.testing.assert_array_equal(found, expected)
        del held[:-3], found, event
    assert len(places) < 10
    for transport in connections:
        await transport.close()
