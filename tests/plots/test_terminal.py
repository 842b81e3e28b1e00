"""What a plot looks like as text: aligned with and without colour, and harmless whatever the labels hold."""

from __future__ import annotations

import io
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from patchbay import plots
from patchbay.plots.colour import Scale, readable_on
from patchbay.plots.terminal import Canvas

TOKENS = ["<bos>", "The", "capital", "of", "France", "is"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class AsciiFile(io.StringIO):
    """A file that can hold nothing but ASCII."""

    encoding = "ascii"


@pytest.fixture
def grid() -> plots.Heatmap:
    values = np.linspace(0.0, 1.0, 30).reshape(5, 6)
    return plots.heatmap(values, TOKENS, ["embed", 0, 1, 2, 3], "Recovered", x_title="token", y_title="layer")


def columns_of(text: str, numbers: list[str]) -> list[int]:
    """The display column at which each of `numbers` ends, in the line that holds all of them."""
    (found,) = [row for row in text.splitlines() if all(n in row for n in numbers)]
    return [cell_len(found[: found.index(n) + len(n)]) for n in numbers]


def test_a_plain_heat_map_holds_every_number_in_aligned_columns(grid: plots.Heatmap) -> None:
    """Without colour every value is written, in columns that start at the same place in every row."""
    text = grid.text(width=100)
    assert "\x1b" not in text
    rows = [[f"{v:.2f}" for v in row] for row in grid.values]
    ends = [columns_of(text, row) for row in rows]
    assert all(e == ends[0] for e in ends)
    assert len(set(ends[0])) == len(TOKENS)


def test_colour_changes_the_look_and_not_the_numbers(grid: plots.Heatmap) -> None:
    """With colour each cell is a 24-bit background, and every row of cells has the same width."""
    text = grid.text(color=True)
    assert "48;2;68;1;84" in text  # viridis's first colour: the lowest value
    assert "48;2;253;231;37" in text  # and its last
    rows = [ANSI.sub("", row) for row in text.splitlines()][3:8]
    assert {cell_len(row) for row in rows} == {cell_len(rows[0])}
    assert all(f"{v:.2f}" in row for row, vs in zip(rows, grid.values, strict=True) for v in vs)


def test_labels_stand_over_their_columns(grid: plots.Heatmap) -> None:
    """The middle of each column's label lies within its column."""
    lines = grid.text(width=100).splitlines()
    head = next(row for row in lines if "capital" in row)
    ends = columns_of("\n".join(lines), [f"{v:.2f}" for v in grid.values[0]])
    for j, token in enumerate(TOKENS):
        middle = head.index(token) + len(token) / 2
        assert (ends[j - 1] if j else 0) < middle <= ends[j] + 1


def test_the_scale_is_shown_with_its_ends(grid: plots.Heatmap) -> None:
    """The last line is the scale from the lowest to the highest number."""
    last = grid.text().splitlines()[-1].split()
    assert (last[0], last[-1]) == ("0.00", "1.00")


def test_no_color_is_respected(grid: plots.Heatmap, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal with NO_COLOR set, no colour is sent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = Terminal()
    grid.print(coloured)
    assert "48;2;" in coloured.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    grid.print(plain)
    assert "38;" not in plain.getvalue()
    assert "48;" not in plain.getvalue()
    assert "▓" in plain.getvalue()


def test_a_pipe_gets_plain_text(grid: plots.Heatmap, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a terminal gets no escape code at all."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    out = io.StringIO()
    grid.print(out)
    assert "\x1b" not in out.getvalue()
    assert "Recovered" in out.getvalue()


def test_an_ascii_pipe_gets_ascii() -> None:
    """Where only ASCII can be encoded, shades, marks and labels are ASCII."""
    out = AsciiFile()
    plots.heatmap([[0.0, 1.0]], ["Zürich", "a\nb"], ["巴黎"]).print(out)
    assert out.getvalue().isascii()
    assert "a\\nb" in out.getvalue()


def test_a_wide_grid_is_continued_below() -> None:
    """Columns that do not fit are printed in further bands, none of which is wider than asked for."""
    text = plots.heatmap(np.arange(40).reshape(1, 40), number="{:.0f}").text(width=60)
    assert all(cell_len(row) <= 60 for row in text.splitlines())
    assert [str(i) for i in range(40)] == [n for row in text.splitlines()[0:-1:2] for n in row.split()]


def test_wide_characters_keep_the_columns_aligned() -> None:
    """A label of double-width characters does not push its row out of line."""
    values = [[0.25, 0.5], [0.5, 0.25]]
    text = plots.heatmap(values, ["巴黎", "罗马"], ["法国", "it"]).text()
    rows = text.splitlines()[1:3]
    ends = [[cell_len(row[: row.index(n) + 4]) for n in ("0.25", "0.50")] for row in rows]
    assert ends[0] == ends[1][::-1]


def test_missing_values_are_blank_and_explained() -> None:
    """NaN is an empty cell, and the legend says so."""
    text = plots.attention(np.tril(np.full((3, 3), 0.5)), ["a", "b", "c"]).text()
    assert "nan" not in text
    assert "no value" in text
    assert text.count("0.50") == 6


def test_a_diverging_scale_is_symmetric() -> None:
    """Values on both sides of zero get a scale whose middle is zero and whose ends are equally far from it."""
    scale = Scale.fit([-1.0, 3.0])
    assert (scale.name, scale.low, scale.high) == ("diverging", -3.0, 3.0)
    assert scale.rgb(0.0) == (247, 247, 247)
    assert Scale.fit([-0.01, 3.0]).name == "sequential"


def test_a_constant_grid_draws() -> None:
    """A grid without a spread of values is drawn rather than divided by zero."""
    assert plots.heatmap(np.zeros((2, 2))).text().count("0.00") == 6
    assert len(plots.heatmap(np.ones((2, 2))).png()) > 1000


def test_the_best_head_is_marked() -> None:
    """A grid of heads points at its highest score."""
    view = plots.head_grid([[0.1, 0.2], [0.9, 0.0]])
    assert view.marks == {(1, 0)}
    assert "*0.90" in view.text()
    assert "layer 1" in view.text()


def test_a_token_table_shows_token_and_probability() -> None:
    """Every cell holds its token and its percentage; highlighted tokens carry a star."""
    view = plots.token_table([["the", "Rome"], ["a", "Paris"]], [[0.1, 0.2], [0.3, 0.987]], highlight=["Paris"])
    text = view.text()
    assert re.search(r"\*Paris\s+99%", text)
    assert re.search(r" Rome\s+20%", text)


def test_a_token_strip_wraps_within_the_width() -> None:
    """A long text is broken between tokens, and every token keeps its number beneath it."""
    tokens = [f"word{i}" for i in range(30)]
    text = plots.token_strip(tokens, np.linspace(0, 9, 30)).text(width=50)
    assert all(cell_len(row) <= 50 for row in text.splitlines())
    assert re.findall(r"word\d+", text) == tokens
    assert len(re.findall(r"\d\.\d\d", text)) == 30 + 2


@given(st.text(max_size=30), st.integers(1, 20), st.sampled_from(["left", "right", "center"]), st.booleans())
def test_any_label_fits_its_column(label: str, width: int, align: str, ascii_only: bool) -> None:
    """Whatever a tokenizer may hold, a label takes exactly its column and holds nothing that a terminal obeys."""
    fitted = Canvas(ascii=ascii_only).fit(label, width, align)
    assert cell_len(fitted) == width
    assert fitted.isprintable()
    assert not set(fitted) & set("\x1b\n\r\t\x9b\u202e")


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_text_is_readable_on_every_colour(rgb: tuple[int, int, int]) -> None:
    """Black or white reaches WCAG's 4.5:1 contrast on any background."""

    def luminance(color: tuple[int, int, int]) -> float:
        c = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]

    high, low = sorted((luminance(rgb), luminance(readable_on(rgb))), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=8))
def test_any_numbers_draw(values: list[float]) -> None:
    """NaN, infinities and subnormals are drawn without an error."""
    text = plots.heatmap([values], number="{:.3g}").text(width=200)
    assert sum(not math.isnan(v) for v in values) <= len(re.findall(r"inf|\d", text))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.heatmap([1.0, 2.0]), "two axes"),
        (lambda: plots.heatmap(np.zeros((0, 3))), "empty"),
        (lambda: plots.heatmap([[1.0]], ["a", "b"]), "2 labels for 1"),
        (lambda: plots.token_table([["a"]], [[0.1, 0.2]]), "differ in shape"),
        (lambda: plots.token_strip(["a"], [1.0, 2.0]), "2 values for 1 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, words: str) -> None:
    """A grid or labels of the wrong extent raise ValueError with the numbers."""
    with pytest.raises(ValueError, match=words):
        call()
