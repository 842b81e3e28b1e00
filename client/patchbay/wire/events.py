"""What a server says while it executes: events of the IR to messages, and messages back to events.

A `TensorValue` below 64 KiB is one message; a larger one is a header and chunks, which the decoder puts together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from patchbay.errors import LimitExceededError, ProtocolError
from patchbay.ir.events import Cost, Done, Event, ExecuteOptions, Kept, Progress, Queued, Started, TensorValue, Usage
from patchbay.v1 import events_pb2, service_pb2, tensor_pb2
from patchbay.wire.artifacts import decode_artifact, encode_artifact
from patchbay.wire.bounds import CHUNK_BYTES, INLINE_BYTES, MAX_NAME_CHARS, MAX_RESULT_BYTES
from patchbay.wire.chunks import Chunk, ChunkFrame, read_chunk
from patchbay.wire.memory import ResultMemory
from patchbay.wire.parse import parse
from patchbay.wire.status import decode_status
from patchbay.wire.tensors import Assembler, chunk_offsets, decode_tensor, encode_header, encode_tensor

_COST = ("flops", "peak_bytes", "result_bytes", "tokens", "passes", "kept_bytes")
_USAGE = (
    "tokens",
    "passes",
    "layers_run",
    "layers_skipped",
    "nodes",
    "nodes_run",
    "queue_ms",
    "run_ms",
    "bytes_in",
    "bytes_out",
)
_MAX_SAVED = 1_024
_MAX_DISABLED = 256


# --- options ------------------------------------------------------------------------------------------------------


def encode_options(options: ExecuteOptions) -> service_pb2.ExecuteOptions:
    return service_pb2.ExecuteOptions(
        deterministic=options.deterministic, disabled_optimizations=options.disabled, dry_run=options.dry_run
    )


def decode_options(message: service_pb2.ExecuteOptions) -> ExecuteOptions:
    """
    Raises:
        ProtocolError: more or longer names than there can be optimisations.
    """
    names = message.disabled_optimizations
    if len(names) > _MAX_DISABLED or any(len(name) > MAX_NAME_CHARS for name in names):
        field = "options.disabled_optimizations"
        raise ProtocolError(f"{field}: at most {_MAX_DISABLED} names of {MAX_NAME_CHARS} characters", field=field)
    return ExecuteOptions(deterministic=message.deterministic, disabled=tuple(names), dry_run=message.dry_run)


# --- encoding -----------------------------------------------------------------------------------------------------


def encode_event(event: Event, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[service_pb2.ExecuteResponse | ChunkFrame]:
    """The messages that say `event`, made one at a time as they are asked for."""
    response = service_pb2.ExecuteResponse
    match event:
        case TensorValue(name=name, value=value, finite=finite) if value.nbytes < INLINE_BYTES:
            yield response(value=events_pb2.ValueEvent(name=name, tensor=encode_tensor(value), finite=finite))
        case TensorValue(name=name, value=value, finite=finite):
            yield response(tensor=events_pb2.TensorEvent(name=name, header=encode_header(value), finite=finite))
            data = memoryview(value.data)
            for offset in chunk_offsets(value, chunk_bytes):
                yield ChunkFrame(offset, data[offset : offset + chunk_bytes])
        case Kept(name=name, artifact=artifact, finite=finite):
            yield response(kept=events_pb2.KeptEvent(name=name, artifact=encode_artifact(artifact), finite=finite))
        case Progress(pass_index=done, passes=total):
            yield response(progress=events_pb2.ProgressEvent(passes_done=done, passes_total=total))
        case Queued(position=position):
            yield response(queued=events_pb2.QueuedEvent(position=position))
        case Started():
            yield response(started=events_pb2.StartedEvent())
        case Done(usage=usage):
            yield response(done=events_pb2.DoneEvent(usage=_encode_usage(usage)))


def _encode_usage(usage: Usage) -> events_pb2.Usage:
    cost = events_pb2.Cost(**{name: getattr(usage.cost, name) for name in _COST})
    return events_pb2.Usage(cost=cost, saved=dict(usage.saved), **{name: getattr(usage, name) for name in _USAGE})


# --- decoding -----------------------------------------------------------------------------------------------------


class EventDecoder:
    """Messages of one execution, in the order of their arrival, to events."""

    def __init__(self, max_result_bytes: int = MAX_RESULT_BYTES, memory: ResultMemory | None = None) -> None:
        """
        Args:
            max_result_bytes: results beyond this many bytes, taken together, are refused before they are allocated.
            memory: where large ones are put; None: each in new memory.
        """
        self._memory = memory
        self._max_result_bytes = max_result_bytes
        self._result_bytes = 0
        self._open: tuple[Assembler, str, bool] | None = None
        self._done = False

    def feed_bytes(self, message: bytes) -> Event | None:
        """As `feed`, for a message that is not parsed yet."""
        if self._open is not None:
            chunk = read_chunk(message)
            if chunk is not None:
                return self._feed_chunk(chunk)
        return self.feed(parse(service_pb2.ExecuteResponse, message))

    def feed(self, message: service_pb2.ExecuteResponse | ChunkFrame) -> Event | None:
        """The event that `message` completes, or None while a tensor is incomplete.

        Raises:
            ProtocolError: a message that may not come here, or contradicts itself.
            LimitExceededError: more results than this client takes.
            GraphError, ServiceError: what the server says went wrong.
        """
        if isinstance(message, ChunkFrame):
            return self._feed_chunk(message.chunk)  # in-process, from a servicer of ours
        kind = message.WhichOneof("event")
        if kind == "error":
            raise decode_status(message.error.status)
        if self._done:
            raise ProtocolError(f"{kind} after the end")
        if kind == "chunk":
            return self._feed_chunk(message.chunk)
        if self._open is not None:
            raise ProtocolError(f"{kind} where {self._open[0].missing_bytes} bytes of {self._open[1]!r} were to come")
        match kind:
            case "value":
                value = message.value
                self._take(len(value.tensor.data))
                return TensorValue(value.name, decode_tensor(value.tensor, f"{value.name}.tensor"), value.finite)
            case "tensor":
                return self._feed_header(message.tensor)
            case "kept":
                kept = message.kept
                return Kept(kept.name, decode_artifact(kept.artifact, f"{kept.name}.artifact"), kept.finite)
            case "progress":
                return Progress(message.progress.passes_done, message.progress.passes_total)
            case "queued":
                return Queued(message.queued.position)
            case "started":
                return Started()
            case "done":
                self._done = True
                return Done(_decode_usage(message.done.usage))
        raise ProtocolError("an event of no kind that this version knows")

    def finish(self) -> None:
        """
        Raises:
            ProtocolError: the stream ended before everything was sent.
        """
        if not self._done:
            raise ProtocolError("the answer ended before everything was sent")

    def _take(self, size: int) -> None:
        self._result_bytes += size
        if self._result_bytes > self._max_result_bytes:
            raise LimitExceededError(
                f"the results exceed the {self._max_result_bytes} bytes that this client takes",
                limit="max_result_bytes",
                allowed=self._max_result_bytes,
                requested=self._result_bytes,
            )

    def _feed_header(self, message: events_pb2.TensorEvent) -> Event | None:
        field = f"{message.name}.tensor"
        assembler = Assembler(message.header, field, self._max_result_bytes - self._result_bytes, self._memory)
        self._take(message.header.size_bytes)
        if assembler.complete:  # a header without bytes to follow
            return TensorValue(message.name, assembler.finish(), message.finite)
        self._open = (assembler, message.name, message.finite)
        return None

    def _feed_chunk(self, chunk: tensor_pb2.TensorChunk | Chunk) -> Event | None:
        if self._open is None:
            raise ProtocolError("a chunk that belongs to no tensor")
        assembler, name, finite = self._open
        assembler.add(chunk)
        if not assembler.complete:
            return None
        self._open = None
        return TensorValue(name, assembler.finish(), finite)


def _decode_usage(message: events_pb2.Usage) -> Usage:
    if len(message.saved) > _MAX_SAVED:
        raise ProtocolError(f"usage.saved: {len(message.saved)} entries; at most {_MAX_SAVED}", field="usage.saved")
    return Usage(
        cost=Cost(**{name: getattr(message.cost, name) for name in _COST}),
        saved=MappingProxyType(dict(message.saved)),
        **{name: getattr(message, name) for name in _USAGE},
    )
