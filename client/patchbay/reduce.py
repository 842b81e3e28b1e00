"""Reductions for `Model.map`: what to make of a value over all rows of a data set, on the server.

    def look(run):
        h = run.blocks[3].resid_post
        return {"mean": pb.reduce.mean(h), "top": pb.reduce.topk(run.blocks[3].mlp.post, 10)}

    found = model.map(texts, look)

Values have their rows first. Where a sequence axis follows, the samples are the tokens of all rows, padding left out;
else the rows. What comes back has one result for each element of the axes behind: a `[rows, seq, d]` value has a mean
`[d]`. ``over="rows"`` or ``over="tokens"`` says it where the shapes do not tell; ``over="steps"`` takes the steps that
rows of a generating run came to, of a value `[rows, steps, ...]`. ``mask`` (bool, [rows] or [rows, seq]) leaves samples
out; ``by`` (integers, likewise) with ``groups=n`` reduces each group by itself, along a first axis ``[groups, ...]``;
samples of other numbers belong to no group.
"""

# The names are those of numpy and of patchbay.ops, builtins or not.
# ruff: noqa: A001

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.datasets import reducers, selection
from patchbay.datasets.reducers import Reduction

__all__ = [
    "count",
    "covariance",
    "histogram",
    "max",
    "mean",
    "min",
    "principal_components",
    "reservoir",
    "sum",
    "topk",
    "var",
]


def sum(
    value: Any, *, over: str | None = None, mask: Any = None, by: Any = None, groups: int | None = None
) -> Reduction:
    """The total, float64 [*rest]."""
    return reducers.Sum(value, over, mask, by, groups)


def mean(
    value: Any, *, over: str | None = None, mask: Any = None, by: Any = None, groups: int | None = None
) -> Reduction:
    """The arithmetic mean, float64 [*rest]; NaN for a group without samples."""
    return reducers.Mean(value, over, mask, by, groups)


def count(
    value: Any, *, over: str | None = None, mask: Any = None, by: Any = None, groups: int | None = None
) -> Reduction:
    """How many samples are True (or not zero), int64 [*rest]; ``count(run.mask)`` is the number of tokens."""
    return reducers.Count(value, over, mask, by, groups)


def max(
    value: Any, *, over: str | None = None, mask: Any = None, by: Any = None, groups: int | None = None
) -> Reduction:
    """The largest sample, float64 [*rest]; NaN if any is NaN."""
    return reducers.Extreme(True, value, over, mask, by, groups)


def min(
    value: Any, *, over: str | None = None, mask: Any = None, by: Any = None, groups: int | None = None
) -> Reduction:
    """The smallest sample, float64 [*rest]; NaN if any is NaN."""
    return reducers.Extreme(False, value, over, mask, by, groups)


def var(
    value: Any,
    *,
    correction: float = 0.0,
    over: str | None = None,
    mask: Any = None,
    by: Any = None,
    groups: int | None = None,
) -> Reduction:
    """The variance, float64 [*rest]; `correction` is taken off the number of samples it is divided by, as in numpy."""
    return reducers.Variance(value, over, mask, by, groups, correction=correction)


def covariance(
    value: Any,
    *,
    correction: float = 1.0,
    over: str | None = None,
    mask: Any = None,
    by: Any = None,
    groups: int | None = None,
) -> Reduction:
    """Mean and covariance of vectors `[rows, (seq,) d]`, as a `patchbay.datasets.results.Covariance`.

    Args:
        correction: taken off the number of samples it is divided by; 1, as in numpy.cov and torch.cov.
    """
    return reducers.Covariance(value, over, mask, by, groups, correction=correction)


def principal_components(
    value: Any, k: int, *, correction: float = 1.0, over: str | None = None, mask: Any = None
) -> Reduction:
    """The k directions in which vectors `[rows, (seq,) d]` vary most, as a `patchbay.datasets.results` tuple.

    The covariance stays on the server; k directions come back.

    Args:
        k: how many.
        correction: as for `covariance`.
    """
    return reducers.PrincipalComponents(value, k, over, mask, correction=correction)


def histogram(
    value: Any,
    bins: int | Sequence[float],
    range: tuple[float, float] | None = None,
    *,
    pooled: bool = False,
    over: str | None = None,
    mask: Any = None,
) -> Reduction:
    """How many samples lie where, as a `patchbay.datasets.results.Histogram`.

    Args:
        bins: how many intervals of equal width between the ends of `range`, or their edges, ascending.
        range: lowest and highest edge, where `bins` is a number.
        pooled: one histogram for all elements together instead of one for each.
    """
    return reducers.Histogram(value, bins, range, pooled, over, mask)


def topk(
    value: Any,
    k: int,
    *,
    largest: bool = True,
    keep: Mapping[str, Any] | None = None,
    context: int | tuple[int, int] | None = None,
    over: str | None = None,
    mask: Any = None,
) -> Reduction:
    """The k largest samples of each element and where they stand, as a `patchbay.datasets.results.TopK`.

    Equal samples are taken in the order of the data set. NaN and -inf are never taken.

    Args:
        k: how many.
        largest: False for the smallest.
        keep: further values, `[rows, (seq,) ...]` as the first, to be kept of those samples, by name.
        context: how many tokens before and after each token to show with its values; two numbers where they differ.
    """
    around = (context, context) if isinstance(context, int) else context
    return selection.TopK(value, k, largest=largest, keep=keep, context=around, over=over, mask=mask)


def reservoir(value: Any, k: int, seed: int = 0, *, over: str | None = None, mask: Any = None) -> Reduction:
    """k samples drawn without replacement, each as likely as any other, as a `patchbay.datasets.results.Reservoir`.

    Which ones are drawn depends on the seed and on where the samples stand in the data set, on nothing else.
    """
    return selection.Reservoir(value, k, seed, over, mask)
