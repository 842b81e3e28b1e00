"""Places every node of a graph at a time, then cuts time into what happens at each site of each forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.schedule import BEFORE, Schedule, is_read, positions, span
from patchbay_server.engine.prefix import Group
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
from patchbay_server.engine.switches import EARLY_STOP, LIVENESS
from patchbay_server.engine.windows import Windows, item_at, moved, position_axis, window_of
from patchbay_server.kernels import kernel
from patchbay_server.models.continuation import EMBEDDING, Continuation
from patchbay_server.models.narrowing import Unembedding

#: When something happens: index of the pass, order of the site in it (BEFORE: before it begins).
Time: TypeAlias = "tuple[int, int]"


class Builder:
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
        least: int | None = None,
    ) -> None:
        self.graph, self.card, self.timeline, self.groups, self.options = graph, card, timeline, groups, options
        self.how, self.unembedding, self.windows, self.columns = how, unembedding, windows, columns
        #: Positions that the last layer must be able to leave out for that to be worth a call; None to leave out none.
        self.least = least
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
        self.resumed: dict[int, tuple[Time, ...]] = {}
        self.times: list[tuple[Time, ...]] = []
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
        events: dict[Time, list[int]] = defaultdict(list)
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
        lasts = self._lasts()
        passes = []
        for p, group in enumerate(self.groups):
            at = sorted(visited[p])
            if self.graph.runs[group.runs[0]].generation is not None:
                passes.append(self._generating(p, group.runs[0], moments, site_at, at))
                continue
            rows = tuple(row for run in group.runs for row in self.graph.runs[run].tokens)
            start = self._start(group, lasts.get(p))
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

    def _start(self, group: Group, last: int | None) -> Start | None:
        if not group.goes_on:
            return None
        rows: list[int] = []
        after: list[int] = []
        for run, start in zip(group.runs, group.goes_on, strict=True):
            count = self.graph.runs[run].rows
            rows.extend(range(count))
            after.extend([start.after] * count)
        return Start(group.goes_on[0].base, group.first, tuple(rows), tuple(after), last)

    def _lasts(self) -> dict[int, int]:
        """The forwards whose last layer is computed at the last positions alone, and the first of those."""
        if self.least is None or self.how is None or self.how.ending is None or self.differentiated:
            return {}
        end, found = len(self.how.layers) - 1, dict[int, int]()
        for p, group in enumerate(self.groups):
            if group.goes_on and not any(self.graph.runs[run].ragged for run in group.runs):
                found[p] = max(self.graph.runs[run].seq for run in group.runs)
        for i, when in enumerate(self.times):
            node = self.graph.nodes[i]
            if node.op not in ("site.read", "site.write"):
                continue
            site = str(node.attrs["site"])
            reach = self.how.reaches.get(site)
            if reach is None or reach.through < end or site in self.how.ending.entrance:
                continue
            first = self._first_seen(i, node, site) if reach.after == end else 0
            for p, _ in when:
                if p in found:
                    found[p] = min(found[p], first)
        rows = {p: sum(self.graph.runs[run].rows for run in self.groups[p].runs) for p in found}
        seq = {p: max(self.graph.runs[run].seq for run in self.groups[p].runs) for p in found}
        return {
            p: last
            for p, last in found.items()
            if last < seq[p] and rows[p] * (last - self.groups[p].first) >= max(self.least, 1)
        }

    def _first_seen(self, i: int, node: Node, site: str) -> int:
        """The first position of a site behind the last layer that an access has to do with."""
        assert self.how is not None and node.run is not None
        run, axis = self.graph.runs[node.run], position_axis(self.card, site)
        if axis is None or axis not in self.how.reaches[site].short:
            return 0
        if node.op == "site.read":
            return self.windows.reads.get(i, (0, run.seq))[0]
        index: Any = node.attrs.get("index", ())
        window = window_of(index, len(self.card.site(site).dims), axis, run.seq)
        return 0 if window is None else window[0]

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
        self, p: int, index: int, moments: Mapping[Time, Actions], site_at: Mapping[int, str], at: Sequence[int]
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

    def _times(self) -> list[tuple[Time, ...]]:
        """When each node happens: once, but for writes, which happen in every forward of their run that shows them."""
        end: Time = (len(self.groups), BEFORE)
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
        start: tuple[Time, ...] = ((0, BEFORE),)
        times: list[tuple[Time, ...]] = [()] * len(self.graph.nodes)
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

    def _last_uses(self, times: Sequence[tuple[Time, ...]]) -> dict[int, tuple[Time, int]]:
        """For every node, the time and node of its last use (itself, when nothing uses it)."""
        last: dict[int, tuple[Time, int]] = {}
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

    def _dying(self, last_use: Mapping[int, tuple[Time, int]]) -> Mapping[Time, Mapping[int, list[int]]]:
        """The values that are used for the last time: at each time, by each node."""
        dying: dict[Time, dict[int, list[int]]] = {}
        if LIVENESS not in self.options.disabled:
            for i, (when, user) in last_use.items():
                if self.graph.nodes[i].op != "site.write":
                    dying.setdefault(when, {}).setdefault(user, []).append(i)
        return dying

    def _actions(
        self,
        time: Time,
        nodes: Sequence[int],
        last_use: Mapping[int, tuple[Time, int]],
        dying: Mapping[int, list[int]],
    ) -> Actions:
        keep_all = LIVENESS in self.options.disabled
        steps: list[Step] = []
        for i in nodes:
            steps.extend(self._steps(i, time, tuple(dying.get(i, ()))))
        made = [i for i in nodes if self.graph.nodes[i].op not in ("site.write", "const")]
        survivors = tuple(i for i in made if keep_all or last_use[i][0] > time)
        return Actions(tuple(steps), survivors)

    def _steps(self, i: int, time: Time, free: tuple[int, ...]) -> list[Step]:
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

    def _slot(self, time: Time, node: Node) -> Slot:
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
