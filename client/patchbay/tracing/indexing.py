"""``x[...]`` as data (see `patchbay.ir.indexing`); constant indices are range-checked at once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from patchbay.arrays import as_array
from patchbay.errors import DTypeError, GraphError, IndexOutOfRangeError, ShapeError, TraceError
from patchbay.ir.dtypes import int64
from patchbay.ir.indexing import IndexItem, expand_ellipsis

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: An index as data: its items, and the nodes of its arrays.
Parsed = "tuple[tuple[IndexItem, ...], tuple[int, ...]]"


def parse_index(
    index: object,
    shape: tuple[int, ...],
    *,
    node_of: Callable[[object], int | None],
    constant: Callable[[NDArray[Any]], int],
) -> tuple[tuple[IndexItem, ...], tuple[int, ...]]:
    """`index`, as Python hands it to ``__getitem__``, as data.

    Args:
        index: what stood between the brackets.
        shape: of the value that is indexed; constant indices are checked against it.
        node_of: the node of a proxy, or None for anything else.
        constant: makes a node of an integer array.

    Raises:
        GraphError: something that cannot index, or an index out of range.
    """
    items: list[IndexItem] = []
    arrays: list[int] = []
    known: dict[int, NDArray[Any]] = {}
    masked: dict[int, int] = {}

    def add_array(node: int, values: NDArray[Any] | None = None) -> None:
        if values is not None:
            known[len(arrays)] = values
        items.append(("array", len(arrays)))
        arrays.append(node)

    for item in index if isinstance(index, tuple) else (index,):
        if item is None:
            items.append(("newaxis",))
        elif item is Ellipsis:
            items.append(("ellipsis",))
        elif isinstance(item, slice):
            items.append(("slice", *(_bound(p, node_of) for p in (item.start, item.stop, item.step))))
        elif isinstance(item, int) and not isinstance(item, bool):
            items.append(("int", item))
        elif (node := node_of(item)) is not None:
            add_array(node)
        else:
            values = _integers(item)
            if values.dtype.kind == "b":
                # numpy's own meaning of a mask: one index array for each of its axes
                for one, extent in zip(values.nonzero(), values.shape, strict=True):
                    masked[len(arrays)] = extent
                    add_array(constant(one.astype("int64")), one)
            elif values.ndim == 0 and not isinstance(item, (list, tuple)):
                items.append(("int", int(values)))
            else:
                add_array(constant(values), values)
    result = tuple(items)
    if known:
        _check_range(result, shape, known, masked)
    return result, tuple(arrays)


def _bound(part: object, node_of: Callable[[object], int | None]) -> int | None:
    if part is None:
        return None
    if node_of(part) is not None:
        raise TraceError("slice bounds must be known before the run: index with an array, or use where, instead")
    try:
        return operator.index(part)  # type: ignore[arg-type]
    except TypeError:
        raise GraphError(f"slice bounds are integers, not {type(part).__name__}") from None


def _integers(item: object) -> NDArray[Any]:
    """An index that is no proxy as an array of integers or booleans."""
    if isinstance(item, str):
        raise GraphError(f"cannot index with the string {item!r}; positions of text: run.position({item!r})")
    values = as_array(item)
    if values.dtype.kind == "b" or values.dtype.kind in "iu":
        if values.dtype.kind == "b" and values.ndim == 0:
            raise GraphError("cannot index with a single bool")
        return values if values.dtype.kind == "b" else as_array(values, int64)
    if values.size == 0:
        return as_array(values, int64)
    raise DTypeError(f"indices are integers, slices, ..., None or integer arrays; got an array of {values.dtype}")


def _check_range(
    items: tuple[IndexItem, ...], shape: tuple[int, ...], known: dict[int, NDArray[Any]], masked: dict[int, int]
) -> None:
    """
    Args:
        items: the index.
        shape: of what it indexes.
        known: its arrays whose numbers are known, by their number.
        masked: extents of the axes of masks, by the number of the array that each became.

    Raises:
        IndexOutOfRangeError: an array does not fit its axis.
    """
    try:
        full = expand_ellipsis("getitem", items, len(shape))
    except ShapeError:
        return  # the shape rule says it better
    axis = 0
    for item in full:
        if item[0] == "newaxis":
            continue
        number = item[1] if item[0] == "array" else None
        values = known.get(number)  # type: ignore[arg-type]
        if values is not None and axis < len(shape):
            _check_fits(values, axis, shape[axis], masked.get(number))  # type: ignore[arg-type]
        axis += 1


def _check_fits(values: NDArray[Any], axis: int, extent: int, masked: int | None) -> None:
    if masked is not None and masked != extent:
        raise IndexOutOfRangeError(f"a mask of {masked} entries does not fit axis {axis} of extent {extent}")
    if values.size:
        low, high = int(values.min()), int(values.max())
        if low < -extent or high >= extent:
            bad = low if low < -extent else high
            raise IndexOutOfRangeError(f"index {bad} is out of range for axis {axis} of extent {extent}")
