"""What a node of a graph costs beside the operation itself, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.models import prompts
from benchmarks.samples import Finding
from benchmarks.work import Work

#: What a request goes through, in order; `usage.nodes` of them are counted.
STAGES = ("build", "check", "encode", "serialize", "parse", "decode", "prepare", "run")


class Nodes(Work):
    """A chain of additions and multiplications on two numbers that were read from the model.

    Args:
        nodes: length of the chain.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        (self.ids,) = prompts(700, 1, 4, 1)
        self.factor = 0.999

    def chain(self, x: Any) -> Any:
        """`nodes` operations, each on the result of the last; no two are equal, so none can be merged."""
        first, factor = x, self.factor
        for _ in range(self.nodes // 2):
            x = (x + first) * factor
        return x

    def values(self) -> Mapping[str, Any]:
        return {}


class Torch(Nodes):
    """The operations by themselves."""

    def run(self, round_: int) -> None:
        import torch

        x = torch.tensor([1.0, -1.0])
        with torch.no_grad():
            self.chain(x)


class Whole(Nodes):
    """The chain in a trace, through the whole service in-process, against a trace without it."""

    def prepare(self) -> None:
        import patchbay as pb
        from patchbay_server.models.demo import load

        self._hf, tokenizer = load()
        self._model = pb.local(self._hf, tokenizer)

    def renew(self, round_: int) -> None:
        """Make the next graphs what they are to be."""

    def run(self, round_: int) -> Mapping[str, float]:
        self.renew(round_)
        times = []
        for with_chain in (False, True):
            start, cpu = time.perf_counter(), time.process_time()
            with self._model.trace(self.ids) as run:
                x = run.blocks[0].resid_post[0, -1, :2]
                found = (self.chain(x) if with_chain else x).save()
            times.append((time.perf_counter() - start, time.process_time() - cpu))
            self._last = (x, found)
        return {"wall_s": times[1][0] - times[0][0], "cpu_s": times[1][1] - times[0][1]}

    def values(self) -> Mapping[str, Any]:
        import torch

        with torch.no_grad():
            hidden = self._hf(torch.tensor([self.ids]), output_hidden_states=True).hidden_states[1]
            expected = self.chain(hidden[0, -1, :2]).numpy()
        if abs(expected - self._last[1].value).max() > 1e-3 * abs(expected).max():
            raise ValueError(f"the chain gives {self._last[1].value}, not {expected}")
        return {}


class Fresh(Whole):
    """The same, where both graphs are new to the service in every round: another prompt, other numbers."""

    def renew(self, round_: int) -> None:
        (self.ids,) = prompts(700, 1, 4, 100 + round_)
        self.factor = 0.999 - 1e-6 * (1 + round_)


class Stages(Nodes):
    """The stages one by one, as CPU time of the thread that does them."""

    def prepare(self) -> None:
        import patchbay as pb
        from patchbay.ir.events import ExecuteOptions
        from patchbay_server.engine import Engine
        from patchbay_server.models.demo import load
        from patchbay_server.models.loader import host

        hf, tokenizer = load()
        self._model = pb.local(hf, tokenizer)
        self._engine = Engine(host(hf, tokenizer, name="local"))
        self._options = ExecuteOptions()

    def run(self, round_: int) -> Mapping[str, float]:
        whole, empty = self._stages(True), self._stages(False)
        each = {stage: whole[stage] - empty[stage] for stage in STAGES}
        return {**each, "cpu_s": sum(each.values())}

    def _stages(self, with_chain: bool) -> dict[str, float]:
        from patchbay.ir.verify import verify
        from patchbay.v1 import graph_pb2
        from patchbay.wire.graphs import decode_graph, encode_graph

        took: dict[str, float] = {}

        def timed(stage: str, what: Callable[[], Any]) -> Any:
            start = time.thread_time()
            result = what()
            took[stage] = time.thread_time() - start
            return result

        def build() -> Any:
            trace = self._model.trace()
            x = trace.run(self.ids).blocks[0].resid_post[0, -1, :2]
            trace.save(x=self.chain(x) if with_chain else x)
            return trace.graph

        graph = timed("build", build)
        limits = self._model.card.limits
        timed("check", lambda: verify(graph, self._model.card, limits, facts=graph.facts))
        message = timed("encode", lambda: encode_graph(graph))
        data = timed("serialize", message.SerializeToString)
        received = timed("parse", lambda: graph_pb2.Graph.FromString(data))
        decoded = timed("decode", lambda: decode_graph(received, limits))
        plan = timed("prepare", lambda: self._engine.prepare(decoded, self._options))
        timed("run", lambda: self._engine.run(plan, lambda event: None))
        return took


def plan(scale: Scale) -> Plan:
    settings = {"nodes": scale.choose(full=1000, quick=1000, tiny=20)}
    return Plan(
        contenders=[
            Contender("whole", "through the service, in-process", "Whole", settings=settings),
            Contender("fresh", "the same, graphs that were never sent before", "Fresh", settings=settings),
            Contender("stages", "stage by stage", "Stages", settings=settings),
            Contender("torch", "the operations by themselves", "Torch", settings=settings),
        ],
        rounds=scale.choose(full=25, quick=15, tiny=1),
        settings=settings,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    from benchmarks.spread import difference, spread

    per_node = 1e6 / plan(scale).settings["nodes"]
    found = []
    for name, what in (
        ("whole", "overhead of 1,000 pure nodes, a node"),
        ("fresh", "the same, a graph that was never sent before"),
    ):
        if trials.has(name, "torch"):
            over = [v * per_node for v in trials.series(name)]
            under = [v * per_node for v in trials.series("torch")]
            found.append(Finding(what, difference(over, under), "us", 10.0, at_least=False))
    if trials.has("stages"):
        for stage in STAGES:
            found.append(
                Finding(
                    f"the same: {stage}",
                    spread([v * per_node for v in trials.series("stages", stage)]),
                    "us",
                    None,
                    False,
                )
            )
    if trials.has("torch"):
        found.append(
            Finding("the same: torch alone", spread([v * per_node for v in trials.series("torch")]), "us", None, False)
        )
    return found


FIGURE = Figure(
    name="pure_nodes",
    title="Overhead of 1,000 pure nodes",
    what=(
        "A chain of 1,000 additions and multiplications on two numbers that were read from the "
        "demo model, in one trace, in-process; every operation differs, so that nothing can be merged or "
        "folded."
    ),
    why="Metrics, probes and losses are written as many small operations.",
    how=(
        "Time of the trace less that of the same trace without the chain, less the same operations in plain "
        "torch, divided by 1,000. First with the same graph in every round, as in a loop over one experiment, whose "
        "plan the service still has; then with another prompt and other numbers in every round. The stages: CPU time "
        "of each by itself, the graph read and planned anew. *build* is the user's own lines, *check* the client's "
        "check, *prepare* the server's check, optimiser and planner; *run* contains torch's own time."
    ),
    plan=plan,
    findings=findings,
)
