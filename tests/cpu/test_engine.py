"""The engine's promises: work left out, nothing left behind, values that never alias, errors that name their node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from patchbay.errors import (
    GraphError,
    IndexOutOfRangeError,
    LimitExceededError,
    RequestCancelledError,
    ResourceExhaustedError,
)
from patchbay.ir.dtypes import float32, int64
from patchbay.ir.events import Event, ExecuteOptions, Progress, TensorValue, Usage
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay_server.engine import Engine, forwards
from patchbay_server.engine.decoding import DecodeBatches
from patchbay_server.engine.executor import Execution
from patchbay_server.engine.forwards import ForwardCall
from patchbay_server.kernels import to_data, to_tensor
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.loader import host
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, build

IDS = ((1, 5, 9, 3, 7),)
OTHER = ((2, 2, 8, 30, 11),)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine on a fresh model; afterwards no hook may be left on it, whatever happened."""
    engine = Engine(host(build("llama")))
    yield engine
    for module in engine.hosted.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not [k for k in module.__dict__ if k.startswith("_patchbay")]


def run(
    engine: Engine, graph: Graph, *, cancelled: Callable[[], bool] = lambda: False, **options: Any
) -> tuple[dict[str, torch.Tensor], Usage, list[Event]]:
    events: list[Event] = []
    usage = engine.run(engine.prepare(graph, ExecuteOptions(**options)), events.append, cancelled)
    return {e.name: to_tensor(e.value) for e in events if isinstance(e, TensorValue)}, usage, events


def read(site: str, of: int = 0) -> Node:
    return Node("site.read", (), {"site": site}, of)


def write(value: int, site: str, of: int = 0, mode: str = "set", index: Any = (), arrays: tuple[int, ...] = ()) -> Node:
    return Node("site.write", (value, *arrays), {"site": site, "mode": mode, "index": index}, of)


def scalar(value: float) -> Node:
    return Node("const", (), {"scalar": value})


def constant(value: torch.Tensor) -> Node:
    data = to_data(value)
    return Node("const", (), {"value": TensorData(data.dtype, data.shape, bytes(data.data))})


def graph(*nodes: Node, out: int | None = None, runs: tuple[Run, ...] = (Run(IDS),)) -> Graph:
    return Graph(runs, nodes, (Output("out", len(nodes) - 1 if out is None else out),))


def plain(tokens: Any = IDS) -> torch.Tensor:
    with torch.no_grad():
        return build("llama")(input_ids=torch.tensor(tokens), use_cache=False).logits


# --- doing less ---------------------------------------------------------------------------------------------------


def test_a_forward_ends_after_the_last_site_that_is_needed(engine: Engine) -> None:
    """Reading layer 0 runs one layer; later modules are never called; switching it off runs them all."""
    called: list[str] = []
    handles = [
        engine.hosted.model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
        for path in (*engine.hosted.layers, "lm_head")
    ]
    early, usage, _ = run(engine, graph(read("blocks.0.resid_post")))
    stopped = list(called)
    called.clear()
    full, full_usage, _ = run(engine, graph(read("blocks.0.resid_post")), disabled=("early_stop",))
    for handle in handles:
        handle.remove()
    assert "lm_head" not in stopped and "model.layers.1" not in stopped
    assert called == [*engine.hosted.layers, "lm_head"]
    assert (usage.layers_run, usage.layers_skipped, usage.saved["early_stop"]) == (1, 2, 2)
    assert (full_usage.layers_run, full_usage.layers_skipped) == (N_LAYERS, 0)
    assert torch.equal(early["out"], full["out"])


def test_nothing_that_no_output_needs_is_computed(engine: Engine) -> None:
    """Dead reads, operations and writes vanish and are counted; a run with nothing needed makes no forward."""
    nodes = (
        read("logits"),
        Node("exp", (0,)),
        read("blocks.0.resid_pre", 1),
        scalar(0.0),
        write(3, "blocks.2.resid_post"),
        read("blocks.0.mlp_out"),
    )
    _, usage, _ = run(engine, graph(*nodes, runs=(Run(IDS), Run(OTHER))))
    assert usage.nodes == 6 and usage.nodes_run == 1
    assert usage.saved["dead_code"] == 5
    assert usage.passes == 1 and usage.tokens == 5


def test_equal_operations_are_done_once_but_reads_around_a_write_are_not_merged(engine: Engine) -> None:
    """Common subexpressions merge; a read after a write at its site stays apart from one before."""
    nodes = (
        read("blocks.1.mlp_out"),
        Node("tanh", (0,)),
        scalar(0.0),
        write(2, "blocks.1.mlp_out"),
        read("blocks.1.mlp_out"),
        Node("tanh", (0,)),
        Node("tanh", (4,)),
        Node("stack", (1, 5, 6), {"axis": 0}),
    )
    found, usage, _ = run(engine, graph(*nodes))
    assert usage.saved["common_subexpressions"] == 1
    assert torch.equal(found["out"][0], found["out"][1])
    assert found["out"][0].any() and not found["out"][2].any()


def test_runs_that_exchange_values_forwards_in_depth_share_one_forward(engine: Engine) -> None:
    """A patch from an early site to a later one takes one forward of two rows; the reverse takes two forwards."""
    runs = (Run(IDS), Run(OTHER))
    ahead = (read("blocks.0.resid_post", 0), write(0, "blocks.1.resid_post", 1), read("logits", 1))
    back = (read("blocks.1.resid_post", 0), write(0, "blocks.0.resid_post", 1), read("logits", 1))
    _, usage, _ = run(engine, graph(*ahead, runs=runs))
    assert (usage.passes, usage.tokens) == (1, 10)
    _, usage, _ = run(engine, graph(*back, runs=runs))
    assert (usage.passes, usage.tokens) == (2, 10)
    # The source stops after the layer that is read; the layer whose whole output is replaced need not run.
    assert usage.layers_run == 2 + N_LAYERS - 1
    assert usage.saved["skip_layers"] == 1
    _, usage, _ = run(engine, graph(*back, runs=runs), disabled=("skip_layers",))
    assert usage.layers_run == 2 + N_LAYERS


def test_values_cross_between_two_runs_in_both_directions(engine: Engine) -> None:
    """a -> b early and b -> a later is no circle, though neither run can go first as a whole."""
    nodes = (
        read("blocks.1.resid_post", 0),
        write(0, "blocks.0.resid_post", 1),
        read("blocks.0.resid_post", 1),
        read("blocks.2.resid_post", 1),
        write(3, "blocks.2.resid_post", 0),
        read("logits", 0),
    )
    found, usage, _ = run(engine, graph(*nodes, runs=(Run(IDS), Run(OTHER))))
    model = build("llama")
    captured: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda m, a, output: captured.__setitem__(name, output)

    def give(name: str) -> Callable[..., torch.Tensor]:
        return lambda m, a, output: captured[name]

    with torch.no_grad():
        steps = (((1, keep("a1")),), ((0, give("a1")), (2, keep("b2"))), ((2, give("b2")),))
        for tokens, hooks in zip((IDS, OTHER, IDS), steps, strict=True):
            handles = [model.model.layers[i].register_forward_hook(hook) for i, hook in hooks]
            logits = model(input_ids=torch.tensor(tokens), use_cache=False).logits
            for handle in handles:
                handle.remove()
    torch.testing.assert_close(found["out"], logits, rtol=1e-5, atol=1e-5)
    assert usage.passes >= 2


def test_more_rows_than_a_forward_may_carry_are_split(engine: Engine) -> None:
    """A sweep over the token budget runs in several forwards with the same results."""
    runs = (Run(IDS),) + tuple(Run(OTHER) for _ in range(7))
    nodes: list[Node] = [read("blocks.0.resid_post", 0)]
    for i in range(1, 8):
        nodes += [write(0, "blocks.0.resid_post", i, "set"), scalar(float(i)), Node("const", (), {"scalar": 1.0})]
        nodes += [read("logits", i)]
    outputs = tuple(Output(str(i), i) for i, n in enumerate(nodes) if n.op == "site.read" and n.run)
    graph, off = Graph(runs, tuple(nodes), outputs), ("merge_runs",)
    whole, usage, _ = run(engine, graph, disabled=off)
    split, split_usage, _ = run(Engine(engine.hosted, max_pass_tokens=15), graph, disabled=off)
    assert usage.passes == 1 and split_usage.passes == 4  # the source alone, then 3 + 3 + 1 rows
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-5, atol=1e-5)


def test_values_are_forgotten_after_their_last_use(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along a chain of operations only the newest value is held; with liveness off, all are."""
    held: list[int] = []
    compute = Execution._compute

    def counting(self: Execution, step: Any) -> None:
        compute(self, step)
        held.append(len(self._values))

    monkeypatch.setattr(Execution, "_compute", counting)
    chain = (read("blocks.0.resid_pre"), *(Node("tanh", (i,)) for i in range(20)))
    run(engine, graph(*chain))
    assert max(held) <= 2
    held.clear()
    run(engine, graph(*chain), disabled=("liveness",))
    assert max(held) == 21


# --- values -------------------------------------------------------------------------------------------------------


def test_a_value_read_earlier_is_not_changed_by_a_later_write(engine: Engine) -> None:
    """Reads before and after two writes at one site, saved together, are three different values."""
    before = (("slice", None, None, None), ("int", 0))
    nodes = (
        read("blocks.1.resid_post"),
        scalar(5.0),
        write(1, "blocks.1.resid_post", index=before),
        read("blocks.1.resid_post"),
        write(1, "blocks.1.resid_post", mode="mul", index=before),
        read("blocks.1.resid_post"),
        Node("stack", (0, 3, 5), {"axis": 0}),
    )
    out = run(engine, graph(*nodes))[0]["out"]
    assert not (out[0, :, 0] == 5).any()
    assert (out[1, :, 0] == 5).all() and (out[2, :, 0] == 25).all()
    assert torch.equal(out[0, :, 1:], out[1, :, 1:]) and torch.equal(out[1, :, 1:], out[2, :, 1:])


def test_emitted_bytes_do_not_share_memory_with_the_model(engine: Engine) -> None:
    """What is handed out stays as it was when the model's tensors are overwritten afterwards."""
    kept: list[TensorValue] = []
    layer = engine.hosted.model.get_submodule(engine.hosted.layers[1])

    def spoil(module: Any, args: Any) -> None:
        args[0].fill_(777.0)

    plan = engine.prepare(
        Graph((Run(IDS),), (read("blocks.0.resid_post"), read("logits")), (Output("h", 0), Output("l", 1)))
    )
    handle = layer.register_forward_pre_hook(spoil)
    try:
        engine.run(plan, lambda e: kept.append(e) if isinstance(e, TensorValue) else None)
    finally:
        handle.remove()
    assert not (to_tensor(kept[0].value) == 777.0).any()


@pytest.mark.parametrize("mode", ["set", "add", "mul"])
def test_an_edit_in_a_ragged_run_reaches_the_last_token_of_every_row(engine: Engine, mode: str) -> None:
    """Writing [:, -1] of rows of unequal length edits each row's own last position, as for the row alone."""
    rows = ((1, 5), (9, 3, 7, 4), (2,))
    index = (("slice", None, None, None), ("int", -1))
    nodes = (scalar(0.5), write(0, "blocks.1.resid_mid", mode=mode, index=index), read("logits"))
    together = run(engine, graph(*nodes, runs=(Run(rows),)))[0]["out"]
    for r, row in enumerate(rows):
        alone = run(engine, graph(*nodes, runs=(Run((row,)),)))[0]["out"]
        torch.testing.assert_close(together[r, 4 - len(row) :], alone[0], rtol=1e-5, atol=1e-5)


def test_an_edit_in_one_run_leaves_the_others_untouched(engine: Engine) -> None:
    """Of three runs in one forward, the edited one changes and the others equal the plain model."""
    runs = (Run(IDS), Run(OTHER), Run(IDS))
    nodes = (scalar(0.0), write(0, "blocks.0.attn.z", 1), *(read("logits", i) for i in range(3)))
    outputs = tuple(Output(str(i), 2 + i) for i in range(3))
    found, usage, _ = run(engine, Graph(runs, nodes, outputs))
    assert usage.passes == 1
    torch.testing.assert_close(found["0"], plain(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["2"], plain(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["1"], plain(OTHER), atol=1e-3)


def test_a_nan_stays_in_its_row(engine: Engine) -> None:
    """A NaN written into one run's row reaches no other row, and the result says that it is not finite."""
    runs = (Run(IDS), Run(OTHER))
    nodes = (scalar(float("nan")), write(0, "blocks.0.resid_mid", 1), read("logits", 0), read("logits", 1))
    found, _, events = run(engine, Graph(runs, nodes, (Output("clean", 2), Output("nan", 3))))
    torch.testing.assert_close(found["clean"], plain(), rtol=1e-5, atol=1e-5)
    assert found["nan"].isnan().all()
    assert {e.name: e.finite for e in events if isinstance(e, TensorValue)} == {"clean": True, "nan": False}


def test_the_final_norm_and_unembedding_apply_to_any_value(engine: Engine) -> None:
    """A logit lens by `call` equals the modules applied by hand, also while their own sites are tapped."""
    nodes = (
        read("blocks.0.resid_post"),
        Node("call", (0,), {"target": "ln_final"}),
        Node("call", (1,), {"target": "unembed"}),
        read("ln_final.normalized"),
        read("logits"),
    )
    found, _, _ = run(engine, Graph((Run(IDS),), nodes, (Output("lens", 2), Output("n", 3), Output("logits", 4))))
    model = build("llama")
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor(IDS), use_cache=False, output_hidden_states=True).hidden_states[1]
        expected = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(found["lens"], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["logits"], plain())


def test_parts_of_an_operation_with_several_results(engine: Engine) -> None:
    """topk's values and indices are picked apart by item and agree with torch."""
    nodes = (
        read("logits"),
        Node("topk", (0,), {"k": 3}),
        Node("item", (1,), {"index": 0}),
        Node("item", (1,), {"index": 1}),
    )
    found, _, _ = run(engine, Graph((Run(IDS),), nodes, (Output("v", 2), Output("i", 3))))
    values, indices = plain().topk(3)
    assert torch.equal(found["v"], values) and torch.equal(found["i"], indices)


def test_integer_arrays_index_reads_and_writes(engine: Engine) -> None:
    """A write at positions given by an integer tensor edits exactly those."""
    positions = constant(torch.tensor([0, 3]))
    index = (("slice", None, None, None), ("array", 0))
    nodes = (
        positions,
        scalar(9.0),
        write(1, "blocks.0.resid_post", index=index, arrays=(0,)),
        read("blocks.0.resid_post"),
    )
    out = run(engine, graph(*nodes))[0]["out"]
    assert (out[:, [0, 3]] == 9).all() and not (out[:, [1, 2, 4]] == 9).any()


# --- errors and ends ----------------------------------------------------------------------------------------------


def test_an_index_out_of_range_names_its_node_and_leaves_the_engine_well(engine: Engine) -> None:
    """Data that indexes past the axis is refused at its node, as received; the next graph runs."""
    nodes = (
        scalar(1.0),  # dead: the reported id must be the one in the graph as received
        read("logits"),
        constant(torch.tensor([99])),
        Node("getitem", (1, 2), {"index": (("slice", None, None, None), ("array", 0))}),
    )
    with pytest.raises(IndexOutOfRangeError, match="99") as error:
        run(engine, graph(*nodes))
    assert error.value.node == 3 and error.value.field == "nodes[3]"
    assert torch.equal(run(engine, graph(read("logits")))[0]["out"], plain())


def test_a_kernel_that_cannot_go_on_is_a_graph_error_at_its_node(engine: Engine) -> None:
    """A singular matrix is reported at the node that inverts it, without a traceback in the message."""
    zeros = constant(torch.zeros(3, 3))
    with pytest.raises(GraphError, match="singular") as error:
        run(engine, graph(zeros, Node("inv", (0,))))
    assert error.value.node == 1 and "Traceback" not in str(error.value)


def test_an_unknown_optimisation_is_refused_by_name(engine: Engine) -> None:
    """A switch that does not exist is an error that lists those that do."""
    with pytest.raises(GraphError, match="'warp' .*early_stop"):
        run(engine, graph(read("logits")), disabled=("warp",))


def waiting(count: int) -> Graph:
    """Large values, made one after the other in the program, each of which needs a site that comes late."""
    nodes: list[Node] = [read("embed")]
    outputs: list[Output] = []
    for i in range(count):
        nodes.append(Node("broadcast_to", (0,), {"shape": (500, 5, D_MODEL)}))
        nodes.append(scalar(float(i)))
        nodes.append(Node("add", (len(nodes) - 2, len(nodes) - 1), {}))
        nodes.append(read("logits"))
        nodes.append(Node("mean", (len(nodes) - 1,), {}))
        nodes.append(Node("multiply", (len(nodes) - 3, len(nodes) - 1), {}))
        nodes.append(Node("mean", (len(nodes) - 1,), {}))
        outputs.append(Output(f"out{i}", len(nodes) - 1))
    return Graph((Run(IDS),), tuple(nodes), tuple(outputs))


def test_values_that_wait_for_a_later_site_are_priced_side_by_side(engine: Engine) -> None:
    """The peak is that of the order in which values are computed, not of the program's; the limit holds for it."""
    each = 500 * 5 * D_MODEL * 4
    assert engine.prepare(waiting(40)).cost.peak_bytes >= 40 * each
    small = Engine(engine.hosted, replace(engine.limits, max_peak_bytes=20 * each))
    assert small.prepare(waiting(10)).cost.peak_bytes < 20 * each
    with pytest.raises(LimitExceededError, match="wait for sites") as caught:
        small.prepare(waiting(40))
    assert caught.value.limit == "max_peak_bytes"


def test_cancelling_stops_between_layers(engine: Engine) -> None:
    """Once cancelled, no further layer runs, no hook stays, and the next graph is right."""
    entered: list[int] = []
    handle = engine.hosted.model.get_submodule(engine.hosted.layers[0]).register_forward_hook(
        lambda *_: entered.append(1)
    )
    with pytest.raises(RequestCancelledError):
        run(engine, graph(read("logits")), cancelled=lambda: bool(entered))
    handle.remove()
    assert entered == [1]
    assert torch.equal(run(engine, graph(read("logits")))[0]["out"], plain())


def test_cancelling_stops_between_operations(engine: Engine) -> None:
    """A graph's own operations, which may take far longer than the layers, end when the request does."""
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 20

    chain = [Node("exp", (i,), {}) for i in range(1_000)]
    with pytest.raises(RequestCancelledError):
        run(engine, graph(read("embed"), *chain), cancelled=cancelled)
    assert len(asked) == 21


def test_an_error_of_the_device_is_not_taken_for_one_of_the_graph(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that failed inside an operation is reported as that, so that the replica is replaced."""

    def failing(self: Execution, step: Any) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Execution, "_structural", failing)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        run(engine, graph(read("embed"), scalar(2.0), Node("multiply", (0, 1), {})))


def test_out_of_memory_is_retried_one_run_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a shared forward does not fit, each run goes alone; every result is sent once."""
    widest: list[int] = []
    inputs_of = forwards._inputs

    def small_device(hosted: HostedModel, calls: Sequence[ForwardCall]) -> dict[str, torch.Tensor]:
        widest.append(sum(call.rows for call in calls))
        if widest[-1] > 1:
            raise torch.OutOfMemoryError("no room")
        return inputs_of(hosted, calls)

    monkeypatch.setattr(forwards, "_inputs", small_device)
    runs = (Run(IDS), Run(OTHER))
    found, usage, events = run(
        engine, Graph(runs, (read("logits", 0), read("logits", 1)), (Output("a", 0), Output("b", 1)))
    )
    assert widest == [2, 1, 1] and usage.passes == 2
    assert torch.equal(found["a"], plain()) and torch.equal(found["b"], plain(OTHER))
    assert sum(isinstance(e, TensorValue) for e in events) == 2


def test_out_of_memory_alone_is_refused_kindly(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one run alone does not fit either, the user hears what to do, and the next graph runs."""

    def no_device(hosted: HostedModel, calls: Sequence[ForwardCall]) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(forwards, "_inputs", no_device)
        with pytest.raises(ResourceExhaustedError, match="fewer rows"):
            run(engine, graph(read("logits")))
    assert torch.equal(run(engine, graph(read("logits")))[0]["out"], plain())


def test_progress_counts_the_forwards(engine: Engine) -> None:
    """One Progress event after each forward, with the total known from the start."""
    nodes = (read("blocks.1.resid_post", 0), write(0, "blocks.0.resid_post", 1), read("logits", 1))
    events = run(engine, graph(*nodes, runs=(Run(IDS), Run(OTHER))))[2]
    assert [e for e in events if isinstance(e, Progress)] == [Progress(1, 2), Progress(2, 2)]


def test_a_graph_without_a_forward_runs_none(engine: Engine) -> None:
    """Pure arithmetic on constants returns without touching the model."""
    data = TensorData(int64, (2,), torch.tensor([3, 4]).numpy().tobytes())
    found, usage, _ = run(
        engine, Graph((), (Node("const", (), {"value": data}), Node("square", (0,))), (Output("out", 1),))
    )
    assert found["out"].tolist() == [9, 16] and usage.passes == 0


def test_two_engines_on_two_models_do_not_meet() -> None:
    """Hosting a second model, of other weights, leaves the first one's results as they were."""
    first, second = Engine(host(build("llama", seed=0))), Engine(host(build("llama", seed=1)))
    one = run(first, graph(read("logits")))[0]["out"]
    two = run(second, graph(read("logits")))[0]["out"]
    assert torch.equal(one, plain()) and not torch.allclose(one, two)


def test_many_runs_leave_memory_flat(engine: Engine) -> None:
    """Values of finished executions are released: live tensors do not grow with the number of runs."""
    import gc

    nodes = graph(read("blocks.1.resid_post"), Node("tanh", (0,)))

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    run(engine, nodes)
    before = live()
    for _ in range(300):
        run(engine, nodes)
    assert live() <= before + 2


def test_shapes_are_those_of_the_constants(engine: Engine) -> None:
    """A vector read from one layer and multiplied by a weight-sized constant has the rule's shape."""
    weight = constant(torch.eye(D_MODEL, VOCAB))
    out = run(engine, graph(read("blocks.0.resid_pre"), weight, Node("matmul", (0, 1))))[0]["out"]
    assert out.shape == (1, 5, VOCAB) and out.dtype == torch.float32 and float32.name == "float32"


def test_calls_that_share_a_forward_see_and_change_their_own_rows_alone() -> None:
    """Two plans of other lengths in one forward give what each gives alone; one that fails leaves the other right."""
    engine = Engine(host(build("llama")))
    long = (read("blocks.1.resid_post"), scalar(2.0), write(1, "blocks.1.resid_post", mode="mul"), read("logits"))
    short = (read("blocks.0.resid_post"), Node("sum", (0,), {}))
    beyond = Node("getitem", (0, 1), {"index": (("slice", None, None, None), ("array", 0))})
    wrong = (read("embed"), constant(torch.tensor([99])), beyond, read("logits"), Node("add", (2, 2), {}))
    plans = [
        engine.prepare(Graph((Run(rows),), nodes, (Output("out", len(nodes) - 1),)))
        for rows, nodes in ((IDS, long), ((IDS[0][:3],), short), (OTHER, wrong))
    ]
    events: list[list[Event]] = [[], [], []]
    started = [engine.start(plan, seen.append).forwards() for plan, seen in zip(plans, events, strict=True)]
    with torch.no_grad():
        calls = [next(each) for each in started]
        forwards.run_forward(engine.hosted, calls, DecodeBatches(engine.hosted))
        for each in started[:2]:
            with pytest.raises(StopIteration):
                next(each)
        with pytest.raises(IndexOutOfRangeError):
            next(started[2])
    for plan, seen in zip(plans[:2], events, strict=False):
        alone: list[Event] = []
        engine.run(plan, alone.append)
        (together,) = [to_tensor(e.value) for e in seen if isinstance(e, TensorValue)]
        (expected,) = [to_tensor(e.value) for e in alone if isinstance(e, TensorValue)]
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
