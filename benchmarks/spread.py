"""Medians and quartiles of a few samples, and ratios of two interleaved series."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles.

    Attributes:
        median: the figure.
        low, high: first and third quartile; the median itself where there is one sample.
        n: number of samples.
    """

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive method: the extremes are the sample's own).

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a spread needs at least one value")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The ratio of two series that were measured in turns: ratio of the medians, quartiles of the ratios per round.

    Raises:
        ValueError: the series differ in length, or are empty.
    """
    if len(over) != len(under):
        raise ValueError(f"the series have {len(over)} and {len(under)} rounds")
    pairs = spread([a / b for a, b in zip(over, under, strict=True)])
    return Spread(statistics.median(over) / statistics.median(under), pairs.low, pairs.high, pairs.n)


def difference(minuend: Sequence[float], subtrahend: Sequence[float]) -> Spread:
    """The difference of two series that were measured in turns; as `ratio`."""
    if len(minuend) != len(subtrahend):
        raise ValueError(f"the series have {len(minuend)} and {len(subtrahend)} rounds")
    pairs = spread([a - b for a, b in zip(minuend, subtrahend, strict=True)])
    return Spread(statistics.median(minuend) - statistics.median(subtrahend), pairs.low, pairs.high, pairs.n)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank).

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a percentile needs at least one value")
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]
