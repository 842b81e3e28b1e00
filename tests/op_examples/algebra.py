"""Random calls of linear algebra and of the operations of neural networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchbay.ir.graph import Attr
from patchbay.ir.ops.einsum import parse
from patchbay.ir.ops.linalg import MATRIX_NORMS
from tests.op_examples.drawing import (
    ANY,
    FLOATS,
    NUMBERS,
    WIDE_FLOATS,
    Drawing,
    Example,
    Operand,
    Shape,
    builds,
)


@builds("matmul")
def _matmul(d: Drawing) -> Example:
    batch, inner = d.shape(0, 2), d.integer(0, 4)
    a: Shape = (inner,) if d.integer(0, 3) == 0 else (*d.below(batch), d.integer(1, 4), inner)
    b: Shape = (inner,) if d.integer(0, 3) == 0 else (*d.below(batch), inner, d.integer(1, 4))
    other = FLOATS if d.flag() else ANY
    args: list[Operand] = [d.array(a, FLOATS), d.array(b, other)]
    return args, {}


@builds("vecdot")
def _vecdot(d: Drawing) -> Example:
    shape = d.shape(1)
    axis = d.integer(-len(shape), -1)
    other = tuple(e if i - len(shape) == axis or d.flag() else 1 for i, e in enumerate(shape))
    if d.flag():
        other = other[d.integer(0, len(shape) + axis) :]
    return [d.array(shape, FLOATS), d.array(other, FLOATS)], {"axis": axis}


@builds("tensordot")
def _tensordot(d: Drawing) -> Example:
    shared = d.shape(0, 2)
    a, b = (*d.shape(0, 2), *shared), (*shared, *d.shape(0, 2))
    if d.flag():
        return [d.array(a, FLOATS), d.array(b, FLOATS)], {"axes": len(shared)}
    order = d.random.permutation(len(shared))
    left = tuple(int(i) - len(shared) for i in order)
    return [d.array(a, FLOATS), d.array(b, FLOATS)], {"axes_x1": left, "axes_x2": tuple(int(i) for i in order)}


_EQUATIONS = (
    "ij,jk->ik", "bqd,bkd->bqk", "bhqk,bhkd->bqhd", "i,j->ij", "ij->ji", "ii->i", "ii", "ij->", "ij,ij->", "i,i",
    "...i,...i->...", "...ij,...jk->...ik", "i...->...i", "ab,bc,cd->ad", "a,b,c->abc", "bsd,dhe,hek->bsk", "ij, jk",
    "Ab,bA->A", "i,ij,j->", "iij->j", "...,...->...", "ba,ca", "abc,abd,abe->cde",
)  # fmt: skip


@builds("einsum")
def _einsum(d: Drawing) -> Example:
    equation = d.one(_EQUATIONS)
    extents = {c: d.integer(1, 3) for c in equation if c.isalpha()}
    dots = d.shape(0, 2)
    shapes = []
    for term in equation.replace(" ", "").partition("->")[0].split(","):
        before, found, after = term.partition("...")
        middle = d.below(dots) if found else ()
        letters = [
            tuple(1 if term.count(c) == 1 and d.integer(0, 5) == 0 else extents[c] for c in part)
            for part in (before, after)
        ]
        shapes.append((*letters[0], *middle, *letters[1]))
    parse(equation, shapes)
    return [d.array(s, FLOATS, low=-2, high=2) for s in shapes], {"equation": equation}


@builds("outer")
def _outer(d: Drawing) -> Example:
    return [d.array((d.integer(0, 4),), NUMBERS), d.array((d.integer(0, 4),), NUMBERS)], {}


@builds("cross")
def _cross(d: Drawing) -> Example:
    shape = list(d.shape(1))
    axis = d.axis(len(shape))
    shape[axis] = 3
    other = [e if i == axis % len(shape) or d.flag() else 1 for i, e in enumerate(shape)]
    return [d.array(tuple(shape), NUMBERS), d.array(tuple(other), NUMBERS)], {"axis": axis}


@builds("trace")
def _trace(d: Drawing) -> Example:
    return [d.array(d.shape(2, extent=0))], {}


def _square(d: Drawing, extra: float = 0.0) -> np.ndarray[Any, Any]:
    extent = d.integer(1, 4)
    x = d.normal((*d.shape(0, 1), extent, extent))
    return x + np.asarray(extra * np.eye(extent), x.dtype)


@builds("inv")
def _invertible(d: Drawing) -> Example:
    return [_square(d, extra=5.0)], {}


@builds("det", "slogdet")
def _any_square(d: Drawing) -> Example:
    return [_square(d)], {}


@builds("solve")
def _solve(d: Drawing) -> Example:
    a = _square(d, extra=5.0)
    rows = a.shape[-1]
    b = (rows,) if d.integer(0, 2) == 0 else (*d.below(a.shape[:-2]), rows, d.integer(1, 3))
    return [a, d.normal(b)], {}


@builds("eigh")
def _eigh(d: Drawing) -> Example:
    x = _square(d)
    return [x + np.swapaxes(x, -1, -2)], {}


@builds("cholesky")
def _cholesky(d: Drawing) -> Example:
    x = _square(d)
    return [x @ np.swapaxes(x, -1, -2) + np.asarray(np.eye(x.shape[-1]), x.dtype)], {"upper": d.flag()}


@builds("qr")
def _qr(d: Drawing) -> Example:
    return [d.normal(d.shape(2, 3))], {"mode": d.one(("reduced", "complete"))}


@builds("svd")
def _svd(d: Drawing) -> Example:
    return [d.normal(d.shape(2, 3))], {"full_matrices": d.flag()}


@builds("svdvals")
def _svdvals(d: Drawing) -> Example:
    return [d.normal(d.shape(2, 3))], {}


@builds("pinv")
def _pinv(d: Drawing) -> Example:
    attrs: dict[str, Attr] = {"rtol": d.one((1e-6, 0.3))} if d.flag() else {}
    return [d.normal(d.shape(2, 3))], attrs


@builds("matrix_norm")
def _matrix_norm(d: Drawing) -> Example:
    return [d.normal(d.shape(2, 3))], {"ord": d.one(MATRIX_NORMS), "keepdims": d.flag()}


@builds("softmax", "log_softmax")
def _softmax(d: Drawing) -> Example:
    x = d.array(d.shape(1, extent=0), FLOATS)
    dtype: dict[str, Attr] = {"dtype": d.one(("float32", "float64"))} if d.integer(0, 3) == 0 else {}
    return [x], {"axis": d.axis(x.ndim), **dtype}


def _normed(d: Drawing, parameters: int, eps: Sequence[float]) -> Example:
    shape = tuple(e + 1 for e in d.shape(1))
    count = d.integer(1, len(shape))
    attrs: dict[str, Attr] = {} if count == 1 and d.flag() else {"normalized_shape": shape[-count:]}
    if d.flag():
        attrs["eps"] = d.one(eps)
    dtype = (d.one(FLOATS),)
    args = [d.array(shape, dtype), *(d.array(shape[-count:], dtype if d.flag() else FLOATS) for _ in range(parameters))]
    return [*args], attrs


@builds("layer_norm")
def _layer_norm(d: Drawing) -> Example:
    return _normed(d, d.integer(0, 2), (1e-2, 1.0))


@builds("rms_norm")
def _rms_norm(d: Drawing) -> Example:
    return _normed(d, d.integer(0, 1), (1e-2, 1.0))


@builds("cross_entropy", "nll_loss")
def _classified(d: Drawing) -> Example:
    x = d.array(d.shape(1), FLOATS)
    axis = d.axis(x.ndim) if d.flag() else None
    at = (axis if axis is not None else min(1, x.ndim - 1)) % x.ndim
    target = d.indices(x.shape[:at] + x.shape[at + 1 :], x.shape[at], negative=False)
    attrs: dict[str, Attr] = {"axis": axis, "reduction": d.one(("mean", "sum", "none"))}
    if d.flag():
        attrs["ignore_index"] = d.integer(0, x.shape[at] - 1)
    return [x, target], attrs


@builds("kl_div")
def _kl_div(d: Drawing) -> Example:
    shape = d.shape(1)
    log_target = d.flag()
    target = d.array(shape, FLOATS, low=-3, high=0) if log_target else d.array(shape, FLOATS, low=0, high=1)
    attrs: dict[str, Attr] = {"log_target": log_target, "reduction": d.one(("mean", "batchmean", "sum", "none"))}
    return [d.array(shape, FLOATS, low=-3, high=0), target], attrs


@builds("mse_loss")
def _mse_loss(d: Drawing) -> Example:
    shape = d.shape()
    return [d.array(shape, FLOATS), d.array(shape, FLOATS)], {"reduction": d.one(("mean", "sum", "none"))}


@builds("cosine_similarity")
def _cosine_similarity(d: Drawing) -> Example:
    shape = d.shape(2)
    return [d.array(shape, WIDE_FLOATS), d.array(d.below(shape), WIDE_FLOATS)], {
        "axis": d.axis(len(shape))
    } if d.flag() else {}


@builds("normalize")
def _normalize(d: Drawing) -> Example:
    x = d.array(d.shape(2), WIDE_FLOATS)
    return [x], {"axis": d.axis(x.ndim), "p": d.one((1.0, 2.0, 3.0, math.inf))}


@builds("linear")
def _linear(d: Drawing) -> Example:
    d_in, d_out = d.integer(1, 4), d.integer(1, 4)
    args = [d.array((*d.shape(0, 2, extent=0), d_in), FLOATS), d.array((d_out, d_in), FLOATS)]
    return [*args, *([d.array((d_out,), FLOATS)] if d.flag() else [])], {}


@builds("scaled_dot_product_attention")
def _attention(d: Drawing) -> Example:
    batch, heads, queries, keys = (d.integer(1, 3) for _ in range(4))
    d_head, d_value = d.integer(1, 4), d.integer(1, 4)
    dtype = (d.one(FLOATS),)
    attrs: dict[str, Attr] = {}
    kv_heads = heads
    if heads == 2 and d.flag():
        kv_heads, attrs["enable_gqa"] = 1, True
    if d.flag():
        attrs["scale"] = 0.5
    args = [
        d.array((batch, heads, queries, d_head), dtype, low=-2, high=2),
        d.array((batch, kv_heads, keys, d_head), dtype, low=-2, high=2),
        d.array((batch, kv_heads, keys, d_value), dtype, low=-2, high=2),
    ]
    kind = d.integer(0, 3)
    if kind == 1:
        attrs["is_causal"] = True
    elif kind == 2:
        args.append(d.array((queries, keys), ("bool",)))
    elif kind == 3:
        args.append(d.array((batch, 1, queries, keys), dtype))
    return [*args], attrs
