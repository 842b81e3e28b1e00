"""Reductions that keep samples: the largest, and a random few.

Which samples are kept depends on the samples alone. Equal values are told apart by the samples' numbers, the first in
the data set first; random ones are those whose number hashes lowest (bottom-k sampling; Cohen & Kaplan 2007,
"Summarizing Data Using Bottom-k Sketches"), so that batches, lanes and order do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchbay import ops
from patchbay.datasets.reducers import Parts, Reduction, Samples
from patchbay.errors import TraceError
from patchbay.tracing.proxy import Proxy

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Sorts behind every sample's number.
_NOWHERE = float(2**53)


class TopK(Reduction):
    """The k largest samples of each element, with where they stand and what else was to be kept of them."""

    name = "topk"

    def __init__(
        self,
        value: Any,
        k: int,
        *,
        largest: bool,
        keep: Mapping[str, Any] | None,
        context: tuple[int, int] | None,
        over: str | None = None,
        mask: Any = None,
    ) -> None:
        super().__init__(value, over, mask)
        if k < 1:
            raise TraceError(f"pb.reduce.topk: k is at least 1, not {k}")
        for name, kept in (keep or {}).items():
            if not isinstance(kept, Proxy):
                raise TraceError(f"pb.reduce.topk: keep[{name!r}] is a value of the run, not {type(kept).__name__}")
        self.k = k
        self.largest = largest
        self.keep = dict(keep or {})
        self.context = context
        self.kept: dict[str, tuple[tuple[int, ...], str]] = {}

    def release(self) -> None:
        super().release()
        self.keep = {}

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        if self.context is not None and not self.per_token:
            raise TraceError("pb.reduce.topk: context= shows the tokens around a token; these samples are whole rows")
        n, elements = x.shape
        k = min(self.k, n)
        score = (x if self.largest else -x).astype("float64")
        usable = ops.isnan(score) == False  # noqa: E712 - a value of the trace
        if counted is not None:
            usable = usable & counted[:, None]
        score = ops.where(usable, score, -math.inf)
        chosen = _first_largest(score, k)  # [k, elements], in the order of the samples
        value = ops.take_along_axis(score, chosen, axis=0)
        number = samples.numbers(self.per_token).astype("float64")
        parts: Parts = {"value": value, "number": ops.where(value > -math.inf, ops.take(number, chosen), _NOWHERE)}
        if self.per_token:
            parts["token"] = ops.take(samples.ids.reshape(-1).astype("float64"), chosen)
        for name, kept in self.keep.items():
            flat = samples.flat(kept, self.per_token)
            self.kept[name] = (kept.shape[1 + self.per_token :], kept.dtype.name)
            parts[f"keep.{name}"] = ops.take(flat.astype("float64"), chosen.reshape(-1), axis=0).reshape(
                k, elements, flat.shape[1]
            )
        if self.context is not None:
            parts.update(self._around(samples, x, chosen))
        if k < self.k:
            parts = {name: _lengthened(part, name, self.k) for name, part in parts.items()}
        return self._ordered(parts)

    def _around(self, samples: Samples, x: Proxy, chosen: Proxy) -> Parts:
        """Tokens and values at the neighbours of the chosen samples, [k, elements, window]; -1 and NaN outside."""
        assert self.context is not None
        elements = x.shape[1]
        before, after = self.context
        import numpy as np

        offsets = samples.trace.constant(np.arange(-before, after + 1))
        place = ops.take(samples.positions.reshape(-1), chosen)[:, :, None] + offsets
        column = chosen[:, :, None] % samples.seq + offsets
        inside = samples.inside(chosen, place, column)
        index = ops.where(inside, chosen[:, :, None] + offsets, 0)
        ids = ops.take(samples.ids.reshape(-1), index)
        which = samples.trace.constant(np.arange(elements)[:, None])
        values = ops.take(x.reshape(-1).astype("float64"), index * elements + which)
        return {
            "context.ids": ops.where(inside, ids, -1).astype("float64"),
            "context.values": ops.where(inside, values, math.nan),
        }

    def merge(self, a: Parts, b: Parts) -> Parts:
        return self._ordered({name: ops.concat([a[name], b[name]], axis=0) for name in a})

    def _ordered(self, parts: Parts) -> Parts:
        """The first k by value, equal ones by number."""
        by_number = ops.argsort(parts["number"], axis=0)
        by_value = ops.argsort(ops.take_along_axis(parts["value"], by_number, axis=0), axis=0, descending=True)
        order = ops.take_along_axis(by_number, by_value, axis=0)[: self.k]
        return {name: _picked(part, order) for name, part in parts.items()}

    def finish(self, parts: Parts) -> Parts:
        return dict(parts)

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        import numpy as np

        from patchbay.datasets.results import Context
        from patchbay.datasets.results import TopK as Result

        def shaped(name: str, *extra: int) -> NDArray[Any]:
            array = np.moveaxis(arrays[name], 0, 1)  # [elements, k, ...]
            return array.reshape((*self.rest, self.k, *extra))

        number = shaped("number")
        there = number < _NOWHERE
        values = np.where(there, shaped("value") * (1 if self.largest else -1), np.nan)
        rows, positions = _split(number, there, self.stride)
        tokens = np.where(there, shaped("token"), -1).astype(np.int64) if self.per_token else None
        kept = {
            name: shaped(f"keep.{name}", *extents).astype(_plain(dtype)) for name, (extents, dtype) in self.kept.items()
        }
        context = None
        if self.context is not None:
            width = sum(self.context) + 1
            ids = np.where(there[..., None], shaped("context.ids", width), -1).astype(np.int64)
            around = np.where(there[..., None], shaped("context.values", width), np.nan)
            context = Context(ids, around, self.context[0])
        return Result(values, rows, positions if self.per_token else None, tokens, kept, context)


class Reservoir(Reduction):
    """k samples, each as likely to be kept as any other."""

    name = "reservoir"

    def __init__(self, value: Any, k: int, seed: int, over: str | None = None, mask: Any = None) -> None:
        super().__init__(value, over, mask)
        if k < 1:
            raise TraceError(f"pb.reduce.reservoir: k is at least 1, not {k}")
        self.k = k
        self.seed = seed
        self.dtype = value.dtype.name

    def _fold(self, samples: Samples, x: Proxy, counted: Proxy | None) -> Parts:
        k = min(self.k, x.shape[0])
        number = samples.numbers(self.per_token)
        key = hashed(number, self.seed).astype("float64")
        if counted is not None:
            key = ops.where(counted, key, math.inf)
        order = ops.argsort(key)[:k]
        key = ops.take(key, order)
        there = key < math.inf
        parts: Parts = {
            "key": key,
            "number": ops.where(there, ops.take(number.astype("float64"), order), _NOWHERE),
            "value": ops.take(x.astype("float64"), order, axis=0),
        }
        if self.per_token:
            parts["token"] = ops.take(samples.ids.reshape(-1).astype("float64"), order)
        if k < self.k:
            parts = {name: _lengthened(part, name, self.k) for name, part in parts.items()}
        return parts

    def merge(self, a: Parts, b: Parts) -> Parts:
        parts = {name: ops.concat([a[name], b[name]], axis=0) for name in a}
        by_number = ops.argsort(parts["number"])  # two samples may have one key
        order = ops.take(by_number, ops.argsort(ops.take(parts["key"], by_number))[: self.k])
        return {name: ops.take(part, order, axis=0) for name, part in parts.items()}

    def finish(self, parts: Parts) -> Parts:
        return {name: part for name, part in parts.items() if name != "key"}

    def result(self, arrays: Mapping[str, NDArray[Any]]) -> Any:
        import numpy as np

        from patchbay.datasets.results import Reservoir as Result

        order = np.argsort(arrays["number"], kind="stable")
        order = order[arrays["number"][order] < _NOWHERE]
        number = arrays["number"][order]
        rows, positions = _split(number, number < _NOWHERE, self.stride)
        values = arrays["value"][order].reshape((len(order), *self.rest)).astype(_plain(self.dtype))
        tokens = arrays["token"][order].astype(np.int64) if self.per_token else None
        return Result(values, rows, positions if self.per_token else None, tokens)


def hashed(number: Proxy, seed: int) -> Proxy:
    """53 bits of SplitMix64 (Steele, Lea & Flood 2014) of each number, int64; the same as `hashed_number` gives."""
    z = number * _signed(_GOLDEN) + _signed(_mixed(seed * _GOLDEN + 1))
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return _shifted(z ^ _shifted(z, 31), 11)


def hashed_number(number: int, seed: int) -> int:
    """What `hashed` gives, for one number, in Python."""
    return _mixed(number * _GOLDEN + _mixed(seed * _GOLDEN + 1)) >> 11


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 2**64


def _mixed(z: int) -> int:
    z %= _BITS
    z = (z ^ (z >> 30)) * _FIRST % _BITS
    z = (z ^ (z >> 27)) * _SECOND % _BITS
    return z ^ (z >> 31)


def _signed(n: int) -> int:
    """The 64 bits of `n` as a signed integer."""
    n %= _BITS
    return n - _BITS if n >= _BITS // 2 else n


def _shifted(z: Proxy, by: int) -> Proxy:
    """Shifted right, zeros coming in."""
    shifted: Proxy = (z >> by) & ((1 << (64 - by)) - 1)
    return shifted


def _first_largest(score: Proxy, k: int) -> Proxy:
    """Positions along axis 0 of the k largest, equal ones chosen from the front; ascending. [k, elements].

    ``topk`` alone does not say which of several equal values it returns.
    """
    import numpy as np

    n = score.shape[0]
    if k == n:
        every = score._trace.constant(np.arange(n)[:, None])
        return ops.broadcast_to(every, score.shape)  # type: ignore[no-any-return]
    least = score.topk(k, axis=0).values[k - 1 : k]
    above, level = score > least, score == least
    room = k - above.astype("int64").sum(axis=0, keepdims=True)
    chosen = above | (level & (level.astype("int64").cumulative_sum(axis=0) <= room))
    front = score._trace.constant(np.arange(n, 0, -1)[:, None])
    picked: Proxy = ops.where(chosen, front, 0).topk(k, axis=0).indices
    return picked


def _picked(part: Proxy, order: Proxy) -> Proxy:
    """Entries of `part` [m, elements, ...] in the order [k, elements]."""
    if part.ndim > 2:
        shape = (*order.shape, *part.shape[2:])
        order = ops.broadcast_to(order.reshape(*order.shape, *([1] * (part.ndim - 2))), shape)
    return ops.take_along_axis(part, order, axis=0)  # type: ignore[no-any-return]


def _lengthened(part: Proxy, name: str, k: int) -> Proxy:
    """`part` with entries that stand for no sample."""
    fill = {"number": _NOWHERE, "key": math.inf, "value": -math.inf}.get(name, 0.0)
    more = part._trace.constant(ops.full((k - part.shape[0], *part.shape[1:]), fill, dtype="float64"))
    longer: Proxy = ops.concat([part, more], axis=0)
    return longer


def _split(number: NDArray[Any], there: NDArray[Any], stride: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows and positions of samples' numbers; -1 where there is none."""
    import numpy as np

    whole = np.where(there, number, 0).astype(np.int64)
    return np.where(there, whole // stride, -1), np.where(there, whole % stride, -1)


def _plain(dtype: str) -> Any:
    """The numpy dtype of a kept value; extended float types stay float32."""
    import numpy as np

    return np.dtype(np.float32 if dtype.startswith(("bfloat", "float8")) else dtype)
