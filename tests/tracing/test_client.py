"""Connections: the background thread, threads side by side, closing, forks, and where address and key come from."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import patchbay as pb
from patchbay.client import Client
from patchbay.credentials import find_api_key, find_target, key_path, split_target
from patchbay.errors import (
    InvalidRequestError,
    MissingExtraError,
    NotFoundError,
    ProtocolError,
    ShapeError,
    TraceError,
    UnavailableError,
    ValueNotReadyError,
)
from patchbay.ir.dtypes import float32
from patchbay.ir.events import Done, Event, ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Graph, TensorData
from patchbay.model import Model
from tests.tracing.conftest import FRANCE, CountingTransport


def threads() -> int:
    """Background threads of clients, those that other tests left to the garbage collector aside."""
    gc.collect()
    return sum(t.name == "patchbay-client" for t in threading.enumerate())


def test_models_and_cards(client: Client) -> None:
    """The list, a model by name, and an unknown name."""
    assert [m.name for m in client.models()] == ["fake"]
    assert client.model("fake").name == "fake"
    with pytest.raises(NotFoundError):
        client.model("no such model")


def test_the_card_is_fetched_once(client: Client, transport: CountingTransport) -> None:
    """Asking for the same model again costs nothing, and texts known to one are known to the other."""
    first, second = client.model("fake"), client.model("fake")
    first.tokenize(FRANCE)
    second.tokenize(FRANCE)
    assert first.core is second.core
    assert transport.tokenized == [[FRANCE]]


def test_connecting_sends_nothing() -> None:
    """An address that nobody answers at is an error at the first call, not before."""
    before = threads()
    with pb.connect("localhost:1", api_key="k", timeout_s=1) as client:
        assert "localhost:1" in repr(client)
    assert threads() == before


def test_a_malformed_address_or_option_is_refused_at_once() -> None:
    """At the line that connects, not at the first call."""
    with pytest.raises(InvalidRequestError, match="not an address"):
        pb.connect("ftp://host:1")
    with pytest.raises(InvalidRequestError, match="key"):
        pb.connect("localhost:1", api_key="a\nb")
    with pytest.raises(TypeError, match="no_such_option"):
        pb.connect_async("localhost:1", no_such_option=1)


def test_closing_ends_the_thread_and_the_transport(transport: CountingTransport) -> None:
    """Once, however often it is closed; afterwards calls say so."""
    before = threads()
    client = Client(transport)
    model = client.model("fake")
    assert threads() == before + 1
    client.close()
    client.close()
    assert threads() == before
    assert transport.closed == 1
    with pytest.raises(TraceError, match="closed"):
        model.tokenize("new text")


def test_a_model_keeps_its_client_alive_and_no_longer(transport: CountingTransport) -> None:
    """`pb.connect(...).model(...)` works without a name for the client; garbage collection closes it."""
    before = threads()
    model: Model | None = Client(transport).model("fake")
    gc.collect()
    assert model is not None
    assert model.tokenize("a").ids
    watched = weakref.ref(model)
    model = None
    gc.collect()
    assert watched() is None
    assert transport.closed == 1
    assert threads() == before


def test_threads_trace_side_by_side(client: Client) -> None:
    """Each thread's trace has its own values and its own lines."""
    model = client.model("fake")

    def work(i: int) -> float:
        with model.trace([1 + i % 15]) as run:
            x = run.embed[0, 0, 0] * 0.0
            for _ in range(i):
                x = x + 1.0
            x.save()
        return float(x.value)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(24))) == list(map(float, range(24)))


def test_two_traces_interleaved_in_one_thread(model: Model) -> None:
    """A trace inside another's block is its own."""
    with model.trace(FRANCE) as outer:
        with model.trace([1, 2]) as inner:
            y = inner.embed.save()
        x = (outer.embed[:, :2] * 0.0 + y.value).save()
    np.testing.assert_array_equal(x.value, y.value)


def test_the_synchronous_client_works_inside_a_running_loop(model: Model) -> None:
    """Notebooks run a loop in the main thread; blocking there is what the user asked for."""

    async def cell() -> tuple[int, ...]:
        with model.trace(FRANCE) as run:
            h = run.embed.save()
        return h.value.shape

    assert asyncio.run(cell()) == (1, 6, 8)


def test_the_clients_own_thread_is_refused(transport: CountingTransport) -> None:
    """Waiting in the loop for the loop would wait for ever."""
    caught: list[Exception] = []

    class Nosy(CountingTransport):
        async def execute(
            self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
        ) -> AsyncIterator[Event]:
            try:
                client.models()
            except TraceError as error:
                caught.append(error)
            async for event in super().execute(model, graph, options, timeout_s=timeout_s):
                yield event

    with Client(Nosy()) as client, client.model("fake").trace(FRANCE) as run:
        run.embed.save()
    assert "connect_async" in str(caught[0])


def test_errors_of_the_server_carry_the_users_line(transport: CountingTransport) -> None:
    """A graph error that only the server finds is joined to the line that made the node."""

    class Strict(CountingTransport):
        async def execute(
            self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
        ) -> AsyncIterator[Event]:
            raise ShapeError("found on the server", node=1, related=(0,))
            yield  # type: ignore[unreachable]

    with Client(Strict()) as client:
        model = client.model("fake")
        with pytest.raises(ShapeError, match=r"found on the server[\s\S]*test_client\.py:\d+") as caught:
            _double(model)
    line = _double.__code__.co_firstlineno
    assert caught.value.location is not None
    assert caught.value.location.endswith(f"test_client.py:{line + 3}")
    assert f"read: run0.embed at tests/tracing/test_client.py:{line + 2}" in str(caught.value).replace(
        str(Path.cwd()) + "/", ""
    )


def _double(model: Model) -> None:
    with model.trace(FRANCE) as run:
        e = run.embed
        e = e * e
        e.save()


def test_a_failed_call_leaves_a_trace_without_values(transport: CountingTransport) -> None:
    """The error is raised where the block ends, and said again when a value is asked for."""

    class Down(CountingTransport):
        async def execute(
            self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
        ) -> AsyncIterator[Event]:
            raise UnavailableError("nobody there")
            yield  # type: ignore[unreachable]

    with Client(Down()) as client:
        with pytest.raises(UnavailableError), client.model("fake").trace(FRANCE) as run:
            h = run.embed.save()
        with pytest.raises(ValueNotReadyError, match="nobody there"):
            _ = h.value


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "without saying that it was done"),
        ([Done(Usage())], "did not send 'embed'"),
        ([TensorValue("embed", TensorData(float32, (1,), bytes(4))), Done(Usage())], r"sent float32\[1\] as 'embed'"),
        ([TensorValue("embed", TensorData(float32, (1, 6, 8), bytes(4))), Done(Usage())], "4 bytes do not hold"),
    ],
)
def test_answers_that_cannot_be_right_are_refused(events: list[Event], message: str) -> None:
    """Missing outputs, other shapes and too few bytes are protocol errors, not wrong numbers."""

    class Odd(CountingTransport):
        async def execute(
            self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
        ) -> AsyncIterator[Event]:
            for event in events:
                yield event

    with (
        Client(Odd()) as client,
        pytest.raises(ProtocolError, match=message),
        client.model("fake").trace(FRANCE) as run,
    ):
        run.embed.save()


def test_a_fork_is_refused_instead_of_hanging() -> None:
    """A used client says what to do in a child process; an unused one works there; the parent's goes on."""
    script = """
import os, warnings
warnings.simplefilter("ignore")
from patchbay.client import Client
from patchbay.errors import TraceError
from patchbay.testing import FakeTransport

used, unused = Client(FakeTransport()), Client(FakeTransport())
model = used.model("fake")
pid = os.fork()
if pid == 0:
    try:
        with model.trace("a b") as run:
            run.embed.save()
    except TraceError as error:
        if "spawn" in str(error) and unused.model("fake").tokenize("a").ids:
            os._exit(7)
    os._exit(1)
_, status = os.waitpid(pid, 0)
with model.trace("a b") as run:
    run.embed.save()
used.close()
print(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_control_c_cancels_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while waiting ends the trace and closes the transport's stream."""
    waiting, closed = threading.Event(), threading.Event()
    main = threading.get_ident()
    wait = Future.result

    def watched(future: Future[object], timeout: float | None = None) -> object:
        if threading.get_ident() == main:
            waiting.set()
        return wait(future, timeout)

    class Endless(CountingTransport):
        async def execute(
            self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
        ) -> AsyncIterator[Event]:
            try:
                await asyncio.to_thread(waiting.wait, 5)
                signal.pthread_kill(main, signal.SIGINT)
                await asyncio.Event().wait()
                yield  # type: ignore[misc]
            finally:
                closed.set()

    with Client(Endless()) as client:
        model = client.model("fake")
        model.tokenize(FRANCE)  # so that the execution is all that is waited for
        monkeypatch.setattr(Future, "result", watched)
        with pytest.raises(KeyboardInterrupt), model.trace(FRANCE) as run:
            h = run.embed.save()
        assert closed.wait(5)
        with pytest.raises(ValueNotReadyError, match="KeyboardInterrupt"):
            _ = h.value


def test_leaving_python_without_closing_is_quiet() -> None:
    """A program that never closes its client ends at once and prints nothing."""
    script = "from patchbay.testing import fake_client; m = fake_client().model('fake'); print(m.name)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("fake\n", "", 0)


def test_local_without_the_server_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setitem(sys.modules, "patchbay_server.serving.local", None)
    with pytest.raises(MissingExtraError, match=r"patchbay\[server\]"):
        pb.local(object())


# --- credentials --------------------------------------------------------------------------------------------------


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then the environment, then this machine."""
    monkeypatch.delenv("PATCHBAY_URL", raising=False)
    assert find_target(None) == "localhost:9000"
    monkeypatch.setenv("PATCHBAY_URL", "host:1234")
    assert find_target(None) == "host:1234"
    assert find_target("other:1") == "other:1"


@pytest.mark.parametrize(
    ("target", "host", "port"),
    [
        ("localhost:9000", "localhost", 9000),
        ("LOCALHOST", "localhost", 9000),
        ("grpcs://example.org:443/", "example.org", 443),
        ("[::1]:9001", "::1", 9001),
        ("::1", "::1", 9000),
    ],
)
def test_hosts_and_ports(target: str, host: str, port: int) -> None:
    """Of every form that a target may have."""
    assert split_target(target) == (host, port)


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The argument, then the environment, then the file that the local server left; never a file for another host."""
    monkeypatch.delenv("PATCHBAY_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert find_api_key("localhost:9100") is None
    path = key_path(9100)
    assert path == tmp_path / "patchbay" / "keys" / "9100"
    path.parent.mkdir(parents=True)
    path.write_text("from-file\n", encoding="utf-8")
    assert find_api_key("localhost:9100") == "from-file"
    assert find_api_key("127.0.0.1:9100") == "from-file"
    assert find_api_key("localhost:9101") is None
    assert find_api_key("example.org:9100") is None
    monkeypatch.setenv("PATCHBAY_API_KEY", "from-env")
    assert find_api_key("localhost:9100") == "from-env"
    assert find_api_key("localhost:9100", "given") == "given"
