"""Operations without arguments: tensors that are cheaper to make than to send."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import DTypeError, GraphError, ShapeError
from patchbay.ir.dtypes import DTYPES, DType, bool_, float32, int64, promote_scalar, scalar_kind
from patchbay.ir.ops.rules import check_takes, require_extents
from patchbay.ir.ops.spec import AttrSpec, OpSpec, ShapeRule, TensorSpec, ValueSpec

#: Integers up to here are exact in the float64 that extents are computed in.
_EXACT = 2**53


def _op(name: str, doc: str, rule: ShapeRule, attrs: tuple[AttrSpec, ...]) -> OpSpec:
    return OpSpec(name=name, params=(), rule=rule, doc=doc, category="creation", attrs=attrs)


def natural_dtype(*values: bool | int | float) -> DType:
    """The dtype of a tensor made of Python numbers: bool, int64 or float32, by the widest of their kinds."""
    kinds = {scalar_kind(v) for v in values}
    return float32 if "float" in kinds else int64 if "int" in kinds else bool_


def _wanted(op: str, attrs: Mapping[str, Any], default: DType) -> DType:
    dtype = default if attrs["dtype"] is None else DTYPES[attrs["dtype"]]
    check_takes(op, dtype, "any")
    return dtype


def check_number(op: str, value: bool | int | float, dtype: DType) -> None:
    """Raise DTypeError unless the Python number `value` can be held by `dtype`."""
    if promote_scalar(dtype, scalar_kind(value)) != dtype:
        raise DTypeError(f"{op}: {value!r} does not fit into {dtype}")
    if dtype.is_integer:
        bits = 8 * dtype.itemsize
        low, high = (0, 2**bits - 1) if dtype.kind == "uint" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if not low <= value <= high:
            raise DTypeError(f"{op}: {value!r} does not fit into {dtype}")


def _filled(name: str) -> ShapeRule:
    def rule(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
        del args
        require_extents(name, attrs["shape"])
        return TensorSpec(attrs["shape"], _wanted(name, attrs, float32))

    return rule


def _full(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del args
    value = attrs["fill_value"]
    require_extents("full", attrs["shape"])
    dtype = _wanted("full", attrs, natural_dtype(value))
    check_number("full", value, dtype)
    return TensorSpec(attrs["shape"], dtype)


def arange_bounds(attrs: Mapping[str, Any]) -> tuple[int | float, int | float, int | float]:
    """(start, stop, step) of arange, where a single bound is the stop."""
    start, stop, step = attrs["start"], attrs["stop"], attrs["step"]
    return (0, start, step) if stop is None else (start, stop, step)


def _arange(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del args
    start, stop, step = arange_bounds(attrs)
    dtype = _wanted("arange", attrs, natural_dtype(0, start, stop, step))
    check_takes("arange", dtype, "numeric")
    for value in (start, stop, step):
        if isinstance(value, bool) or not abs(value) <= _EXACT:
            raise GraphError(f"arange: bounds and step must be numbers within 2**53, got {value!r}")
        check_number("arange", value, dtype)
    if step == 0:
        raise GraphError("arange: step is 0")
    length = -((start - stop) // step) if dtype.is_integer else math.ceil((stop - start) / step)
    return TensorSpec((max(0, int(length)),), dtype)


def _eye(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del args
    rows, columns = attrs["n_rows"], attrs["n_cols"]
    shape = (rows, rows if columns is None else columns)
    require_extents("eye", shape)
    return TensorSpec(shape, _wanted("eye", attrs, float32))


def _linspace(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del args
    dtype = _wanted("linspace", attrs, float32)
    check_takes("linspace", dtype, "float")
    if attrs["num"] < 0:
        raise ShapeError(f"linspace: num must be at least 0, got {attrs['num']}")
    for name in ("start", "stop"):
        if isinstance(attrs[name], bool) or not math.isfinite(attrs[name]):
            raise GraphError(f"linspace: {name} must be finite, got {attrs[name]!r}")
    return TensorSpec((attrs["num"],), dtype)


_SHAPE = AttrSpec("shape", "shape", doc="extents")
_DTYPE = AttrSpec("dtype", "dtype", None, "float32 by default")

CREATION = (
    _op("zeros", "Zeros.", _filled("zeros"), (_SHAPE, _DTYPE)),
    _op("ones", "Ones.", _filled("ones"), (_SHAPE, _DTYPE)),
    _op(
        "full",
        "One number everywhere.",
        _full,
        (
            _SHAPE,
            AttrSpec("fill_value", "scalar", doc="the number"),
            AttrSpec("dtype", "dtype", None, "bool, int64 or float32 by default, as the number"),
        ),
    ),
    _op(
        "arange",
        "Evenly spaced numbers from start up to, not including, stop.",
        _arange,
        (
            AttrSpec("start", "scalar", doc="first number; the stop when it is alone"),
            AttrSpec("stop", "scalar", None, "where to stop"),
            AttrSpec("step", "scalar", 1, "distance"),
            AttrSpec("dtype", "dtype", None, "int64 or float32 by default, as the numbers"),
        ),
    ),
    _op(
        "eye",
        "Ones on a diagonal, zeros elsewhere.",
        _eye,
        (
            AttrSpec("n_rows", "int", doc="rows"),
            AttrSpec("n_cols", "int", None, "columns; as many as rows by default"),
            AttrSpec("k", "int", 0, "which diagonal"),
            _DTYPE,
        ),
    ),
    _op(
        "linspace",
        "Numbers evenly spaced between two ends.",
        _linspace,
        (
            AttrSpec("start", "scalar", doc="first number"),
            AttrSpec("stop", "scalar", doc="last number"),
            AttrSpec("num", "int", doc="how many"),
            AttrSpec("endpoint", "bool", True, "whether stop is the last of them"),
            _DTYPE,
        ),
    ),
)
