"""The service behind every transport: the same object in-process, under plain gRPC and in a Ray Serve replica.

A call goes: key, size, parse, names, backend, events. Each RPC takes the request as bytes (as `registration` hands
them over, so that nothing is parsed for strangers) or as a message (in-process). Errors never leave as exceptions: the
status is set and the handler returns, since that is the only way in which every transport keeps the details.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from google.protobuf.message import Message

from patchbay.errors import (
    GraphError,
    InternalServerError,
    InvalidRequestError,
    PatchbayError,
    ProtocolError,
    ServiceError,
)
from patchbay.ir.events import COMPRESSION, ChatMessage, Event, ExecuteOptions, TokenizedRow
from patchbay.ir.graph import Graph
from patchbay.v1 import artifact_pb2, events_pb2, service_pb2, tensor_pb2
from patchbay.wire.cards import encode_card, encode_summary
from patchbay.wire.chunks import ChunkFrame
from patchbay.wire.compression import is_available
from patchbay.wire.events import decode_options, encode_event
from patchbay.wire.graphs import decode_graph
from patchbay.wire.names import decode_model
from patchbay.wire.parse import parse
from patchbay.wire.tokens import encode_row
from patchbay_server.transport.artifact_calls import ArtifactCalls, Store
from patchbay_server.transport.auth import Authenticator
from patchbay_server.transport.compressing import CompressedStream
from patchbay_server.transport.context import CallContext, bearer_key, set_error
from patchbay_server.transport.limits import (
    DEFAULT_PAGE_SIZE,
    INLINE_DECODE_BYTES,
    MAX_PAGE_SIZE,
    FixedLimits,
    RequestLimits,
    check_ids,
    check_request_size,
    check_texts,
)
from patchbay_server.transport.recurring import RecurringGraphs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from patchbay_server.serving.backend import Backend, Catalog

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)
#: A request as it came over a network, or as a message in-process.
Request: TypeAlias = "bytes | M"

log = logging.getLogger("patchbay.transport")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{0,64}", re.ASCII)


class Servicer:
    """The RPCs of ``patchbay.v1.PatchbayService``.

    Args:
        catalog: the models.
        authenticator: whose a request is.
        request_limits: what requests and graphs are held to; `patchbay_server.config.LimitsConfig` fits.
        artifacts: where tensors that stay on the server are kept; None where none are.
        on_close: what `close` calls: lets go of the models, where they are this servicer's alone.

    Attributes:
        authenticator: as given; servers that can, ask it before they take a request's message.
    """

    def __init__(
        self,
        catalog: Catalog,
        authenticator: Authenticator,
        request_limits: RequestLimits | None = None,
        *,
        artifacts: Store | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.close = on_close
        self._artifacts = ArtifactCalls(artifacts)
        self._recurring = RecurringGraphs()
        self._catalog = catalog
        self.authenticator = authenticator
        self._limits: RequestLimits = FixedLimits() if request_limits is None else request_limits

    # --- the RPCs ---------------------------------------------------------------------------------------------------

    async def ListModels(
        self, request: Request[service_pb2.ListModelsRequest], context: CallContext
    ) -> service_pb2.ListModelsResponse:
        """The models served here, a page at a time."""
        return await self._answer(
            request, context, service_pb2.ListModelsRequest, service_pb2.ListModelsResponse, self._list_models
        )

    async def GetModel(
        self, request: Request[service_pb2.GetModelRequest], context: CallContext
    ) -> service_pb2.GetModelResponse:
        """A model's card."""
        return await self._answer(
            request, context, service_pb2.GetModelRequest, service_pb2.GetModelResponse, self._get_model
        )

    async def Tokenize(
        self, request: Request[service_pb2.TokenizeRequest], context: CallContext
    ) -> service_pb2.TokenizeResponse:
        """Token ids of texts."""
        return await self._answer(
            request, context, service_pb2.TokenizeRequest, service_pb2.TokenizeResponse, self._tokenize
        )

    async def Execute(
        self, request: Request[service_pb2.ExecuteRequest], context: CallContext
    ) -> AsyncIterator[service_pb2.ExecuteResponse | ChunkFrame]:
        """Run a graph; events, the last of which is `done` or `error`. Closing the generator cancels."""
        try:
            account, message, size = await self._admit(request, context, service_pb2.ExecuteRequest)
            backend, graph, options = await self._decode(message, size, account)
            compressed = self._compressed(message, options)
            del request, message  # a graph's constants should not be held twice while it waits
            # Every backend's iterator is an async generator; the protocol only does not say so.
            events = cast(
                "AsyncGenerator[Event, None]", backend.execute(graph, options, account=account, bytes_in=size)
            )
            async with aclosing(events):
                async for event in events:
                    if compressed is None:
                        for response in encode_event(event):
                            yield response
                    else:
                        async for response in compressed.messages(event):
                            yield response
        except Exception as error:  # noqa: BLE001 - whatever happened, the client is told in its own terms
            status = set_error(context, _public(error, "Execute"))
            yield service_pb2.ExecuteResponse(error=events_pb2.ErrorEvent(status=status))

    # --- the RPCs about artifacts -----------------------------------------------------------------------------------

    async def PutArtifact(
        self, requests: AsyncIterator[Request[artifact_pb2.PutArtifactRequest]], context: CallContext
    ) -> artifact_pb2.PutArtifactResponse:
        """Store a tensor under its digest."""
        try:
            account = self.authenticator.account_for(bearer_key(context))
            return await self._artifacts.put(requests, account)
        except Exception as error:  # noqa: BLE001 - whatever happened, the client is told in its own terms
            set_error(context, _public(error, "PutArtifact"))
            return artifact_pb2.PutArtifactResponse()

    async def GetArtifact(
        self, request: Request[artifact_pb2.GetArtifactRequest], context: CallContext
    ) -> AsyncIterator[artifact_pb2.GetArtifactResponse]:
        """The caller's tensor of that digest, in chunks."""
        try:
            account, message, _ = await self._admit(request, context, artifact_pb2.GetArtifactRequest)
            async with aclosing(cast("AsyncGenerator[Any, None]", self._artifacts.get(message, account))) as parts:
                async for part in parts:
                    yield part
        except Exception as error:  # noqa: BLE001 - whatever happened, the client is told in its own terms
            yield artifact_pb2.GetArtifactResponse(error_status=set_error(context, _public(error, "GetArtifact")))

    async def StatArtifacts(
        self, request: Request[artifact_pb2.StatArtifactsRequest], context: CallContext
    ) -> artifact_pb2.StatArtifactsResponse:
        """Which of these the caller has."""
        return await self._answer_to(
            request,
            context,
            artifact_pb2.StatArtifactsRequest,
            artifact_pb2.StatArtifactsResponse,
            self._artifacts.stat,
        )

    async def ListArtifacts(
        self, request: Request[artifact_pb2.ListArtifactsRequest], context: CallContext
    ) -> artifact_pb2.ListArtifactsResponse:
        """The caller's artifacts, a page at a time."""
        return await self._answer_to(
            request,
            context,
            artifact_pb2.ListArtifactsRequest,
            artifact_pb2.ListArtifactsResponse,
            self._artifacts.list,
        )

    async def DeleteArtifact(
        self, request: Request[artifact_pb2.DeleteArtifactRequest], context: CallContext
    ) -> artifact_pb2.DeleteArtifactResponse:
        """Remove one of the caller's artifacts."""
        return await self._answer_to(
            request,
            context,
            artifact_pb2.DeleteArtifactRequest,
            artifact_pb2.DeleteArtifactResponse,
            self._artifacts.delete,
        )

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _answer(
        self,
        request: Request[M],
        context: CallContext,
        request_type: type[M],
        response_type: type[R],
        handle: Callable[[M], Awaitable[R]],
    ) -> R:
        return await self._answer_to(request, context, request_type, response_type, lambda message, _: handle(message))

    async def _answer_to(
        self,
        request: Request[M],
        context: CallContext,
        request_type: type[M],
        response_type: type[R],
        handle: Callable[[M, str], Awaitable[R]],
    ) -> R:
        """The answer to a call that depends on whose it is."""
        try:
            account, message, _ = await self._admit(request, context, request_type)
            return await handle(message, account)
        except Exception as error:  # noqa: BLE001 - whatever happened, the client is told in its own terms
            set_error(context, _public(error, request_type.DESCRIPTOR.name.removesuffix("Request")))
            return response_type()

    async def _admit(self, request: Request[M], context: CallContext, request_type: type[M]) -> tuple[str, M, int]:
        """Account, message and size of a request. Strangers are turned away before anything is parsed."""
        account = self.authenticator.account_for(bearer_key(context))
        size = len(request) if isinstance(request, bytes) else request.ByteSize()
        check_request_size(size, self._limits)
        if not isinstance(request, bytes):
            return account, request, size
        if size <= INLINE_DECODE_BYTES:
            return account, parse(request_type, request), size
        return account, await asyncio.to_thread(parse, request_type, request), size

    def _compressed(self, message: service_pb2.ExecuteRequest, options: ExecuteOptions) -> CompressedStream | None:
        """What compresses large results, where both sides can and nobody switched it off."""
        accepted = tensor_pb2.COMPRESSION_SHUFFLE_ZSTD in message.options.accepted_compressions
        return CompressedStream() if accepted and is_available() and COMPRESSION not in options.disabled else None

    async def _decode(
        self, message: service_pb2.ExecuteRequest, size: int, account: str
    ) -> tuple[Backend, Graph, ExecuteOptions]:
        if _REQUEST_ID.fullmatch(message.request_id) is None:
            raise InvalidRequestError(
                "request_id is at most 64 letters, digits, '-' and '_' (a UUID)", reason="INVALID_REQUEST_ID"
            )
        backend = self._catalog.get(decode_model(message.model, "model"))
        options = decode_options(message.options)
        if size <= INLINE_DECODE_BYTES:
            graph = self._recurring.decode(account, message.graph, self._limits.graph_limits())
        else:
            graph = await asyncio.to_thread(decode_graph, message.graph, self._limits.graph_limits())
        log.debug("execute %s on %s: %d nodes, %d bytes", message.request_id, message.model, len(graph.nodes), size)
        return backend, graph, options

    async def _list_models(self, request: service_pb2.ListModelsRequest) -> service_pb2.ListModelsResponse:
        if request.page_size < 0:
            raise InvalidRequestError("page_size must not be negative", reason="INVALID_PAGE_SIZE")
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        after = _decode_page_token(request.page_token)
        summaries = sorted(await self._catalog.list_models(), key=lambda summary: summary.name)
        rest = [summary for summary in summaries if after is None or summary.name > after]
        page = rest[:size]
        return service_pb2.ListModelsResponse(
            models=[encode_summary(summary) for summary in page],
            next_page_token=_encode_page_token(page[-1].name) if len(rest) > size else "",
        )

    async def _get_model(self, request: service_pb2.GetModelRequest) -> service_pb2.GetModelResponse:
        card = self._catalog.get(decode_model(request.name, "name")).card
        # The card states the limits that this servicer enforces, whatever the loader assumed.
        return service_pb2.GetModelResponse(
            card=encode_card(dataclasses.replace(card, limits=self._limits.graph_limits()))
        )

    async def _tokenize(self, request: service_pb2.TokenizeRequest) -> service_pb2.TokenizeResponse:
        backend = self._catalog.get(decode_model(request.model, "model"))
        texts = list(request.texts)
        check_texts(texts)
        rows: list[TokenizedRow] = []
        if texts:
            bos = request.prepend_bos if request.HasField("prepend_bos") else None
            special = not request.omit_special_tokens
            rows = list(await backend.tokenize(texts, add_special_tokens=special, prepend_bos=bos))
        rendered: tuple[str, ...] = ()
        if request.conversations:
            chats = [[ChatMessage(m.role, m.content) for m in c.messages] for c in request.conversations]
            check_texts([part for messages in chats for m in messages for part in (m.role, m.content)])
            rendered = await backend.render_chats(chats)
        if request.ids:
            check_ids(len(request.ids))
            rows.append(await backend.token_strings(list(request.ids)))
        return service_pb2.TokenizeResponse(texts=[encode_row(row) for row in rows], rendered=rendered)


def _public(error: Exception, method: str) -> PatchbayError:
    """`error` itself where it was made for users, else an incident's number; the story stays in the server's log."""
    if isinstance(error, (GraphError, ProtocolError, ServiceError)):
        return error
    incident = secrets.token_hex(8)
    log.error("incident %s in %s", incident, method, exc_info=error)
    return InternalServerError(
        f"the server failed in a way that it should not; its log has the story as incident {incident}",
        reason="INCIDENT",
        metadata={"incident": incident},
    )


def _encode_page_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode("ascii")


def _decode_page_token(token: str) -> str | None:
    if not token:
        return None
    try:
        return base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidRequestError("page_token is not one that this server gave", reason="INVALID_PAGE_TOKEN") from None
