"""Indexing as data: its shape is numpy's for every arrangement of items, and its errors are typed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.errors import DTypeError, GraphError, IndexOutOfRangeError, ShapeError
from patchbay.ir.dtypes import float32, int64, uint8
from patchbay.ir.indexing import check_index, expand_ellipsis, index_shape
from patchbay.ir.ops.spec import TensorSpec
from patchbay.reference.indexing import numpy_index
from tests.op_examples import Drawing
from tests.op_examples.arrangement import draw_index

ARRAY = TensorSpec((2,), int64)
FULL = ("slice", None, None, None)


@st.composite
def indexed(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[tuple[int, ...], Any, list[Any]]:
    """(shape, index, arrays)"""
    drawing = Drawing(draw)
    shape = drawing.shape(0, 5, extent=0)
    index, arrays = draw_index(drawing, shape)
    return shape, index, arrays


@settings(max_examples=1000, deadline=None, database=None, derandomize=True)
@given(indexed())
def test_shape_is_numpys(example: tuple[tuple[int, ...], Any, list[Any]]) -> None:
    """On random indices of ints, slices, ellipses, new axes and arrays the rule gives numpy's shape."""
    shape, index, arrays = example
    wanted = np.empty(shape)[numpy_index(index, arrays)].shape
    assert index_shape("getitem", shape, index, [TensorSpec(a.shape, int64) for a in arrays]) == wanted


ITEMS = [("int", 1), ("slice", 0, 2, None), ("newaxis",), ("array", 0), ("array", 1), ("ellipsis",)]


def test_shape_is_numpys_for_every_arrangement() -> None:
    """Every arrangement of up to five items, with arrays of no, one and two dimensions, has numpy's shape."""
    arrays = [np.array([0, 1, 1]), np.array([[0], [1]])]
    x = np.empty((2, 3, 4, 5))
    tried = 0
    for count in range(6):
        for items in product(ITEMS, repeat=count):
            used = [item for item in items if item[0] == "array"]
            if len(set(used)) != len(used) or items.count(("ellipsis",)) > 1:
                continue
            if sum(item[0] in ("int", "slice", "array") for item in items) > 4:
                continue
            for own in ([*arrays], [np.array(1), arrays[1]], [np.array(1), np.array(0)]):
                chosen = [own[int(item[1])] for item in used]  # type: ignore[arg-type]
                renumbered = {item: ("array", i) for i, item in enumerate(used)}
                index = tuple(renumbered.get(item, item) for item in items)
                wanted = x[numpy_index(index, chosen)].shape
                assert index_shape("getitem", x.shape, index, [TensorSpec(a.shape, int64) for a in chosen]) == wanted, (
                    index
                )
                tried += 1
    assert tried > 5000


@pytest.mark.parametrize(
    "index",
    [
        [("int", 1)],
        (("int",),),
        (("int", "a"),),
        (("int", True),),
        (("int", None),),
        (("slice", 1, 2),),
        (("slice", 0, 1, 0),),
        (("slice", 0, 1, -1),),
        (("slice", 0.5, 1, 1),),
        (("ellipsis",), ("ellipsis",)),
        (("array", 0), ("array", 0)),
        (("array", 1),),
        (("array", -1),),
        (("mask", 0),),
        (("newaxis", 1),),
        ((["int"], 1),),
        ((),),
        (1,),
        "ab",
    ],
)
def test_malformed_indices_are_refused(index: Any) -> None:
    """Anything but well-formed items that use each array once raises GraphError, never another exception."""
    with pytest.raises(GraphError):
        check_index("getitem", index, 1 if "array" in repr(index) else 0)


def test_unused_arrays_are_refused() -> None:
    """An array argument that the index does not name raises GraphError."""
    with pytest.raises(GraphError, match="has 1"):
        index_shape("getitem", (2, 2), (("int", 0),), [ARRAY])


def test_out_of_range_and_too_many() -> None:
    """A static position outside its axis and more items than axes raise their own errors."""
    for position in (3, -4):
        with pytest.raises(IndexOutOfRangeError, match="axis 1 of extent 3"):
            index_shape("getitem", (2, 3), (FULL, ("int", position)), [])
    with pytest.raises(ShapeError, match="2 indices for a tensor of 1"):
        index_shape("getitem", (2,), (FULL, FULL), [])


def test_arrays_must_hold_integers_and_broadcast() -> None:
    """Float arrays raise DTypeError, arrays that do not broadcast ShapeError; every integer dtype is fine."""
    with pytest.raises(DTypeError):
        index_shape("getitem", (2,), (("array", 0),), [TensorSpec((2,), float32)])
    with pytest.raises(ShapeError):
        index_shape("getitem", (2, 2), (("array", 0), ("array", 1)), [ARRAY, TensorSpec((3,), int64)])
    assert index_shape("getitem", (2, 5), (("array", 0),), [TensorSpec((3,), uint8)]) == (3, 5)


def test_ellipsis_is_written_out() -> None:
    """An ellipsis, or the missing tail, becomes full slices."""
    assert expand_ellipsis("getitem", (("int", 0), ("ellipsis",), ("newaxis",)), 3) == (
        ("int", 0),
        FULL,
        FULL,
        ("newaxis",),
    )
    assert expand_ellipsis("getitem", (), 2) == (FULL, FULL)
    assert expand_ellipsis("getitem", (("ellipsis",), ("int", 0)), 1) == (("int", 0),)
