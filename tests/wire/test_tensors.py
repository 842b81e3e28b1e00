"""numpy arrays, and tensors that travel in chunks."""

from __future__ import annotations

from zlib import crc32

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from patchbay.arrays import numpy_dtype, shared_data, view_of
from patchbay.errors import DTypeError, LimitExceededError, ProtocolError
from patchbay.ir.dtypes import DTYPES, DType, bool_, float32, int16
from patchbay.ir.events import TensorValue
from patchbay.ir.graph import TensorData
from patchbay.v1 import service_pb2, tensor_pb2
from patchbay.wire.bounds import CHUNK_BYTES, INLINE_BYTES
from patchbay.wire.chunks import ChunkFrame, read_chunk
from patchbay.wire.events import EventDecoder, encode_event
from patchbay.wire.parse import parse, serialize
from patchbay.wire.tensors import (
    Assembler,
    chunk_offsets,
    encode_header,
    fill_chunk,
)
from tests.wire import strategies as wire


@given(wire.tensors())
def test_numpy_round_trip(tensor: TensorData) -> None:
    """A tensor becomes an array of its shape and dtype and comes back as the same bytes."""
    array = view_of(tensor)
    assert array.shape == tensor.shape
    assert array.dtype.name == tensor.dtype.name
    assert shared_data(array) == tensor


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_numpy_dtypes_keep_values(dtype: DType) -> None:
    """Every element type has a numpy dtype of the same width, and values survive in it."""
    array = np.array([0, 1, 1, 0]).astype(numpy_dtype(dtype))
    assert array.itemsize == dtype.itemsize
    np.testing.assert_array_equal(view_of(shared_data(array)), array)


def test_contiguous_arrays_are_not_copied() -> None:
    """Encoding a contiguous array, and decoding a received buffer, share its memory."""
    array = np.arange(6, dtype=np.float32)
    tensor = shared_data(array)
    array[0] = 42
    assert view_of(tensor)[0] == 42
    buffer = bytearray(24)
    result = view_of(TensorData(float32, (6,), memoryview(buffer)))
    result[1] = 1
    assert any(buffer)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int16).reshape(3, 4).T,
        np.arange(12, dtype=np.int16)[::2],
        np.arange(4, dtype=">i2"),
        np.array(7, dtype=np.int16),
        np.zeros((3, 0, 2), dtype=np.int16),
    ],
    ids=["transposed", "strided", "big-endian", "0-d", "empty"],
)
def test_awkward_layouts(array: np.ndarray) -> None:
    """Transposed, strided, big-endian, 0-d and empty arrays arrive with the same values."""
    tensor = shared_data(array)
    assert tensor.dtype == int16
    back = view_of(tensor)
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_unsupported_dtype_is_refused_with_advice() -> None:
    """An array of a dtype that is not carried says what to cast to."""
    with pytest.raises(DTypeError, match=r"complex64 cannot be part of a graph; convert with \.astype to one of"):
        shared_data(np.zeros(2, np.complex64))


def test_low_precision_floats_stay_as_they_are() -> None:
    """bfloat16 and float8 travel as their own bytes, NaN payloads included."""
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        array = np.array([1.5, -2.0, np.nan, 0.0], dtype=dtype)
        assert bytes(shared_data(array).data) == array.tobytes()


# --- chunks -------------------------------------------------------------------------------------------------------


def _tensor(n_bytes: int) -> TensorData:
    return TensorData(float32, (n_bytes // 4,), np.arange(n_bytes // 4, dtype="<f4").tobytes())


@pytest.mark.parametrize(
    ("n_bytes", "messages"),
    [(INLINE_BYTES - 4, 1), (INLINE_BYTES, 2), (CHUNK_BYTES, 2), (CHUNK_BYTES + 4, 3), (3 * CHUNK_BYTES, 4)],
)
def test_small_tensors_come_inline_and_large_ones_in_chunks(n_bytes: int, messages: int) -> None:
    """Below 64 KiB one message, above it a header and chunks of 512 KiB; either way the same tensor."""
    event = TensorValue("x", _tensor(n_bytes))
    encoded = list(encode_event(event))
    assert len(encoded) == messages
    decoder = EventDecoder()
    assert [e for m in encoded if (e := decoder.feed(m)) is not None] == [event]


def _feed(chunks: list[tensor_pb2.TensorChunk]) -> TensorData:
    tensor = _tensor(64)
    assembler = Assembler(encode_header(tensor), "x", max_bytes=10**6)
    for chunk in chunks:
        assembler.add(chunk)
    return assembler.finish()


def _chunks(tensor: TensorData | None = None) -> list[tensor_pb2.TensorChunk]:
    tensor = _tensor(64) if tensor is None else tensor
    chunks = [tensor_pb2.TensorChunk() for _ in chunk_offsets(tensor, 16)]
    for chunk, offset in zip(chunks, chunk_offsets(tensor, 16), strict=True):
        fill_chunk(chunk, tensor, offset, 16)
    return chunks


def _damaged() -> list[tensor_pb2.TensorChunk]:
    chunks = _chunks()
    chunks[2].data = b"x" + chunks[2].data[1:]
    return chunks


def _oversized() -> list[tensor_pb2.TensorChunk]:
    data = bytes(80)
    return [tensor_pb2.TensorChunk(offset=0, data=data, crc32=crc32(data))]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (_chunks()[:3], "16 bytes never came"),
        ([_chunks()[0], _chunks()[0]], "at byte 0 where 16 comes next"),
        ([_chunks()[1]], "at byte 16 where 0 comes next"),
        ([_chunks()[0], _chunks()[2]], "at byte 32 where 16 comes next"),
        ([*_chunks(), _chunks()[3]], "at byte 48 where 64 comes next"),
        (_damaged(), "the chunk at byte 32 is damaged"),
        (_oversized(), "80 bytes where 1 to 64"),
        ([tensor_pb2.TensorChunk(offset=0)], "0 bytes where 1 to 64"),
        ([tensor_pb2.TensorChunk(offset=-1, data=b"x")], "at byte -1"),
    ],
    ids=["truncated", "duplicated", "reordered", "gap", "extra", "damaged", "oversized", "empty", "negative"],
)
def test_bad_chunks_are_refused(chunks: list[tensor_pb2.TensorChunk], message: str) -> None:
    """Truncated, repeated, reordered, damaged and oversized chunks are refused by name and place."""
    with pytest.raises(ProtocolError, match=message) as caught:
        _feed(chunks)
    assert caught.value.field == "x"


def test_a_header_beyond_the_limit_allocates_nothing() -> None:
    """A header that announces a terabyte is refused before a buffer is made."""
    header = tensor_pb2.TensorHeader(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[2**38], size_bytes=2**40)
    with pytest.raises(LimitExceededError) as caught:
        Assembler(header, "x", max_bytes=10**6)
    assert (caught.value.limit, caught.value.allowed, caught.value.requested) == ("max_result_bytes", 10**6, 2**40)


def test_a_header_must_agree_with_its_size() -> None:
    """A header whose size is not that of its shape is refused."""
    header = tensor_pb2.TensorHeader(element_type=tensor_pb2.ELEMENT_TYPE_FLOAT32, shape=[4], size_bytes=15)
    with pytest.raises(ProtocolError, match="15 bytes for float32\\[4\\], which takes 16"):
        Assembler(header, "x", max_bytes=10**6)


def test_bools_other_than_0_and_1_are_refused_in_chunks_too() -> None:
    """A bool tensor that arrives in chunks is checked element by element as an inline one is."""
    tensor = TensorData(bool_, (3,), b"\x00\x01\x02")
    assembler = Assembler(encode_header(tensor), "x", max_bytes=100)
    with pytest.raises(ProtocolError, match="a bool is the byte 0 or 1"):
        for chunk in _chunks(tensor):
            assembler.add(chunk)


def frames_of(tensor: TensorData, chunk_bytes: int) -> list[ChunkFrame]:
    """The chunks of a tensor as they are sent."""
    encoded = encode_event(TensorValue("x", tensor), chunk_bytes=chunk_bytes)
    return [message for message in encoded if isinstance(message, ChunkFrame)]


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**20, 2**40])
@pytest.mark.parametrize("size", [1, 127, 128, 100_000])
def test_a_chunk_written_by_hand_is_what_protobuf_writes(offset: int, size: int) -> None:
    """The bytes of a frame are those of the message with the same chunk, and reading them gives the chunk."""
    frame = ChunkFrame(offset, memoryview(bytes(i % 251 for i in range(size))))
    message = service_pb2.ExecuteResponse(
        chunk=tensor_pb2.TensorChunk(offset=offset, data=bytes(frame.chunk.data), crc32=frame.chunk.crc32)
    )
    assert frame.SerializeToString() == serialize(message)
    assert read_chunk(frame.SerializeToString()) == frame.chunk


def test_whatever_is_no_chunk_is_left_to_the_parser() -> None:
    """A frame that is cut, longer or changed anywhere is read as the chunk that protobuf reads, or not at all."""
    whole = ChunkFrame(300, memoryview(b"0123456789")).SerializeToString()
    variants = [whole[:n] for n in range(len(whole))] + [whole + b"\x00", whole + whole]
    variants += [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in (1, 8, 128)]
    for variant in variants:
        chunk = read_chunk(variant)
        if chunk is not None:
            parsed = parse(service_pb2.ExecuteResponse, variant).chunk
            assert (chunk.offset, bytes(chunk.data), chunk.crc32) == (parsed.offset, parsed.data, parsed.crc32)


def test_chunks_are_taken_from_a_tensor_without_a_copy_and_put_into_one_buffer() -> None:
    """What is sent looks at the tensor's own memory; what is received is written to the array that the user gets."""
    values = np.arange(300_000, dtype=np.float32)
    tensor = shared_data(values)
    for frame in frames_of(tensor, 2**18):
        assert np.shares_memory(np.frombuffer(frame.chunk.data, np.uint8), values)
    decoder, found = EventDecoder(), []
    for message in encode_event(TensorValue("x", tensor), chunk_bytes=2**18):
        event = decoder.feed_bytes(message.SerializeToString(deterministic=True))
        found += [] if event is None else [event]
    (event,) = found
    assert isinstance(event, TensorValue)
    array = view_of(event.value)
    assert array.flags.writeable
    assert np.shares_memory(array, np.frombuffer(event.value.data, np.uint8))
    np.testing.assert_array_equal(array, values)


def test_receiving_allocates_the_result_and_little_else() -> None:
    """Decoding a tensor of 8 MiB from its messages takes its own memory, not a multiple of it."""
    import tracemalloc

    tensor = shared_data(np.arange(2**21, dtype=np.float32))
    messages = [m.SerializeToString(deterministic=True) for m in encode_event(TensorValue("x", tensor))]
    decoder = EventDecoder()
    decoder.feed_bytes(messages[0])
    tracemalloc.start()
    for message in messages[1:]:
        decoder.feed_bytes(message)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18


def test_a_damaged_chunk_is_refused_as_bytes_too() -> None:
    """A byte of the data that changed on the way is found by the checksum."""
    frame = bytearray(frames_of(shared_data(np.arange(40_000, dtype=np.float32)), 2**17)[0].SerializeToString())
    frame[100] ^= 1
    decoder = EventDecoder()
    decoder.feed(next(encode_event(TensorValue("x", shared_data(np.arange(40_000, dtype=np.float32))))))
    with pytest.raises(ProtocolError, match="damaged"):
        decoder.feed_bytes(bytes(frame))
