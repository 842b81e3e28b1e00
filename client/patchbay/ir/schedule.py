"""When each node can run: forward order inside a run, any order that is not circular between runs.

A run is executed as often as its reads require. *Levels* number the rounds of forwards: a read has the level at which
every write that it must see has its value. Positions inside a level are the sites' own order, so a value read at an
early site of one run may be written at a later site of another run in the same level, when both share a forward
(`joint`); otherwise the value crosses over to the next level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from patchbay.errors import CausalityError
from patchbay.ir.card import ModelCard
from patchbay.ir.generation import ACCESSES
from patchbay.ir.graph import Graph, Node

#: Position of values that exist before a level's forwards begin.
BEFORE = -1


@dataclass(frozen=True, slots=True)
class Moment:
    """When a value exists.

    Attributes:
        level: round of forwards, from 0.
        position: order of the site at which it is complete, or BEFORE.
        run: the run whose forward it comes from in that level; None when it comes from several, or from none.
    """

    level: int
    position: int
    run: int | None = None


@dataclass(frozen=True)
class Schedule:
    """A moment for every node, and the order that proves there is one.

    Attributes:
        order: every node id, dependencies first.
        moments: by node id; a write's moment is when its site is reached in the first level that has its value.
        levels: number of rounds.
    """

    order: Sequence[int]
    moments: tuple[Moment, ...]
    levels: int


def is_access(node: Node) -> bool:
    """Whether the node happens at a moment of its run: reads and writes at sites, tokens generated so far."""
    return node.op in ACCESSES


def is_read(node: Node) -> bool:
    """Whether the node takes a value from a moment of its run."""
    return node.op in ("site.read", "run.tokens")


def span(card: ModelCard) -> int:
    """Positions that one forward of a generating run takes: one before its sites, and theirs."""
    return 2 + max((site.order for site in card.sites), default=0)


def positions(graph: Graph, card: ModelCard) -> tuple[int, ...]:
    """When in the forwards of its run each node happens, counted over all of them; BEFORE for pure operations.

    Generating runs must be written out (see `patchbay.ir.generation.unroll`).
    """
    found = [BEFORE] * len(graph.nodes)
    width: int | None = None
    for i in graph.in_runs:
        node = graph.nodes[i]
        if node.op not in ACCESSES:
            continue
        assert node.run is not None
        at = card.site(str(node.attrs["site"])).order if node.op != "run.tokens" else BEFORE
        if graph.runs[node.run].generation is not None:
            step = node.attrs.get("step")
            assert isinstance(step, int), "generating runs are written out before they are scheduled"
            width = span(card) if width is None else width
            at += 1 + step * width
        found[i] = at
    return tuple(found)


def site_chains(graph: Graph, card: ModelCard) -> tuple[int | None, ...]:
    """For every node at a site, the write that comes just before it in its run (forward order, then program order).

    A read sees that write and, through the chain, all before it; None where there is no such write.
    """
    at = positions(graph, card)
    accesses: dict[int, list[tuple[int, int]]] = {}
    for i in graph.in_runs:
        node = graph.nodes[i]
        if node.op in ACCESSES:
            assert node.run is not None
            accesses.setdefault(node.run, []).append((at[i], i))
    before: list[int | None] = [None] * len(graph.nodes)
    for entries in accesses.values():
        last: int | None = None
        for _, i in sorted(entries):
            before[i] = last
            if graph.nodes[i].op == "site.write":
                last = i
    return tuple(before)


def dependents(graph: Graph, card: ModelCard) -> list[list[int]]:
    """For every node, the nodes whose value its value may change at once: users, and the next access in its run.

    An access passes its influence on along the forward: what is read or written at a site is upstream of the run's next
    access, in forward order, then program order.
    """
    users: list[list[int]] = [[] for _ in graph.nodes]
    at = positions(graph, card)
    accesses: dict[int, list[tuple[int, int]]] = {}
    for i, node in enumerate(graph.nodes):
        for a in node.args:
            users[a].append(i)
        if is_access(node):
            assert node.run is not None
            accesses.setdefault(node.run, []).append((at[i], i))
    for entries in accesses.values():
        in_order = [i for _, i in sorted(entries)]
        for earlier, later in pairwise(in_order):
            users[earlier].append(later)
    return users


def topological_order(graph: Graph, chains: Sequence[int | None]) -> Sequence[int]:
    """Node ids with every dependency first, ties in program order.

    Raises:
        CausalityError: a write needs a value that only exists after it.
    """
    if all((chain := chains[i]) is None or chain < i for i in graph.in_runs):
        return range(len(graph.nodes))  # every dependency stands before already
    import heapq

    waiting = [len(node.args) + (chains[i] is not None) for i, node in enumerate(graph.nodes)]
    users: list[list[int]] = [[] for _ in graph.nodes]
    for i, node in enumerate(graph.nodes):
        for a in node.args:
            users[a].append(i)
        chain = chains[i]
        if chain is not None:
            users[chain].append(i)
    ready = [i for i, n in enumerate(waiting) if n == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for user in users[i]:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(graph.nodes):
        raise _causality_error(graph, chains, {i for i, n in enumerate(waiting) if n > 0})
    return order


def _causality_error(graph: Graph, chains: Sequence[int | None], stuck: set[int]) -> CausalityError:
    def needs(i: int) -> list[int]:
        chain = chains[i]
        return [d for d in (*graph.nodes[i].args, *(() if chain is None else (chain,))) if d in stuck]

    walk: dict[int, None] = {}  # in order
    at = min(stuck)
    while at not in walk:
        walk[at] = None
        at = needs(at)[0]
    steps = list(walk)
    cycle = steps[steps.index(at) :]
    write = next(i for i in cycle if graph.nodes[i].op == "site.write")
    run = graph.nodes[write].run
    # Along the cycle from the write, through its value, the first read of the same run is the one that comes too late.
    turned = cycle[cycle.index(write) :] + cycle[: cycle.index(write)]
    reads = [i for i in turned if is_read(graph.nodes[i])]
    read = next((i for i in reads if graph.nodes[i].run == run), reads[0])
    written, late = graph.nodes[write], graph.nodes[read]
    via = "" if late.run == run and len({graph.nodes[i].run for i in reads}) == 1 else " by way of other runs"
    return CausalityError(
        f"the write at {_place(written)} of run {run} needs the value at {_place(late)} of run "
        f"{late.run}{via}, which is computed only after it",
        node=write,
        related=[read],
    )


def _place(node: Node) -> str:
    site = str(node.attrs.get("site", "the generated tokens"))
    step = node.attrs.get("step")
    return site if step is None else f"{site} of step {step}"


def schedule(graph: Graph, card: ModelCard, *, joint: bool) -> Schedule:
    """The earliest moment of every node.

    Args:
        graph: a graph whose sites exist.
        card: the model's card.
        joint: whether the runs of a level share one forward, so that values may pass between them inside it.

    Raises:
        CausalityError: no order exists.
    """
    chains = site_chains(graph, card)
    order = topological_order(graph, chains)
    at = positions(graph, card)
    start = Moment(0, BEFORE)
    moments: list[Moment] = [start] * len(graph.nodes)
    chain_levels = [0] * len(graph.nodes)
    for i in order:
        node = graph.nodes[i]
        if node.run is None or node.op not in ACCESSES:
            # Most nodes take constants and values of one forward: the latest of those is it.
            moment = start
            for a in node.args:
                other = moments[a]
                if other is moment or other is start:
                    continue
                if moment is start:
                    moment = other
                elif other.level == moment.level and other.run == moment.run and moment.position > BEFORE:
                    moment = other if other.position > moment.position else moment
                else:
                    moment = _latest([moments[a] for a in node.args])
                    break
            moments[i] = moment
            continue
        chain = chains[i]
        seen = chain_levels[chain] if chain is not None else 0
        if is_read(node):
            moments[i] = Moment(seen, at[i], node.run)
            chain_levels[i] = seen
        else:
            value = _latest([moments[a] for a in node.args])
            position = at[i]
            in_time = value.position == BEFORE or (value.position <= position and (joint or value.run == node.run))
            level = value.level if in_time else value.level + 1
            moments[i] = Moment(level, position, node.run)
            chain_levels[i] = max(level, seen)
    levels = 1 + max((moments[i].level for i in graph.in_runs), default=0)  # no value is later than the latest of them
    return Schedule(order, tuple(moments), levels)


def _latest(moments: Sequence[Moment]) -> Moment:
    level = max((m.level for m in moments), default=0)
    there = [m for m in moments if m.level == level and m.position != BEFORE]
    if not there:
        return Moment(level, BEFORE)
    runs = {m.run for m in there}
    return Moment(level, max(m.position for m in there), runs.pop() if len(runs) == 1 else None)
