"""The servicer alone: who may ask, how much, in pages; and what an error looks like to any gRPC client."""

from __future__ import annotations

import dataclasses
import hmac
import logging
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from patchbay.errors import (
    InvalidRequestError,
    LimitExceededError,
    NotFoundError,
    ProtocolError,
    ShapeError,
    UnauthenticatedError,
)
from patchbay.ir.events import ExecuteOptions, ModelSummary
from patchbay.ir.graph import Graph, Node
from patchbay.ir.limits import Limits
from patchbay.transport.local import LocalContext, LocalTransport
from patchbay.v1 import service_pb2
from patchbay.wire.cards import decode_card
from patchbay.wire.graphs import encode_graph
from patchbay.wire.parse import serialize
from patchbay.wire.status import MAX_METADATA_BYTES
from patchbay_server.transport import auth
from patchbay_server.transport.auth import AllowAll, DigestKeys, KeyAuthenticator
from patchbay_server.transport.context import STATUS_DETAILS_KEY, bearer_key
from patchbay_server.transport.limits import MAX_TEXT_CHARS, MAX_TEXTS, FixedLimits
from patchbay_server.transport.servicer import Servicer
from tests.wire.conftest import KEY
from tests.wire.fakes import FakeBackend, FakeCatalog


class RecordingContext(LocalContext):
    """A context that shows what was set."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        super().__init__(metadata)

    @property
    def code(self) -> grpc.StatusCode | None:
        return self._code

    @property
    def details(self) -> str:
        return self._details

    @property
    def status(self) -> status_pb2.Status:
        return status_pb2.Status.FromString(dict(self._trailing)[STATUS_DETAILS_KEY])  # type: ignore[arg-type]


def _open_servicer(*backends: FakeBackend, limits: FixedLimits | None = None) -> Servicer:
    return Servicer(FakeCatalog(*(backends or (FakeBackend(),))), AllowAll(), limits)


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ([("authorization", "Bearer k")], "k"),
        ([("Authorization", "bearer  k ")], "k"),
        ([], None),
        ([("authorization", "Basic k")], None),
        ([("authorization", "k")], None),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], None),
        ([("authorization", b"Bearer k")], None),
        ([("x-authorization", "Bearer k")], None),
    ],
)
def test_where_a_key_is_found(metadata: list[tuple[str, str]], key: str | None) -> None:
    """A key is what follows Bearer in the one authorization header, and nothing else is."""
    assert bearer_key(LocalContext(metadata)) == key


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every known digest is compared, by hmac.compare_digest, whichever key is asked about; keys are not kept."""
    compared: list[int] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    keys = DigestKeys({"a": "1", "b": "2", "c": "3"})
    assert keys.verify("a") == "1"
    assert keys.verify("x") is None
    assert compared == [32] * 6
    assert not any(key in repr(vars(keys)) for key in ("'a'", "'b'", "'c'"))


@pytest.mark.parametrize("key", [None, "", "wrong", "x" * 10_000, "\udcff"])
def test_strangers(key: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """No key and an unknown key are UNAUTHENTICATED with advice; the key appears neither in the error nor in a log."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UnauthenticatedError, match="pass api_key=") as caught:
        KeyAuthenticator(DigestKeys({KEY: "ada"})).account_for(key)
    if key:
        assert key not in str(caught.value)
        assert key not in caplog.text


async def test_strangers_are_turned_away_before_anything_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key not even the request's size is looked at."""
    servicer = Servicer(FakeCatalog(FakeBackend()), KeyAuthenticator(DigestKeys({KEY: "ada"})), FixedLimits(1))
    context = RecordingContext()
    await servicer.GetModel(b"\xff" * 100, context)
    assert context.code is grpc.StatusCode.UNAUTHENTICATED


# --- sizes and pages ----------------------------------------------------------------------------------------------


async def test_request_size() -> None:
    """A request above max_request_bytes is refused unread, naming the limit."""
    servicer = _open_servicer(limits=FixedLimits(max_request_bytes=100))
    context = RecordingContext()
    await servicer.GetModel(b"\xff" * 101, context)
    with pytest.raises(LimitExceededError) as caught:
        context.raise_for_status()
    assert (caught.value.limit, caught.value.allowed, caught.value.requested) == ("max_request_bytes", 100, 101)


async def test_cards_state_the_limits_in_force() -> None:
    """The card's limits are those that the servicer enforces, and a graph beyond them is refused by name."""
    servicer = _open_servicer(limits=FixedLimits(graph=Limits(max_nodes=2)))
    response = await servicer.GetModel(service_pb2.GetModelRequest(name="models/fake"), RecordingContext())
    assert decode_card(response.card).limits == Limits(max_nodes=2)
    graph = Graph(nodes=(Node("const", attrs={"scalar": 1}),) * 3)
    with pytest.raises(LimitExceededError, match="limit max_nodes"):
        await anext(LocalTransport(servicer).execute("fake", graph, ExecuteOptions()))


@pytest.mark.parametrize(
    ("texts", "limit"), [(["a"] * (MAX_TEXTS + 1), "max_texts"), (["a" * (MAX_TEXT_CHARS + 1)], "max_text_chars")]
)
async def test_tokenize_limits(texts: list[str], limit: str) -> None:
    """Too many or too long texts are refused before they reach the tokenizer, naming the limit."""
    with pytest.raises(LimitExceededError) as caught:
        await LocalTransport(_open_servicer()).tokenize("fake", texts)
    assert caught.value.limit == limit


async def test_pages() -> None:
    """Models come ordered by name, page after page, each once; the last page has no token."""
    backends = [FakeBackend(name) for name in ("c", "a/b", "b", "a")]
    servicer = _open_servicer(*backends)
    names: list[str] = []
    request = service_pb2.ListModelsRequest(page_size=3)
    for expected in (3, 1):
        context = RecordingContext()
        response = await servicer.ListModels(serialize(request), context)
        assert context.code is None
        assert len(response.models) == expected
        names += [model.name for model in response.models]
        request.page_token = response.next_page_token
    assert names == ["models/a", "models/a/b", "models/b", "models/c"]
    assert not request.page_token
    assert await LocalTransport(servicer).list_models() == tuple(
        sorted((b.summary for b in backends), key=lambda s: s.name)
    )


async def test_clients_follow_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client collects all pages of a server with more models than fit on one."""
    backend = FakeBackend()
    catalog = FakeCatalog(backend)
    summaries = tuple(ModelSummary(f"m{i:03}", "f", "s", 1, 1, 1) for i in range(250))

    async def list_models() -> tuple[ModelSummary, ...]:
        return summaries

    monkeypatch.setattr(catalog, "list_models", list_models)
    assert await LocalTransport(Servicer(catalog, AllowAll())).list_models() == summaries


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (service_pb2.ListModelsRequest(page_size=-1), "INVALID_PAGE_SIZE"),
        (service_pb2.ListModelsRequest(page_token="?"), "INVALID_PAGE_TOKEN"),
        (service_pb2.ListModelsRequest(page_token="é"), "INVALID_PAGE_TOKEN"),
        (service_pb2.ListModelsRequest(page_token="____"), "INVALID_PAGE_TOKEN"),
    ],
)
async def test_bad_pages(request_: service_pb2.ListModelsRequest, reason: str) -> None:
    """A negative size and a token that the server never gave are INVALID_ARGUMENT."""
    context = RecordingContext()
    await _open_servicer().ListModels(request_, context)
    with pytest.raises(InvalidRequestError) as caught:
        context.raise_for_status()
    assert caught.value.reason == reason


@pytest.mark.parametrize("request_id", ["x" * 65, "a b", "a\nb", "é"])
async def test_bad_request_ids(request_id: str) -> None:
    """A request id that could disturb a log is refused."""
    request = service_pb2.ExecuteRequest(model="models/fake", request_id=request_id)
    context = RecordingContext()
    async for _ in _open_servicer().Execute(request, context):
        pass
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


# --- what an error looks like -------------------------------------------------------------------------------------


async def test_errors_are_google_rpc() -> None:
    """Code, message and google.rpc details are set on the context, and a stream's last event holds them too."""
    graph = encode_graph(Graph(nodes=(Node("const", attrs={"scalar": 1}),)))
    graph.nodes.add(op="neg", args=[5])
    context = RecordingContext()
    request = serialize(service_pb2.ExecuteRequest(model="models/fake", graph=graph))
    responses = [response async for response in _open_servicer().Execute(request, context)]
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert context.details == "argument 0 of node 1 is node 5; arguments refer to earlier nodes only"
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in context.status.details)
    assert bad.field_violations[0].field == "graph.nodes[1].args[0]"
    assert [r.WhichOneof("event") for r in responses] == ["error"]
    assert status_pb2.Status.FromString(responses[0].error.status) == context.status


async def test_headers_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long an error is, what goes into headers stays below what proxies carry."""
    backend = FakeBackend()

    def events(graph: Graph, options: ExecuteOptions) -> list[object]:
        raise ShapeError("é" * 30_000, node=1, related=range(1_000))

    monkeypatch.setattr(backend, "events", events)
    context = RecordingContext()
    request = service_pb2.ExecuteRequest(model="models/fake")
    responses = [response async for response in _open_servicer(backend).Execute(request, context)]
    assert len(context.details) <= 1_536
    assert context.status.ByteSize() <= MAX_METADATA_BYTES
    assert len(responses[-1].error.status) > 30_000


@pytest.mark.parametrize("method", ["ListModels", "GetModel", "Tokenize"])
async def test_garbage_in_unary_calls(method: str) -> None:
    """Bytes that are no message are a ProtocolError in every call."""
    context = RecordingContext()
    await getattr(_open_servicer(), method)(b"\xff\xff", context)
    with pytest.raises(ProtocolError, match=f"not a valid {method}Request"):
        context.raise_for_status()


async def test_bugs_in_unary_calls_are_incidents(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug while answering a unary call is INTERNAL with an incident's number, its story only in the log."""
    backend = FakeBackend()

    async def tokenize(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("internal text")

    monkeypatch.setattr(backend, "tokenize", tokenize)
    context = RecordingContext()
    request = service_pb2.TokenizeRequest(model="models/fake", texts=["a"])
    await _open_servicer(backend).Tokenize(request, context)
    assert context.code is grpc.StatusCode.INTERNAL
    assert "internal text" not in context.details + str(context.status)
    assert "internal text" in caplog.text
    assert "in Tokenize" in caplog.text


async def test_large_graphs_are_decoded_beside_the_loop() -> None:
    """A request above a quarter of a megabyte takes the other path and arrives the same."""
    backend = FakeBackend()
    seen: list[Graph] = []

    def events(graph: Graph, options: ExecuteOptions) -> list[object]:
        seen.append(graph)
        raise NotFoundError("enough")

    backend.events = events  # type: ignore[method-assign,assignment]
    node = Node("const", attrs={"scalar": 1, "padding": "x" * 60_000})
    graph = Graph(nodes=(node,) * 10)
    request = serialize(service_pb2.ExecuteRequest(model="models/fake", graph=encode_graph(graph)))
    async for _ in _open_servicer(backend).Execute(request, RecordingContext()):
        pass
    assert seen == [graph]


def test_limits_of_the_configuration_fit() -> None:
    """The service's configuration has what the servicer asks of its limits."""
    config = pytest.importorskip("patchbay_server.config")
    limits = config.LimitsConfig(max_nodes=7)
    assert limits.graph_limits() == dataclasses.replace(Limits(), max_nodes=7)
    assert limits.max_request_bytes > limits.max_const_bytes
