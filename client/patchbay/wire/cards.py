"""Model cards and summaries between the IR and messages."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from patchbay.errors import ProtocolError
from patchbay.ir.card import SYMBOLS, CallableSpec, Dim, InputSpec, ModelCard, SiteSpec
from patchbay.ir.events import ModelSummary
from patchbay.ir.limits import MAX_DIMS, Limits
from patchbay.ir.params import NONE, POLICIES, ParamSpec
from patchbay.v1 import card_pb2
from patchbay.wire.bounds import MAX_SITES
from patchbay.wire.names import decode_model, encode_model
from patchbay.wire.tensors import decode_dtype, decode_shape, encode_dtype

_LIMITS = tuple(field.name for field in dataclasses.fields(Limits))
#: Widths that are the same number in both forms: IR name -> message field.
_WIDTHS = {
    "n_layers": "layer_count",
    "d_model": "d_model",
    "n_heads": "head_count",
    "n_kv_heads": "kv_head_count",
    "d_head": "d_head",
    "d_mlp": "d_mlp",
    "d_vocab": "d_vocab",
    "n_ctx": "context_length",
    "n_params": "parameter_count",
}


def encode_card(card: ModelCard) -> card_pb2.ModelCard:
    return card_pb2.ModelCard(
        name=encode_model(card.name),
        family=card.family,
        source=card.source,
        revision=card.revision,
        element_type=encode_dtype(card.dtype),
        causal=card.causal,
        sites=[_encode_site(site) for site in card.sites],
        callables=[_encode_callable(c) for c in card.callables],
        limits=encode_limits(card.limits),
        without_tokens=not card.takes_tokens,
        equal_lengths=not card.ragged,
        inputs=[_encode_input(i) for i in card.inputs],
        params=[_encode_param(p) for p in card.params],
        weights_policy="" if card.weights == NONE else card.weights,
        attributes=dict(card.attributes),
        **{field: getattr(card, name) for name, field in _WIDTHS.items()},
    )


def _encode_param(spec: ParamSpec) -> card_pb2.ParamSpec:
    return card_pb2.ParamSpec(name=spec.name, shape=spec.shape, element_type=encode_dtype(spec.dtype), doc=spec.doc)


def _encode_site(site: SiteSpec) -> card_pb2.SiteSpec:
    return card_pb2.SiteSpec(
        name=site.name,
        dims=_encode_dims(site.dims),
        element_type=encode_dtype(site.dtype),
        order=site.order,
        writable=site.writable,
        doc=site.doc,
        absent_reason=site.absent,
        proof=site.proof,
    )


def _encode_callable(spec: CallableSpec) -> card_pb2.CallableSpec:
    return card_pb2.CallableSpec(
        name=spec.name,
        d_in=spec.d_in,
        d_out=spec.d_out,
        element_type=encode_dtype(spec.dtype),
        doc=spec.doc,
        parameter_count=spec.params,
        whole_rows=not spec.positionwise,
        absent_reason=spec.absent,
        path=spec.path,
    )


def _encode_dims(dims: tuple[Dim, ...]) -> list[card_pb2.Dim]:
    return [card_pb2.Dim(symbol=d) if isinstance(d, str) else card_pb2.Dim(size=d) for d in dims]


def _encode_input(spec: InputSpec) -> card_pb2.InputSpec:
    return card_pb2.InputSpec(
        name=spec.name,
        dims=_encode_dims(spec.dims),
        element_type=encode_dtype(spec.dtype),
        required=spec.required,
        below=spec.below,
        doc=spec.doc,
    )


def decode_card(message: card_pb2.ModelCard) -> ModelCard:
    """
    Raises:
        ProtocolError: a card that contradicts itself or that this version cannot read.
    """
    for field in ("sites", "callables", "inputs", "params", "attributes"):
        if len(getattr(message, field)) > MAX_SITES:
            raise ProtocolError(f"card.{field}: more than {MAX_SITES} entries", field=f"card.{field}")
    widths = {name: _count(message, field, "card") for name, field in _WIDTHS.items()}
    return ModelCard(
        name=decode_model(message.name, "card.name"),
        family=message.family,
        source=message.source,
        revision=message.revision,
        dtype=decode_dtype(message.element_type, "card.element_type"),
        causal=message.causal,
        sites=tuple(_decode_site(site, f"card.sites[{index}]") for index, site in enumerate(message.sites)),
        callables=tuple(_decode_callable(c, f"card.callables[{i}]") for i, c in enumerate(message.callables)),
        takes_tokens=not message.without_tokens,
        ragged=not message.equal_lengths,
        inputs=tuple(_decode_input(spec, f"card.inputs[{i}]") for i, spec in enumerate(message.inputs)),
        params=tuple(_decode_param(p, f"card.params[{i}]") for i, p in enumerate(message.params)),
        weights=_decode_policy(message.weights_policy),
        limits=decode_limits(message.limits),
        attributes=MappingProxyType(dict(message.attributes)),
        **widths,
    )


def _decode_dims(message: card_pb2.SiteSpec | card_pb2.InputSpec, field: str) -> tuple[Dim, ...]:
    if not 1 <= len(message.dims) <= MAX_DIMS:
        raise ProtocolError(
            f"{field}.dims: {len(message.dims)} of them; 1 to {MAX_DIMS} are allowed", field=f"{field}.dims"
        )
    return tuple(_decode_dim(dim, f"{field}.dims[{index}]") for index, dim in enumerate(message.dims))


def _decode_input(message: card_pb2.InputSpec, field: str) -> InputSpec:
    return InputSpec(
        name=message.name,
        dims=_decode_dims(message, field),
        dtype=decode_dtype(message.element_type, f"{field}.element_type"),
        required=message.required,
        below=_count(message, "below", field) if message.HasField("below") else None,
        doc=message.doc,
    )


def _decode_param(message: card_pb2.ParamSpec, field: str) -> ParamSpec:
    dtype = decode_dtype(message.element_type, f"{field}.element_type")
    shape = decode_shape(message.shape, dtype, f"{field}.shape")
    return ParamSpec(name=message.name, shape=shape, dtype=dtype, doc=message.doc)


def _decode_policy(policy: str) -> str:
    """Servers from before there were parameters say nothing, and offer none."""
    if policy and policy not in POLICIES:
        raise ProtocolError(
            f"card.weights_policy: {policy!r} is none that this version knows", field="card.weights_policy"
        )
    return policy or NONE


def _decode_site(message: card_pb2.SiteSpec, field: str) -> SiteSpec:
    return SiteSpec(
        name=message.name,
        dims=_decode_dims(message, field),
        dtype=decode_dtype(message.element_type, f"{field}.element_type"),
        order=message.order,
        writable=message.writable,
        doc=message.doc,
        absent=message.absent_reason if message.HasField("absent_reason") else None,
        proof=message.proof,
    )


def _decode_dim(message: card_pb2.Dim, field: str) -> Dim:
    if message.WhichOneof("extent") == "size":
        return _count(message, "size", field)
    if message.symbol not in SYMBOLS:
        raise ProtocolError(f"{field}: {message.symbol!r} is not an extent that this version knows", field=field)
    return message.symbol


def _decode_callable(message: card_pb2.CallableSpec, field: str) -> CallableSpec:
    return CallableSpec(
        name=message.name,
        d_in=_count(message, "d_in", field),
        d_out=_count(message, "d_out", field),
        dtype=decode_dtype(message.element_type, f"{field}.element_type"),
        doc=message.doc,
        params=_count(message, "parameter_count", field),
        positionwise=not message.whole_rows,
        absent=message.absent_reason if message.HasField("absent_reason") else None,
        path=message.path,
    )


def encode_limits(limits: Limits) -> card_pb2.Limits:
    return card_pb2.Limits(**{name: getattr(limits, name) for name in _LIMITS})


def decode_limits(message: card_pb2.Limits) -> Limits:
    """
    Raises:
        ProtocolError: a negative limit.
    """
    return Limits(**{name: _count(message, name, "limits") for name in _LIMITS})


def encode_summary(summary: ModelSummary) -> card_pb2.ModelSummary:
    return card_pb2.ModelSummary(
        name=encode_model(summary.name),
        family=summary.family,
        source=summary.source,
        parameter_count=summary.n_params,
        layer_count=summary.n_layers,
        d_model=summary.d_model,
        ready=summary.ready,
    )


def decode_summary(message: card_pb2.ModelSummary, field: str) -> ModelSummary:
    """
    Raises:
        ProtocolError: a name that is none, or a negative width.
    """
    return ModelSummary(
        name=decode_model(message.name, f"{field}.name"),
        family=message.family,
        source=message.source,
        n_params=_count(message, "parameter_count", field),
        n_layers=_count(message, "layer_count", field),
        d_model=_count(message, "d_model", field),
        ready=message.ready,
    )


def _count(message: object, name: str, field: str) -> int:
    value: int = getattr(message, name)
    if value < 0:
        raise ProtocolError(f"{field}.{name}: {value} is negative", field=f"{field}.{name}")
    return value
