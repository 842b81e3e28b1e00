"""Which positions of a site's value anything uses, from static indices alone; and reads narrowed to those positions.

A read whose every use takes static positions (``logits[:, -1]``) has a *window*, the first position used and the end.
Its value then holds the window alone, and the indices of its uses count from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.graph import Graph, Node, Run
from patchbay.ir.indexing import Index
from patchbay.ir.ops.spec import TensorSpec, ValueSpec

#: First position, and the one after the last.
Window: TypeAlias = "tuple[int, int]"

_NONE: Mapping[int, Window] = MappingProxyType({})


@dataclass(frozen=True)
class Windows:
    """The windows of a graph.

    Attributes:
        reads: of every read that is not used whole; at the logits, of every read of a run alike.
        logits: of every run whose logits are not used whole, writes to them included.
    """

    reads: Mapping[int, Window]
    logits: Mapping[int, Window]


def position_axis(card: ModelCard, site: str) -> int | None:
    """The axis of a site's value over the positions that were computed; None where there is none."""
    dims = card.site(site).dims
    return next((axis for axis, dim in enumerate(dims) if dim in ("seq", "query")), None)


def item_at(index: Index, ndim: int, axis: int) -> int | None:
    """The place in `index` of the item for `axis`; None where the ellipsis or the missing tail stands for it."""
    used = sum(item[0] in ("int", "slice", "array") for item in index)
    at = 0
    for place, item in enumerate(index):
        if item[0] == "newaxis":
            continue
        if item[0] == "ellipsis":
            at += ndim - used
            if at > axis:
                return None
            continue
        if at == axis:
            return place
        at += 1
    return None


def window_of(index: Index, ndim: int, axis: int, extent: int) -> Window | None:
    """The positions along `axis` that a static index takes; None when they are not static, or none."""
    place = item_at(index, ndim, axis)
    if place is None:
        return (0, extent)
    item: Any = index[place]
    if item[0] == "int":
        position = item[1] % extent
        return (position, position + 1)
    if item[0] == "slice":
        taken = range(*slice(*item[1:]).indices(extent))
        return (taken[0], taken[-1] + 1) if taken else None
    return None


def moved(index: Index, ndim: int, axis: int, extent: int, by: int) -> Index:
    """`index` for a value whose first `by` positions along `axis`, none of which it takes, are not there.

    Arrays are left as they are.
    """
    place = item_at(index, ndim, axis)
    if place is None:
        return index
    item: Any = index[place]
    if item[0] == "int":
        item = ("int", item[1] % extent - by)
    elif item[0] == "slice":
        start, stop, step = slice(*item[1:]).indices(extent)
        item = ("slice", start - by, max(stop - by, start - by), step)
    return (*index[:place], item, *index[place + 1 :])


def find_windows(
    graph: Graph,
    card: ModelCard,
    specs: Sequence[ValueSpec],
    differentiated: frozenset[int],
    *,
    logits: bool,
    uses: Mapping[int, Window] = _NONE,
) -> Windows:
    """The windows of every read.

    Args:
        graph: the graph.
        card: the model's.
        specs: of its nodes.
        differentiated: values that a gradient is taken with respect to; those are whole.
        logits: whether the model computes logits at some positions alone.
        uses: positions that the planner itself uses of a read.
    """
    used = used_positions(graph, card, specs, uses)
    reads: dict[int, Window] = {}
    of_logits: dict[int, Window | None] = {}
    for i in graph.in_runs:
        node = graph.nodes[i]
        if node.op not in ("site.read", "site.write") or node.run is None:
            continue
        run = graph.runs[node.run]
        site = str(node.attrs["site"])
        axis = position_axis(card, site)
        if run.generation is not None or axis is None or run.seq == 0:
            continue
        if site == LOGITS and logits:
            own = _written(node, len(card.site(site).dims), axis, run) if node.op == "site.write" else used.get(i)
            own = None if i in differentiated or (own and own[0] < _shortest_starts(run)) else own
            before = of_logits.get(node.run, (run.seq, 0))
            both = None if own is None or before is None else (min(own[0], before[0]), max(own[1], before[1]))
            of_logits[node.run] = both if both != (0, run.seq) else None
        elif node.op == "site.read" and i not in differentiated and not run.ragged:
            found = used.get(i)
            if found is not None and found != (0, run.seq):
                reads[i] = found
    kept = {run: window for run, window in of_logits.items() if window is not None}
    for i in graph.in_runs:
        node = graph.nodes[i]
        if logits and node.op == "site.read" and node.attrs["site"] == LOGITS and node.run in kept:
            reads[i] = kept[node.run]
    return Windows(reads, kept)


def _shortest_starts(run: Run) -> int:
    """The first position, as users see them, at which every row has a token."""
    return run.seq - min(run.lengths, default=0)


def _written(node: Node, ndim: int, axis: int, run: Run) -> Window | None:
    index: Any = node.attrs.get("index", ())
    return window_of(index, ndim, axis, run.seq)


def used_positions(
    graph: Graph, card: ModelCard, specs: Sequence[ValueSpec], uses: Mapping[int, Window] = _NONE
) -> dict[int, Window | None]:
    """For every read, the positions that its uses take together; None when not known to be fewer than all."""
    found: dict[int, Window | None] = {}
    whole = {output.node for output in graph.outputs}
    for i, node in enumerate(graph.nodes):
        if node.op == "site.read":
            found[i] = None if i in whole else uses.get(i, (1 << 62, 0))
            continue  # a read that another one completes is used as far as `uses` says
        for place, a in enumerate(node.args):
            if a not in found or (known := found[a]) is None:  # no read, or one that is used whole
                continue
            read = graph.nodes[a]
            own = None
            if node.op == "getitem" and place == 0 and a not in node.args[1:]:
                spec = specs[a]
                axis = position_axis(card, str(read.attrs["site"]))
                assert isinstance(spec, TensorSpec)
                index: Any = node.attrs["index"]
                if axis is not None:
                    own = window_of(index, spec.ndim, axis, spec.shape[axis])
            found[a] = None if own is None else (min(known[0], own[0]), max(known[1], own[1]))
    return {i: None if window is None or window[1] <= window[0] else window for i, window in found.items()}


def narrowed(
    graph: Graph, card: ModelCard, specs: Sequence[ValueSpec], windows: Mapping[int, Window]
) -> tuple[Graph, tuple[ValueSpec, ...]]:
    """`graph` with its reads holding their windows alone, and the specs of its nodes.

    Postcondition: every value but those of the reads themselves is what it was.
    """
    if not windows:
        return graph, tuple(specs)
    nodes, found = list(graph.nodes), list(specs)
    users: dict[int, list[int]] = defaultdict(list)
    for i, node in enumerate(graph.nodes):
        if node.op == "getitem" and node.args[0] in windows:
            users[node.args[0]].append(i)
    for i, (start, stop) in windows.items():
        spec, axis = specs[i], position_axis(card, str(graph.nodes[i].attrs["site"]))
        assert isinstance(spec, TensorSpec) and axis is not None
        extent = spec.shape[axis]
        found[i] = replace(spec, shape=(*spec.shape[:axis], stop - start, *spec.shape[axis + 1 :]))
        for user in users[i]:
            index: Any = graph.nodes[user].attrs["index"]
            attrs = {**graph.nodes[user].attrs, "index": moved(index, spec.ndim, axis, extent, start)}
            nodes[user] = replace(nodes[user], attrs=attrs)
    return replace(graph, nodes=tuple(nodes)), tuple(found)
