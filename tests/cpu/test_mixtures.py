"""Everything at once: graphs of all kinds with every optimisation on, few, and none; alone, again, and side by side."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import pytest
import torch

from patchbay.errors import GraphError
from patchbay.ir.events import ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph
from patchbay_server.engine import Engine, TrunkCache
from patchbay_server.engine.running import Running
from patchbay_server.engine.switches import OPTIMISATIONS
from patchbay_server.kernels import to_tensor
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.loader import host
from tests import families
from tests.mixtures import Mixture

#: Nothing but the removal of what nothing needs, which may fail where it would have run.
NONE = {"disabled": tuple(name for name in OPTIMISATIONS if name != "dead_code")}
GRAPHS, ROUNDS = {"anything": 16, "sweep": 6}, 25
#: Families that look back over a few positions.
WINDOWED = ("gemma2", "mixtral")

#: Values by name, or what kind of error it was and at which node.
Outcome: TypeAlias = "dict[str, torch.Tensor] | tuple[str, int | None]"


@cache
def hosted(family: str) -> HostedModel:
    return host(families.build(family), name=family)


@cache
def eager(family: str, *, tokens: int = 16_384, layer_cost: int = 1, kept: int = 0) -> Engine:
    """An engine that shares whatever can be shared, however little that saves."""
    trunks = TrunkCache(kept) if kept else None
    return Engine(hosted(family), max_pass_tokens=tokens, layer_cost=layer_cost, worthwhile=math.inf, trunks=trunks)


class Request:
    """A graph on its way through an engine.

    Attributes:
        running: None where the graph was refused.
        stopped: whether its client is gone.
    """

    def __init__(self, engine: Engine, graph: Graph, account: str | None = None, **options: Any) -> None:
        self._values: dict[str, torch.Tensor] = {}
        self.stopped = False
        self.running: Running | None = None
        self._error: BaseException | None = None
        try:
            plan = engine.prepare(graph, ExecuteOptions(**options), account=account)
        except GraphError as error:
            self._error = error
        else:
            self.running = engine.open(plan, self._take, lambda: self.stopped)

    def _take(self, event: object) -> None:
        if isinstance(event, TensorValue):
            self._values[event.name] = to_tensor(event.value).clone()

    @property
    def outcome(self) -> Outcome:
        error = self._error if self.running is None else self.running.error
        if error is None:
            return self._values
        if not isinstance(error, GraphError):
            raise error
        return type(error).__name__, error.node


def alone(engine: Engine, graph: Graph, account: str | None = None, **options: Any) -> Outcome:
    request = Request(engine, graph, account, **options)
    if request.running is not None:
        request.running.begin()
        while not request.running.ended:
            engine.advance([request.running])
    return request.outcome


def side_by_side(engine: Engine, requests: Sequence[Request], draw: random.Random) -> None:
    """They come at any time, and any that may share a forward do."""
    coming = [r for r in requests if r.running is not None]
    under_way: list[Request] = []
    while coming or under_way:
        while coming and (not under_way or draw.random() < 0.5):
            under_way.append(coming.pop())
            assert under_way[-1].running is not None
            under_way[-1].running.begin()
        for request in under_way:
            request.stopped = request.stopped or draw.random() < 0.01
        waiting = [r.running for r in under_way if r.running is not None and not r.running.ended]
        under_way = [r for r in under_way if r.running in waiting]
        if not waiting:
            continue
        first = draw.choice(waiting)
        assert first.wanted is not None
        others = [
            each
            for each in waiting
            if each is not first and each.wanted is not None and each.wanted.together == first.wanted.together
        ]
        if first.wanted.together is None:
            others = []
        elif not first.wanted.bound:
            others = draw.sample(others, draw.randint(0, len(others)))
        engine.advance([first, *others])


def same(found: Outcome, expected: Outcome, what: object) -> None:
    """Values to rounding, or the same error at the same node."""
    if isinstance(found, tuple) or isinstance(expected, tuple):
        assert found == expected, what
        return
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        number = found[name].isfinite()
        assert torch.equal(number, value.isfinite()), (what, name)
        scale = max(1.0, float(value[number].abs().max()) if bool(number.any()) else 1.0)
        if scale < 1e5:  # beyond that, rounding is all there is
            torch.testing.assert_close(
                found[name][number], value[number], rtol=0, atol=1e-3 * scale, msg=f"{what} {name}"
            )


def left_alone(model: torch.nn.Module) -> bool:
    """Whether nothing of ours is on a model."""
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or "forward" in m.__dict__
        or any(k[:9] == "_patchbay" for k in m.__dict__)
        for m in model.modules()
    )


@pytest.mark.parametrize("kind", ["anything", "sweep"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_optimisations_change_no_value(family: str, kind: str) -> None:
    """All on, one off, one on, few positions in a forward, known prompts: the values, or the error, of none at all."""
    plain, ways = eager(family), [eager(family, layer_cost=20), eager(family, tokens=20, layer_cost=0)]
    known, tight = eager(family, kept=2**24), eager(family, kept=40_000)
    ran = 0
    for seed in range(GRAPHS[kind]):
        draw = random.Random(seed)
        mixture = Mixture(hosted(family).card, seed, gradients=seed % 4 == 0, ragged=family not in WINDOWED)
        graph = mixture.sweep() if kind == "sweep" else mixture.anything()
        expected = alone(plain, graph, **NONE)
        ran += isinstance(expected, dict)
        one = draw.choice(NONE["disabled"])
        options: list[dict[str, Any]] = [
            {},
            {"disabled": (one,)},
            {"disabled": tuple(n for n in NONE["disabled"] if n != one)},
        ]
        for how in (*options, {"deterministic": True}):
            same(alone(plain, graph, **how), expected, (seed, how))
        for number, engine in enumerate((*ways, known, known, tight, tight)):
            same(alone(engine, graph, draw.choice(["ada", "bob"])), expected, (seed, number))
    assert ran > GRAPHS[kind] // 2
    assert left_alone(hosted(family).model)


@pytest.mark.parametrize("fault", [None, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_nobody_sees_who_else_is_there(
    family: str, fault: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of several accounts that come, go and fail at any time give what each gives alone, nothing shared."""
    plain, engine = eager(family), eager(family, kept=60_000, layer_cost=2)
    run, draw = engine.forward, random.Random(0)

    def failing(calls: Sequence[Any]) -> None:
        """In the middle of a forward of several, at some layer."""
        layer = engine.hosted.model.get_submodule(draw.choice(engine.hosted.layers))

        def fail(*_: Any) -> None:
            assert fault is not None
            raise fault("injected")

        handle = layer.register_forward_pre_hook(fail) if fault and len(calls) > 1 and draw.random() < 0.3 else None
        try:
            run(calls)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(engine, "forward", failing)
    shared = 0
    for seed in range(ROUNDS):
        draw.seed(seed)
        card, ragged = hosted(family).card, family not in WINDOWED
        prompts, many = Mixture(card, seed).prompts, range(100 * seed, 100 * seed + draw.randint(2, 5))
        graphs = [
            Mixture(card, number, prompts=prompts, gradients=draw.random() < 0.1, ragged=ragged).anything()
            for number in many
        ]
        ways: list[dict[str, Any]] = [
            draw.choice([{}, {}, {"deterministic": True}, {"disabled": (draw.choice(NONE["disabled"]),)}])
            for _ in graphs
        ]
        requests = [
            Request(engine, graph, draw.choice(["ada", "bob"]), **how) for graph, how in zip(graphs, ways, strict=True)
        ]
        side_by_side(engine, requests, draw)
        for i, (graph, request) in enumerate(zip(graphs, requests, strict=True)):
            if not request.stopped:
                same(request.outcome, alone(plain, graph, **NONE), (seed, i, ways[i]))
            usage = None if request.running is None else request.running.usage
            shared += 0 if usage is None else sum(usage.saved.get(n, 0) for n in ("cobatch", "continuous_batching"))
        assert not any(cache.seats for cache in engine._batches.caches)
    assert shared > 0
    assert left_alone(hosted(family).model) and torch.is_grad_enabled()
