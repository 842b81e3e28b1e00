"""Requests that share forwards against each alone: generated graphs, failures, what may not be shared, fused writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.errors import CausalityError, GraphError, RequestCancelledError, ResourceExhaustedError
from patchbay.ir.dtypes import float32
from patchbay.ir.graph import Generation, Graph, Node, Output, Run, TensorData
from patchbay_server.engine import Engine, running
from patchbay_server.models.independence import row_independence
from patchbay_server.models.inputs import TOKENS
from patchbay_server.models.loader import host
from tests.cpu.side_by_side import (
    FAMILIES,
    IDS,
    Request,
    alone,
    engine_of,
    read,
    same,
    together,
)
from tests.strategies import graphs
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, build, places

# --- ordinary forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_share_forwards_get_what_each_gets_alone(family: str) -> None:
    """Several generated graphs side by side give the values of each alone; deterministic ones to the bit."""
    engine = engine_of(family)
    shared = 0

    @settings(max_examples=60)
    @given(
        st.lists(
            st.tuples(graphs(engine.hosted.card, list(places(family)), ragged=True), st.booleans()),
            min_size=2,
            max_size=4,
        )
    )
    def check(many: list[tuple[Graph, bool]]) -> None:
        nonlocal shared
        requests, expected = [], []
        for graph, deterministic in many:
            try:
                expected.append(alone(engine, graph, deterministic=deterministic)[0])
            except CausalityError:
                continue
            requests.append((Request(engine, graph, deterministic=deterministic), deterministic))
        together(engine, [request for request, _ in requests])
        for (request, deterministic), values in zip(requests, expected, strict=True):
            shared += request.usage.saved.get("cobatch", 0)
            if deterministic:
                assert "cobatch" not in request.usage.saved
                for name, value in values.items():
                    torch.testing.assert_close(request.values[name], value, rtol=0, atol=0, equal_nan=True)
            else:
                same(request.values, values)

    check()
    assert shared > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forwards_saved_are_counted(family: str) -> None:
    """Five reads of different lengths are one forward; the first is charged with it, four say that they saved one."""
    engine = engine_of(family)
    requests = [Request(engine, read(ids=ids)) for ids in IDS]
    assert together(engine, requests) == 1
    assert [r.usage.saved.get("cobatch", 0) for r in requests] == [0, 1, 1, 1, 1]
    for ids, request in zip(IDS, requests, strict=True):
        same(request.values, alone(engine, read(ids=ids))[0])


def test_what_may_not_be_shared_is_not() -> None:
    """Deterministic requests, gradients, and those that say so have their forwards to themselves."""
    engine = engine_of("llama")
    gradient = Graph(
        (Run((IDS[0],)),),
        (
            Node("site.read", (), {"site": "blocks.0.resid_post"}, 0),
            Node("site.read", (), {"site": "logits"}, 0),
            Node("sum", (1,), {}),
            Node("grad", (2, 0), {}),
            Node("item", (3,), {"index": 0}),
        ),
        (Output("x", 4),),
    )
    kinds: list[tuple[Graph, dict[str, Any]]] = [
        (read(), {"deterministic": True}),
        (read(), {"disabled": ("cobatch",)}),
        (gradient, {}),
    ]
    requests = [Request(engine, graph, **options) for graph, options in kinds for _ in range(2)]
    for each in requests:
        each.running.begin()
        assert each.running.wanted is not None
        assert each.running.wanted.together is None
    for each in requests:
        while not each.running.ended:
            engine.advance([each.running])
    for (graph, options), request in zip([k for k in kinds for _ in range(2)], requests, strict=True):
        same(request.values, alone(engine, graph, **options)[0])
    assert torch.is_grad_enabled()


def test_one_requests_failure_is_its_own() -> None:
    """An index that only the data reveals as wrong ends that request; its neighbours get their values."""
    engine = engine_of("gpt2")
    wrong = Graph(
        (Run((IDS[0],)),),
        (
            Node("site.read", (), {"site": "blocks.0.resid_post"}, 0),
            Node("argmax", (0,), {"axis": -1}),
            Node("const", (), {"value": TensorData(float32, (3,), bytes(12))}),
            Node("take", (2, 1), {"axis": 0}),
        ),
        (Output("x", 3),),
    )
    requests = [Request(engine, read(ids=IDS[0])), Request(engine, wrong), Request(engine, read(ids=IDS[1]))]
    together(engine, requests)
    with pytest.raises(GraphError) as caught:
        _ = requests[1].usage
    assert caught.value.node == 3
    for request, ids in ((requests[0], IDS[0]), (requests[2], IDS[1])):
        same(request.values, alone(engine, read(ids=ids))[0])


def test_a_nan_stays_in_its_row() -> None:
    """A request that writes NaN everywhere changes nobody else's values."""
    engine = engine_of("llama")
    poison = Graph(
        (Run((IDS[0],)),),
        (
            Node("const", (), {"scalar": float("nan")}),
            Node("site.write", (0,), {"site": "blocks.0.resid_post", "mode": "set", "index": ()}, 0),
            Node("site.read", (), {"site": "logits"}, 0),
        ),
        (Output("x", 2),),
    )
    requests = [Request(engine, poison), Request(engine, read("logits")), Request(engine, read("logits", IDS[2]))]
    assert together(engine, requests) == 1
    assert bool(requests[0].values["x"].isnan().all())
    same(requests[1].values, alone(engine, read("logits"))[0])
    same(requests[2].values, alone(engine, read("logits", IDS[2]))[0])


def test_a_cancelled_request_leaves_a_shared_forward() -> None:
    """It ends in the middle of the forward; the others go on."""
    engine = engine_of("llama")
    requests = [Request(engine, read(ids=ids)) for ids in IDS[:3]]
    for each in requests:
        each.running.begin()
    requests[1].stopped = True
    engine.advance([r.running for r in requests])
    with pytest.raises(RequestCancelledError):
        _ = requests[1].usage
    same(requests[0].values, alone(engine, read(ids=IDS[0]))[0])
    same(requests[2].values, alone(engine, read(ids=IDS[2]))[0])


@pytest.mark.parametrize("fits", [1, 0])
def test_out_of_memory_is_tried_alone_and_costs_nobody_else(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared forward that does not fit runs once for each; who does not fit alone is refused, the others served."""
    engine = Engine(engine_of("llama").hosted)
    plain, tried = engine.forward, []

    def forward(calls: Sequence[Any]) -> None:
        tried.append(len(calls))
        wide = [call for call in calls if call.rows > 1]
        if len(calls) > fits or wide:
            plain(calls)  # what has happened by then must not be in the way
            raise torch.OutOfMemoryError("no room")
        plain(calls)

    monkeypatch.setattr(engine, "forward", forward)
    big = Graph((Run((IDS[0], IDS[0])),), (Node("site.read", (), {"site": "embed"}, 0),), (Output("x", 0),))
    requests = [Request(engine, read(ids=IDS[0])), Request(engine, big), Request(engine, read(ids=IDS[1]))]
    together(engine, requests)
    with pytest.raises(ResourceExhaustedError) as caught:
        _ = requests[1].usage
    assert caught.value.reason == "DEVICE_MEMORY"
    assert tried[0] == 3
    for request, ids in ((requests[0], IDS[0]), (requests[2], IDS[1])):
        if fits:
            same(request.values, alone(engine_of("llama"), read(ids=ids))[0])
        else:
            with pytest.raises(ResourceExhaustedError):
                _ = request.usage


@pytest.mark.parametrize("remembered", [16 * 2**20, -1])
def test_a_forward_that_is_run_again_finds_what_it_needs(remembered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants that were used up before memory ran out are there again, or the request begins anew."""
    monkeypatch.setattr(running, "_REMEMBERED_BYTES", remembered)
    engine = Engine(engine_of("gpt2").hosted)
    plain, failures = engine.forward, [1]
    vector = TensorData(float32, (D_MODEL,), torch.ones(D_MODEL).numpy().tobytes())
    graph = Graph(
        (Run((IDS[0],)), Run((IDS[1],))),
        (
            Node("const", (), {"value": vector}),
            Node("site.write", (0,), {"site": "blocks.0.resid_post", "mode": "add", "index": ()}, 0),
            Node("site.read", (), {"site": "blocks.2.resid_post"}, 0),
            Node("mean", (2,), {"axis": (0, 1)}),
            Node("site.write", (3,), {"site": "blocks.0.resid_post", "mode": "add", "index": ()}, 1),
            Node("site.read", (), {"site": "blocks.2.resid_post"}, 1),
        ),
        (Output("x", 5), Output("y", 2)),
    )
    expected = alone(engine, graph)[0]

    def forward(calls: Sequence[Any]) -> None:
        plain(calls)
        if len(calls) > 1 and failures:
            failures.pop()
            raise torch.OutOfMemoryError("no room")

    engine.forward = forward  # type: ignore[method-assign]
    requests = [Request(engine, graph) for _ in range(3)]
    together(engine, requests)
    for request in requests:
        same(request.values, expected)
        assert request.usage.passes == 2
    assert sum(r.usage.saved.get("cobatch", 0) for r in requests) == (2 if remembered > 0 else 0)


# --- which models


def test_models_that_mix_rows_are_found_out() -> None:
    """A layer that looks at other rows, one with places for so many tokens, one that spreads NaN: none shares."""
    probe = {TOKENS: torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))}

    def found(spoil: Callable[[torch.Tensor], torch.Tensor]) -> str:
        model = build("llama")
        hook = model.model.layers[1].register_forward_hook(lambda module, args, output: spoil(output))
        layers = [f"model.layers.{i}" for i in range(N_LAYERS)]
        verdict = row_independence(model, layers, probe, causal=True)
        hook.remove()
        return "" if verdict.holds else verdict.reason

    assert found(lambda value: value) == ""
    assert found(lambda value: value + value.mean(0, keepdim=True)) == "rows change one another"
    full = found(lambda value: value * (torch.arange(value.shape[0])[:, None, None] < 6))
    assert full == "a row depends on how many are like it"
    assert found(lambda value: value + 0 * value.sum()) == "what is not finite in one row reaches others"


def test_models_that_are_not_causal_do_not_share() -> None:
    """Padding without a mask would change a bidirectional model's rows; its card says why it does not share."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=VOCAB
    )
    hosted = host(transformers.BertModel(config).eval())
    assert not hosted.row_independent
    assert "not causal" in hosted.card.attributes["shared_forwards"]


# --- writes that become one operation


def written(number: int, mode: str, index: tuple[Any, ...], *, generates: bool) -> Graph:
    """A constant written at a site, and a later one read: `generates` three tokens, or none."""
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(number))
    how = Generation(max_new_tokens=3, eos=False) if generates else None
    last = Node("site.read", (), {"site": "logits", "step": 2} if generates else {"site": "logits"}, 0)
    return Graph(
        (Run((IDS[number % len(IDS)],), generation=how),),
        (
            Node("const", (), {"value": TensorData(float32, (D_MODEL,), vector.numpy().tobytes())}),
            Node("site.write", (0,), {"site": "blocks.1.resid_post", "mode": mode, "index": index}, 0),
            last,
        ),
        (Output("x", 2),),
    )


@pytest.mark.parametrize("generates", [True, False])
def test_fused_writes_are_the_writes_themselves(generates: bool) -> None:
    """Adds, multiplications and replacements of many requests in one operation each: as unfused, and as alone."""
    engine = engine_of("llama")
    everything = (("slice", None, None, None),)
    newest = (("slice", None, None, None), ("int", -1))
    kinds = [(mode, index) for mode in ("add", "mul", "set") for index in ((), everything, newest)]
    many = [written(i, *kind, generates=generates) for i, kind in enumerate([*kinds, *kinds])]
    fused = [Request(engine, graph) for graph in many]
    apart = [Request(engine, graph, disabled=("fuse_writes",)) for graph in many]
    together(engine, fused)
    together(engine, apart)
    assert sum(r.usage.saved.get("fuse_writes", 0) for r in fused) >= (40 if generates else 10)
    assert not any("fuse_writes" in r.usage.saved for r in apart)
    for graph, one, other in zip(many, fused, apart, strict=True):
        torch.testing.assert_close(one.values["x"], other.values["x"], rtol=0, atol=0)
        same(one.values, alone(engine, graph)[0])


def test_only_what_is_alike_is_fused() -> None:
    """A scalar, a part of the features, a value that is read too: each is written as it is without company."""
    engine = engine_of("gpt2")
    half = Graph(
        (Run((IDS[1],)),),
        (
            Node("const", (), {"value": TensorData(float32, (4,), torch.ones(4).numpy().tobytes())}),
            Node(
                "site.write",
                (0,),
                {
                    "site": "blocks.1.resid_post",
                    "mode": "add",
                    "index": (("slice", None, None, None),) * 2 + (("slice", 0, 4, None),),
                },
                0,
            ),
            Node("site.read", (), {"site": "logits"}, 0),
        ),
        (Output("x", 2),),
    )
    scalar = Node("site.write", (0,), {"site": "blocks.1.resid_post", "mode": "mul", "index": ()}, 0)
    many = [half, read("logits", IDS[2], scalar), read("blocks.1.resid_post", IDS[0], scalar)]
    requests = [Request(engine, graph) for graph in [*many, *many]]
    together(engine, requests)
    assert not any("fuse_writes" in r.usage.saved for r in requests)
    for graph, request in zip([*many, *many], requests, strict=True):
        same(request.values, alone(engine, graph)[0])


def test_no_operation_is_recorded_for_gradients() -> None:
    """A forward that nobody differentiates keeps no activations: its operations are not recorded, alone or shared."""
    engine, seen = Engine(host(build("gpt2"))), []
    layer = engine.hosted.model.get_submodule(engine.hosted.layers[1])
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(torch.is_grad_enabled()))
    read = (Node("site.read", attrs={"site": "blocks.2.resid_post"}, run=0),)
    graph = Graph((Run((IDS[0],)),), read, (Output("x", 0),))
    try:
        with torch.enable_grad():
            together(engine, [Request(engine, graph), Request(engine, graph)])
            alone(engine, graph)
    finally:
        handle.remove()
    assert seen
    assert not any(seen)
