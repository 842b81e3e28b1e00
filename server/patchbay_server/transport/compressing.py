"""Whether to compress the chunks of results, decided from what this very stream shows: its rate, the gain, the effort.

Only for clients that accept it, which those on the same machine do not. A stream begins uncompressed; once it is seen
to be slow, one chunk is compressed to learn how long that takes and what it gains, and from then on the cheaper way is
taken, chunk by chunk. Compressing happens beside the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from patchbay.ir.events import COMPRESSION, Done, Event, TensorValue
from patchbay.v1 import service_pb2, tensor_pb2
from patchbay.wire.bounds import INLINE_BYTES
from patchbay.wire.checksum import crc32
from patchbay.wire.chunks import ChunkFrame
from patchbay.wire.compression import compress
from patchbay.wire.events import encode_event

#: Streams that are faster than this, in bytes a second, have nothing to gain.
FAST_BYTES_PER_S = 400e6
#: Compressing must save this part of the time at least.
MARGIN = 0.1
#: Chunks whose sending says how fast the stream is; more than the buffers between here and the link hold.
MEASURED_CHUNKS = 16
#: Chunks after which a gain that was found too small is looked for again.
RETRY_CHUNKS = 128


class Chooser:
    """Decides, chunk by chunk, whether compressing pays."""

    def __init__(self) -> None:
        self._sent: deque[tuple[int, float]] = deque(maxlen=MEASURED_CHUNKS)
        self._gain: tuple[float, float] | None = None  # seconds of compressing, bytes sent: each per byte
        self._since_tried = 0

    def sent(self, nbytes: int, seconds: float) -> None:
        """A chunk of `nbytes`, as sent, took the stream `seconds`."""
        self._sent.append((nbytes, seconds))
        self._since_tried += 1

    def tried(self, plain: int, packed: int, seconds: float) -> None:
        """Compressing a chunk of `plain` bytes took `seconds` and gave `packed`."""
        self._gain, self._since_tried = (seconds / plain, packed / plain), 0

    def should_compress(self) -> bool:
        """Whether to compress the next chunk."""
        if len(self._sent) < MEASURED_CHUNKS:
            return False
        seconds_per_byte = sum(s for _, s in self._sent) / sum(n for n, _ in self._sent)
        if seconds_per_byte < 1 / FAST_BYTES_PER_S:
            return False
        if self._gain is None or self._since_tried >= RETRY_CHUNKS:
            return True
        effort, part = self._gain
        return effort + part * seconds_per_byte < (1 - MARGIN) * seconds_per_byte


class CompressedStream:
    """The messages of one execution, large results compressed where that sends them sooner.

    Args:
        clock, pack: as in production unless a test says otherwise.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        pack: Callable[[memoryview, int], bytes] = compress,
    ) -> None:
        self._chooser, self._clock, self._pack = Chooser(), clock, pack
        self.saved_bytes = 0

    async def messages(self, event: Event) -> AsyncIterator[service_pb2.ExecuteResponse | ChunkFrame]:
        """What says `event`."""
        if isinstance(event, Done):
            event = Done(replace(event.usage, saved={**event.usage.saved, COMPRESSION: self.saved_bytes}))
        large = isinstance(event, TensorValue) and event.value.nbytes >= INLINE_BYTES
        itemsize = event.value.dtype.itemsize if isinstance(event, TensorValue) else 1
        for message in encode_event(event):
            if not isinstance(message, ChunkFrame):
                if large:
                    message.tensor.header.compression = tensor_pb2.COMPRESSION_SHUFFLE_ZSTD
                yield message
                continue
            plain, sent = message.chunk.data, len(message.chunk.data)
            packed = await self._packed(plain, itemsize) if self._chooser.should_compress() else None
            started = self._clock()
            if packed is None:
                yield message
            else:
                sent = len(packed)
                self.saved_bytes += len(plain) - sent
                yield _compressed(message.chunk.offset, packed, len(plain))
            # The stream asks for more when it has room again: that is how fast the other side takes it.
            self._chooser.sent(sent, self._clock() - started)

    async def _packed(self, plain: memoryview, itemsize: int) -> bytes | None:
        started = self._clock()
        packed = await asyncio.to_thread(self._pack, plain, itemsize)
        self._chooser.tried(len(plain), len(packed), self._clock() - started)
        return packed if len(packed) < len(plain) else None


def _compressed(offset: int, packed: bytes, plain_size: int) -> service_pb2.ExecuteResponse:
    chunk = tensor_pb2.TensorChunk(offset=offset, data=packed, crc32=crc32(packed), uncompressed_size=plain_size)
    return service_pb2.ExecuteResponse(chunk=chunk)
