"""Graph rewrites that never change a value. Each is a pass in a list, with a name that is also its off switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from patchbay.ir.bodies import canonical, with_bodies
from patchbay.ir.card import ModelCard
from patchbay.ir.graph import Graph
from patchbay.ir.schedule import site_chains, topological_order

MERGE_RUNS = "merge_runs"


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
    return _merged(graph, card, tuple(range(len(graph.runs))))


def merge_runs(graph: Graph, card: ModelCard) -> dict[int, int]:
    """Merge reads of different runs over the same tokens that come after the same writes; so runs that are alike merge.

    A read before its run's first write equals the same read of any run over the same tokens. Runs that something is
    differentiated in are left alone: a gradient goes through the forward that its values were read in.

    Precondition: a verified graph. Postcondition: as for `common_subexpressions`, over runs with equal rows.
    """
    if len(graph.runs) < 2:
        return {i: i for i in range(len(graph.nodes))}
    wrt = {a for node in graph.nodes if node.op == "grad" for a in node.args[1:]}
    alone = {graph.nodes[a].run for a in wrt}
    first: dict[object, int] = {}
    worlds = []
    for index, run in enumerate(graph.runs):
        key = index if index in alone else (run.tokens, run.inputs, run.generation)
        worlds.append(first.setdefault(key, index))
    if worlds == list(range(len(graph.runs))):
        return {i: i for i in range(len(graph.nodes))}
    return _merged(graph, card, worlds)


def _merged(graph: Graph, card: ModelCard, worlds: Sequence[int]) -> dict[int, int]:
    """For every node, the first that computes the same value; runs of one number in `worlds` have the same rows."""
    chains = site_chains(graph, card)
    known: dict[object, int] = {}
    alike = [0] * len(graph.nodes)
    smallest: dict[int, int] = {}
    same = canonical(graph.bodies)
    described: dict[tuple[str, int], object] = {}  # attributes by operation and identity: most nodes share theirs
    for i in topological_order(graph, chains):
        node, chain = graph.nodes[i], chains[i]
        attrs = described.get((node.op, id(node.attrs)))
        if attrs is None:
            # repr keeps 1, 1.0 and True apart, and NaN equal to itself
            given = sorted(with_bodies(node, same).attrs.items())
            attrs = tuple((k, repr(v) if not hasattr(v, "data") else v) for k, v in given)
            described[node.op, id(node.attrs)] = attrs
        world = None if node.run is None else worlds[node.run]
        history = None if chain is None else alike[chain]
        key = (node.op, tuple([alike[a] for a in node.args]), attrs, world, history)
        alike[i] = number = known.setdefault(key, len(known))
        if smallest.setdefault(number, i) > i:
            smallest[number] = i
    return {i: i if node.op == "site.write" else smallest[alike[i]] for i, node in enumerate(graph.nodes)}


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
    {"common_subexpressions": common_subexpressions, MERGE_RUNS: merge_runs, "dead_code": dead_code}
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


__all__ = ["MERGE_RUNS", "PASSES", "Rewritten", "common_subexpressions", "dead_code", "merge_runs", "optimize"]
