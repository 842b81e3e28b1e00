"""The little of a call's context that the servicer uses: gRPC's, Ray Serve's and `LocalTransport`'s all have it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import grpc

from patchbay.errors import PatchbayError
from patchbay.wire.status import code_name, cut, encode_status, shorten

STATUS_DETAILS_KEY = "grpc-status-details-bin"

_STATUS_CODES = {code.name: code for code in grpc.StatusCode}


class CallContext(Protocol):
    """What a servicer asks of its context."""

    def invocation_metadata(self) -> Any:
        """Pairs of key and value that came with the call."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """Set the status that the call ends with."""

    def set_details(self, details: str) -> None:
        """Set the text beside the status."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Set the pairs that are sent after the answer."""


def bearer_key(context: CallContext) -> str | None:
    """The key in ``authorization: Bearer <key>``, or None when there is none or more than one."""
    return key_among(context.invocation_metadata() or ())


def key_among(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The key among a call's metadata, as `bearer_key` finds it."""
    found: list[str] = []
    for key, value in metadata:
        if key.lower() == "authorization":
            scheme, _, rest = str(value).partition(" ")
            if scheme.lower() == "bearer" and isinstance(value, str):
                found.append(rest.strip())
    return found[0] if len(found) == 1 else None


def set_error(context: CallContext, error: PatchbayError) -> bytes:
    """End the call with `error`; returns its full google.rpc.Status, for a stream's last event.

    The status is set and not raised: Ray Serve drops trailing metadata when a handler raises.
    """
    status = encode_status(error)
    context.set_code(_STATUS_CODES[code_name(error)])
    context.set_details(cut(status.message))
    # A list: Ray Serve's context adds its own pairs to it, and takes nothing else.
    context.set_trailing_metadata([(STATUS_DETAILS_KEY, shorten(status).SerializeToString())])
    return status.SerializeToString()
