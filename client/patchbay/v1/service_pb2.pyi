from patchbay.v1 import artifact_pb2 as _artifact_pb2
from patchbay.v1 import card_pb2 as _card_pb2
from patchbay.v1 import events_pb2 as _events_pb2
from patchbay.v1 import graph_pb2 as _graph_pb2
from patchbay.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_card_pb2.ModelSummary]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[_card_pb2.ModelSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("card",)
    CARD_FIELD_NUMBER: _ClassVar[int]
    card: _card_pb2.ModelCard
    def __init__(self, card: _Optional[_Union[_card_pb2.ModelCard, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "texts", "omit_special_tokens", "ids", "prepend_bos", "conversations")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    OMIT_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PREPEND_BOS_FIELD_NUMBER: _ClassVar[int]
    CONVERSATIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    texts: _containers.RepeatedScalarFieldContainer[str]
    omit_special_tokens: bool
    ids: _containers.RepeatedScalarFieldContainer[int]
    prepend_bos: bool
    conversations: _containers.RepeatedCompositeFieldContainer[Conversation]
    def __init__(self, model: _Optional[str] = ..., texts: _Optional[_Iterable[str]] = ..., omit_special_tokens: bool = ..., ids: _Optional[_Iterable[int]] = ..., prepend_bos: bool = ..., conversations: _Optional[_Iterable[_Union[Conversation, _Mapping]]] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("texts", "rendered")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    RENDERED_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedCompositeFieldContainer[TokenizedText]
    rendered: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[_Union[TokenizedText, _Mapping]]] = ..., rendered: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenizedText(_message.Message):
    __slots__ = ("ids", "strings", "starts", "ends", "special", "text")
    IDS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    strings: _containers.RepeatedScalarFieldContainer[str]
    starts: _containers.RepeatedScalarFieldContainer[int]
    ends: _containers.RepeatedScalarFieldContainer[int]
    special: _containers.RepeatedScalarFieldContainer[bool]
    text: str
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., strings: _Optional[_Iterable[str]] = ..., starts: _Optional[_Iterable[int]] = ..., ends: _Optional[_Iterable[int]] = ..., special: _Optional[_Iterable[bool]] = ..., text: _Optional[str] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("model", "graph", "options", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    graph: _graph_pb2.Graph
    options: ExecuteOptions
    request_id: str
    def __init__(self, model: _Optional[str] = ..., graph: _Optional[_Union[_graph_pb2.Graph, _Mapping]] = ..., options: _Optional[_Union[ExecuteOptions, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class ExecuteOptions(_message.Message):
    __slots__ = ("deterministic", "disabled_optimizations", "dry_run", "accepted_compressions")
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    DISABLED_OPTIMIZATIONS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_COMPRESSIONS_FIELD_NUMBER: _ClassVar[int]
    deterministic: bool
    disabled_optimizations: _containers.RepeatedScalarFieldContainer[str]
    dry_run: bool
    accepted_compressions: _containers.RepeatedScalarFieldContainer[_tensor_pb2.Compression]
    def __init__(self, deterministic: bool = ..., disabled_optimizations: _Optional[_Iterable[str]] = ..., dry_run: bool = ..., accepted_compressions: _Optional[_Iterable[_Union[_tensor_pb2.Compression, str]]] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("queued", "started", "progress", "value", "tensor", "chunk", "done", "error", "kept")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    queued: _events_pb2.QueuedEvent
    started: _events_pb2.StartedEvent
    progress: _events_pb2.ProgressEvent
    value: _events_pb2.ValueEvent
    tensor: _events_pb2.TensorEvent
    chunk: _tensor_pb2.TensorChunk
    done: _events_pb2.DoneEvent
    error: _events_pb2.ErrorEvent
    kept: _events_pb2.KeptEvent
    def __init__(self, queued: _Optional[_Union[_events_pb2.QueuedEvent, _Mapping]] = ..., started: _Optional[_Union[_events_pb2.StartedEvent, _Mapping]] = ..., progress: _Optional[_Union[_events_pb2.ProgressEvent, _Mapping]] = ..., value: _Optional[_Union[_events_pb2.ValueEvent, _Mapping]] = ..., tensor: _Optional[_Union[_events_pb2.TensorEvent, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., done: _Optional[_Union[_events_pb2.DoneEvent, _Mapping]] = ..., error: _Optional[_Union[_events_pb2.ErrorEvent, _Mapping]] = ..., kept: _Optional[_Union[_events_pb2.KeptEvent, _Mapping]] = ...) -> None: ...
