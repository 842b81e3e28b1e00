"""Cuts the time in which a graph's nodes happen into what happens at each site of each forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.facts import Facts
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.schedule import BEFORE, Schedule, is_access, positions, span
from patchbay_server.engine.direct import direct
from patchbay_server.engine.optimize import differentiated
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
from patchbay_server.engine.timing import NEVER, Time, Timing
from patchbay_server.engine.windows import Windows, item_at, moved, position_axis, window_of
from patchbay_server.kernels import kernel
from patchbay_server.models.continuation import EMBEDDING, Continuation
from patchbay_server.models.narrowing import Unembedding


class Builder:
    """Cuts time into moments."""

    def __init__(
        self,
        graph: Graph,
        facts: Sequence[Facts],
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
        self.graph, self.facts, self.card, self.groups, self.options = graph, facts, card, groups, options
        self.how, self.unembedding, self.windows, self.columns = how, unembedding, windows, columns
        #: Positions that the last layer must be able to leave out for that to be worth a call; None to leave out none.
        self.least = least
        #: What nodes apply to their values, by what is known of them and their attributes: most nodes share both.
        self.hows: dict[tuple[int, int], tuple[Callable[..., Any] | None, Mapping[str, Any]]] = {}
        self.slots = [self._slots(group) for group in groups]
        #: Of every forward that computes some logits only: each run's slot in them.
        self.flat: dict[int, dict[int, Slot]] = {}
        self.logits: dict[int, tuple[tuple[int, int, int], ...]] = {}
        #: Values that a gradient is taken with respect to.
        self.differentiated = differentiated(graph)
        self.timing = Timing(graph, timeline, groups, positions(graph, card), self.differentiated)
        self.names: dict[int, tuple[str, ...]] = {}
        for output in graph.outputs:
            self.names[output.node] = (*self.names.get(output.node, ()), output.name)

    def _slots(self, group: Group) -> dict[int, Slot]:
        slots, start = {}, 0
        for run in group.runs:
            r = self.graph.runs[run]
            slots[run] = Slot(run, start, start + r.rows, r.seq, r.lengths, r.ragged, group.first)
            start += r.rows
        return slots

    def build(self) -> tuple[tuple[Pass, ...], Actions]:
        self._choose_logits()
        timing = self.timing
        events, last = timing.events(), [NEVER] * len(self.graph.nodes)
        # From the end to the beginning: the first use that is seen of a value is its last.
        moments = {timing.place(time): self._actions(time, events[time], last) for time in sorted(events, reverse=True)}
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
        for i in self.graph.in_runs:
            node = self.graph.nodes[i]
            if node.op not in ("site.read", "site.write"):
                continue
            site = str(node.attrs["site"])
            reach = self.how.reaches.get(site)
            if reach is None or reach.through < end or site in self.how.ending.entrance:
                continue
            first = self._first_seen(i, node, site) if reach.after == end else 0
            for p, _ in self.timing.of(i):
                if p in found:
                    found[p] = min(found[p], first)
        rows = {p: sum(self.graph.runs[run].rows for run in self.groups[p].runs) for p in found}
        seq = {p: max(self.graph.runs[run].seq for run in self.groups[p].runs) for p in found}
        return {
            p: last
            for p, last in found.items()
            if last < seq[p] and rows[p] * (last - self.groups[p].first) >= max(self.least, 1)
            # From position 0 on there is no mask, and without one only the last position sees what it should.
            if self.groups[p].first or last == seq[p] - 1
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
        for i in self.graph.in_runs:
            node = self.graph.nodes[i]
            if node.op in ("site.read", "site.write") and node.run is not None:
                for p, order in (*self.timing.of(i), *self.timing.resumed(i)):
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
        sites: list[dict[str, Actions]] = [{} for _ in range(1 + at[-1] // width)]
        for order in at:
            if order % width:
                sites[order // width][site_at[order % width - 1]] = moments[p, order]
        steps = [
            Forward(moments.get((p, step * width), Actions()), MappingProxyType(there))
            for step, there in enumerate(sites)
        ]
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

    def _actions(self, time: int, nodes: Sequence[int], last: list[int]) -> Actions:
        """What happens at a time.

        Args:
            time: the time; what happens later has been seen already.
            nodes: what happens, in the order of the program.
            last: for every value the time of its last use, as far as it has been seen; what is used first here is
                written down.
        """
        graph, place = self.graph, self.timing.place(time)
        keep_all = LIVENESS in self.options.disabled
        known, names, differentiated, hows = self.facts, self.names, self.differentiated, self.hows
        steps: list[Step] = []
        writes = False
        for i in reversed(nodes):
            node = graph.nodes[i]
            args = node.args
            access = node.run is not None and is_access(node)
            resumes = access and place in self.timing.resumed(i)
            free: tuple[int, ...] = ()
            for a in (i,) if resumes else args:
                if last[a] == NEVER:
                    last[a] = time
                    free += (a,)
            if last[i] == NEVER and node.op != "site.write":  # nothing uses it
                last[i] = time
                free += (i,)
            if keep_all:
                free = ()
            if access:
                steps += self._access(i, node, place, free, resumes)
                writes = writes or node.op == "site.write" or i in differentiated
                continue
            alike = (id(known[i]), id(node.attrs))
            how = hows.get(alike)
            if how is None:
                how = hows[alike] = self._how(i, node)
            steps.append(Compute(i, node.op, how[0], args, how[1], names.get(i, ()), free, i in differentiated))
        steps.reverse()
        survivors = [
            i for i in nodes if (last[i] > time or keep_all) and graph.nodes[i].op not in ("site.write", "const")
        ]
        return Actions(tuple(steps), tuple(survivors), writes)

    def _how(self, i: int, node: Node) -> tuple[Callable[..., Any] | None, Mapping[str, Any]]:
        """What a node applies to its values, and its attributes with defaults filled in."""
        op = op_spec(node.op)
        attrs = op.filled(node.attrs)
        if op.structural:
            return None, attrs
        args, result = [self.facts[a].spec for a in node.args], self.facts[i].spec
        return direct(node.op, attrs, args, result) or kernel(op), attrs

    def _access(self, i: int, node: Node, time: Time, free: tuple[int, ...], resumes: bool) -> list[Step]:
        """Its steps, the last one first."""
        if node.op == "site.write":
            return [self._write(i, node, self._slot(time, node), op_spec(node.op).filled(node.attrs), free)]
        if resumes:
            return [Resume(i, self._slot(time, node), free)]
        read: Step = Generated(i)
        if node.op == "site.read":
            slot = self._slot(time, node)
            read = Read(i, slot, i in self.differentiated, self._part(i, node, slot), self._columns(node, slot))
        names = self.names.get(i, ())
        return [Emit(i, names, free), read] if names or free else [read]

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
