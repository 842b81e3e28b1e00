"""Tensors between two forms: the IR's `TensorData` and messages. Their bytes are copied once, if at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from patchbay.errors import LimitExceededError, ProtocolError
from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.graph import TensorData
from patchbay.ir.limits import MAX_DIMS, MAX_TENSOR_SPAN
from patchbay.v1 import tensor_pb2
from patchbay.wire.bounds import CHUNK_BYTES, MAX_CHUNK_BYTES
from patchbay.wire.checksum import crc32
from patchbay.wire.chunks import Chunk
from patchbay.wire.compression import decompress, is_available
from patchbay.wire.memory import ResultMemory

if TYPE_CHECKING:
    pass


def _element_type(dtype: str) -> tensor_pb2.ElementType:
    # protobuf's stubs and its generated ones disagree on what Value returns.
    return cast("tensor_pb2.ElementType", tensor_pb2.ElementType.Value(f"ELEMENT_TYPE_{dtype.upper()}"))


_ELEMENT_TYPES: Mapping[str, tensor_pb2.ElementType] = MappingProxyType({name: _element_type(name) for name in DTYPES})
_DTYPES: Mapping[int, DType] = MappingProxyType({number: DTYPES[name] for name, number in _ELEMENT_TYPES.items()})

# --- messages -----------------------------------------------------------------------------------------------------


def encode_dtype(dtype: DType) -> tensor_pb2.ElementType:
    return _ELEMENT_TYPES[dtype.name]


def decode_dtype(number: int, field: str) -> DType:
    """
    Raises:
        ProtocolError: a number that names no element type known here.
    """
    dtype = _DTYPES.get(number)
    if dtype is None:
        raise ProtocolError(f"{field}: {number} is not an element type that this version knows", field=field)
    return dtype


def decode_shape(extents: Sequence[int], dtype: DType, field: str) -> tuple[int, ...]:
    """
    Raises:
        ProtocolError: too many extents, a negative one, or so large that strides would overflow.
    """
    if len(extents) > MAX_DIMS:
        raise ProtocolError(f"{field}: {len(extents)} dimensions; at most {MAX_DIMS}", field=field)
    shape = tuple(extents)
    if any(extent < 0 for extent in shape):
        raise ProtocolError(f"{field}: negative extent in {list(shape)}", field=field)
    if math.prod(max(extent, 1) for extent in shape) * dtype.itemsize >= MAX_TENSOR_SPAN:
        raise ProtocolError(f"{field}: {list(shape)} is larger than any memory", field=field)
    return shape


def _check_data(dtype: DType, shape: tuple[int, ...], size: int, field: str) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ProtocolError(f"{field}: {size} bytes for {dtype}{list(shape)}, which takes {expected}", field=field)


def _check_elements(dtype: DType, data: bytes | memoryview, field: str) -> None:
    # Any other byte in a bool is undefined behaviour in the C++ that reads it later.
    if dtype.kind == "bool" and bytes(data).translate(None, b"\x00\x01"):
        raise ProtocolError(f"{field}: a bool is the byte 0 or 1", field=field)


def encode_tensor(tensor: TensorData) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(element_type=encode_dtype(tensor.dtype), shape=tensor.shape, data=_as_bytes(tensor.data))


def decode_tensor(
    message: tensor_pb2.Tensor, field: str, charge: Callable[[int, str], None] | None = None
) -> TensorData:
    """
    Args:
        message: the message.
        field: its path, for errors.
        charge: called with the bytes that the shape stands for, before they are copied out of the message; may raise.

    Raises:
        ProtocolError: an unknown element type, an impossible shape, or bytes that do not fill it exactly.
    """
    dtype = decode_dtype(message.element_type, f"{field}.element_type")
    shape = decode_shape(message.shape, dtype, f"{field}.shape")
    if charge is not None:
        charge(math.prod(shape) * dtype.itemsize, field)
    data = message.data
    _check_data(dtype, shape, len(data), f"{field}.data")
    _check_elements(dtype, data, f"{field}.data")
    return TensorData(dtype, shape, data)


def _as_bytes(data: bytes | memoryview) -> bytes:
    return data if isinstance(data, bytes) else data.tobytes()


# --- chunks -------------------------------------------------------------------------------------------------------


def encode_header(tensor: TensorData) -> tensor_pb2.TensorHeader:
    return tensor_pb2.TensorHeader(
        element_type=encode_dtype(tensor.dtype), shape=tensor.shape, size_bytes=tensor.nbytes
    )


def chunk_offsets(tensor: TensorData, chunk_bytes: int = CHUNK_BYTES) -> range:
    """Where the chunks of `tensor` begin."""
    return range(0, tensor.nbytes, chunk_bytes)


def fill_chunk(
    message: tensor_pb2.TensorChunk, tensor: TensorData, offset: int, chunk_bytes: int = CHUNK_BYTES
) -> None:
    """Put the at most `chunk_bytes` bytes of `tensor` from `offset` on into `message`.

    It fills a message in its place, inside another one for instance: building it apart would copy every byte once more.
    """
    part = bytes(memoryview(tensor.data)[offset : offset + chunk_bytes])
    message.offset = offset
    message.data = part
    message.crc32 = crc32(part)


def _is_compressed(header: tensor_pb2.TensorHeader, field: str) -> bool:
    """
    Raises:
        ProtocolError: compressed in a way that was not accepted.
    """
    if header.compression == tensor_pb2.COMPRESSION_UNSPECIFIED:
        return False
    if header.compression != tensor_pb2.COMPRESSION_SHUFFLE_ZSTD or not is_available():
        raise ProtocolError(f"{field}: compressed in a way that this client did not accept", field=field)
    return True


class ChunkOrder:
    """Holds the chunks of one tensor to their order, sizes and checksums.

    Args:
        dtype: the tensor's element type.
        size: its bytes.
        field: its place, for errors.
        compressed: whether chunks may be.
    """

    def __init__(self, dtype: DType, size: int, field: str, *, compressed: bool = False) -> None:
        self._dtype, self._size, self._field, self._compressed = dtype, size, field, compressed
        self._received = 0

    @property
    def missing_bytes(self) -> int:
        return self._size - self._received

    def take(self, chunk: tensor_pb2.TensorChunk | Chunk) -> bytes | memoryview:
        """The chunk's bytes, once it is known to be the next.

        Raises:
            ProtocolError: a chunk out of order, repeated, empty, too large, or damaged.
        """
        data, offset, field = chunk.data, chunk.offset, self._field
        packed = chunk.uncompressed_size
        size = packed or len(data)
        if packed and not self._compressed:
            raise ProtocolError(f"{field}: a compressed chunk, which nobody announced", field=field)
        if offset != self._received:
            raise ProtocolError(f"{field}: a chunk at byte {offset} where {self._received} comes next", field=field)
        allowed = min(self.missing_bytes, MAX_CHUNK_BYTES)
        if not data or not 0 < size <= allowed or len(data) > MAX_CHUNK_BYTES:
            raise ProtocolError(f"{field}: a chunk of {size} bytes where 1 to {allowed} may come", field=field)
        if crc32(data) != chunk.crc32:
            raise ProtocolError(f"{field}: the chunk at byte {offset} is damaged (its checksum differs)", field=field)
        if packed:
            data = decompress(data, size, self._dtype.itemsize, field)
        _check_elements(self._dtype, data, field)
        self._received += size
        return data


class Assembler:
    """Puts the chunks of one tensor together, straight into one buffer of the size that its header announced."""

    def __init__(
        self, header: tensor_pb2.TensorHeader, field: str, max_bytes: int, memory: ResultMemory | None = None
    ) -> None:
        """
        Args:
            header: what is announced.
            field: the tensor's place, for errors.
            max_bytes: a larger one is refused.
            memory: where it is put; None: new memory.

        Raises:
            ProtocolError: a header that contradicts itself.
            LimitExceededError: a tensor of more than `max_bytes`; nothing has been allocated.
        """
        self._field = field
        self._dtype = decode_dtype(header.element_type, f"{field}.element_type")
        self._shape = decode_shape(header.shape, self._dtype, f"{field}.shape")
        _check_data(self._dtype, self._shape, header.size_bytes, f"{field}.size_bytes")
        if header.size_bytes > max_bytes:
            raise LimitExceededError(
                f"{field}: {header.size_bytes} bytes of results; this client takes {max_bytes} more",
                limit="max_result_bytes",
                allowed=max_bytes,
                requested=header.size_bytes,
            )
        compressed = _is_compressed(header, field)
        self._order = ChunkOrder(self._dtype, header.size_bytes, field, compressed=compressed)
        self._buffer = (ResultMemory(0) if memory is None else memory).take(header.size_bytes)

    @property
    def complete(self) -> bool:
        return not self._order.missing_bytes

    @property
    def missing_bytes(self) -> int:
        return self._order.missing_bytes

    def add(self, chunk: tensor_pb2.TensorChunk | Chunk) -> None:
        """
        Raises:
            ProtocolError: a chunk out of order, repeated, empty, too large, or damaged.
        """
        data = self._order.take(chunk)
        self._buffer[chunk.offset : chunk.offset + len(data)] = data

    def finish(self) -> TensorData:
        """
        Raises:
            ProtocolError: bytes are missing.
        """
        if not self.complete:
            raise ProtocolError(f"{self._field}: {self.missing_bytes} bytes never came", field=self._field)
        return TensorData(self._dtype, self._shape, self._buffer)
