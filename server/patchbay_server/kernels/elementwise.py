"""Kernels of patchbay.ir.ops.elementwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch.nn import functional as F

from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay_server.kernels.registry import implements
from patchbay_server.kernels.tensors import as_float, promoted, promoted_tensors, to_torch_dtype

Number: TypeAlias = "bool | int | float"
Operand: TypeAlias = "torch.Tensor | bool | int | float"
Unary: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Binary: TypeAlias = Callable[..., torch.Tensor]


def _rounding(function: Unary) -> Unary:
    """Integers are round already; torch says so for some dtypes only."""
    return lambda x: function(x) if x.is_floating_point() else x


def _real(function: Unary) -> Unary:
    return lambda x: function(as_float(x))


_UNARY: Mapping[str, Unary] = {
    "negative": torch.neg,
    "positive": torch.positive,
    "abs": torch.abs,
    "stop_gradient": torch.Tensor.detach,
    "sign": lambda x: torch.where(x.isnan(), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x),
    "square": torch.square,
    "floor": _rounding(torch.floor),
    "ceil": _rounding(torch.ceil),
    "round": _rounding(torch.round),
    "trunc": _rounding(torch.trunc),
    "logical_not": torch.logical_not,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "bitwise_invert": torch.bitwise_not,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "log_sigmoid": F.logsigmoid,
    **{
        name: _real(function)
        for name, function in {
            "exp": torch.exp,
            "exp2": torch.exp2,
            "expm1": torch.expm1,
            "log": torch.log,
            "log1p": torch.log1p,
            "log2": torch.log2,
            "log10": torch.log10,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "reciprocal": torch.reciprocal,
            "sin": torch.sin,
            "cos": torch.cos,
            "tan": torch.tan,
            "asin": torch.asin,
            "acos": torch.acos,
            "atan": torch.atan,
            "sinh": torch.sinh,
            "cosh": torch.cosh,
            "tanh": torch.tanh,
            "asinh": torch.asinh,
            "acosh": torch.acosh,
            "atanh": torch.atanh,
            "erf": torch.erf,
            "sigmoid": torch.sigmoid,
        }.items()
    },
}


def _plain(function: Binary, *, floating: bool = False) -> Binary:
    """For torch functions that take a Python number on the right."""

    def apply(x1: Operand, x2: Operand) -> torch.Tensor:
        a, b = promoted(x1, x2, floating=floating)
        return function(a, b)

    return apply


def _tensors(function: Binary, *, floating: bool = False) -> Binary:
    """For torch functions that take tensors only."""

    def apply(x1: Operand, x2: Operand) -> torch.Tensor:
        return function(*promoted_tensors(x1, x2, floating=floating))

    return apply


_BINARY: Mapping[str, Binary] = {
    "add": _plain(lambda a, b: a + b),
    "subtract": _plain(lambda a, b: a - b),
    "multiply": _plain(lambda a, b: a * b),
    "divide": _plain(lambda a, b: a / b, floating=True),
    "minimum": _tensors(torch.minimum),
    "maximum": _tensors(torch.maximum),
    "atan2": _tensors(torch.atan2, floating=True),
    "logaddexp": _tensors(torch.logaddexp, floating=True),
    "equal": _plain(lambda a, b: a == b),
    "not_equal": _plain(lambda a, b: a != b),
    "less": _plain(lambda a, b: a < b),
    "less_equal": _plain(lambda a, b: a <= b),
    "greater": _plain(lambda a, b: a > b),
    "greater_equal": _plain(lambda a, b: a >= b),
    "logical_and": _tensors(torch.logical_and),
    "logical_or": _tensors(torch.logical_or),
    "logical_xor": _tensors(torch.logical_xor),
    "bitwise_and": _tensors(torch.bitwise_and),
    "bitwise_or": _tensors(torch.bitwise_or),
    "bitwise_xor": _tensors(torch.bitwise_xor),
    "bitwise_left_shift": _tensors(torch.bitwise_left_shift),
    "bitwise_right_shift": _tensors(torch.bitwise_right_shift),
    "heaviside": _tensors(torch.heaviside),
}

for _name, _function in {**_UNARY, **_BINARY}.items():
    implements(OPS[_name])(_function)


def _total(divide: Binary) -> Binary:
    """Integer division without traps: on a CPU, x / 0 and the least integer / -1 end the process or raise, in torch."""

    def apply(x1: Operand, x2: Operand, *, remainder: bool) -> torch.Tensor:
        a, b = promoted_tensors(x1, x2)
        safe = divide(a, torch.where((b == 0) | (b == -1), torch.ones_like(b), b))
        if remainder:
            return torch.where((b == 0) | (b == -1), torch.zeros_like(safe), safe)
        return torch.where(b == 0, torch.zeros_like(safe), torch.where(b == -1, -a, safe))

    return apply


def _is_integer(*values: Operand) -> bool:
    return not any(v.is_floating_point() if isinstance(v, torch.Tensor) else isinstance(v, float) for v in values)


@implements(OPS["floor_divide"])
def _floor_divide(x1: Operand, x2: Operand) -> torch.Tensor:
    if _is_integer(x1, x2):
        return _total(torch.floor_divide)(x1, x2, remainder=False)
    # As floor_divide, bit for bit, but with a gradient (0).
    return torch.div(*promoted_tensors(x1, x2), rounding_mode="floor")


@implements(OPS["remainder"])
def _remainder(x1: Operand, x2: Operand) -> torch.Tensor:
    if _is_integer(x1, x2):
        return _total(torch.remainder)(x1, x2, remainder=True)
    # A number on the left has no gradient in torch.
    a, b = promoted(x1, x2) if isinstance(x1, torch.Tensor) else promoted_tensors(x1, x2)
    return a % b


@implements(OPS["pow"])
def _pow(x1: Operand, x2: Operand) -> torch.Tensor:
    if _is_integer(x1, x2):  # as tensors: torch refuses a negative number as exponent of integers, not a tensor
        return torch.pow(*promoted_tensors(x1, x2))
    a, b = promoted(x1, x2)
    return a**b


@implements(OPS["gelu"])
def _gelu(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


@implements(OPS["softplus"])
def _softplus(x: torch.Tensor, *, beta: float, threshold: float) -> torch.Tensor:
    return F.softplus(x, beta=beta, threshold=threshold)


@implements(OPS["leaky_relu"])
def _leaky_relu(x: torch.Tensor, *, negative_slope: float) -> torch.Tensor:
    return F.leaky_relu(x, negative_slope)


@implements(OPS["elu"])
def _elu(x: torch.Tensor, *, alpha: float) -> torch.Tensor:
    return F.elu(x, alpha)


@implements(OPS["hardtanh"])
def _hardtanh(x: torch.Tensor, *, min_val: float, max_val: float) -> torch.Tensor:
    return F.hardtanh(x, min_val, max_val)


@implements(OPS["where"])
def _where(condition: torch.Tensor, x1: Operand, x2: Operand) -> torch.Tensor:
    if isinstance(x1, torch.Tensor) or isinstance(x2, torch.Tensor):
        x1, x2 = promoted(x1, x2)
    return torch.where(condition, x1, x2)


@implements(OPS["clip"])
def _clip(x: torch.Tensor, *, min: Number | None, max: Number | None) -> torch.Tensor:
    promoted(x, *(bound for bound in (min, max) if bound is not None))  # refuses integers that do not fit
    return x if min is None and max is None else torch.clamp(x, min, max)


@implements(OPS["nan_to_num"])
def _nan_to_num(x: torch.Tensor, *, nan: float, posinf: float | None, neginf: float | None) -> torch.Tensor:
    return torch.nan_to_num(x, nan, posinf, neginf)


@implements(OPS["astype"])
def _astype(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return x.to(to_torch_dtype(DTYPES[dtype]))
