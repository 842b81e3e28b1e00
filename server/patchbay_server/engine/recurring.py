"""Plans of graphs that came before: the same graph, for the same account and options, is not planned again.

A plan says what will be done; nothing that happens while it runs changes it, so requests may share one. Graphs are
known by the object that they are, which whoever reads requests keeps for graphs that come again; no other object gets
the identity of a graph that is held here. What else a plan follows from is what the account's earlier requests left
(`patchbay_server.engine.trunks`): the planner's questions about that are asked again, and the plan is good if the
answers are the same. A kept plan keeps nothing of it alive.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from patchbay.ir.artifacts import KeyedTensor
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.graph import Graph, Run
from patchbay_server.engine.plan import Means, Plan
from patchbay_server.engine.switches import RECURRING_GRAPHS
from patchbay_server.models.continuation import Trunk

#: Nodes of all plans that are kept, and plans.
MAX_NODES, MAX_PLANS = 50_000, 256

_Key = tuple[int, ExecuteOptions, str | None]


@dataclass(eq=False)
class Questions:
    """What a planner asks about earlier requests, written down.

    Attributes:
        means: where the answers come from.
        trunks: runs that were asked about, and what there was to go on from.
        wanted: runs that were asked about, and whether what they leave is wanted.
    """

    means: Means
    trunks: list[tuple[Run, Trunk | None]] = field(default_factory=list)
    wanted: list[tuple[Run, bool]] = field(default_factory=list)

    def recorded(self) -> Means:
        """The same means, whose questions are written down."""
        return replace(self.means, trunk_of=self._trunk_of, wanted=self._wanted)

    def _trunk_of(self, run: Run) -> Trunk | None:
        trunk = self.means.trunk_of(run)
        self.trunks.append((run, trunk))
        return trunk

    def _wanted(self, run: Run) -> bool:
        wanted = self.means.wanted(run)
        self.wanted.append((run, wanted))
        return wanted


@dataclass(frozen=True, eq=False)
class _Kept:
    graph: Graph
    plan: Plan
    answers: tuple[tuple[Run, weakref.ref[Trunk] | None, int], ...]
    wanted: tuple[tuple[Run, bool], ...]
    places: Mapping[int, int]  # of each of the plan's trunks, the answer that it was


class RecurringPlans:
    """The newest plans; may be used from any thread."""

    def __init__(self, max_nodes: int = MAX_NODES, max_plans: int = MAX_PLANS) -> None:
        self._max_nodes, self._max_plans = max_nodes, max_plans
        self._lock = threading.Lock()
        self._nodes = 0
        self._known: OrderedDict[_Key, _Kept] = OrderedDict()

    def get(self, graph: Graph, options: ExecuteOptions, account: str | None, means: Means) -> Plan | None:
        """The plan of this very graph, if it is known and would be the same today."""
        if RECURRING_GRAPHS in options.disabled:
            return None
        key = (id(graph), options, account)
        with self._lock:
            kept = self._known.get(key)
            if kept is None:
                return None
            self._known.move_to_end(key)
        found: list[Trunk | None] = []
        for run, before, nbytes in kept.answers:
            trunk = means.trunk_of(run)
            if trunk is not (None if before is None else before()) or (0 if trunk is None else trunk.nbytes) != nbytes:
                return None
            found.append(trunk)
        if any(means.wanted(run) is not wanted for run, wanted in kept.wanted):
            return None
        trunks = {index: trunk for index, place in kept.places.items() if (trunk := found[place]) is not None}
        saved = {**kept.plan.saved, RECURRING_GRAPHS: kept.plan.received}
        return replace(kept.plan, trunks=MappingProxyType(trunks), saved=saved)

    def put(self, graph: Graph, options: ExecuteOptions, account: str | None, plan: Plan, asked: Questions) -> None:
        """Keep a plan."""
        if RECURRING_GRAPHS in options.disabled or plan.received > self._max_nodes or _maps_files(graph):
            return
        answers = tuple((run, None, 0) if t is None else (run, weakref.ref(t), t.nbytes) for run, t in asked.trunks)
        of = {id(trunk): place for place, (_, trunk) in enumerate(asked.trunks) if trunk is not None}
        places = {index: of[id(trunk)] for index, trunk in plan.trunks.items()}
        key = (id(graph), options, account)
        with self._lock:
            if (old := self._known.pop(key, None)) is not None:
                self._nodes -= old.plan.received
            bare = replace(plan, trunks=MappingProxyType({}))
            self._known[key] = _Kept(graph, bare, answers, tuple(asked.wanted), places)
            self._nodes += plan.received
            while self._nodes > self._max_nodes or len(self._known) > self._max_plans:
                _, dropped = self._known.popitem(last=False)
                self._nodes -= dropped.plan.received


def _maps_files(graph: Graph) -> bool:
    """Whether constants are artifacts' files: the graph was made for one request, and the files stay with it."""
    return any(node.op == "const" and isinstance(node.attrs.get("value"), KeyedTensor) for node in graph.nodes)
