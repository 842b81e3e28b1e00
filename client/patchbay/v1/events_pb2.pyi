from patchbay.v1 import artifact_pb2 as _artifact_pb2
from patchbay.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class QueuedEvent(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class StartedEvent(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProgressEvent(_message.Message):
    __slots__ = ("passes_done", "passes_total")
    PASSES_DONE_FIELD_NUMBER: _ClassVar[int]
    PASSES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    passes_done: int
    passes_total: int
    def __init__(self, passes_done: _Optional[int] = ..., passes_total: _Optional[int] = ...) -> None: ...

class ValueEvent(_message.Message):
    __slots__ = ("name", "tensor", "finite")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: _tensor_pb2.Tensor
    finite: bool
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., finite: bool = ...) -> None: ...

class TensorEvent(_message.Message):
    __slots__ = ("name", "header", "finite")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    name: str
    header: _tensor_pb2.TensorHeader
    finite: bool
    def __init__(self, name: _Optional[str] = ..., header: _Optional[_Union[_tensor_pb2.TensorHeader, _Mapping]] = ..., finite: bool = ...) -> None: ...

class KeptEvent(_message.Message):
    __slots__ = ("name", "artifact", "finite")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    name: str
    artifact: _artifact_pb2.Artifact
    finite: bool
    def __init__(self, name: _Optional[str] = ..., artifact: _Optional[_Union[_artifact_pb2.Artifact, _Mapping]] = ..., finite: bool = ...) -> None: ...

class DoneEvent(_message.Message):
    __slots__ = ("usage",)
    USAGE_FIELD_NUMBER: _ClassVar[int]
    usage: Usage
    def __init__(self, usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class ErrorEvent(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    def __init__(self, status: _Optional[bytes] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("flops", "peak_bytes", "result_bytes", "tokens", "passes", "kept_bytes")
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    flops: int
    peak_bytes: int
    result_bytes: int
    tokens: int
    passes: int
    kept_bytes: int
    def __init__(self, flops: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., result_bytes: _Optional[int] = ..., tokens: _Optional[int] = ..., passes: _Optional[int] = ..., kept_bytes: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("tokens", "passes", "layers_run", "layers_skipped", "nodes", "nodes_run", "queue_ms", "run_ms", "bytes_in", "bytes_out", "cost", "saved")
    class SavedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_RUN_FIELD_NUMBER: _ClassVar[int]
    LAYERS_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    NODES_RUN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    RUN_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    passes: int
    layers_run: int
    layers_skipped: int
    nodes: int
    nodes_run: int
    queue_ms: float
    run_ms: float
    bytes_in: int
    bytes_out: int
    cost: Cost
    saved: _containers.ScalarMap[str, int]
    def __init__(self, tokens: _Optional[int] = ..., passes: _Optional[int] = ..., layers_run: _Optional[int] = ..., layers_skipped: _Optional[int] = ..., nodes: _Optional[int] = ..., nodes_run: _Optional[int] = ..., queue_ms: _Optional[float] = ..., run_ms: _Optional[float] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., saved: _Optional[_Mapping[str, int]] = ...) -> None: ...
