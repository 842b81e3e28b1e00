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
    ArgumentError,
    DTypeError,
    GraphError,
    IndexOutOfRangeError,
    MissingAttributeError,
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
        with pytest.raises(ProxyBoolError, match=r"inside the trace use pb\.ops\.") as caught:
            use()
        assert isinstance(caught.value, TypeError) and "test_proxies.py:" in str(caught.value)
    with pytest.raises(ProxyBoolError, match=r"numpy\.add\.reduce needs the numbers"):
        np.add.reduce(e)


def test_numpys_ufuncs_are_the_operations_of_their_names(model: Model) -> None:
    """In a trace they make values of it, beside arrays and numbers on either side; into an array nothing is put."""
    weights = np.linspace(-1.0, 1.0, 8, dtype=np.float32)
    with model.trace(FRANCE) as run:
        e = run.embed
        run.save(
            e=e,
            many=[np.exp(e), np.power(abs(e), 2.0), np.arctan2(e, weights), np.invert(e > 0), weights * e, weights < e],
            double=np.float64(2.0) * e,
        )
        total = np.zeros((1, run.seq, 8), np.float32)
        with pytest.raises(ArgumentError, match="cannot be put into an array") as caught:
            total += e
        assert "test_proxies.py:" in str(caught.value)
        with pytest.raises(ProxyBoolError, match=r"numpy\.hypot needs the numbers.*a function of pb\.ops"):
            np.hypot(e, 1.0)
    e = run.results["e"]
    wanted = [np.exp(e), np.power(abs(e), 2.0), np.arctan2(e, weights), ~(e > 0), weights * e, weights < e]
    for found, value in zip(run.results["many"], wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-6)
    assert run.results["double"].dtype == np.float32


def test_a_known_value_is_a_number_wherever_one_is_needed(model: Model) -> None:
    """Once the trace has run: conversions, formats, conditions, numpy's functions; what was not saved says so."""
    with model.trace(FRANCE) as run:
        number, row, lost = run.embed.sum().save(), run.embed[0, 0].save(), run.embed.mean()
    value = run.results["value_1"].item()
    assert float(number) == value and int(number) == int(value) and bool(number) and complex(number) == value
    assert f"{number:.3f}" == f"{value:.3f}" and round(number, 1) == round(np.float32(value), 1)
    assert str(value)[:8] in repr(number) and "its numbers in .value" in repr(row)
    assert np.exp(number) == np.exp(np.float32(value)) and np.max(row) == row.value.max()
    assert row.value[3] in row
    for use in (lambda: float(lost), lambda: np.mean([lost, number]), lambda: f"{lost:.2f}"):
        with pytest.raises(ValueNotReadyError, match="was not saved"):
            use()
    with pytest.raises(TraceError, match=r"has run.*\.value"):
        number + 1
    with pytest.raises(AttributeError, match=r"has run.*\.value"):
        number.tolist()


def test_other_tools_names_are_answered_with_the_right_ones(run: Run) -> None:
    """torch's methods, misspelt ones and functions that are no methods: each error says what to write."""
    hints = {
        "cpu": "numpy arrays",
        "unsqueeze": "expand_dims",
        "item": r"\.value",
        "backward": r"pb\.grad",
        "detach": "stop_gradient",
        "float": "astype",
        "clone": "never change",
        "view": "reshape",
        "sofmax": "did you mean 'softmax'",
        "where": r"pb\.ops\.where",
    }
    for name, hint in hints.items():
        with pytest.raises(MissingAttributeError, match=hint) as caught:
            getattr(run.embed, name)
        assert "test_proxies.py:" in str(caught.value)
    assert not hasattr(run.embed, "item") and not hasattr(run.embed, "_repr_html_")


def test_wide_values_are_described_in_few_words(run: Run) -> None:
    """A stack of hundreds of stacks, in a repr and in an error; products of sums keep their parentheses."""
    e = run.embed
    wide = pb.ops.stack([pb.ops.stack([e] * 50)] * 50)
    assert len(repr(wide)) < 1000 and "and 46 more" in repr(wide)
    with pytest.raises(ShapeError) as caught:
        pb.ops.stack([e] * 30 + [e[0]] + [e] * 30)
    assert str(caught.value).count("\n") == 3 and "embed[0]" in str(caught.value)
    assert "(embed + 1) * 2" in repr((e + 1) * 2) and "embed - (embed + 1)" in repr(e - (e + 1))
    assert "embed + 1 + 2" in repr(e + 1 + 2)


def test_torch_beside_values(run: Run) -> None:
    """Tensors take part in operators on either side; torch's own functions name the operation to use."""
    torch = pytest.importorskip("torch")
    ones = torch.ones(8)
    for value in (ones * run.embed, run.embed * ones, ones + run.embed, ones - run.embed, ones @ run.embed[0, 0]):
        assert isinstance(value, Proxy)
    for use, name in ((torch.softmax, "softmax"), (lambda x, _: torch.cat([x]), "concat")):
        with pytest.raises(ProxyBoolError, match=rf"use pb\.ops\.{name}"):
            use(run.embed, -1)


def test_lists_of_values_and_other_things_that_are_no_arrays(run: Run) -> None:
    """Beside a value and written at a site: what was seen, what for, and the line."""
    e = run.embed
    with pytest.raises(ArgumentError, match=r"join them with pb\.ops\.stack"):
        e + [e[0, 0, 0]] * 8
    for use in (lambda: e + "a", lambda: e * 1j, lambda: e + None, lambda: e + [[1, 2], [3]]):
        with pytest.raises(DTypeError) as caught:
            use()
        assert "test_proxies.py:" in str(caught.value)
    with pytest.raises(DTypeError, match=r"^write at blocks\.0\.resid_post: str 'zero'") as caught:
        run.blocks[0].resid_post = "zero"
    assert "test_proxies.py:" in str(caught.value)


def test_a_mask_fits_its_axis(run: Run) -> None:
    """As numpy has it; every mistake in an index names the line and what was indexed."""
    e = run.embed
    assert e[:, np.arange(run.seq) % 2 == 0].shape == (1, (run.seq + 1) // 2, 8)
    for mask in (np.array([True, False]), np.ones(run.seq + 1, bool)):
        with pytest.raises(IndexOutOfRangeError, match=f"a mask of {mask.size} entries does not fit axis 1") as caught:
            e[:, mask]
        assert "test_proxies.py:" in str(caught.value) and "embed of run" in str(caught.value)
    for index in (0.5, "France", True, {}, slice(None, 2.0)):
        with pytest.raises(GraphError) as found:
            e[index]
        assert "test_proxies.py:" in str(found.value) and "embed of run" in str(found.value)


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
