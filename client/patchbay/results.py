"""What comes back: named trees of numpy arrays, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from patchbay.ir.events import Cost, Usage


class Results(Mapping[str, Any]):
    """Saved values by name, as ``results["p"]`` or ``results.p``; trees keep the shape in which they were saved.

    Attributes:
        nonfinite: names of outputs that hold a NaN or an infinity.
        usage: what computing them cost.
    """

    def __init__(
        self, values: Mapping[str, Any], nonfinite: tuple[str, ...] = (), usage: RunUsage | None = None
    ) -> None:
        self._values = dict(values)
        self.nonfinite = nonfinite
        self.usage = RunUsage() if usage is None else usage

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise KeyError(f"nothing was saved as {name!r}; saved: {', '.join(self._values) or 'nothing'}") from None

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"nothing was saved as {name!r}; saved: {', '.join(values) or 'nothing'}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __reduce__(self) -> tuple[Any, ...]:
        return Results, (self._values, self.nonfinite, self.usage)

    def __repr__(self) -> str:
        if not self._values:
            return "Results(nothing was saved)"
        width = max(map(len, self._values))
        lines = [f"  {name:<{width}}  {describe(value)}" for name, value in self._values.items()]
        if self.nonfinite:
            lines.append(f"  not finite (NaN or infinity): {', '.join(self.nonfinite)}")
        return "Results(\n" + "\n".join(lines) + "\n)"


#: Entries of a list that are described one by one.
_SHOWN = 12


def describe(value: object) -> str:
    """A value or tree in a few words: dtypes and shapes instead of numbers."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        shown = ", ".join(f"{k}={describe(v)}" for k, v in zip(value._fields, value, strict=True))
        return f"{type(value).__name__}({shown})"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(describe, value[:_SHOWN]))
        if len(value) > _SHOWN:
            inside += f", ... {len(value):,} in all"
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return repr(value)


def map_tree(tree: object, leaf: Callable[[object, tuple[str, ...]], object], path: tuple[str, ...] = ()) -> Any:
    """`tree` with every leaf replaced by ``leaf(value, path)``; dicts, lists and tuples are not leaves."""
    if isinstance(tree, Mapping):
        return {key: map_tree(value, leaf, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(v, leaf, (*path, k)) for k, v in zip(tree._fields, tree, strict=True)))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tree(value, leaf, (*path, str(i))) for i, value in enumerate(tree))
    return leaf(tree, path)


class RunUsage(Usage):
    """`Usage` that prints as a few readable lines."""

    __slots__ = ()

    @classmethod
    def of(cls, usage: Usage) -> RunUsage:
        """The same numbers."""
        return cls(**{f.name: getattr(usage, f.name) for f in fields(Usage)})

    def __repr__(self) -> str:
        layers = self.layers_run + self.layers_skipped
        work = [
            f"{_count(self.passes, 'pass', 'passes')} over {_count(self.tokens, 'token')}",
            f"{self.layers_run} of {_count(layers, 'layer')} run, {self.layers_skipped} skipped",
            f"{self.nodes_run} of {_count(self.nodes, 'node')} run",
        ]
        times = f"queued {self.queue_ms:.1f} ms, ran {self.run_ms:.1f} ms"
        traffic = f"sent {show_bytes(self.bytes_in)}, received {show_bytes(self.bytes_out)}"
        lines = ["; ".join(work), f"{times}; {traffic}"]
        saved = ", ".join(f"{name} {amount}" for name, amount in self.saved.items() if amount)
        if saved:
            lines.append(f"saved: {saved}")
        return "\n".join(lines)

    __str__ = __repr__


class Price(Cost):
    """`Cost` that prints as one readable line."""

    __slots__ = ()

    @classmethod
    def of(cls, cost: Cost) -> Price:
        """The same numbers."""
        return cls(**{f.name: getattr(cost, f.name) for f in fields(Cost)})

    def __repr__(self) -> str:
        # How many forwards the runs share is the planner's business: worked out here, the number is not known.
        passes = f"{_count(self.passes, 'pass', 'passes')} over " if self.passes else ""
        kept = f", keeps {show_bytes(self.kept_bytes)}" if self.kept_bytes else ""
        return (
            f"{self.flops:,} FLOPs, {passes}{_count(self.tokens, 'token')},"
            f" peak {show_bytes(self.peak_bytes)}, results {show_bytes(self.result_bytes)}{kept}"
        )

    __str__ = __repr__


def show_bytes(n: int) -> str:
    """``1.5 KiB``."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one}" if n == 1 else f"{n:,} {many or one + 's'}"
