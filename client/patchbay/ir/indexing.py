"""numpy's basic and integer-array indexing as data: how ``x[...]`` is written into an attribute, and its shape.

An index is a tuple of items, each a tuple whose first element names it:

    ("int", i)                  one position; the axis disappears
    ("slice", start, stop, step)  each None or an int; step is at least 1 (torch has no negative steps)
    ("ellipsis",)               as many full slices as are missing; at most one
    ("newaxis",)                a new axis of extent 1
    ("array", k)                the k-th index argument of the node: an integer tensor; they broadcast together

Semantics are numpy's: array items broadcast against one another and, where ``int`` items stand among arrays, those
count as arrays of no dimensions; the broadcast axes come first when array items are separated by a slice, an ellipsis
or a new axis, and in place otherwise. Indices in arrays are data: they are checked against the axis before they select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from patchbay.errors import DTypeError, GraphError, IndexOutOfRangeError, ShapeError
from patchbay.ir.ops.spec import TensorSpec, broadcast_shapes

IndexItem: TypeAlias = "tuple[str | int | None, ...]"
Index: TypeAlias = "tuple[IndexItem, ...]"

_ARITY = {"int": 2, "slice": 4, "ellipsis": 1, "newaxis": 1, "array": 2}


def check_index(op: str, index: object, n_arrays: int) -> Index:
    """`index` itself, once it is known to be well-formed and to use each of `n_arrays` array arguments exactly once.

    Raises:
        GraphError: anything else.
    """
    if not isinstance(index, tuple):
        raise GraphError(f"{op}: an index is a tuple of items, got {index!r}")
    arrays: list[int] = []
    for item in index:
        if not isinstance(item, tuple) or not item or _ARITY.get(str(item[0])) != len(item):
            raise GraphError(f"{op}: {item!r} is not an index item")
        for part in item[1:]:
            if isinstance(part, bool) or not (isinstance(part, int) or (part is None and item[0] == "slice")):
                raise GraphError(f"{op}: {item!r} is not an index item")
        if item[0] == "slice" and item[3] is not None and int(item[3]) < 1:
            raise GraphError(f"{op}: slice steps must be at least 1, got {item[3]} (use pb.ops.flip to reverse)")
        if item[0] == "array":
            arrays.append(int(item[1]))  # type: ignore[arg-type]
    if sum(item[0] == "ellipsis" for item in index) > 1:
        raise GraphError(f"{op}: an index may hold one ellipsis")
    if sorted(arrays) != list(range(n_arrays)):
        raise GraphError(f"{op}: index uses array arguments {sorted(arrays)} but the node has {n_arrays}")
    return index


def expand_ellipsis(op: str, index: Index, ndim: int) -> Index:
    """`index` with its ellipsis (or the missing tail) written out as full slices.

    Raises:
        ShapeError: more items than dimensions.
    """
    used = sum(item[0] in ("int", "slice", "array") for item in index)
    if used > ndim:
        raise ShapeError(f"{op}: {used} indices for a tensor of {ndim} dimensions")
    fill: Index = (("slice", None, None, None),) * (ndim - used)
    for position, item in enumerate(index):
        if item[0] == "ellipsis":
            return index[:position] + fill + index[position + 1 :]
    return index + fill


def arrays_lead(index: Index) -> bool:
    """Whether the broadcast axes come first: arrays, or ints among them, stand apart in `index`.

    An ellipsis separates them in numpy even where it stands for no axis, so this looks at the index as it was written.
    """
    joined = [position for position, item in enumerate(index) if item[0] in ("int", "array")]
    return any(item[0] == "array" for item in index) and joined != list(range(joined[0], joined[-1] + 1))


def index_shape(op: str, shape: tuple[int, ...], index: Index, arrays: Sequence[TensorSpec]) -> tuple[int, ...]:
    """The shape of ``x[index]`` for an `x` of `shape`.

    Raises:
        IndexOutOfRangeError: an ``int`` item outside its axis.
        DTypeError: an array item that does not hold integers.
        ShapeError: too many items, or arrays that do not broadcast.
    """
    check_index(op, index, len(arrays))
    for spec in arrays:
        if not spec.dtype.is_integer or spec.scalar is not None:
            raise DTypeError(
                f"{op}: array indices must be integer tensors, got {spec} (a mask has no static shape: use where)"
            )
    items = expand_ellipsis(op, index, len(shape))
    advanced = any(item[0] == "array" for item in items)
    out: list[int | None] = []  # None marks the place of the broadcast axes
    axis = 0
    for item in items:
        kind = item[0]
        if kind == "newaxis":
            out.append(1)
            continue
        extent = shape[axis]
        if kind == "slice":
            out.append(len(range(*slice(*item[1:]).indices(extent))))
        elif kind == "int":
            i = int(item[1])  # type: ignore[arg-type]
            if not -extent <= i < extent:
                raise IndexOutOfRangeError(f"{op}: index {i} is out of range for axis {axis} of extent {extent}")
            if advanced:
                out.append(None)
        else:
            out.append(None)
        axis += 1
    if not advanced:
        return tuple(e for e in out if e is not None)
    broadcast = broadcast_shapes(op, *(spec.shape for spec in arrays))
    first = 0 if arrays_lead(index) else out.index(None)
    rest = [e for e in out if e is not None]
    place = sum(e is not None for e in out[:first])
    return tuple(rest[:place]) + broadcast + tuple(rest[place:])
