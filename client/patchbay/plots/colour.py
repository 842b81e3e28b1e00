"""From a number to a colour, alike in the terminal, in matplotlib and in HTML. Standard library only.

Two scales: ``sequential`` (viridis, which keeps its order in greyscale and for colour-blind readers) for amounts, and
``diverging`` (ColorBrewer's RdBu, blue below and red above the centre) for differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Rgb: TypeAlias = tuple[int, int, int]
ScaleName: TypeAlias = Literal["auto", "sequential", "diverging"]

_VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
_RDBU = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"

#: What a cell without a finite number (a masked one, say) looks like.
MISSING: Rgb = (128, 128, 128)
#: From nothing to everything, for terminals without colour.
SHADES = " ░▒▓█"
SHADES_ASCII = " .+*#"


def parse_hex(text: str) -> Rgb:
    """``"26828e"`` as three numbers from 0 to 255."""
    return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)


def to_hex(rgb: Rgb) -> str:
    """``"#26828e"``."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


ANCHORS: dict[str, tuple[Rgb, ...]] = {
    "sequential": tuple(parse_hex(h) for h in _VIRIDIS.split()),
    "diverging": tuple(parse_hex(h) for h in _RDBU.split()),
}


def readable_on(background: Rgb) -> Rgb:
    """Black or white, whichever contrasts more with `background` (WCAG relative luminance)."""

    def linear(channel: int) -> float:
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    r, g, b = (linear(c) for c in background)
    luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps numbers from `low` to `high` onto a row of anchor colours.

    Attributes:
        name: ``"sequential"`` or ``"diverging"``.
        low, high: the numbers at both ends; numbers outside are drawn as the nearer end.
    """

    name: str
    low: float
    high: float

    @classmethod
    def fit(
        cls,
        values: Iterable[float],
        name: ScaleName = "auto",
        low: float | None = None,
        high: float | None = None,
        center: float = 0.0,
    ) -> Scale:
        """The scale for `values`; numbers that are not finite are left out.

        ``auto`` takes the diverging scale when the values lie clearly on both sides of `center`. A diverging scale is
        symmetric about `center`, so that equal colours mean equal distances.
        """
        finite = [v for v in values if math.isfinite(v)]
        lowest = min(finite, default=0.0) if low is None else low
        highest = max(finite, default=1.0) if high is None else high
        if name == "auto":
            reach = max(abs(lowest - center), abs(highest - center))
            both = min(center - lowest, highest - center) > 0.1 * reach
            name = "diverging" if both else "sequential"
        if name == "diverging" and low is None and high is None:
            reach = max(abs(lowest - center), abs(highest - center))
            lowest, highest = center - reach, center + reach
        return cls(name, float(lowest), float(highest))

    def position(self, value: float) -> float:
        """Where `value` lies between `low` (0.0) and `high` (1.0), clipped; NaN stays NaN."""
        if math.isnan(value):
            return math.nan
        span = self.high - self.low
        if span <= 0 or not math.isfinite(span):
            return 0.5 if self.name == "diverging" else float(value >= self.high and value != 0)
        return min(1.0, max(0.0, (value - self.low) / span))

    def rgb(self, value: float) -> Rgb:
        """The colour of `value`; `MISSING` for NaN."""
        t = self.position(value)
        if math.isnan(t):
            return MISSING
        anchors = ANCHORS[self.name]
        x = t * (len(anchors) - 1)
        i = min(int(x), len(anchors) - 2)
        a, b, f = anchors[i], anchors[i + 1], x - i
        return (
            round(a[0] + (b[0] - a[0]) * f),
            round(a[1] + (b[1] - a[1]) * f),
            round(a[2] + (b[2] - a[2]) * f),
        )

    def shade(self, value: float, shades: str = SHADES) -> str:
        """One character, darker for more; a diverging scale is darker for farther from its centre."""
        t = self.position(value)
        if math.isnan(t):
            return " "
        if self.name == "diverging":
            t = abs(t - 0.5) * 2
        return shades[min(int(t * len(shades)), len(shades) - 1)]
