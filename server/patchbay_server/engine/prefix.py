"""Which runs go on from another run over the same tokens, from which layer and position, and which of them together.

A run differs from an unwritten run over its tokens only from its first written layer on and, in a causal model, from
its first written position on. So one *base* run is made whole and leaves its residual stream, keys and values; the
others start there. Whether that pays is estimated per group of runs over the same tokens, in token positions times
layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

from patchbay.ir.card import ModelCard
from patchbay.ir.graph import Graph, Node, Run, TensorData
from patchbay.ir.ops.spec import ValueSpec
from patchbay.ir.schedule import is_access
from patchbay_server.engine.trunks import trunk_bytes
from patchbay_server.engine.windows import Window, Windows, item_at, position_axis, window_of
from patchbay_server.models.continuation import EMBEDDING, Continuation, Trunk

#: What it costs to run one layer at all, in token positions: on a CPU its weights are fetched from memory once for each
#: pass (measured: 12 to 20 positions at width 768); on a GPU kernels are launched one by one.
LAYER_COST_CPU, LAYER_COST_GPU = 16, 512
#: Sharing must come to less than this part of what the whole forwards cost, to be worth its own overheads.
WORTHWHILE = 0.8
#: Prompts of fewer positions than a layer costs at all are as quick to run again; of this many, none is.
LONG = 64
#: What it may cost to leave something for later requests over a prompt that has come before.
AFFORDABLE = 1.25
#: A pass reads keys and values of so many times the positions that it computes, at most, for every row of its own.
_REACH_BACK = 4
#: First positions that one pass covers at most, so that planning stays quick.
_WIDEST = 64
#: Numbers in a constant index that are looked through for the first written position.
_FEW = 1_024


@dataclass(frozen=True, slots=True)
class GoesOn:
    """Where a run starts.

    Attributes:
        base: the run that it goes on from (itself, when its base was kept from an earlier request).
        after: the last layer that it does not run; EMBEDDING when it runs all.
        first: the first position that it computes.
        through: the last layer that it needs.
    """

    base: int
    after: int
    first: int
    through: int


@dataclass(frozen=True)
class Group:
    """Runs that share a forward.

    Attributes:
        level: the round of forwards.
        runs: the runs, in the order of their rows.
        goes_on: where each starts, all from one base; empty for whole forwards.
        keeps: runs that leave what others go on from.
        through: the last layer of which that is needed.
    """

    level: int
    runs: tuple[int, ...]
    goes_on: tuple[GoesOn, ...] = ()
    keeps: tuple[int, ...] = ()
    through: int = -1

    @property
    def first(self) -> int:
        """The first position that is computed."""
        return min((g.first for g in self.goes_on), default=0)


@dataclass(frozen=True)
class Sharing:
    """What is shared.

    Attributes:
        graph: the graph, with base runs that no one had made, and with what is read of bases: the argument of every
            read that lacks its first positions.
        specs, origin: of its nodes.
        uses: the positions of the bases' further reads that are used.
        runs: where each run starts that goes on from another.
        bases: the runs that are gone on from, and the last layer that this needs; those kept from an earlier request
            are not among them.
        trunks: what was kept from earlier requests, by base run.
        saved: token positions times layers that need not be computed.
    """

    graph: Graph
    specs: tuple[ValueSpec, ...]
    origin: tuple[int, ...]
    uses: Mapping[int, Window]
    runs: Mapping[int, GoesOn]
    bases: Mapping[int, int]
    trunks: Mapping[int, Trunk]
    saved: int


class Planner:
    """Decides what is shared in one graph.

    Args:
        graph: the graph, rewritten.
        card: the model's.
        how: how the model goes on from earlier forwards.
        windows: of the graph's reads.
        layer_cost: what it costs to run one layer at all, in token positions.
        budget: token positions that one forward may carry.
        worthwhile: what sharing may cost at most, as a part of what whole forwards cost.
        room: bytes that bases may leave for others, all together.
        trunk_of: what an earlier request kept for a run's tokens, if anything.
        wanted: whether a run's tokens were seen before, so that what it leaves will be kept.
    """

    def __init__(
        self,
        graph: Graph,
        card: ModelCard,
        how: Continuation,
        windows: Windows,
        *,
        layer_cost: int,
        budget: int,
        worthwhile: float = WORTHWHILE,
        room: int,
        trunk_of: Callable[[Run], Trunk | None] = lambda _: None,
        wanted: Callable[[Run], bool] = lambda _: False,
    ) -> None:
        self.graph, self.card, self.how, self.windows = graph, card, how, windows
        self.layer_cost, self.budget, self.worthwhile = layer_cost, budget, worthwhile
        self.room = room
        self.trunk_of, self.wanted = trunk_of, wanted
        self.accesses: dict[int, list[int]] = defaultdict(list)
        for i in graph.in_runs:
            node = graph.nodes[i]
            if is_access(node):
                assert node.run is not None
                self.accesses[node.run].append(i)

    def share(self, specs: Sequence[ValueSpec], origin: Sequence[int]) -> Sharing | None:
        """What is worth sharing; None for nothing."""
        if "grad" in self.graph.ops:
            return None
        alike: dict[object, list[int]] = defaultdict(list)
        for run in self.accesses:
            if self._can_go_on(run):
                alike[self.graph.runs[run].tokens].append(run)
        runs: dict[int, GoesOn] = {}
        bases: dict[int, int] = {}
        trunks: dict[int, Trunk] = {}
        made: list[Run] = []
        saved, room = 0, self.room
        for members in alike.values():
            some = self.graph.runs[members[0]]
            plain = [r for r in members if not self._is_written(r)]
            trunk = self.trunk_of(some)
            long = some.rows * some.seq >= min(self.layer_cost, LONG)
            wanted = trunk is None and long and self.wanted(some)
            if len(members) < 2 and trunk is None and not wanted:
                continue
            going = members if trunk is not None else [r for r in members if r not in plain[:1]]
            base = plain[0] if plain else len(self.graph.runs) + len(made)
            starts = {r: self._start(r, base) for r in going}
            through = max((s.through for s in starts.values()), default=-1)
            if trunk is not None and not _suffices(trunk, starts.values(), through):
                trunk, going = None, [r for r in members if r not in plain[:1]]
                starts = {r: s for r, s in starts.items() if r in going}
            won = self._won(members, starts, False, AFFORDABLE, len(self.how.layers)) if wanted else None
            if won is None:
                wanted = False
                if len(members) < 2 and trunk is None:
                    continue
                won = self._won(members, starts, trunk is not None, self.worthwhile)
            nbytes = 0 if trunk is not None else trunk_bytes(self.card, some)
            if won is None or nbytes > room:
                continue
            room -= nbytes
            if not plain:
                made.append(replace(some, label=""))
            runs |= starts
            if trunk is None:
                bases[base] = len(self.how.layers) - 1 if wanted else through
            else:
                trunks[base] = trunk
            saved += won
        if not runs and not bases:
            return None
        return self._completed(runs, bases, trunks, made, specs, origin, saved)

    # --- one run

    def _can_go_on(self, run: int) -> bool:
        r = self.graph.runs[run]
        if r.generation is not None or r.inputs or not r.seq or not all(r.lengths):
            return False
        nodes = [self.graph.nodes[i] for i in self.accesses[run]]
        if not any(node.op == "site.read" for node in nodes):
            return False  # nothing asks for its forward
        sites = (node.attrs.get("site") for node in nodes)
        return all(site in self.how.reaches for site in sites)

    def _is_written(self, run: int) -> bool:
        return any(self.graph.nodes[i].op == "site.write" for i in self.accesses[run])

    def _start(self, run: int, base: int) -> GoesOn:
        r = self.graph.runs[run]
        reaches = [self.how.reaches[str(self.graph.nodes[i].attrs["site"])] for i in self.accesses[run]]
        reads = [
            self.how.reaches[str(self.graph.nodes[i].attrs["site"])]
            for i in self.accesses[run]
            if self.graph.nodes[i].op == "site.read"
        ]
        first = 0 if r.ragged else min(first_written(self.graph, self.card, i, r) for i in self.accesses[run])
        if not self._is_written(run) and not r.ragged:
            first = min(self._read_window(i, r)[0] for i in self.accesses[run])
        return GoesOn(base, min(x.after for x in reaches), min(first, r.seq - 1), max(x.through for x in reads))

    def _read_window(self, i: int, run: Run) -> Window:
        return self.windows.reads.get(i, (0, run.seq))

    # --- whether it pays

    def _won(
        self, members: Sequence[int], starts: Mapping[int, GoesOn], kept: bool, limit: float, leaves: int = 0
    ) -> int | None:
        """Token positions times layers that sharing saves; None where it costs more than `limit` of separate forwards.

        Args:
            members: runs over the same tokens.
            starts: where those of them that go on from the base do.
            kept: whether the base is there already.
            limit: in units of what the runs cost apart, each as deep as it is read.
            leaves: layers of the base that are to be kept for later requests, however early its own reads end.
        """
        runs = self.graph.runs
        some = runs[members[0]]
        deepest = 1 + max((self._through(r) for r in members), default=-1)
        rows = sum(runs[r].rows for r in members)
        passes = -(-rows * some.seq // max(self.budget, 1))
        whole = rows * some.seq * deepest
        base = 0 if kept else max(deepest, leaves)
        shared = some.rows * some.seq * base
        overhead = base * self.layer_cost
        for bucket in bucketed(
            [(r, starts[r], runs[r]) for r in starts], self.layer_cost, self.how.growing, self.budget
        ):
            first = min(g.first for _, g, _ in bucket)
            shared += sum(r.rows * (r.seq - first) * (g.through - g.after) for _, g, r in bucket)
            overhead += self.layer_cost * _layers(bucket)
        if shared + overhead > limit * (whole + passes * deepest * self.layer_cost):
            return None
        return max(whole - shared, 0)

    def _through(self, run: int) -> int:
        return max(
            (
                self.how.reaches[str(self.graph.nodes[i].attrs["site"])].through
                for i in self.accesses[run]
                if self.graph.nodes[i].op == "site.read"
            ),
            default=-1,
        )

    # --- what bases must read for others

    def _completed(
        self,
        runs: dict[int, GoesOn],
        bases: dict[int, int],
        trunks: dict[int, Trunk],
        made: Sequence[Run],
        specs: Sequence[ValueSpec],
        origin: Sequence[int],
        saved: int,
    ) -> Sharing:
        graph = self.graph
        lacking: dict[tuple[int, str], list[int]] = defaultdict(list)
        for run, goes_on in runs.items():
            for i in self.accesses[run]:
                site = str(graph.nodes[i].attrs["site"])
                axis = position_axis(self.card, site)
                if graph.nodes[i].op != "site.read" or axis not in self.how.reaches[site].short:
                    continue
                if self._read_window(i, graph.runs[run])[0] < goes_on.first:
                    lacking[goes_on.base, site].append(i)
        count = len(lacking)
        completes: dict[int, int] = {}
        uses: dict[int, Window] = {}
        for number, ((base, site), reads) in enumerate(lacking.items()):
            belongs = [self.graph.nodes[i].run for i in reads]
            start = min(
                self._read_window(i, graph.runs[r])[0] for i, r in zip(reads, belongs, strict=True) if r is not None
            )
            stop = max(runs[r].first for r in belongs if r is not None)
            uses[number] = (start, stop)
            completes |= dict.fromkeys(reads, number)
            if base in trunks:  # it is read by going on from what was kept, as everything else is
                reach = self.how.reaches[site]
                had = runs.get(base, GoesOn(base, reach.after, start, reach.through))
                after, first = min(had.after, reach.after), min(had.first, start)
                runs[base] = GoesOn(base, after, first, max(had.through, reach.through))
        extra = [Node("site.read", (), {"site": site}, base) for base, site in lacking]
        nodes = [
            replace(node, args=(*(a + count for a in node.args), *((completes[i],) if i in completes else ())))
            for i, node in enumerate(graph.nodes)
        ]
        outputs = tuple(replace(o, node=o.node + count) for o in graph.outputs)
        models = [reads[0] for reads in lacking.values()]
        return Sharing(
            graph=replace(graph, runs=(*graph.runs, *made), nodes=(*extra, *nodes), outputs=outputs),
            specs=(*(specs[i] for i in models), *specs),
            origin=(*(origin[i] for i in models), *origin),
            uses=uses,
            runs=runs,
            bases=bases,
            trunks=trunks,
            saved=saved,
        )


def _suffices(trunk: Trunk, starts: Iterable[GoesOn], through: int) -> bool:
    """Whether everything that is gone on from was kept."""
    needed = {s.after for s in starts if s.after != EMBEDDING}
    return needed <= set(trunk.streams) and set(range(through + 1)) <= set(trunk.keys)


def first_written(graph: Graph, card: ModelCard, i: int, run: Run) -> int:
    """The first position of `run`, as its user sees them, that node `i` changes; behind the last where it changes none.

    0 where that is not known.
    """
    node = graph.nodes[i]
    if node.op != "site.write":
        return run.seq
    site = str(node.attrs["site"])
    axis, ndim = position_axis(card, site), len(card.site(site).dims)
    index: Any = node.attrs.get("index", ())
    if axis is None:
        return 0
    place = item_at(index, ndim, axis)
    if place is not None and index[place][0] == "array":
        return _least(graph.nodes[node.args[1 + index[place][1]]], run.seq)
    window = window_of(index, ndim, axis, run.seq)
    return 0 if window is None else window[0]


def _least(node: Node, seq: int) -> int:
    """The smallest position in a constant array of indices; 0 when it is not known."""
    value = node.attrs.get("value")
    if node.op != "const" or not isinstance(value, TensorData):
        return 0
    wide = value.dtype.itemsize
    if not value.dtype.is_integer or not 0 < value.nbytes // wide <= _FEW:
        return 0
    data = bytes(value.data)
    signed = not value.dtype.name.startswith("u")
    found = [int.from_bytes(data[at : at + wide], "little", signed=signed) for at in range(0, len(data), wide)]
    return min(position % seq for position in found) if all(-seq <= position < seq for position in found) else 0


# --- which runs share a forward -------------------------------------------------------------------------------------

_Member: TypeAlias = "tuple[int, GoesOn, Run]"


def bucketed(members: Sequence[_Member], layer_cost: int, growing: bool, budget: int) -> Iterator[list[_Member]]:
    """Runs of one base in forwards: each computes from the first position that any of its runs needs.

    Fewer forwards run fewer layers for the sake of few positions; more forwards compute fewer positions in vain. The
    cheapest division of the runs in the order of their first positions is found by dynamic programming.

    Args:
        members: runs, and where each starts; all of one length.
        layer_cost: what it costs to run one layer at all, in token positions.
        growing: whether rows may start after different layers.
        budget: token positions that one forward may carry.
    """
    apart: dict[object, list[_Member]] = defaultdict(list)
    for member in members:
        after = member[1].after
        apart[after if not growing or after == EMBEDDING else None].append(member)
    for some in apart.values():
        for bucket in _divided(sorted(some, key=lambda m: m[1].first), layer_cost):
            yield from _cut(bucket, budget)


def _divided(members: Sequence[_Member], layer_cost: int) -> Iterator[list[_Member]]:
    by_first: dict[int, list[_Member]] = defaultdict(list)
    for member in members:
        by_first[member[1].first].append(member)
    firsts = list(by_first)
    work = [sum(r.rows * (g.through - g.after) for _, g, r in by_first[first]) for first in firsts]
    lows = [min(g.after for _, g, _ in by_first[first]) for first in firsts]
    highs = [max(g.through for _, g, _ in by_first[first]) for first in firsts]
    cheapest = [0.0] + [float("inf")] * len(firsts)
    begins = [0] * (len(firsts) + 1)
    for begin in range(len(firsts)):
        vain, low, high = 0, lows[begin], highs[begin]
        for end in range(begin, min(len(firsts), begin + _WIDEST)):
            vain += work[end] * (firsts[end] - firsts[begin])
            low, high = min(low, lows[end]), max(high, highs[end])
            cost = cheapest[begin] + layer_cost * (high - low) + vain
            if cost < cheapest[end + 1]:
                cheapest[end + 1], begins[end + 1] = cost, begin
    cuts = [len(firsts)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    for begin, end in pairwise(reversed(cuts)):
        yield [member for first in firsts[begin:end] for member in by_first[first]]


def _cut(bucket: Sequence[_Member], budget: int) -> Iterator[list[_Member]]:
    """A bucket in parts that fit into a forward, of one run at least, in the order in which their rows start."""
    part: list[_Member] = []
    rows = 0
    first = min(g.first for _, g, _ in bucket)
    for member in sorted(bucket, key=lambda m: (m[1].after, m[0])):
        run = member[2]
        computed = (rows + run.rows) * (run.seq - first)
        held = (rows + run.rows) * run.seq
        if part and (computed > budget or held > _REACH_BACK * budget):
            yield part
            part, rows = [], 0
        part.append(member)
        rows += run.rows
    yield part


def _layers(bucket: Sequence[_Member]) -> int:
    return max(g.through for _, g, _ in bucket) - min(g.after for _, g, _ in bucket)
