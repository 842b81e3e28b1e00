"""The findings as text: one table, in a terminal and in docs/performance.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.samples import Finding, Measured
from benchmarks.spread import Spread

_DIGITS = 3


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, _DIGITS - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places and abs(value) >= 100 else text


def with_unit(value: float, unit: str) -> str:
    """``2.50x``, ``3.00 ms``."""
    return f"{number(value)}x" if unit == "x" else f"{number(value)} {unit}"


def reached(spread: Spread, unit: str) -> str:
    """The median, with the quartiles where there are any."""
    shown = with_unit(spread.median, unit)
    return shown if spread.n < 3 else f"{shown} ({number(spread.low)} to {number(spread.high)})"


def target(finding: Finding) -> str:
    """``at least 2.5x``; empty where there is none."""
    if finding.target is None:
        return ""
    unit = "x" if finding.unit == "x" else f" {finding.unit}"
    return f"{'at least' if finding.at_least else 'at most'} {finding.target:g}{unit}"


def verdict(finding: Finding, trusted: bool = True) -> str:
    """``met``, or by how much it is not; a figure of unequal work is no figure."""
    if not trusted:
        return "values differ"
    if finding.target is None:
        return ""
    if finding.met:
        return "met"
    missing = finding.missing
    return f"missed by {number(missing)}x" if math.isfinite(missing) else "missed"


def shortened(reason: str, characters: int = 90) -> str:
    """The first line of an error, not wider than a table can bear."""
    line = reason.partition("\n")[0]
    return line if len(line) <= characters else f"{line[: characters - 3]}..."


def trusted(measured: Measured) -> bool:
    """Whether every comparison of values held."""
    return all(check.equal for check in measured.checks)


def rows(measured: Sequence[Measured]) -> list[tuple[str, str, str, str]]:
    """What, reached, target, verdict: one row a finding, figures that could not be measured included."""
    found = []
    for each in measured:
        if each.name == "ablation":
            continue
        if each.error:
            found.append((each.title, "not measured", "", shortened(each.error)))
        for finding in each.findings:
            found.append(
                (finding.what, reached(finding.reached, finding.unit), target(finding), verdict(finding, trusted(each)))
            )
    return found


def text(measured: Sequence[Measured]) -> str:
    """The table for a terminal."""
    head = ("figure", "reached (quartiles)", "target", "")
    lines = [head, *rows(measured)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    drawn = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]).rstrip() for line in lines
    ]
    drawn.insert(1, "-" * max(map(len, drawn)))
    with_target = [f for m in measured for f in m.findings if f.target is not None]
    drawn += [
        f"{m.title}: {', '.join(m.failed)} failed and left rows out (see the notes)" for m in measured if m.failed
    ]
    met = sum(1 for m in measured if trusted(m) for f in m.findings if f.met)
    return "\n".join([*drawn, "", f"{met} of {len(with_target)} targets met."])
