"""What a run of the benchmarks leaves behind: every sample, what was found, on which machine. To and from JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.spread import Spread

#: Of the JSON; raised when a field changes its meaning.
FORMAT = 1


@dataclass(frozen=True)
class Sample:
    """One trial of one contender.

    Attributes:
        contender: its name in the figure.
        round: number of the round; the contenders of a round ran one after the other.
        wall_s: seconds of the whole workload (a contender that runs a fraction of it: scaled up).
        cpu_s: CPU seconds of its process (and of the service behind it), scaled likewise.
        extra: what the workload itself measured, by name.
    """

    contender: str
    round: int
    wall_s: float
    cpu_s: float
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        what: what is compared with what.
        reached: the figure.
        unit: ``"x"`` for ratios, else ``"ms"``, ``"us"``, ...
        target: what it should come to; None for figures that stand there for information.
        at_least: whether more is better.
    """

    what: str
    reached: Spread
    unit: str
    target: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.reached.median >= self.target if self.at_least else self.reached.median <= self.target

    @property
    def missing(self) -> float:
        """The factor by which the target is missed, above 1; 1 where it is met or there is none."""
        if self.target is None or self.met:
            return 1.0
        if self.at_least:
            return self.target / self.reached.median if self.reached.median > 0 else float("inf")
        return self.reached.median / self.target if self.target > 0 else float("inf")


@dataclass(frozen=True)
class Check:
    """That a contender did the same work.

    Attributes:
        contender: who was compared.
        against: with whom.
        largest: the largest absolute difference of the values that both computed.
        spread: standard deviation of the values (so that a small difference means something).
        tolerance: how large the difference may be.
        values: how many values were compared.
    """

    contender: str
    against: str
    largest: float
    spread: float
    tolerance: float
    values: int

    @property
    def equal(self) -> bool:
        """Whether the values are close, and vary by much more than they are apart."""
        return self.largest <= self.tolerance and self.largest <= self.spread / 10 and self.spread > 0


@dataclass(frozen=True)
class Measured:
    """One figure.

    Attributes:
        name, title: as the figure says.
        settings: of the workload: sizes, rounds, threads.
        labels: what each contender is, by name.
        samples: every trial.
        findings: rows of the table.
        checks: that the contenders computed the same values.
        notes: what a reader must know: fractions that were scaled, contenders that were left out.
        failed: contenders that were left out though their environment is there.
        error: why the figure could not be measured; "" when it was.
        elapsed_s: seconds that measuring it took, preparations included.
    """

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    findings: Sequence[Finding] = ()
    checks: Sequence[Check] = ()
    notes: Sequence[str] = ()
    failed: Sequence[str] = ()
    error: str = ""
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Report:
    """One run of ``make bench``.

    Attributes:
        started: when, ISO 8601, UTC.
        mode: ``"full"``, ``"quick"`` or ``"gpu"``.
        machine: facts of the machine and its load, by name.
        versions: packages of each environment: environment -> package -> version.
        measured: the figures.
        format: `FORMAT` of the program that wrote it.
    """

    started: str
    mode: str
    machine: Mapping[str, Any]
    versions: Mapping[str, Mapping[str, str]]
    measured: Sequence[Measured]
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write it as JSON, one sample a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(self), encoding="utf-8")


def to_json(report: Report) -> str:
    """A report as readable JSON in which samples, findings and checks take one line each."""
    plain = _rounded(dataclasses.asdict(report))
    rows: dict[str, str] = {}  # a mark in the text -> what stands there
    for measured in plain["measured"]:
        for part in ("samples", "findings", "checks"):
            for at, entry in enumerate(measured[part]):
                mark = f"row {len(rows)} of the report"
                rows[json.dumps(mark)] = json.dumps(entry, ensure_ascii=False)
                measured[part][at] = mark
    text = []
    for line in json.dumps(plain, indent=1, ensure_ascii=False).split("\n"):
        mark = line.strip().rstrip(",")
        text.append(line.replace(mark, rows[mark]) if mark in rows else line)
    return "\n".join(text) + "\n"


def _rounded(value: Any) -> Any:
    """Floats to seven significant digits: no clock and no ratio here has more."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


def from_json(text: str) -> Report:
    """A report that `to_json` wrote.

    Raises:
        ValueError: it was written in another format.
    """
    plain = json.loads(text)
    if plain.get("format") != FORMAT:
        raise ValueError(f"the results have format {plain.get('format')!r}; this program reads {FORMAT}: measure again")
    measured = [
        Measured(
            **{
                **m,
                "samples": [Sample(**s) for s in m["samples"]],
                "findings": [Finding(**{**f, "reached": Spread(**f["reached"])}) for f in m["findings"]],
                "checks": [Check(**c) for c in m["checks"]],
            }
        )
        for m in plain.pop("measured")
    ]
    return Report(**plain, measured=measured)
