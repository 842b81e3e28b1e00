"""References of patchbay.ir.ops.linalg and patchbay.ir.ops.einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from patchbay.errors import GraphError
from patchbay.ir.ops import OPS
from patchbay.ir.ops.einsum import parse
from patchbay.ir.ops.linalg import tensordot_axes
from patchbay.reference.arrays import Array, Value
from patchbay.reference.registry import Reference, implements


def _factorises(name: str) -> Callable[[Reference], Reference]:
    """Attach a reference whose matrices may turn out to have no inverse or factor."""

    def attach(function: Reference) -> Reference:
        def guarded(*args: Array, **attrs: Any) -> Any:
            try:
                return function(*args, **attrs)
            except np.linalg.LinAlgError as error:
                raise GraphError(f"{name}: {error}") from error

        implements(OPS[name])(guarded)
        return guarded

    return attach


@implements(OPS["matmul"])
def _matmul(x1: Array, x2: Array) -> Value:
    return np.matmul(x1.astype(np.float64), x2.astype(np.float64))


@implements(OPS["vecdot"])
def _vecdot(x1: Array, x2: Array, *, axis: int) -> Value:
    return np.sum(x1.astype(np.float64) * x2, axis=axis)


@implements(OPS["tensordot"])
def _tensordot(
    x1: Array, x2: Array, *, axes: int, axes_x1: tuple[int, ...] | None, axes_x2: tuple[int, ...] | None
) -> Value:
    pairs = tensordot_axes({"axes": axes, "axes_x1": axes_x1, "axes_x2": axes_x2}, x1.ndim, x2.ndim)
    return np.tensordot(x1.astype(np.float64), x2.astype(np.float64), pairs)


@implements(OPS["einsum"])
def _einsum(*operands: Array, equation: str) -> Value:
    """Every product of one element of each operand, added up where it belongs."""
    contraction = parse(equation, [x.shape for x in operands])
    labels = list(contraction.extents)
    result = np.zeros(contraction.shape)
    for place in np.ndindex(*(contraction.extents[label] for label in labels)):
        at = dict(zip(labels, place, strict=True))
        product = 1.0
        for x, axes in zip(operands, contraction.inputs, strict=True):
            product *= x[tuple(at[a] if x.shape[i] != 1 else 0 for i, a in enumerate(axes))]
        result[tuple(at[label] for label in contraction.output)] += product
    return result


@implements(OPS["outer"])
def _outer(x1: Array, x2: Array) -> Value:
    return x1[:, None] * x2[None, :]


@implements(OPS["cross"])
def _cross(x1: Array, x2: Array, *, axis: int) -> Value:
    a, b = np.moveaxis(x1, axis, 0), np.moveaxis(x2, axis, 0)
    parts = [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
    return np.stack(parts, axis)


@implements(OPS["trace"])
def _trace(x: Array) -> Value:
    return np.trace(x if x.dtype.kind == "f" else x.astype(np.int64), axis1=-2, axis2=-1)


@_factorises("inv")
def _inv(x: Array) -> Value:
    return np.linalg.inv(x)


@_factorises("solve")
def _solve(x1: Array, x2: Array) -> Value:
    if x2.ndim == 1:
        return np.linalg.solve(x1, np.broadcast_to(x2[:, None], (*x1.shape[:-1], 1)))[..., 0]
    return np.linalg.solve(x1, x2)


@_factorises("det")
def _det(x: Array) -> Value:
    return np.linalg.det(x)


@_factorises("slogdet")
def _slogdet(x: Array) -> tuple[Array, Array]:
    sign, logabsdet = np.linalg.slogdet(x)
    return sign, logabsdet


@_factorises("qr")
def _qr(x: Array, *, mode: Any) -> tuple[Array, Array]:
    q, r = np.linalg.qr(x, mode)
    return q, r


@_factorises("svd")
def _svd(x: Array, *, full_matrices: bool) -> tuple[Array, Array, Array]:
    u, s, vh = np.linalg.svd(x, full_matrices=full_matrices)
    return u, s, vh


@_factorises("svdvals")
def _svdvals(x: Array) -> Value:
    return np.linalg.svd(x, compute_uv=False)


@_factorises("eigh")
def _eigh(x: Array) -> tuple[Array, Array]:
    values, vectors = np.linalg.eigh(x)
    return values, vectors


@implements(OPS["pinv"], in_own_dtype=True)
def _pinv(x: Array, *, rtol: float | None) -> Value:
    if rtol is None:
        rtol = max(x.shape[-2:]) * float(np.finfo(x.dtype).eps)
    try:
        return np.linalg.pinv(x.astype(np.float64), rtol)
    except np.linalg.LinAlgError as error:
        raise GraphError(f"pinv: {error}") from error


@_factorises("cholesky")
def _cholesky(x: Array, *, upper: bool) -> Value:
    return np.linalg.cholesky(x, upper=upper)


@_factorises("matrix_norm")
def _matrix_norm(x: Array, *, ord: str, keepdims: bool) -> Value:
    order: Any = ord if ord in ("fro", "nuc") else float(ord)
    return np.linalg.norm(x, order, axis=(-2, -1), keepdims=keepdims)
