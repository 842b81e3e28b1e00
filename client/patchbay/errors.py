"""Every exception that Patchbay raises on purpose, and the one table between gRPC status codes and exceptions.

    PatchbayError
    ├── GraphError (ValueError)              the graph breaks a rule; names the node and the user's line
    │   ├── ShapeError                       shapes that do not fit together
    │   ├── DTypeError (TypeError)           dtypes that do not fit together
    │   ├── IndexOutOfRangeError (IndexError)
    │   ├── UnknownOpError (LookupError)
    │   ├── UnknownSiteError (LookupError)   with the nearest names
    │   ├── SiteNotWritableError
    │   ├── CausalityError                   a write that needs a later site of the same run
    │   └── LimitExceededError               a limit of the server's configuration, named
    ├── TraceError (RuntimeError)            the tracing API used out of order
    │   ├── ArgumentError (TypeError)        an argument that a function of the client does not take
    │   ├── MissingAttributeError (AttributeError)   a name that a trace, a value or a group of sites does not have
    │   ├── ValueNotReadyError               a value asked for before its trace has run
    │   ├── WrongTraceError                  a proxy of another trace
    │   └── ProxyBoolError (TypeError)       a proxy used where Python needs to know the value
    ├── ProtocolError (ValueError)           bytes that do not decode to what they claim to be
    ├── MissingExtraError (ImportError)      a feature whose optional packages are not installed
    └── ServiceError                         the server, or the way to it, said no; one class per status code
        ├── UnavailableError (ConnectionError)      ├── DeadlineExceededError (TimeoutError)
        ├── RequestCancelledError                   ├── UnauthenticatedError
        ├── PermissionDeniedError (PermissionError) ├── NotFoundError (LookupError)
        ├── AlreadyExistsError                      ├── InvalidRequestError (ValueError)
        ├── FailedPreconditionError                 ├── ResourceExhaustedError
        ├── AbortedError                            ├── RequestRangeError (ValueError)
        ├── UnsupportedError (NotImplementedError)  ├── InternalServerError
        ├── DataLossError                           └── UnknownServerError

No class of a transport library appears here, and none of a transport library's exceptions leaves the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType


class PatchbayError(Exception):
    """Root of every exception that Patchbay raises on purpose."""


class GraphError(PatchbayError, ValueError):
    """A graph breaks a rule.

    Attributes:
        node: id of the offending node, or None when the graph as a whole is at fault.
        related: ids of other nodes that the message speaks of (the read that a write depends on, say).
        field: path of the offending part, such as ``nodes[17].args[1]``.
        location: ``file:line`` of the user's code that made the node; known on the client only.
    """

    def __init__(
        self,
        message: str,
        *,
        node: int | None = None,
        related: Sequence[int] = (),
        field: str | None = None,
        location: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.related = tuple(related)
        self.field = field if field is not None else (None if node is None else f"nodes[{node}]")
        self.location = location

    def __str__(self) -> str:
        return self.message if self.location is None else f"{self.message}\n  at {self.location}"


class ShapeError(GraphError):
    """Shapes that do not fit together."""


class DTypeError(GraphError, TypeError):
    """Dtypes that do not fit together, or a dtype that an operation does not take."""


class IndexOutOfRangeError(GraphError, IndexError):
    """An index outside the axis it selects from."""


class UnknownOpError(GraphError, LookupError):
    """An operation that this version does not know."""


class UnknownSiteError(GraphError, LookupError):
    """A site that the model does not have; `suggestions` holds the nearest names."""

    def __init__(
        self,
        message: str,
        *,
        suggestions: Sequence[str] = (),
        node: int | None = None,
        related: Sequence[int] = (),
        field: str | None = None,
        location: str | None = None,
    ) -> None:
        super().__init__(message, node=node, related=related, field=field, location=location)
        self.suggestions = tuple(suggestions)


class SiteNotWritableError(GraphError):
    """A write at a site that can only be read."""


class CausalityError(GraphError):
    """A write whose value needs a site that its own run reaches only later."""


class LimitExceededError(GraphError):
    """A limit of the server's configuration; raised before any work is done.

    Attributes:
        limit: name of the limit in the configuration, such as ``max_nodes``.
        allowed: its value.
        requested: what the graph would need.
    """

    def __init__(
        self,
        message: str,
        *,
        limit: str = "",
        allowed: int = 0,
        requested: int = 0,
        node: int | None = None,
        related: Sequence[int] = (),
        field: str | None = None,
        location: str | None = None,
    ) -> None:
        super().__init__(message, node=node, related=related, field=field, location=location)
        self.limit = limit
        self.allowed = allowed
        self.requested = requested


class TraceError(PatchbayError, RuntimeError):
    """The tracing API was used out of order.

    Attributes:
        location: ``file:line`` of the user's code, where it is not plain from the traceback; else None.
    """

    def __init__(self, message: str, *, location: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.location = location

    def __str__(self) -> str:
        return self.message if self.location is None else f"{self.message}\n  at {self.location}"


class ArgumentError(TraceError, TypeError):
    """An argument that a function of the client does not take."""


class MissingAttributeError(TraceError, AttributeError):
    """A name that a trace, a value of it or a group of sites does not have; `hasattr` answers False."""


class ValueNotReadyError(TraceError):
    """A value was asked for before its trace has run."""


class WrongTraceError(TraceError):
    """A proxy met a proxy of another trace."""


class ProxyBoolError(TraceError, TypeError):
    """A proxy was used where Python needs the value itself (``if``, ``and``, ``while``, ``int()``)."""


class ProtocolError(PatchbayError, ValueError):
    """Bytes that do not decode to what they claim to be.

    Attributes:
        field: path of the offending part, such as ``graph.nodes[3].attrs["value"].shape``; None when there is none to
            name.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class MissingExtraError(PatchbayError, ImportError):
    """A feature needs optional packages; the message names the extra to install."""


class ServiceError(PatchbayError):
    """The server, or the way to it, refused or failed.

    Attributes:
        code: name of the google.rpc status code, such as ``"UNAVAILABLE"``.
        reason: machine-readable reason in UPPER_SNAKE_CASE (google.rpc.ErrorInfo), or "".
        metadata: further facts from ErrorInfo, such as the limit's name.
        retry_after_s: how long the server asks to wait before trying again, or None.
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s


class UnavailableError(ServiceError, ConnectionError):
    """Nobody answers, or the server is starting, draining or overloaded."""

    code = "UNAVAILABLE"


class DeadlineExceededError(ServiceError, TimeoutError):
    """The call took longer than its deadline."""

    code = "DEADLINE_EXCEEDED"


class RequestCancelledError(ServiceError):
    """The call was cancelled."""

    code = "CANCELLED"


class UnauthenticatedError(ServiceError):
    """No key, or a key that the server does not know."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(ServiceError, PermissionError):
    """The key is known but may not do this."""

    code = "PERMISSION_DENIED"


class NotFoundError(ServiceError, LookupError):
    """No such model, job or artifact, or not one of this account's."""

    code = "NOT_FOUND"


class AlreadyExistsError(ServiceError):
    """The name is taken."""

    code = "ALREADY_EXISTS"


class InvalidRequestError(ServiceError, ValueError):
    """The request itself is malformed (a graph's own faults are GraphErrors)."""

    code = "INVALID_ARGUMENT"


class FailedPreconditionError(ServiceError):
    """The request is well-formed but the server's state or configuration does not allow it."""

    code = "FAILED_PRECONDITION"


class ResourceExhaustedError(ServiceError):
    """A quota or a queue is full."""

    code = "RESOURCE_EXHAUSTED"


class AbortedError(ServiceError):
    """The work was given up half-way; trying again may succeed."""

    code = "ABORTED"


class RequestRangeError(ServiceError, ValueError):
    """An offset or page outside what exists."""

    code = "OUT_OF_RANGE"


class UnsupportedError(ServiceError, NotImplementedError):
    """The server does not offer this call."""

    code = "UNIMPLEMENTED"


class InternalServerError(ServiceError):
    """The server failed in a way that it should not."""

    code = "INTERNAL"


class DataLossError(ServiceError):
    """Data arrived damaged or was lost."""

    code = "DATA_LOSS"


class UnknownServerError(ServiceError):
    """The server failed and did not say why."""

    code = "UNKNOWN"


#: google.rpc status code name -> exception class; total over every code but OK (a test proves it).
SERVICE_ERROR_BY_CODE: Mapping[str, type[ServiceError]] = MappingProxyType(
    {
        cls.code: cls
        for cls in (
            UnavailableError,
            DeadlineExceededError,
            RequestCancelledError,
            UnauthenticatedError,
            PermissionDeniedError,
            NotFoundError,
            AlreadyExistsError,
            InvalidRequestError,
            FailedPreconditionError,
            ResourceExhaustedError,
            AbortedError,
            RequestRangeError,
            UnsupportedError,
            InternalServerError,
            DataLossError,
            UnknownServerError,
        )
    }
)

#: Name of a graph error on the wire (ErrorInfo.reason) <-> its class, so that the server's verdict is raised as itself.
GRAPH_ERROR_BY_REASON: Mapping[str, type[GraphError]] = MappingProxyType(
    {
        "INVALID_GRAPH": GraphError,
        "SHAPE_MISMATCH": ShapeError,
        "DTYPE_MISMATCH": DTypeError,
        "INDEX_OUT_OF_RANGE": IndexOutOfRangeError,
        "UNKNOWN_OP": UnknownOpError,
        "UNKNOWN_SITE": UnknownSiteError,
        "SITE_NOT_WRITABLE": SiteNotWritableError,
        "CAUSALITY": CausalityError,
        "LIMIT_EXCEEDED": LimitExceededError,
    }
)
