"""Any index of basic items and integer arrays: the shape before the run and the values after it are numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbay.errors import GraphError
from patchbay.model import Model
from patchbay.testing import fake_client


@pytest.fixture(scope="module")
def model() -> Model:
    return fake_client().model("fake")


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """An index for `shape`: at most one ellipsis, arrays that broadcast together, now and then out of range."""
    items: list[Any] = []
    used = draw(st.integers(0, len(shape)))
    together = draw(st.sampled_from([(1,), (3,), (2, 1), ()]))
    slack = draw(st.sampled_from([0, 0, 0, 1]))
    for extent in shape[:used]:
        kind = draw(st.sampled_from(["int", "slice", "array", "newaxis+int"]))
        one = st.integers(-extent - slack, extent - 1 + slack)
        if kind == "slice":
            bound = st.one_of(st.none(), st.integers(-extent - 2, extent + 2))
            items.append(slice(draw(bound), draw(bound), draw(st.sampled_from([None, 1, 2, 3]))))
        elif kind == "array":
            count = int(np.prod(together))
            values = draw(st.lists(one, min_size=count, max_size=count))
            items.append(np.array(values, dtype=draw(st.sampled_from(["int64", "int32"]))).reshape(together))
        else:
            items += [None] * (kind == "newaxis+int")
            items.append(draw(one))
    if draw(st.booleans()):
        items.append(...)
    return tuple(items) if draw(st.booleans()) or len(items) != 1 else items[0]


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_indices_are_numpys(model: Model, data: st.DataObject) -> None:
    """Same shape, same values; what numpy refuses, the trace refuses at the line."""
    rows = data.draw(st.integers(1, 3))
    t = model.trace()
    pattern = t.run([[1, 2, 3, 4]] * rows).blocks[0].attn.pattern  # [rows, 2, 4, 4]
    index = data.draw(indices(pattern.shape))
    try:
        wanted = np.empty(pattern.shape)[index]
    except IndexError:
        with pytest.raises(GraphError):
            pattern[index]
        return
    part = pattern[index]
    assert part.shape == wanted.shape
    t.save(whole=pattern, part=part)
    t.execute()
    np.testing.assert_array_equal(t.results["part"], t.results["whole"][index])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_indexed_writes_are_numpys(model: Model, data: st.DataObject) -> None:
    """Setting, adding and scaling at an index change what the same statement changes in an array."""
    t = model.trace()
    run = t.run([[1, 2, 3, 4]] * 2)
    before = run.blocks[0].attn.pattern
    index = data.draw(indices(before.shape))
    try:
        part = np.empty(before.shape)[index]
    except IndexError:
        return
    value = (np.arange(part.size, dtype=np.float32) / 8).reshape(part.shape)
    mode = data.draw(st.sampled_from(["set", "add", "mul", "number"]))
    arrays = [i for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, np.ndarray)]
    if arrays:
        value = np.full_like(value, 0.5)  # which of two values for one place wins is not defined
    if mode == "add":
        run.blocks[0].attn.pattern[index] += value
    elif mode == "mul":
        run.blocks[0].attn.pattern[index] *= 3.0
    elif mode == "number":
        run.blocks[0].attn.pattern[index] = 2
    else:
        run.blocks[0].attn.pattern[index] = value
    t.save(before=before, after=run.blocks[0].attn.pattern)
    t.execute()
    wanted = t.results["before"].copy()
    if mode == "add":
        wanted[index] += value
    elif mode == "mul":
        wanted[index] *= 3.0
    elif mode == "number":
        wanted[index] = 2
    else:
        wanted[index] = value
    np.testing.assert_array_equal(t.results["after"], wanted)
