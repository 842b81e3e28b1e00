"""Operations that rearrange elements without computing: reshapes, transposes, joins, repeats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import DTypeError, ShapeError
from patchbay.ir.dtypes import promote_scalar, scalar_kind
from patchbay.ir.ops.rules import Takes, check_takes, promoted, require_extents, require_ndim
from patchbay.ir.ops.spec import (
    AttrSpec,
    OpSpec,
    ShapeRule,
    TensorSpec,
    ValueSpec,
    no_flops,
    normalize_axes,
    normalize_axis,
)


def _op(
    name: str,
    doc: str,
    rule: ShapeRule,
    attrs: tuple[AttrSpec, ...] = (),
    *,
    params: tuple[str, ...] = ("x",),
    variadic: bool = False,
    takes: Takes = "carry",
) -> OpSpec:
    def checked(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        for arg in args:
            check_takes(name, arg.dtype, takes)
        return rule(args, attrs)

    return OpSpec(
        name=name,
        params=params,
        rule=checked,
        doc=doc,
        category="shape",
        attrs=attrs,
        flops=no_flops,
        variadic=variadic,
    )


def resolve_shape(op: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """`shape` with its -1, if any, replaced by the extent that makes it hold `size` elements.

    Raises:
        ShapeError: it cannot hold exactly `size` elements.
    """
    if shape.count(-1) > 1:
        raise ShapeError(f"{op}: shape {list(shape)} holds more than one -1")
    known = [e for e in shape if e != -1]
    require_extents(op, tuple(known))
    rest = math.prod(known)
    if len(known) < len(shape):
        if rest == 0 or size % rest:
            raise ShapeError(f"{op}: {size} elements do not fit shape {list(shape)}")
        return tuple(size // rest if e == -1 else e for e in shape)
    if rest != size:
        raise ShapeError(f"{op}: {size} elements do not fit shape {list(shape)} of {rest}")
    return shape


def _reshape(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    return TensorSpec(resolve_shape("reshape", attrs["shape"], x.size), x.dtype)


def _permute_dims(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    axes = [normalize_axis("permute_dims", a, x.ndim) for a in attrs["axes"]]
    if sorted(axes) != list(range(x.ndim)):
        raise ShapeError(f"permute_dims: axes {list(attrs['axes'])} do not name each of {x.ndim} dimensions once")
    return TensorSpec(tuple(x.shape[a] for a in axes), x.dtype)


def _matrix_transpose(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    (x,) = args
    require_ndim("matrix_transpose", "x", x, 2)
    return TensorSpec((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)


def moved_axes(
    op: str, source: int | tuple[int, ...] | None, destination: int | tuple[int, ...] | None, ndim: int
) -> tuple[int, ...]:
    """The permutation that moves axes `source` to `destination` and keeps the order of the others."""
    if source is None or destination is None:
        raise ShapeError(f"{op}: source and destination are needed")
    pairs = [
        tuple(normalize_axis(op, a, ndim) for a in ((axes,) if isinstance(axes, int) else axes))
        for axes in (source, destination)
    ]
    if len(pairs[0]) != len(pairs[1]) or any(len(set(p)) != len(p) for p in pairs):
        raise ShapeError(f"{op}: source {source} and destination {destination} must be as many, each without repeats")
    order = [a for a in range(ndim) if a not in pairs[0]]
    for target, origin in sorted(zip(pairs[1], pairs[0], strict=True)):
        order.insert(target, origin)
    return tuple(order)


def _moveaxis(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    order = moved_axes("moveaxis", attrs["source"], attrs["destination"], x.ndim)
    return TensorSpec(tuple(x.shape[a] for a in order), x.dtype)


def _swapaxes(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    first, second = (normalize_axis("swapaxes", attrs[name], x.ndim) for name in ("axis1", "axis2"))
    shape = list(x.shape)
    shape[first], shape[second] = shape[second], shape[first]
    return TensorSpec(tuple(shape), x.dtype)


def _squeeze(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    if attrs["axis"] is None:
        raise ShapeError("squeeze: say which axis")
    axes = normalize_axes("squeeze", attrs["axis"], x.ndim)
    for axis in axes:
        if x.shape[axis] != 1:
            raise ShapeError(f"squeeze: axis {axis} of {x} has extent {x.shape[axis]}, not 1")
    return TensorSpec(tuple(e for i, e in enumerate(x.shape) if i not in axes), x.dtype)


def _expand_dims(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    axis = normalize_axis("expand_dims", attrs["axis"], x.ndim + 1)
    return TensorSpec((*x.shape[:axis], 1, *x.shape[axis:]), x.dtype)


def _broadcast_to(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), shape = args, attrs["shape"]
    require_extents("broadcast_to", shape)
    fits = x.ndim <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ShapeError(f"broadcast_to: {x} does not broadcast to {list(shape)}")
    return TensorSpec(shape, x.dtype)


def _concat(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    dtype = promoted("concat", args, "carry")
    if attrs["axis"] is None:
        return TensorSpec((sum(a.size for a in args),), dtype)
    if not isinstance(attrs["axis"], int):
        raise ShapeError(f"concat: axis must be one axis or None, got {attrs['axis']}")
    first = args[0]
    axis = normalize_axis("concat", attrs["axis"], first.ndim)
    for other in args[1:]:
        same = other.ndim == first.ndim and all(
            other.shape[i] == first.shape[i] for i in range(first.ndim) if i != axis
        )
        if not same:
            raise ShapeError(f"concat: {first} and {other} differ in more than axis {axis}")
    joined = sum(a.shape[axis] for a in args)
    return TensorSpec((*first.shape[:axis], joined, *first.shape[axis + 1 :]), dtype)


def _stack(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    dtype = promoted("stack", args, "carry")
    first = args[0]
    for other in args[1:]:
        if other.shape != first.shape:
            raise ShapeError(f"stack: {first} and {other} differ in shape")
    axis = normalize_axis("stack", attrs["axis"], first.ndim + 1)
    return TensorSpec((*first.shape[:axis], len(args), *first.shape[axis:]), dtype)


def _flip(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    normalize_axes("flip", attrs["axis"], args[0].ndim)
    return args[0]


def _roll(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), shift, axis = args, attrs["shift"], attrs["axis"]
    if shift is None:
        raise ShapeError("roll: say by how much")
    if axis is None and not isinstance(shift, int):
        raise ShapeError("roll: without an axis, shift must be one int")
    if axis is not None:
        axes = (axis,) if isinstance(axis, int) else axis
        normalize_axes("roll", axes, x.ndim)
        shifts = (shift,) * len(axes) if isinstance(shift, int) else shift
        if len(shifts) != len(axes):
            raise ShapeError(f"roll: {len(shifts)} shifts for {len(axes)} axes")
    return x


def _repeat(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), times = args, attrs["repeats"]
    require_extents("repeat", (times,))
    if attrs["axis"] is None:
        return TensorSpec((x.size * times,), x.dtype)
    axis = normalize_axis("repeat", attrs["axis"], x.ndim)
    return TensorSpec((*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :]), x.dtype)


def _tile(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), times = args, attrs["repetitions"]
    require_extents("tile", times)
    ndim = max(x.ndim, len(times))
    shape = (1,) * (ndim - x.ndim) + x.shape
    times = (1,) * (ndim - len(times)) + times
    return TensorSpec(tuple(e * t for e, t in zip(shape, times, strict=True)), x.dtype)


def _triangle(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    require_ndim("tril, triu", "x", args[0], 2)
    return args[0]


def diagonal_length(rows: int, columns: int, offset: int) -> int:
    """How many elements the `offset`-th diagonal of a matrix has."""
    return max(0, min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns))


def _diagonal(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,) = args
    require_ndim("diagonal", "x", x, 2)
    return TensorSpec((*x.shape[:-2], diagonal_length(x.shape[-2], x.shape[-1], attrs["offset"])), x.dtype)


def _pad(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), pads = args, attrs["pad"]
    if len(pads) % 2 or len(pads) > 2 * x.ndim or any(p < 0 for p in pads):
        raise ShapeError(
            f"pad: {list(pads)} must be (before, after) of the last axis, then of the one before it, ..., none negative"
        )
    if promote_scalar(x.dtype, scalar_kind(attrs["value"])) != x.dtype:
        raise DTypeError(f"pad: value {attrs['value']!r} does not fit into {x.dtype}")
    shape = list(x.shape)
    for i in range(len(pads) // 2):
        shape[-1 - i] += pads[2 * i] + pads[2 * i + 1]
    return TensorSpec(tuple(shape), x.dtype)


def _unfold(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    (x,), size, step = args, attrs["size"], attrs["step"]
    axis = normalize_axis("unfold", attrs["axis"], x.ndim)
    if size < 1 or step < 1 or size > x.shape[axis]:
        raise ShapeError(f"unfold: windows of {size} every {step} do not fit axis {axis} of {x}")
    return TensorSpec((*x.shape[:axis], (x.shape[axis] - size) // step + 1, *x.shape[axis + 1 :], size), x.dtype)


_K = AttrSpec("k", "int", 0, "diagonal to cut at; positive ones lie above the main one")

SHAPE = (
    _op(
        "reshape",
        "The same elements in row-major order in another shape.",
        _reshape,
        (AttrSpec("shape", "shape", doc="extents; one may be -1"),),
    ),
    _op(
        "permute_dims",
        "Axes in another order.",
        _permute_dims,
        (AttrSpec("axes", "ints", doc="the axes in their new order"),),
    ),
    _op("matrix_transpose", "The last two axes swapped.", _matrix_transpose),
    _op(
        "moveaxis",
        "Some axes moved, the others in their order.",
        _moveaxis,
        (AttrSpec("source", "axes", doc="axes to move"), AttrSpec("destination", "axes", doc="where they go")),
    ),
    _op(
        "swapaxes",
        "Two axes swapped (numpy.swapaxes).",
        _swapaxes,
        (AttrSpec("axis1", "axis", doc="one axis"), AttrSpec("axis2", "axis", doc="the other")),
    ),
    _op("squeeze", "Axes of extent 1 removed.", _squeeze, (AttrSpec("axis", "axes", doc="the axis or axes"),)),
    _op("expand_dims", "A new axis of extent 1.", _expand_dims, (AttrSpec("axis", "axis", 0, "where it will stand"),)),
    _op(
        "broadcast_to",
        "Axes of extent 1 repeated to a shape.",
        _broadcast_to,
        (AttrSpec("shape", "shape", doc="the shape"),),
    ),
    _op(
        "concat",
        "Tensors joined along an axis.",
        _concat,
        (AttrSpec("axis", "axes", 0, "the axis; None joins the flattened tensors"),),
        params=("arrays",),
        variadic=True,
        takes="any",
    ),
    _op(
        "stack",
        "Tensors of one shape joined along a new axis.",
        _stack,
        (AttrSpec("axis", "axis", 0, "where the new axis stands"),),
        params=("arrays",),
        variadic=True,
        takes="any",
    ),
    _op(
        "flip", "Axes reversed.", _flip, (AttrSpec("axis", "axes", None, "axis or axes; all by default"),), takes="any"
    ),
    _op(
        "roll",
        "Elements moved along axes, the last ones coming in at the front.",
        _roll,
        (
            AttrSpec("shift", "axes", doc="by how many positions, one int or one per axis"),
            AttrSpec("axis", "axes", None, "axis or axes; the flattened tensor by default"),
        ),
        takes="any",
    ),
    _op(
        "repeat",
        "Each element repeated in place.",
        _repeat,
        (
            AttrSpec("repeats", "int", doc="how often"),
            AttrSpec("axis", "axis", None, "along which axis; the flattened tensor by default"),
        ),
        takes="any",
    ),
    _op(
        "tile",
        "The tensor repeated as a whole.",
        _tile,
        (AttrSpec("repetitions", "shape", doc="how often along each axis"),),
        takes="any",
    ),
    _op("tril", "The lower triangle of the last two axes; zero above it.", _triangle, (_K,), takes="any"),
    _op("triu", "The upper triangle of the last two axes; zero below it.", _triangle, (_K,), takes="any"),
    _op(
        "diagonal",
        "A diagonal of the last two axes (array API linalg.diagonal).",
        _diagonal,
        (AttrSpec("offset", "int", 0, "which; positive ones lie above the main one"),),
    ),
    _op(
        "pad",
        "A constant put around the tensor (torch.nn.functional.pad).",
        _pad,
        (
            AttrSpec("pad", "ints", doc="before and after the last axis, then the one before it, and so on"),
            AttrSpec("value", "scalar", 0, "the constant"),
        ),
        takes="any",
    ),
    _op(
        "unfold",
        "Windows along an axis, as a new last axis (torch.Tensor.unfold).",
        _unfold,
        (
            AttrSpec("axis", "axis", doc="the axis"),
            AttrSpec("size", "int", doc="extent of a window"),
            AttrSpec("step", "int", 1, "distance between windows"),
        ),
    ),
)
