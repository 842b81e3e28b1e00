"""Text for a terminal: aligned tables, counts for people, and one line that says what is going on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import TextIO


def table(rows: Iterable[Sequence[str]], *, head: Sequence[str] | None = None, indent: str = "") -> str:
    """Left-aligned columns, two spaces apart."""
    lines = [list(row) for row in rows]
    if head is not None:
        lines.insert(0, list(head))
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def count(number: int) -> str:
    """A large number in three digits: 950k, 1.24B."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


class ProgressLine:
    """What is being done and for how long: one line that is rewritten on a terminal, one line per step elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._started = time.monotonic()
        self._text = ""
        self._done = threading.Event()
        self._lock = threading.Lock()
        if self._terminal:
            threading.Thread(target=self._tick, name="patchbay-progress", daemon=True).start()

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """The next step."""
        with self._lock:
            self._text = text
            if self._terminal:
                self._draw()
            else:
                self._stream.write(f"[{self.elapsed_s:5.1f} s] {text}\n")
                self._stream.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._done.is_set():
            return
        self._done.set()
        with self._lock:
            if self._terminal:
                self._stream.write("\r\x1b[K")
                self._stream.flush()

    def _tick(self) -> None:
        while not self._done.wait(0.2):
            with self._lock:
                if not self._done.is_set():
                    self._draw()

    def _draw(self) -> None:
        self._stream.write(f"\r\x1b[K[{self.elapsed_s:5.1f} s] {self._text} ...")
        self._stream.flush()
