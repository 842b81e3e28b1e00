"""From a verified graph to forwards: which runs share one, what happens at which site, when a value is forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

from patchbay.ir.card import ModelCard
from patchbay.ir.events import Cost, ExecuteOptions
from patchbay.ir.facts import Facts
from patchbay.ir.graph import Graph, Run
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import ValueSpec
from patchbay.ir.price import totals, value_bytes, with_forwards
from patchbay.ir.schedule import Schedule, is_read, schedule
from patchbay.ir.verify import verify
from patchbay_server.engine.building import Builder
from patchbay_server.engine.columns import find_columns, renumbered
from patchbay_server.engine.differentiation import Gradient, plan_gradients
from patchbay_server.engine.folding import FOLD_CONSTANTS, fold_constants
from patchbay_server.engine.optimize import MERGE_RUNS, differentiated, optimize
from patchbay_server.engine.prefix import LAYER_COST_CPU, WORTHWHILE, Group, Planner, Sharing, bucketed
from patchbay_server.engine.prompts import with_beginnings
from patchbay_server.engine.steps import (
    Actions,
    Pass,
)
from patchbay_server.engine.switches import (
    BATCH_RUNS,
    LAST_LAYER,
    LOGIT_COLUMNS,
    NARROW_LOGITS,
    OPTIMISATIONS,
    PREFIX_CACHE,
    SHARED_PREFIX,
    WINDOWS,
)
from patchbay_server.engine.trunks import trunk_bytes
from patchbay_server.engine.windows import Windows, find_windows, narrowed
from patchbay_server.models.continuation import Continuation, Trunk
from patchbay_server.models.narrowing import Unembedding

_T = TypeVar("_T")

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
        cost: the price; its peak is found by `patchbay_server.engine.memory`, which needs the plan.
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
    origin: Sequence[int]
    specs: Sequence[ValueSpec]
    facts: Sequence[Facts]
    passes: tuple[Pass, ...]
    after: Actions
    cost: Cost
    saved: Mapping[str, int]
    received: int
    options: ExecuteOptions
    gradients: Mapping[int, Gradient]
    source: Graph
    source_origin: Sequence[int]
    trunks: Mapping[int, Trunk] = field(default_factory=lambda: MappingProxyType({}))
    trunk_bytes: int = 0
    account: str | None = None

    @property
    def differentiates(self) -> bool:
        """Whether it takes gradients, for whose sake operations are recorded."""
        return bool(self.gradients)


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
        off |= {FOLD_CONSTANTS, MERGE_RUNS, WINDOWS, NARROW_LOGITS, SHARED_PREFIX}
    flat, folded = (verified.flat, 0) if FOLD_CONSTANTS in off else fold_constants(verified.flat, verified.flat_specs)
    rewritten = optimize(flat, card, tuple(off))
    source, origin = rewritten.graph, rewritten.origin
    specs = _at(verified.flat_specs, origin)
    wrt = differentiated(source)
    unembedding = means.unembedding if NARROW_LOGITS not in off else None

    def windows_of(graph: Graph, specs: Sequence[ValueSpec], uses: Mapping[int, tuple[int, int]]) -> Windows:
        if WINDOWS in off:
            return _NO_WINDOWS
        return find_windows(graph, card, specs, wrt, logits=unembedding is not None, uses=uses)

    small, columns = source, None
    if unembedding is not None and unembedding.columns and not {WINDOWS, LOGIT_COLUMNS} & off:
        columns = find_columns(source, card, wrt)
        if columns is not None:
            small, specs, origin = renumbered(source, specs, origin, columns, card.d_vocab)
            wrt = differentiated(small)
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
    least = None if LAST_LAYER in off else means.layer_cost
    facts = _facts(verified.facts, origin, specs)
    builder = Builder(
        small, facts, card, timeline, groups, options, means.continuation, unembedding, windows, columns, least
    )
    passes, after = builder.build()
    if means.continuation is not None and not {SHARED_PREFIX, PREFIX_CACHE} & off:
        passes = with_beginnings(passes, small, card, specs, means.continuation)
    tokens, forwards = sum(p.positions for p in passes), sum(p.forwards for p in passes)
    cost = with_forwards(replace(totals(small, facts), tokens=tokens, passes=forwards), card)
    saved = {FOLD_CONSTANTS: folded, **rewritten.saved, WINDOWS: len(windows.reads)}
    if unembedding is not None:
        saved[NARROW_LOGITS] = sum(
            p.rows * p.seq - sum(n for _, _, n in p.logits) for p in passes if p.logits is not None
        )
    if columns is not None:
        saved[LOGIT_COLUMNS] = card.d_vocab - len(columns)
    if sharing is not None:
        saved |= {SHARED_PREFIX: sharing.saved, PREFIX_CACHE: len(sharing.trunks)}
        saved[LAST_LAYER] = sum(_left_out(p) for p in passes)
    return Plan(
        graph=small,
        origin=_at(verified.origin, origin),
        passes=passes,
        after=after,
        cost=cost,
        saved=saved,
        received=len(verified.flat.nodes),
        options=options,
        gradients=plan_gradients(small, card, builder.timing.of),
        specs=specs,
        facts=facts,
        source=source,
        source_origin=_at(verified.origin, rewritten.origin),
        trunks={} if sharing is None else sharing.trunks,
        trunk_bytes=sum(trunk_bytes(card, small.runs[run]) for p in passes for run in (slot.run for slot in p.keeps)),
    )


def _left_out(each: Pass) -> int:
    """Positions at which the last layer hands over keys and values and nothing else."""
    start = each.goes_on
    return 0 if start is None or start.last is None else each.rows * (start.last - start.first)


def _at(values: Sequence[_T], places: Sequence[int]) -> Sequence[_T]:
    """The values at some places; the very same sequence where those are all of them, in order."""
    return values if places == range(len(values)) else [values[place] for place in places]


def _facts(known: Sequence[Facts], origin: Sequence[int], specs: Sequence[ValueSpec]) -> Sequence[Facts]:
    """What is known of nodes that come from others and whose values may have become smaller."""
    return [
        facts if facts.spec is spec or facts.spec == spec else replace(facts, spec=spec, nbytes=value_bytes(spec))
        for facts, spec in zip(_at(known, origin), specs, strict=True)
    ]


def _group_runs(
    graph: Graph, card: ModelCard, timeline: Schedule, budget: int, sharing: Sharing | None, means: Means
) -> list[Group]:
    """Runs that share a forward, in the order of the forwards; a budget of 0 gives every run its own."""
    needed: dict[int, set[int]] = defaultdict(set)
    for i in graph.in_runs:
        node = graph.nodes[i]
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


__all__ = ["OPTIMISATIONS", "PREFIX_CACHE", "Means", "Plan", "make_plan"]
