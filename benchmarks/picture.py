"""The findings as a picture: how far each target is reached, on one logarithmic axis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.samples import Finding, Measured
from benchmarks.table import number, target, trusted, with_unit

_MET, _MISSED, _INK, _PAPER = "#1f77a4", "#c7522a", "#1c1e21", "#ffffff"
#: Further than this and the mark stands at the edge.
_EDGE = 30.0


def score(finding: Finding) -> float:
    """How many times better than its target a finding is; below 1 it misses it."""
    assert finding.target is not None
    value = max(finding.reached.median, 1e-9)
    return value / finding.target if finding.at_least else finding.target / value


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Write an SVG; the same report gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    targeted = [(m, f) for m in measured for f in m.findings if f.target is not None]
    with mpl.rc_context({"svg.hashsalt": "patchbay", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(10.5, 1.2 + 0.3 * max(1, len(targeted))), facecolor=_PAPER, layout="constrained")
        ax: Any = figure.add_subplot(facecolor=_PAPER)
        for y, (owner, finding) in enumerate(targeted):
            reach = min(max(score(finding), 1 / _EDGE), _EDGE)
            colour = _MET if finding.met and trusted(owner) else _MISSED
            ax.plot([1, reach], [y, y], color=colour, linewidth=2)
            ax.plot([reach], [y], marker="o", color=colour, markersize=6)
            said = f"{with_unit(finding.reached.median, finding.unit)}, {target(finding)}"
            ax.annotate(
                said, (max(reach, 1), y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=_INK
            )
        ax.axvline(1, color=_INK, linewidth=1)
        ax.set_xscale("log")
        worst = min((score(finding) for _, finding in targeted), default=1.0)
        ax.set_xlim(max(min(worst / 1.5, 0.5), 1 / _EDGE), _EDGE * 12)
        left = ax.get_xlim()[0]
        ticks = [t for t in (1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30) if t >= left]
        ax.set_xticks(ticks, labels=[number(t) if t >= 1 else f"1/{round(1 / t)}" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(targeted)), labels=[f.what for _, f in targeted], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel("times better than the target (right of the line: met)", fontsize=8)
        ax.tick_params(length=0, colors=_INK)
        for spine in ax.spines.values():
            spine.set_visible(False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
