"""Indexing in torch equals numpy's, reading and writing, and is checked before it reaches a device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.errors import DTypeError, IndexOutOfRangeError
from patchbay.ir.indexing import index_shape
from patchbay.ir.ops import OPS
from patchbay.reference import spec_of
from patchbay.reference.indexing import numpy_index
from patchbay_server import kernels
from tests.op_examples import Drawing
from tests.op_examples.arrangement import draw_index


@st.composite
def indexed(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[np.ndarray, Any, list[Any]]:
    """(x, index, arrays)"""
    drawing = Drawing(draw)
    shape = drawing.shape(0, 5, extent=0)
    index, arrays = draw_index(drawing, shape)
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), index, arrays


@settings(max_examples=1000, deadline=None, database=None, derandomize=True)
@given(indexed())
def test_get_equals_numpy(example: tuple[np.ndarray, Any, list[Any]]) -> None:
    """x[index] is numpy's, of the shape that the rule says."""
    x, index, arrays = example
    got = kernels.index_get(torch.from_numpy(x), index, [torch.from_numpy(a) for a in arrays])
    wanted = x[numpy_index(index, arrays)]
    assert tuple(got.shape) == wanted.shape == index_shape("getitem", x.shape, index, [spec_of(a) for a in arrays])
    np.testing.assert_array_equal(got.numpy(), wanted)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(indexed(), st.sampled_from(["set", "add", "mul"]))
def test_put_equals_numpy(example: tuple[np.ndarray, Any, list[Any]], mode: Any) -> None:
    """x[index] = v, += v and *= v are numpy's, with positions named twice written once."""
    x, index, arrays = example
    key = numpy_index(index, arrays)
    wanted, places = x.copy(), np.arange(x.size).reshape(x.shape)[key]
    value = np.asarray(places % 7, np.float32)  # equal where a position is named twice: their order cannot show
    wanted[key] = {"set": value, "add": x[key] + value, "mul": x[key] * value}[mode]
    got = torch.from_numpy(x.copy())
    kernels.index_put(got, index, [torch.from_numpy(a) for a in arrays], torch.from_numpy(value), mode)
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_every_arrangement_equals_numpy() -> None:
    """Every arrangement of up to five items reads what numpy reads, an ellipsis of no axes between arrays included."""
    items = [("int", 1), ("slice", 0, 2, None), ("newaxis",), ("array", 0), ("array", 1), ("ellipsis",)]
    own = [np.array([0, 1, 1]), np.array([[0], [1]])]
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tried = 0
    for count in range(6):
        for chosen in product(items, repeat=count):
            used = [item for item in chosen if item[0] == "array"]
            many = sum(item[0] in ("int", "slice", "array") for item in chosen)
            if len(set(used)) != len(used) or chosen.count(("ellipsis",)) > 1 or many > 4:
                continue
            renumbered = {item: ("array", i) for i, item in enumerate(used)}
            index = tuple(renumbered.get(item, item) for item in chosen)
            arrays = [own[int(item[1])] for item in used]  # type: ignore[call-overload]
            got = kernels.index_get(torch.from_numpy(x), index, [torch.from_numpy(a) for a in arrays])
            np.testing.assert_array_equal(got.numpy(), x[numpy_index(index, arrays)], err_msg=str(index))
            tried += 1
    assert tried > 1500


ROWS = (("slice", None, None, None), ("array", 0))


@pytest.mark.parametrize("bad", [3, -4, 2**40])
@pytest.mark.parametrize(
    ("name", "attrs", "make"),
    [
        ("getitem", {"index": ROWS}, lambda i: [torch.zeros(2, 3), i]),
        ("set_index", {"index": ROWS}, lambda i: [torch.zeros(2, 3), 1.0, i]),
        ("take", {"axis": 1}, lambda i: [torch.zeros(2, 3), i]),
        ("take_along_axis", {"axis": 1}, lambda i: [torch.zeros(1, 3), i[None]]),
        ("scatter_add", {"axis": 1}, lambda i: [torch.zeros(1, 3), i[None], torch.zeros(1, 2)]),
        ("one_hot", {"num_classes": 3}, lambda i: [i]),
        ("embedding", {}, lambda i: [i, torch.zeros(3, 2)]),
        ("cross_entropy", {}, lambda i: [torch.zeros(2, 3), i]),
        ("nll_loss", {"reduction": "none"}, lambda i: [torch.zeros(2, 3), i]),
    ],
)
def test_indices_out_of_range_are_typed(name: str, attrs: dict[str, Any], make: Any, bad: int) -> None:
    """An index outside its axis raises IndexOutOfRangeError that says the index and the range, and changes nothing."""
    op = OPS[name]
    args = make(torch.tensor([0, bad]))
    with pytest.raises(IndexOutOfRangeError, match=rf"{bad} is out of range"):
        kernels.kernel(op)(*args, **op.fill(attrs))


def test_failed_put_changes_nothing() -> None:
    """An index_put with an index out of range leaves the tensor as it was."""
    x = torch.arange(6.0).reshape(2, 3)
    with pytest.raises(IndexOutOfRangeError):
        kernels.index_put(x, ROWS, [torch.tensor([0, 9])], torch.tensor(5.0))
    assert x.equal(torch.arange(6.0).reshape(2, 3))


def test_put_lets_gradients_through() -> None:
    """A value written keeps its gradient, and what it replaced gets none."""
    base, value = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    x = base * 1.0
    kernels.index_put(x, (("int", 1),), [], value)
    x.sum().backward()
    assert base.grad is not None
    assert value.grad is not None
    assert base.grad.tolist() == [1.0, 0.0, 1.0]
    assert value.grad.item() == 1.0


def test_put_scales_with_gradients() -> None:
    """A value that scales gets the gradient of what was there before, though it was overwritten."""
    base, value = torch.tensor([1.0, 5.0, 1.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    x = base * 1.0
    kernels.index_put(x, (("slice", 1, 2, None),), [], value, "mul")
    x.sum().backward()
    assert base.grad is not None
    assert value.grad is not None
    assert base.grad.tolist() == [1.0, 2.0, 1.0]
    assert value.grad.item() == 5.0


def test_put_casts_to_the_target() -> None:
    """A float32 value lands in a bfloat16 tensor, rounded."""
    x = torch.zeros(2, dtype=torch.bfloat16)
    kernels.index_put(x, (("int", 0),), [], torch.tensor(1.0009765625))
    assert x.tolist() == [1.0, 0.0]


def test_uint8_arrays_select_and_do_not_mask() -> None:
    """An index array of uint8 holds positions, though torch would take it for a mask."""
    got = kernels.index_get(torch.arange(4), (("array", 0),), [torch.tensor([0, 1, 1], dtype=torch.uint8)])
    assert got.tolist() == [0, 1, 1]


def test_numbers_must_fit() -> None:
    """A Python integer that an integer tensor cannot hold raises DTypeError instead of wrapping."""
    for op, args in (("add", ()), ("equal", ()), ("maximum", ())):
        with pytest.raises(DTypeError, match="300"):
            kernels.kernel(OPS[op])(torch.zeros(2, dtype=torch.uint8), 300, *args)
    with pytest.raises(DTypeError, match="300"):
        fill = OPS["set_index"].fill({"index": ()})
        kernels.kernel(OPS["set_index"])(torch.zeros(2, dtype=torch.uint8), 300, **fill)
