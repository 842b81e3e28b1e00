"""Proxies: arithmetic, numpy's indexing, and clear refusals where Python would need the number itself."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import (
    DTypeError,
    GraphError,
    IndexOutOfRangeError,
    ProxyBoolError,
    ShapeError,
    TraceError,
    ValueNotReadyError,
    WrongTraceError,
)
from patchbay.model import Model
from patchbay.tracing import Proxy, Run
from tests.tracing.conftest import FRANCE, ITALY, CountingTransport


@pytest.fixture
def run(model: Model) -> Run:
    """A run whose trace is never sent."""
    t = model.trace()
    return t.run(FRANCE)


def evaluate(model: Model, compute: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """`compute(x, y)` over proxies on the server, and over the saved arrays in numpy."""
    with model.trace(FRANCE) as run:
        x, y = run.blocks[0].resid_pre, run.blocks[1].resid_pre
        run.save(x=x, y=y, result=compute(x, y))
    return run.results["result"], compute(run.results["x"], run.results["y"])


ARITHMETIC: list[Callable[[Any, Any], Any]] = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    lambda x, y: abs(x) ** 2.0,
    lambda x, y: 2.0 ** abs(y),
    lambda x, y: x @ y.mT,
    lambda x, y: -x,
    lambda x, y: +x,
    lambda x, y: 3 - x,
    lambda x, y: 3 / x,
    lambda x, y: 3 // x,
    lambda x, y: 3 % x,
    lambda x, y: (x > 0) & (y > 0),
    lambda x, y: (x > 0) | (y > 0),
    lambda x, y: (x > 0) ^ (y > 0),
    lambda x, y: ~(x > 0),
    lambda x, y: True & (x > 0),
    lambda x, y: x < 5,
    lambda x, y: x[0].T,
    lambda x, y: x.mT,
]


@pytest.mark.parametrize("compute", ARITHMETIC)
def test_operators_mean_what_numpy_means(model: Model, compute: Callable[[Any, Any], Any]) -> None:
    """Every operator gives numpy's value, shape and dtype."""
    got, wanted = evaluate(model, compute)
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "compute",
    [
        lambda i: i << 1,
        lambda i: i >> 1,
        lambda i: 1 << (i & 3),
        lambda i: 1024 >> (i & 3),
        lambda i: i ^ 5,
        lambda i: 5 | i,
        lambda i: ~i,
    ],
)
def test_bits_of_integers(model: Model, compute: Callable[[Any], Any]) -> None:
    """Shifts and bitwise operators work on integer values."""
    with model.trace(FRANCE) as run:
        i = run.logits.argmax(axis=-1)
        run.save(i=i, result=compute(i))
    np.testing.assert_array_equal(run.results["result"], compute(run.results["i"]))


def test_numpy_arrays_stand_on_either_side(model: Model) -> None:
    """An array before the operator asks the proxy; constants of equal contents travel once."""
    a = np.arange(8, dtype=np.float32)
    with model.trace(FRANCE) as run:
        e = run.embed
        run.save(e=e, left=a * e, right=e * a.copy(), compared=a < e, listed=e + [1.0] * 8)
        constants = [n for n in run.graph.nodes if n.op == "const"]
    assert len(constants) == 2
    e = run.results["e"]
    np.testing.assert_array_equal(run.results["left"], a * e)
    np.testing.assert_array_equal(run.results["right"], a * e)
    np.testing.assert_array_equal(run.results["compared"], a < e)
    assert run.results["listed"].dtype == np.float32


def test_constants_are_snapshots(model: Model) -> None:
    """What the user does to an array afterwards changes nothing."""
    a = np.ones(8, dtype=np.float32)
    with model.trace(FRANCE) as run:
        run.save(e=run.embed, sum=run.embed + a)
        a[:] = 100
    np.testing.assert_array_equal(run.results["sum"], run.results["e"] + 1)


def test_python_numbers_are_weak(run: Run) -> None:
    """A Python number, or numpy's float64, does not widen what it meets; a float64 array does."""
    e = run.embed
    assert (e * 2).dtype.name == "float32"
    assert (e * 2.5).dtype.name == "float32"
    assert (e * np.float64(2.5)).dtype.name == "float32"
    assert (e * np.array([2.5])).dtype.name == "float64"
    assert ((e > 0) + 1).dtype.name == "int64"


def test_negative_zero_true_and_one_stay_apart(run: Run) -> None:
    """Numbers are merged by type and sign, not by equality."""
    e = run.embed
    nodes = [(e + v)._node for v in (0.0, -0.0, 0, False, 1, 1.0, True)]
    builder = run.trace.builder
    assert len({builder.nodes[n].args[1] for n in nodes}) == 7


INDICES: list[Any] = [
    0,
    -1,
    (0, -1),
    (slice(None), -1),
    (..., 3),
    (slice(None), slice(1, 4), slice(None, None, 2)),
    (slice(None), slice(None), None, 2),
    (None, ..., None),
    (0, [1, 2, 2]),
    (0, np.array([[0, 1], [2, 3]])),
    ([0, 0], [1, 2]),
    (0, [0, 1], [2, 3]),
    ([0], slice(None), [1, 2]),
    (slice(None), range(3)),
    (0, np.array([True, False, True, False, False, True])),
    (slice(None), np.int64(2)),
    np.zeros((1, 6), dtype=bool),
    (slice(None), []),
    (slice(0, 0),),
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_indexing_is_numpys(model: Model, index: Any) -> None:
    """Every index gives numpy's shape before the run, and numpy's values after it."""
    with model.trace(FRANCE) as run:
        part = run.embed[index]
        run.save(whole=run.embed, part=part)
    wanted = run.results["whole"][index]
    assert part.shape == wanted.shape
    np.testing.assert_array_equal(run.results["part"], wanted)


def test_values_of_the_trace_index_too(model: Model) -> None:
    """An integer value of the trace is an index like any other."""
    with model.trace([FRANCE, ITALY]) as run:
        best = run.logits[:, -1].argmax(axis=-1)
        run.save(best=best, logits=run.logits, top=run.logits[range(2), -1, best])
    r = run.results
    np.testing.assert_array_equal(r["top"], r["logits"][np.arange(2), -1, r["best"]])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (7, IndexOutOfRangeError, "out of range"),
        ((0, [1, 6]), IndexOutOfRangeError, "index 6 is out of range for axis 1 of extent 6"),
        ((0, 0, 0, 0), ShapeError, "4 indices"),
        ("France", GraphError, "run.position"),
        (1.5, DTypeError, "integer"),
        (True, GraphError, "single bool"),
        (slice(None, None, -1), GraphError, "flip"),
        (slice("a"), GraphError, "slice bounds"),
        ((..., ...), GraphError, "one ellipsis"),
    ],
)
def test_wrong_indices_say_what_is_wrong(run: Run, index: Any, error: type[Exception], message: str) -> None:
    """Each with the most specific error, at once."""
    with pytest.raises(error, match=message):
        run.embed[index]


def test_slices_by_values_are_refused(run: Run) -> None:
    """A slice bound must be known, for shapes to be."""
    i = run.logits.argmax()
    with pytest.raises(TraceError, match="slice bounds must be known"):
        run.embed[:, :i]


def test_shape_errors_name_operands_and_the_users_line(run: Run) -> None:
    """Both shapes, what made them, of which run, and where."""
    h = run.blocks[1].resid_post[:, -1]
    with pytest.raises(ShapeError) as caught:
        h + run.logits
    text = str(caught.value)
    assert "[1, 8]" in text
    assert "[1, 6, 16]" in text
    assert "blocks.1.resid_post[:, -1] of run 'The capital of France is', made at" in text
    line = test_shape_errors_name_operands_and_the_users_line.__code__.co_firstlineno
    assert f"test_proxies.py:{line + 2}" in text
    assert caught.value.location is not None
    assert caught.value.location.endswith(f"test_proxies.py:{line + 4}")


def test_python_needing_the_number_is_refused(run: Run) -> None:
    """Conditions and conversions say what to use instead."""
    x = run.embed[0, 0, 0]
    conversions: list[Callable[[Any], Any]] = [bool, int, float, complex, range, operator.index, lambda v: v and 1]
    for convert in conversions:
        with pytest.raises(ProxyBoolError, match=r"pb\.ops\.where"):
            convert(x)
    with pytest.raises(ProxyBoolError):
        _ = x in [1.0, 2.0]


def test_length_and_iteration_follow_the_first_axis(run: Run) -> None:
    """Extents are known, so `len` and unpacking work and end; a scalar has neither."""
    row = run.embed[0]
    assert len(row) == 6
    parts = list(row)
    assert len(parts) == 6
    assert {p.shape for p in parts} == {(8,)}
    for use in (len, list):
        with pytest.raises(TypeError, match="no axes"):
            use(row[0, 0])


def test_topk_is_a_named_tuple(run: Run) -> None:
    """Several results come back by name."""
    top = run.logits.topk(5)
    assert top._fields == ("values", "indices")
    assert top.values.shape == top.indices.shape == (1, 6, 5)
    assert top.indices.dtype.name == "int64"


def test_array_namespace_and_array(model: Model) -> None:
    """Code written for the array API finds its functions, and numpy finds the value after the run."""
    with model.trace(FRANCE) as run:
        e = run.embed
        xp = e.__array_namespace__()
        assert xp is pb.ops
        s = xp.sum(e, axis=-1, keepdims=True).save()
        with pytest.raises(ValueNotReadyError):
            np.asarray(e)
    np.testing.assert_array_equal(np.asarray(s), s.value)
    assert np.asarray(s, dtype=np.float64).dtype == np.float64


def test_numpys_functions_are_refused_with_advice(run: Run) -> None:
    """numpy works on numbers; inside a trace the same functions are in pb.ops."""
    e = run.embed
    for use in (lambda: np.stack([e, e]), lambda: np.sum(e), lambda: np.where(e > 0, e, 0.0)):
        with pytest.raises(TypeError, match=r"inside the trace use pb\.ops"):
            use()
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(e)


def test_proxies_of_two_traces_do_not_mix(model: Model) -> None:
    """Each side says which of the two mistakes it was."""
    first, second = model.trace(), model.trace()
    a, b = first.run(FRANCE).embed, second.run(ITALY).embed
    for mix in (lambda: a + b, lambda: a[:, b.argmax()], lambda: first.save(x=b), lambda: pb.ops.stack([a, b])):
        with pytest.raises(WrongTraceError, match="another trace"):
            mix()
    with pytest.raises(WrongTraceError, match="another trace"):
        first.runs[0].embed = b
    b.save()
    second.execute()
    with pytest.raises(WrongTraceError, match="already run"):
        a + b


def test_what_is_no_number_is_refused(run: Run) -> None:
    """Strings, objects and complex numbers are no constants."""
    e = run.embed
    for wrong in ("text", object(), np.array([1j]), {"a": 1}, [[1], [1, 2]], np.array(["a"]), np.uint64([1])):
        with pytest.raises(DTypeError):
            e + wrong


def test_comparison_with_none_is_pythons(run: Run) -> None:
    """`x == None` and `x == "a"` are plain False, as for any object."""
    e = run.embed
    assert (e == None) is False  # noqa: E711
    assert (e != "a") is True


def test_proxies_are_hashable_copied_as_themselves_and_not_pickled(run: Run) -> None:
    """They are handles of one trace."""
    e = run.embed
    assert len({e, e}) == 1
    assert copy.copy(e) is e
    assert copy.deepcopy([e])[0] is e
    with pytest.raises(TraceError, match="pickled"):
        pickle.dumps(e)


def test_unknown_attributes_are_attribute_errors(run: Run) -> None:
    """`hasattr` answers; protocols that look for special names find none."""
    assert not hasattr(run.embed, "no_such_function")
    assert not hasattr(run.embed, "__array_interface__")


def test_repr_says_what_and_where(run: Run) -> None:
    """Dtype, shape, the formula, the run and the line."""
    text = repr((run.blocks[1].resid_post[:, -1] * 2.0).softmax(-1))
    assert text.startswith("<float32[1, 8] softmax(")
    assert "blocks.1.resid_post[:, -1] * 2.0" in text
    assert "test_proxies.py:" in text


def test_bfloat16_and_float8_travel_as_themselves(model: Model) -> None:
    """Results in narrow floats are ml_dtypes arrays; constants of those types are understood."""
    with model.trace(FRANCE) as run:
        run.save(
            narrow=run.embed.astype("bfloat16"),
            eight=run.embed.astype(ml_dtypes.float8_e4m3fn),
            sum=run.embed.astype(pb.ops.bfloat16) + np.ones(8, dtype=ml_dtypes.bfloat16),
        )
    assert run.results["narrow"].dtype == ml_dtypes.bfloat16
    assert run.results["eight"].dtype == ml_dtypes.float8_e4m3fn
    assert run.results["sum"].dtype == ml_dtypes.bfloat16


def test_big_endian_and_strided_constants(model: Model) -> None:
    """Byte order and layout of the user's array do not matter."""
    a = np.arange(16, dtype=">f4")[::2]
    with model.trace(FRANCE) as run:
        run.save(sum=run.embed * 0.0 + a)
    np.testing.assert_array_equal(run.results["sum"][0, 0], a.astype(np.float32))


def test_plus_equals_on_a_variable_makes_a_new_value(model: Model, transport: CountingTransport) -> None:
    """Only an assignment to a site writes; names are Python's to rebind."""
    with model.trace(FRANCE) as run:
        h = run.embed
        before = h
        h += 1.0
        h -= 0.5
        run.save(h=h, before=before)
    assert "site.write" not in [n.op for n in transport.executed[0][0].nodes]
    np.testing.assert_allclose(run.results["h"], run.results["before"] + 0.5, rtol=1e-6)


def test_constants_of_a_trace(model: Model) -> None:
    """`t.constant` begins a computation from an array or number."""
    with model.trace() as t:
        t.run(FRANCE)
        c = t.constant([1.0, 2.0])
        t.save(x=c * 2, n=t.constant(3), z=pb.ops.zeros((2,)))
    np.testing.assert_array_equal(t.results["x"], [2.0, 4.0])
    assert t.results["n"] == 3
    assert t.results["n"].shape == ()
    np.testing.assert_array_equal(t.results["z"], [0.0, 0.0])


def test_type_of_a_proxy(run: Run) -> None:
    """shape, dtype, ndim and size are known at once."""
    x = run.logits[:, -1]
    assert isinstance(x, Proxy)
    assert (x.shape, x.ndim, x.size, x.dtype.name) == ((1, 16), 2, 16, "float32")
    with pytest.raises(GraphError, match="mT"):
        _ = x[0].mT
