"""The calls about artifacts: messages to a store and back, with the store's files beside the event loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from patchbay.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    LimitExceededError,
    ProtocolError,
    ResourceExhaustedError,
    UnsupportedError,
)
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.graph import TensorData
from patchbay.v1 import artifact_pb2
from patchbay.wire.artifacts import decode_digest, decode_put_header, encode_artifact, encode_get
from patchbay.wire.bounds import MAX_CHUNK_BYTES
from patchbay.wire.parse import parse
from patchbay.wire.tensors import ChunkOrder
from patchbay_server.transport.limits import MAX_PAGE_SIZE

#: Names of one StatArtifacts call.
MAX_NAMES = 4_096
#: Uploads of one account at a time, in one process.
MAX_UPLOADS = 16
#: An upload that sends nothing for so long is given up.
IDLE_S = 60.0
#: A chunk and what names it.
_MAX_PART_BYTES = MAX_CHUNK_BYTES + 64 * 2**10
_PAGE_SIZE = 1_000


class Upload(Protocol):
    """What `PutArtifact` needs of an upload."""

    def write(self, data: bytes | memoryview) -> None: ...

    def finish(self) -> ArtifactInfo: ...

    def abort(self) -> None: ...


class Store(Protocol):
    """What the calls need of `patchbay_server.store.artifacts.ArtifactStore`; everything blocks."""

    def begin(self, account: str, info: ArtifactInfo, *, automatic: bool = False) -> Upload | ArtifactInfo: ...

    def stat(self, account: str, digests: Sequence[str]) -> list[ArtifactInfo]: ...

    def list(self, account: str, *, after: str = "", limit: int = 100) -> tuple[list[ArtifactInfo], bool]: ...

    def open(self, account: str, digest: str) -> tuple[ArtifactInfo, TensorData]: ...

    def delete(self, account: str, digest: str) -> None: ...


class ArtifactCalls:
    """What the servicer does with a call about artifacts once it knows whose it is.

    Args:
        store: where they are kept; None where this server keeps none.
        idle_s: seconds after which an upload that sends nothing is given up.
    """

    def __init__(self, store: Store | None, *, idle_s: float = IDLE_S) -> None:
        self._kept_in = store
        self._idle_s = idle_s
        self._uploads: Counter[str] = Counter()

    @property
    def _store(self) -> Store:
        if self._kept_in is None:
            raise UnsupportedError("this server keeps no artifacts", reason="NO_ARTIFACTS")
        return self._kept_in

    async def put(self, requests: AsyncIterator[Any], account: str) -> artifact_pb2.PutArtifactResponse:
        """Take an upload, holding one chunk of it at a time."""
        requests = aiter(requests)
        with self._counted(account):
            first = await self._next(requests)
            if first is None or first.WhichOneof("part") != "header":
                raise ProtocolError("an upload begins with its header", field="header")
            info, automatic = decode_put_header(first.header)
            upload = await asyncio.to_thread(self._store.begin, account, info, automatic=automatic)
            if isinstance(upload, ArtifactInfo):
                return artifact_pb2.PutArtifactResponse(artifact=encode_artifact(upload))
            try:
                order = ChunkOrder(info.dtype, info.nbytes, "chunk")
                while (part := await self._next(requests)) is not None:
                    if part.WhichOneof("part") != "chunk":
                        raise ProtocolError("a header where a chunk comes next", field="chunk")
                    await asyncio.to_thread(upload.write, order.take(part.chunk))
                if order.missing_bytes:
                    raise ProtocolError(f"the upload ended {order.missing_bytes} bytes too early", field="chunk")
                stored = await asyncio.to_thread(upload.finish)
            finally:
                upload.abort()
            return artifact_pb2.PutArtifactResponse(artifact=encode_artifact(stored))

    async def get(self, request: artifact_pb2.GetArtifactRequest, account: str) -> AsyncIterator[Any]:
        """Hand out an artifact, a chunk at a time."""
        info, tensor = await asyncio.to_thread(self._store.open, account, decode_digest(request.name, "name"))
        parts = encode_get(info, tensor)
        # A thread for each: a page of the file may have to come from a disk.
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part

    async def stat(
        self, request: artifact_pb2.StatArtifactsRequest, account: str
    ) -> artifact_pb2.StatArtifactsResponse:
        """Say which are there."""
        if len(request.names) > MAX_NAMES:
            raise LimitExceededError(
                f"{len(request.names)} names in one call; at most {MAX_NAMES} are allowed (limit max_names)",
                limit="max_names",
                allowed=MAX_NAMES,
                requested=len(request.names),
                field="names",
            )
        digests = [decode_digest(name, f"names[{i}]") for i, name in enumerate(request.names)]
        found = await asyncio.to_thread(self._store.stat, account, digests)
        return artifact_pb2.StatArtifactsResponse(artifacts=map(encode_artifact, found))

    async def list(
        self, request: artifact_pb2.ListArtifactsRequest, account: str
    ) -> artifact_pb2.ListArtifactsResponse:
        """A page of what the account has."""
        if request.page_size < 0:
            raise InvalidRequestError("page_size must not be negative", reason="INVALID_PAGE_SIZE")
        size = min(request.page_size or _PAGE_SIZE, MAX_PAGE_SIZE)
        after = "" if not request.page_token else decode_digest(request.page_token, "page_token")
        found, more = await asyncio.to_thread(self._store.list, account, after=after, limit=size)
        page = [encode_artifact(info) for info in found]
        return artifact_pb2.ListArtifactsResponse(artifacts=page, next_page_token=page[-1].name if more else "")

    async def delete(
        self, request: artifact_pb2.DeleteArtifactRequest, account: str
    ) -> artifact_pb2.DeleteArtifactResponse:
        """Remove one."""
        await asyncio.to_thread(self._store.delete, account, decode_digest(request.name, "name"))
        return artifact_pb2.DeleteArtifactResponse()

    @contextmanager
    def _counted(self, account: str) -> Iterator[None]:
        if self._uploads[account] >= MAX_UPLOADS:
            raise ResourceExhaustedError(
                f"{MAX_UPLOADS} uploads of yours are under way already; wait for one to end",
                reason="TOO_MANY_UPLOADS",
                retry_after_s=1.0,
            )
        self._uploads[account] += 1
        try:
            yield
        finally:
            self._uploads[account] -= 1
            if not self._uploads[account]:
                del self._uploads[account]

    async def _next(self, requests: AsyncIterator[Any]) -> artifact_pb2.PutArtifactRequest | None:
        """The next message; None at the end."""
        try:
            request = await asyncio.wait_for(anext(requests), self._idle_s)
        except StopAsyncIteration:
            return None
        except asyncio.TimeoutError:
            raise DeadlineExceededError(
                f"the upload sent nothing for {self._idle_s:g} s; begin again", reason="UPLOAD_IDLE"
            ) from None
        if not isinstance(request, bytes):
            part: artifact_pb2.PutArtifactRequest = request
            return part
        if len(request) > _MAX_PART_BYTES:
            raise ProtocolError(f"a message of {len(request)} bytes; at most {_MAX_PART_BYTES}", field="chunk")
        return parse(artifact_pb2.PutArtifactRequest, request)
