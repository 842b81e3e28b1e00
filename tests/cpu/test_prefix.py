"""Runs that go on from others: the values of whole forwards with less work; kept for an account's next request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.errors import CausalityError, GraphError, LimitExceededError
from patchbay.ir.events import ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Generation, Graph, Node, Output, Run, TensorData
from patchbay.ir.limits import Limits
from patchbay_server.engine import Engine, TrunkCache
from patchbay_server.kernels import to_data, to_tensor
from patchbay_server.models.loader import host
from tests import families
from tests.oracle import CircularError, Oracle
from tests.strategies import graphs
from tests.tiny import N_LAYERS, build, places

IDS = (3, 1, 4, 1, 5, 9, 2, 6)
OTHER = (2, 7, 1, 8, 2, 8, 1, 8)
SEQ = len(IDS)
#: Sites with a position axis each, as index of the position `p`.
SWEPT = ("resid_pre", "resid_post", "attn_out", "mlp_out", "attn.z", "attn.q", "attn.k", "attn.v", "attn.pattern")
EXAMPLES = 100


@cache
def engine_of(family: str) -> Engine:
    """An engine that shares whatever can be shared, however little that saves."""
    return Engine(host(build(family)), layer_cost=2, worthwhile=math.inf)


@cache
def cramped(family: str) -> Engine:
    """The same, with little room in a forward."""
    return Engine(engine_of(family).hosted, max_pass_tokens=12, layer_cost=0, worthwhile=math.inf)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Afterwards every model is as it was: no hook, no replaced forward."""
    yield
    for family in ("gpt2", "llama"):
        for module in engine_of(family).hosted.model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert "forward" not in module.__dict__


def run(
    engine: Engine, graph: Graph, account: str | None = None, **options: Any
) -> tuple[dict[str, torch.Tensor], Usage]:
    found: dict[str, torch.Tensor] = {}

    def take(event: object) -> None:
        if isinstance(event, TensorValue):
            found[event.name] = to_tensor(event.value)

    return found, engine.run(engine.prepare(graph, ExecuteOptions(**options), account=account), take)


def read(site: str, of: int = 0) -> Node:
    return Node("site.read", (), {"site": site}, of)


def at(axis: int, position: int) -> tuple[tuple[Any, ...], ...]:
    return (*[("slice", None, None, None)] * axis, ("int", position))


def get(value: int, axis: int, position: int) -> Node:
    return Node("getitem", (value,), {"index": at(axis, position)})


def write(value: int, site: str, of: int, index: Any = (), mode: str = "set") -> Node:
    return Node("site.write", (value,), {"site": site, "mode": mode, "index": index}, of)


def scalar(value: float) -> Node:
    return Node("const", (), {"scalar": value})


def constant(value: torch.Tensor) -> Node:
    data = to_data(value)
    return Node("const", (), {"value": TensorData(data.dtype, data.shape, bytes(data.data))})


def sweep(
    site: str,
    *,
    layers: range = range(N_LAYERS),
    positions: range = range(SEQ),
    ids: Any = (IDS,),
    other: Any = (OTHER,),
) -> Graph:
    """Each cell patches one position of one layer from the other prompt and takes the last position's logits."""
    axis = 2 if site == "attn.pattern" else 1
    runs, nodes, outputs = [Run(other)], [], []
    for layer in layers:
        name = f"blocks.{layer}.{site}"
        nodes.append(read(name))
        source = len(nodes) - 1
        for position in positions:
            runs.append(Run(ids))
            nodes += [get(source, axis, position)]
            nodes += [write(len(nodes) - 1, name, len(runs) - 1, at(axis, position)), read("logits", len(runs) - 1)]
            nodes += [get(len(nodes) - 1, 1, -1)]
            outputs.append(Output(f"{layer}.{position}", len(nodes) - 1))
    return Graph(tuple(runs), tuple(nodes), tuple(outputs))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-4, equal_nan=True)


# --- the same values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_runs_that_go_on_from_others_equal_whole_forwards(family: str, ragged: bool) -> None:
    """Generated graphs over few prompts give what each run gives alone, however much is shared and in what parts."""
    engine, small, counted = engine_of(family), cramped(family), [0]
    inside = ("blocks.1.attn.pattern", "blocks.0.attn.rot_k", "blocks.1.attn.attn_scores", "ln_final.scale")
    sites = [*places(family), *(s for s in inside if s in engine.hosted.card)]

    @settings(max_examples=EXAMPLES)
    @given(graphs(engine.hosted.card, sites, alike=True, ragged=ragged, max_steps=14))
    def check(graph: Graph) -> None:
        try:
            expected, _ = run(engine, graph, deterministic=True)
        except CausalityError:
            return
        for each in (engine, small):
            counted[0] += any(p.goes_on for p in each.prepare(graph).passes)
            same(run(each, graph)[0], expected)

    check()
    assert counted[0] > EXAMPLES // 10, counted


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_runs_that_go_on_from_others_equal_plain_hooks(family: str) -> None:
    """The same graphs against forwards by hand, on a model that Patchbay never touched; and with each pass off."""
    engine, model, where = engine_of(family), build(family), places(family)
    passes = ("merge_runs", "windows", "narrow_logits", "logit_columns", "shared_prefix", "common_subexpressions")

    @settings(max_examples=EXAMPLES)
    @given(graphs(engine.hosted.card, list(where), alike=True), st.sampled_from(passes))
    def check(graph: Graph, off: str) -> None:
        oracle = Oracle(model, where, graph)
        try:
            expected = {o.name: torch.as_tensor(oracle.value(o.node)) for o in graph.outputs}
            found = run(engine, graph, disabled=(off,))[0]
        except (CircularError, CausalityError):
            return
        same(found, expected)

    check()


@pytest.mark.parametrize("site", SWEPT)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sweep_written_as_a_loop_of_runs_is_shared(family: str, site: str) -> None:
    """Patching every layer and position computes fewer positions and layers, and gives what whole forwards give."""
    engine, graph = engine_of(family), sweep(site)
    expected, plain = run(engine, graph, deterministic=True)
    found, usage = run(engine, graph)
    same(found, expected)
    assert usage.saved["shared_prefix"] > 0
    assert usage.tokens < 0.7 * plain.tokens and usage.layers_run < 0.7 * plain.layers_run
    _, whole = run(engine, graph, disabled=("shared_prefix",))
    assert "shared_prefix" not in whole.saved and whole.tokens == plain.tokens


def test_rows_of_a_run_are_shared_together() -> None:
    """Runs of several rows, each with tokens of its own, go on from a base of as many rows."""
    graph = sweep("resid_pre", ids=(IDS, OTHER), other=(OTHER, IDS))
    expected, _ = run(engine_of("llama"), graph, deterministic=True)
    found, usage = run(engine_of("llama"), graph)
    same(found, expected)
    assert usage.saved["shared_prefix"] > 0


def test_values_pass_through_several_rounds_of_shared_runs() -> None:
    """Path patching: a run takes what a patched run had later on, and another takes it from there."""
    runs = (Run((OTHER,)), Run((IDS,)), Run((IDS,)), Run((IDS,)))
    nodes: list[Node] = [read("blocks.0.attn.z", 0), get(0, 1, 3), write(1, "blocks.0.attn.z", 1, at(1, 3))]
    nodes += [read("blocks.2.attn.q", 1), get(3, 1, -1), write(4, "blocks.2.attn.q", 2, at(1, -1))]
    nodes += [
        read("blocks.2.resid_post", 2),
        get(6, 1, -1),
        write(7, "blocks.0.resid_pre", 3, at(1, -2)),
        read("logits", 3),
    ]
    graph = Graph(runs, tuple(nodes), (Output("out", 9), Output("middle", 6)))
    expected, _ = run(engine_of("llama"), graph, deterministic=True)
    found, usage = run(engine_of("llama"), graph)
    same(found, expected)
    assert usage.saved["shared_prefix"] > 0


def test_an_index_array_says_where_a_run_starts() -> None:
    """Positions given as a constant array, some counted from the end, shorten a run as a number does."""
    runs = (Run((IDS,)), Run((IDS,)))
    where = (("slice", None, None, None), ("array", 0))
    nodes = (
        constant(torch.tensor([SEQ - 3, -1])),
        scalar(2.0),
        Node("site.write", (1, 0), {"site": "blocks.1.resid_pre", "mode": "mul", "index": where}, 0),
        read("logits", 0),
        read("blocks.2.resid_post", 1),
    )
    graph = Graph(runs, nodes, (Output("out", 3), Output("plain", 4)))
    expected, _ = run(engine_of("llama"), graph, deterministic=True)
    found, usage = run(engine_of("llama"), graph)
    same(found, expected)
    assert usage.tokens == SEQ + 3


def test_small_graphs_are_left_as_they_are() -> None:
    """Where whole forwards are as quick, runs share one as before."""
    graph = sweep("resid_pre", layers=range(1), positions=range(2))
    _, usage = run(Engine(engine_of("llama").hosted), graph)
    assert usage.passes == 1 and "shared_prefix" not in usage.saved


def test_gradients_go_through_whole_forwards() -> None:
    """A graph that differentiates shares nothing, and runs that it differentiates in are not merged with others."""
    runs = (Run((IDS,)), Run((IDS,)))
    nodes = (
        read("blocks.0.resid_post", 0),
        read("logits", 0),
        Node("sum", (1,), {}),
        Node("grad", (2, 0)),
        Node("item", (3,), {"index": 0}),
        read("logits", 1),
    )
    graph = Graph(runs, nodes, (Output("grad", 4), Output("logits", 5)))
    found, usage = run(engine_of("llama"), graph)
    assert found["grad"].any() and usage.saved["merge_runs"] == 0 and "shared_prefix" not in usage.saved
    same(found, run(engine_of("llama"), graph, deterministic=True)[0])


# --- runs that are alike ------------------------------------------------------------------------------------------


def test_reads_before_the_first_write_are_the_clean_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run reads before it is written is read once for all runs over the tokens; identical runs become one."""
    nodes: list[Node] = [scalar(0.0)]
    runs, outputs = [], []
    for number in range(4):
        runs.append(Run((IDS,)))
        nodes += [read("blocks.0.resid_post", number), write(0, "blocks.1.mlp_out", number), read("logits", number)]
        outputs += [Output(f"early{number}", len(nodes) - 3), Output(f"late{number}", len(nodes) - 1)]
    graph = Graph(tuple(runs), tuple(nodes), tuple(outputs))
    engine = Engine(engine_of("llama").hosted)
    found, usage = run(engine, graph)
    assert usage.tokens == SEQ and usage.saved["merge_runs"] == 6
    same(found, run(engine, graph, deterministic=True)[0])
    assert run(engine, graph, disabled=("merge_runs",))[1].tokens == 4 * SEQ


def test_generating_runs_merge_only_when_they_draw_alike() -> None:
    """Equal seeds generate once; other seeds apart."""

    def graph(*seeds: int) -> Graph:
        runs = tuple(Run((IDS,), generation=Generation(3, temperature=1.0, seed=seed, eos=False)) for seed in seeds)
        nodes = tuple(Node("run.tokens", (), {"step": 3}, i) for i in range(len(seeds)))
        return Graph(runs, nodes, tuple(Output(str(i), i) for i in range(len(seeds))))

    engine = engine_of("llama")
    try:
        _, same_seed = run(engine, graph(1, 1))
    except GraphError:  # the last tokens are those of no step
        pytest.fail("a generating run's tokens are read at its last step")
    _, other_seed = run(engine, graph(1, 2))
    assert same_seed.saved["merge_runs"] == 1 and other_seed.saved["merge_runs"] == 0


# --- logits where they are read -----------------------------------------------------------------------------------


def unembedded(engine: Engine, graph: Graph, **options: Any) -> tuple[list[torch.Size], dict[str, torch.Tensor], Usage]:
    """The shapes that the unembedding returned, the results and what was used."""
    shapes: list[torch.Size] = []
    head = engine.hosted.model.get_submodule("lm_head")
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    try:
        found, usage = run(engine, graph, **options)
    finally:
        handle.remove()
    return shapes, found, usage


@pytest.mark.parametrize("tokens", [(IDS, OTHER), (IDS, OTHER[:5])])
def test_logits_are_computed_where_they_are_read(tokens: Any) -> None:
    """Of rows of equal and of unequal lengths, only the positions and tokens that are taken are computed."""
    engine = engine_of("llama")
    vocab = engine.hosted.card.d_vocab
    some = (("slice", None, None, None), ("slice", -2, None, None))
    whole = Graph((Run(tokens),), (read("logits"), Node("getitem", (0,), {"index": some})), (Output("out", 1),))
    shapes, found, usage = unembedded(engine, whole)
    assert shapes == [(1, 4, vocab)] and usage.saved["narrow_logits"] == 2 * SEQ - 4
    same(found, run(engine, whole, deterministic=True)[0])
    assert unembedded(engine, whole, disabled=("narrow_logits",))[0] == [(2, SEQ, vocab)]
    few = (*some, ("array", 0))
    picked = (read("logits"), constant(torch.tensor([[5, -1], [2, 5]])), Node("getitem", (0, 1), {"index": few}))
    graph = Graph((Run(tokens),), picked, (Output("out", 2),))
    shapes, found, usage = unembedded(engine, graph)
    assert shapes == [(1, 4, 3)] and usage.saved["logit_columns"] == vocab - 3
    same(found, run(engine, graph, deterministic=True)[0])
    assert unembedded(engine, graph, disabled=("logit_columns",))[0] == [(1, 4, vocab)]


def test_tokens_are_renumbered_in_a_type_that_holds_every_place() -> None:
    """Beside 200 other tokens, the last one is the 200th: more than the type that named it as -1 can say."""
    engine = Engine(host(families.build("llama", vocab_size=1_000)))
    place = (*at(1, -1), ("array", 0))
    many, last = torch.arange(200), torch.tensor([-1], dtype=torch.int8)
    nodes = [read("logits"), constant(many), constant(last)]
    nodes += [Node("getitem", (0, 1), {"index": place}), Node("getitem", (0, 2), {"index": place})]
    graph = Graph((Run((IDS,)),), tuple(nodes), (Output("many", 3), Output("last", 4)))
    found, usage = run(engine, graph)
    assert usage.saved["logit_columns"] == 1_000 - 201
    same(found, run(engine, graph, disabled=("logit_columns",))[0])


def test_written_logits_are_computed_where_they_are_written() -> None:
    """Writes count as uses: the positions that are computed cover them, and their indices still mean the same."""
    last, third = at(1, -1), at(1, SEQ - 3)
    nodes = (scalar(3.0), write(0, "logits", 0, third, "mul"), read("logits"), get(2, 1, SEQ - 3), get(2, 1, -1))
    graph = Graph((Run((IDS,)),), nodes, (Output("third", 3), Output("last", 4)))
    shapes, found, _ = unembedded(engine_of("llama"), graph)
    assert shapes[0][1] == 3 and last
    same(found, run(engine_of("llama"), graph, deterministic=True)[0])


def test_the_unembedding_by_its_own_name_computes_everything() -> None:
    """Whoever taps the module sees all positions."""
    nodes = (read("logits"), get(0, 1, -1), read("module:lm_head.output"))
    graph = Graph((Run((IDS,)),), nodes, (Output("out", 1), Output("all", 2)))
    shapes, found, _ = unembedded(engine_of("llama"), graph)
    assert shapes == [(1, SEQ, engine_of("llama").hosted.card.d_vocab)]
    same(found, run(engine_of("llama"), graph, deterministic=True)[0])


def test_a_run_that_nothing_reads_is_not_run() -> None:
    """Without the removal of dead code, a run of writes alone goes on from nothing and leaves the others be."""
    nodes = (read("embed"), scalar(-2.0), write(1, "embed", 1), read("blocks.1.mlp_out", 2))
    graph = Graph((Run((IDS,)),) * 3, nodes, (Output("first", 0), Output("third", 3)))
    found, usage = run(engine_of("gpt2"), graph, disabled=("dead_code", "merge_runs"))
    same(found, run(engine_of("gpt2"), graph, deterministic=True)[0])
    assert usage.tokens <= 2 * SEQ


# --- kept for later requests --------------------------------------------------------------------------------------


def one_patch(layer: int = 1, position: int = -1) -> Graph:
    nodes = (
        scalar(2.0),
        write(0, f"blocks.{layer}.resid_post", 0, at(1, position), "mul"),
        read("logits"),
        get(2, 1, -1),
    )
    return Graph((Run((IDS,)),), nodes, (Output("out", 3),))


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    """The second request over a prompt leaves its base run, the third computes one position; so do plain reads."""
    engine = Engine(engine_of("llama").hosted, layer_cost=2, trunks=TrunkCache(2**24))
    counts = []
    for _ in range(4):
        found, usage = run(engine, one_patch(), "ada")
        counts.append(usage.tokens)
        same(found, run(engine, one_patch(), deterministic=True)[0])
    assert counts == [SEQ, SEQ + 1, 1, 1]
    assert usage.saved["prefix_cache"] == 1
    plain = Graph((Run((IDS,)),), (read("blocks.2.mlp_out"), get(0, 1, -1)), (Output("out", 1),))
    found, usage = run(engine, plain, "ada")
    assert usage.tokens == 1 and usage.layers_run == 1
    same(found, run(engine, plain, deterministic=True)[0])
    assert run(engine, one_patch(), "ada", disabled=("prefix_cache",))[1].tokens == SEQ


def test_a_shallow_read_leaves_no_base_for_others() -> None:
    """Reading the first layer again and again runs that layer; a base of the whole depth would cost three times it."""
    engine = Engine(engine_of("llama").hosted, layer_cost=2, trunks=TrunkCache(2**24))
    shallow = Graph((Run((IDS,)),), (read("blocks.0.resid_post"), get(0, 1, -1)), (Output("out", 1),))
    for _ in range(4):
        found, usage = run(engine, shallow, "ada")
        assert (usage.layers_run, usage.tokens) == (1, SEQ)
        same(found, run(engine, shallow, deterministic=True)[0])


def test_nothing_of_one_account_is_seen_by_another() -> None:
    """Another account's request, or nobody's, runs as if it were the first; so does one that runs alone."""
    engine = Engine(engine_of("llama").hosted, layer_cost=2, trunks=TrunkCache(2**24))
    for _ in range(3):
        run(engine, one_patch(), "ada")
    for account in ("bob", None):
        assert run(engine, one_patch(), account)[1].tokens == SEQ
    assert run(engine, one_patch(), "ada", deterministic=True)[1].tokens == SEQ
    assert run(engine, one_patch(), "ada")[1].tokens == 1


def test_an_account_makes_room_among_its_own_only() -> None:
    """The least recently used entry of the account goes; a full cache takes nothing new; what is idle expires."""
    engine, now = engine_of("llama"), [0.0]
    trunks = TrunkCache(2**24, idle_s=10.0, clock=lambda: now[0])
    shared = Engine(engine.hosted, layer_cost=2, trunks=trunks)
    for _ in range(2):
        run(shared, one_patch(), "ada")
    trunk = trunks.get("ada", (IDS,))
    assert trunk is not None and trunks.nbytes == trunk.nbytes
    tight = TrunkCache(3 * trunk.nbytes, 2 * trunk.nbytes, idle_s=10.0, clock=lambda: now[0])
    for number in range(3):
        tight.put("ada", ((number,),), trunk)
    assert tight.get("ada", ((0,),)) is None and tight.get("ada", ((2,),)) is not None
    tight.put("bob", ((7,),), trunk)
    tight.put("eve", ((7,),), trunk)
    assert tight.get("bob", ((7,),)) is not None and tight.get("eve", ((7,),)) is None
    now[0] = 11.0
    tight.put("eve", ((7,),), trunk)
    assert tight.get("eve", ((7,),)) is not None and tight.get("ada", ((2,),)) is None


def test_what_is_too_large_is_neither_made_nor_kept() -> None:
    """A prompt whose base would not fit is run as if there were no cache, however often it comes."""
    engine = Engine(engine_of("llama").hosted, layer_cost=2, trunks=TrunkCache(1_000))
    assert [run(engine, one_patch(), "ada")[1].tokens for _ in range(3)] == [SEQ] * 3


# --- bounds -------------------------------------------------------------------------------------------------------


def test_what_bases_leave_is_part_of_the_price() -> None:
    """The peak counts the streams, keys and values that wait for others; over the limit, runs are made whole."""
    engine, graph = engine_of("llama"), sweep("resid_pre")
    shared = engine.prepare(graph)
    assert shared.trunk_bytes > 0
    assert shared.cost.peak_bytes > shared.trunk_bytes
    poor = Engine(engine.hosted, Limits(max_peak_bytes=3 * shared.trunk_bytes), worthwhile=math.inf)
    try:
        plan = poor.prepare(graph)
    except LimitExceededError:
        pytest.fail("sharing must not refuse what whole forwards can do")
    assert not any(each.goes_on for each in plan.passes)


def test_a_forward_that_goes_on_keeps_to_the_token_budget() -> None:
    """Rows times computed positions stay within what one forward may carry, where one run does."""
    engine = cramped("llama")
    for each in engine.prepare(sweep("mlp_out")).passes:
        assert each.positions <= 12 or each.rows == 1 or len(each.slots) == 1


# --- what is proved at load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "growing"),
    [("gpt2", True), ("bloom", False), ("gemma2", True), ("mixtral", True), ("deepseek_v3", True)],
)
def test_families_go_on_from_earlier_forwards(family: str, growing: bool) -> None:
    """Learned and rotary positions, alibi, windows, experts and latent attention: proved, and as in whole runs."""
    hosted = host(families.build(family), name=family)
    assert hosted.continuation is not None and hosted.continuation.growing is growing
    engine = Engine(hosted, worthwhile=math.inf)
    graph = sweep("resid_post", layers=range(2))
    found, usage = run(engine, graph)
    same(found, run(engine, graph, deterministic=True)[0])
    assert usage.saved["shared_prefix"] > 0


@pytest.mark.parametrize("family", ["mamba", "rwkv", "jamba", "recurrent_gemma"])
def test_models_that_do_not_go_on_are_served_whole(family: str) -> None:
    """States that are no keys and values: the card says why, and runs share batches as before."""
    hosted = host(families.build(family), name=family)
    assert not hosted.continues and hosted.card.attributes["shared_prefixes"].startswith("no: ")
    _, usage = run(Engine(hosted, worthwhile=math.inf), sweep("resid_post", layers=range(2), positions=range(3)))
    assert "shared_prefix" not in usage.saved


def test_a_model_whose_positions_meet_elsewhere_is_found_out() -> None:
    """Causal, with a cache, but with a running mean over positions besides: the proof fails all the same."""
    model = build("llama")

    def mix(module: Any, args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        counts = torch.arange(1, stream.shape[1] + 1).view(1, -1, 1)
        return stream + stream.cumsum(1) / counts

    model.model.layers[1].register_forward_hook(mix)
    hosted = host(model)
    assert hosted.card.causal and not hosted.continues


@pytest.mark.parametrize("whole", [False, True])
def test_requests_that_share_a_forward_get_their_own_logits(whole: bool) -> None:
    """Some positions and tokens of one, others of another, written ones of a third, all of a fourth."""
    engine = engine_of("llama")
    some = (("slice", None, None, None), ("int", -1), ("array", 0))
    named = (read("logits"), constant(torch.tensor([7, 2])), Node("getitem", (0, 1), {"index": some}))
    written = (scalar(2.0), write(0, "logits", 0, at(1, 2), "mul"), read("logits"), get(2, 1, 2))
    asked = [(IDS, named, 2), (OTHER[:5], (read("logits"), get(0, 1, -2)), 1), (OTHER, written, 3)]
    asked += [(IDS[:3], (read("logits"),), 0)] if whole else [(IDS[:3], (read("blocks.0.mlp_out"),), 0)]
    made = [Graph((Run((ids,)),), nodes, (Output("out", out),)) for ids, nodes, out in asked]
    found: list[dict[str, torch.Tensor]] = [{} for _ in made]

    def taking(into: dict[str, torch.Tensor]) -> Any:
        def take(event: object) -> None:
            if isinstance(event, TensorValue):
                into[event.name] = to_tensor(event.value)

        return take

    started = [engine.start(engine.prepare(g), taking(f)).forwards() for g, f in zip(made, found, strict=True)]
    with torch.no_grad():
        calls = [next(each) for each in started]
        engine.forward(calls)
        for each in started:
            assert next(each, None) is None
    assert [call.narrowed for call in calls] == [not whole] * 4
    for graph, got in zip(made, found, strict=True):
        same(got, run(engine, graph, deterministic=True)[0])
