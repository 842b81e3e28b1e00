"""Grids drawn with matplotlib, in the same colours as in the terminal. No pyplot, so no state outside the figure."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchbay.plots.colour import ANCHORS, MISSING, Scale, readable_on
from patchbay.plots.extras import require
from patchbay.plots.terminal import write_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = {False: ("#1c1e21", "#ffffff"), True: ("#e6e8eb", "#17191c")}
#: More cells than this and their texts would not be legible.
_MAX_TEXTS = 600
_TITLE_CHARACTER_INCHES = 0.085


def _unit(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    return rgb[0] / 255, rgb[1] / 255, rgb[2] / 255


def draw_grid(
    values: Sequence[Sequence[float]],
    scale: Scale,
    *,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
    title: str,
    x_title: str,
    y_title: str,
    scale_title: str,
    texts: Sequence[Sequence[str]] | None,
    marks: frozenset[tuple[int, int]] = frozenset(),
    number: str = "{:.2f}",
    dark: bool = False,
) -> Figure:
    """A coloured grid with a text in each cell, labels on both axes and a colour bar. `marks` are outlined cells."""
    figure_class: Any = require("matplotlib.figure", "A figure").Figure
    colors: Any = require("matplotlib.colors", "A figure")
    patches: Any = require("matplotlib.patches", "A figure")
    ink, paper = _INK[dark]
    rows, columns = len(values), len(values[0])
    longest = max((len(t) for row in texts for t in row), default=4) if texts else 4
    cell_w = min(1.15, max(0.5, 0.085 * max(longest, min(12, max(len(x) for x in x_labels)))))
    cell_h = 0.42
    width = min(24.0, max(4.0, 1.5 + cell_w * columns + 0.9))
    height = min(30.0, max(2.2, 1.5 + cell_h * rows))
    figure: Figure = figure_class(figsize=(width, height), facecolor=paper, layout="constrained")
    ax: Any = figure.add_subplot(facecolor=paper)
    cmap = colors.LinearSegmentedColormap.from_list(scale.name, [_unit(a) for a in ANCHORS[scale.name]])
    cmap = cmap.with_extremes(bad=(*_unit(MISSING), 0.35))
    low, high = scale.low, scale.high
    image = ax.imshow(
        [list(row) for row in values], cmap=cmap, vmin=low, vmax=high if high > low else low + 1, aspect="auto"
    )
    # Labels come from strangers' tokenizers: a dollar sign is a dollar sign, not mathematics.
    plain: dict[str, Any] = {"parse_math": False}
    slanted = sum(len(x) for x in x_labels) > 9 * width
    turn = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    ax.set_xticks(range(columns), labels=[_shown(x) for x in x_labels], **plain, **turn)
    ax.set_yticks(range(rows), labels=[_shown(y) for y in y_labels], **plain)
    ax.tick_params(colors=ink, length=0, labelsize=8.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xticks([i - 0.5 for i in range(1, columns)], minor=True)
    ax.set_yticks([i - 0.5 for i in range(1, rows)], minor=True)
    ax.grid(which="minor", color=paper, linewidth=1.2)
    ax.tick_params(which="minor", length=0)
    if title:
        wrapped = textwrap.fill(_shown(title, 240), max(24, int((width - 1.2) / _TITLE_CHARACTER_INCHES)))
        ax.set_title(wrapped, color=ink, fontsize=11, loc="left", pad=10, **plain)
    if x_title:
        ax.set_xlabel(_shown(x_title, 80), color=ink, fontsize=9, **plain)
    if y_title:
        ax.set_ylabel(_shown(y_title, 80), color=ink, fontsize=9, **plain)
    if texts is not None and rows * columns <= _MAX_TEXTS:
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                color = ink if values[i][j] != values[i][j] else _unit(readable_on(scale.rgb(values[i][j])))
                ax.text(j, i, _shown(text, 14), ha="center", va="center", fontsize=7.5, color=color, **plain)
    for i, j in marks:
        ax.add_patch(patches.Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, edgecolor="#ff2d87", linewidth=2))
    bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, aspect=max(8, 3 * rows))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=ink, length=0, labelsize=8)
    if scale_title:
        bar.set_label(_shown(scale_title, 60), color=ink, fontsize=8.5, **plain)
    bar.ax.yaxis.set_major_formatter(lambda v, _: write_number(number, v))
    return figure


def _shown(label: str, most: int = 24) -> str:
    """`label` on one line and not too long; matplotlib draws control characters as boxes."""
    text = "".join({"\n": "⏎", "\t": "⇥"}.get(c, c if c.isprintable() else "·") for c in label)
    return text if len(text) <= most else text[: most - 1] + "…"


def to_png(figure: Figure, dpi: int) -> bytes:
    """PNG bytes of `figure`. A glyph that no installed font has is drawn as a box, without a warning."""
    agg: Any = require("matplotlib.backends.backend_agg", "A figure").FigureCanvasAgg
    agg(figure)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return out.getvalue()
