"""References of patchbay.ir.ops.elementwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from patchbay.errors import DTypeError
from patchbay.ir.dtypes import DTYPES, DType, promote, promote_scalar, scalar_kind
from patchbay.ir.ops import OPS
from patchbay.reference.arrays import Array, Value, from_numpy_dtype, to_numpy_dtype
from patchbay.reference.registry import Operand, implements

_erf = np.vectorize(math.erf, otypes=[np.float64])


def fitted(values: tuple[Operand, ...], dtype: DType) -> tuple[Array, ...]:
    """`values` as arrays of `dtype`.

    Raises:
        DTypeError: a Python integer is too large for it.
    """
    try:
        return tuple(np.asarray(v, dtype=to_numpy_dtype(dtype)) for v in values)
    except OverflowError as error:
        raise DTypeError(f"{values} do not fit into {dtype}") from error


def together(*values: Operand) -> tuple[Array, ...]:
    """`values` as arrays of their common dtype."""
    tensors = [from_numpy_dtype(v.dtype) for v in values if isinstance(v, np.ndarray)]
    dtype = tensors[0]
    for other in tensors[1:]:
        dtype = promote(dtype, other)
    for value in values:
        if not isinstance(value, np.ndarray):
            dtype = promote_scalar(dtype, scalar_kind(value))
    if dtype.is_floating:
        return tuple(np.asarray(v, np.float64) for v in values)
    return fitted(values, dtype)


def _sigmoid(x: Array) -> Value:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def _integers(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Rounding leaves integers as they are."""
    return lambda x: function(x) if x.dtype.kind == "f" else x


def _float(function: Callable[..., Array]) -> Callable[..., Array]:
    """In float64, whatever comes in."""
    return lambda *xs: function(*(np.asarray(x, np.float64) for x in xs))


_UNARY: Mapping[str, Callable[[Array], Any]] = {
    "negative": np.negative,
    "positive": lambda x: x,
    "abs": np.abs,
    "stop_gradient": lambda x: x,
    "sign": np.sign,
    "square": np.square,
    "floor": _integers(np.floor),
    "ceil": _integers(np.ceil),
    "round": _integers(np.round),
    "trunc": _integers(np.trunc),
    "exp": _float(np.exp),
    "exp2": _float(np.exp2),
    "expm1": _float(np.expm1),
    "log": _float(np.log),
    "log1p": _float(np.log1p),
    "log2": _float(np.log2),
    "log10": _float(np.log10),
    "sqrt": _float(np.sqrt),
    "rsqrt": _float(lambda x: 1 / np.sqrt(x)),
    "reciprocal": _float(lambda x: 1 / x),
    "sin": _float(np.sin),
    "cos": _float(np.cos),
    "tan": _float(np.tan),
    "asin": _float(np.arcsin),
    "acos": _float(np.arccos),
    "atan": _float(np.arctan),
    "sinh": _float(np.sinh),
    "cosh": _float(np.cosh),
    "tanh": _float(np.tanh),
    "asinh": _float(np.arcsinh),
    "acosh": _float(np.arccosh),
    "atanh": _float(np.arctanh),
    "erf": _float(_erf),
    "sigmoid": _float(_sigmoid),
    "logical_not": lambda x: x == 0,
    "isnan": _float(np.isnan),
    "isinf": _float(np.isinf),
    "isfinite": _float(np.isfinite),
    "bitwise_invert": np.invert,
    "relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
}

for _name, _unary in _UNARY.items():
    implements(OPS[_name])(_unary)


def _power(a: Array, b: Array) -> Value:
    if a.dtype.kind == "f":
        return np.power(a, b)
    inverse = np.where(a == 1, 1, np.where(a == -1, np.where(b % 2 == 0, 1, -1), 0))
    return np.where(b < 0, inverse.astype(a.dtype), np.power(a, np.maximum(b, b.dtype.type(0))))


_BINARY: Mapping[str, Callable[[Array, Array], Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": _float(np.divide),
    "floor_divide": np.floor_divide,
    "remainder": np.remainder,
    "pow": _power,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "atan2": _float(np.arctan2),
    "logaddexp": _float(np.logaddexp),
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "bitwise_left_shift": np.left_shift,
    "bitwise_right_shift": np.right_shift,
    "heaviside": lambda a, b: np.where(a > 0, 1, np.where(a < 0, 0, np.where(a == 0, b, np.where(a != a, 0, a)))),
}


def _binary(function: Callable[[Array, Array], Any]) -> Callable[[Operand, Operand], Any]:
    return lambda x1, x2: function(*together(x1, x2))


for _name, _function in _BINARY.items():
    implements(OPS[_name])(_binary(_function))


@implements(OPS["gelu"])
def _gelu(x: Array, *, approximate: str) -> Value:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


@implements(OPS["softplus"])
def _softplus(x: Array, *, beta: float, threshold: float) -> Value:
    return np.where(x * beta > threshold, x, np.logaddexp(0, x * beta) / beta)


@implements(OPS["leaky_relu"])
def _leaky_relu(x: Array, *, negative_slope: float) -> Value:
    return np.where(x > 0, x, x * negative_slope)


@implements(OPS["elu"])
def _elu(x: Array, *, alpha: float) -> Value:
    return np.where(x > 0, x, alpha * np.expm1(x))


@implements(OPS["hardtanh"])
def _hardtanh(x: Array, *, min_val: float, max_val: float) -> Value:
    return np.clip(x, min_val, max_val)


@implements(OPS["where"])
def _where(condition: Array, x1: Operand, x2: Operand) -> Value:
    if isinstance(x1, np.ndarray) or isinstance(x2, np.ndarray):
        x1, x2 = together(x1, x2)
    return np.where(condition, x1, x2)


@implements(OPS["clip"])
def _clip(x: Array, *, min: bool | int | float | None, max: bool | int | float | None) -> Value:
    if min is not None:
        x = np.asarray(np.maximum(*together(x, min)))
    if max is not None:
        x = np.asarray(np.minimum(*together(x, max)))
    return x


@implements(OPS["nan_to_num"], in_own_dtype=True)
def _nan_to_num(x: Array, *, nan: float, posinf: float | None, neginf: float | None) -> Value:
    if not from_numpy_dtype(x.dtype).is_floating:
        return x
    largest = float(ml_dtypes.finfo(x.dtype).max)  # type: ignore[no-untyped-call]
    wide = x.astype(np.float64)
    wide = np.where(np.isnan(wide), nan, wide)
    wide = np.where(wide == np.inf, largest if posinf is None else posinf, wide)
    return np.where(wide == -np.inf, -largest if neginf is None else neginf, wide)


@implements(OPS["astype"], in_own_dtype=True)
def _astype(x: Array, *, dtype: str) -> Value:
    return x.astype(to_numpy_dtype(DTYPES[dtype]))
