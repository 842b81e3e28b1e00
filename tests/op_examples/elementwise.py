"""Random calls of elementwise operations and reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.graph import Attr
from tests.op_examples.drawing import (
    ANY,
    FLOATS,
    INTS,
    NUMBERS,
    Builder,
    Drawing,
    Example,
    builds,
)


def _unary(dtypes: Sequence[str], low: float = -4, high: float = 4) -> Builder:
    return lambda d: ([d.array(d.shape(extent=0), dtypes, low=low, high=high, special=True)], {})


_UNARY: Mapping[str, Sequence[str]] = {
    **dict.fromkeys("negative positive stop_gradient abs sign square floor ceil round trunc relu".split(), NUMBERS),
    **dict.fromkeys("exp exp2 expm1 log log1p log2 log10 sqrt rsqrt reciprocal sin cos tan".split(), ANY),
    **dict.fromkeys("asin acos atan sinh cosh tanh asinh acosh atanh erf sigmoid".split(), ANY),
    **dict.fromkeys("logical_not isnan isinf isfinite".split(), ANY),
    "bitwise_invert": (*INTS, "bool"),
    **dict.fromkeys("quick_gelu silu log_sigmoid".split(), FLOATS),
}
for _name, _dtypes in _UNARY.items():
    builds(_name)(_unary(_dtypes))


def _binary(dtypes: Sequence[str], kinds: str, *, low: float = -4, special: bool = True) -> Builder:
    """Two tensors that broadcast, or a tensor and a Python number on either side."""

    def build(d: Drawing) -> Example:
        shape = d.shape(extent=0)
        x = d.array(shape, dtypes, low=low, special=special)
        if kinds and d.integer(0, 2) == 0:
            number = d.number(kinds)
            if x.dtype.kind == "b" and isinstance(number, bool) and "bool" not in dtypes:
                number = 2
            return ([x, number] if d.flag() else [number, x]), {}
        y = d.array(d.below(shape), dtypes, low=low, special=special)
        return ([x, y] if d.flag() else [y, x]), {}

    return build


for _name in ("add", "multiply", "divide", "minimum", "maximum", "heaviside", "atan2"):
    builds(_name)(_binary(ANY, "fib"))
for _name in "equal not_equal less less_equal greater greater_equal logical_and logical_or logical_xor".split():
    builds(_name)(_binary(ANY, "fib"))
for _name in ("subtract", "floor_divide", "remainder"):
    builds(_name)(_binary(NUMBERS, "fi"))
builds("logaddexp")(_binary(ANY, "fib"))
# Without infinities: numpy takes the square root for x ** 0.5, torch (-inf) ** 0.5 = inf as C does.
builds("pow")(_binary(NUMBERS, "fi", special=False))
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    builds(_name)(_binary((*INTS, "bool"), "ib"))


@builds("bitwise_left_shift", "bitwise_right_shift")
def _shift(d: Drawing) -> Example:
    shape = d.shape(extent=0)
    dtype = (d.one(INTS),)
    return [d.array(shape, dtype, low=-100, high=100), d.array(d.below(shape), dtype, low=-2, high=80)], {}


@builds("gelu")
def _gelu(d: Drawing) -> Example:
    return [d.array(d.shape(extent=0), FLOATS)], {"approximate": d.one(("none", "tanh"))}


@builds("softplus")
def _softplus(d: Drawing) -> Example:
    return [d.array(d.shape(), FLOATS, low=-20, high=40)], {
        "beta": d.one((0.5, 1.0, 2)),
        "threshold": d.one((20.0, 5.0)),
    }


@builds("leaky_relu")
def _leaky_relu(d: Drawing) -> Example:
    return [d.array(d.shape(), FLOATS)], {"negative_slope": d.one((0.01, 0.5))}


@builds("elu")
def _elu(d: Drawing) -> Example:
    return [d.array(d.shape(), FLOATS)], {"alpha": d.one((1.0, 0.5))}


@builds("hardtanh")
def _hardtanh(d: Drawing) -> Example:
    return [d.array(d.shape(), FLOATS, special=True)], {"min_val": -2.0, "max_val": d.one((1.0, 2.5))}


@builds("nan_to_num")
def _nan_to_num(d: Drawing) -> Example:
    replacements: dict[str, Attr] = {"nan": 1.5, "posinf": 8.0, "neginf": -8.0}
    return [d.array(d.shape(), ANY, special=True)], {k: v for k, v in replacements.items() if d.flag()}


@builds("clip")
def _clip(d: Drawing) -> Example:
    x = d.array(d.shape(extent=0), NUMBERS, special=True)
    kinds = "fi" if x.dtype.kind not in "iu" else "i"
    bounds = sorted((d.number(kinds), d.number(kinds)))
    attrs: dict[str, Attr] = {
        name: bound for name, bound in zip(("min", "max"), bounds, strict=True) if d.integer(0, 3)
    }
    return [x], attrs


@builds("where")
def _where(d: Drawing) -> Example:
    shape = d.shape(extent=0)
    condition = d.array(d.below(shape), ("bool",))
    branches = [d.number() if d.integer(0, 2) == 0 else d.array(d.below(shape), ANY, special=True) for _ in range(2)]
    return [condition, *branches], {}


@builds("astype")
def _astype(d: Drawing) -> Example:
    return [d.array(d.shape(extent=0), (*ANY, "float8_e5m2"), low=0)], {"dtype": d.one(sorted(DTYPES))}


def _reduction(dtypes: Sequence[str], *, extent: int = 0, special: bool = True, dtype: bool = False) -> Builder:
    def build(d: Drawing) -> Example:
        x = d.array(d.shape(extent=extent), dtypes, low=-2, high=2, special=special)
        attrs: dict[str, Attr] = {"axis": d.axes(x.ndim), "keepdims": d.flag()}
        if dtype and d.integer(0, 3) == 0 and x.dtype.kind != "f":
            attrs["dtype"] = d.one(("float32", "float64", "int64"))
        return [x], attrs

    return build


builds("sum")(_reduction(ANY, dtype=True))
builds("prod")(_reduction(ANY, dtype=True))
builds("mean")(_reduction(FLOATS))
for _name in ("max", "min"):
    builds(_name)(_reduction(ANY, extent=1))
for _name in ("any", "all", "count_nonzero"):
    builds(_name)(_reduction(ANY))
builds("logsumexp")(_reduction(FLOATS, extent=1))


@builds("var", "std")
def _spread(d: Drawing) -> Example:
    shape = tuple(e + 1 for e in d.shape(1))
    correction: dict[str, Attr] = {"correction": d.one((0, 1, 0.5))} if d.flag() else {}
    return [d.array(shape, FLOATS)], {"axis": d.axes(len(shape)), "keepdims": d.flag(), **correction}


@builds("vector_norm")
def _vector_norm(d: Drawing) -> Example:
    x = d.array(d.shape(), FLOATS)
    return [x], {"axis": d.axes(x.ndim), "keepdims": d.flag(), "ord": d.one((2.0, 1, 3.0, 0.5, 0, math.inf, -math.inf))}


@builds("argmax", "argmin")
def _arg(d: Drawing) -> Example:
    x = d.array(d.shape(), ANY, low=-1, high=1, special=True)
    return [x], {"axis": d.axis(x.ndim) if x.ndim and d.flag() else None, "keepdims": d.flag()}


@builds("cumulative_sum", "cumulative_prod")
def _cumulative(d: Drawing) -> Example:
    x = d.array(d.shape(1, extent=0), ANY, low=-2, high=2)
    attrs: dict[str, Attr] = {} if x.ndim == 1 and d.flag() else {"axis": d.axis(x.ndim)}
    return [x], attrs
