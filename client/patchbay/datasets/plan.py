"""How a map is to be done: the keyword arguments of `Model.map`, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchbay.errors import TraceError
from patchbay.ir.events import ExecuteOptions

DEFAULT_BATCH = 32
DEFAULT_MAX_TOKENS = 16_384
DEFAULT_LANES = 4


@dataclass(frozen=True)
class Plan:
    """How a map is to be done; see `Model.map`."""

    batch: int = DEFAULT_BATCH
    max_tokens: int = DEFAULT_MAX_TOKENS
    window: int | None = None
    lanes: int = DEFAULT_LANES
    prepend_bos: bool | None = None
    to: Path | None = None
    keep: bool = False
    resume: Path | None = None
    options: ExecuteOptions = field(default_factory=ExecuteOptions)
    timeout_s: float | None = None
    patience_s: float = 300.0

    def __post_init__(self) -> None:
        if self.keep and self.to is not None:
            raise TraceError("map: values stay on the server (keep=True) or are written to a folder (to=...), not both")

    @property
    def rows_of_window(self) -> int:
        return 8 * self.batch if self.window is None else self.window

    @property
    def folder(self) -> Path | None:
        """Where values of rows are written: they outlive the process where the map is to."""
        if self.to is not None or self.keep or self.resume is None:
            return self.to
        return self.resume.with_name(self.resume.name + ".values")

    @property
    def settings(self) -> dict[str, Any]:
        """What batches and lanes depend on, for the state file."""
        return {
            "batch": self.batch,
            "max_tokens": self.max_tokens,
            "window": self.rows_of_window,
            "lanes": self.lanes,
            "prepend_bos": self.prepend_bos,
            "to": None if self.to is None else str(self.to),
            "keep": self.keep,
        }
