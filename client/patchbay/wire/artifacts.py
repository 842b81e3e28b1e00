"""Artifacts between the IR and messages: what is known of one, and its bytes in chunks, either way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchbay.errors import InvalidRequestError, LimitExceededError, ProtocolError
from patchbay.ir.artifacts import PREFIX, ArtifactInfo
from patchbay.ir.graph import TensorData
from patchbay.v1 import artifact_pb2
from patchbay.wire.bounds import CHUNK_BYTES, MAX_NAME_CHARS
from patchbay.wire.status import decode_status
from patchbay.wire.tensors import (
    Assembler,
    chunk_offsets,
    decode_dtype,
    decode_shape,
    encode_dtype,
    encode_header,
    fill_chunk,
)

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_RESOURCE = re.compile(r"artifacts/([0-9a-f]{64})", re.ASCII)


# --- names --------------------------------------------------------------------------------------------------------


def encode_digest(digest: str) -> str:
    """``sha256:...`` as a resource name.

    Raises:
        InvalidRequestError: not a digest.
    """
    resource = f"artifacts/{digest.removeprefix(PREFIX)}"
    if not digest.startswith(PREFIX) or _RESOURCE.fullmatch(resource) is None:
        raise InvalidRequestError(
            f"{digest[:100]!r} is not an artifact's digest, such as 'sha256:' and 64 hexadecimal digits",
            reason="INVALID_DIGEST",
        )
    return resource


def decode_digest(name: str, field: str) -> str:
    """
    Raises:
        ProtocolError: not ``artifacts/`` and 64 hexadecimal digits in lower case.
    """
    match = _RESOURCE.fullmatch(name)
    if match is None:
        raise ProtocolError(f"{field}: {name[:100]!r} is not an artifact's name, 'artifacts/<sha256>'", field=field)
    return PREFIX + match.group(1)


# --- what is known of one -----------------------------------------------------------------------------------------


def encode_artifact(info: ArtifactInfo) -> artifact_pb2.Artifact:
    message = artifact_pb2.Artifact(
        name=encode_digest(info.digest),
        display_name=info.name,
        element_type=encode_dtype(info.dtype),
        shape=info.shape,
        size_bytes=info.nbytes,
    )
    for seconds, into in ((info.created_at, message.create_time), (info.expires_at, message.expire_time)):
        if seconds:
            into.FromMilliseconds(round(seconds * 1e3))
    return message


def decode_artifact(message: artifact_pb2.Artifact, field: str) -> ArtifactInfo:
    """
    Raises:
        ProtocolError: a name, type, shape, size or time that cannot be.
    """
    dtype = decode_dtype(message.element_type, f"{field}.element_type")
    shape = decode_shape(message.shape, dtype, f"{field}.shape")
    if message.size_bytes != math.prod(shape) * dtype.itemsize:
        raise ProtocolError(f"{field}.size_bytes: {message.size_bytes} for {dtype}{list(shape)}", field=field)
    return ArtifactInfo(
        digest=decode_digest(message.name, f"{field}.name"),
        dtype=dtype,
        shape=shape,
        nbytes=message.size_bytes,
        name=_display_name(message.display_name, f"{field}.display_name"),
        created_at=_seconds(message.create_time),
        expires_at=_seconds(message.expire_time),
    )


def _seconds(time: Timestamp) -> float:
    return time.seconds + time.nanos / 1e9


def _display_name(name: str, field: str) -> str:
    if len(name) > MAX_NAME_CHARS:
        raise ProtocolError(f"{field}: {len(name)} characters; at most {MAX_NAME_CHARS}", field=field)
    return name


# --- their bytes --------------------------------------------------------------------------------------------------


def encode_put(
    info: ArtifactInfo, tensor: TensorData, automatic: bool, known: bool = False
) -> Iterator[artifact_pb2.PutArtifactRequest]:
    """The messages that upload `tensor`, made one at a time as they are asked for; `known`: only the first.

    Raises:
        InvalidRequestError: a name that cannot be sent.
    """
    try:
        header = artifact_pb2.PutArtifactHeader(
            name=encode_digest(info.digest),
            tensor=encode_header(tensor),
            display_name=_display_name(info.name, "name"),
            automatic=automatic,
        )
    except (ValueError, UnicodeError) as error:
        raise InvalidRequestError(f"an artifact cannot be called so: {error}", reason="INVALID_NAME") from None
    yield artifact_pb2.PutArtifactRequest(header=header)
    for offset in () if known else chunk_offsets(tensor, CHUNK_BYTES):
        part = artifact_pb2.PutArtifactRequest()
        fill_chunk(part.chunk, tensor, offset, CHUNK_BYTES)
        yield part


def decode_put_header(message: artifact_pb2.PutArtifactHeader) -> tuple[ArtifactInfo, bool]:
    """What is about to come, and whether it is uploaded on behalf of a graph.

    Raises:
        ProtocolError: a header that contradicts itself.
    """
    tensor = message.tensor
    dtype = decode_dtype(tensor.element_type, "header.tensor.element_type")
    shape = decode_shape(tensor.shape, dtype, "header.tensor.shape")
    if tensor.size_bytes != math.prod(shape) * dtype.itemsize:
        field = "header.tensor.size_bytes"
        raise ProtocolError(f"{field}: {tensor.size_bytes} bytes for {dtype}{list(shape)}", field=field)
    digest = decode_digest(message.name, "header.name")
    name = _display_name(message.display_name, "header.display_name")
    return ArtifactInfo(digest, dtype, shape, tensor.size_bytes, name), message.automatic


def encode_get(info: ArtifactInfo, tensor: TensorData) -> Iterator[artifact_pb2.GetArtifactResponse]:
    """The messages that hand out an artifact."""
    yield artifact_pb2.GetArtifactResponse(artifact=encode_artifact(info))
    for offset in chunk_offsets(tensor, CHUNK_BYTES):
        part = artifact_pb2.GetArtifactResponse()
        fill_chunk(part.chunk, tensor, offset, CHUNK_BYTES)
        yield part


class ArtifactDecoder:
    """Puts the messages that hand out one artifact together.

    Args:
        max_bytes: a larger one is refused before it is allocated.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._info: ArtifactInfo | None = None
        self._assembler: Assembler | None = None

    def feed(self, message: artifact_pb2.GetArtifactResponse) -> None:
        """
        Raises:
            ProtocolError: a message that may not come here.
            LimitExceededError: larger than this client takes.
            PatchbayError: what the server says went wrong.
        """
        kind = message.WhichOneof("part")
        if kind == "error_status":
            raise decode_status(message.error_status)
        if kind == "artifact" and self._assembler is None:
            self._info = info = decode_artifact(message.artifact, "artifact")
            if info.nbytes > self._max_bytes:
                raise LimitExceededError(
                    f"the artifact has {info.nbytes} bytes; this client takes {self._max_bytes}",
                    limit="max_result_bytes",
                    allowed=self._max_bytes,
                    requested=info.nbytes,
                )
            tensor = TensorData(info.dtype, info.shape, b"")
            header = encode_header(tensor)
            header.size_bytes = info.nbytes
            self._assembler = Assembler(header, "artifact", self._max_bytes)
        elif kind == "chunk" and self._assembler is not None:
            self._assembler.add(message.chunk)
        else:
            raise ProtocolError(f"{kind} is not what comes next of an artifact")

    def finish(self) -> tuple[ArtifactInfo, TensorData]:
        """
        Raises:
            ProtocolError: the stream ended before everything was sent.
        """
        if self._assembler is None or self._info is None:
            raise ProtocolError("the answer ended before it began")
        return self._info, self._assembler.finish()
