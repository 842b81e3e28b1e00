"""Calls through each transport: the same answers, the same errors, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import grpc
import grpc.aio
import pytest

from patchbay.errors import (
    GRAPH_ERROR_BY_REASON,
    SERVICE_ERROR_BY_CODE,
    AbortedError,
    DeadlineExceededError,
    GraphError,
    InternalServerError,
    InvalidRequestError,
    LimitExceededError,
    NotFoundError,
    PatchbayError,
    ProtocolError,
    RequestRangeError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from patchbay.ir.dtypes import float32
from patchbay.ir.events import ChatMessage, Done, Event, ExecuteOptions, Progress, Queued, Started, TensorValue, Usage
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.transport.base import Transport
from patchbay.transport.grpc import GrpcTransport, split_target
from patchbay.transport.local import LocalTransport
from patchbay.v1 import service_pb2
from patchbay.wire.parse import parse, serialize
from patchbay_server.transport.context import set_error
from patchbay_server.transport.servicer import Servicer
from tests.wire.conftest import KEY, Service
from tests.wire.fakes import FakeBackend

GRAPH = Graph(
    runs=(Run(((0, 1, 2),)),),
    nodes=(Node("site.read", attrs={"site": "blocks.0.resid_post"}, run=0),),
    outputs=(Output("h", 0),),
)
OPTIONS = ExecuteOptions()


async def _collect(transport: Transport, graph: Graph = GRAPH, timeout_s: float | None = None) -> list[Event]:
    return [e async for e in transport.execute("fake", graph, OPTIONS, timeout_s=timeout_s)]


# --- the same over every transport --------------------------------------------------------------------------------


async def test_models_cards_and_tokens(service: Service) -> None:
    """Summaries, cards and token rows arrive equal to the backend's own."""
    assert await service.transport.list_models() == (service.backend.summary,)
    assert await service.transport.get_model("fake") == service.backend.card
    texts = ["the cat sat", "", "ünïcödé 🐍"]
    for special in (True, False):
        rows = await service.transport.tokenize("fake", texts, add_special_tokens=special)
        assert rows == service.backend.model.tokenize(texts, special)


async def test_render_chats(service: Service) -> None:
    """Conversations come back as texts, in order, through every transport."""
    chats = [[ChatMessage("system", "be brief"), ChatMessage("user", "hé")], [ChatMessage("user", "")]]
    texts = await service.transport.render_chats("fake", chats)
    assert texts == service.backend.model.render_chats(chats)
    with pytest.raises(ProtocolError, match="lone surrogates"):
        await service.transport.render_chats("fake", [[ChatMessage("user", "\ud800")]])


async def test_prepend_bos(service: Service) -> None:
    """The switch reaches the tokenizer, and its absence is not a value."""
    for flag, ids in ((True, 2), (False, 1), (None, 2)):
        (row,) = await service.transport.tokenize("fake", ["cat"], prepend_bos=flag)
        assert len(row.ids) == ids


async def test_token_strings(service: Service) -> None:
    """Token ids come back with their strings; ids that are none are refused on the client."""
    row = await service.transport.token_strings("fake", [0, 3, 3])
    assert row == service.backend.model.token_strings([0, 3, 3])
    for ids in ([2**63], ["a"]):
        with pytest.raises(RequestRangeError, match="not token ids"):
            await service.transport.token_strings("fake", ids)  # type: ignore[arg-type]


async def test_execution(service: Service) -> None:
    """A graph's events arrive equal to the backend's own, under the account of the key."""
    assert await _collect(service.transport) == list(service.backend.model.execute(GRAPH, OPTIONS))
    assert service.backend.accounts == ["ada"]
    assert service.backend.closed == 1


async def test_large_results(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of every kind, and tensors of many chunks, arrive in order and whole."""
    big = TensorData(float32, (3, 2**19 + 7), bytes(range(256)) * ((3 * (2**19 + 7) * 4) // 256) + b"x" * 84)
    events = [Queued(3), Queued(0), Started(), Progress(1, 2), TensorValue("a", big), TensorValue("b", big, False)]
    events.append(Done(Usage(tokens=3, saved={"x": 1})))
    monkeypatch.setattr(service.backend, "events", lambda graph, options: events)
    before = service.transport.bytes_received
    assert await _collect(service.transport) == events
    assert service.transport.bytes_received - before > 2 * big.nbytes
    assert service.transport.bytes_sent > 0


async def test_the_graph_arrives_as_it_was_sent(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph and options reach the backend equal to what the client sent."""
    seen: list[object] = []

    def record(graph: Graph, options: ExecuteOptions) -> list[Event]:
        seen.extend((graph, options))
        return [Done(Usage())]

    monkeypatch.setattr(service.backend, "events", record)
    options = ExecuteOptions(deterministic=True, disabled=("a", "b"), dry_run=True)
    async for _ in service.transport.execute("fake", GRAPH, options, timeout_s=30):
        pass
    assert seen == [GRAPH, options]


def _raiser(error: BaseException) -> object:
    def events(graph: Graph, options: ExecuteOptions) -> Iterator[Event]:
        yield Started()
        raise error

    return events


@pytest.mark.parametrize("cls", [*GRAPH_ERROR_BY_REASON.values(), *SERVICE_ERROR_BY_CODE.values(), ProtocolError])
async def test_errors_arrive_as_themselves(
    service: Service, monkeypatch: pytest.MonkeyPatch, cls: type[PatchbayError]
) -> None:
    """Whatever exception of ours the backend raises, the client raises the same class with the same message."""
    error = cls("it went wrong: é", node=3) if issubclass(cls, GraphError) else cls("it went wrong: é")
    monkeypatch.setattr(service.backend, "events", _raiser(error))
    with pytest.raises(cls, match="it went wrong: é") as caught:
        await _collect(service.transport)
    assert type(caught.value) is cls
    assert caught.value.__cause__ is None
    if isinstance(caught.value, GraphError):
        assert caught.value.node == 3


async def test_errors_of_any_length_arrive_whole(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error far longer than a header may be arrives whole, because it is also the stream's last event."""
    error = LimitExceededError("x" * 50_000, related=range(500), limit="max_tokens", allowed=1, requested=2)
    monkeypatch.setattr(service.backend, "events", _raiser(error))
    with pytest.raises(LimitExceededError) as caught:
        await _collect(service.transport)
    assert len(caught.value.message) == 50_000
    assert caught.value.related == tuple(range(500))


async def test_unknown_exceptions_become_an_incident(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in the server reaches the user as a number that is in the log, without a word of what happened."""
    monkeypatch.setattr(service.backend, "events", _raiser(RuntimeError("/secret/path and a password")))
    with pytest.raises(InternalServerError) as caught:
        await _collect(service.transport)
    assert "secret" not in repr(vars(caught.value))
    assert caught.value.metadata["incident"] in caplog.text
    assert caught.value.metadata["incident"] in str(caught.value)
    assert "a password" in caplog.text


async def test_unknown_models(service: Service) -> None:
    """A model that is not there is NOT_FOUND in every call, and the message names those that are."""
    transport = service.transport
    calls = [transport.get_model("nope"), transport.tokenize("nope", ["a"])]
    calls.append(anext(transport.execute("nope", GRAPH, OPTIONS, timeout_s=None)))
    for call in calls:
        with pytest.raises(NotFoundError, match="it hosts: fake"):
            await call


async def test_closing_the_iteration_cancels_the_backend(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the client stops iterating, the backend's iterator is closed although it would never end."""
    closed = asyncio.Event()

    async def forever(*args: object, **kwargs: object) -> AsyncIterator[Event]:
        try:
            yield Started()
            await asyncio.Event().wait()
        finally:
            closed.set()

    monkeypatch.setattr(service.backend, "execute", forever)
    async with aclosing(service.transport.execute("fake", GRAPH, OPTIONS, timeout_s=None)) as events:  # type: ignore[type-var]
        assert await anext(events) == Started()
    await asyncio.wait_for(closed.wait(), 60)


async def test_cancelling_the_task_cancels_the_backend(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the task that iterates is cancelled, the backend's iterator is closed and CancelledError passes through."""
    started, closed = asyncio.Event(), asyncio.Event()

    async def forever(*args: object, **kwargs: object) -> AsyncIterator[Event]:
        try:
            started.set()
            await asyncio.Event().wait()
            yield Started()
        finally:
            closed.set()

    monkeypatch.setattr(service.backend, "execute", forever)
    task = asyncio.ensure_future(_collect(service.transport))
    await asyncio.wait_for(started.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(closed.wait(), 60)


async def test_a_failed_call_leaves_the_next_one_right(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error the same connection serves the next call."""
    with monkeypatch.context() as patch:
        patch.setattr(service.backend, "events", _raiser(RuntimeError("bug")))
        with pytest.raises(InternalServerError):
            await _collect(service.transport)
    assert isinstance((await _collect(service.transport))[-1], Done)


async def test_closed_transports_refuse(service: Service) -> None:
    """After close every call is an UnavailableError, and closing again is harmless."""
    await service.transport.close()
    await service.transport.close()
    with pytest.raises(UnavailableError, match="has been closed"):
        await service.transport.list_models()
    with pytest.raises(UnavailableError, match="has been closed"):
        await _collect(service.transport)


async def test_many_calls_at_once(service: Service) -> None:
    """A hundred concurrent executions on one connection each get their own answer."""
    graphs = [Graph((Run(((0, i),)),), GRAPH.nodes, GRAPH.outputs) for i in range(16)] * 6
    answers = await asyncio.gather(*(_collect(service.transport, graph) for graph in graphs))
    assert answers == [list(service.backend.model.execute(graph, OPTIONS)) for graph in graphs]


async def test_wrong_keys(service: Service) -> None:
    """Without a key, or with a wrong one, every call is UNAUTHENTICATED and says how to give a key; nothing runs."""
    for key in (None, "wrong", "", KEY + "x"):
        if service.address:
            stranger: Transport = GrpcTransport(service.address, api_key=key)
        else:
            stranger = LocalTransport(service.servicer, key)
        with pytest.raises(UnauthenticatedError, match="PATCHBAY_API_KEY"):
            await stranger.list_models()
        with pytest.raises(UnauthenticatedError, match="PATCHBAY_API_KEY"):
            await _collect(stranger)
        await stranger.close()
    assert service.backend.started == 0


# --- gRPC only ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _server(**handlers: object) -> AsyncIterator[str]:
    """A gRPC server whose methods are raw functions of (bytes, context)."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    methods = {
        name: (
            grpc.unary_stream_rpc_method_handler(handler)
            if name == "Execute"
            else grpc.unary_unary_rpc_method_handler(handler)
        )
        for name, handler in handlers.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("patchbay.v1.PatchbayService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def _connected(address: str, **kwargs: object) -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(address, **kwargs)  # type: ignore[arg-type]
    try:
        yield transport
    finally:
        await transport.close()


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK], ids=lambda c: c.name)
async def test_every_status_code_is_translated(code: grpc.StatusCode) -> None:
    """Each gRPC status, from a server without our details, becomes its own exception in both kinds of call."""

    async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(code, "as told")
        raise AssertionError

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        await context.abort(code, "as told")
        yield b""

    async with _server(GetModel=unary, Execute=stream) as address, _connected(address) as transport:
        for call in (transport.get_model("m"), _collect(transport)):
            with pytest.raises(ServiceError) as caught:
                await call
            assert type(caught.value) is SERVICE_ERROR_BY_CODE[code.name]
            assert not isinstance(caught.value, grpc.RpcError)
            assert caught.value.__suppress_context__


async def test_a_model_without_an_application() -> None:
    """Where the ingress knows no application of a model's name, `control` is asked which models there are."""

    async def ingress(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        if dict(context.invocation_metadata() or ())["application"] != "control":
            await context.abort(grpc.StatusCode.NOT_FOUND, "Application 'demoo' not found. Ping ListApplications.")
        set_error(context, NotFoundError("no model 'demoo'; did you mean 'demo'?", reason="MODEL_NOT_FOUND"))
        return b""

    async with _server(GetModel=ingress) as address, _connected(address) as transport:
        with pytest.raises(NotFoundError, match="did you mean 'demo'") as caught:
            await transport.get_model("demoo")
        assert caught.value.reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
        (grpc.StatusCode.UNAVAILABLE, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),
        (grpc.StatusCode.UNKNOWN, "Received http2 header with status: 500"),
    ],
    ids=["cancelled", "unavailable", "a server that stops", "a proxy without a server"],
)
async def test_a_stream_that_is_broken_off(code: grpc.StatusCode, details: str) -> None:
    """A replica that dies while it runs a graph is told as that, not as a request that the user cancelled."""

    async def dying(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield serialize(service_pb2.ExecuteResponse(started={}))
        await context.abort(code, details)

    async with _server(Execute=dying) as address, _connected(address) as transport:
        with pytest.raises(UnavailableError, match="broke off the call.*Run it again"):
            await _collect(transport)


async def test_nobody_listens() -> None:
    """When nothing answers, the error says where, and what to try next."""
    async with _connected("127.0.0.1:1") as transport:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*patchbay serve.*patchbay doctor"):
            await transport.list_models()
        with pytest.raises(UnavailableError, match="patchbay doctor"):
            await _collect(transport)


async def test_deadlines(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that outlasts its deadline is a DeadlineExceededError, and the backend is told to stop."""
    begun, closed = asyncio.Event(), asyncio.Event()

    async def forever(*args: object, **kwargs: object) -> AsyncIterator[Event]:
        begun.set()
        try:
            await asyncio.Event().wait()
            yield Started()
        finally:
            closed.set()

    monkeypatch.setattr(service.backend, "execute", forever)
    for timeout_s in (0.2, 2.0, 20.0):  # where the machine is busy, a short one passes before the backend hears of it
        with pytest.raises(DeadlineExceededError, match=f"did not finish within {timeout_s:g} s"):
            await _collect(service.transport, timeout_s=timeout_s)
        if begun.is_set():
            break
    await asyncio.wait_for(closed.wait(), 60)


async def test_deadlines_leave_the_callers_own_code_alone(service: Service) -> None:
    """A deadline that passes while the caller does something else between two events does not cancel the caller."""
    with pytest.raises(DeadlineExceededError):
        async for event in service.transport.execute("fake", GRAPH, OPTIONS, timeout_s=0.2):
            assert event == Started()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.4)


async def test_routing_metadata() -> None:
    """Calls about a model carry its name as `application`, ListModels `control`, and all of them the key."""
    seen: dict[str, dict[str, str]] = {}

    def unary(name: str, response: bytes) -> object:
        async def handler(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            seen[name] = dict(context.invocation_metadata() or ())
            return response

        return handler

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        seen["Execute"] = dict(context.invocation_metadata() or ())
        yield serialize(service_pb2.ExecuteResponse(done={}))

    handlers = {"ListModels": unary("ListModels", b""), "Tokenize": unary("Tokenize", b""), "Execute": stream}
    async with _server(**handlers) as address, _connected(address, api_key="k") as transport:
        await transport.list_models()
        await transport.tokenize("fake", [])
        await _collect(transport)
    assert {name: m["application"] for name, m in seen.items()} == {
        "ListModels": "control",
        "Tokenize": "fake",
        "Execute": "fake",
    }
    assert all(m["authorization"] == "Bearer k" for m in seen.values())
    assert all(m["user-agent"].startswith("patchbay/") for m in seen.values())


async def test_idempotent_calls_are_retried_by_grpc() -> None:
    """ListModels survives servers that are briefly unavailable, without a loop of ours."""
    calls = 0

    async def flaky(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        return b""

    async with _server(ListModels=flaky) as address, _connected(address) as transport:
        assert await transport.list_models() == ()
    assert calls == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
async def test_a_lost_execution_is_sent_once_more_with_its_id(code: grpc.StatusCode) -> None:
    """An Execute that dies before its first event is sent again with the same request_id, once."""
    requests: list[service_pb2.ExecuteRequest] = []
    succeed_at = 2

    async def flaky(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        requests.append(parse(service_pb2.ExecuteRequest, request))
        if len(requests) != succeed_at:
            await context.abort(code, "replica gone")
        yield serialize(service_pb2.ExecuteResponse(done={}))

    async with _server(Execute=flaky) as address, _connected(address) as transport:
        assert await _collect(transport) == [Done(Usage())]
        assert len(requests) == 2
        assert requests[0] == requests[1]
        assert len(requests[0].request_id) == 36
        requests.clear()
        succeed_at = -1
        with pytest.raises(SERVICE_ERROR_BY_CODE[code.name]):
            await _collect(transport)
        assert len(requests) == 2


async def test_an_execution_that_was_heard_is_not_sent_again() -> None:
    """After the first event a lost stream is an error: a second answer could not be told from the first."""
    calls = 0

    async def dies(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        yield serialize(service_pb2.ExecuteResponse(started={}))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "replica gone")

    async with _server(Execute=dies) as address, _connected(address) as transport:
        with pytest.raises(UnavailableError):
            await _collect(transport)
    assert calls == 1


@pytest.mark.parametrize("error", [InternalServerError("bug", reason="INCIDENT"), AbortedError("again")])
async def test_what_the_server_reports_itself_is_not_sent_again(error: ServiceError) -> None:
    """An INTERNAL with a reason, or any other status, would only happen again."""
    calls = 0

    async def fails(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        set_error(context, error)
        for never in ():
            yield never

    async with _server(Execute=fails) as address, _connected(address) as transport:
        with pytest.raises(type(error), match=str(error)):
            await _collect(transport)
    assert calls == 1


@pytest.mark.parametrize(
    "answer",
    [b"\xff\xff\xff", b"\x00" * 100, serialize(service_pb2.ExecuteResponse()), b"\x0a\xff"],
    ids=["garbage", "zeros", "no event", "truncated"],
)
async def test_hostile_answers_are_protocol_errors(answer: bytes) -> None:
    """Bytes that are no message, from a broken server, are ProtocolErrors on the client."""

    async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return answer

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield answer

    async with _server(GetModel=unary, Execute=stream) as address, _connected(address) as transport:
        for call in (transport.get_model("m"), _collect(transport)):
            with pytest.raises(ProtocolError):
                await call


async def test_a_stream_cut_short_is_an_error() -> None:
    """A stream that ends with status OK but without `done` is a ProtocolError, not a short result."""

    async def stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield serialize(service_pb2.ExecuteResponse(started={}))

    async with _server(Execute=stream) as address, _connected(address) as transport:
        with pytest.raises(ProtocolError, match="ended before everything was sent"):
            await _collect(transport)


async def test_endless_pages() -> None:
    """A server whose list of models never ends is not followed for ever."""

    async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return serialize(service_pb2.ListModelsResponse(next_page_token="again"))

    async with _server(ListModels=unary) as address, _connected(address) as transport:
        with pytest.raises(ProtocolError, match="does not end"):
            await transport.list_models()


async def test_a_server_that_is_not_patchbay() -> None:
    """A gRPC server without our service is UNIMPLEMENTED, and the message asks whether it is Patchbay."""
    async with _server() as address, _connected(address) as transport:
        with pytest.raises(UnsupportedError, match="is it Patchbay"):
            await transport.list_models()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("localhost:9000", ("localhost:9000", False)),
        ("grpc://h:1", ("h:1", False)),
        ("http://h:1/", ("h:1", False)),
        ("grpcs://h:1", ("h:1", True)),
        ("HTTPS://h", ("h:443", True)),
        ("https://[::1]", ("[::1]:443", True)),
        ("unix:/run/patchbay.sock", ("unix:/run/patchbay.sock", False)),
    ],
)
def test_targets(target: str, expected: tuple[str, bool]) -> None:
    """A scheme chooses TLS; TLS has a default port; a bare address is taken as it is."""
    assert split_target(target) == expected


@pytest.mark.parametrize("target", ["", "https://", "ftp://h:1", "h:1/path", "a b:1", "h:99999", "h:0", "h:x", "h:1:2"])
def test_bad_targets(target: str) -> None:
    """An empty address, an unknown scheme, a path, no port: refused with the forms that are understood."""
    with pytest.raises(InvalidRequestError, match="give host:port"):
        split_target(target)


@pytest.mark.parametrize("key", ["secret\n", " secret", "ключ", "secret\x00"])
def test_impossible_keys(key: str) -> None:
    """A key that no header can carry is refused at once, without being shown."""
    with pytest.raises(InvalidRequestError) as caught:
        GrpcTransport("h:1", api_key=key)
    assert not {"secret", "ключ"} & set(str(caught.value).split())


@pytest.mark.parametrize("module", ["patchbay.transport.base", "patchbay.testing", "patchbay.transport.grpc"])
def test_imports_are_light(module: str) -> None:
    """grpc, numpy and msgpack are loaded by the first call that needs them, not by an import."""
    heavy = ("grpc", "numpy", "msgpack", "ml_dtypes", "google.rpc", "torch")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_local_transport_runs_the_servicer_itself(backend: FakeBackend, servicer: Servicer) -> None:
    """Closing a local connection calls what it was given to call, once."""
    closed: list[bool] = []
    transport = LocalTransport(servicer, KEY, on_close=lambda: closed.append(True))
    assert await transport.list_models() == (backend.summary,)
    await transport.close()
    await transport.close()
    assert closed == [True]
