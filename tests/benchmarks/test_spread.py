"""The statistics behind every figure."""

from __future__ import annotations

import pytest

from benchmarks.figure import Trials
from benchmarks.samples import Sample
from benchmarks.spread import difference, percentile, ratio, spread


def test_quartiles() -> None:
    """Median and quartiles are those of the sample; the order of the values does not matter."""
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.median, found.low, found.high, found.n) == (3.0, 2.0, 4.0, 5)


def test_one_sample() -> None:
    """One sample is its own median and quartiles; none is an error."""
    found = spread([7.0])
    assert (found.median, found.low, found.high, found.n) == (7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_a_ratio_pairs_the_rounds() -> None:
    """The ratio is of the medians; its quartiles are of the ratios round by round, so that a slow round counts once."""
    over, under = [2.0, 20.0, 2.0], [1.0, 10.0, 1.0]
    found = ratio(over, under)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert difference([3.0, 5.0, 4.0], [1.0, 3.0, 2.0]).median == 2.0


def test_series_of_different_length_are_refused() -> None:
    """A contender that was left out in some round cannot be paired with another."""
    with pytest.raises(ValueError, match="2 and 1 rounds"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="1 and 2 rounds"):
        difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5.0), (0.99, 10.0), (0.9, 9.0), (0.0, 1.0), (1.0, 10.0)])
def test_percentiles_are_values_of_the_sample(share: float, expected: float) -> None:
    """Nearest rank: a percentile is a value that was measured."""
    assert percentile([float(v) for v in range(10, 0, -1)], share) == expected


def trials(**series: list[float]) -> Trials:
    """Trials of contenders with these wall times; CPU time is half, and each says ten times its time as ``own``."""
    samples = [
        Sample(name, i, value, value / 2, {"own": 10 * value})
        for name, s in series.items()
        for i, value in enumerate(s)
    ]
    return Trials(samples)


def test_findings_of_trials() -> None:
    """Faster, share, excess and value are made from the contenders' series."""
    t = trials(ours=[1.0, 1.0, 1.0], other=[3.0, 3.0, 3.0])
    (faster,) = t.faster("ours", "other", "x", 2.5)
    assert faster.reached.median == 3.0
    assert faster.met is True
    (share,) = t.share(("ours", "own"), ("other", "own"), "x", 0.1, at_least=False)
    assert share.reached.median == pytest.approx(1 / 3)
    assert share.met is False
    assert share.missing == pytest.approx(10 / 3)
    (excess,) = t.excess_ms(("other", "cpu_s"), ("ours", "cpu_s"), "x", 2000)
    assert excess.reached.median == 1000.0
    assert excess.met is True
    (value,) = t.value("ours", "own", "x", "rows/s")
    assert (value.reached.median, value.met, value.missing) == (10.0, None, 1.0)


def test_missing_contenders_give_no_finding() -> None:
    """A peer that is not installed leaves its rows out, not the figure."""
    t = trials(ours=[1.0])
    assert t.faster("ours", "other", "x", 2.0) == []
    assert t.share(("other", "own"), ("ours", "own"), "x", 1.0, at_least=False) == []
    assert t.excess_ms(("ours", "own"), ("other", "own"), "x", 1.0) == []
    assert t.value("other", "own", "x", "ms") == []
