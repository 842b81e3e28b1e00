"""Operations on corresponding elements: arithmetic, comparisons, logic, activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import DTypeError
from patchbay.ir.dtypes import DTYPES, DType, bool_, float32, int64, promote_scalar, scalar_kind
from patchbay.ir.ops.rules import check_takes, elementwise, flops_per_output, promoted
from patchbay.ir.ops.spec import AttrSpec, OpSpec, TensorSpec, ValueSpec, broadcast_shapes, no_flops

X = ("x",)
PAIR = ("x1", "x2")

_ARITHMETIC = (
    elementwise("add", PAIR, "Sum x1 + x2 (logical or for bool).", takes="any"),
    elementwise("subtract", PAIR, "Difference x1 - x2."),
    elementwise("multiply", PAIR, "Product x1 * x2 (logical and for bool).", takes="any"),
    elementwise("divide", PAIR, "Quotient x1 / x2; float32 for integers and bool.", takes="any", result="float"),
    elementwise("floor_divide", PAIR, "Quotient rounded towards minus infinity; integers divided by 0 give 0."),
    elementwise("remainder", PAIR, "Remainder with the sign of x2; integers modulo 0 give 0."),
    elementwise("pow", PAIR, "x1 to the power x2; an integer to a negative power is truncated towards 0."),
    elementwise("negative", X, "-x."),
    elementwise("positive", X, "x itself."),
    elementwise("stop_gradient", X, "x itself, taken as a constant when differentiated (jax.lax.stop_gradient)."),
    elementwise("abs", X, "Absolute value."),
    elementwise("sign", X, "-1, 0 or 1 by sign; NaN stays NaN."),
    elementwise("square", X, "x * x."),
    elementwise("minimum", PAIR, "The smaller one; NaN if either is NaN.", takes="any"),
    elementwise("maximum", PAIR, "The larger one; NaN if either is NaN.", takes="any"),
    elementwise("floor", X, "Rounded towards minus infinity; integers stay as they are."),
    elementwise("ceil", X, "Rounded towards plus infinity; integers stay as they are."),
    elementwise("round", X, "Rounded to the nearest integer, halves to even; integers stay as they are."),
    elementwise("trunc", X, "Rounded towards zero; integers stay as they are."),
)

_FUNCTIONS = (
    *tuple(
        elementwise(name, X, doc, takes="any", result="float")
        for name, doc in (
            ("exp", "e to the power x."),
            ("exp2", "2 to the power x (torch.exp2)."),
            ("expm1", "exp(x) - 1, accurate near 0."),
            ("log", "Natural logarithm."),
            ("log1p", "log(1 + x), accurate near 0."),
            ("log2", "Logarithm to base 2."),
            ("log10", "Logarithm to base 10."),
            ("sqrt", "Square root."),
            ("rsqrt", "1 / sqrt(x) (torch.rsqrt)."),
            ("reciprocal", "1 / x."),
            ("sin", "Sine of radians."),
            ("cos", "Cosine of radians."),
            ("tan", "Tangent of radians."),
            ("asin", "Inverse sine, in radians."),
            ("acos", "Inverse cosine, in radians."),
            ("atan", "Inverse tangent, in radians."),
            ("sinh", "Hyperbolic sine."),
            ("cosh", "Hyperbolic cosine."),
            ("tanh", "Hyperbolic tangent."),
            ("asinh", "Inverse hyperbolic sine."),
            ("acosh", "Inverse hyperbolic cosine."),
            ("atanh", "Inverse hyperbolic tangent."),
            ("erf", "Error function (torch.erf)."),
            ("sigmoid", "1 / (1 + exp(-x)) (torch.sigmoid)."),
        )
    ),
    elementwise("atan2", PAIR, "Angle of the point (x2, x1), in radians.", takes="any", result="float"),
    elementwise("logaddexp", PAIR, "log(exp(x1) + exp(x2)), without overflow.", takes="any", result="float"),
)

_COMPARISONS = (
    *tuple(
        elementwise(name, PAIR, doc, takes="any", result="bool")
        for name, doc in (
            ("equal", "x1 == x2."),
            ("not_equal", "x1 != x2."),
            ("less", "x1 < x2."),
            ("less_equal", "x1 <= x2."),
            ("greater", "x1 > x2."),
            ("greater_equal", "x1 >= x2."),
            ("logical_and", "True where both are nonzero."),
            ("logical_or", "True where either is nonzero."),
            ("logical_xor", "True where exactly one is nonzero."),
        )
    ),
    elementwise("logical_not", X, "True where x is zero.", takes="any", result="bool"),
    elementwise("isnan", X, "True where x is NaN.", takes="any", result="bool"),
    elementwise("isinf", X, "True where x is an infinity.", takes="any", result="bool"),
    elementwise("isfinite", X, "True where x is neither NaN nor an infinity.", takes="any", result="bool"),
)

_BITS = (
    elementwise("bitwise_and", PAIR, "Bits set in both.", takes="bits"),
    elementwise("bitwise_or", PAIR, "Bits set in either.", takes="bits"),
    elementwise("bitwise_xor", PAIR, "Bits set in exactly one.", takes="bits"),
    elementwise("bitwise_invert", X, "Every bit flipped.", takes="bits"),
    elementwise("bitwise_left_shift", PAIR, "x1 shifted left by x2 bits.", takes="int"),
    elementwise("bitwise_right_shift", PAIR, "x1 shifted right by x2 bits, keeping its sign.", takes="int"),
)

_ACTIVATIONS = (
    elementwise("relu", X, "max(x, 0) (torch.nn.functional.relu)."),
    elementwise(
        "gelu",
        X,
        "x times the normal distribution function of x (torch.nn.functional.gelu).",
        takes="float",
        attrs=(AttrSpec("approximate", "str", "none", "`tanh` for the approximation of GPT-2", ("none", "tanh")),),
        flops=flops_per_output(8),
    ),
    elementwise("quick_gelu", X, "x * sigmoid(1.702 x), as in CLIP.", takes="float", flops=flops_per_output(4)),
    elementwise("silu", X, "x * sigmoid(x) (torch.nn.functional.silu).", takes="float", flops=flops_per_output(4)),
    elementwise(
        "softplus",
        X,
        "log(1 + exp(beta x)) / beta, and x itself above the threshold (torch.nn.functional.softplus).",
        takes="float",
        attrs=(
            AttrSpec("beta", "float", 1.0, "sharpness"),
            AttrSpec("threshold", "float", 20.0, "value of beta x above which the result is x"),
        ),
        flops=flops_per_output(4),
    ),
    elementwise(
        "leaky_relu",
        X,
        "x where positive, negative_slope * x elsewhere (torch.nn.functional.leaky_relu).",
        takes="float",
        attrs=(AttrSpec("negative_slope", "float", 0.01, "slope below 0"),),
    ),
    elementwise(
        "elu",
        X,
        "x where positive, alpha * expm1(x) elsewhere (torch.nn.functional.elu).",
        takes="float",
        attrs=(AttrSpec("alpha", "float", 1.0, "scale below 0"),),
        flops=flops_per_output(3),
    ),
    elementwise("log_sigmoid", X, "log(sigmoid(x)) (torch.nn.functional.logsigmoid).", takes="float"),
    elementwise(
        "hardtanh",
        X,
        "x held between two bounds (torch.nn.functional.hardtanh).",
        takes="float",
        attrs=(AttrSpec("min_val", "float", -1.0, "lower bound"), AttrSpec("max_val", "float", 1.0, "upper bound")),
    ),
    elementwise(
        "heaviside",
        PAIR,
        "0 where x1 is negative, 1 where positive, x2 where zero (torch.heaviside); the step of JumpReLU.",
        takes="any",
    ),
)


def _nan_to_num(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    check_takes("nan_to_num", args[0].dtype, "any")
    return args[0]


def _clip(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    check_takes("clip", x.dtype, "numeric")
    for name in ("min", "max"):
        bound = attrs[name]
        if bound is not None and promote_scalar(x.dtype, scalar_kind(bound)) != x.dtype:
            raise DTypeError(f"clip: {name}={bound!r} does not fit into {x.dtype}; cast x with astype first")
    return x


_OF_KIND: Mapping[str, DType] = {"bool": bool_, "int": int64, "float": float32}


def _where(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    condition, *branches = args
    if condition.scalar is not None or condition.dtype != bool_:
        raise DTypeError(f"where: the condition must be a bool tensor, got {condition}; compare first")
    kinds = [b.scalar for b in branches if b.scalar is not None]
    if len(kinds) == 2:  # both are Python numbers: the wider kind, in torch's default size
        dtype = max((_OF_KIND[k] for k in kinds), key=lambda d: ("bool", "int", "float").index(d.kind))
    else:
        dtype = promoted("where", branches, "any")
    return TensorSpec(broadcast_shapes("where", *(a.shape for a in args)), dtype)


def _astype(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    return TensorSpec(args[0].shape, DTYPES[attrs["dtype"]])


_OTHERS = (
    OpSpec(
        name="where",
        params=("condition", "x1", "x2"),
        rule=_where,
        doc="x1 where the condition holds, x2 elsewhere.",
        category="elementwise",
        scalars=True,
    ),
    OpSpec(
        name="clip",
        params=X,
        rule=_clip,
        doc="x held between two numbers.",
        category="elementwise",
        attrs=(AttrSpec("min", "scalar", None, "lower bound"), AttrSpec("max", "scalar", None, "upper bound")),
    ),
    OpSpec(
        name="nan_to_num",
        params=X,
        rule=_nan_to_num,
        doc="NaN and infinities replaced by numbers, by default 0 and the dtype's extremes (torch.nan_to_num).",
        category="elementwise",
        attrs=(
            AttrSpec("nan", "float", 0.0, "instead of NaN"),
            AttrSpec("posinf", "float", None, "instead of plus infinity"),
            AttrSpec("neginf", "float", None, "instead of minus infinity"),
        ),
    ),
    OpSpec(
        name="astype",
        params=X,
        rule=_astype,
        doc="x in another dtype.",
        category="elementwise",
        attrs=(AttrSpec("dtype", "dtype", doc="the dtype wanted"),),
        flops=no_flops,
    ),
)

ELEMENTWISE = (*_ARITHMETIC, *_FUNCTIONS, *_COMPARISONS, *_BITS, *_ACTIVATIONS, *_OTHERS)
