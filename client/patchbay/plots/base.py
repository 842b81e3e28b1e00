"""What every plot can do: print itself, become text, a matplotlib figure, PNG bytes, or a piece of HTML."""

from __future__ import annotations

import abc
import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from patchbay.plots.extras import require
from patchbay.plots.terminal import Canvas, canvas_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text


class Plot(abc.ABC):
    """A picture of numbers that are already here. Made by the functions of `patchbay.plots`."""

    title: str

    @abc.abstractmethod
    def lines(self, canvas: Canvas) -> Iterable[Text]:
        """The plot as lines for a terminal like `canvas`."""

    @abc.abstractmethod
    def figure(self, *, dark: bool = False) -> Figure:
        """The plot as a matplotlib figure of its own (pyplot's state is not touched)."""

    @property
    @abc.abstractmethod
    def alt(self) -> str:
        """The plot in one sentence, for a reader who cannot see it."""

    @abc.abstractmethod
    def html(self) -> str:
        """The plot as an HTML fragment that needs nothing from outside; every label in it is escaped."""

    def print(self, file: IO[str] | None = None) -> None:
        """Print to `file` (standard output): in colour on a terminal without ``NO_COLOR``, in plain text elsewhere."""
        console = require("rich.console", "Printing a plot").Console(file=file, highlight=False)
        canvas = canvas_of(console)
        for text in self.lines(canvas):
            if not canvas.colour:
                text.rstrip()
            console.print(text, end="\n", soft_wrap=True, markup=False)

    def text(self, *, color: bool = False, width: int = 100) -> str:
        """The plot as text `width` columns wide; with `color`, in 24-bit ANSI colours always."""
        out = io.StringIO()
        console = require("rich.console", "Printing a plot").Console(
            file=out,
            width=width,
            force_terminal=color,
            color_system="truecolor" if color else None,
            no_color=not color,
            highlight=False,
            legacy_windows=False,
        )
        for text in self.lines(Canvas(width=width, colour=color)):
            if not color:
                text.rstrip()
            console.print(text, end="\n", soft_wrap=True, markup=False)
        return out.getvalue()

    def png(self, path: str | Path | None = None, *, dpi: int = 144, dark: bool = False) -> bytes:
        """The figure as PNG bytes; also written to `path` when that is given."""
        from patchbay.plots.figures import to_png

        data = to_png(self.figure(dark=dark), dpi)
        if path is not None:
            Path(path).write_bytes(data)
        return data

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()


def picture(plot: Plot, caption: str = "") -> str:
    """An HTML ``figure`` with the plot as inline PNG, one for light and one for dark pages."""
    images = [plot.png(dark=dark) for dark in (False, True)]
    light, dark = (base64.b64encode(image).decode("ascii") for image in images)
    # The width from the PNG's header; at 1.2 image pixels to a CSS pixel the figure's words are as large as the page's.
    width = round(int.from_bytes(images[0][16:20], "big") / 1.2)
    words = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{html.escape(plot.alt, quote=True)}" width="{width}" src="data:image/png;base64,{light}">'
        f"</picture>{words}</figure>"
    )


def to_grid(values: Any, name: str) -> list[list[float]]:
    """`values` (anything numpy takes, two axes) as rows of Python floats.

    Raises:
        ValueError: not two axes, or empty.
    """
    import numpy as np

    array = np.asarray(values)
    if array.dtype.kind not in "bifu":
        array = array.astype(np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} takes a grid of two axes, neither empty; this has shape {array.shape}")
    return [[float(v) for v in row] for row in array]


def to_labels(labels: Sequence[object] | None, count: int, axis: str) -> tuple[str, ...]:
    """`labels` as strings, or the numbers from 0 when there are none.

    Raises:
        ValueError: not one for each of `count`.
    """
    if labels is None:
        return tuple(str(i) for i in range(count))
    if len(labels) != count:
        raise ValueError(f"{axis} has {len(labels)} labels for {count} cells")
    return tuple(str(label) for label in labels)
