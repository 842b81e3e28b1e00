"""Chunks that are compressed: what they become again, what is refused, and when compressing is chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from patchbay.arrays import shared_data, view_of
from patchbay.errors import ProtocolError
from patchbay.ir.events import COMPRESSION, Done, Event, TensorValue, Usage
from patchbay.transport.grpc import is_loopback
from patchbay.v1 import service_pb2, tensor_pb2
from patchbay.wire import compression
from patchbay.wire.checksum import crc32
from patchbay.wire.chunks import ChunkFrame
from patchbay.wire.events import EventDecoder, encode_event
from patchbay.wire.parse import serialize
from patchbay_server.transport.compressing import MEASURED_CHUNKS, Chooser, CompressedStream

#: Smooth enough to compress, as activations are.
VALUES = np.cumsum(np.random.default_rng(0).standard_normal(2**22).astype(np.float32) * 1e-3)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_what_was_compressed_comes_back(itemsize: int, count: int) -> None:
    """Elements of any size are regrouped and put back, byte for byte."""
    data = np.random.default_rng(count).bytes(itemsize * count)
    packed = compression.compress(memoryview(data), itemsize)
    assert bytes(compression.decompress(packed, len(data), itemsize, "x")) == data


def test_a_chunk_that_would_become_more_than_it_says_is_refused_before_it_does() -> None:
    """A frame whose content size differs, is missing, or is not of whole elements is not decompressed."""
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(2**26))
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    for frame, size in ((bomb, 4096), (bomb, 2**20), (silent, 4096), (b"no frame at all", 4096), (bomb[:20], 2**26)):
        with pytest.raises(ProtocolError, match="chunk"):
            compression.decompress(frame, size, 4, "x")
    with pytest.raises(ProtocolError, match="chunk"):
        compression.decompress(compression.compress(memoryview(bytes(6)), 1), 6, 4, "x")


def _chunk(data: bytes, size: int) -> service_pb2.ExecuteResponse:
    chunk = tensor_pb2.TensorChunk(data=data, crc32=crc32(data), uncompressed_size=size)
    return service_pb2.ExecuteResponse(chunk=chunk)


def test_a_compressed_chunk_that_nobody_announced_is_refused() -> None:
    """Only a header that names the compression allows compressed chunks, and only within what is still to come."""
    value = shared_data(VALUES[: 2**16])
    packed = compression.compress(memoryview(value.data), 4)
    plain, announced = (next(iter(encode_event(TensorValue("x", value)))) for _ in range(2))
    assert isinstance(announced, service_pb2.ExecuteResponse) and isinstance(plain, service_pb2.ExecuteResponse)
    decoder = EventDecoder()
    decoder.feed(plain)
    with pytest.raises(ProtocolError, match="nobody announced"):
        decoder.feed(_chunk(packed, 2**18))
    announced.tensor.header.compression = tensor_pb2.COMPRESSION_SHUFFLE_ZSTD
    decoder = EventDecoder()
    decoder.feed(announced)
    with pytest.raises(ProtocolError, match="1 to 262144 may come"):
        decoder.feed(_chunk(packed, 2**18 + 4))
    event = decoder.feed_bytes(serialize(_chunk(packed, 2**18)))
    assert isinstance(event, TensorValue)
    np.testing.assert_array_equal(view_of(event.value), VALUES[: 2**16])


class _Link:
    """A link of a given speed, and a compressor of a given speed, on a clock of their own."""

    def __init__(self, bytes_per_s: float, packed_per_s: float = 1e9) -> None:
        self.now, self._rate, self._effort = 0.0, bytes_per_s, packed_per_s
        self.sent = self.compressed_chunks = 0

    def clock(self) -> float:
        return self.now

    def pack(self, data: memoryview, itemsize: int) -> bytes:
        self.now += len(data) / self._effort
        return compression.compress(data, itemsize)

    def carry(self, message: service_pb2.ExecuteResponse | ChunkFrame) -> bytes:
        data = message.SerializeToString(deterministic=True)
        self.now += len(data) / self._rate
        self.sent += len(data)
        self.compressed_chunks += not isinstance(message, ChunkFrame) and message.chunk.uncompressed_size > 0
        return data


def _through(link: _Link, pack: Callable[[memoryview, int], bytes] | None = None) -> list[Event]:
    """What arrives of a large value and the end, over `link`."""

    async def run() -> list[Event]:
        stream, decoder = CompressedStream(clock=link.clock, pack=pack or link.pack), EventDecoder()
        found = []
        for event in (TensorValue("x", shared_data(VALUES)), Done(Usage())):
            async for message in stream.messages(event):
                found.append(decoder.feed_bytes(link.carry(message)))
        decoder.finish()
        return [event for event in found if event is not None]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("bytes_per_s", "packed_per_s", "compresses"), [(10e6, 1e9, True), (10e6, 10e6, False), (2e9, 1e9, False)]
)
def test_chunks_are_compressed_where_that_sends_them_sooner(
    bytes_per_s: float, packed_per_s: float, compresses: bool
) -> None:
    """A slow link with a fast compressor compresses; a slow compressor or a fast link does not; values are the same."""
    link = _Link(bytes_per_s, packed_per_s)
    value, done = _through(link)
    assert isinstance(value, TensorValue) and isinstance(done, Done)
    np.testing.assert_array_equal(view_of(value.value), VALUES)
    assert (link.compressed_chunks > 1) is compresses
    saved = done.usage.saved[COMPRESSION]
    assert (saved > VALUES.nbytes // 20) is compresses
    assert link.sent + saved == pytest.approx(VALUES.nbytes, rel=0.01)


def test_what_does_not_compress_is_sent_as_it_is() -> None:
    """A chunk that compressing makes no smaller travels uncompressed."""
    link = _Link(10e6)
    value, done = _through(link, lambda data, itemsize: bytes(len(data) + 1))
    assert isinstance(value, TensorValue) and isinstance(done, Done)
    np.testing.assert_array_equal(view_of(value.value), VALUES)
    assert (link.compressed_chunks, done.usage.saved[COMPRESSION]) == (0, 0)


def test_nothing_is_compressed_before_the_rate_is_known() -> None:
    """The first chunks of a stream say how fast it is."""
    chooser = Chooser()
    for _ in range(MEASURED_CHUNKS):
        assert not chooser.should_compress()
        chooser.sent(2**19, 1.0)
    assert chooser.should_compress()


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("[::1]:8000", True),
        ("unix:/run/x", True),
        ("10.0.0.1:8000", False),
        ("localhost.example.org:443", False),
        ("dns:///127.0.0.1:80", True),
    ],
)
def test_a_client_on_the_same_machine_accepts_no_compression(address: str, own: bool) -> None:
    """Addresses of the machine itself are known, however they are spelled."""
    assert is_loopback(address) is own
