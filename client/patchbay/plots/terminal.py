"""Where a plot is printed, and the text that goes there: cell widths, labels, colour or its absence.

A `Canvas` says what the place can do. Colour is used only where it will be seen: a terminal, without ``NO_COLOR``.
Everywhere else the same table is drawn with shades and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchbay.plots.colour import MISSING, SHADES, SHADES_ASCII, Rgb, Scale, readable_on, to_hex
from patchbay.plots.extras import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_NAMED = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x1b": "␛"}
_NAMED_ASCII = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"}


@dataclass(frozen=True, slots=True)
class Canvas:
    """What the place where text goes can show.

    Attributes:
        width: columns.
        colour: whether 24-bit colours may be used (rich takes them down to what the terminal knows).
        ascii: whether only ASCII can be encoded there.
    """

    width: int = 100
    colour: bool = False
    ascii: bool = False

    @property
    def shades(self) -> str:
        return SHADES_ASCII if self.ascii else SHADES

    def clean(self, label: str) -> str:
        """`label` on one line, with nothing in it that a terminal would obey (escape codes, text direction)."""
        named = _NAMED_ASCII if self.ascii else _NAMED
        out = []
        for ch in label:
            if ch in named:
                out.append(named[ch])
            elif not ch.isprintable() or (self.ascii and not ch.isascii()):
                code = ord(ch)
                out.append(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
            else:
                out.append(ch)
        return "".join(out)

    def fit(self, label: str, width: int, align: str = "left") -> str:
        """`label`, cleaned, cut or padded to exactly `width` columns (a wide character counts as two)."""
        cells = require("rich.cells", "Printing a plot")
        text: str = self.clean(label)
        if cells.cell_len(text) > width:
            mark = "~" if self.ascii else "…"
            while text and cells.cell_len(text) > width - 1:
                text = text[:-1]
            text += mark if width > 0 else ""
        pad = max(0, width - int(cells.cell_len(text)))
        if align == "right":
            return " " * pad + text
        if align == "center":
            return " " * (pad // 2) + text + " " * (pad - pad // 2)
        return text + " " * pad

    def measure(self, labels: Sequence[str], most: int) -> int:
        """The columns that the widest of `labels` needs, at most `most`."""
        cells = require("rich.cells", "Printing a plot")
        return min(most, max((cells.cell_len(self.clean(label)) for label in labels), default=0))


def canvas_of(console: Console) -> Canvas:
    """What `console` can show."""
    colour = console.color_system is not None and not console.no_color
    return Canvas(width=console.width, colour=colour, ascii=not console.encoding.lower().startswith("utf"))


def line(*parts: str | tuple[str, str]) -> Text:
    """One line; a part is a string, or a string and a rich style. Nothing in it is read as markup."""
    text_class: Any = require("rich.text", "Printing a plot").Text
    text: Text = text_class(no_wrap=True, overflow="ignore", end="")
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        else:
            text.append(part[0], style=part[1] or None)
    return text


def on(rgb: Rgb, *, bold: bool = False) -> str:
    """A rich style: readable text on that background."""
    return f"{'bold underline ' if bold else ''}{to_hex(readable_on(rgb))} on {to_hex(rgb)}"


def cell(canvas: Canvas, scale: Scale, value: float, text: str, width: int, *, mark: bool = False) -> tuple[str, str]:
    """One cell of a grid: `text` on the colour of `value`, or behind its shade where there is no colour."""
    if canvas.colour:
        return canvas.fit(text, width, "center"), on(scale.rgb(value), bold=mark)
    shade = scale.shade(value, canvas.shades)
    star = "*" if mark else ""
    return shade + canvas.fit(star + text, width - 2, "right") + " ", "bold" if mark else ""


def write_number(number: str, value: float) -> str:
    """`value` in the format `number`; a negative one that rounds to zero loses its sign."""
    text = number.format(value)
    rounds_to_zero = math.isfinite(value) and not any(digit in text for digit in "123456789")
    return text.replace("-", "") if rounds_to_zero else text


def legend(canvas: Canvas, scale: Scale, number: str, unit: str = "", missing: bool = False) -> Text:
    """The scale as a bar, from its lowest to its highest number (formatted by `number`)."""
    low, high = write_number(number, scale.low), write_number(number, scale.high)
    parts: list[str | tuple[str, str]] = [f"{low} "]
    if canvas.colour:
        steps = 24
        span = scale.high - scale.low
        parts += [(" ", f"on {to_hex(scale.rgb(scale.low + span * i / (steps - 1)))}") for i in range(steps)]
    else:
        shades = canvas.shades
        bar = (shades[:0:-1] + shades) if scale.name == "diverging" else shades
        parts.append("[" + "".join(ch * 3 for ch in bar) + "]")
    parts.append(f" {high}{f'  {canvas.clean(unit)}' if unit else ''}")
    if missing:
        parts += ["   ", ("   ", f"on {to_hex(MISSING)}") if canvas.colour else "(blank)", " no value"]
    return line(*parts)
