"""Views over tokens: a table of predicted tokens shaded by probability, and a text coloured by a number each."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchbay.plots.base import Plot, to_grid, to_labels
from patchbay.plots.colour import Scale, ScaleName, readable_on, to_hex
from patchbay.plots.figures import draw_grid
from patchbay.plots.terminal import Canvas, cell, legend, line, write_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text


def _percent(p: float) -> str:
    return f"{100 * p:.0f}%"


def _coloured(rgb: tuple[int, int, int]) -> str:
    return f"background:{to_hex(rgb)};color:{to_hex(readable_on(rgb))}"


@dataclass(frozen=True, eq=False)
class TokenTable(Plot):
    """A token and its probability per cell, as the logit lens gives them; made by `token_table`.

    Attributes:
        tokens: rows of tokens.
        probabilities: rows of numbers from 0 to 1.
        x_labels, y_labels: one per column and one per row.
        title: above the table.
        highlight: tokens to point out.
        scale: from probability to colour.
    """

    tokens: tuple[tuple[str, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    x_labels: tuple[str, ...]
    y_labels: tuple[str, ...]
    title: str
    highlight: frozenset[str]
    scale: Scale

    def _marks(self) -> frozenset[tuple[int, int]]:
        return frozenset(
            (i, j) for i, row in enumerate(self.tokens) for j, t in enumerate(row) if t.strip() in self.highlight
        )

    def lines(self, canvas: Canvas) -> Iterable[Text]:
        marks = self._marks()
        label_width = canvas.measure(self.y_labels, 20)
        word = canvas.measure([t for row in self.tokens for t in row], 12)
        extra = 2 if canvas.colour else 2 + bool(marks)
        width = max(word + 5 + extra, canvas.measure(self.x_labels, 14) + 1)
        per_band = max(1, (canvas.width - label_width - 2) // width)
        if self.title:
            yield line((canvas.clean(self.title), "bold"))
        for start in range(0, len(self.x_labels), per_band):
            stop = min(start + per_band, len(self.x_labels))
            heads = [canvas.fit(x, width - 1, "center") + " " for x in self.x_labels[start:stop]]
            yield line((" " * label_width + "  " + "".join(heads)).rstrip())
            for i, row in enumerate(self.tokens):
                cells: list[str | tuple[str, str]] = [canvas.fit(self.y_labels[i], label_width, "right") + "  "]
                for j in range(start, stop):
                    p = self.probabilities[i][j]
                    text = f"{canvas.fit(row[j], word).rstrip()} {_percent(p):>4}"
                    cells.append(cell(canvas, self.scale, p, text, width, mark=(i, j) in marks))
                yield line(*cells)
        yield line(" " * (label_width + 2)) + legend(canvas, self.scale, "{:.0%}", "probability")

    def figure(self, *, dark: bool = False) -> Figure:
        texts = [
            [f"{t} {_percent(p)}" for t, p in zip(row, probs, strict=True)]
            for row, probs in zip(self.tokens, self.probabilities, strict=True)
        ]
        return draw_grid(
            self.probabilities,
            self.scale,
            x_labels=self.x_labels,
            y_labels=self.y_labels,
            title=self.title,
            x_title="",
            y_title="",
            scale_title="probability",
            texts=texts,
            marks=self._marks(),
            number="{:.0%}",
            dark=dark,
        )

    @property
    def alt(self) -> str:
        last = self.tokens[-1]
        said = "; ".join(f"{x}: {t}" for x, t in zip(self.x_labels, last, strict=True))
        return f"Table of predicted tokens: {self.title}. Row {self.y_labels[-1]} predicts {said}."

    def html(self) -> str:
        marks = self._marks()
        head = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in self.x_labels)
        rows = []
        for i, (label, row) in enumerate(zip(self.y_labels, self.tokens, strict=True)):
            cells = []
            for j, token in enumerate(row):
                p = self.probabilities[i][j]
                mark = ' class="mark"' if (i, j) in marks else ""
                cells.append(
                    f'<td{mark} style="{_coloured(self.scale.rgb(p))}">{html.escape(token)} '
                    f"<small>{_percent(p)}</small></td>"
                )
            rows.append(f'<tr><th scope="row">{html.escape(label)}</th>{"".join(cells)}</tr>')
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return (
            f'<div class="scroll"><table class="tokens">{caption}<thead><tr><td></td>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )


@dataclass(frozen=True, eq=False)
class TokenStrip(Plot):
    """A text whose tokens carry a number each; made by `token_strip`.

    Attributes:
        tokens: the text.
        values: one number per token.
        title: above the strip.
        scale: from number to colour.
        number: how a number is written (`str.format`).
        scale_title: what the numbers are.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    title: str
    scale: Scale
    number: str
    scale_title: str

    def lines(self, canvas: Canvas) -> Iterable[Text]:
        if self.title:
            yield line((canvas.clean(self.title), "bold"))
        numbers = [write_number(self.number, v) for v in self.values]
        widths = [
            canvas.measure([t], 24) + 2 if canvas.colour else max(canvas.measure([t], 24), len(n) + 2) + 1
            for t, n in zip(self.tokens, numbers, strict=True)
        ]
        start = 0
        while start < len(self.tokens):
            stop, used = start, 0
            while stop < len(self.tokens) and (stop == start or used + widths[stop] <= canvas.width):
                used += widths[stop]
                stop += 1
            part = range(start, stop)
            if canvas.colour:
                yield line(*(cell(canvas, self.scale, self.values[i], self.tokens[i], widths[i]) for i in part))
            else:
                yield line("".join(canvas.fit(self.tokens[i], widths[i]) for i in part).rstrip())
                shades = (self.scale.shade(self.values[i], canvas.shades) + " " + numbers[i] for i in part)
                yield line("".join(canvas.fit(s, widths[i]) for i, s in zip(part, shades, strict=True)).rstrip())
            start = stop
        yield legend(canvas, self.scale, self.number, self.scale_title)

    def figure(self, *, dark: bool = False) -> Figure:
        return draw_grid(
            [self.values],
            self.scale,
            x_labels=self.tokens,
            y_labels=("",),
            title=self.title,
            x_title="",
            y_title="",
            scale_title=self.scale_title,
            texts=[[write_number(self.number, v) for v in self.values]],
            number=self.number,
            dark=dark,
        )

    @property
    def alt(self) -> str:
        high = max(range(len(self.values)), key=self.values.__getitem__)
        return (
            f"Text with a number per token: {self.title or self.scale_title}. "
            f"Highest {write_number(self.number, self.values[high])} at token {high}, {self.tokens[high]}."
        )

    def html(self) -> str:
        numbers = [write_number(self.number, v) for v in self.values]
        spans = " ".join(
            f'<span style="{_coloured(self.scale.rgb(v))}" title="{html.escape(n, quote=True)}">{html.escape(t)}</span>'
            for t, v, n in zip(self.tokens, self.values, numbers, strict=True)
        )
        title = f"<figcaption>{html.escape(self.title)}</figcaption>" if self.title else ""
        return f'<figure>{title}<p class="strip">{spans}</p></figure>'


def token_table(
    tokens: Sequence[Sequence[str]],
    probabilities: Any,
    x_labels: Sequence[object] | None = None,
    y_labels: Sequence[object] | None = None,
    title: str = "",
    *,
    highlight: Iterable[str] = (),
) -> TokenTable:
    """A table of predicted tokens, shaded by their probability (a logit lens).

    Args:
        tokens: rows of tokens, [rows][columns].
        probabilities: [rows, columns], from 0 to 1.
        x_labels: one per column, usually the prompt's tokens.
        y_labels: one per row, usually the layers.
        title: above the table.
        highlight: tokens to point out, wherever they appear (compared without spaces around them).

    Raises:
        ValueError: shapes or labels that do not fit each other.
    """
    grid = to_grid(probabilities, "a token table")
    rows = tuple(tuple(str(t) for t in row) for row in tokens)
    if [len(r) for r in rows] != [len(r) for r in grid]:
        raise ValueError(
            f"tokens ({len(rows)} rows of {[len(r) for r in rows]}) and probabilities "
            f"({len(grid)} rows of {len(grid[0])}) differ in shape"
        )
    return TokenTable(
        tokens=rows,
        probabilities=tuple(tuple(row) for row in grid),
        x_labels=to_labels(x_labels, len(grid[0]), "x_labels"),
        y_labels=to_labels(y_labels, len(grid), "y_labels"),
        title=title,
        highlight=frozenset(h.strip() for h in highlight),
        scale=Scale("sequential", 0.0, 1.0),
    )


def token_strip(
    tokens: Sequence[str],
    values: Any,
    title: str = "",
    *,
    scale: ScaleName = "auto",
    low: float | None = None,
    high: float | None = None,
    number: str = "{:.2f}",
    scale_title: str = "",
) -> TokenStrip:
    """A text coloured by one number per token (a feature's activation, a loss).

    Args:
        tokens: the text's tokens.
        values: one number for each.
        title: above the strip.
        scale: ``"sequential"``, ``"diverging"``, or by the values' signs.
        low: number at the scale's lower end; the smallest value when left out.
        high: number at its upper end.
        number: how numbers are written, for `str.format`.
        scale_title: what the numbers are.

    Raises:
        ValueError: not one number per token.
    """
    (row,) = to_grid([values], "a token strip")
    if len(row) != len(tokens):
        raise ValueError(f"{len(row)} values for {len(tokens)} tokens")
    return TokenStrip(
        tokens=tuple(str(t) for t in tokens),
        values=tuple(row),
        title=title,
        scale=Scale.fit(row, scale, low, high),
        number=number,
        scale_title=scale_title,
    )
