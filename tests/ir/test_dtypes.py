"""Promotion of dtypes: the array API's table, torch's answer where it is open, nothing silent for 8-bit floats."""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest

from patchbay.ir.dtypes import (
    DTYPES,
    DType,
    bfloat16,
    bool_,
    float16,
    float32,
    float64,
    int64,
    promote,
    promote_scalar,
    scalar_kind,
)

COMPUTED = [d for d in DTYPES.values() if not d.is_low_precision]
LOW = [d for d in DTYPES.values() if d.is_low_precision]


@pytest.mark.parametrize(("a", "b"), list(product(COMPUTED, COMPUTED)), ids=repr)
def test_promotion_is_commutative_and_wide_enough(a: DType, b: DType) -> None:
    """Either order gives one dtype, at least as wide as each of its kind; within a kind it is numpy's."""
    result = promote(a, b)
    assert result == promote(b, a)
    assert promote(a, a) == a
    for d in (a, b):
        assert d.kind != result.kind or d.itemsize <= result.itemsize
    if a.kind == b.kind != "float":
        assert np.promote_types(a.name, b.name).name == result.name
    if {a.kind, b.kind} == {"uint", "int"}:
        assert np.promote_types(a.name, b.name).name == result.name


def test_promotion_is_associative_but_for_half_floats() -> None:
    """The order of three arguments does not matter, unless float16 and bfloat16 are both among them."""
    for a, b, c in product(COMPUTED, repeat=3):
        if not {float16, bfloat16} <= {a, b, c}:
            assert promote(promote(a, b), c) == promote(a, promote(b, c))


def test_floats_win_over_integers() -> None:
    """An integer or bool with a float gives that float, as in torch; float16 with bfloat16 gives float32."""
    for a, b in product(COMPUTED, COMPUTED):
        if a.is_floating and not b.is_floating:
            assert promote(a, b) == a
    assert promote(float16, bfloat16) == float32
    assert promote(bfloat16, float64) == float64


@pytest.mark.parametrize("low", LOW, ids=repr)
def test_low_precision_floats_do_not_promote(low: DType) -> None:
    """An 8-bit float meets only itself."""
    assert promote(low, low) == low
    for other in DTYPES.values():
        if other != low:
            with pytest.raises(ValueError, match="astype"):
                promote(low, other)


def test_python_scalars_are_weak() -> None:
    """A Python number changes the dtype only when its kind is wider: then to int64 or float32."""
    for dtype in DTYPES.values():
        assert promote_scalar(dtype, "bool") == dtype
        assert promote_scalar(dtype, "int") == (int64 if dtype == bool_ else dtype)
        assert promote_scalar(dtype, "float") == (dtype if dtype.is_floating else float32)


def test_scalar_kinds() -> None:
    """bool is not int."""
    assert [scalar_kind(v) for v in (True, 1, 1.0)] == ["bool", "int", "float"]


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=repr)
def test_names_and_sizes_are_numpys(dtype: DType) -> None:
    """Each dtype is numpy's or ml_dtypes' of its name, and as large."""
    assert np.dtype(getattr(ml_dtypes, dtype.name, None) or dtype.name).itemsize == dtype.itemsize
    assert DTYPES[dtype.name] is dtype
