"""From a verified graph to forwards: which runs share one, what happens at which site, when a value is forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.events import Cost, ExecuteOptions
from patchbay.ir.graph import Generation, Graph, Node, Run, TensorData
from patchbay.ir.limits import Limits
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import ValueSpec
from patchbay.ir.price import price, with_forwards
from patchbay.ir.schedule import BEFORE, Schedule, is_read, positions, schedule, span
from patchbay.ir.verify import verify
from patchbay_server.engine.optimize import PASSES, optimize
from patchbay_server.kernels import kernel

if TYPE_CHECKING:
    import torch

#: Optimisations of the planner and the executor, by the name that switches them off.
BATCH_RUNS = "batch_runs"
EARLY_STOP = "early_stop"
LIVENESS = "liveness"
COMPILE = "compile"
COBATCH = "cobatch"
CONTINUOUS_BATCHING = "continuous_batching"
FUSE_WRITES = "fuse_writes"
OPTIMISATIONS = (*PASSES, BATCH_RUNS, EARLY_STOP, LIVENESS, COMPILE, COBATCH, CONTINUOUS_BATCHING, FUSE_WRITES)


@dataclass(frozen=True, slots=True)
class Slot:
    """The rows of a forward that belong to one run.

    Attributes:
        run: the run.
        start, stop: its rows in the forward.
        seq: extent of its sequence axes as its user sees them.
        lengths: real length of each row.
        ragged: whether the lengths differ.
    """

    run: int
    start: int
    stop: int
    seq: int
    lengths: tuple[int, ...]
    ragged: bool

    def covers(self, value: torch.Tensor, axes: Sequence[int]) -> bool:
        """Whether the run's rows, as its user sees them, are all of a forward's value."""
        whole = not self.ragged and self.start == 0 and self.stop == value.shape[0]
        return whole and all(value.shape[axis] == self.seq for axis in axes)


@dataclass(frozen=True, slots=True)
class Read:
    """Take the value of a run's rows at the site.

    Attributes:
        node: the read.
        slot: the run's rows.
        differentiated: a gradient is taken with respect to the value, so the model goes on with it.
    """

    node: int
    slot: Slot
    differentiated: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a later forward of the run go on with the value that an earlier one read, so that gradients reach it.

    Attributes:
        node: the read.
        slot: the run's rows.
        free: values to forget afterwards.
    """

    node: int
    slot: Slot
    free: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Write:
    """Change a run's rows at the site."""

    node: int
    slot: Slot
    value: int
    indices: tuple[int, ...]
    mode: str
    index: tuple[Any, ...]
    free: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Compute:
    """Apply a kernel to values. `function` is None for constants, ``item`` and ``call``, which the executor knows."""

    node: int
    op: str
    function: Callable[..., Any] | None
    args: tuple[int, ...]
    attrs: Mapping[str, Any]
    outputs: tuple[str, ...] = ()
    free: tuple[int, ...] = ()
    differentiated: bool = False


@dataclass(frozen=True, slots=True)
class Emit:
    """Send a value that was read, under each of the names."""

    node: int
    outputs: tuple[str, ...]
    free: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """Take the tokens that the run has generated so far."""

    node: int


Step = Read | Resume | Write | Compute | Emit | Generated


@dataclass(frozen=True, slots=True)
class Actions:
    """What happens when a forward reaches one site (or before it begins, or after the last).

    Attributes:
        steps: in program order.
        survivors: values made here that are needed later, and so must not share memory with the model's tensors.
    """

    steps: tuple[Step, ...] = ()
    survivors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Forward:
    """One of the forwards of a generating run.

    Attributes:
        before: what happens before it begins.
        sites: what happens at each site, in forward order.
    """

    before: Actions
    sites: Mapping[str, Actions]


@dataclass(frozen=True)
class Pass:
    """One forward of the model, or all of a generating run's.

    Attributes:
        slots: whose rows it carries.
        rows, seq: extents of its batch; shorter rows are padded on the right.
        tokens: one tuple of ids per row, unpadded; none where the model takes no tokens.
        inputs: further inputs by name, one value per slot.
        before: what happens before it begins.
        sites: what happens at each site, in forward order.
        stop_at: the last site that anything needs; None runs the model to its end.
        generation: how tokens are generated; None for a single forward.
        steps: the forwards of a generating run as far as anything needs them, instead of `sites`; the last may hold
            only what happens once the tokens are there.
    """

    slots: tuple[Slot, ...]
    rows: int
    seq: int
    tokens: tuple[tuple[int, ...], ...]
    inputs: Mapping[str, tuple[TensorData, ...]]
    before: Actions
    sites: Mapping[str, Actions]
    stop_at: str | None
    generation: Generation | None = None
    steps: tuple[Forward, ...] = ()

    @property
    def forwards(self) -> int:
        """Forwards of the model, at most."""
        return min(len(self.steps), self.generation.max_new_tokens) if self.generation else 1

    @property
    def positions(self) -> int:
        """Token positions that it puts through the model, at most."""
        return self.rows * (self.seq + self.forwards - 1)


@dataclass(frozen=True)
class Plan:
    """What will be done, and what it costs.

    Attributes:
        graph: the graph as rewritten.
        origin: for every node of it, its id in the graph as it was received.
        specs: for every node of it, its value's shape and dtype.
        passes: forwards, in order.
        after: what is left to compute when the last has ended.
        cost: the price.
        saved: what each rewrite saved.
        received: number of nodes received, those of every generated step counted.
        options: as requested.
        last_grad: the node after which no gradient is taken any more; None where none is.
    """

    graph: Graph
    origin: tuple[int, ...]
    specs: tuple[ValueSpec, ...]
    passes: tuple[Pass, ...]
    after: Actions
    cost: Cost
    saved: Mapping[str, int]
    received: int
    options: ExecuteOptions
    last_grad: int | None = None


#: When something happens: index of the pass, order of the site in it (BEFORE: before it begins).
_Time = tuple[int, int]


def make_plan(graph: Graph, card: ModelCard, limits: Limits, options: ExecuteOptions, *, max_pass_tokens: int) -> Plan:
    """Verify, rewrite, schedule and price `graph`.

    Args:
        graph: as received.
        card: the model's.
        limits: what to hold it to.
        options: as requested.
        max_pass_tokens: token positions that one forward may carry; runs beyond it go into further forwards.

    Raises:
        GraphError: what `verify` raises.
    """
    verified = verify(graph, card, limits)
    rewritten = optimize(verified.flat, card, options.disabled)
    small = rewritten.graph
    together = not options.deterministic and BATCH_RUNS not in options.disabled
    size = sum(r.rows for r in small.runs) * max((r.seq for r in small.runs), default=0)
    alike = len({_signature(r, card) for r in small.runs}) <= 1
    joint = together and alike and size <= max_pass_tokens
    timeline = schedule(small, card, joint=joint)
    groups = _group_runs(small, card, timeline, max_pass_tokens if together else 0)
    builder = _Builder(small, card, timeline, groups, options)
    passes, after = builder.build()
    specs = tuple(verified.flat_specs[o] for o in rewritten.origin)
    facts = tuple(verified.facts[o] for o in rewritten.origin)
    tokens, forwards = sum(p.positions for p in passes), sum(p.forwards for p in passes)
    cost = with_forwards(replace(price(small, specs, facts), tokens=tokens, passes=forwards), card)
    return Plan(
        graph=small,
        origin=tuple(verified.origin[o] for o in rewritten.origin),
        passes=passes,
        after=after,
        cost=cost,
        saved=rewritten.saved,
        received=len(verified.flat.nodes),
        options=options,
        last_grad=builder.last_grad(),
        specs=specs,
    )


def _group_runs(graph: Graph, card: ModelCard, timeline: Schedule, budget: int) -> list[tuple[int, tuple[int, ...]]]:
    """Pairs of level and runs that share a forward; a budget of 0 gives every run its own."""
    needed: dict[int, set[int]] = defaultdict(set)
    for i, node in enumerate(graph.nodes):
        if is_read(node):
            assert node.run is not None
            needed[timeline.moments[i].level].add(node.run)
    groups: list[tuple[int, tuple[int, ...]]] = []
    for level in sorted(needed):
        alike: dict[object, list[int]] = defaultdict(list)
        for run in sorted(needed[level]):
            alike[_signature(graph.runs[run], card)].append(run)
        for runs in alike.values():
            groups.extend((level, group) for group in _cut(graph, runs, budget))
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
        groups: Sequence[tuple[int, tuple[int, ...]]],
        options: ExecuteOptions,
    ) -> None:
        self.graph, self.card, self.timeline, self.groups, self.options = graph, card, timeline, groups, options
        self.order = positions(graph, card)
        self.slots = [self._slots(runs) for _, runs in groups]
        #: Values that a gradient is taken with respect to.
        self.differentiated = {a for n in graph.nodes if n.op == "grad" for a in n.args[1:]}
        #: Forwards after the first in which a differentiated read must be put back, by node.
        self.resumed: dict[int, tuple[_Time, ...]] = {}
        self.times: list[tuple[_Time, ...]] = []
        self.names: dict[int, list[str]] = defaultdict(list)
        for output in graph.outputs:
            self.names[output.node].append(output.name)

    def _slots(self, runs: Sequence[int]) -> tuple[Slot, ...]:
        slots, start = [], 0
        for run in runs:
            r = self.graph.runs[run]
            slots.append(Slot(run, start, start + r.rows, r.seq, r.lengths, r.ragged))
            start += r.rows
        return tuple(slots)

    def build(self) -> tuple[tuple[Pass, ...], Actions]:
        self.times = times = self._times()
        last_use = self._last_uses(times)
        events: dict[_Time, list[int]] = defaultdict(list)
        for i, when in enumerate(times):
            for time in (*when, *self.resumed.get(i, ())):
                events[time].append(i)
        moments = {time: self._actions(time, sorted(nodes), last_use) for time, nodes in events.items()}
        site_at = self.card.names_by_order
        passes = []
        for p, (_, runs) in enumerate(self.groups):
            if self.graph.runs[runs[0]].generation is not None:
                passes.append(self._generating(p, runs[0], moments, site_at))
                continue
            at = sorted(order for (q, order) in moments if q == p and order != BEFORE)
            tokens = tuple(row for run in runs for row in self.graph.runs[run].tokens)
            stops = EARLY_STOP not in self.options.disabled and at
            passes.append(
                Pass(
                    slots=self.slots[p],
                    rows=sum(self.graph.runs[run].rows for run in runs),
                    seq=max(self.graph.runs[run].seq for run in runs),
                    tokens=tokens,
                    inputs=self._inputs(runs),
                    before=moments.get((p, BEFORE), Actions()),
                    sites=MappingProxyType({site_at[order]: moments[p, order] for order in at}),
                    stop_at=site_at[at[-1]] if stops else None,
                )
            )
        return tuple(passes), moments.get((len(self.groups), BEFORE), Actions())

    def _generating(self, p: int, index: int, moments: Mapping[_Time, Actions], site_at: Mapping[int, str]) -> Pass:
        run, width = self.graph.runs[index], span(self.card)
        at = sorted(order for (q, order) in moments if q == p and order != BEFORE)
        steps = []
        for step in range(1 + at[-1] // width):
            orders = [order for order in at if order // width == step and order % width]
            sites = {site_at[order % width - 1]: moments[p, order] for order in orders}
            steps.append(Forward(moments.get((p, step * width), Actions()), MappingProxyType(sites)))
        return Pass(
            slots=self.slots[p],
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

    def last_grad(self) -> int | None:
        """The gradient that is taken last; only after `build`."""
        grads = [(self.times[i], i) for i, node in enumerate(self.graph.nodes) if node.op == "grad"]
        return max(grads)[1] if grads else None

    def _times(self) -> list[tuple[_Time, ...]]:
        """When each node happens: once, but for writes, which happen in every forward of their run that shows them."""
        end: _Time = (len(self.groups), BEFORE)
        pass_of = {(level, run): p for p, (level, runs) in enumerate(self.groups) for run in runs}
        last_read: dict[tuple[int, int], int] = {}
        for i, node in enumerate(self.graph.nodes):
            if is_read(node):
                assert node.run is not None
                key = (pass_of[self.timeline.moments[i].level, node.run], node.run)
                last_read[key] = max(last_read.get(key, BEFORE), self.order[i])
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
                        for p, (_, runs) in enumerate(self.groups)
                        if p > first and node.run in runs and self.order[i] <= last_read[p, node.run]
                    )
            elif node.op == "site.write":
                times[i] = tuple(
                    (p, self.order[i])
                    for p, (pass_level, runs) in enumerate(self.groups)
                    if node.run in runs and pass_level >= level and self.order[i] <= last_read[p, node.run]
                )
            elif node.op != "const":
                times[i] = (max((t for a in node.args for t in times[a]), default=(0, BEFORE)),)
        # Constants are made when they are first needed, so that none lies about.
        first_use: dict[int, _Time] = {}
        for i, node in enumerate(self.graph.nodes):
            for a in node.args:
                if self.graph.nodes[a].op == "const" and times[i]:
                    first_use[a] = min(first_use.get(a, end), min(times[i]))
        for i, node in enumerate(self.graph.nodes):
            if node.op == "const":
                times[i] = (first_use.get(i, (0, BEFORE)),)
        return times

    def _last_uses(self, times: Sequence[tuple[_Time, ...]]) -> dict[int, tuple[_Time, int]]:
        """For every node, the time and node of its last use (itself, when nothing uses it)."""
        last: dict[int, tuple[_Time, int]] = {}
        for i, node in enumerate(self.graph.nodes):
            if times[i]:
                last.setdefault(i, (max((*times[i], *self.resumed.get(i, ()))), i))
                for a in node.args:
                    last[a] = max(last[a], (max(times[i]), i))
        return last

    def _actions(self, time: _Time, nodes: Sequence[int], last_use: Mapping[int, tuple[_Time, int]]) -> Actions:
        keep_all = LIVENESS in self.options.disabled
        dying: dict[int, list[int]] = defaultdict(list)
        for i in {a for n in nodes for a in (n, *self.graph.nodes[n].args)}:
            when, user = last_use[i]
            if when == time and not keep_all and self.graph.nodes[i].op != "site.write":
                dying[user].append(i)
        steps: list[Step] = []
        for i in nodes:
            steps.extend(self._steps(i, time, tuple(dying[i])))
        made = [i for i in nodes if self.graph.nodes[i].op not in ("site.write", "const")]
        survivors = tuple(i for i in made if keep_all or last_use[i][0] > time)
        return Actions(tuple(steps), survivors)

    def _steps(self, i: int, time: _Time, free: tuple[int, ...]) -> list[Step]:
        node, names = self.graph.nodes[i], tuple(self.names.get(i, ()))
        if is_read(node):
            if time in self.resumed.get(i, ()):
                return [Resume(i, self._slot(time, node), free)]
            read: Step = Generated(i)
            if node.op == "site.read":
                read = Read(i, self._slot(time, node), i in self.differentiated)
            return [read, Emit(i, names, free)] if names or free else [read]
        attrs = op_spec(node.op).fill(node.attrs)
        if node.op == "site.write":
            slot = self._slot(time, node)
            return [Write(i, slot, node.args[0], node.args[1:], attrs["mode"], attrs["index"], free)]
        function = None if op_spec(node.op).structural else kernel(op_spec(node.op))
        return [Compute(i, node.op, function, node.args, attrs, names, free, i in self.differentiated)]

    def _slot(self, time: _Time, node: Node) -> Slot:
        slot = next(s for s in self.slots[time[0]] if s.run == node.run)
        if self.graph.runs[slot.run].generation and (node.attrs["step"] or node.attrs["site"] == LOGITS):
            return replace(slot, seq=1, lengths=(1,) * len(slot.lengths), ragged=False)  # the newest position alone
        return slot
