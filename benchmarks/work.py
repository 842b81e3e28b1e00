"""What a contender does in its process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Work:
    """One contender: prepared once, then run once a round, then asked for the values that it computed."""

    def prepare(self) -> None:
        """Load, compile, connect: whatever is not measured."""

    def warm(self) -> None:
        """Run once without being measured; a cheaper piece of the workload where a whole one would take long."""
        self.run(-1)

    def run(self, round_: int) -> Mapping[str, float] | None:
        """One trial, on the inputs of this round.

        Returns:
            What it measured itself, by name; ``wall_s`` or ``cpu_s`` there replace what was measured around it.
        """
        raise NotImplementedError

    def values(self) -> Mapping[str, Any]:
        """Arrays that the last trial computed, by name, NaN where it left some out; equal names are compared."""
        return {}

    def close(self) -> None:
        """Let go of what `prepare` took."""
