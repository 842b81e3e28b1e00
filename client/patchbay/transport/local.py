"""A servicer in the same process: the messages and rules of the network without one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from google.protobuf.message import Message

from patchbay.errors import DeadlineExceededError, ProtocolError, UnavailableError
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, Event, ExecuteOptions, ModelSummary, TokenizedRow
from patchbay.ir.graph import Graph, TensorData
from patchbay.transport import calls
from patchbay.transport.base import Transport
from patchbay.v1 import artifact_pb2, service_pb2
from patchbay.wire.artifacts import ArtifactDecoder, encode_digest, encode_put
from patchbay.wire.bounds import MAX_RESULT_BYTES
from patchbay.wire.events import EventDecoder
from patchbay.wire.status import decode_status, service_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

R = TypeVar("R", bound=Message)

STATUS_DETAILS_KEY = "grpc-status-details-bin"


class ServicerLike(Protocol):
    """What `LocalTransport` needs: the RPCs as async methods, named as in the proto."""

    async def ListModels(self, request: Any, context: Any) -> service_pb2.ListModelsResponse: ...

    async def GetModel(self, request: Any, context: Any) -> service_pb2.GetModelResponse: ...

    async def Tokenize(self, request: Any, context: Any) -> service_pb2.TokenizeResponse: ...

    def Execute(self, request: Any, context: Any) -> AsyncIterator[service_pb2.ExecuteResponse]: ...

    async def PutArtifact(self, requests: Any, context: Any) -> artifact_pb2.PutArtifactResponse: ...

    def GetArtifact(self, request: Any, context: Any) -> AsyncIterator[artifact_pb2.GetArtifactResponse]: ...

    async def StatArtifacts(self, request: Any, context: Any) -> artifact_pb2.StatArtifactsResponse: ...

    async def ListArtifacts(self, request: Any, context: Any) -> artifact_pb2.ListArtifactsResponse: ...

    async def DeleteArtifact(self, request: Any, context: Any) -> artifact_pb2.DeleteArtifactResponse: ...


class LocalContext:
    """The part of a gRPC context that servicers of ours use."""

    def __init__(self, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self._metadata = tuple(metadata)
        self._code: Any = None
        self._details = ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def set_code(self, code: Any) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._trailing = tuple(metadata)

    def raise_for_status(self) -> None:
        """Raise what the servicer set, if it set anything but OK."""
        if self._code is None or self._code.name == "OK":
            return
        for key, value in self._trailing:
            if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
                raise decode_status(value)
        raise service_error(self._code.name, self._details)


class LocalTransport(Transport):
    """Calls a servicer object directly.

    Args:
        servicer: `patchbay_server.transport.servicer.Servicer`, or anything with its methods.
        api_key: key to present, if the servicer asks for one.
        on_close: called when the transport is closed.
    """

    def __init__(
        self, servicer: ServicerLike, api_key: str | None = None, *, on_close: Callable[[], None] | None = None
    ) -> None:
        self._servicer = servicer
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._on_close = on_close
        self._closed = False

    async def list_models(self) -> tuple[ModelSummary, ...]:
        models: list[ModelSummary] = []
        request = service_pb2.ListModelsRequest()
        for _ in range(calls.MAX_PAGES):
            response = await self._call(self._servicer.ListModels, request)
            models += calls.read_summaries(response, len(models))
            if not response.next_page_token:
                break
            request.page_token = response.next_page_token
        return tuple(models)

    async def get_model(self, name: str) -> ModelCard:
        return calls.read_card(await self._call(self._servicer.GetModel, calls.get_model_request(name)))

    async def tokenize(
        self, model: str, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        request = calls.tokenize_request(model, texts, add_special_tokens, prepend_bos)
        return calls.read_rows(await self._call(self._servicer.Tokenize, request), len(texts))

    async def render_chats(self, model: str, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        response = await self._call(self._servicer.Tokenize, calls.render_request(model, chats))
        return calls.read_rendered(response, len(chats))

    async def token_strings(self, model: str, ids: Sequence[int]) -> TokenizedRow:
        request = calls.token_strings_request(model, ids)
        (row,) = calls.read_rows(await self._call(self._servicer.Tokenize, request), 1)
        return row

    async def execute(
        self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        self._check_open()
        request, context, decoder = calls.execute_request(model, graph, options), self._context(), EventDecoder()
        self.bytes_sent += request.ByteSize()
        responses = cast("AsyncGenerator[service_pb2.ExecuteResponse, None]", self._servicer.Execute(request, context))
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        async with aclosing(responses):
            while True:
                # Timed one by one: between them the caller runs code of its own, which no timer of ours may cancel.
                remaining_s = None if give_up_at is None else give_up_at - time.monotonic()
                try:
                    response = await asyncio.wait_for(anext(responses), remaining_s)
                except StopAsyncIteration:
                    break
                except asyncio.TimeoutError:
                    raise DeadlineExceededError(
                        f"the model in this process did not finish within {timeout_s:.3g} s; give more time, or ask "
                        "for less at once"
                    ) from None
                self.bytes_received += response.ByteSize()
                event = decoder.feed(response)
                if event is not None:
                    yield event
        context.raise_for_status()
        decoder.finish()

    async def put_artifact(
        self,
        info: ArtifactInfo,
        tensor: TensorData,
        *,
        automatic: bool = False,
        known: bool = False,
        model: str | None = None,
    ) -> ArtifactInfo:
        self._check_open()
        context = self._context()

        async def parts() -> AsyncIterator[artifact_pb2.PutArtifactRequest]:
            for part in encode_put(info, tensor, automatic, known):
                self.bytes_sent += part.ByteSize()
                yield part

        response = await self._servicer.PutArtifact(parts(), context)
        context.raise_for_status()
        self.bytes_received += response.ByteSize()
        return calls.read_put(response, info)

    async def get_artifact(self, digest: str, *, model: str | None = None) -> tuple[ArtifactInfo, TensorData]:
        self._check_open()
        request, context = artifact_pb2.GetArtifactRequest(name=encode_digest(digest)), self._context()
        self.bytes_sent += request.ByteSize()
        decoder = ArtifactDecoder(MAX_RESULT_BYTES)
        parts = cast("AsyncGenerator[Any, None]", self._servicer.GetArtifact(request, context))
        async with aclosing(parts):
            async for part in parts:
                self.bytes_received += part.ByteSize()
                decoder.feed(part)
        context.raise_for_status()
        return decoder.finish()

    async def stat_artifacts(self, digests: Sequence[str], *, model: str | None = None) -> tuple[ArtifactInfo, ...]:
        found: list[ArtifactInfo] = []
        for request in calls.stat_requests(digests):
            found += calls.read_artifacts((await self._call(self._servicer.StatArtifacts, request)).artifacts)
        return tuple(found)

    async def list_artifacts(self) -> tuple[ArtifactInfo, ...]:
        found: list[ArtifactInfo] = []
        request = artifact_pb2.ListArtifactsRequest()
        for _ in range(calls.MAX_PAGES):
            answer = await self._call(self._servicer.ListArtifacts, request)
            found += calls.read_artifacts(answer.artifacts)
            if not answer.next_page_token:
                return tuple(found)
            request.page_token = answer.next_page_token
        raise ProtocolError(f"the list of artifacts does not end after {calls.MAX_PAGES} pages")

    async def delete_artifact(self, digest: str) -> None:
        request = artifact_pb2.DeleteArtifactRequest(name=encode_digest(digest))
        await self._call(self._servicer.DeleteArtifact, request)

    async def close(self) -> None:
        if not self._closed and self._on_close is not None:
            self._on_close()
        self._closed = True

    async def _call(self, method: Callable[[Any, Any], Awaitable[R]], request: Message) -> R:
        self._check_open()
        context = self._context()
        self.bytes_sent += request.ByteSize()
        response = await method(request, context)
        context.raise_for_status()
        self.bytes_received += response.ByteSize()
        return response

    def _context(self) -> LocalContext:
        return LocalContext(self._metadata)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("this connection has been closed; open a new one")
