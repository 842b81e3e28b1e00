"""What a map gives back: arrays, the results of reductions, and rows of unequal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from patchbay.results import Results, RunUsage, describe

if TYPE_CHECKING:
    from numpy.typing import NDArray


class MapResults(Results):
    """What `Model.map` returns: the tree that the function made, with numbers for its values.

    Attributes:
        rows: rows of the data set.
        batches: requests that they took, repetitions not counted.
        retries: how often a request had to be sent again.
        sent_bytes, received_bytes: payload that crossed the connection, in this call.
        usage: what all batches cost together.
    """

    rows: int = 0
    batches: int = 0
    retries: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return MapResults, (self._values, self.nonfinite, self.usage), vars(self)

    def __repr__(self) -> str:
        return super().__repr__().replace("Results(", f"MapResults(of {self.rows:,} rows", 1)


class Covariance(NamedTuple):
    """Of `pb.reduce.covariance`, all float64.

    Attributes:
        mean: [d], or [groups, d].
        covariance: [d, d], or [groups, d, d].
        samples: how many; a number for each group where there are groups.
    """

    mean: NDArray[Any]
    covariance: NDArray[Any]
    samples: Any


class PrincipalComponents(NamedTuple):
    """Of `pb.reduce.principal_components`, all float64, the largest variance first.

    Attributes:
        mean: [d].
        components: [k, d], of length 1, orthogonal to one another; the largest entry of each is positive.
        variances: [k], of the samples along each.
        explained: [k], their shares of the whole variance.
        samples: how many.
    """

    mean: NDArray[Any]
    components: NDArray[Any]
    variances: NDArray[Any]
    explained: NDArray[Any]
    samples: int


class Histogram(NamedTuple):
    """Of `pb.reduce.histogram`.

    Attributes:
        counts: int64 [*rest, bins].
        edges: float64 [bins + 1].
        below, above: int64 [*rest], samples outside the edges.
        nan: int64 [*rest], samples that are no number.
    """

    counts: NDArray[Any]
    edges: NDArray[Any]
    below: Any
    above: Any
    nan: Any


class Context(NamedTuple):
    """What stands around each of the largest tokens.

    Attributes:
        ids: token ids, int64 [*rest, k, window]; -1 beyond the row.
        values: the same element's values there, float64 [*rest, k, window]; NaN beyond the row.
        center: where in the window the token itself stands.
    """

    ids: NDArray[Any]
    values: NDArray[Any]
    center: int


class TopK(NamedTuple):
    """Of `pb.reduce.topk`: for each element the k largest samples, in order; equal ones in the data set's.

    Where there were fewer than k samples, the rest have NaN and -1.

    Attributes:
        values: float64 [*rest, k].
        rows: int64 [*rest, k], numbers of rows in the data set.
        positions: int64 [*rest, k], tokens from the row's beginning; None for values without a sequence axis.
        tokens: int64 [*rest, k], ids of the tokens there; None likewise.
        kept: further values of the samples by name, [*rest, k, ...].
        context: the tokens and values around; None when not asked for.
    """

    values: NDArray[Any]
    rows: NDArray[Any]
    positions: NDArray[Any] | None
    tokens: NDArray[Any] | None
    kept: dict[str, NDArray[Any]]
    context: Context | None


class Reservoir(NamedTuple):
    """Of `pb.reduce.reservoir`, in the data set's order; fewer than k where there were fewer samples.

    Attributes:
        values: [k, *rest].
        rows: int64 [k].
        positions, tokens: int64 [k]; None for values without a sequence axis.
    """

    values: NDArray[Any]
    rows: NDArray[Any]
    positions: NDArray[Any] | None
    tokens: NDArray[Any] | None


class KeptRows(NamedTuple):
    """Values of one batch's rows that stay on the server.

    Attributes:
        value: the artifact, [rows, ...], padded on the left as runs show them; a constant of further traces.
        rows: numbers of its rows in the data set.
        lengths: how many tokens each has, in the prompt that the value follows.
    """

    value: Any
    rows: tuple[int, ...]
    lengths: tuple[int, ...]


class RowArrays(Sequence["NDArray[Any]"]):
    """One array for each row of the data set, of shapes that differ; padding is gone."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self._arrays = list(arrays)

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, index: slice) -> RowArrays: ...

    def __getitem__(self, index: int | slice) -> NDArray[Any] | RowArrays:
        return RowArrays(self._arrays[index]) if isinstance(index, slice) else self._arrays[index]

    def __len__(self) -> int:
        return len(self._arrays)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter(self._arrays)

    def padded(self, fill: Any = 0) -> tuple[NDArray[Any], NDArray[Any]]:
        """All rows as one array, padded on the left as runs show them, and a mask of what is not padding."""
        import numpy as np

        shapes = np.array([a.shape for a in self._arrays])
        extents = [int(e) for e in shapes.max(axis=0)]
        whole: NDArray[Any] = np.full((len(self), *extents), fill, dtype=self._arrays[0].dtype)
        mask = np.zeros(whole.shape, dtype=bool)
        for row, array in enumerate(self._arrays):
            ends = zip(extents, array.shape, strict=True)
            where: tuple[Any, ...] = (row, *(slice(extent - n, None) for extent, n in ends))
            whole[where] = array
            mask[where] = True
        # Along an axis that is equally long everywhere the mask says nothing.
        for axis in reversed(range(len(extents))):
            if (shapes[:, axis] == extents[axis]).all():
                mask = mask.take(0, axis=axis + 1)
        return whole, mask

    def __repr__(self) -> str:
        if not self._arrays:
            return "RowArrays(no rows)"
        return f"RowArrays({len(self)} rows, the first {describe(self._arrays[0])})"


def summed(a: RunUsage, b: RunUsage) -> RunUsage:
    """What two executions cost together."""
    from dataclasses import fields

    from patchbay.ir.events import Cost, Usage

    def both(kind: type, x: Any, y: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for field in fields(kind):
            p, q = getattr(x, field.name), getattr(y, field.name)
            if isinstance(p, Cost):
                cost = both(Cost, p, q)
                cost["peak_bytes"] = max(p.peak_bytes, q.peak_bytes)
                out[field.name] = Cost(**cost)
            elif isinstance(p, (int, float)):
                out[field.name] = p + q
            else:
                out[field.name] = {name: p.get(name, 0) + q.get(name, 0) for name in {**p, **q}}
        return out

    return RunUsage(**both(Usage, a, b))
