"""Graphs that come again byte for byte are read and planned once, for each account, and give the same results."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.ir.limits import Limits
from patchbay.wire.graphs import encode_graph
from patchbay_server.engine import Engine
from patchbay_server.engine.plan import Means
from patchbay_server.engine.recurring import Questions, RecurringPlans
from patchbay_server.engine.switches import RECURRING_GRAPHS
from patchbay_server.models.continuation import Trunk
from patchbay_server.models.loader import host
from patchbay_server.transport.recurring import MAX_GRAPH_BYTES, RecurringGraphs
from tests.tiny import build


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A tiny model in this process."""
    yield pb.local(build("llama"))


def _read(model: Any, scale: float, *disabled: str) -> tuple[np.ndarray, int]:
    with model.trace([[1, 2, 3], [4, 5, 6]], disabled=disabled) as run:
        run.blocks[0].resid_post[:, -1] *= scale
        found = (run.blocks[1].resid_post * 2.0).sum(axis=-1).save()
    return found.value, run.usage.saved.get(RECURRING_GRAPHS, 0)


def test_a_graph_that_comes_again_is_planned_once_and_gives_the_same(model: Any) -> None:
    """A later time says what it saved; with the switch off nothing is; values are equal to the bit."""
    first, fresh = _read(model, 3.0)
    times = [_read(model, 3.0) for _ in range(4)]  # the first of them leave something that later ones go on from
    again, saved = times[-1]
    plain, off = _read(model, 3.0, RECURRING_GRAPHS)
    other, different = _read(model, 4.0)
    assert (fresh, off, different) == (0, 0, 0)
    assert saved > 0
    np.testing.assert_array_equal(times[-2][0], again)
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_allclose(first, again, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(first, other)


def test_requests_that_share_a_plan_at_once_do_not_meet(model: Any) -> None:
    """Many at a time, over one plan: each has its own values."""
    expected, _ = _read(model, 5.0)
    with ThreadPoolExecutor(8) as pool:
        for value, _ in pool.map(lambda _: _read(model, 5.0), range(32)):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def _graph(number: float) -> Graph:
    nodes = (Node("arange", (), {"start": 0.0, "stop": number, "step": 1.0, "dtype": "float32"}),)
    return Graph(nodes=nodes, outputs=(Output("x", 0),))


def test_equal_bytes_of_one_account_are_one_graph() -> None:
    """Another account, other bytes, and large graphs get graphs of their own."""
    graphs, limits = RecurringGraphs(), Limits()
    one = graphs.decode("a", encode_graph(_graph(4.0)), limits)
    assert one == _graph(4.0)
    assert graphs.decode("a", encode_graph(_graph(4.0)), limits) is one
    assert graphs.decode("b", encode_graph(_graph(4.0)), limits) is not one
    assert graphs.decode("a", encode_graph(_graph(5.0)), limits) != one
    large = replace(_graph(4.0), nodes=_graph(4.0).nodes * (MAX_GRAPH_BYTES // 20))
    assert graphs.decode("a", encode_graph(large), limits) is not graphs.decode("a", encode_graph(large), limits)


def test_what_is_remembered_is_bounded() -> None:
    """The graph that was not asked for longest is forgotten first."""
    size = encode_graph(_graph(1.0)).ByteSize()
    graphs, limits = RecurringGraphs(max_bytes=3 * size), Limits()
    found = [graphs.decode("a", encode_graph(_graph(float(i))), limits) for i in (1, 2, 3)]
    assert graphs.decode("a", encode_graph(_graph(1.0)), limits) is found[0]
    graphs.decode("a", encode_graph(_graph(4.0)), limits)
    assert graphs.decode("a", encode_graph(_graph(1.0)), limits) is found[0]
    assert graphs.decode("a", encode_graph(_graph(2.0)), limits) is not found[1]


def test_plans_are_bounded_and_known_by_graph_options_and_account() -> None:
    """A plan is found for the same graph, options and account only, and the oldest is dropped."""
    engine, options = Engine(host(build("llama"), name="tiny")), ExecuteOptions()
    graphs = [_graph(float(i)) for i in (4, 5, 6)]
    plans, means = RecurringPlans(max_nodes=10, max_plans=2), Means()
    for graph in graphs:
        plans.put(graph, options, "a", engine.prepare(graph, options), Questions(means))
    assert plans.get(graphs[0], options, "a", means) is None
    found = plans.get(graphs[2], options, "a", means)
    assert found is not None
    assert found.saved[RECURRING_GRAPHS] == 1
    assert plans.get(graphs[2], options, "b", means) is None
    assert plans.get(graphs[2], ExecuteOptions(deterministic=True), "a", means) is None
    assert plans.get(_graph(6.0), options, "a", means) is None


def test_a_plan_is_not_used_when_what_earlier_requests_left_has_changed() -> None:
    """A plan that goes on from something is found while that very thing is there, and holds on to nothing of it."""
    engine, options = Engine(host(build("llama"), name="tiny")), ExecuteOptions()
    run, graph, plans = Run(((1, 2, 3),)), _graph(4.0), RecurringPlans()
    there: list[Trunk | None] = [Trunk()]
    means = Means(trunk_of=lambda _: there[0])
    asked = Questions(means)
    trunk = asked.recorded().trunk_of(run)
    assert trunk is not None
    plans.put(graph, options, "a", replace(engine.prepare(graph, options), trunks={0: trunk}), asked)
    found = plans.get(graph, options, "a", means)
    assert found is not None
    assert found.trunks[0] is trunk
    gone = weakref.ref(trunk)
    del found, asked, trunk
    there[0] = Trunk()
    assert plans.get(graph, options, "a", means) is None
    assert gone() is None


def test_a_plan_is_not_used_when_something_else_is_wanted_of_it() -> None:
    """A plan that leaves nothing does not serve when later requests want something of its run, nor the reverse."""
    engine, options = Engine(host(build("llama"), name="tiny")), ExecuteOptions()
    graph, plans, wants = _graph(4.0), RecurringPlans(), [False]
    means = Means(wanted=lambda _: wants[0])
    for wanted in (False, True):
        wants[0] = wanted
        asked = Questions(means)
        assert asked.recorded().wanted(Run(((1, 2, 3),))) is wanted
        plans.put(graph, options, "a", engine.prepare(graph, options), asked)
        assert plans.get(graph, options, "a", means) is not None
        wants[0] = not wanted
        assert plans.get(graph, options, "a", means) is None
