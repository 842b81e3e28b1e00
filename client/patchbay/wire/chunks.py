"""Chunks of large tensors, written and read as bytes: each side copies every element once, and no message is built.

A protobuf message copies its bytes when they are put in, when it is serialized, and when they are taken out. What is
written here is byte for byte what protobuf would write for an ``ExecuteResponse`` that holds a ``TensorChunk``.
"""

from __future__ import annotations

from typing import NamedTuple

from patchbay.v1 import service_pb2, tensor_pb2
from patchbay.wire.checksum import crc32

_VARINT, _FIXED32, _DELIMITED = 0, 5, 2


def _tag(descriptor: object, name: str, wire_type: int) -> bytes:
    number: int = descriptor.fields_by_name[name].number  # type: ignore[attr-defined]
    assert number < 16, "one byte"
    return bytes([number << 3 | wire_type])


_CHUNK = _tag(service_pb2.ExecuteResponse.DESCRIPTOR, "chunk", _DELIMITED)
_OFFSET = _tag(tensor_pb2.TensorChunk.DESCRIPTOR, "offset", _VARINT)
_DATA = _tag(tensor_pb2.TensorChunk.DESCRIPTOR, "data", _DELIMITED)
_CRC32 = _tag(tensor_pb2.TensorChunk.DESCRIPTOR, "crc32", _FIXED32)


class Chunk(NamedTuple):
    """What a ``TensorChunk`` says, over the memory of the message that it came in."""

    offset: int
    data: memoryview
    crc32: int
    uncompressed_size: int = 0


class ChunkFrame:
    """An ``ExecuteResponse`` with a chunk, as far as those who send messages look into it.

    Args:
        offset: where the chunk begins in its tensor.
        data: its bytes; copied when it is serialized.
    """

    __slots__ = ("chunk",)

    def __init__(self, offset: int, data: memoryview) -> None:
        self.chunk = Chunk(offset, data, crc32(data))

    def SerializeToString(self, *, deterministic: bool = True) -> bytes:
        """The message's bytes; named as protobuf names it, for Ray Serve calls it."""
        del deterministic
        offset, data, checksum, _ = self.chunk
        before = _OFFSET + _varint(offset) if offset else b""
        before += _DATA + _varint(len(data))
        after = _CRC32 + checksum.to_bytes(4, "little") if checksum else b""
        size = _varint(len(before) + len(data) + len(after))
        return b"".join((_CHUNK, size, before, data, after))

    def ByteSize(self) -> int:
        """Bytes of the message, up to the few around its data."""
        return len(self.chunk.data)


def read_chunk(message: bytes) -> Chunk | None:
    """The chunk in an ``ExecuteResponse`` written as above; None for any other bytes, which a parser has to read."""
    if message[:1] != _CHUNK:
        return None
    size, at = _read_varint(message, 1)
    end = len(message)
    if at + size != end:
        return None
    offset = checksum = 0
    if message[at : at + 1] == _OFFSET:
        offset, at = _read_varint(message, at + 1)
    if message[at : at + 1] != _DATA:
        return None
    size, at = _read_varint(message, at + 1)
    stop = at + size
    if stop != end:
        if stop + 5 != end or message[stop : stop + 1] != _CRC32:
            return None
        checksum = int.from_bytes(message[stop + 1 :], "little")
    return Chunk(offset, memoryview(message)[at:stop], checksum)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; (-1, at), which fits nothing, where there is none of at most 56 bits."""
    value = 0
    for shift, byte in enumerate(data[at : at + 8]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    return -1, at
