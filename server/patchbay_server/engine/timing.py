"""When each node of a plan happens.

A graph may hold tens of thousands of nodes, nearly all of them arithmetic that happens when the last of its arguments
is there. Times are therefore numbers, which grow with time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from patchbay.ir.graph import Graph
from patchbay.ir.schedule import BEFORE, Schedule, is_access, is_read
from patchbay_server.engine.prefix import Group

#: When something happens: index of the pass, order of the site in it (BEFORE: before it begins).
Time: TypeAlias = "tuple[int, int]"
NEVER = -1


class Timing:
    """When every node happens: once, but for writes, which happen in every forward of their run that shows them.

    Args:
        graph: the graph.
        timeline: its schedule.
        groups: the runs that share a forward, in the order of the forwards.
        order: for every node, when in the forwards of its run it happens (`patchbay.ir.schedule.positions`).
        differentiated: values that a gradient is taken with respect to.
    """

    def __init__(
        self,
        graph: Graph,
        timeline: Schedule,
        groups: Sequence[Group],
        order: Sequence[int],
        differentiated: frozenset[int],
    ) -> None:
        self._graph, self._timeline, self._groups, self._order = graph, timeline, groups, order
        self._width = 2 + max(order, default=BEFORE)
        self._pass_of = {(group.level, run): p for p, group in enumerate(groups) for run in group.runs}
        self._passes_of: dict[int, list[int]] = defaultdict(list)
        for (_, run), p in self._pass_of.items():
            self._passes_of[run].append(p)
        self._last_read: dict[tuple[int, int], int] = {}
        #: Of every write, the forwards that show it; of a differentiated read, those after the first in which it must
        #: be put back.
        self._shown: dict[int, tuple[int, ...]] = {}
        self._resumed: dict[int, tuple[int, ...]] = {}
        self._at = self._times(differentiated)

    def place(self, time: int) -> Time:
        """A number as pass and site."""
        p, order = divmod(time, self._width)
        return p, order - 1

    def of(self, i: int) -> tuple[Time, ...]:
        """When a node happens."""
        at = self._at[i]
        return tuple(map(self.place, self._shown[i] if at == NEVER else (at,)))

    def resumed(self, i: int) -> tuple[Time, ...]:
        """When a differentiated read is put back."""
        return tuple(map(self.place, self._resumed.get(i, ())))

    def events(self) -> Mapping[int, Sequence[int]]:
        """What happens at each time, in the order of the program."""
        events: dict[int, list[int]] = defaultdict(list)
        for i, time in enumerate(self._at):
            events[time].append(i)
        events.pop(NEVER, None)
        for several in (self._shown, self._resumed):
            for i, times in several.items():
                for time in times:
                    events[time].append(i)
        for nodes in events.values():
            nodes.sort()
        return events

    def _number(self, p: int, order: int) -> int:
        return p * self._width + order + 1

    def _times(self, differentiated: frozenset[int]) -> list[int]:
        graph, nodes = self._graph, self._graph.nodes
        for i in graph.in_runs:
            run = nodes[i].run
            if run is not None and is_read(nodes[i]):
                key = (self._pass_of[self._timeline.moments[i].level, run], run)
                self._last_read[key] = max(self._last_read.get(key, BEFORE), self._order[i])
        at = [NEVER] * len(nodes)
        # Constants are made when they are first needed, so that none lies about.
        made: dict[int, int] = {}
        for i in self._timeline.order:
            node = nodes[i]
            latest, constants = 0, False
            for a in node.args:
                time = at[a]
                if time > latest:
                    latest = time
                elif time == NEVER:
                    constants = True
            if node.run is not None and is_access(node):
                self._access(i, differentiated, at)
                latest = min(self._shown.get(i, (at[i],)), default=NEVER)
            elif node.op == "const":
                made[i] = NEVER
                continue
            else:
                at[i] = latest
            if constants and latest != NEVER:
                for a in node.args:
                    if at[a] == NEVER and (made[a] == NEVER or made[a] > latest):
                        made[a] = latest
        for i, time in made.items():
            at[i] = max(time, 0)
        return at

    def _access(self, i: int, differentiated: frozenset[int], at: list[int]) -> None:
        node, order = self._graph.nodes[i], self._order[i]
        run, level = node.run, self._timeline.moments[i].level
        assert run is not None
        if not is_read(node):
            self._shown[i] = tuple(
                self._number(p, order)
                for p in self._passes_of[run]
                if self._groups[p].level >= level and order <= self._last_read.get((p, run), BEFORE)
            )
            return
        first = self._pass_of[level, run]
        at[i] = self._number(first, order)
        if i in differentiated:
            self._resumed[i] = tuple(
                self._number(p, order) for p in self._passes_of[run] if p > first and order <= self._last_read[p, run]
            )
