"""What examples are drawn with: shapes, axes, arrays; and the registry of builders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from hypothesis import strategies as st

from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.graph import Attr
from patchbay.reference import to_numpy_dtype

Operand: TypeAlias = "np.ndarray[Any, Any] | bool | int | float"
Example: TypeAlias = "tuple[list[Operand], dict[str, Attr]]"
Shape: TypeAlias = "tuple[int, ...]"

FLOATS = ("float32", "float64", "bfloat16", "float16")
INTS = ("int64", "int32", "uint8", "int8", "int16")
NUMBERS = (*FLOATS, *INTS)
#: Without float16, in which torch's least norms (1e-8, 1e-12) are 0.
WIDE_FLOATS = ("float32", "float64", "bfloat16")
ANY = (*FLOATS, "float32", *INTS, "bool")
#: What operations that only move elements take as well.
STORED = (*ANY, "float8_e4m3fn", "float8_e5m2")
LAPACK = ("float32", "float64")


class Drawing:
    """Draws the parts of an example; arrays come from one drawn seed, which is far quicker than drawing elements."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def one(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def shape(self, least: int = 0, most: int = 3, *, extent: int = 1) -> Shape:
        """From `least` to `most` axes of at least `extent` elements; an extent of 0 is rare where it is allowed."""
        ndim = self.integer(least, most)
        shape = [self.integer(max(1, extent), 4) for _ in range(ndim)]
        if extent == 0 and ndim and self.integer(0, 7) == 0:
            shape[self.integer(0, ndim - 1)] = 0
        return tuple(shape)

    def below(self, shape: Shape) -> Shape:
        """A shape that broadcasts to `shape`."""
        kept = shape[self.integer(0, len(shape)) :]
        return tuple(1 if self.integer(0, 3) == 0 else extent for extent in kept)

    def axis(self, ndim: int) -> int:
        return self.integer(-ndim, ndim - 1)

    def axes(self, ndim: int) -> int | Shape | None:
        """None, one axis, or some different ones."""
        kind = self.integer(0, 2) if ndim else 0
        if kind == 0:
            return None
        if kind == 1:
            return self.axis(ndim)
        some = self.random.permutation(ndim)[: self.integer(1, ndim)]
        return tuple(int(a) - (ndim if self.flag() else 0) for a in some)

    def array(
        self,
        shape: Shape,
        dtypes: Sequence[str] = ANY,
        *,
        low: float = -4,
        high: float = 4,
        special: bool = False,
    ) -> np.ndarray[Any, Any]:
        """Multiples of 1/4 (of 1, for integers) from `low` to `high`; with `special`, sometimes NaN and infinities."""
        dtype: DType = DTYPES[self.one(dtypes)]
        if dtype.kind == "bool":
            return self.random.integers(0, 2, shape).astype(bool)
        if dtype.is_integer:
            low = max(low, 0) if dtype.kind == "uint" else low
            return self.random.integers(math.ceil(low), math.floor(high) + 1, shape).astype(to_numpy_dtype(dtype))
        values = np.asarray(self.random.integers(math.ceil(low * 4), math.floor(high * 4) + 1, shape) / 4)
        if special and self.integer(0, 3) == 0:
            odd = self.random.choice([np.nan, np.inf, -np.inf, -0.0], values.shape)
            values = np.where(self.random.random(values.shape) < 0.3, odd, values)
        return values.astype(to_numpy_dtype(dtype))

    def normal(self, shape: Shape, dtypes: Sequence[str] = LAPACK) -> np.ndarray[Any, Any]:
        return self.random.standard_normal(shape).astype(to_numpy_dtype(DTYPES[self.one(dtypes)]))

    def number(self, kinds: str = "fib") -> bool | int | float:
        """A Python float, int or bool, one of `kinds`."""
        kind = self.one(kinds)
        if kind == "b":
            return self.flag()
        return self.integer(0, 4) if kind == "i" else self.integer(-16, 16) / 4

    def indices(self, shape: Shape, extent: int, *, negative: bool = True) -> np.ndarray[Any, Any]:
        """Positions on an axis of `extent`; there are none when it is 0, so the shape must be empty then."""
        dtype = self.one(("int64", "int32", "int8") if negative else ("int64", "int32", "uint8"))
        return self.random.integers(-extent if negative else 0, max(extent, 1), shape).astype(dtype)


Builder: TypeAlias = Callable[[Drawing], Example]
BUILDERS: dict[str, Builder] = {}


def builds(*names: str) -> Callable[[Builder], Builder]:
    """The decorated function builds examples of the operations `names`."""

    def attach(builder: Builder) -> Builder:
        for name in names:
            assert name not in BUILDERS, name
            BUILDERS[name] = builder
        return builder

    return attach
