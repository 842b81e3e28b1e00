"""How far a map has come, for callbacks and for one line of a terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO

from patchbay.results import show_bytes

_EVERY_S = 0.1


@dataclass(frozen=True)
class MapProgress:
    """How far a map has come.

    Attributes:
        rows: rows that are done, those of earlier calls included.
        total: rows of the data set; None where it does not say.
        batches: batches that are done.
        tokens: tokens of the rows that were done in this call.
        seconds: since this call began.
        retries: requests that had to be sent again.
        waiting: why nothing moves right now; None when all is well.
        received_bytes: payload that came back in this call.
        rows_here: rows that were done in this call.
    """

    rows: int
    total: int | None
    batches: int
    tokens: int
    seconds: float
    retries: int
    waiting: str | None
    received_bytes: int
    rows_here: int = 0

    @property
    def seconds_left(self) -> float | None:
        """At this call's pace; None where that is not known."""
        if self.total is None or not self.rows_here:
            return None
        return self.seconds * (self.total - self.rows) / self.rows_here

    def __str__(self) -> str:
        done = f"{self.rows:,}" if self.total is None else f"{self.rows:,} of {self.total:,}"
        parts = [f"{done} rows"]
        if self.seconds > 0 and self.tokens:
            parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        left = self.seconds_left
        if left:
            parts.append(f"{_show_time(left)} left")
        parts.append(f"received {show_bytes(self.received_bytes)}")
        if self.retries:
            parts.append(f"{self.retries} retries")
        if self.waiting:
            parts.append(self.waiting)
        return ", ".join(parts)


def _show_time(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class TerminalLine:
    """Shows progress on one line of a terminal, and takes it away at the end; elsewhere shows nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shown = 0
        self._last = 0.0
        self.active = bool(getattr(self._stream, "isatty", lambda: False)())

    def __call__(self, progress: MapProgress) -> None:
        now = time.monotonic()
        if not self.active or (now - self._last < _EVERY_S and progress.waiting is None):
            return
        self._last = now
        text = f"patchbay: {progress}"[:100]
        self._stream.write(f"\r{text}{' ' * max(0, self._shown - len(text))}")
        self._stream.flush()
        self._shown = len(text)

    def close(self) -> None:
        """Clears the line."""
        if self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._stream.flush()
            self._shown = 0
