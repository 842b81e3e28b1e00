"""Products and factorisations of matrices; leading axes are batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import GraphError, ShapeError
from patchbay.ir.dtypes import DType
from patchbay.ir.ops.einsum import EINSUM
from patchbay.ir.ops.rules import (
    RESULT,
    check_takes,
    promoted,
    require_ndim,
)
from patchbay.ir.ops.spec import (
    AttrSpec,
    FlopsRule,
    OpSpec,
    ShapeRule,
    TensorSpec,
    ValueSpec,
    broadcast_shapes,
    input_size_flops,
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
    workspace: FlopsRule = no_workspace,
    results: tuple[str, ...] = (),
) -> OpSpec:
    return OpSpec(
        name=name,
        params=params,
        rule=rule,
        doc=doc,
        category="linalg",
        attrs=attrs,
        flops=flops,
        workspace=workspace,
        results=results,
    )


# --- products -----------------------------------------------------------------------------------------------------


def _matmul(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    a, b = args
    dtype = promoted("matmul", args, "float")
    require_ndim("matmul", "x1", a, 1)
    require_ndim("matmul", "x2", b, 1)
    inner = b.shape[-2] if b.ndim > 1 else b.shape[0]
    if a.shape[-1] != inner:
        raise ShapeError(f"matmul: {a} @ {b}: inner extents {a.shape[-1]} and {inner} differ")
    batch = broadcast_shapes("matmul", a.shape[:-2], b.shape[:-2])
    rows = a.shape[-2:-1]
    columns = b.shape[-1:] if b.ndim > 1 else ()
    return TensorSpec(batch + rows + columns, dtype)


def _matmul_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del attrs
    assert isinstance(out, TensorSpec)
    return 2 * out.size * args[0].shape[-1]


def _matmul_workspace(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """Batch axes that broadcast are written out before the product."""
    del attrs
    assert isinstance(out, TensorSpec)
    batch = broadcast_shapes("matmul", args[0].shape[:-2], args[1].shape[:-2])
    return out.dtype.itemsize * sum(math.prod(batch) * math.prod(a.shape[-2:]) for a in args)


def _vecdot(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    a, b = args
    dtype = promoted("vecdot", args, "float")
    require_ndim("vecdot", "x1", a, 1)
    require_ndim("vecdot", "x2", b, 1)
    shape = broadcast_shapes("vecdot", a.shape, b.shape)
    axis = normalize_axis("vecdot", attrs["axis"], len(shape)) - len(shape)
    extents = [s.shape[axis] if s.ndim >= -axis else 1 for s in args]
    if extents[0] != extents[1]:
        raise ShapeError(f"vecdot: {a} and {b} differ along axis {attrs['axis']}")
    return TensorSpec(tuple(e for i, e in enumerate(shape) if i - len(shape) != axis), dtype)


def _vecdot_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del out, attrs
    return 2 * math.prod(broadcast_shapes("vecdot", args[0].shape, args[1].shape))


def _vecdot_workspace(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    assert isinstance(out, TensorSpec)
    return out.dtype.itemsize * _vecdot_flops(args, out, attrs)


def tensordot_axes(
    attrs: Mapping[str, Any], first_ndim: int, second_ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that tensordot contracts, of its first and its second argument, non-negative.

    Raises:
        ShapeError: they are not as many on both sides, repeat, or do not exist.
    """
    first, second = attrs["axes_x1"], attrs["axes_x2"]
    if (first is None) != (second is None):
        raise ShapeError("tensordot: give axes_x1 and axes_x2 together, or axes alone")
    if first is None:
        count = attrs["axes"]
        if not 0 <= count <= min(first_ndim, second_ndim):
            raise ShapeError(f"tensordot: axes={count} for tensors of {first_ndim} and {second_ndim} dimensions")
        return tuple(range(first_ndim - count, first_ndim)), tuple(range(count))
    left = tuple(normalize_axis("tensordot", a, first_ndim) for a in first)
    right = tuple(normalize_axis("tensordot", a, second_ndim) for a in second)
    if len(left) != len(right) or len(set(left)) != len(left) or len(set(right)) != len(right):
        raise ShapeError(f"tensordot: axes {list(first)} and {list(second)} must be as many, each without repeats")
    return left, right


def _tensordot(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    a, b = args
    dtype = promoted("tensordot", args, "float")
    left, right = tensordot_axes(attrs, a.ndim, b.ndim)
    for i, j in zip(left, right, strict=True):
        if a.shape[i] != b.shape[j]:
            raise ShapeError(f"tensordot: axis {i} of {a} and axis {j} of {b} differ")
    kept = [e for i, e in enumerate(a.shape) if i not in left] + [e for j, e in enumerate(b.shape) if j not in right]
    return TensorSpec(tuple(kept), dtype)


def _tensordot_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    assert isinstance(out, TensorSpec)
    left, _ = tensordot_axes(attrs, args[0].ndim, args[1].ndim)
    return 2 * out.size * math.prod(args[0].shape[i] for i in left)


def _copies(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """One copy of every argument, in the result's dtype or its own."""
    del attrs
    first = out if isinstance(out, TensorSpec) else out[0]
    return sum(a.size * max(a.dtype.itemsize, first.dtype.itemsize) for a in args)


def _outer(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    dtype = promoted("outer", args, "numeric")
    for name, spec in zip(("x1", "x2"), args, strict=True):
        require_ndim("outer", name, spec, 1, 1)
    return TensorSpec((args[0].size, args[1].size), dtype)


def _outer_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del out, attrs
    return args[0].size * args[1].size


def _cross(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    a, b = args
    dtype = promoted("cross", args, "numeric")
    if a.ndim != b.ndim:
        raise ShapeError(f"cross: {a} and {b} must have as many dimensions")
    axis = normalize_axis("cross", attrs["axis"], a.ndim)
    if a.shape[axis] != 3 or b.shape[axis] != 3:
        raise ShapeError(f"cross: axis {attrs['axis']} of {a} and {b} must have extent 3")
    return TensorSpec(broadcast_shapes("cross", a.shape, b.shape), dtype)


def _cross_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del args, attrs
    assert isinstance(out, TensorSpec)
    return 3 * out.size


# --- matrices -----------------------------------------------------------------------------------------------------


def _matrix(
    op: str, spec: TensorSpec, *, square: bool = False, filled: bool = False
) -> tuple[tuple[int, ...], int, int, DType]:
    """(batch extents, rows, columns, dtype) of a stack of matrices that LAPACK can take."""
    check_takes(op, spec.dtype, "lapack")
    require_ndim(op, "x", spec, 2)
    *batch, rows, columns = spec.shape
    if square and rows != columns:
        raise ShapeError(f"{op}: the matrices of {spec} are not square")
    if filled and not rows * columns:
        raise ShapeError(f"{op}: the matrices of {spec} hold no element")
    return tuple(batch), rows, columns, spec.dtype


def _cubic(factor: int) -> FlopsRule:
    def flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
        del out, attrs
        rows, columns = args[0].shape[-2:]
        return factor * args[0].size * min(rows, columns) if rows and columns else 0

    return flops


def _trace(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    (x,) = args
    check_takes("trace", x.dtype, "any")
    require_ndim("trace", "x", x, 2)
    return TensorSpec(x.shape[:-2], RESULT["sum"](x.dtype))


def _inv(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    _matrix("inv", args[0], square=True)
    return args[0]


def _solve(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    a, b = args
    batch, rows, _, _ = _matrix("solve", a, square=True)
    dtype = promoted("solve", args, "lapack")
    require_ndim("solve", "x2", b, 1)
    tail = b.shape if b.ndim == 1 else b.shape[-2:]
    if tail[0] != rows:
        raise ShapeError(f"solve: {a} and {b} differ in their rows")
    return TensorSpec(broadcast_shapes("solve", batch, b.shape[:-2]) + tail, dtype)


def _solve_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    del attrs
    assert isinstance(out, TensorSpec)
    return args[0].size * args[0].shape[-1] + 2 * out.size * args[0].shape[-1]


def _det(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    batch, _, _, dtype = _matrix("det", args[0], square=True)
    return TensorSpec(batch, dtype)


def _slogdet(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    batch, _, _, dtype = _matrix("slogdet", args[0], square=True)
    return TensorSpec(batch, dtype), TensorSpec(batch, dtype)


def _qr(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    batch, rows, columns, dtype = _matrix("qr", args[0])
    inner = rows if attrs["mode"] == "complete" else min(rows, columns)
    return TensorSpec((*batch, rows, inner), dtype), TensorSpec((*batch, inner, columns), dtype)


def _svd(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    batch, rows, columns, dtype = _matrix("svd", args[0])
    rank = min(rows, columns)
    left, right = (rows, columns) if attrs["full_matrices"] else (rank, rank)
    return (
        TensorSpec((*batch, rows, left), dtype),
        TensorSpec((*batch, rank), dtype),
        TensorSpec((*batch, right, columns), dtype),
    )


def _svdvals(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    batch, rows, columns, dtype = _matrix("svdvals", args[0])
    return TensorSpec((*batch, min(rows, columns)), dtype)


def _eigh(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    batch, rows, _, dtype = _matrix("eigh", args[0], square=True)
    return TensorSpec((*batch, rows), dtype), TensorSpec((*batch, rows, rows), dtype)


def _pinv(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    batch, rows, columns, dtype = _matrix("pinv", args[0])
    rtol = attrs["rtol"]
    if rtol is not None and not 0 <= rtol < math.inf:
        raise GraphError(f"pinv: rtol must be a number from 0, got {rtol}")
    return TensorSpec((*batch, columns, rows), dtype)


def _cholesky(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    del attrs
    _matrix("cholesky", args[0], square=True)
    return args[0]


#: Orders of matrix norms: Frobenius, nuclear, largest and smallest column sum, row sum, singular value.
MATRIX_NORMS = ("fro", "nuc", "1", "-1", "inf", "-inf", "2", "-2")


def _matrix_norm(args: Sequence[TensorSpec], attrs: Mapping[str, Any]) -> ValueSpec:
    batch, _, _, dtype = _matrix("matrix_norm", args[0], filled=True)
    return TensorSpec((*batch, 1, 1) if attrs["keepdims"] else batch, dtype)


LINALG = (
    _op(
        "matmul",
        ("x1", "x2"),
        "Matrix product x1 @ x2; leading axes broadcast.",
        _matmul,
        flops=_matmul_flops,
        workspace=_matmul_workspace,
    ),
    _op(
        "vecdot",
        ("x1", "x2"),
        "Sum of products along an axis.",
        _vecdot,
        (AttrSpec("axis", "axis", -1, "the axis"),),
        flops=_vecdot_flops,
        workspace=_vecdot_workspace,
    ),
    _op(
        "tensordot",
        ("x1", "x2"),
        "Sum of products over the last axes of x1 and the first of x2, or over axes named in pairs.",
        _tensordot,
        (
            AttrSpec("axes", "int", 2, "how many axes"),
            AttrSpec("axes_x1", "ints", None, "instead: axes of x1"),
            AttrSpec("axes_x2", "ints", None, "and the axes of x2 that they meet"),
        ),
        flops=_tensordot_flops,
        workspace=_copies,
    ),
    EINSUM,
    _op("outer", ("x1", "x2"), "All products of elements of two vectors.", _outer, flops=_outer_flops),
    _op(
        "cross",
        ("x1", "x2"),
        "Cross product along an axis of extent 3.",
        _cross,
        (AttrSpec("axis", "axis", -1, "the axis"),),
        flops=_cross_flops,
    ),
    _op("trace", ("x",), "Sum of the main diagonal; int64 for integers.", _trace, flops=input_size_flops),
    _op("inv", ("x",), "Inverse; a singular matrix is an error.", _inv, flops=_cubic(2), workspace=_copies),
    _op(
        "solve",
        ("x1", "x2"),
        "The x with x1 @ x = x2; a singular matrix is an error.",
        _solve,
        flops=_solve_flops,
        workspace=_copies,
    ),
    _op("det", ("x",), "Determinant.", _det, flops=_cubic(1), workspace=_copies),
    _op(
        "slogdet",
        ("x",),
        "Sign and logarithm of the absolute determinant.",
        _slogdet,
        flops=_cubic(1),
        workspace=_copies,
        results=("sign", "logabsdet"),
    ),
    _op(
        "qr",
        ("x",),
        "Orthonormal q and upper triangular r with q @ r = x.",
        _qr,
        (AttrSpec("mode", "str", "reduced", "extents of q and r", ("reduced", "complete")),),
        flops=_cubic(4),
        workspace=_copies,
        results=("q", "r"),
    ),
    _op(
        "svd",
        ("x",),
        "Singular values s, largest first, with u @ diag(s) @ vh = x.",
        _svd,
        (AttrSpec("full_matrices", "bool", True, "u and vh square"),),
        flops=_cubic(20),
        workspace=_copies,
        results=("u", "s", "vh"),
    ),
    _op("svdvals", ("x",), "Singular values, largest first.", _svdvals, flops=_cubic(8), workspace=_copies),
    _op(
        "eigh",
        ("x",),
        "Eigenvalues, smallest first, and eigenvectors of symmetric matrices (their lower triangle is read).",
        _eigh,
        flops=_cubic(12),
        workspace=_copies,
        results=("eigenvalues", "eigenvectors"),
    ),
    _op(
        "pinv",
        ("x",),
        "Moore-Penrose pseudo-inverse.",
        _pinv,
        (AttrSpec("rtol", "float", None, "singular values below rtol times the largest count as 0"),),
        flops=_cubic(24),
        workspace=_copies,
    ),
    _op(
        "cholesky",
        ("x",),
        "Triangular factor of positive definite matrices; others are an error.",
        _cholesky,
        (AttrSpec("upper", "bool", False, "upper instead of lower"),),
        flops=_cubic(1),
        workspace=_copies,
    ),
    _op(
        "matrix_norm",
        ("x",),
        "Norm of the matrices in the last two axes.",
        _matrix_norm,
        (
            AttrSpec("ord", "str", "fro", "fro, nuc, or 1, 2, inf and their negatives", MATRIX_NORMS),
            AttrSpec("keepdims", "bool", False, "keep both axes with extent 1"),
        ),
        flops=_cubic(8),
        workspace=_copies,
    ),
)
