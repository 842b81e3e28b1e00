"""What a graph costs before it runs, counted in calls and lines: in proportion to its nodes, and the same result."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import patchbay as pb
from patchbay.errors import CausalityError, GraphError
from patchbay.ir.dtypes import DTYPES, bool_, float32, int64
from patchbay.ir.graph import Graph, Node, Run
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.schedule import schedule
from patchbay.ir.verify import verify
from patchbay.wire.graphs import decode_graph, encode_graph
from patchbay_server.engine import Engine
from patchbay_server.engine.direct import direct
from patchbay_server.kernels import kernel, to_torch_dtype
from patchbay_server.models.loader import host
from tests.ir.cards import small_card
from tests.tiny import build

IDS = [[1, 5, 9, 3, 7]]


@pytest.fixture(scope="module")
def model() -> pb.Model:
    """A tiny Llama in this process."""
    return pb.local(build("llama"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    """An engine on the same."""
    return Engine(host(build("llama")))


def chain(x: Any, count: int) -> Any:
    """Every value from the last one and the first."""
    first = x
    for number in range(count):
        x = (x + first) if number % 2 else x * 0.999
    return x


def fan(x: Any, count: int) -> Any:
    """Every value from the first and a number of its own, all of them used at the end."""
    return pb.ops.stack([x + float(number) for number in range(count)]).sum()


def repeated(x: Any, count: int) -> Any:
    """The same few values again and again, some of constants alone."""
    return pb.ops.stack([x * float(number % 5) + x for number in range(count // 2)]).sum()


def work(what: Callable[[], Any]) -> tuple[Any, int]:
    """What `what` gives, and how many lines and calls it took (of C functions too)."""
    count = 0

    def traced(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return traced

    def profiled(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "c_call"

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(traced)
    sys.setprofile(profiled)
    try:
        return what(), count
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])


@pytest.mark.parametrize("shape", [chain, fan, repeated])
def test_work_per_node_does_not_grow_with_the_graph(
    model: pb.Model, engine: Engine, shape: Callable[[Any, int], Any]
) -> None:
    """Building, checking, encoding, decoding and planning ten times the nodes takes ten times the work, not more."""

    def whole(count: int) -> list[int]:
        def built() -> Any:
            trace = model.trace()
            trace.save(x=shape(trace.run(IDS).embed[0, -1, :2], count))
            return trace.graph

        graph, build = work(built)
        _, check = work(lambda: verify(graph, model.card, facts=graph.facts))
        message, encode = work(lambda: encode_graph(graph))
        received, decode = work(lambda: decode_graph(message))
        plan, prepare = work(lambda: engine.prepare(received))
        assert plan.received > count / 2
        return [build, check, encode, decode, prepare]

    whole(20)  # what is made once
    for small, large in zip(whole(200), whole(2_000), strict=True):
        assert large < 12 * small


class Compared(int):
    """A number that counts how often one of its kind is compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_a_long_cycle_is_found_in_proportion_to_its_length() -> None:
    """A write that needs a later site of its run by way of thousands of values is refused after one walk over them."""

    def cycle(length: int) -> Graph:
        late, early = "blocks.1.resid_post", "blocks.0.resid_post"
        nodes = [Node("site.read", (), {"site": late}, 0)]
        nodes += [Node("tanh", (Compared(i),)) for i in range(length)]
        nodes += [Node("site.write", (Compared(length),), {"site": early, "mode": "set", "index": ()}, 0)]
        return Graph((Run(((1, 2),)),), tuple(nodes))

    for length in (10, 2_000):
        Compared.count = 0
        with pytest.raises(CausalityError):
            schedule(cycle(length), small_card(), joint=True)
        assert Compared.count < 10 * length


def test_steps_of_long_generations_are_planned_in_proportion(model: pb.Model, engine: Engine) -> None:
    """A generation of five times the steps takes five times the planning."""

    def planned(steps: int) -> int:
        trace = model.trace()
        run = trace.generate(IDS, max_new_tokens=steps)
        trace.save(seen=run.stacked(run.blocks[1].resid_post[:, -1]))
        graph = decode_graph(encode_graph(trace.graph))
        return work(lambda: engine.prepare(graph))[1]

    planned(5)
    assert planned(25) < 7 * planned(5)


_FLOATS = ("float32", "float64")
_NUMBERS: list[tuple[Any, TensorSpec]] = [
    (2, TensorSpec((), int64, "int")),
    (2**40, TensorSpec((), int64, "int")),
    (-1.5, TensorSpec((), float32, "float")),
    (0.1, TensorSpec((), float32, "float")),
    (True, TensorSpec((), bool_, "bool")),
]


@pytest.mark.parametrize(
    "op",
    ["add", "subtract", "multiply", "divide", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
     "maximum", "minimum", "matmul"],
)  # fmt: skip
def test_what_is_applied_directly_equals_the_kernel_to_the_bit(op: str) -> None:
    """For every pair of dtypes and numbers that has a shorter way: the same values, the same dtype."""
    generator = torch.Generator().manual_seed(0)
    spec, shorter = op_spec(op), 0
    values: list[tuple[Any, TensorSpec]] = [
        (
            torch.randn(3, 3, generator=generator, dtype=torch.float64).to(to_torch_dtype(DTYPES[name])),
            TensorSpec((3, 3), DTYPES[name]),
        )
        for name in (*_FLOATS, "bfloat16", "int64")
    ]
    values += _NUMBERS
    for (a, a_spec), (b, b_spec) in itertools.product(values, values):
        if a_spec.scalar and (b_spec.scalar or op == "matmul"):
            continue
        if b_spec.scalar and op == "matmul":
            continue
        try:
            result = spec.infer([a_spec, b_spec], {})
        except GraphError:
            continue
        function = direct(op, {}, [a_spec, b_spec], result)
        if function is None:
            continue
        shorter += 1
        try:
            expected = kernel(spec)(a, b)
        except RuntimeError:  # torch subtracts no bools; nor does the shorter way
            with pytest.raises(RuntimeError):
                function(a, b)
            continue
        found = function(a, b)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert shorter >= 2
