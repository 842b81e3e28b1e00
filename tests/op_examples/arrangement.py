"""Random calls of operations that rearrange, select and make tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchbay.ir.graph import Attr
from patchbay.ir.indexing import Index
from tests.op_examples.drawing import (
    ANY,
    FLOATS,
    NUMBERS,
    STORED,
    Drawing,
    Example,
    Operand,
    Shape,
    builds,
)


def _factors(d: Drawing, size: int) -> list[int]:
    shape: list[int] = []
    while size > 1:
        factor = d.one([f for f in range(2, size + 1) if size % f == 0])
        shape.append(factor)
        size //= factor
    return shape


@builds("reshape")
def _reshape(d: Drawing) -> Example:
    x = d.array(d.shape(), STORED)
    shape = _factors(d, x.size)
    if d.flag():
        shape.insert(d.integer(0, len(shape)), 1)
    if shape and d.flag():
        shape[d.integer(0, len(shape) - 1)] = -1
    return [x], {"shape": tuple(shape)}


@builds("permute_dims")
def _permute_dims(d: Drawing) -> Example:
    x = d.array(d.shape(extent=0), STORED)
    return [x], {"axes": tuple(int(a) - (x.ndim if d.flag() else 0) for a in d.random.permutation(x.ndim))}


@builds("matrix_transpose")
def _matrix_transpose(d: Drawing) -> Example:
    return [d.array(d.shape(2, 4, extent=0), STORED)], {}


@builds("moveaxis")
def _moveaxis(d: Drawing) -> Example:
    x = d.array(d.shape(1, 4), STORED)
    if d.flag():
        return [x], {"source": d.axis(x.ndim), "destination": d.axis(x.ndim)}
    count = d.integer(1, x.ndim)
    source, destination = (tuple(int(a) for a in d.random.permutation(x.ndim)[:count]) for _ in range(2))
    return [x], {"source": source, "destination": destination}


@builds("swapaxes")
def _swapaxes(d: Drawing) -> Example:
    x = d.array(d.shape(1), STORED)
    return [x], {"axis1": d.axis(x.ndim), "axis2": d.axis(x.ndim)}


@builds("squeeze")
def _squeeze(d: Drawing) -> Example:
    shape = list(d.shape(0, 2))
    at = d.integer(0, len(shape))
    shape.insert(at, 1)
    return [d.array(tuple(shape), STORED)], {"axis": (at,) if d.flag() else at - (len(shape) if d.flag() else 0)}


@builds("expand_dims")
def _expand_dims(d: Drawing) -> Example:
    x = d.array(d.shape(), STORED)
    return [x], {"axis": d.axis(x.ndim + 1)}


@builds("broadcast_to")
def _broadcast_to(d: Drawing) -> Example:
    shape = d.shape(extent=0)
    return [d.array(d.below(shape), STORED)], {"shape": shape}


@builds("concat")
def _concat(d: Drawing) -> Example:
    shape = d.shape(1)
    if d.integer(0, 3) == 0:
        return [d.array(d.shape()) for _ in range(d.integer(1, 3))], {"axis": None}
    axis = d.axis(len(shape))
    shapes = [
        [d.integer(0, 3) if i == axis % len(shape) else e for i, e in enumerate(shape)] for _ in range(d.integer(1, 3))
    ]
    return [d.array(tuple(s)) for s in shapes], {"axis": axis}


@builds("stack")
def _stack(d: Drawing) -> Example:
    shape = d.shape(extent=0)
    return [d.array(shape) for _ in range(d.integer(1, 3))], {"axis": d.axis(len(shape) + 1)}


@builds("flip")
def _flip(d: Drawing) -> Example:
    x = d.array(d.shape(extent=0))
    return [x], {"axis": d.axes(x.ndim)}


@builds("roll")
def _roll(d: Drawing) -> Example:
    x = d.array(d.shape(1))
    axis = d.axes(x.ndim)
    several = isinstance(axis, tuple) and d.flag()
    shift = tuple(d.integer(-5, 5) for _ in axis) if several else d.integer(-5, 5)  # type: ignore[union-attr]
    return [x], {"shift": shift, "axis": axis}


@builds("repeat")
def _repeat(d: Drawing) -> Example:
    x = d.array(d.shape())
    return [x], {"repeats": d.integer(0, 3), "axis": d.axis(x.ndim) if x.ndim and d.flag() else None}


@builds("tile")
def _tile(d: Drawing) -> Example:
    return [d.array(d.shape())], {"repetitions": tuple(d.integer(0, 3) for _ in range(d.integer(0, 4)))}


@builds("tril", "triu")
def _triangle(d: Drawing) -> Example:
    return [d.array(d.shape(2, extent=0))], {"k": d.one((0, 1, -1, 3, -3, 2**60, -(2**63)))}


@builds("diagonal")
def _diagonal(d: Drawing) -> Example:
    return [d.array(d.shape(2, extent=0), STORED)], {"offset": d.integer(-5, 5)}


@builds("pad")
def _pad(d: Drawing) -> Example:
    x = d.array(d.shape(extent=0))
    kinds = {"b": "b", "i": "i", "u": "i"}.get(x.dtype.kind, "f")
    return [x], {"pad": tuple(d.integer(0, 2) for _ in range(2 * d.integer(0, x.ndim))), "value": d.number(kinds)}


@builds("unfold")
def _unfold(d: Drawing) -> Example:
    x = d.array(d.shape(1), STORED)
    axis = d.axis(x.ndim)
    return [x], {"axis": axis, "size": d.integer(1, x.shape[axis]), "step": d.integer(1, 3)}


def draw_index(d: Drawing, shape: Shape) -> tuple[Index, list[np.ndarray[Any, Any]]]:
    """An index into a tensor of `shape`, with its arrays."""
    broadcast = d.shape(0, 2)
    items: list[tuple[Any, ...]] = []
    arrays: list[np.ndarray[Any, Any]] = []
    used = d.integer(0, len(shape))
    dots = d.integer(0, used) if d.flag() else None
    for position in range(used):
        if position == dots:
            items.append(("ellipsis",))
        if d.integer(0, 5) == 0:
            items.append(("newaxis",))
        axis = position if dots is None or position < dots else position - used
        extent = shape[axis]
        kind = d.integer(0, 3)
        if kind == 0 and extent:
            items.append(("int", d.integer(-extent, extent - 1)))
        elif kind == 1 and extent:
            items.append(("array", len(arrays)))
            arrays.append(d.indices(d.below(broadcast), extent))
        else:
            bounds = [None if d.flag() else d.integer(-extent - 1, extent + 1) for _ in range(2)]
            items.append(("slice", *bounds, d.one((None, 1, 2, 3))))
    if dots == used:
        items.append(("ellipsis",))
    if d.integer(0, 5) == 0:
        items.append(("newaxis",))
    return tuple(items), arrays


@builds("getitem")
def _getitem(d: Drawing) -> Example:
    shape = d.shape(0, 4, extent=0)
    index, arrays = draw_index(d, shape)
    return [d.array(shape, STORED), *arrays], {"index": index}


@builds("set_index")
def _set_index(d: Drawing) -> Example:
    from patchbay.reference.indexing import numpy_index

    x = d.array(d.shape(0, 4, extent=0), NUMBERS)
    index, arrays = draw_index(d, x.shape)
    dtypes = FLOATS if x.dtype.kind not in "iu" else (str(x.dtype),)
    # With one value for all, the order in which repeated positions are written cannot show.
    target = np.empty(x.shape)[numpy_index(index, arrays)].shape
    value: Operand = (
        d.number("i") if d.flag() else d.array((1,) * d.integer(0, len(target)) if arrays else d.below(target), dtypes)
    )
    return [x, value, *arrays], {"index": index, "mode": d.one(("set", "add", "mul"))}


@builds("take")
def _take(d: Drawing) -> Example:
    x = d.array(d.shape(1), STORED)
    axis = None if x.ndim == 1 and d.flag() else d.axis(x.ndim)
    return [x, d.indices(d.shape(0, 2, extent=0), x.shape[axis or 0])], {"axis": axis}


@builds("take_along_axis")
def _take_along_axis(d: Drawing) -> Example:
    x = d.array(d.shape(1))
    axis = d.axis(x.ndim)
    shape = [1 if d.integer(0, 3) == 0 else e for e in x.shape]
    shape[axis] = d.integer(0, 5)
    return [x, d.indices(tuple(shape), x.shape[axis])], {"axis": axis}


@builds("scatter_add")
def _scatter_add(d: Drawing) -> Example:
    x = d.array(d.shape(1), NUMBERS)
    axis = d.axis(x.ndim)
    shape = list(x.shape)
    shape[axis] = d.integer(0, 5)
    source = d.array(tuple(shape), FLOATS if x.dtype.kind not in "iu" else (str(x.dtype),), low=-2, high=2)
    return [x, d.indices(tuple(shape), x.shape[axis]), source], {"axis": axis}


@builds("sort", "argsort")
def _sort(d: Drawing) -> Example:
    x = d.array(d.shape(1), ANY, low=-2, high=2, special=True)
    return [x], {"axis": d.axis(x.ndim), "descending": d.flag()}


@builds("topk")
def _topk(d: Drawing) -> Example:
    x = d.array(d.shape(1), NUMBERS)
    axis = d.axis(x.ndim)
    return [x], {"k": d.integer(0, x.shape[axis]), "axis": axis, "largest": d.flag()}


@builds("searchsorted")
def _searchsorted(d: Drawing) -> Example:
    x = np.sort(d.array((d.integer(0, 6),), NUMBERS))
    return [x, d.array(d.shape(extent=0), NUMBERS)], {"side": d.one(("left", "right"))}


@builds("one_hot")
def _one_hot(d: Drawing) -> Example:
    classes = d.integer(1, 5)
    return [d.indices(d.shape(0, 2), classes, negative=False)], {"num_classes": classes}


@builds("embedding")
def _embedding(d: Drawing) -> Example:
    weight = d.array(d.shape(2, 2))
    return [d.indices(d.shape(extent=0), weight.shape[0], negative=False), weight], {}


@builds("masked_fill")
def _masked_fill(d: Drawing) -> Example:
    shape = d.shape(extent=0)
    x = d.array(d.below(shape), NUMBERS)
    kinds, dtypes = ("fi", FLOATS) if x.dtype.kind not in "iu" else ("i", (str(x.dtype),))
    return [x, d.array(d.below(shape), ("bool",)), d.number(kinds) if d.flag() else d.array((), dtypes)], {}


@builds("zeros", "ones")
def _filled(d: Drawing) -> Example:
    return [], {"shape": d.shape(extent=0), "dtype": d.one((None, *ANY))}


@builds("full")
def _full(d: Drawing) -> Example:
    value = d.number()
    dtypes = {"float": FLOATS, "int": NUMBERS, "bool": ANY}[type(value).__name__]
    return [], {"shape": d.shape(extent=0), "fill_value": value, "dtype": d.one((None, *dtypes))}


@builds("arange")
def _arange(d: Drawing) -> Example:
    kinds = "fi" if d.flag() else "i"
    attrs: dict[str, Attr] = {"start": d.number(kinds)}
    if d.flag():
        attrs |= {"stop": d.number(kinds), "step": d.one((1, 2, -1, -3) + ((0.25, 1.5) if kinds == "fi" else ()))}
    return [], attrs


@builds("eye")
def _eye(d: Drawing) -> Example:
    columns = d.one((None, 0, 1, 3, 5))
    return [], {"n_rows": d.integer(0, 4), "n_cols": columns, "k": d.integer(-6, 6), "dtype": d.one((None, *ANY))}


@builds("linspace")
def _linspace(d: Drawing) -> Example:
    attrs: dict[str, Attr] = {"start": d.number("fi"), "stop": d.number("fi"), "num": d.integer(0, 6)}
    return [], {**attrs, "endpoint": d.flag(), "dtype": d.one((None, *FLOATS))}
