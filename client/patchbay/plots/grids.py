"""Heat maps: a number per cell of a grid, such as layer x position, layer x head, or query x key."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchbay.plots.base import Plot, picture, to_grid, to_labels
from patchbay.plots.colour import Scale, ScaleName
from patchbay.plots.figures import draw_grid
from patchbay.plots.terminal import Canvas, cell, legend, line, write_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text


@dataclass(frozen=True, eq=False)
class Heatmap(Plot):
    """A grid of numbers as colours; made by `heatmap`, `head_grid` and `attention`.

    Attributes:
        values: rows of numbers; NaN is drawn as an empty cell.
        x_labels, y_labels: one per column and one per row.
        title, x_title, y_title, scale_title: words around the grid.
        scale: from number to colour.
        number: how a number is written (`str.format`).
        marks: cells to point out, as (row, column).
    """

    values: tuple[tuple[float, ...], ...]
    x_labels: tuple[str, ...]
    y_labels: tuple[str, ...]
    title: str
    x_title: str
    y_title: str
    scale_title: str
    scale: Scale
    number: str
    marks: frozenset[tuple[int, int]]

    def _write(self, value: float) -> str:
        return "" if math.isnan(value) else write_number(self.number, value)

    def lines(self, canvas: Canvas) -> Iterable[Text]:
        texts = [[self._write(v) for v in row] for row in self.values]
        extra = 2 if canvas.colour else 2 + bool(self.marks)
        numbers = max(len(t) for row in texts for t in row) + extra
        label_width = canvas.measure([*self.y_labels, self.y_title], 20)
        width = max(numbers, canvas.measure(self.x_labels, 14) + 1)
        per_band = max(1, (canvas.width - label_width - 2) // width)
        if per_band < len(self.x_labels):  # narrower columns before more bands
            width = max(numbers, min(width, (canvas.width - label_width - 2) // len(self.x_labels)))
            per_band = max(1, (canvas.width - label_width - 2) // width)
        if self.title:
            yield line((canvas.clean(self.title), "bold"))
        for start in range(0, len(self.x_labels), per_band):
            stop = min(start + per_band, len(self.x_labels))
            if self.x_title:
                yield line(canvas.fit(self.y_title, label_width, "right"), "  ", canvas.clean(self.x_title))
            heads = [canvas.fit(x, width - 1, "center") + " " for x in self.x_labels[start:stop]]
            yield line((" " * label_width + "  " + "".join(heads)).rstrip())
            for i, row in enumerate(self.values):
                yield line(
                    canvas.fit(self.y_labels[i], label_width, "right") + "  ",
                    *(
                        cell(canvas, self.scale, row[j], texts[i][j], width, mark=(i, j) in self.marks)
                        for j in range(start, stop)
                    ),
                )
        missing = any(math.isnan(v) for row in self.values for v in row)
        yield line(" " * (label_width + 2)) + legend(canvas, self.scale, self.number, self.scale_title, missing)

    def figure(self, *, dark: bool = False) -> Figure:
        return draw_grid(
            self.values,
            self.scale,
            x_labels=self.x_labels,
            y_labels=self.y_labels,
            title=self.title,
            x_title=self.x_title,
            y_title=self.y_title,
            scale_title=self.scale_title,
            texts=[[self._write(v) for v in row] for row in self.values],
            marks=self.marks,
            number=self.number,
            dark=dark,
        )

    @property
    def alt(self) -> str:
        cells = [(v, i, j) for i, row in enumerate(self.values) for j, v in enumerate(row) if math.isfinite(v)]
        size = f"{len(self.values)} by {len(self.values[0])}"
        if not cells:
            return f"Heat map {size}: {self.title}, without values."
        (low, li, lj), (high, hi, hj) = min(cells), max(cells)
        return (
            f"Heat map {size}: {self.title or self.scale_title}. "
            f"Highest {self._write(high)} at {self.y_labels[hi]}, {self.x_labels[hj]}; "
            f"lowest {self._write(low)} at {self.y_labels[li]}, {self.x_labels[lj]}."
        )

    def html(self) -> str:
        head = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in self.x_labels)
        body = "".join(
            f'<tr><th scope="row">{html.escape(label)}</th>'
            + "".join(f"<td>{html.escape(self._write(v))}</td>" for v in row)
            + "</tr>"
            for label, row in zip(self.y_labels, self.values, strict=True)
        )
        return (
            picture(self)
            + "<details><summary>The numbers</summary><div class='scroll'>"
            + f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
        )


def heatmap(
    values: Any,
    x_labels: Sequence[object] | None = None,
    y_labels: Sequence[object] | None = None,
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    scale_title: str = "",
    scale: ScaleName = "auto",
    low: float | None = None,
    high: float | None = None,
    center: float = 0.0,
    number: str = "{:.2f}",
    marks: Iterable[tuple[int, int]] = (),
) -> Heatmap:
    """A heat map of a grid of numbers.

    Args:
        values: [rows, columns], anything numpy takes; NaN is an empty cell.
        x_labels: one per column; numbers from 0 when left out.
        y_labels: one per row.
        title: above the grid.
        x_title: what the columns are.
        y_title: what the rows are.
        scale_title: what the numbers are.
        scale: ``"sequential"`` (viridis), ``"diverging"`` (blue to red about `center`), or by the values' signs.
        low: number at the scale's lower end; the smallest value when left out.
        high: number at its upper end.
        center: middle of a diverging scale.
        number: how numbers are written, for `str.format`.
        marks: cells to point out, as (row, column).

    Raises:
        ValueError: not a grid, or labels that do not fit it.
    """
    grid = to_grid(values, "a heat map")
    flat = [v for row in grid for v in row]
    return Heatmap(
        values=tuple(tuple(row) for row in grid),
        x_labels=to_labels(x_labels, len(grid[0]), "x_labels"),
        y_labels=to_labels(y_labels, len(grid), "y_labels"),
        title=title,
        x_title=x_title,
        y_title=y_title,
        scale_title=scale_title,
        scale=Scale.fit(flat, scale, low, high, center),
        number=number,
        marks=frozenset((int(i), int(j)) for i, j in marks),
    )


def head_grid(scores: Any, title: str = "", *, scale_title: str = "score", number: str = "{:.2f}") -> Heatmap:
    """A score for every attention head; the best one is marked.

    Args:
        scores: [layers, heads].
        title: above the grid.
        scale_title: what the scores are.
        number: how they are written.
    """
    grid = to_grid(scores, "a grid of heads")
    cells = [(v, i, j) for i, row in enumerate(grid) for j, v in enumerate(row) if math.isfinite(v)]
    return heatmap(
        grid,
        x_labels=[f"head {h}" for h in range(len(grid[0]))],
        y_labels=[f"layer {i}" for i in range(len(grid))],
        title=title,
        scale_title=scale_title,
        number=number,
        low=min(0.0, min((c[0] for c in cells), default=0.0)),
        marks=[max(cells)[1:]] if cells else (),
    )


def attention(pattern: Any, tokens: Sequence[str], title: str = "", *, causal: bool = True) -> Heatmap:
    """Where one head looks: a row per query token, a column per key token.

    Args:
        pattern: [query, key], rows that sum to 1.
        tokens: one per position.
        title: above the grid.
        causal: leave out the keys after each query, which are zero by construction.
    """
    grid = to_grid(pattern, "an attention pattern")
    if causal:
        grid = [[v if j <= i else math.nan for j, v in enumerate(row)] for i, row in enumerate(grid)]
    return heatmap(
        grid, tokens, tokens, title, x_title="attends to", y_title="query", scale_title="attention", low=0.0, high=1.0
    )
