"""A logbook: what an experiment finds, printed as it happens and kept for one HTML page.

A script says everything once, and it appears in the terminal at once and in the report at the end.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from patchbay.plots.base import Plot
from patchbay.plots.extras import require
from patchbay.plots.page import Report, Section
from patchbay.plots.terminal import Canvas, canvas_of, line

if TYPE_CHECKING:
    from patchbay.ir.events import Usage

_WIDEST_TEXT = 100


class Traced(Protocol):
    """What `Logbook.usage` adds up: traces that have run, or that were given up before anything was sent."""

    @property
    def has_run(self) -> bool: ...

    @property
    def sent_bytes(self) -> int: ...

    @property
    def received_bytes(self) -> int: ...

    @property
    def usage(self) -> Usage: ...


class Logbook:
    """Prints an experiment's course and builds its report.

    ::

        book = Logbook("Where the fact lives")
        book.section("Causal tracing", "One run for each layer and token.")
        book.show(plots.heatmap(recovered, tokens, layers))
        book.usage(t)
        book.finding("The fact sits at 'France'.", passed=recovered.max() > 0.9)
        book.write("report.html")

    Args:
        title: of the report.
        lead: a sentence below it.
        file: where to print; standard output by default.
    """

    def __init__(self, title: str, lead: str = "", *, file: IO[str] | None = None) -> None:
        self._console = require("rich.console", "A logbook").Console(file=file, highlight=False)
        self._canvas: Canvas = canvas_of(self._console)
        self._report = Report(title, lead=lead)
        self._section: Section | None = None
        self._findings: list[tuple[str, str, bool]] = []
        self._title = ""

    def section(self, title: str, text: str = "") -> None:
        """Begin a part, with a paragraph on what it is about."""
        self._title = title
        self._section = self._report.section(title)
        self._say("")
        self._say(title, "bold cyan")
        if text:
            self.text(text)

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._now.text(paragraph)
        self._wrap(paragraph)

    def show(self, plot: Plot) -> None:
        """A plot."""
        self._now.plot(plot)
        self._say("")
        for row in plot.lines(self._canvas):
            self._print(row)

    def table(self, header: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
        """A small table; numbers are best given as they should read."""
        self._now.table(header, rows)
        texts = [[str(c) for c in row] for row in (header, *rows)]
        widths = [self._canvas.measure([row[j] for row in texts], 90) for j in range(len(header))]
        self._say("")
        for i, row in enumerate(texts):
            cells = (self._canvas.fit(c, w) for c, w in zip(row, widths, strict=True))
            self._say("  " + "  ".join(cells).rstrip(), "dim" if i == 0 else "")

    def code(self, text: str) -> None:
        """Text as it is: an error, a program."""
        self._now.code(text)
        self._say("")
        for row in text.splitlines():
            self._say("  " + row)

    def details(self, summary: str, text: str) -> None:
        """Long text that only the report holds, folded away."""
        self._now.details(summary, text)

    def usage(self, *traces: Traced) -> None:
        """What the traces cost together: bytes both ways, passes of the model, milliseconds queued and run."""
        spent = [t.usage for t in traces if t.has_run]
        facts = {
            "traces": f"{len(traces)}",
            "sent": _bytes(sum(t.sent_bytes for t in traces)),
            "received": _bytes(sum(t.received_bytes for t in traces)),
            "passes": f"{sum(u.passes for u in spent)}",
            "queued": f"{sum(u.queue_ms for u in spent):.1f} ms",
            "run": f"{sum(u.run_ms for u in spent):.1f} ms",
        }
        self.facts(facts)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Short facts side by side."""
        self._now.facts(facts)
        mark = " | " if self._canvas.ascii else " · "
        self._say("")
        self._say("  " + mark.join(f"{k} {v}" for k, v in facts.items()), "dim")

    def finding(self, sentence: str, *, passed: bool = True) -> None:
        """What the numbers say, and whether they say what they should."""
        self._now.finding(sentence, passed=passed)
        self._report.summarize(self._now, sentence, passed=passed)
        self._findings.append((self._title, sentence, passed))
        word = "Found: " if passed else "NOT FOUND: "
        self._say("")
        self._wrap(word + sentence, "green" if passed else "bold red")

    @property
    def all_passed(self) -> bool:
        """Whether every finding so far was borne out."""
        return all(passed for _, _, passed in self._findings)

    def summary(self) -> None:
        """Print the findings once more, all together."""
        self._say("")
        self._say("Findings", "bold cyan")
        for title, sentence, passed in self._findings:
            self._wrap(f"[{'ok' if passed else 'FAILED'}] {title}: {sentence}", "" if passed else "bold red")

    def write(self, path: str | Path, footer: str = "") -> Path:
        """Write the report and print where it is.

        Args:
            path: of the HTML file.
            footer: a last line of the page.
        """
        self._report.footer = footer
        where = self._report.write(path)
        self._say("")
        self._say(f"Report: {where}")
        return where

    @property
    def _now(self) -> Section:
        if self._section is None:
            self._section = self._report.section("")
        return self._section

    def _wrap(self, text: str, style: str = "") -> None:
        width = max(20, min(self._canvas.width, _WIDEST_TEXT) - 2)
        for row in textwrap.wrap(self._canvas.clean(text), width):
            self._say("  " + row, style)

    def _say(self, text: str, style: str = "") -> None:
        self._print(line((self._canvas.clean(text), style if self._canvas.colour else "")))

    def _print(self, text: Any) -> None:
        if not self._canvas.colour:
            text.rstrip()
        self._console.print(text, end="\n", soft_wrap=True, markup=False)


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"
