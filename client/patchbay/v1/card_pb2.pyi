from patchbay.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelSummary(_message.Message):
    __slots__ = ("name", "family", "source", "parameter_count", "layer_count", "d_model", "ready")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    source: str
    parameter_count: int
    layer_count: int
    d_model: int
    ready: bool
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., source: _Optional[str] = ..., parameter_count: _Optional[int] = ..., layer_count: _Optional[int] = ..., d_model: _Optional[int] = ..., ready: bool = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("name", "family", "source", "revision", "element_type", "layer_count", "d_model", "head_count", "kv_head_count", "d_head", "d_mlp", "d_vocab", "context_length", "parameter_count", "causal", "sites", "callables", "limits", "attributes", "without_tokens", "equal_lengths", "inputs", "params", "weights_policy")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    KV_HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    D_HEAD_FIELD_NUMBER: _ClassVar[int]
    D_MLP_FIELD_NUMBER: _ClassVar[int]
    D_VOCAB_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    CAUSAL_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    CALLABLES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EQUAL_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_POLICY_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    source: str
    revision: str
    element_type: _tensor_pb2.ElementType
    layer_count: int
    d_model: int
    head_count: int
    kv_head_count: int
    d_head: int
    d_mlp: int
    d_vocab: int
    context_length: int
    parameter_count: int
    causal: bool
    sites: _containers.RepeatedCompositeFieldContainer[SiteSpec]
    callables: _containers.RepeatedCompositeFieldContainer[CallableSpec]
    limits: Limits
    attributes: _containers.ScalarMap[str, str]
    without_tokens: bool
    equal_lengths: bool
    inputs: _containers.RepeatedCompositeFieldContainer[InputSpec]
    params: _containers.RepeatedCompositeFieldContainer[ParamSpec]
    weights_policy: str
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., source: _Optional[str] = ..., revision: _Optional[str] = ..., element_type: _Optional[_Union[_tensor_pb2.ElementType, str]] = ..., layer_count: _Optional[int] = ..., d_model: _Optional[int] = ..., head_count: _Optional[int] = ..., kv_head_count: _Optional[int] = ..., d_head: _Optional[int] = ..., d_mlp: _Optional[int] = ..., d_vocab: _Optional[int] = ..., context_length: _Optional[int] = ..., parameter_count: _Optional[int] = ..., causal: bool = ..., sites: _Optional[_Iterable[_Union[SiteSpec, _Mapping]]] = ..., callables: _Optional[_Iterable[_Union[CallableSpec, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., attributes: _Optional[_Mapping[str, str]] = ..., without_tokens: bool = ..., equal_lengths: bool = ..., inputs: _Optional[_Iterable[_Union[InputSpec, _Mapping]]] = ..., params: _Optional[_Iterable[_Union[ParamSpec, _Mapping]]] = ..., weights_policy: _Optional[str] = ...) -> None: ...

class InputSpec(_message.Message):
    __slots__ = ("name", "dims", "element_type", "required", "below", "doc")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    DOC_FIELD_NUMBER: _ClassVar[int]
    name: str
    dims: _containers.RepeatedCompositeFieldContainer[Dim]
    element_type: _tensor_pb2.ElementType
    required: bool
    below: int
    doc: str
    def __init__(self, name: _Optional[str] = ..., dims: _Optional[_Iterable[_Union[Dim, _Mapping]]] = ..., element_type: _Optional[_Union[_tensor_pb2.ElementType, str]] = ..., required: bool = ..., below: _Optional[int] = ..., doc: _Optional[str] = ...) -> None: ...

class SiteSpec(_message.Message):
    __slots__ = ("name", "dims", "element_type", "order", "writable", "doc", "absent_reason", "proof")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    DOC_FIELD_NUMBER: _ClassVar[int]
    ABSENT_REASON_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    name: str
    dims: _containers.RepeatedCompositeFieldContainer[Dim]
    element_type: _tensor_pb2.ElementType
    order: int
    writable: bool
    doc: str
    absent_reason: str
    proof: str
    def __init__(self, name: _Optional[str] = ..., dims: _Optional[_Iterable[_Union[Dim, _Mapping]]] = ..., element_type: _Optional[_Union[_tensor_pb2.ElementType, str]] = ..., order: _Optional[int] = ..., writable: bool = ..., doc: _Optional[str] = ..., absent_reason: _Optional[str] = ..., proof: _Optional[str] = ...) -> None: ...

class Dim(_message.Message):
    __slots__ = ("size", "symbol")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_FIELD_NUMBER: _ClassVar[int]
    size: int
    symbol: str
    def __init__(self, size: _Optional[int] = ..., symbol: _Optional[str] = ...) -> None: ...

class ParamSpec(_message.Message):
    __slots__ = ("name", "shape", "element_type", "doc")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    DOC_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    element_type: _tensor_pb2.ElementType
    doc: str
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., element_type: _Optional[_Union[_tensor_pb2.ElementType, str]] = ..., doc: _Optional[str] = ...) -> None: ...

class CallableSpec(_message.Message):
    __slots__ = ("name", "d_in", "d_out", "element_type", "doc", "parameter_count", "whole_rows", "absent_reason", "path")
    NAME_FIELD_NUMBER: _ClassVar[int]
    D_IN_FIELD_NUMBER: _ClassVar[int]
    D_OUT_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    DOC_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    WHOLE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_REASON_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    name: str
    d_in: int
    d_out: int
    element_type: _tensor_pb2.ElementType
    doc: str
    parameter_count: int
    whole_rows: bool
    absent_reason: str
    path: str
    def __init__(self, name: _Optional[str] = ..., d_in: _Optional[int] = ..., d_out: _Optional[int] = ..., element_type: _Optional[_Union[_tensor_pb2.ElementType, str]] = ..., doc: _Optional[str] = ..., parameter_count: _Optional[int] = ..., whole_rows: bool = ..., absent_reason: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_nodes", "max_runs", "max_rows", "max_tokens", "max_const_bytes", "max_result_bytes", "max_peak_bytes", "max_flops", "max_loop_steps")
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_FLOPS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOOP_STEPS_FIELD_NUMBER: _ClassVar[int]
    max_nodes: int
    max_runs: int
    max_rows: int
    max_tokens: int
    max_const_bytes: int
    max_result_bytes: int
    max_peak_bytes: int
    max_flops: int
    max_loop_steps: int
    def __init__(self, max_nodes: _Optional[int] = ..., max_runs: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_const_bytes: _Optional[int] = ..., max_result_bytes: _Optional[int] = ..., max_peak_bytes: _Optional[int] = ..., max_flops: _Optional[int] = ..., max_loop_steps: _Optional[int] = ...) -> None: ...
