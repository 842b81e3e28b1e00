"""Runs that generate side by side against each alone: tokens, failures, where keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay.errors import GraphError, RequestCancelledError
from patchbay.ir.graph import Generation, Graph, Node, Output, Run
from patchbay_server.engine import Engine
from patchbay_server.engine.generate import Decoding
from patchbay_server.models.row_cache import PromptCache, RowCache
from tests.cpu.side_by_side import (
    FAMILIES,
    IDS,
    Request,
    alone,
    engine_of,
    read,
    same,
    steered,
    together,
)
from tests.tiny import VOCAB


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "mixtral"])
def test_runs_that_generate_side_by_side_give_what_each_gives_alone(family: str) -> None:
    """Prompts of all lengths that join late and leave early: tokens equal, values to rounding, windows included."""
    engine = engine_of(family)
    assert engine.hosted.decodes_together
    many = [steered(ids, i, steps=4 + i) for i, ids in enumerate(IDS)]
    requests = [Request(engine, graph) for graph in many]
    forwards = together(engine, requests, late=2)
    usages = [r.usage for r in requests]
    assert forwards < sum(usage.passes for usage in usages) - 10
    assert sum(u.saved.get("continuous_batching", 0) + u.saved.get("cobatch", 0) for u in usages) == (
        sum(u.passes for u in usages) - forwards
    )
    for graph, request in zip(many, requests, strict=True):
        off, usage = alone(engine, graph, disabled=("continuous_batching",))
        assert "continuous_batching" not in usage.saved
        assert request.values["tokens"].tolist() == off["tokens"].tolist()
        same(request.values, off)
    assert not any(cache.seats for cache in engine._batches.caches)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_is_left_behind_has_its_own_rows(family: str) -> None:
    """When the first row of a batch ends, three rows go on alone, and none is taken for another."""
    engine = engine_of(family)
    rows = (IDS[0], IDS[4], IDS[2])
    write = {"site": "blocks.1.resid_post", "mode": "mul", "index": (("int", 1),), "step": 3}
    nodes = (
        Node("const", (), {"scalar": -2.0}),
        Node("site.write", (0,), write, 0),
        Node("site.read", (), {"site": "blocks.2.resid_post", "step": 4}, 0),
        Node("run.tokens", (), {"step": 6}, 0),
    )
    run = Run(tuple(map(tuple, rows)), generation=Generation(max_new_tokens=6, eos=False))
    longer = Graph((run,), nodes, (Output("stream", 2), Output("tokens", 3)))
    requests = [Request(engine, graph) for graph in (steered(IDS[1], 0, steps=4), longer)]
    together(engine, requests)
    assert requests[1].usage.saved["continuous_batching"] > 0
    same(requests[1].values, alone(engine, longer, disabled=("continuous_batching",))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_company(family: str) -> None:
    """Drawn by each row's own generator, tokens are those of the same seed alone."""
    engine = engine_of(family)
    many = [steered(ids, i, temperature=1.0, seed=40 + i, top_k=9, top_p=0.9) for i, ids in enumerate(IDS)]
    requests = [Request(engine, graph) for graph in many]
    together(engine, requests, late=3)
    for graph, request in zip(many, requests, strict=True):
        assert request.usage.passes == 6
        expected = alone(engine, graph, disabled=("continuous_batching",))[0]
        assert request.values["tokens"].tolist() == expected["tokens"].tolist()


def test_prompts_share_forwards_with_reads() -> None:
    """A run that generates puts its prompt through beside other requests' rows, and the reads are right."""
    engine = engine_of("llama")
    requests = [Request(engine, steered(IDS[1], 1)), Request(engine, read(ids=IDS[0])), Request(engine, read("logits"))]
    together(engine, requests)
    assert [r.usage.saved.get("cobatch", 0) for r in requests] == [0, 1, 1]
    same(requests[0].values, alone(engine, steered(IDS[1], 1), disabled=("continuous_batching",))[0])
    same(requests[1].values, alone(engine, read(ids=IDS[0]))[0])
    same(requests[2].values, alone(engine, read("logits"))[0])


def test_a_failure_while_generating_is_ones_own() -> None:
    """A row whose logits become NaN, and a client that goes away, end their own runs at that step."""
    engine = engine_of("gpt2")
    broken = steered(IDS[0], 1, temperature=1.0)
    nodes = (
        *broken.nodes,
        Node("const", (), {"scalar": float("nan")}),
        Node("site.write", (6,), {"site": "logits", "mode": "set", "index": (), "step": 2}, 0),
    )
    broken = Graph(broken.runs, nodes, broken.outputs)
    requests = [Request(engine, g) for g in (steered(IDS[1], 1), broken, steered(IDS[2], 2), steered(IDS[3], 3))]
    for each in requests:
        each.running.begin()
    for forwards in range(20):
        waiting = [r.running for r in requests if not r.running.ended]
        if not waiting:
            break
        requests[3].stopped = forwards >= 3
        engine.advance(waiting)
    with pytest.raises(GraphError, match="no token can be drawn"):
        _ = requests[1].usage
    with pytest.raises(RequestCancelledError):
        _ = requests[3].usage
    for number, i in ((1, 0), (2, 2)):
        same(requests[i].values, alone(engine, steered(IDS[number], number), disabled=("continuous_batching",))[0])
    assert not any(cache.seats for cache in engine._batches.caches)


def test_a_token_that_cannot_be_taken_is_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out while one run chooses its token, those that have chosen go on, and it begins anew alone."""
    engine, plain, failures = Engine(engine_of("llama").hosted), Decoding.take, [1]
    many = [steered(ids, i) for i, ids in enumerate(IDS)]
    requests = [Request(engine, graph) for graph in many]

    def take(run: Decoding, newest: torch.Tensor, likeliest: list[int]) -> None:
        if run.lengths == [len(IDS[2])] and run.step == 2 and failures:
            failures.pop()
            raise torch.OutOfMemoryError("no room")
        plain(run, newest, likeliest)

    monkeypatch.setattr(Decoding, "take", take)
    together(engine, requests)
    assert not failures
    for graph, request in zip(many, requests, strict=True):
        same(request.values, alone(engine_of("llama"), graph, disabled=("continuous_batching",))[0])


def test_a_batch_that_does_not_fit_steps_one_by_one() -> None:
    """When memory runs out in a step of many, each takes it alone, and they go on together."""
    engine = Engine(engine_of("llama").hosted)
    plain, failures = engine.forward, [1]

    def forward(calls: Sequence[Any]) -> None:
        if len(calls) > 1 and calls[0].decodes and calls[0].decoding.step == 2 and failures:
            failures.pop()
            raise torch.OutOfMemoryError("no room")
        plain(calls)

    engine.forward = forward  # type: ignore[method-assign]
    many = [steered(ids, i) for i, ids in enumerate(IDS)]
    requests = [Request(engine, graph) for graph in many]
    together(engine, requests)
    assert not failures
    for graph, request in zip(many, requests, strict=True):
        same(request.values, alone(engine_of("llama"), graph, disabled=("continuous_batching",))[0])


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_the_unembedding_by_its_own_name_has_every_position(family: str, side: str) -> None:
    """A prompt whose unembedding somebody visits computes all logits, alone and beside others."""
    engine, site, newest = engine_of(family), f"module:lm_head.{side}", (("slice", None, None, None), ("int", -1))
    run = Run((IDS[0], IDS[4][:5]), generation=Generation(max_new_tokens=3, eos=False))
    whole = Graph((run,), (Node("site.read", (), {"site": "logits", "step": 0}, 0),), (Output("newest", 0),))
    expected = alone(engine, whole)[0]["newest"][:, 0] * 0.5
    nodes = (
        Node("const", (), {"scalar": 0.5}),
        Node("site.write", (0,), {"site": site, "mode": "mul", "index": newest, "step": 0}, 0),
        Node("site.read", (), {"site": "module:lm_head.output", "step": 0}, 0),
        Node("getitem", (2,), {"index": newest}),
    )
    for options in ({}, {"deterministic": True}, {"disabled": ("continuous_batching",)}):
        found = alone(engine, Graph((run,), nodes, (Output("all", 2), Output("newest", 3))), **options)[0]
        assert found["all"].shape == (2, 5, VOCAB)
        torch.testing.assert_close(found["newest"], expected, rtol=1e-4, atol=1e-4)


# --- windows


def steered_pattern(*, index: tuple[object, ...] = ()) -> Graph:
    """Eight steps of a model that looks back over four positions; one layer's pattern is read and then changed."""
    nodes = [
        Node("site.read", (), {"site": "blocks.1.attn.pattern", "step": 5}, 0),
        Node("const", (), {"scalar": 0.25}),
        Node("site.write", (1,), {"site": "blocks.1.attn.pattern", "mode": "add", "index": index, "step": 5}, 0),
        Node("site.read", (), {"site": "blocks.1.attn.pattern", "step": 5}, 0),
        Node("site.read", (), {"site": "logits", "step": 7}, 0),
    ]
    run = Run((IDS[0],), generation=Generation(max_new_tokens=8, eos=False))
    return Graph((run,), tuple(nodes), (Output("before", 0), Output("after", 3), Output("logits", 4)))


@pytest.mark.parametrize("index", [(), (("slice", None, None, None),) * 3 + (("int", 8),)])
def test_a_pattern_has_a_place_for_every_key_behind_the_window_too(index: tuple[object, ...]) -> None:
    """Alone as beside others: zero behind the window, and an index means the same key."""
    engine, graph = engine_of("mistral"), steered_pattern(index=index)
    found = alone(engine, graph)[0]
    assert found["before"].shape == (1, 4, 1, len(IDS[0]) + 5)
    assert not found["before"][..., :-4].any() and bool((found["before"][..., -4:] > 0).all())
    assert float((found["after"] - found["before"]).abs().sum()) == pytest.approx(1.0 if index else 10.0)
    for options in ({"deterministic": True}, {"disabled": ("cobatch",)}):
        same(alone(engine, graph, **options)[0], found)


def test_a_model_that_forgets_keys_says_so_where_its_pattern_is_changed() -> None:
    """Where a model was not proved to keep every key, a write to a pattern of fewer keys is an error at its node."""
    engine = Engine(replace(engine_of("mistral").hosted, decodes_together=False))
    whole = steered_pattern()
    nodes = tuple(replace(node, args=tuple(0 for _ in node.args)) for node in (*whole.nodes[1:3], whole.nodes[4]))
    unread = Graph(whole.runs, nodes, (Output("logits", 2),))
    for graph, node in ((whole, 0), (unread, 1)):
        with pytest.raises(GraphError, match=r"the site holds \[1, 4, 1, 4\] .* not \[1, 4, 1, 10\]") as caught:
            alone(engine, graph)
        assert caught.value.node == node


# --- where keys and values lie


def test_steps_do_not_copy_what_is_there() -> None:
    """A hundred steps of four rows move less than twice what lies there at the end."""
    cache = RowCache()
    seats = [cache.admit([5]) for _ in range(4)]
    prompt = PromptCache([(i, cache, seat) for i, seat in enumerate(seats)])
    prompt.update(torch.ones(4, 2, 5, 3), torch.ones(4, 2, 5, 3), 0)
    for step in range(100):
        cache.begin(seats)
        keys, _ = cache.update(torch.full((4, 2, 1, 3), float(step)), torch.zeros(4, 2, 1, 3), 0)
        assert keys.shape == (4, 2, 6 + step, 3)
        assert keys[:, 0, -1, 0].tolist() == [float(step)] * 4
        cache.end(seats)
    assert cache.copied < 2 * 2 * 4 * 2 * 105 * 3


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=25))
@settings(max_examples=100)
def test_rows_keep_their_own_through_all_coming_and_going(events: list[tuple[bool, int, int]]) -> None:
    """Whoever joins and leaves, every row sees its own keys, in order, and nothing else unmasked."""
    cache = RowCache()
    owned: dict[int, tuple[Any, list[list[float]]]] = {}
    clock = 0.0
    for joins, rows, length in events:
        if joins or not owned:
            seat = cache.admit([max(1, length - r) for r in range(rows)])
            held = [[clock + 100 * r + i for i in range(n)] for r, n in enumerate(seat.lengths)]
            padded = torch.full((rows, 1, length, 1), float("nan"))
            for r, row in enumerate(held):
                padded[r, 0, : len(row), 0] = torch.tensor(row)
            PromptCache([(0, cache, seat)]).update(padded, padded, 0)
            owned[id(seat)] = (seat, held)
        else:
            seat, _ = owned.pop(sorted(owned)[length % len(owned)])
            cache.leave(seat)
        clock += 1_000.0
        if not owned:
            continue
        there = [seat for seat, _ in owned.values()]
        starts, positions, seen = cache.begin(there)
        assert len(there) > 1 or positions.shape[0] == there[0].rows
        new = torch.full((positions.shape[0], 1, 1, 1), -1.0)
        for start, (seat, held) in zip(starts, owned.values(), strict=True):
            for r in range(seat.rows):
                held[r].append(clock + r)
                new[start + r] = clock + r
        keys, values = cache.update(new, new, 0)
        for start, (seat, held) in zip(starts, owned.values(), strict=True):
            for r in range(seat.rows):
                visible = keys[start + r, 0, :, 0]
                mine = visible if seen is None else visible[seen[start + r]]
                assert mine.tolist() == held[r]
                assert bool(torch.isfinite(values[start + r]).all())
                assert int(positions[start + r]) == len(held[r]) - 1
        cache.end(there)
        assert cache.used <= 4 * sum(seat.rows for seat in there)
