"""Exceptions to google.rpc.Status and back, so that what the server raised is what the client raises.

    code                INVALID_ARGUMENT for a GraphError or ProtocolError, else the ServiceError's own
    ErrorInfo           reason (SHAPE_MISMATCH, ...), domain "patchbay", metadata (node, related, field, limit, ...)
    BadRequest          field "graph.nodes[17].args[1]" and what is wrong with it
    QuotaFailure        for RESOURCE_EXHAUSTED
    RetryInfo           how long to wait

The same bytes travel as trailing metadata ``grpc-status-details-bin`` (cut to `MAX_METADATA_BYTES`, because proxies
drop long headers) and, whole, as the last event of a stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from patchbay.errors import (
    GRAPH_ERROR_BY_REASON,
    SERVICE_ERROR_BY_CODE,
    GraphError,
    LimitExceededError,
    PatchbayError,
    ProtocolError,
    ServiceError,
    UnknownServerError,
    UnknownSiteError,
)
from patchbay.wire.bounds import MAX_STATUS_BYTES

if TYPE_CHECKING:
    from google.rpc.status_pb2 import Status

DOMAIN = "patchbay"
#: HTTP/2 header blocks above 8 KiB are dropped on the way, base64 adds a third, and there are other headers.
MAX_METADATA_BYTES = 3_072
#: Bytes of a status message in a header, percent-encoded as gRPC does it.
MAX_DETAILS_BYTES = 1_536

_MALFORMED = "MALFORMED"
_MAX_RELATED = 1_024
_REASON_BY_GRAPH_ERROR: Mapping[type[GraphError], str] = MappingProxyType(
    {cls: reason for reason, cls in GRAPH_ERROR_BY_REASON.items()}
)

#: google.rpc.Code by name; total over gRPC's codes (a test proves it).
CODES: Mapping[str, int] = MappingProxyType(
    {
        "OK": 0,
        "CANCELLED": 1,
        "UNKNOWN": 2,
        "INVALID_ARGUMENT": 3,
        "DEADLINE_EXCEEDED": 4,
        "NOT_FOUND": 5,
        "ALREADY_EXISTS": 6,
        "PERMISSION_DENIED": 7,
        "RESOURCE_EXHAUSTED": 8,
        "FAILED_PRECONDITION": 9,
        "ABORTED": 10,
        "OUT_OF_RANGE": 11,
        "UNIMPLEMENTED": 12,
        "INTERNAL": 13,
        "UNAVAILABLE": 14,
        "DATA_LOSS": 15,
        "UNAUTHENTICATED": 16,
    }
)
_CODE_NAMES: Mapping[int, str] = MappingProxyType({number: name for name, number in CODES.items()})


# --- encoding -----------------------------------------------------------------------------------------------------


def code_name(error: PatchbayError) -> str:
    """Name of the google.rpc code that `error` travels under."""
    if isinstance(error, ServiceError):
        return error.code
    return "INVALID_ARGUMENT" if isinstance(error, (GraphError, ProtocolError)) else "UNKNOWN"


def encode_status(error: PatchbayError) -> Status:
    """`error` with all that it knows."""
    from google.rpc import error_details_pb2, status_pb2

    status = status_pb2.Status(code=CODES[code_name(error)], message=_text(getattr(error, "message", str(error))))
    if isinstance(error, GraphError):
        metadata = _graph_metadata(error)
        reason = next(_REASON_BY_GRAPH_ERROR[cls] for cls in type(error).__mro__ if cls in _REASON_BY_GRAPH_ERROR)
        _attach(status, error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
        if error.field is not None:
            _attach(status, _bad_request(f"graph.{error.field}", error.message))
    elif isinstance(error, ProtocolError):
        metadata = {} if error.field is None else {"field": _text(error.field)}
        _attach(status, error_details_pb2.ErrorInfo(reason=_MALFORMED, domain=DOMAIN, metadata=metadata))
        if error.field is not None:
            _attach(status, _bad_request(error.field, error.message))
    elif isinstance(error, ServiceError):
        info = error_details_pb2.ErrorInfo(
            reason=_text(error.reason or error.code),
            domain=DOMAIN,
            metadata={_text(key): _text(value) for key, value in error.metadata.items()},
        )
        _attach(status, info)
        if error.code == "RESOURCE_EXHAUSTED":
            violation = error_details_pb2.QuotaFailure.Violation(
                subject=_text(error.metadata.get("subject", "")), description=_text(error.message)
            )
            _attach(status, error_details_pb2.QuotaFailure(violations=[violation]))
        if error.retry_after_s is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
            _attach(status, retry)
    return status


def _attach(status: Status, detail: object) -> None:
    status.details.add().Pack(detail, deterministic=True)  # type: ignore[arg-type]


def _bad_request(field: str, description: str) -> object:
    from google.rpc import error_details_pb2

    violation = error_details_pb2.BadRequest.FieldViolation(field=_text(field), description=_text(description))
    return error_details_pb2.BadRequest(field_violations=[violation])


def _graph_metadata(error: GraphError) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if error.node is not None:
        metadata["node"] = str(error.node)
    if error.related:
        metadata["related"] = ",".join(map(str, error.related[:_MAX_RELATED]))
    if error.field is not None:
        metadata["field"] = _text(error.field)
    if isinstance(error, LimitExceededError):
        metadata |= {"limit": error.limit, "allowed": str(error.allowed), "requested": str(error.requested)}
    if isinstance(error, UnknownSiteError) and error.suggestions:
        metadata["suggestions"] = json.dumps(error.suggestions)
    return metadata


def _text(text: str) -> str:
    # User text may hold lone surrogates; an error must be sendable whatever it quotes.
    return text.encode("utf-8", "replace").decode("utf-8")


def shorten(status: Status) -> Status:
    """`status`, or as much of it as fits in a header: code, message and ErrorInfo cut to their essentials."""
    from google.rpc import error_details_pb2, status_pb2

    if status.ByteSize() <= MAX_METADATA_BYTES:
        return status
    short = status_pb2.Status(code=status.code, message=cut(status.message))
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            kept = {key: value for key, value in info.metadata.items() if len(key) + len(value) <= 256}
            small = error_details_pb2.ErrorInfo(reason=info.reason[:64], domain=info.domain)
            for key in sorted(kept)[:8]:
                small.metadata[key] = kept[key]
            _attach(short, small)
        elif detail.type_url.endswith("/google.rpc.RetryInfo"):
            short.details.add().CopyFrom(detail)
    return short


def cut(message: str) -> str:
    """`message` short enough for a header, where everything but plain ASCII takes three bytes for one."""
    room = MAX_DETAILS_BYTES
    for position, char in enumerate(message):
        room -= 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode("utf-8", "replace"))
        if room < 0:
            return f"{message[:position].rstrip()[:-3]}..."
    return message


# --- decoding -----------------------------------------------------------------------------------------------------


def decode_status(data: bytes) -> PatchbayError:
    """The exception that a serialized google.rpc.Status stands for; what cannot be read becomes the plainest one."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    if len(data) > MAX_STATUS_BYTES:
        return ProtocolError(f"an error of {len(data)} bytes; at most {MAX_STATUS_BYTES}")
    status = status_pb2.Status()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    has_info = has_retry = False
    try:
        status.ParseFromString(data)
        for detail in status.details:
            has_info = has_info or detail.Unpack(info)
            has_retry = has_retry or detail.Unpack(retry)
    except DecodeError:
        return ProtocolError("the server's error details cannot be read")
    retry_after_s = retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None
    message = status.message
    if has_info and info.domain == DOMAIN:
        if info.reason in GRAPH_ERROR_BY_REASON:
            return _graph_error(GRAPH_ERROR_BY_REASON[info.reason], message, info.metadata)
        if info.reason == _MALFORMED:
            return ProtocolError(message, field=info.metadata.get("field"))
        return service_error(
            _CODE_NAMES.get(status.code, "UNKNOWN"),
            message,
            reason=info.reason,
            metadata=dict(info.metadata),
            retry_after_s=retry_after_s,
        )
    return service_error(_CODE_NAMES.get(status.code, "UNKNOWN"), message, retry_after_s=retry_after_s)


def service_error(
    code: str,
    message: str,
    *,
    reason: str = "",
    metadata: Mapping[str, str] | None = None,
    retry_after_s: float | None = None,
) -> ServiceError:
    """The exception for a status code, by name; `UnknownServerError` for a name that is none."""
    cls = SERVICE_ERROR_BY_CODE.get(code, UnknownServerError)
    if retry_after_s is not None and not math.isfinite(retry_after_s):
        retry_after_s = None
    return cls(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


def _graph_error(cls: type[GraphError], message: str, metadata: Mapping[str, str]) -> GraphError:
    node = _int(metadata.get("node"))
    related = [n for n in (_int(part) for part in metadata.get("related", "").split(",")) if n is not None]
    field = metadata.get("field")
    if issubclass(cls, LimitExceededError):
        return cls(
            message,
            node=node,
            related=related,
            field=field,
            limit=metadata.get("limit", ""),
            allowed=_int(metadata.get("allowed")) or 0,
            requested=_int(metadata.get("requested")) or 0,
        )
    if issubclass(cls, UnknownSiteError):
        return cls(message, node=node, related=related, field=field, suggestions=_suggestions(metadata))
    return cls(message, node=node, related=related, field=field)


def _suggestions(metadata: Mapping[str, str]) -> list[str]:
    try:
        found = json.loads(metadata.get("suggestions", "[]"))
    except (ValueError, RecursionError):
        return []
    return [s for s in found if isinstance(s, str)] if isinstance(found, list) else []


def _int(text: str | None) -> int | None:
    # int() takes quadratic time on long digit strings, and underscores and other alphabets' digits besides.
    if text is None or len(text) > 40 or not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
        return None
    return int(text)
