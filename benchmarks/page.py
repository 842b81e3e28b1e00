"""docs/performance.md, written from the JSON of a run and from the figures' own descriptions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from benchmarks.figure import Trials
from benchmarks.samples import Measured, Report, from_json
from benchmarks.spread import spread
from benchmarks.table import number, rows, trusted

#: The runs that the page shows, in this order, where they exist.
RESULTS = ("full", "gpu")
_WIDTH = 120
_TITLES = {"full": "The table", "gpu": "On a GPU", "quick": "A quick run"}
_HEAD = """# Performance

Every figure here was measured by `make bench` and written down by it; nothing is entered by hand. The workloads are in
`benchmarks/figures/`, one file each; every sample stands in `benchmarks/results/`.

```
make bench                              # everything; the peers get environments of their own (some minutes, once)
make bench ARGS=--quick                 # small models, few rounds: that everything works, not how fast it is
make bench ARGS="--only pure_nodes"     # one figure
make bench ARGS=--gpu                   # a larger model in bfloat16, on CUDA
```

How to read it: contenders run in processes of their own and take turns, round after round; a figure is a ratio
(or a difference) of medians, and the range in brackets holds the quartiles over the rounds. The peers are
measured in the same run. Whatever is compared is checked to be the same work: the values of both sides are held
to each other, and where they differ the table says so instead of a verdict. Weights are random, of the stated
shapes; inputs differ in every round, so that no cache answers where the figure is not about one.
"""


def page(reports: Sequence[Report]) -> str:
    """The page for these runs."""
    parts = [_HEAD]
    for report in reports:
        parts += [f"## {_TITLES[report.mode]}\n", _machine(report), _table(report.measured)]
        if report.mode == "full":
            parts.append("![How far each target is reached](performance.svg)\n")
        ablation = next((m for m in report.measured if m.name == "ablation" and m.findings), None)
        if ablation is not None:
            parts += ["### What each optimisation is worth\n", _ablation(ablation)]
    for name in figures.NAMES:
        parts.append(_figure(name, reports))
    return "\n".join(parts).rstrip() + "\n"


def _machine(report: Report) -> str:
    facts = report.machine
    threads = sorted({int(m.settings["threads"]) for m in report.measured if "threads" in m.settings})
    versions = {package: v for place in report.versions.values() for package, v in place.items()}
    listed = ", ".join(f"{package} {v}" for package, v in sorted(versions.items()) if package != "patchbay")
    gpu = f" {facts['gpu']}." if facts.get("gpu") and report.mode == "gpu" else ""
    where = f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}"
    load = ", ".join(map(str, facts["load_before"]))
    return (
        f"{report.started[:10]}; {where}; load before: {load}.{gpu}\n"
        f"Torch threads of everything: {', '.join(map(str, threads))}. {listed}.\n"
    )


def _table(measured: Sequence[Measured]) -> str:
    lines = ["| figure | reached (quartiles) | target | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows(measured)]
    return "\n".join(lines) + "\n"


def _ablation(measured: Measured) -> str:
    cells: dict[str, dict[str, str]] = {}
    for finding in measured.findings:
        workload, _, variant = finding.what.partition("|")
        cells.setdefault(variant, {})[workload] = f"{number(finding.reached.median)}"
    workloads = list(dict.fromkeys(f.what.partition("|")[0] for f in measured.findings))
    lines = [f"| off | {' | '.join(workloads)} |", "|---|" + "---|" * len(workloads)]
    for variant, by_workload in cells.items():
        shown = variant if variant == "everything" else f"`{variant}`"
        lines.append(f"| {shown} | {' | '.join(by_workload.get(w, '') for w in workloads)} |")
    return "Time with the switch off, in units of the time with all on.\n\n" + "\n".join(lines) + "\n"


def _figure(name: str, reports: Sequence[Report]) -> str:
    figure = figures.load(name)
    lines = [f"## {figure.title}\n"]
    for paragraph in (figure.what, f"*Why*: {figure.why}", f"*How*: {figure.how}"):
        lines += [*textwrap.wrap(paragraph, _WIDTH, break_on_hyphens=False, break_long_words=False), ""]
    for report in reports:
        measured = next((m for m in report.measured if m.name == name), None)
        if measured is None or name == "ablation":
            continue
        if len(reports) > 1:
            lines += [f"**{_TITLES[report.mode]}**", ""]
        if measured.error:
            lines += [f"Not measured: {_cell(measured.error)}", ""]
            continue
        lines += [_contenders(measured), ""]
        if measured.checks:
            worst = max(measured.checks, key=lambda c: c.largest)
            allowed = f"by {worst.largest:.2g} (allowed {worst.tolerance:.2g})"
            count = sum(c.values for c in measured.checks)
            said = f"Checked to be equal: {count:,} values, which differ {allowed} at most."
            if not trusted(measured):
                said = f"**The values differ**: {worst.contender} from {worst.against} {allowed}."
            lines += [said, ""]
        for note in measured.notes:
            lines += textwrap.wrap(f"- {_cell(note)}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        lines += [""] if measured.notes else []
    return "\n".join(lines)


def _contenders(measured: Measured) -> str:
    trials = Trials(measured.samples)
    lines = ["| contender | wall, ms (quartiles) | CPU, ms | rounds |", "|---|---|---|---|"]
    for name, label in measured.labels.items():
        if trials.has(name):
            wall, cpu = (spread([1e3 * v for v in trials.series(name, key)]) for key in ("wall_s", "cpu_s"))
            quartiles = f"{number(wall.median)} ({number(wall.low)} to {number(wall.high)})"
            lines.append(f"| {_cell(label)} | {quartiles} | {number(cpu.median)} | {wall.n} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def read_results(folder: Path) -> list[Report]:
    """The committed runs."""
    paths = [folder / f"{name}.json" for name in RESULTS]
    return [from_json(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
