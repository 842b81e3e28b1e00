"""``make bench``: measures the figures, prints the table, writes JSON, a picture and docs/performance.md.

python -m benchmarks [--quick | --gpu] [--only NAME ...] [--place NAME=PYTHON ...]
python -m benchmarks --page          # write the page again from the committed JSON
python -m benchmarks --list
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures, page, picture, table
from benchmarks.figure import Scale
from benchmarks.harness import Bench, to_stderr
from benchmarks.machine import machine, switches, versions
from benchmarks.processes import ROOT
from benchmarks.samples import Measured, Report, from_json

RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / ".bench"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small models, few rounds; under five minutes")
    size.add_argument("--gpu", action="store_true", help="a larger model in bfloat16 on CUDA")
    size.add_argument("--tiny", action="store_true", help="seconds; for tests of the harness itself")
    parser.add_argument(
        "--only", action="append", default=[], choices=figures.NAMES, help="measure this figure; repeatable"
    )
    parser.add_argument(
        "--place", action="append", default=[], metavar="NAME=PYTHON", help="an environment: transformerlens, ..."
    )
    parser.add_argument(
        "--threads", type=int, help="torch threads of everything (default: what the service would choose)"
    )
    parser.add_argument("--rounds", type=int, help="so many rounds of every figure (default: each figure's own)")
    parser.add_argument("--json", type=Path, help="where to write the JSON")
    parser.add_argument(
        "--page", action="store_true", help="only write docs/performance.md and its picture from the JSON"
    )
    parser.add_argument("--list", action="store_true", help="list the figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns 1 when a figure or contender failed or values differ, never because a target was missed."""
    options = options_of(arguments)
    if options.list:
        for name in figures.NAMES:
            print(f"{name:<22} {figures.load(name).title}")
        return 0
    if options.page:
        write_page()
        return 0
    from patchbay_server.serving.threads import choose_torch_threads

    mode = "quick" if options.quick else "gpu" if options.gpu else "tiny" if options.tiny else "full"
    environments = {"patchbay": sys.executable, **places_of(options.place)}
    threads = choose_torch_threads(options.threads)
    bench = Bench(
        environments, Scale(mode, threads, switches(sys.executable)), SCRATCH / "models", to_stderr, options.rounds
    )
    chosen = [name for name in figures.NAMES if not options.only or name in options.only]
    started, facts = dt.datetime.now(dt.timezone.utc), machine()
    measured = []
    for number, name in enumerate(chosen, 1):
        to_stderr(f"[{number}/{len(chosen)}] {name}")
        measured.append(bench.measure(figures.load(name)))
        to_stderr(f"    {measured[-1].elapsed_s:.0f} s")
    report = Report(started.isoformat(timespec="seconds"), mode, facts, versions(environments), measured)
    path = options.json or (RESULTS if mode in page.RESULTS else SCRATCH) / f"{mode}.json"
    report = with_earlier(report, path)
    report.write(path)
    print(table.text(measured))
    to_stderr(f"wrote {path}")
    if path.parent == RESULTS:
        write_page()
    else:
        picture.draw(report.measured, path.with_suffix(".svg"))
        to_stderr(f"wrote {path.with_suffix('.svg')}")
    return int(any(m.error or m.failed or not table.trusted(m) for m in measured))


def places_of(given: Sequence[str]) -> dict[str, str]:
    """Place -> interpreter, for those that exist. Paths stay links: a resolved one would leave its environment."""
    pairs = (place.partition("=") for place in given)
    return {name: os.path.abspath(python) for name, _, python in pairs if os.path.exists(python)}


def with_earlier(report: Report, path: Path) -> Report:
    """`report` with the figures of an earlier run at `path` that were not measured this time."""
    if not path.exists():
        return report
    try:
        earlier = from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError):
        return report
    new = {m.name: m for m in report.measured}
    kept: dict[str, Measured] = {m.name: m for m in earlier.measured if m.name not in new}
    if not kept:
        return report
    merged = [m for name in figures.NAMES if (m := new.get(name) or kept.get(name)) is not None]
    return Report(report.started, report.mode, report.machine, report.versions, merged)


def write_page() -> None:
    """docs/performance.md and its picture."""
    reports = page.read_results(RESULTS)
    PAGE.write_text(page.page(reports), encoding="utf-8")
    to_stderr(f"wrote {PAGE.relative_to(ROOT)}")
    for report in reports:
        if report.mode == "full":
            picture.draw(report.measured, PICTURE)
            to_stderr(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
