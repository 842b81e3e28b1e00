"""From a verified graph to forwards: which runs share one, what happens at which site, when a value is forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.events import COMPRESSION, Cost, ExecuteOptions
from patchbay.ir.facts import Facts
from patchbay.ir.graph import Graph, Node, Run, TensorData
from patchbay.ir.limits import Limits
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import ValueSpec
from patchbay.ir.price import price, value_bytes, with_forwards
from patchbay.ir.schedule import BEFORE, Schedule, is_read, positions, schedule, span
from patchbay.ir.verify import verify
from patchbay_server.engine.bodies import LOOP_INVARIANTS, SIDE_BY_SIDE
from patchbay_server.engine.bypass import SKIP_LAYERS
from patchbay_server.engine.columns import find_columns, renumbered
from patchbay_server.engine.constants import ARTIFACT_CACHE
from patchbay_server.engine.differentiation import Gradient, plan_gradients
from patchbay_server.engine.optimize import MERGE_RUNS, PASSES, optimize
from patchbay_server.engine.prefix import LAYER_COST_CPU, WORTHWHILE, Group, Planner, Sharing, bucketed
from patchbay_server.engine.steps import (
    Actions,
    Compute,
    Emit,
    Forward,
    Generated,
    Part,
    Pass,
    Read,
    Resume,
    Slot,
    Start,
    Step,
    Write,
)
from patchbay_server.engine.trunks import trunk_bytes
from patchbay_server.engine.windows import Windows, find_windows, item_at, moved, narrowed, position_axis
from patchbay_server.kernels import kernel
from patchbay_server.models.continuation import EMBEDDING, Continuation, Trunk
from patchbay_server.models.narrowing import Unembedding

#: Optimisations of the planner and the executor, by the name that switches them off.
BATCH_RUNS = "batch_runs"
EARLY_STOP = "early_stop"
LIVENESS = "liveness"
COMPILE = "compile"
COBATCH = "cobatch"
CONTINUOUS_BATCHING = "continuous_batching"
FUSE_WRITES = "fuse_writes"
WINDOWS = "windows"
NARROW_LOGITS = "narrow_logits"
LOGIT_COLUMNS = "logit_columns"
SHARED_PREFIX = "shared_prefix"
PREFIX_CACHE = "prefix_cache"
OPTIMISATIONS = (
    *PASSES,
    LOOP_INVARIANTS,
    SIDE_BY_SIDE,
    *(WINDOWS, NARROW_LOGITS, LOGIT_COLUMNS, SHARED_PREFIX, PREFIX_CACHE),
    *(BATCH_RUNS, EARLY_STOP, LIVENESS, COMPILE, SKIP_LAYERS, COBATCH, CONTINUOUS_BATCHING, FUSE_WRITES),
    ARTIFACT_CACHE,
    COMPRESSION,  # not the engine's, but switched off by the same list
)

_NO_WINDOWS = Windows(MappingProxyType({}), MappingProxyType({}))


@dataclass(frozen=True)
class Means:
    """What a model was proved to allow, and what is known of earlier requests.

    Attributes:
        continuation: how it goes on from earlier forwards; None where it does not.
        unembedding: what makes its logits, where that is able to make some of them.
        layer_cost: what it costs to run one layer at all, in token positions.
        worthwhile: what sharing may cost at most, as a part of what whole forwards cost; infinite to share whatever can
            be shared.
        trunk_of: what an earlier request of the account left for a run's tokens.
        wanted: whether what a run leaves should be kept for later requests.
    """

    continuation: Continuation | None = None
    unembedding: Unembedding | None = None
    layer_cost: int = LAYER_COST_CPU
    worthwhile: float = WORTHWHILE
    trunk_of: Callable[[Run], Trunk | None] = lambda _: None
    wanted: Callable[[Run], bool] = lambda _: False


@dataclass(frozen=True)
class Plan:
    """What will be done, and what it costs.

    Attributes:
        graph: the graph as rewritten.
        origin: for every node of it, its id in the graph as it was received.
        specs: for every node of it, its value's shape and dtype.
        facts: for every node of it, what else is known of it.
        passes: forwards, in order.
        after: what is left to compute when the last has ended.
        cost: the price.
        saved: what each rewrite saved.
        received: number of nodes received, those of every generated step counted.
        options: as requested.
        gradients: how each gradient is taken, by node.
        source, source_origin: the graph and its origins as they were before runs were made to share.
        trunks: what was kept of earlier requests, by the run that goes on from it.
        trunk_bytes: what runs leave for others of this plan to go on from, at most at a time.
        account: whose it is, whose later requests may go on from what it leaves; None for nobody's.
    """

    graph: Graph
    origin: tuple[int, ...]
    specs: tuple[ValueSpec, ...]
    facts: tuple[Facts, ...]
    passes: tuple[Pass, ...]
    after: Actions
    cost: Cost
    saved: Mapping[str, int]
    received: int
    options: ExecuteOptions
    gradients: Mapping[int, Gradient]
    source: Graph
    source_origin: tuple[int, ...]
    trunks: Mapping[int, Trunk] = field(default_factory=lambda: MappingProxyType({}))
    trunk_bytes: int = 0
    account: str | None = None

    @property
    def differentiates(self) -> bool:
        """Whether it takes gradients, for whose sake operations are recorded."""
        return bool(self.gradients)


#: When something happens: index of the pass, order of the site in it (BEFORE: before it begins).
_Time = tuple[int, int]


def make_plan(
    graph: Graph,
    card: ModelCard,
    limits: Limits,
    options: ExecuteOptions,
    *,
    max_pass_tokens: int,
    means: Means = Means(),
) -> Plan:
    """Verify, rewrite, schedule and price `graph`.

    Args:
        graph: as received.
        card: the model's.
        limits: what to hold it to.
        options: as requested.
        max_pass_tokens: token positions that one forward may carry; runs beyond it go into further forwards.
        means: what the model allows beyond whole forwards.

    Raises:
        GraphError: what `verify` raises.
    """
    verified = verify(graph, card, limits)
    off = set(options.disabled)
    if options.deterministic:  # every forward is then the very one that somebody would make by hand
        off |= {MERGE_RUNS, WINDOWS, NARROW_LOGITS, SHARED_PREFIX}
    rewritten = optimize(verified.flat, card, tuple(off))
    source, origin = rewritten.graph, rewritten.origin
    specs = tuple(verified.flat_specs[o] for o in origin)
    differentiated = frozenset(a for n in source.nodes if n.op == "grad" for a in n.args[1:])
    unembedding = means.unembedding if NARROW_LOGITS not in off else None

    def windows_of(graph: Graph, specs: Sequence[ValueSpec], uses: Mapping[int, tuple[int, int]]) -> Windows:
        if WINDOWS in off:
            return _NO_WINDOWS
        return find_windows(graph, card, specs, differentiated, logits=unembedding is not None, uses=uses)

    small, columns = source, None
    if unembedding is not None and unembedding.columns and not {WINDOWS, LOGIT_COLUMNS} & off:
        columns = find_columns(source, card, differentiated)
        if columns is not None:
            small, specs, origin = renumbered(source, specs, origin, columns, card.d_vocab)
            differentiated = frozenset(a for n in small.nodes if n.op == "grad" for a in n.args[1:])
    windows = windows_of(small, specs, {})
    sharing: Sharing | None = None
    if means.continuation is not None and SHARED_PREFIX not in off:
        kept = PREFIX_CACHE not in off
        planner = Planner(
            small,
            card,
            means.continuation,
            windows,
            layer_cost=means.layer_cost,
            worthwhile=means.worthwhile,
            room=limits.max_peak_bytes // 4,
            budget=max_pass_tokens,
            trunk_of=means.trunk_of if kept else lambda _: None,
            wanted=means.wanted if kept else lambda _: False,
        )
        sharing = planner.share(specs, origin)
    if sharing is not None:
        small, specs, origin = sharing.graph, sharing.specs, sharing.origin
        windows = windows_of(small, specs, sharing.uses)
    small, specs = narrowed(small, card, specs, windows.reads)
    together = not options.deterministic and BATCH_RUNS not in off
    size = sum(r.rows for r in small.runs) * max((r.seq for r in small.runs), default=0)
    alike = len({_signature(r, card) for r in small.runs}) <= 1
    joint = together and alike and size <= max_pass_tokens and sharing is None
    timeline = schedule(small, card, joint=joint)
    groups = _group_runs(small, card, timeline, max_pass_tokens if together else 0, sharing, means)
    builder = _Builder(small, card, timeline, groups, options, means.continuation, unembedding, windows, columns)
    passes, after = builder.build()
    facts = tuple(verified.facts[o] for o in origin)
    facts = tuple(
        known if known.spec is spec or known.spec == spec else replace(known, spec=spec, nbytes=value_bytes(spec))
        for known, spec in zip(facts, specs, strict=True)
    )
    tokens, forwards = sum(p.positions for p in passes), sum(p.forwards for p in passes)
    cost = with_forwards(replace(price(small, specs, facts), tokens=tokens, passes=forwards), card)
    saved = {**rewritten.saved, WINDOWS: len(windows.reads)}
    if unembedding is not None:
        saved[NARROW_LOGITS] = sum(
            p.rows * p.seq - sum(n for _, _, n in p.logits) for p in passes if p.logits is not None
        )
    if columns is not None:
        saved[LOGIT_COLUMNS] = card.d_vocab - len(columns)
    if sharing is not None:
        saved |= {SHARED_PREFIX: sharing.saved, PREFIX_CACHE: len(sharing.trunks)}
    return Plan(
        graph=small,
        origin=tuple(verified.origin[o] for o in origin),
        passes=passes,
        after=after,
        cost=cost,
        saved=saved,
        received=len(verified.flat.nodes),
        options=options,
        gradients=plan_gradients(small, card, builder.times),
        specs=specs,
        facts=facts,
        source=source,
        source_origin=tuple(verified.origin[o] for o in rewritten.origin),
        trunks={} if sharing is None else sharing.trunks,
        trunk_bytes=sum(trunk_bytes(card, small.runs[run]) for p in passes for run in (slot.run for slot in p.keeps)),
    )


def _group_runs(
    graph: Graph, card: ModelCard, timeline: Schedule, budget: int, sharing: Sharing | None, means: Means
) -> list[Group]:
    """Runs that share a forward, in the order of the forwards; a budget of 0 gives every run its own."""
    needed: dict[int, set[int]] = defaultdict(set)
    for i, node in enumerate(graph.nodes):
        if is_read(node):
            assert node.run is not None
            needed[timeline.moments[i].level].add(node.run)
    starts = {} if sharing is None else sharing.runs
    bases = {} if sharing is None else sharing.bases
    if bases:
        needed[0] |= set(bases)
    groups: list[Group] = []
    for level in sorted(needed):
        alike: dict[object, list[int]] = defaultdict(list)
        later: dict[int, list[int]] = defaultdict(list)
        for run in sorted(needed[level], key=lambda run: (run not in bases, run)):
            if run in starts:
                later[starts[run].base].append(run)
            else:
                alike[_signature(graph.runs[run], card)].append(run)
        for runs in alike.values():
            for group in _cut(graph, runs, budget):
                keeps = tuple(run for run in group if run in bases and level == 0)
                groups.append(Group(level, group, keeps=keeps, through=max((bases[r] for r in keeps), default=-1)))
        for runs in later.values():
            assert means.continuation is not None
            members = [(run, starts[run], graph.runs[run]) for run in runs]
            for bucket in bucketed(members, means.layer_cost, means.continuation.growing, budget):
                groups.append(Group(level, tuple(run for run, _, _ in bucket), tuple(start for _, start, _ in bucket)))
    return groups


def _signature(run: Run, card: ModelCard) -> object:
    """Equal for runs whose rows may share a forward: padding is harmless only to causal models of tokens alone."""
    if run.generation is not None:
        return object()  # equal to none but itself: its steps are its own
    if card.causal and not run.inputs:
        return None
    return (run.seq, run.ragged, tuple((name, value.shape[1:]) for name, value in run.inputs))


def _cut(graph: Graph, runs: Sequence[int], budget: int) -> Iterator[tuple[int, ...]]:
    """`runs` in groups of at most `budget` token positions each, but of one run at least."""
    group: list[int] = []
    rows = seq = 0
    for run in runs:
        r = graph.runs[run]
        length = max(r.seq, 1)
        if group and (rows + r.rows) * max(seq, length) > budget:
            yield tuple(group)
            group, rows, seq = [], 0, 0
        group.append(run)
        rows, seq = rows + r.rows, max(seq, length)
    yield tuple(group)


class _Builder:
    """Places every node at a time, then cuts time into moments."""

    def __init__(
        self,
        graph: Graph,
        card: ModelCard,
        timeline: Schedule,
        groups: Sequence[Group],
        options: ExecuteOptions,
        how: Continuation | None,
        unembedding: Unembedding | None,
        windows: Windows,
        columns: tuple[int, ...] | None,
    ) -> None:
        self.graph, self.card, self.timeline, self.groups, self.options = graph, card, timeline, groups, options
        self.how, self.unembedding, self.windows, self.columns = how, unembedding, windows, columns
        self.kernels: dict[str, Callable[..., Any] | None] = {}
        #: Attributes with defaults filled in, by operation and identity: most nodes share theirs with others.
        self.filled: dict[tuple[str, int], Mapping[str, Any]] = {}
        self.order = positions(graph, card)
        self.slots = [self._slots(group) for group in groups]
        #: Of every forward that computes some logits only: each run's slot in them.
        self.flat: dict[int, dict[int, Slot]] = {}
        self.logits: dict[int, tuple[tuple[int, int, int], ...]] = {}
        #: Values that a gradient is taken with respect to.
        self.differentiated = {a for n in graph.nodes if n.op == "grad" for a in n.args[1:]}
        #: Forwards after the first in which a differentiated read must be put back, by node.
        self.resumed: dict[int, tuple[_Time, ...]] = {}
        self.times: list[tuple[_Time, ...]] = []
        self.names: dict[int, list[str]] = defaultdict(list)
        for output in graph.outputs:
            self.names[output.node].append(output.name)

    def _slots(self, group: Group) -> dict[int, Slot]:
        slots, start = {}, 0
        for run in group.runs:
            r = self.graph.runs[run]
            slots[run] = Slot(run, start, start + r.rows, r.seq, r.lengths, r.ragged, group.first)
            start += r.rows
        return slots

    def build(self) -> tuple[tuple[Pass, ...], Actions]:
        self.times = times = self._times()
        self._choose_logits()
        last_use = self._last_uses(times)
        dying = self._dying(last_use)
        events: dict[_Time, list[int]] = defaultdict(list)
        for i, when in enumerate(times):
            for time in (*when, *self.resumed.get(i, ())):
                events[time].append(i)
        moments = {
            time: self._actions(time, sorted(nodes), last_use, dying.get(time, {})) for time, nodes in events.items()
        }
        site_at = self.card.names_by_order
        visited: dict[int, list[int]] = defaultdict(list)
        for p, order in moments:
            if order != BEFORE:
                visited[p].append(order)
        last_from = {group.goes_on[0].base: p for p, group in enumerate(self.groups) if group.goes_on}
        passes = []
        for p, group in enumerate(self.groups):
            at = sorted(visited[p])
            if self.graph.runs[group.runs[0]].generation is not None:
                passes.append(self._generating(p, group.runs[0], moments, site_at, at))
                continue
            rows = tuple(row for run in group.runs for row in self.graph.runs[run].tokens)
            start = self._start(group)
            stop_at, through = self._end(group, [site_at[order] for order in at])
            passes.append(
                Pass(
                    slots=tuple(self.slots[p].values()),
                    rows=sum(self.graph.runs[run].rows for run in group.runs),
                    seq=max(self.graph.runs[run].seq for run in group.runs),
                    tokens=rows if start is None else self.graph.runs[start.base].tokens,
                    inputs=self._inputs(group.runs),
                    before=moments.get((p, BEFORE), Actions()),
                    sites=MappingProxyType({site_at[order]: moments[p, order] for order in at}),
                    stop_at=stop_at,
                    goes_on=start,
                    keeps=tuple(self.slots[p][run] for run in group.keeps),
                    keeps_through=through,
                    drops=() if start is None or last_from[start.base] > p else (start.base,),
                    logits=self.logits.get(p),
                    columns=self.columns if p in self.logits else None,
                )
            )
        return tuple(passes), moments.get((len(self.groups), BEFORE), Actions())

    def _start(self, group: Group) -> Start | None:
        if not group.goes_on:
            return None
        rows: list[int] = []
        after: list[int] = []
        for run, start in zip(group.runs, group.goes_on, strict=True):
            count = self.graph.runs[run].rows
            rows.extend(range(count))
            after.extend([start.after] * count)
        return Start(group.goes_on[0].base, group.first, tuple(rows), tuple(after))

    def _end(self, group: Group, sites: Sequence[str]) -> tuple[str | None, int | None]:
        """The site after which a forward ends, or the layer, where others need more of it than it needs itself."""
        if EARLY_STOP in self.options.disabled:
            return None, None
        if not group.keeps:
            return (sites[-1] if sites else None), None
        assert self.how is not None
        reaches = [self.how.reaches.get(site) for site in sites]
        if any(reach is None for reach in reaches):
            return None, None
        last = max((reach.after for reach in reaches if reach is not None), default=EMBEDDING)
        return (sites[-1], None) if last >= group.through else (None, group.through)

    def _choose_logits(self) -> None:
        """Decide which forwards compute logits at some positions only, and where each run's are among them."""
        if self.unembedding is None:
            return
        ends: dict[int, set[tuple[str, int]]] = defaultdict(set)
        for i, when in enumerate(self.times):
            node = self.graph.nodes[i]
            if node.op in ("site.read", "site.write") and node.run is not None:
                for p, order in (*when, *self.resumed.get(i, ())):
                    if order >= self.unembedding.order:
                        ends[p].add((str(node.attrs["site"]), node.run))
        for p, there in ends.items():
            runs = [run for run in self.slots[p] if (LOGITS, run) in there]
            generates = self.graph.runs[next(iter(self.slots[p]))].generation is not None
            if generates or any(s != LOGITS for s, _ in there) or any(run not in self.windows.logits for run in runs):
                continue
            count = 0
            spans: list[tuple[int, int, int]] = []
            self.flat[p] = {}
            for run in runs:
                slot, (start, stop) = self.slots[p][run], self.windows.logits[run]
                start = max(start, slot.first)
                width = max(stop - start, 0)
                lengths = (width,) * len(slot.lengths)
                self.flat[p][run] = replace(slot, seq=width, lengths=lengths, ragged=False, first=start, flat=count)
                for row, length in enumerate(slot.lengths):
                    spans.append((slot.start + row, start - (slot.seq - length) - slot.first, width))
                count += width * len(slot.lengths)
            self.logits[p] = tuple(spans)

    def _generating(
        self, p: int, index: int, moments: Mapping[_Time, Actions], site_at: Mapping[int, str], at: Sequence[int]
    ) -> Pass:
        run, width = self.graph.runs[index], span(self.card)
        steps = []
        for step in range(1 + at[-1] // width):
            orders = [order for order in at if order // width == step and order % width]
            sites = {site_at[order % width - 1]: moments[p, order] for order in orders}
            steps.append(Forward(moments.get((p, step * width), Actions()), MappingProxyType(sites)))
        return Pass(
            slots=tuple(self.slots[p].values()),
            rows=run.rows,
            seq=run.seq,
            tokens=run.tokens,
            inputs=MappingProxyType({}),
            before=moments.get((p, BEFORE), Actions()),
            sites=MappingProxyType({}),
            stop_at=None,
            generation=run.generation,
            steps=tuple(steps),
        )

    def _inputs(self, runs: Sequence[int]) -> Mapping[str, tuple[TensorData, ...]]:
        inputs: dict[str, list[TensorData]] = defaultdict(list)
        for run in runs:
            for name, value in self.graph.runs[run].inputs:
                inputs[name].append(value)
        return {name: tuple(values) for name, values in inputs.items()}

    def _times(self) -> list[tuple[_Time, ...]]:
        """When each node happens: once, but for writes, which happen in every forward of their run that shows them."""
        end: _Time = (len(self.groups), BEFORE)
        pass_of = {(group.level, run): p for p, group in enumerate(self.groups) for run in group.runs}
        passes_of: dict[int, list[int]] = defaultdict(list)
        for (_, run), p in pass_of.items():
            passes_of[run].append(p)
        last_read: dict[tuple[int, int], int] = {}
        for i, node in enumerate(self.graph.nodes):
            if is_read(node):
                assert node.run is not None
                key = (pass_of[self.timeline.moments[i].level, node.run], node.run)
                last_read[key] = max(last_read.get(key, BEFORE), self.order[i])
        start: tuple[_Time, ...] = ((0, BEFORE),)
        times: list[tuple[_Time, ...]] = [()] * len(self.graph.nodes)
        for i in self.timeline.order:
            node = self.graph.nodes[i]
            level = self.timeline.moments[i].level
            if is_read(node):
                assert node.run is not None
                first = pass_of[level, node.run]
                times[i] = ((first, self.order[i]),)
                if i in self.differentiated:
                    self.resumed[i] = tuple(
                        (p, self.order[i])
                        for p in passes_of[node.run]
                        if p > first and self.order[i] <= last_read[p, node.run]
                    )
            elif node.op == "site.write":
                assert node.run is not None
                times[i] = tuple(
                    (p, self.order[i])
                    for p in passes_of[node.run]
                    if self.groups[p].level >= level and self.order[i] <= last_read.get((p, node.run), BEFORE)
                )
            elif node.op != "const":
                latest = start
                for a in node.args:
                    at = times[a]
                    if at is not latest and at:
                        at = at if len(at) == 1 else (max(at),)
                        latest = at if at > latest else latest
                times[i] = latest
        # Constants are made when they are first needed, so that none lies about.
        first_use = {i: end for i, node in enumerate(self.graph.nodes) if node.op == "const"}
        used = set()
        for i, node in enumerate(self.graph.nodes):
            for a in node.args:
                if a in first_use and times[i]:
                    first_use[a] = min(first_use[a], min(times[i]))
                    used.add(a)
        for i, time in first_use.items():
            times[i] = (time,) if i in used else start
        return times

    def _last_uses(self, times: Sequence[tuple[_Time, ...]]) -> dict[int, tuple[_Time, int]]:
        """For every node, the time and node of its last use (itself, when nothing uses it)."""
        last: dict[int, tuple[_Time, int]] = {}
        for i, node in enumerate(self.graph.nodes):
            when = times[i]
            if not when:
                continue
            latest = when[0] if len(when) == 1 else max(when)
            use = (latest, i)
            last[i] = use if i not in self.resumed else (max((latest, *self.resumed[i])), i)
            for a in node.args:
                if last[a] < use:
                    last[a] = use
        return last

    def _dying(self, last_use: Mapping[int, tuple[_Time, int]]) -> Mapping[_Time, Mapping[int, list[int]]]:
        """The values that are used for the last time: at each time, by each node."""
        dying: dict[_Time, dict[int, list[int]]] = {}
        if LIVENESS not in self.options.disabled:
            for i, (when, user) in last_use.items():
                if self.graph.nodes[i].op != "site.write":
                    dying.setdefault(when, {}).setdefault(user, []).append(i)
        return dying

    def _actions(
        self,
        time: _Time,
        nodes: Sequence[int],
        last_use: Mapping[int, tuple[_Time, int]],
        dying: Mapping[int, list[int]],
    ) -> Actions:
        keep_all = LIVENESS in self.options.disabled
        steps: list[Step] = []
        for i in nodes:
            steps.extend(self._steps(i, time, tuple(dying.get(i, ()))))
        made = [i for i in nodes if self.graph.nodes[i].op not in ("site.write", "const")]
        survivors = tuple(i for i in made if keep_all or last_use[i][0] > time)
        return Actions(tuple(steps), survivors)

    def _steps(self, i: int, time: _Time, free: tuple[int, ...]) -> list[Step]:
        node = self.graph.nodes[i]
        names = tuple(self.names[i]) if i in self.names else ()
        if is_read(node):
            if time in self.resumed.get(i, ()):
                return [Resume(i, self._slot(time, node), free)]
            read: Step = Generated(i)
            if node.op == "site.read":
                slot = self._slot(time, node)
                read = Read(i, slot, i in self.differentiated, self._part(i, node, slot), self._columns(node, slot))
            return [read, Emit(i, names, free)] if names or free else [read]
        attrs = self.filled.get((node.op, id(node.attrs)))
        if attrs is None:
            attrs = self.filled[node.op, id(node.attrs)] = op_spec(node.op).filled(node.attrs)
        if node.op == "site.write":
            return [self._write(i, node, self._slot(time, node), attrs, free)]
        if node.op not in self.kernels:
            self.kernels[node.op] = None if op_spec(node.op).structural else kernel(op_spec(node.op))
        return [Compute(i, node.op, self.kernels[node.op], node.args, attrs, names, free, i in self.differentiated)]

    def _slot(self, time: _Time, node: Node) -> Slot:
        assert node.run is not None
        slot, site = self.slots[time[0]][node.run], node.attrs["site"]
        if self.graph.runs[slot.run].generation:
            if node.attrs["step"] or site == LOGITS:
                return replace(slot, seq=1, lengths=(1,) * len(slot.lengths), ragged=False)  # the newest one alone
            return slot
        if site == LOGITS and time[0] in self.flat:
            return self.flat[time[0]][node.run]
        if slot.first:
            assert self.how is not None
            return replace(slot, short=self.how.reaches[str(site)].short)
        return slot

    def _shown(self, slot: Slot, axis: int) -> int:
        """The first position that a slot of a run's value shows."""
        return slot.first if slot.flat is not None or axis in slot.short else 0

    def _columns(self, node: Node, slot: Slot) -> tuple[int, ...] | None:
        """The logits that a read picks of all, where the forward computes all."""
        generates = self.graph.runs[slot.run].generation is not None
        return None if node.attrs["site"] != LOGITS or generates or slot.flat is not None else self.columns

    def _part(self, i: int, node: Node, slot: Slot) -> Part | None:
        axis = position_axis(self.card, str(node.attrs["site"]))
        run = self.graph.runs[slot.run]
        if axis is None or run.generation is not None:
            return None
        (start, stop), shown = self.windows.reads.get(i, (0, run.seq)), self._shown(slot, axis)
        if start >= shown:
            whole = (start, stop) == (0, run.seq) or slot.flat is not None
            return None if whole else Part(axis, start - shown, stop - start)
        (base,) = node.args
        lacks = min(stop, shown) - start
        before_start = start - self.windows.reads.get(base, (0, run.seq))[0]
        return Part(axis, 0, max(stop - shown, 0), base, before_start, lacks)

    def _write(self, i: int, node: Node, slot: Slot, attrs: Mapping[str, Any], free: tuple[int, ...]) -> Write:
        site, index = str(node.attrs["site"]), attrs["index"]
        axis, ndim = position_axis(self.card, site), len(self.card.site(site).dims)
        shown = 0 if axis is None else self._shown(slot, axis)
        arrays: tuple[tuple[int, int, int], ...] = ()
        if shown and axis is not None:
            seq = self.graph.runs[slot.run].seq
            place = item_at(index, ndim, axis)
            if place is not None and index[place][0] == "array":
                arrays = ((index[place][1], seq, shown),)
            index = moved(index, ndim, axis, seq, shown)
        return Write(i, slot, node.args[0], node.args[1:], attrs["mode"], index, free, arrays)
