"""The operations of neural networks: names and conventions of torch.nn.functional, with ``axis`` for its ``dim``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import DTypeError, GraphError, ShapeError
from patchbay.ir.dtypes import DTYPES, bool_
from patchbay.ir.ops.rules import check_takes, flops_per_output, promoted, require_ndim
from patchbay.ir.ops.spec import (
    AttrSpec,
    FlopsRule,
    OpSpec,
    ShapeRule,
    TensorSpec,
    ValueSpec,
    broadcast_shapes,
    no_workspace,
    normalize_axis,
)


def _op(
    name: str,
    params: tuple[str, ...],
    doc: str,
    rule: ShapeRule,
    attrs: tuple[AttrSpec, ...] = (),
    *,
    flops: FlopsRule,
    optional: int = 0,
    workspace: FlopsRule = no_workspace,
) -> OpSpec:
    return OpSpec(
        name=name,
        params=params,
        rule=rule,
        doc=f"{doc} (torch.nn.functional.{name}).",
        category="nn",
        attrs=attrs,
        flops=flops,
        optional=optional,
        workspace=workspace,
    )


def _per_input(count: int) -> FlopsRule:
    def flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
        del out, attrs
        return count * args[0].size

    return flops


def _broadcast_pair(factor: int) -> FlopsRule:
    """`factor` per element of the first two arguments broadcast together: FLOPs, or bytes of temporaries."""

    def count(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
        del out, attrs
        return factor * math.prod(broadcast_shapes("nn", args[0].shape, args[1].shape))

    return count


def _softmax(name: str) -> ShapeRule:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        (x,) = args
        dtype = x.dtype if attrs["dtype"] is None else DTYPES[attrs["dtype"]]
        for checked in (x.dtype, dtype):
            check_takes(name, checked, "float")
        normalize_axis(name, attrs["axis"], x.ndim)
        return TensorSpec(x.shape, dtype)

    return rule


def _normed_shape(op: str, x: TensorSpec, attrs: Mapping[str, Any]) -> tuple[int, ...]:
    require_ndim(op, "x", x, 1)
    shape: tuple[int, ...] = x.shape[-1:] if attrs["normalized_shape"] is None else attrs["normalized_shape"]
    if not shape or x.shape[-len(shape) :] != shape:
        raise ShapeError(f"{op}: normalized_shape {list(shape)} is not how {x} ends")
    return shape


def _norm(name: str) -> ShapeRule:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        shape = _normed_shape(name, args[0], attrs)
        for parameter in args[1:]:
            if parameter.shape != shape:
                raise ShapeError(f"{name}: weight or bias {parameter} must have shape {list(shape)}")
        return TensorSpec(args[0].shape, promoted(name, args, "float"))

    return rule


def class_axis(op: str, axis: int | None, ndim: int) -> int:
    """The axis of classes: `axis`, or torch's, which is 1 (0 for one dimension)."""
    if axis is None:
        axis = 1 if ndim > 1 else 0
    return normalize_axis(op, axis, ndim)


def _classified(name: str) -> ShapeRule:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        x, target = args
        check_takes(name, x.dtype, "float")
        require_ndim(name, "input", x, 1)
        if not target.dtype.is_integer:
            raise DTypeError(f"{name}: the target must hold class numbers as integers, got {target}")
        axis = class_axis(name, attrs["axis"], x.ndim)
        rest = x.shape[:axis] + x.shape[axis + 1 :]
        if target.shape != rest:
            raise ShapeError(f"{name}: target {target} must have shape {list(rest)}: {x} without its class axis {axis}")
        return TensorSpec(rest if attrs["reduction"] == "none" else (), x.dtype)

    return rule


def _same_shapes(name: str) -> ShapeRule:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        x, target = args
        dtype = promoted(name, args, "float")
        if x.shape != target.shape:
            raise ShapeError(f"{name}: {x} and {target} differ in shape; broadcast_to makes that explicit")
        if attrs["reduction"] == "batchmean":
            require_ndim(name, "input", x, 1)
        return TensorSpec(x.shape if attrs["reduction"] == "none" else (), dtype)

    return rule


def _cosine_similarity(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    dtype = promoted("cosine_similarity", args, "float")
    shape = broadcast_shapes("cosine_similarity", *(a.shape for a in args))
    axis = normalize_axis("cosine_similarity", attrs["axis"], len(shape))
    return TensorSpec(shape[:axis] + shape[axis + 1 :], dtype)


def _normalize(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    check_takes("normalize", x.dtype, "float")
    axis = normalize_axis("normalize", attrs["axis"], x.ndim)
    if math.isnan(attrs["p"]) or ((attrs["p"] < 0 or math.isinf(attrs["p"])) and not x.shape[axis]):
        raise ShapeError(f"normalize: p={attrs['p']} of {x} is undefined")
    return x


def _linear(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    x, weight, *bias = args
    dtype = promoted("linear", args, "float")
    require_ndim("linear", "x", x, 1)
    require_ndim("linear", "weight", weight, 2, 2)
    d_out, d_in = weight.shape
    if x.shape[-1] != d_in or any(b.shape != (d_out,) for b in bias):
        raise ShapeError(f"linear: {', '.join(map(str, args))}: x must end in {d_in}, a bias must be [{d_out}]")
    return TensorSpec((*x.shape[:-1], d_out), dtype)


def _linear_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del attrs
    assert isinstance(out, TensorSpec)
    return 2 * out.size * args[0].shape[-1]


def _attention(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    op = "scaled_dot_product_attention"
    q, k, v, *mask = args
    dtype = promoted(op, args[:3], "float")
    for name, spec in zip("qkv", args, strict=False):
        require_ndim(op, name, spec, 2)
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or not q.shape[-1]:
        raise ShapeError(f"{op}: q {q}, k {k}, v {v}: q and k must end alike, k and v must be as long")
    leading = [spec.shape[:-2] for spec in args[:3]]
    if attrs["enable_gqa"]:
        if any(len(shape) < 1 for shape in leading):
            raise ShapeError(f"{op}: enable_gqa needs an axis of heads")
        heads, others = leading[0][-1], {shape[-1] for shape in leading[1:]}
        if len(others) != 1 or not min(others) or heads % min(others):
            raise ShapeError(f"{op}: {heads} query heads are no multiple of the key and value heads {sorted(others)}")
        leading = [(*shape[:-1], heads) for shape in leading]
    batch = broadcast_shapes(op, *leading)
    if mask:
        if attrs["is_causal"]:
            raise GraphError(f"{op}: is_causal and a mask exclude each other")
        if mask[0].dtype != bool_:
            check_takes(op, mask[0].dtype, "float")
        scores = (*batch, q.shape[-2], k.shape[-2])
        if broadcast_shapes(op, mask[0].shape, scores) != scores:
            raise ShapeError(f"{op}: mask {mask[0]} does not broadcast to {list(scores)}")
    scale = attrs["scale"]
    if scale is not None and not math.isfinite(scale):
        raise GraphError(f"{op}: scale must be finite, got {scale}")
    return TensorSpec((*batch, q.shape[-2], v.shape[-1]), dtype)


def _attention_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del attrs
    assert isinstance(out, TensorSpec)
    queries = math.prod(out.shape[:-1])
    return 2 * queries * args[1].shape[-2] * (args[0].shape[-1] + out.shape[-1] + 3)


def _attention_workspace(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """Scores and pattern, and arguments whose leading axes are written out."""
    del attrs
    assert isinstance(out, TensorSpec)
    batch = math.prod(out.shape[:-2])
    written = batch * sum(math.prod(a.shape[-2:]) for a in args[:3])
    return out.dtype.itemsize * (2 * math.prod(out.shape[:-1]) * args[1].shape[-2] + written)


_AXIS = AttrSpec("axis", "axis", -1, "the axis")
_TORCH_AXIS = AttrSpec("axis", "axis", 1, "the axis; 1 as in torch")
_CLASS_AXIS = AttrSpec("axis", "axis", None, "axis of classes; as in torch 1 by default, or 0 for one dimension")
_REDUCTION = AttrSpec("reduction", "str", "mean", "how elements are folded", ("mean", "sum", "none"))
_IGNORE = AttrSpec("ignore_index", "int", -100, "targets of this number count for nothing")
_SHAPE = AttrSpec("normalized_shape", "shape", None, "trailing extents to normalise over; the last axis by default")
_SOFT_DTYPE = AttrSpec("dtype", "dtype", None, "dtype to cast to first, and of the result")

NN = (
    _op(
        "softmax",
        ("x",),
        "Exponentials that sum to 1 along an axis",
        _softmax("softmax"),
        (_AXIS, _SOFT_DTYPE),
        flops=flops_per_output(5),
    ),
    _op(
        "log_softmax",
        ("x",),
        "Logarithm of softmax",
        _softmax("log_softmax"),
        (_AXIS, _SOFT_DTYPE),
        flops=flops_per_output(5),
    ),
    _op(
        "layer_norm",
        ("x", "weight", "bias"),
        "Mean taken off, divided by the standard deviation, then scaled and shifted",
        _norm("layer_norm"),
        (_SHAPE, AttrSpec("eps", "float", 1e-5, "added to the variance")),
        flops=flops_per_output(8),
        optional=2,
    ),
    _op(
        "rms_norm",
        ("x", "weight"),
        "Divided by the root of the mean square, then scaled",
        _norm("rms_norm"),
        (_SHAPE, AttrSpec("eps", "float", None, "added to the mean square; the dtype's epsilon by default")),
        flops=flops_per_output(5),
        optional=1,
    ),
    _op(
        "cross_entropy",
        ("input", "target"),
        "Negative log softmax of the target class",
        _classified("cross_entropy"),
        (_REDUCTION, _CLASS_AXIS, _IGNORE),
        flops=_per_input(6),
        workspace=lambda args, out, attrs: 2 * args[0].nbytes,
    ),
    _op(
        "nll_loss",
        ("input", "target"),
        "Negative of the target class's log-probability",
        _classified("nll_loss"),
        (_REDUCTION, _CLASS_AXIS, _IGNORE),
        flops=_per_input(1),
        workspace=lambda args, out, attrs: args[0].nbytes,
    ),
    _op(
        "kl_div",
        ("input", "target"),
        "Kullback-Leibler divergence of the target from input, which holds log-probabilities",
        _same_shapes("kl_div"),
        (
            AttrSpec("reduction", "str", "mean", "how elements are folded", ("mean", "batchmean", "sum", "none")),
            AttrSpec("log_target", "bool", False, "the target holds log-probabilities too"),
        ),
        flops=_per_input(4),
        workspace=_broadcast_pair(16),
    ),
    _op(
        "mse_loss",
        ("input", "target"),
        "Squared differences",
        _same_shapes("mse_loss"),
        (_REDUCTION,),
        flops=_per_input(3),
        workspace=_broadcast_pair(8),
    ),
    _op(
        "cosine_similarity",
        ("x1", "x2"),
        "Cosine of the angle between vectors along an axis",
        _cosine_similarity,
        (_TORCH_AXIS, AttrSpec("eps", "float", 1e-8, "least norm to divide by")),
        flops=_broadcast_pair(6),
        workspace=_broadcast_pair(16),
    ),
    _op(
        "normalize",
        ("x",),
        "Divided by the p-norm along an axis",
        _normalize,
        (
            AttrSpec("p", "float", 2.0, "order of the norm"),
            _TORCH_AXIS,
            AttrSpec("eps", "float", 1e-12, "least norm to divide by"),
        ),
        flops=flops_per_output(4),
    ),
    _op("linear", ("x", "weight", "bias"), "x @ weight.T + bias", _linear, flops=_linear_flops, optional=1),
    _op(
        "scaled_dot_product_attention",
        ("query", "key", "value", "attn_mask"),
        "softmax(query @ key.T * scale + mask) @ value",
        _attention,
        (
            AttrSpec("is_causal", "bool", False, "each position sees itself and earlier ones"),
            AttrSpec("scale", "float", None, "1 / sqrt(d_head) by default"),
            AttrSpec("enable_gqa", "bool", False, "query heads share key and value heads in groups"),
        ),
        flops=_attention_flops,
        optional=1,
        workspace=_attention_workspace,
    ),
)
