"""Reductions over the rows of a data set, as parts of graphs.

A reduction folds one batch into a few small tensors (its parts), merges the parts of two batches, and finishes them
into what is sent back. Merging is associative, so batches may be folded in any number of lanes. All parts are float64:
sums do not lose small terms, and every integer that occurs (counts, row numbers, 53-bit keys) is exact.

Samples are what is folded: the tokens of all rows (padding left out) where a value has a sequence axis after its rows,
the steps that rows came to where it has an axis of steps there, else the rows. A value `[rows, seq, *rest]` or
`[rows, *rest]` is reduced to something for each element of `rest`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from patchbay import ops
from patchbay.errors import ShapeError, TraceError
from patchbay.tracing.proxy import Proxy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.datasets.axes import Along
    from patchbay.tracing.trace import BaseTrace

#: The state of a reduction: float64 tensors by name.
Parts: TypeAlias = "dict[str, Proxy]"
OVER = ("rows", "tokens", "steps")


class Samples:
    """What is folded in one batch.

    Attributes:
        trace: the batch's trace.
        rows: the rows' numbers in the data set, int64 [rows], ascending.
        mask: True at tokens, bool [rows, seq]; None for models that take none.
        ids: token ids, int64 [rows, seq], 0 at padding; None likewise.
        stride: more than the largest position; a token's number is ``row * stride + position``.
    """

    def __init__(
        self, trace: BaseTrace, rows: Proxy, lengths: Proxy | None, mask: Proxy | None, ids: Any, stride: int
    ) -> None:
        self.trace = trace
        self.rows = rows
        self.mask = mask
        self.stride = stride
        self._lengths = lengths
        self._ids = ids

    @property
    def seq(self) -> int:
        return 1 if self.mask is None else self.mask.shape[1]

    def inside(self, chosen: Proxy, place: Proxy, column: Proxy) -> Proxy:
        """Whether neighbours of samples are tokens of their rows.

        Args:
            chosen: the samples, [k, elements].
            place: where in their rows the neighbours would stand, [k, elements, window].
            column: along which column, likewise.
        """
        del chosen
        found: Proxy = (place >= 0) & (column < self.seq)
        return found

    @cached_property
    def ids(self) -> Proxy:
        return self._ids()  # type: ignore[no-any-return]

    @cached_property
    def positions(self) -> Proxy:
        """Where each token stands in its row, negative at padding, int64 [rows, seq]."""
        assert self._lengths is not None
        places: Proxy = self.trace.constant(_arange(self.seq)) - (self.seq - self._lengths)[:, None]
        return places

    def numbers(self, per_token: bool) -> Proxy:
        """The samples' numbers, int64 [n], ascending apart from padding."""
        numbers: Proxy = self.rows
        if per_token:
            numbers = (self.rows[:, None] * self.stride + self.positions).reshape(-1)
        return numbers

    def flat(self, value: Proxy, per_token: bool) -> Proxy:
        """`value` as [n, elements]."""
        lead = value.shape[: 1 + per_token]
        flat: Proxy = value.reshape(math.prod(lead), math.prod(value.shape[1 + per_token :]))
        return flat

    def counted(self, extra: Proxy | None, per_token: bool) -> Proxy | None:
        """Which samples count, bool [n]; None when all do."""
        if extra is not None:
            extra = extra.astype("bool")
            wanted = (self.rows.shape[0], self.seq) if per_token else self.rows.shape
            if extra.shape not in (wanted, self.rows.shape):
                raise ShapeError(
                    f"a mask for these samples is {list(wanted)} or {list(self.rows.shape)}, not {list(extra.shape)}"
                )
        if not per_token:
            return extra
        if extra is not None and extra.ndim == 1:
            extra = extra[:, None]
        assert self.mask is not None
        counted: Proxy = (self.mask if extra is None else self.mask & extra).reshape(-1)
        return counted


class StepSamples(Samples):
    """The steps of a generating run: `mask` is True at those that a row came to, `ids` the tokens they ended in."""

    @cached_property
    def positions(self) -> Proxy:
        """The number of each step, int64 [rows, steps]."""
        every = self.trace.constant(_arange(self.seq)[None, :])
        places: Proxy = ops.broadcast_to(every, (self.rows.shape[0], self.seq))
        return places

    def inside(self, chosen: Proxy, place: Proxy, column: Proxy) -> Proxy:
        del column
        assert self._lengths is not None
        made = ops.broadcast_to(self._lengths[:, None], (self.rows.shape[0], self.seq)).reshape(-1)
        found: Proxy = (place >= 0) & (place < ops.take(made, chosen)[:, :, None])
        return found


class Reduction(abc.ABC):
    """A value and how it is folded; what the functions of `patchbay.reduce` return.

    Attributes:
        value: the value, rows first.
        over: ``"rows"``, ``"tokens"``, ``"steps"``, or None until it is known.
        along: whose tokens, or which run's steps; None for rows.
        mask: which samples count, beside padding.
        rest: extents of the value behind its samples' axes; known once folded.
    """

    name: ClassVar[str]

    def __init__(self, value: Any, over: str | None = None, mask: Any = None) -> None:
        if not isinstance(value, Proxy):
            raise TraceError(f"pb.reduce.{self.name} takes a value of the run, not {type(value).__name__}")
        if over is not None and over not in OVER:
            raise TraceError(f"pb.reduce.{self.name}: over is 'rows', 'tokens' or 'steps', not {over!r}")
        self.value: Any = value
        self.over = over
        self.along: Along | None = None
        self.mask: Any = None if mask is None else _proxy(value, mask)
        self.rest: tuple[int, ...] = ()
        self.stride = 1

    @property
    def per_token(self) -> bool:
        """Whether a row has several samples: tokens, or steps."""
        return self.over in ("tokens", "steps")

    def fold(self, samples: Samples) -> Parts:
        """One batch as parts."""
        self.rest = self.value.shape[1 + self.per_token :]
        self.stride = samples.stride if self.per_token else 1
        return self._fold(samples, samples.flat(self.value, self.per_token), samples.counted(self.mask, self.per_token))

    def release(self) -> None:
        """Forgets the values of the trace: what is left merges, finishes and makes results."""
        self.value = self.mask = None

    @abc.abstractmethod
    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        """Parts of the batch whose samples are the rows of `x` [n, elements]."""

    @abc.abstractmethod
    def merge(self, a: Parts, b: Parts) -> Parts:
        """Parts of two batches as those of both."""

    @abc.abstractmethod
    def finish(self, parts: Parts) -> Parts:
        """What is sent back."""

    @abc.abstractmethod
    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        """What the user gets, from what was sent back."""


class Grouped(Reduction):
    """A reduction that may be done for each group of samples by itself."""

    def __init__(
        self, value: Any, over: str | None = None, mask: Any = None, by: Any = None, groups: int | None = None
    ) -> None:
        super().__init__(value, over, mask)
        if (by is None) != (groups is None):
            raise TraceError(
                f"pb.reduce.{self.name}: by= (the group of each sample) and groups= (how many) go together"
            )
        if groups is not None and groups < 1:
            raise TraceError(f"pb.reduce.{self.name}: groups is at least 1, not {groups}")
        self.by: Any = None if by is None else _proxy(value, by)
        self.groups = groups

    def release(self) -> None:
        super().release()
        self.by = None

    def members(self, samples: Samples, x: Proxy, counted: Proxy | None) -> list[Proxy | None]:
        """For each group, which samples are in it, bool [n]; None when all are."""
        if self.by is None or self.groups is None:
            return [counted]
        label = self.by
        if self.per_token and label.ndim == 1:
            label = ops.broadcast_to(label[:, None], (label.shape[0], samples.seq))
        label = label.reshape(-1)
        if label.shape[0] != x.shape[0]:
            raise ShapeError(f"pb.reduce.{self.name}: by= has {label.shape[0]} entries for {x.shape[0]} samples")
        each = [label == g for g in range(self.groups)]
        return [m if counted is None else m & counted for m in each]

    def shaped(self, array: NDArray[Any], *extra: int) -> Any:
        """[groups, elements] as [*rest], or [groups, *rest]."""
        lead = () if self.groups is None else (self.groups,)
        return array.reshape((*lead, *(extra or self.rest)))[()]


class Sum(Grouped):
    """Totals, and how many samples they are of."""

    name = "sum"

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        x = x.astype("float64")
        totals, counts = [], []
        for member in self.members(samples, x, counted):
            totals.append(_zeroed(x, member).sum(axis=0))
            counts.append(_size(x, member))
        return {"n": ops.stack(counts), "total": ops.stack(totals)}

    def merge(self, a: Parts, b: Parts) -> Parts:
        return {"n": a["n"] + b["n"], "total": a["total"] + b["total"]}

    def finish(self, parts: Parts) -> Parts:
        return {"total": parts["total"]}

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        return self.shaped(arrays["total"])


class Mean(Sum):
    """Totals divided by the number of samples; NaN for a group without any."""

    name = "mean"

    def finish(self, parts: Parts) -> Parts:
        return {"total": parts["total"] / parts["n"][:, None]}


class Count(Sum):
    """How many samples are True."""

    name = "count"

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        return super()._fold(samples, x.astype("bool"), counted)

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        return self.shaped(arrays["total"].astype("int64"))


class Extreme(Grouped):
    """The largest or smallest sample; NaN if any is NaN, or where there is none."""

    name = "max"

    def __init__(self, largest: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.largest = largest

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        x = x.astype("float64")
        worst = -math.inf if self.largest else math.inf
        best, counts = [], []
        for member in self.members(samples, x, counted):
            only = x if member is None else ops.where(member[:, None], x, worst)
            best.append(only.max(axis=0) if self.largest else only.min(axis=0))
            counts.append(_size(x, member))
        return {"n": ops.stack(counts), "best": ops.stack(best)}

    def merge(self, a: Parts, b: Parts) -> Parts:
        pick = ops.maximum if self.largest else ops.minimum
        return {"n": a["n"] + b["n"], "best": pick(a["best"], b["best"])}

    def finish(self, parts: Parts) -> Parts:
        return {"best": ops.where(parts["n"][:, None] > 0, parts["best"], math.nan)}

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        return self.shaped(arrays["best"])


class Variance(Grouped):
    """Squared deviations from the mean, folded by the update of Chan, Golub & LeVeque 1979 ("Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances"), which does not subtract large numbers from one another.
    """

    name = "var"

    def __init__(self, value: Any, *args: Any, correction: float = 0.0, **kwargs: Any) -> None:
        super().__init__(value, *args, **kwargs)
        self.correction = correction

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        x = x.astype("float64")
        means, squares, counts = [], [], []
        for member in self.members(samples, x, counted):
            n = _size(x, member)
            mean = _zeroed(x, member).sum(axis=0) / ops.maximum(n, 1.0)
            means.append(mean)
            squares.append(self._square(_zeroed(x - mean, member)))
            counts.append(n)
        return {"n": ops.stack(counts), "mean": ops.stack(means), "square": ops.stack(squares)}

    def _square(self, centred: Proxy) -> Proxy:
        total: Proxy = (centred * centred).sum(axis=0)
        return total

    def merge(self, a: Parts, b: Parts) -> Parts:
        n = a["n"] + b["n"]
        share = b["n"] / ops.maximum(n, 1.0)
        apart = b["mean"] - a["mean"]
        mean = a["mean"] + apart * share[:, None]
        return {"n": n, "mean": mean, "square": a["square"] + b["square"] + self._between(apart, a["n"] * share)}

    def _between(self, apart: Proxy, weight: Proxy) -> Proxy:
        return apart * apart * weight[:, None]

    def finish(self, parts: Parts) -> Parts:
        return {"square": parts["square"] / (parts["n"] - self.correction)[:, None]}

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        return self.shaped(arrays["square"])


class Covariance(Variance):
    """Products of deviations of every pair of elements; see `Variance`."""

    name = "covariance"

    def fold(self, samples: Samples) -> Parts:
        rest = self.value.shape[1 + self.per_token :]
        if len(rest) != 1:
            raise ShapeError(
                f"pb.reduce.covariance takes one vector per sample, not {list(rest)}: reshape it to {[math.prod(rest)]}"
            )
        return super().fold(samples)

    def _square(self, centred: Proxy) -> Proxy:
        return centred.T @ centred

    def _between(self, apart: Proxy, weight: Proxy) -> Proxy:
        return apart[:, :, None] * apart[:, None, :] * weight[:, None, None]

    def finish(self, parts: Parts) -> Parts:
        scaled = parts["square"] / (parts["n"] - self.correction)[:, None, None]
        return {"square": scaled, "mean": parts["mean"], "n": parts["n"]}

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        from patchbay.datasets.results import Covariance as Result

        (d,) = self.rest
        counts = arrays["n"].astype("int64")
        count = int(counts[0]) if self.groups is None else counts
        return Result(self.shaped(arrays["mean"]), self.shaped(arrays["square"], d, d), count)


class PrincipalComponents(Covariance):
    """The directions in which vectors vary most: eigenvectors of their covariance, taken on the server."""

    name = "principal_components"

    def __init__(self, value: Any, k: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(value, *args, **kwargs)
        width = self.value.shape[-1]
        if not 1 <= k <= width:
            raise TraceError(f"pb.reduce.principal_components: k is 1 to {width}, the width of the vectors, not {k}")
        self.k = k

    def finish(self, parts: Parts) -> Parts:
        covariance = parts["square"][0] / (parts["n"][0] - self.correction)
        found = ops.eigh(covariance)
        directions = ops.flip(found.eigenvectors.T, axis=0)[: self.k]  # [k, d], the largest variance first
        # Either sign is an eigenvector: the one whose largest entry is positive.
        largest = directions.abs().argmax(axis=1, keepdims=True)
        directions = directions * ops.take_along_axis(directions, largest, axis=1).sign()
        return {
            "mean": parts["mean"],
            "n": parts["n"],
            "directions": directions,
            "variances": ops.flip(found.eigenvalues, axis=0)[: self.k],
            "total": covariance.trace(),
        }

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        from patchbay.datasets.results import PrincipalComponents as Result

        variances = arrays["variances"]
        count = int(arrays["n"][0])
        return Result(arrays["mean"][0], arrays["directions"], variances, variances / arrays["total"], count)


class Histogram(Reduction):
    """How many samples fall between neighbouring edges; the last interval holds its upper edge, as in numpy."""

    name = "histogram"

    def __init__(
        self,
        value: Any,
        bins: int | Sequence[float],
        range: tuple[float, float] | None,
        pooled: bool,
        over: str | None = None,
        mask: Any = None,
    ) -> None:
        import numpy as np

        super().__init__(value, over, mask)
        if isinstance(bins, int):
            if range is None or bins < 1 or not -math.inf < range[0] < range[1] < math.inf:
                raise TraceError("pb.reduce.histogram: give bins=N and range=(low, high), or the edges as bins=[...]")
            self.edges: NDArray[Any] = np.linspace(range[0], range[1], bins + 1)
        else:
            self.edges = np.asarray(bins, dtype=np.float64)
            if self.edges.ndim != 1 or len(self.edges) < 2 or not (np.diff(self.edges) > 0).all():
                raise TraceError("pb.reduce.histogram: edges are at least two ascending numbers")
        self.pooled = pooled

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        bins = len(self.edges) - 1
        x = x.astype("float64")
        edges = samples.trace.constant(self.edges)
        place = ops.searchsorted(edges, x, side="right")  # 0 below, bins + 1 at or above the last edge
        place = ops.where(x == float(self.edges[-1]), bins, place)
        place = ops.where(ops.isnan(x), bins + 2, place)
        if counted is not None:
            place = ops.where(counted[:, None], place, bins + 3)
        place = place.T  # [elements, n]
        zeros = samples.trace.constant(ops.zeros((place.shape[0], bins + 4), dtype="float64"))
        ones = samples.trace.constant(ops.ones(place.shape, dtype="float64"))
        counts: Proxy = ops.scatter_add(zeros, place, ones, axis=1)[:, : bins + 3]
        return {"counts": counts.sum(axis=0, keepdims=True) if self.pooled else counts}

    def merge(self, a: Parts, b: Parts) -> Parts:
        return {"counts": a["counts"] + b["counts"]}

    def finish(self, parts: Parts) -> Parts:
        return dict(parts)

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        from patchbay.datasets.results import Histogram as Result

        rest = () if self.pooled else self.rest
        counts = arrays["counts"].astype("int64").reshape((*rest, -1))
        return Result(counts[..., 1:-2], self.edges, counts[..., 0][()], counts[..., -2][()], counts[..., -1][()])


# --- layout ---------------------------------------------------------------------------------------------------------

#: What stands before the parts of all reductions of a map, so that no two maps, lanes or batches have equal states.
HEADER = 3


def pack(header: Proxy, parts: Sequence[Parts]) -> Proxy:
    """The state of several reductions as one vector, float64."""
    flat = [p[name].astype("float64").reshape(-1) for p in parts for name in sorted(p)]
    vector: Proxy = ops.concat([header, *flat])
    return vector


def layout_of(parts: Sequence[Parts]) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]:
    """Names and shapes of the parts, in the order in which `pack` puts them."""
    return tuple(tuple((name, p[name].shape) for name in sorted(p)) for p in parts)


def unpack(vector: Proxy, layout: Sequence[Sequence[tuple[str, tuple[int, ...]]]]) -> list[Parts]:
    """The parts in a vector that `pack` made."""
    at, found = HEADER, []
    for names in layout:
        parts: Parts = {}
        for name, shape in names:
            size = math.prod(shape)
            parts[name] = vector[at : at + size].reshape(shape)
            at += size
        found.append(parts)
    return found


# --- shared -----------------------------------------------------------------------------------------------------------


def _proxy(value: Proxy, other: Any) -> Proxy:
    return other if isinstance(other, Proxy) else value._trace.constant(other)


def _zeroed(x: Proxy, member: Proxy | None) -> Proxy:
    return x if member is None else ops.where(member[:, None], x, 0.0)


def _size(x: Proxy, member: Proxy | None) -> Proxy:
    """How many samples, a float64 scalar."""
    if member is None:
        import numpy as np

        return x._trace.constant(np.float64(x.shape[0]))
    size: Proxy = member.astype("float64").sum()
    return size


def _arange(n: int) -> NDArray[Any]:
    import numpy as np

    return np.arange(n)
