"""scan, cond and vmap while the graph is built: trees, values taken along, and mistakes at the user's own line."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import DTypeError, GraphError, PatchbayError, ShapeError, TraceError
from patchbay.testing import fake_client
from patchbay.tracing import Trace


@pytest.fixture
def trace() -> Trace:
    """An open trace of the fake server's model."""
    return fake_client().model("fake").trace()


def line_of(error: GraphError) -> str:
    """The source line that an error names."""
    assert error.location is not None
    file, _, number = error.location.rpartition(":")
    return Path(file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()


def test_trees_keep_their_form(trace: Trace) -> None:
    """Tuples, lists, dicts and None go round as they are; shapes are known at once."""
    x = trace.constant(np.zeros((5, 3), "float32"))

    def step(carry: Any, row: Any) -> Any:
        assert isinstance(carry, dict) and isinstance(carry["p"], tuple) and carry["q"] is None
        return {"q": None, "p": (carry["p"][0] + row["r"], carry["p"][1] + 1)}, [row["r"].sum(), None]

    carry, ys = pb.scan(step, {"p": (np.zeros(3, "float32"), 0), "q": None}, {"r": x})
    assert carry["p"][0].shape == (3,) and carry["p"][1].shape == () and carry["q"] is None
    assert carry["p"][1].dtype.name == "int64"
    assert isinstance(ys, list) and ys[0].shape == (5,) and ys[1] is None


def test_values_from_outside_become_arguments_once(trace: Trace) -> None:
    """What a function mentions is taken along, arrays too; a number stays inside."""
    run = trace.run([1, 2])
    w = run.blocks[0].resid_post[0, 0]
    table = np.ones(w.shape, "float32")
    pb.scan(lambda c, _: (c * 0.5 + w + table + w, None), w, length=3)[0].save("end")
    graph = trace.graph
    scan = next(n for n in graph.nodes if n.op == "scan")
    assert len(graph.bodies) == 1 and len(scan.args) == 3 == len(graph.bodies[0].params)
    assert [n.attrs["scalar"] for n in graph.bodies[0].nodes if n.op == "const"] == [0.5]
    assert not any(n.op == "body.param" for n in graph.nodes)


def test_loops_inside_loops_take_along_from_every_level(trace: Trace) -> None:
    """An inner function mentions values of the outer one and of the trace."""
    outside = trace.constant([1.0, 2.0])

    def outer(c: Any, x: Any) -> Any:
        inner, _ = pb.scan(lambda d, _: (d + x + outside.sum() + c, None), c, length=2)
        return inner, pb.cond(x > 0, lambda: inner + outside[0], lambda: x * 1.0)

    end, ys = pb.scan(outer, 0.0, trace.constant([1.0, -1.0, 2.0]))
    trace.save(end=end, ys=ys)
    trace.validate()
    assert ys.shape == (3,) and len(trace.graph.bodies) == 4


def test_the_trace_is_found_through_what_the_function_mentions(trace: Trace) -> None:
    """init may be plain arrays: the closure, a partial's arguments or a default tell which trace is meant."""
    x = trace.constant([1.0, 2.0])
    zero = np.zeros(2, "float32")
    assert pb.scan(lambda c, _: (c + x, None), zero, length=2)[0].shape == (2,)
    assert pb.scan(functools.partial(lambda k, c, _: (c + k, None), x), zero, length=2)[0].shape == (2,)
    with pytest.raises(TraceError, match="constant"):
        pb.scan(lambda c, _: (c, None), zero, length=2)


def test_what_is_carried_keeps_its_shape(trace: Trace) -> None:
    """The message names both shapes, and the line that made the new one."""
    with pytest.raises(ShapeError, match=r"float32\[2\] and leaves it as float32\[3, 2\]") as wrong:

        def step(c: Any, _: Any) -> Any:
            grown = c + np.zeros((3, 2), "float32")
            return grown, None

        pb.scan(step, trace.constant([1.0, 2.0]), length=2)
    assert line_of(wrong.value) == 'grown = c + np.zeros((3, 2), "float32")'


def test_what_is_carried_keeps_its_dtype(trace: Trace) -> None:
    """A step that makes float32 of int64 is told both; Python numbers take what is carried's dtype."""
    with pytest.raises(DTypeError, match=r"int64\[\] and leaves it as float32\[\]"):
        pb.scan(lambda c, _: (c * 0.5, None), trace.constant(1), length=2)
    half = trace.constant(np.zeros(2, "float16"))
    assert pb.scan(lambda c, _: (c * 0.5 + 1, None), half, length=2)[0].dtype.name == "float16"
    assert pb.scan(lambda c, _: (1.0, None), trace.constant(np.float16(2)), length=2)[0].dtype.name == "float16"


def test_a_step_reads_and_writes_at_no_run(trace: Trace) -> None:
    """Sites, runs and saves inside a function are refused at their own line."""
    run = trace.run([1, 2])
    x = run.blocks[0].resid_post

    def reads(c: Any, _: Any) -> Any:
        return c + run.blocks[1].resid_post.sum(), None

    def writes(c: Any, _: Any) -> Any:
        run.blocks[1].resid_post = x
        return c, None

    for step, line in ((reads, "return c + run.blocks[1]"), (writes, "run.blocks[1].resid_post = x")):
        with pytest.raises(GraphError, match=r"given to scan at \S*test_control.py:\d+ is pure") as wrong:
            pb.scan(step, trace.constant(0.0), length=2)
        assert line_of(wrong.value).startswith(line)

    def begins(c: Any, _: Any) -> Any:
        trace.run([1])
        return c, None

    def saves(c: Any, _: Any) -> Any:
        c.save()
        return c, None

    for step in (begins, saves):
        with pytest.raises(TraceError, match="inside the function given to scan"):
            pb.scan(step, trace.constant(0.0), length=2)
    trace.save(x=x)
    trace.validate()


def test_values_do_not_leave_their_function(trace: Trace) -> None:
    """A value kept from inside a function is refused wherever it is used later."""
    kept: list[Any] = []

    def step(c: Any, _: Any) -> Any:
        kept.append(c * 2)
        return c, None

    pb.scan(step, trace.constant(0.0), length=2)
    for use in (lambda: kept[0] + 1, lambda: kept[0].save(), lambda: trace.save(a=kept[0])):
        with pytest.raises(TraceError, match="return it from the function"):
            use()


def test_an_exception_in_a_function_leaves_the_trace_usable(trace: Trace) -> None:
    """A step that raises is as if it had not been traced."""

    def step(c: Any, _: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pb.scan(step, trace.constant(0.0), length=2)
    run = trace.run([1])
    trace.save(x=run.blocks[0].resid_post)
    trace.validate()
    assert not trace.graph.bodies


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda t: pb.scan(lambda c, x: c, t.constant(0.0), length=2), "pair"),
        (lambda t: pb.scan(lambda c, x: (c, None), t.constant(0.0)), "length"),
        (lambda t: pb.scan(lambda c, x: (c, None), t.constant(0.0), t.constant(1.0)), "slices"),
        (lambda t: pb.scan(lambda c, x: (c, None), t.constant(0.0), t.constant([1.0]), length=2), "2 steps"),
        (lambda t: pb.scan(lambda c, x: (c, None), t.constant(0.0), length=-1), "from 0 up, not the int -1"),
        (lambda t: pb.scan(1, 2), r"fn is a function of \(carry, x\), not the int 1"),
        (lambda t: pb.scan(lambda c: (c, None), t.constant(0.0), length=2), r"called with \(carry, x\)"),
        (lambda t: pb.scan(lambda c, x: (c, None), t.constant(0.0), length=True), "not the bool True"),
        (lambda t: pb.cond(t.constant(1.0) > 0, t.constant(1.0), lambda: 2.0), "true_fn is a function.*not the Proxy"),
        (lambda t: pb.cond(t.constant(1.0) > 0, lambda: 1.0, lambda x: x), "false_fn is called with"),
        (lambda t: pb.vmap(t.constant([1.0])), "fn is a function, not the Proxy"),
        (lambda t: pb.vmap(lambda x, y: x)(t.constant([1.0])), "missing a required argument"),
        (lambda t: pb.vmap(lambda x: x, in_axes="rows"), "in_axes is an integer"),
        (lambda t: pb.scan(lambda c, x: (c, None), t.constant(0.0), length=2.5), "integer"),
        (lambda t: pb.scan(lambda c, x: ((c, c), None), t.constant(0.0), length=2), "must be a value"),
        (lambda t: pb.scan(lambda c, x: ({"b": c["a"]}, None), {"a": t.constant(0.0)}, length=2), "keys"),
        (lambda t: pb.cond(t.constant([True, False]), lambda: 1.0, lambda: 2.0), "pb.where"),
        (lambda t: pb.cond(t.constant(1.0) > 0, lambda: t.constant(1.0), lambda: t.constant([1.0])), "result 0"),
        (lambda t: pb.cond(t.constant(1.0) > 0, lambda: (1.0, 2.0), lambda: 1.0), "tuple of 2"),
        (lambda t: pb.vmap(lambda x: x, in_axes=None)(t.constant([1.0])), "no argument is mapped"),
        (lambda t: pb.vmap(lambda x, y: x)(t.constant([1.0]), t.constant([1.0, 2.0])), "shapes"),
        (lambda t: pb.vmap(lambda x: x, in_axes=3)(t.constant([1.0])), "axis 3"),
        (lambda t: pb.vmap(lambda x: None)(t.constant([1.0])), "gives nothing"),
    ],
)
def test_mistakes_say_what_to_do(trace: Trace, wrong: Any, says: str) -> None:
    """Each raises at once, in a sentence."""
    with pytest.raises(PatchbayError, match=says):
        wrong(trace)


def test_a_gradient_of_something_else(trace: Trace) -> None:
    """Inside a function, a metric that does not depend on the value is refused at the gradient's line."""
    x = trace.constant([1.0, 2.0])
    y = (x * x).sum()
    with pytest.raises(GraphError, match="does not depend") as wrong:

        def step(c: Any, _: Any) -> Any:
            return c, pb.grad(y * 2, wrt=c)  # not of c

        pb.scan(step, trace.constant(0.0), length=2)
    assert "# not of c" in line_of(wrong.value)


def test_equal_functions_make_one_body(trace: Trace) -> None:
    """A function that is used again, or another that does the same, adds no body."""
    x = trace.constant([1.0, 2.0])
    a = pb.vmap(lambda v: v * 2)(x)
    b = pb.vmap(lambda v: v * 2)(x + 1)
    c = pb.vmap(lambda v: v * 2.0)(x)
    trace.save(a=a, b=b, c=c)
    assert len(trace.graph.bodies) == 2


def test_where_chooses_element_by_element(trace: Trace) -> None:
    """pb.where is pb.ops.where."""
    x = trace.constant([1.0, -2.0])
    assert pb.where(x > 0, x, 0.0).shape == (2,)
    assert pb.where.__doc__ is not None and "element by element" in pb.where.__doc__


def test_the_fake_server_takes_loops() -> None:
    """A trace with a loop runs there too, to values of the right shapes."""
    with fake_client().model("fake").trace() as t:
        x = t.run([1, 2]).blocks[0].resid_post[0]
        end, ys = pb.scan(lambda c, row: (c + row, c.sum()), np.zeros(x.shape[1:], "float32"), x)
        t.save(end=end, ys=ys)
    assert t.results["end"].shape == x.shape[1:] and t.results["ys"].shape == (2,)
