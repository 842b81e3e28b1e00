"""Graph rewrites that never change a value. Each is a pass in a list, with a name that is also its off switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from patchbay.ir.card import ModelCard
from patchbay.ir.graph import Graph
from patchbay.ir.schedule import is_access, site_chains


@dataclass(frozen=True)
class Rewritten:
    """A graph after rewrites.

    Attributes:
        graph: the graph.
        origin: for every node, its id in the graph as it was received.
        saved: nodes that each pass removed, by the pass's name.
    """

    graph: Graph
    origin: tuple[int, ...]
    saved: Mapping[str, int]


#: A pass takes a graph and says which of its nodes to keep, and for nodes that are dropped, which kept node replaces
#: them.
RewritePass: TypeAlias = "Callable[[Graph, ModelCard], dict[int, int]]"


def common_subexpressions(graph: Graph, card: ModelCard) -> dict[int, int]:
    """Merge nodes that compute the same value.

    Precondition: a verified graph. Postcondition: no two pure nodes have equal op, args and attrs, and no two reads
    at one site of one run stand between the same writes of that site.
    """
    del card
    replacement: dict[int, int] = {}
    first: dict[object, int] = {}
    writes_before: dict[tuple[int | None, object], int] = {}
    for i, node in enumerate(graph.nodes):
        args = tuple(replacement[a] for a in node.args)
        replacement[i] = i
        if node.op == "site.write":
            site = (node.run, node.attrs["site"])
            writes_before[site] = writes_before.get(site, 0) + 1
            continue
        version = writes_before.get((node.run, node.attrs["site"]), 0) if node.op == "site.read" else 0
        # repr keeps 1, 1.0 and True apart, and NaN equal to itself
        attrs = tuple((k, repr(v) if not hasattr(v, "data") else v) for k, v in sorted(node.attrs.items()))
        key = (node.op, args, attrs, node.run, version)
        replacement[i] = first.setdefault(key, i)
    return replacement


def dead_code(graph: Graph, card: ModelCard) -> dict[int, int]:
    """Drop nodes that no output depends on, writes that no read sees among them.

    Precondition: a verified graph. Postcondition: every node is needed by an output.
    """
    chains = site_chains(graph, card)
    needed = {output.node for output in graph.outputs}
    pending = list(needed)
    while pending:
        i = pending.pop()
        chain = chains[i]
        for dependency in (*graph.nodes[i].args, *(() if chain is None else (chain,))):
            if dependency not in needed:
                needed.add(dependency)
                pending.append(dependency)
    return {i: i for i in needed}


PASSES: Mapping[str, RewritePass] = MappingProxyType(
    {"common_subexpressions": common_subexpressions, "dead_code": dead_code}
)


def optimize(graph: Graph, card: ModelCard, disabled: Sequence[str] = ()) -> Rewritten:
    """Apply every pass that is not in `disabled`, in order."""
    origin: tuple[int, ...] = tuple(range(len(graph.nodes)))
    saved: dict[str, int] = {}
    for name, rewrite in PASSES.items():
        if name in disabled:
            continue
        replacement = rewrite(graph, card)
        before = len(graph.nodes)
        graph, origin = _apply(graph, origin, replacement)
        saved[name] = before - len(graph.nodes)
    return Rewritten(graph, origin, MappingProxyType(saved))


def _apply(graph: Graph, origin: tuple[int, ...], replacement: Mapping[int, int]) -> tuple[Graph, tuple[int, ...]]:
    kept = sorted(set(replacement.values()))
    if len(kept) == len(graph.nodes):
        return graph, origin
    new_id = {old: new for new, old in enumerate(kept)}
    nodes = tuple(
        replace(graph.nodes[old], args=tuple(new_id[replacement[a]] for a in graph.nodes[old].args)) for old in kept
    )
    outputs = tuple(replace(o, node=new_id[replacement[o.node]]) for o in graph.outputs)
    return replace(graph, nodes=nodes, outputs=outputs), tuple(origin[old] for old in kept)


__all__ = ["PASSES", "Rewritten", "common_subexpressions", "dead_code", "is_access", "optimize"]
