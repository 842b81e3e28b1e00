"""Requests that run side by side on one tiny model, and each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers

from patchbay.ir.dtypes import float32
from patchbay.ir.events import ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Generation, Graph, Node, Output, Run, TensorData
from patchbay_server.engine import Engine
from patchbay_server.engine.running import Running
from patchbay_server.kernels import to_tensor
from patchbay_server.models.loader import host
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, build

FAMILIES = ("gpt2", "llama")
IDS = ((1, 5, 9, 3, 7), (4, 6, 6), (2, 2, 8, 30, 11, 12), (9,), (3, 1, 4, 1, 5, 9, 2))
Values = dict[str, torch.Tensor]


@cache
def engine_of(family: str) -> Engine:
    return Engine(host(small(family)))


def small(family: str) -> transformers.PreTrainedModel:
    """A tiny model of a family; ``mistral`` looks back over four positions, ``mixtral`` has experts."""
    if family in FAMILIES:
        return build(family)
    shared = {
        "num_hidden_layers": N_LAYERS,
        "hidden_size": D_MODEL,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if family == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=4, **shared)).eval()
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **shared)).eval()


class Request:
    """One of several that run side by side."""

    def __init__(self, engine: Engine, graph: Graph, **options: Any) -> None:
        self.values: Values = {}
        self.stopped = False
        self.plan = engine.prepare(graph, ExecuteOptions(**options))
        self.running: Running = engine.open(self.plan, self.take, lambda: self.stopped)

    def take(self, event: object) -> None:
        if isinstance(event, TensorValue):
            self.values[event.name] = to_tensor(event.value)

    @property
    def usage(self) -> Usage:
        if self.running.error is not None:
            raise self.running.error
        assert self.running.usage is not None
        return self.running.usage


def together(engine: Engine, requests: Sequence[Request], *, late: int = 0) -> int:
    """Run them side by side, all that may share in one forward; the last `late` join after two forwards."""
    forwards = 0
    coming = list(requests[len(requests) - late :]) if late else []
    for each in requests[: len(requests) - late]:
        each.running.begin()
    while True:
        if coming and (forwards >= 2 or all(r.running.ended for r in requests if r not in coming)):
            coming.pop(0).running.begin()
        waiting = [r.running for r in requests if r.running.wanted is not None and not r.running.ended]
        if not waiting and not coming:
            return forwards
        if not waiting:
            continue
        kinds: dict[object, list[Running]] = {}
        for each in waiting:
            assert each.wanted is not None
            kinds.setdefault(each.wanted.together or id(each), []).append(each)
        group = max(kinds.values(), key=len)
        engine.advance(group)
        forwards += 1


def alone(engine: Engine, graph: Graph, **options: Any) -> tuple[Values, Usage]:
    values: Values = {}

    def take(event: object) -> None:
        if isinstance(event, TensorValue):
            values[event.name] = to_tensor(event.value)

    usage = engine.run(engine.prepare(graph, ExecuteOptions(**options)), take)
    return values, usage


def same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-4, equal_nan=True)


def read(site: str = "blocks.1.resid_post", ids: Sequence[int] = IDS[0], *writes: Node) -> Graph:
    """One run, its writes, and one read."""
    constants = [Node("const", (), {"scalar": 2.0})]
    nodes = (*constants, *writes, Node("site.read", (), {"site": site}, 0))
    return Graph((Run((tuple(ids),)),), nodes, (Output("x", len(nodes) - 1),))


def steered(ids: Sequence[int], number: int, *, steps: int = 6, **how: Any) -> Graph:
    """A run that generates, steered by a vector of its own, read at a step."""
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(number))
    return Graph(
        (Run((tuple(ids),), generation=Generation(max_new_tokens=steps, eos=False, **how)),),
        (
            Node("const", (), {"value": TensorData(float32, (D_MODEL,), vector.numpy().tobytes())}),
            Node("site.write", (0,), {"site": "blocks.1.resid_post", "mode": "add", "index": ()}, 0),
            Node("site.read", (), {"site": "blocks.2.resid_post", "step": 2}, 0),
            Node("site.read", (), {"site": "blocks.0.attn.pattern", "step": 3}, 0),
            Node("site.read", (), {"site": "logits", "step": 0}, 0),
            Node("run.tokens", (), {"step": steps}, 0),
        ),
        (Output("stream", 2), Output("pattern", 3), Output("first", 4), Output("tokens", 5)),
    )
