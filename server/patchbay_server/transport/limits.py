"""What one request message is held to before it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from patchbay.errors import LimitExceededError
from patchbay.ir.limits import Limits

#: Texts of one Tokenize call.
MAX_TEXTS = 4_096
#: Characters of all texts of one Tokenize call.
MAX_TEXT_CHARS = 4 * 2**20
#: Token ids of one Tokenize call.
MAX_IDS = 65_536
#: Models on one page, at most and unless the client says otherwise.
MAX_PAGE_SIZE = 1_000
DEFAULT_PAGE_SIZE = 100
#: Requests above this many bytes are decoded beside the event loop.
INLINE_DECODE_BYTES = 256 * 2**10


class RequestLimits(Protocol):
    """The part of the configuration that the servicer enforces."""

    @property
    def max_request_bytes(self) -> int:
        """Bytes of one request message."""

    def graph_limits(self) -> Limits:
        """What a single graph is held to."""


@dataclass(frozen=True, slots=True)
class FixedLimits:
    """`RequestLimits` with given values, for servers without a configuration."""

    max_request_bytes: int = 256 * 2**20
    graph: Limits = field(default_factory=Limits)

    def graph_limits(self) -> Limits:
        return self.graph


def check_request_size(size: int, limits: RequestLimits) -> None:
    """
    Raises:
        LimitExceededError: more than `max_request_bytes`.
    """
    if size > limits.max_request_bytes:
        raise LimitExceededError(
            f"the request has {size} bytes; at most {limits.max_request_bytes} are allowed (limit max_request_bytes)",
            limit="max_request_bytes",
            allowed=limits.max_request_bytes,
            requested=size,
        )


def check_texts(texts: list[str]) -> None:
    """
    Raises:
        LimitExceededError: more texts or characters than one Tokenize call may hold.
    """
    chars = sum(map(len, texts))
    for limit, requested, allowed in (
        ("max_texts", len(texts), MAX_TEXTS),
        ("max_text_chars", chars, MAX_TEXT_CHARS),
    ):
        if requested > allowed:
            raise LimitExceededError(
                f"{requested} in one Tokenize call; at most {allowed} are allowed (limit {limit}). Send them in parts",
                limit=limit,
                allowed=allowed,
                requested=requested,
                field="texts",
            )


def check_ids(count: int) -> None:
    """
    Raises:
        LimitExceededError: more token ids than one Tokenize call may hold.
    """
    if count > MAX_IDS:
        raise LimitExceededError(
            f"{count} token ids in one Tokenize call; at most {MAX_IDS} are allowed (limit max_ids): send parts",
            limit="max_ids",
            allowed=MAX_IDS,
            requested=count,
            field="ids",
        )
