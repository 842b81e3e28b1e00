"""A server across a network, over gRPC. `grpc` itself is imported with the first call.

Messages cross this module as bytes: our own codecs parse them, so that a hostile or broken server meets the same checks
as a hostile client. No exception of gRPC's leaves it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from patchbay._version import __version__
from patchbay.errors import (
    InternalServerError,
    InvalidRequestError,
    NotFoundError,
    PatchbayError,
    ProtocolError,
    ServiceError,
    UnavailableError,
)
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, Event, ExecuteOptions, ModelSummary, TokenizedRow
from patchbay.ir.graph import Graph, TensorData
from patchbay.transport import calls
from patchbay.transport.base import Transport
from patchbay.v1 import artifact_pb2, service_pb2
from patchbay.wire.artifacts import ArtifactDecoder, encode_digest, encode_put
from patchbay.wire.bounds import MAX_RESULT_BYTES
from patchbay.wire.compression import is_available
from patchbay.wire.events import EventDecoder
from patchbay.wire.memory import MAX_KEPT_BYTES, ResultMemory
from patchbay.wire.parse import parse, serialize
from patchbay.wire.status import decode_status, service_error

if TYPE_CHECKING:
    import grpc
    from grpc import aio

R = TypeVar("R", bound=Message)

#: Answers above this are refused by gRPC itself: chunks are half a MiB, and the card of a large model a few.
MAX_RECEIVE_BYTES = 64 * 2**20
#: Bytes in flight on one stream before the server must wait for us.
WINDOW_BYTES = 16 * 2**20
#: gRPC servers take pings more often than every five minutes for an attack.
KEEPALIVE_MS = 330_000
#: Wait before a lost Execute is sent again, unless the server names another.
RETRY_DELAY_S = 0.25
MAX_RETRY_DELAY_S = 2.0
#: Name of the application on a Ray Serve port that knows about all models.
CONTROL_APPLICATION = "control"

#: An upload's deadline allows for a connection as slow as this.
SLOWEST_BYTES_PER_S = 256 * 2**10

_TLS_SCHEMES = ("https://", "grpcs://")
_PLAIN_SCHEMES = ("http://", "grpc://")
#: How gRPC words the end of a stream that its server did not end; the last: a proxy that has no server to send to.
_BROKEN_OFF = ("RST_STREAM", "Stream removed", "Received http2 header with status: 5")
_DETAILS_KEY = "grpc-status-details-bin"

#: Calls that gRPC itself may send again.
_REPEATABLE = ("ListModels", "GetModel", "Tokenize", "StatArtifacts", "ListArtifacts")
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": calls.SERVICE, "method": method} for method in _REPEATABLE],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def split_target(target: str) -> tuple[str, bool]:
    """``(host:port, whether TLS)`` of a target with or without a scheme.

    Raises:
        InvalidRequestError: an empty target, or a scheme that is none of ours.
    """
    for scheme in _TLS_SCHEMES + _PLAIN_SCHEMES:
        if target.lower().startswith(scheme):
            address, tls = target[len(scheme) :].rstrip("/"), scheme in _TLS_SCHEMES
            break
    else:
        address, tls = target.rstrip("/"), False
    if not _is_address(address):
        raise InvalidRequestError(
            f"{target!r} is not an address; give host:port, or grpcs://host:port for TLS", reason="INVALID_TARGET"
        )
    if tls and ":" not in address.rpartition("]")[2]:
        address += ":443"
    return address, tls


def _is_address(address: str) -> bool:
    """Whether it is a host, ``host:port``, ``[v6]:port``, or what gRPC resolves by itself."""
    if address.startswith("unix:"):
        return True
    if not address or "/" in address or any(c.isspace() for c in address):
        return address.startswith("dns:")
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]") or address.startswith(("dns:", "ipv4:", "ipv6:")):
        return True
    return port.isdecimal() and 0 < int(port) < 2**16 and (":" not in host or host.startswith("["))


def is_loopback(address: str) -> bool:
    """Whether a target's address is this machine's own."""
    host = address.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:")
    return host.startswith(("127.", "localhost:", "[::1]", "unix:")) or host == "localhost"


class GrpcTransport(Transport):
    """One gRPC channel to a server.

    Args:
        target: ``host:port``; ``grpcs://`` or ``https://`` before it turns TLS on.
        api_key: sent as ``authorization: Bearer`` with every call.
        timeout_s: deadline of ListModels, GetModel and Tokenize.
        tls_roots: PEM certificates to trust instead of the system's; turns TLS on.
        max_result_bytes: results of one execution beyond this are refused.
        kept_bytes: memory of large results that is kept for the next ones once nobody uses it; 0: none.
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        tls_roots: bytes | None = None,
        max_result_bytes: int = MAX_RESULT_BYTES,
        kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._address, tls = split_target(target)
        self._tls = tls or tls_roots is not None
        self._tls_roots = tls_roots
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise InvalidRequestError("the API key holds characters that no key has", reason="INVALID_KEY")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._max_result_bytes = max_result_bytes
        self._memory = ResultMemory(kept_bytes)
        self._channel: aio.Channel | None = None
        self._blocking: grpc.Channel | None = None
        self._closed = False

    # --- calls ------------------------------------------------------------------------------------------------------

    async def list_models(self) -> tuple[ModelSummary, ...]:
        models: list[ModelSummary] = []
        request = service_pb2.ListModelsRequest()
        for _ in range(calls.MAX_PAGES):
            response = await self._unary("ListModels", request, service_pb2.ListModelsResponse, CONTROL_APPLICATION)
            models += calls.read_summaries(response, len(models))
            if not response.next_page_token:
                return tuple(models)
            request.page_token = response.next_page_token
        raise ProtocolError(f"the server's list of models does not end after {calls.MAX_PAGES} pages")

    async def get_model(self, name: str) -> ModelCard:
        request = calls.get_model_request(name)
        try:
            answer = await self._unary("GetModel", request, service_pb2.GetModelResponse, name)
        except NotFoundError as error:
            if error.reason:
                raise
            # The ingress of Ray Serve has no application of that name; `control` can say which models there are.
            answer = await self._unary("GetModel", request, service_pb2.GetModelResponse, CONTROL_APPLICATION)
        return calls.read_card(answer)

    async def tokenize(
        self, model: str, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        request = calls.tokenize_request(model, texts, add_special_tokens, prepend_bos)
        response = await self._unary("Tokenize", request, service_pb2.TokenizeResponse, model)
        return calls.read_rows(response, len(texts))

    async def render_chats(self, model: str, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        request = calls.render_request(model, chats)
        response = await self._unary("Tokenize", request, service_pb2.TokenizeResponse, model)
        return calls.read_rendered(response, len(chats))

    async def token_strings(self, model: str, ids: Sequence[int]) -> TokenizedRow:
        request = calls.token_strings_request(model, ids)
        (row,) = calls.read_rows(await self._unary("Tokenize", request, service_pb2.TokenizeResponse, model), 1)
        return row

    async def execute(
        self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        compress = is_available() and not is_loopback(self._address)
        data = serialize(calls.execute_request(model, graph, options, compress=compress))
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        for last_try in (False, True):
            heard = False
            remaining_s = None if give_up_at is None else max(give_up_at - time.monotonic(), 0.001)
            decoder = EventDecoder(self._max_result_bytes, self._memory)
            try:
                async with aclosing(self._stream(model, data, remaining_s, "Execute")) as messages:
                    async for message in messages:
                        event = decoder.feed_bytes(message)
                        heard = True
                        if event is not None:
                            yield event
                decoder.finish()
                return
            except ServiceError as error:
                # A graph changes nothing on the server, so sending it again is safe; but once something has been handed
                # on, a second answer could not be told from the first.
                if last_try or heard or not _lost(error):
                    raise
                delay_s = RETRY_DELAY_S if error.retry_after_s is None else error.retry_after_s
                await asyncio.sleep(min(max(delay_s, 0.0), MAX_RETRY_DELAY_S))

    async def put_artifact(
        self,
        info: ArtifactInfo,
        tensor: TensorData,
        *,
        automatic: bool = False,
        known: bool = False,
        model: str | None = None,
    ) -> ArtifactInfo:
        application = CONTROL_APPLICATION if model is None else model
        for last_try in (known, True):
            try:
                return await self._upload(info, tensor, automatic, known, application)
            except ServiceError as error:
                # The same bytes under the same name are safe to send again.
                if last_try or not _lost(error):
                    raise
                await asyncio.sleep(RETRY_DELAY_S if isinstance(error, UnavailableError) else 0)
        raise AssertionError("unreachable")

    async def _upload(
        self, info: ArtifactInfo, tensor: TensorData, automatic: bool, known: bool, application: str
    ) -> ArtifactInfo:
        """One attempt, through gRPC's blocking interface.

        Where a server answers while its client still writes, because it refuses the tensor or has it already, grpc.aio
        reports the write that failed ("Internal error from Core"); the blocking interface has the server's answer.
        """
        start: Any = self._open_blocking().stream_unary(f"/{calls.SERVICE}/PutArtifact")
        import grpc

        parts = encode_put(info, tensor, automatic, known)
        first, sent = serialize(next(parts)), 0  # a name that cannot be sent is found here

        def messages() -> Iterator[bytes]:  # in a thread of gRPC's
            nonlocal sent
            for data in chain((first,), map(serialize, parts)):
                sent += len(data)
                yield data

        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(None)

        timeout_s = self._timeout_s + tensor.nbytes / SLOWEST_BYTES_PER_S
        call = start.future(messages(), timeout=timeout_s, metadata=self._metadata(application))
        call.add_done_callback(lambda _: _soon(loop, end))
        try:
            await ended
        finally:
            call.cancel()
            self.bytes_sent += sent
        if call.code() is not grpc.StatusCode.OK:  # the call itself is the exception that it fails with
            raise self._translated(call, timeout_s)
        answer: bytes = call.result()
        self.bytes_received += len(answer)
        return calls.read_put(parse(artifact_pb2.PutArtifactResponse, answer), info)

    async def get_artifact(self, digest: str, *, model: str | None = None) -> tuple[ArtifactInfo, TensorData]:
        request = serialize(artifact_pb2.GetArtifactRequest(name=encode_digest(digest)))
        decoder = ArtifactDecoder(self._max_result_bytes)
        application = CONTROL_APPLICATION if model is None else model
        async with aclosing(self._stream(application, request, None, "GetArtifact")) as parts:
            async for part in parts:
                decoder.feed(parse(artifact_pb2.GetArtifactResponse, part))
        return decoder.finish()

    async def stat_artifacts(self, digests: Sequence[str], *, model: str | None = None) -> tuple[ArtifactInfo, ...]:
        found: list[ArtifactInfo] = []
        for request in calls.stat_requests(digests):
            application = CONTROL_APPLICATION if model is None else model
            answer = await self._unary("StatArtifacts", request, artifact_pb2.StatArtifactsResponse, application)
            found += calls.read_artifacts(answer.artifacts)
        return tuple(found)

    async def list_artifacts(self) -> tuple[ArtifactInfo, ...]:
        found: list[ArtifactInfo] = []
        request = artifact_pb2.ListArtifactsRequest()
        for _ in range(calls.MAX_PAGES):
            answer = await self._unary(
                "ListArtifacts", request, artifact_pb2.ListArtifactsResponse, CONTROL_APPLICATION
            )
            found += calls.read_artifacts(answer.artifacts)
            if not answer.next_page_token:
                return tuple(found)
            request.page_token = answer.next_page_token
        raise ProtocolError(f"the server's list of artifacts does not end after {calls.MAX_PAGES} pages")

    async def delete_artifact(self, digest: str) -> None:
        request = artifact_pb2.DeleteArtifactRequest(name=encode_digest(digest))
        await self._unary("DeleteArtifact", request, artifact_pb2.DeleteArtifactResponse, CONTROL_APPLICATION)

    async def close(self) -> None:
        self._closed = True
        self._memory.close()
        if self._blocking is not None:
            blocking, self._blocking = self._blocking, None
            blocking.close()
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    # --- the channel ------------------------------------------------------------------------------------------------

    def _open(self) -> aio.Channel:
        self._check_open()
        if self._channel is None:
            import grpc
            from grpc import aio

            _keep_freed_memory()
            if self._tls:
                credentials = grpc.ssl_channel_credentials(root_certificates=self._tls_roots)
                self._channel = aio.secure_channel(self._address, credentials, options=_options())
            else:
                self._channel = aio.insecure_channel(self._address, options=_options())
        return self._channel

    def _open_blocking(self) -> grpc.Channel:
        """A channel for uploads, beside the other: a connection that is made with the first of them."""
        self._check_open()
        if self._blocking is None:
            import grpc

            if self._tls:
                credentials = grpc.ssl_channel_credentials(root_certificates=self._tls_roots)
                self._blocking = grpc.secure_channel(self._address, credentials, options=_options())
            else:
                self._blocking = grpc.insecure_channel(self._address, options=_options())
        return self._blocking

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("this connection has been closed; open a new one")

    def _metadata(self, application: str) -> tuple[tuple[str, str], ...]:
        routing = (("application", application),)
        return routing if self._api_key is None else (*routing, ("authorization", f"Bearer {self._api_key}"))

    async def _unary(self, method: str, request: Message, response_type: type[R], application: str) -> R:
        channel = self._open()
        import grpc
        from grpc import aio

        data = serialize(request)
        call: Any = channel.unary_unary(f"/{calls.SERVICE}/{method}")
        self.bytes_sent += len(data)
        try:
            answer: bytes = await call(data, timeout=self._timeout_s, metadata=self._metadata(application))
        except (grpc.RpcError, aio.BaseError) as error:
            raise self._translated(error, self._timeout_s) from None
        self.bytes_received += len(answer)
        return parse(response_type, answer)

    async def _stream(
        self, application: str, data: bytes, timeout_s: float | None, method: str
    ) -> AsyncGenerator[bytes, None]:
        channel = self._open()
        import grpc
        from grpc import aio

        start: Any = channel.unary_stream(f"/{calls.SERVICE}/{method}")
        call = start(data, timeout=timeout_s, metadata=self._metadata(application))
        self.bytes_sent += len(data)
        try:
            async for answer in call:
                self.bytes_received += len(answer)
                yield answer
        except (grpc.RpcError, aio.BaseError) as error:
            raise self._translated(error, timeout_s) from None
        finally:
            # Also reached when the iteration is closed, cancelled, or ends by an exception of ours: the server must not
            # go on for nobody. Cancelling a finished call does nothing.
            call.cancel()

    def _translated(self, error: Exception, timeout_s: float | None) -> PatchbayError:
        """The exception of ours for one of gRPC's."""
        import grpc

        # aio.AioRpcError, or what a blocking call failed with: both know their status.
        if not isinstance(error, grpc.RpcError) or not hasattr(error, "trailing_metadata"):
            return UnavailableError(f"the connection to {self._address} cannot be used: {error}")
        status: Any = error
        code, details = status.code().name, status.details() or ""
        for key, value in status.trailing_metadata() or ():
            if key == _DETAILS_KEY and isinstance(value, bytes):
                told = decode_status(value)
                # Details that contradict the status were not made for it.
                if not isinstance(told, ServiceError) or told.code == code:
                    return told
        if (code, details) == ("CANCELLED", "CANCELLED") or (
            code in ("CANCELLED", "UNAVAILABLE", "UNKNOWN") and any(sign in details for sign in _BROKEN_OFF)
        ):
            # Seen behind HAProxy when a replica dies or comes back, and from a server that is stopping when the call
            # arrives; a call that this side cancels does not come by here.
            return service_error(
                "UNAVAILABLE",
                f"{self._address} broke off the call: the server or the replica that ran it was lost or restarted. Run"
                f" it again; `patchbay doctor` says whether the server is back. (gRPC says: {details})",
            )
        return service_error(code, self._explain(code, details, timeout_s))

    def _explain(self, code: str, details: str, timeout_s: float | None) -> str:
        match code:
            case "UNAVAILABLE" if self._tls and "handshake" in details.lower():
                return (
                    f"no TLS connection to {self._address}: does the server speak TLS there (if not, leave out grpcs:),"
                    f" and is the issuer of its certificate trusted (tls_roots=)? (gRPC says: {details})"
                )
            case "UNAVAILABLE":
                return (
                    f"no Patchbay server answers at {self._address}. Is it running (`patchbay serve`), and is the "
                    f"address right? `patchbay doctor` checks what is in the way. (gRPC says: {details})"
                )
            case "DEADLINE_EXCEEDED":
                waited = "the deadline" if timeout_s is None else f"{timeout_s:.3g} s"
                return f"{self._address} did not finish within {waited}; give more time, or ask for less at once"
            case "UNIMPLEMENTED":
                return (
                    f"the server at {self._address} does not offer this call; is it Patchbay, and not older than this "
                    f"client? ({details})"
                )
            case "INTERNAL" | "UNKNOWN":
                return f"the server at {self._address} failed: {details}"
        return details or f"{self._address} answered {code}"


def _options() -> list[tuple[str, Any]]:
    """Of every channel."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        # gRPC waits for the longer of the two.
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.primary_user_agent", f"patchbay/{__version__}"),
    ]


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Have `loop` call it, from another thread; a loop that is closed waits for nothing."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def _keep_freed_memory() -> None:
    """Have glibc's malloc keep memory of the size of messages when it is freed, instead of giving it back each time.

    It does so for blocks as large as the largest that was ever freed; a program that has let go of one array of 16 MB
    sees no difference. Without it, half of the time in which a large result is received goes to page faults. Where
    malloc was told what to keep (``MALLOC_MMAP_THRESHOLD_``), and where it is another malloc, this changes nothing.
    """
    bytes(WINDOW_BYTES)  # never touched: the system gives no pages for it


def _lost(error: ServiceError) -> bool:
    """Whether the request may never have reached a living server.

    A replica that is killed shows as UNAVAILABLE or, behind Ray Serve's proxies, as INTERNAL. An INTERNAL error that a
    servicer of ours reports carries a reason; that one would only happen again.
    """
    return isinstance(error, UnavailableError) or (isinstance(error, InternalServerError) and not error.reason)
