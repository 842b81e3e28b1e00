"""The logbook: the same words in the terminal at once and in the report at the end."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from patchbay import plots
from patchbay.ir.events import Usage


@dataclass
class Ran:
    """A trace that has run, as far as a logbook looks."""

    sent_bytes: int
    received_bytes: int
    usage: Usage
    has_run: bool = True


class GivenUp:
    """A trace that was left by an exception: it never had a usage."""

    sent_bytes = 0
    received_bytes = 0
    has_run = False

    @property
    def usage(self) -> Usage:
        raise AssertionError("a trace that has not run was asked for its usage")


def test_everything_is_printed_and_reported(tmp_path: Path) -> None:
    """Titles, texts, plots, tables, code, usage and findings appear in both places; details in the report alone."""
    out = io.StringIO()
    book = plots.Logbook("The title", "The lead.", file=out)
    book.section("First part", "What it is about.")
    book.show(plots.heatmap(np.eye(2), ["a", "b"], ["c", "d"], "A picture"))
    book.table(["name", "number"], [["x", 1], ["longer", 22]])
    book.code("raise ShapeError\n  here")
    book.details("the graph", "n0 = site.read")
    book.usage(
        Ran(1500, 2_500_000, Usage(passes=2, queue_ms=1.25, run_ms=3.5)), Ran(500, 0, Usage(passes=1)), GivenUp()
    )
    book.finding("It is so.")
    printed = out.getvalue()
    page = book.write(tmp_path / "r.html", "The last line.").read_text(encoding="utf-8")
    for words in ("First part", "What it is about.", "A picture", "longer", "raise ShapeError", "It is so."):
        assert words in printed
        assert words in page
    assert "traces 3 · sent 2.0 kB · received 2.50 MB · passes 3 · queued 1.2 ms · run 3.5 ms" in printed
    for words in ("The title", "The lead.", "The last line.", "2.50 MB", "n0 = site.read"):
        assert words in page
    assert "n0 = site.read" not in printed
    assert "\x1b" not in printed
    assert out.getvalue().endswith(f"Report: {tmp_path / 'r.html'}\n")


def test_table_columns_are_aligned() -> None:
    """Every column starts at the same place in each row."""
    out = io.StringIO()
    book = plots.Logbook("t", file=out)
    book.table(["word", "score"], [["a", 1], ["longest", 2]])
    rows = [row for row in out.getvalue().splitlines() if row]
    assert rows[0].index("score") == rows[1].index("1") == rows[2].index("2")


def test_a_failed_finding_counts_and_is_said(tmp_path: Path) -> None:
    """One finding that the numbers do not bear out makes the book fail, in words, in the summary and on the page."""
    out = io.StringIO()
    book = plots.Logbook("t", file=out)
    book.section("A", "")
    book.finding("Fine.")
    assert book.all_passed
    book.section("B", "")
    book.finding("Not fine.", passed=False)
    book.summary()
    assert not book.all_passed
    printed = out.getvalue()
    assert "NOT FOUND: Not fine." in printed
    assert "[ok] A: Fine." in printed
    assert "[FAILED] B: Not fine." in printed
    assert "Not found." in book.write(tmp_path / "r.html").read_text(encoding="utf-8")


def test_escape_codes_in_results_are_not_obeyed() -> None:
    """A token that holds an escape code is shown, in text, tables and findings alike."""
    out = io.StringIO()
    book = plots.Logbook("t", file=out)
    bad = "\x1b]0;owned\x07 \x1b[31m[bold red]x[/]"
    book.section(bad, bad)
    book.table([bad], [[bad]])
    book.code(bad)
    book.finding(bad)
    book.facts({"k": bad})
    printed = out.getvalue()
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "[bold red]x[/]" in printed


def test_colour_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal headings are coloured; NO_COLOR stops that."""

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        out = Terminal()
        plots.Logbook("t", file=out).section("Heading")
        assert ("\x1b[" in out.getvalue()) is coloured
        assert "Heading" in out.getvalue()
