"""Graph rewrites that never change a value. Each is a pass in a list, with a name that is also its off switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from patchbay.ir.bodies import canonical, with_bodies
from patchbay.ir.card import ModelCard
from patchbay.ir.graph import Graph, Node
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
    origin: Sequence[int]
    saved: Mapping[str, int]


#: A pass takes a graph and says for every node which one stands for it from now on: itself or, of a dropped node that
#: others take, another; DROPPED for one that nobody takes.
RewritePass: TypeAlias = "Callable[[Graph, ModelCard], Sequence[int]]"
DROPPED = -1


def differentiated(graph: Graph) -> frozenset[int]:
    """The values that a gradient is taken with respect to."""
    if "grad" not in graph.ops:
        return frozenset()
    return frozenset(a for node in graph.nodes if node.op == "grad" for a in node.args[1:])


def common_subexpressions(graph: Graph, card: ModelCard) -> Sequence[int]:
    """Merge nodes that compute the same value.

    A value that something is differentiated by stays itself, however many are equal to it: two vectors of zeros, each
    added somewhere else, have gradients of their own.

    Precondition: a verified graph. Postcondition: no two pure nodes have equal op, args and attrs but for those, and no
    two reads at one site of one run stand between the same writes of that site.
    """
    return _merged(graph, card, range(len(graph.runs)))


def one_read_each(graph: Graph, card: ModelCard) -> Sequence[int]:
    """Merge reads of what is one value to whoever differentiates by it, whether other equal values are merged or not.

    A gradient with respect to a site's value is through every use of it, also through those of an earlier read.
    """
    chains = site_chains(graph, card)
    first: dict[object, int] = {}
    return [
        first.setdefault((node.run, tuple(sorted(node.attrs.items())), chains[i]), i) if node.op == "site.read" else i
        for i, node in enumerate(graph.nodes)
    ]


def merge_runs(graph: Graph, card: ModelCard) -> Sequence[int]:
    """Merge reads of different runs over the same tokens that come after the same writes; so runs that are alike merge.

    A read before its run's first write equals the same read of any run over the same tokens. Runs that something is
    differentiated in are left alone: a gradient goes through the forward that its values were read in.

    Precondition: a verified graph. Postcondition: as for `common_subexpressions`, over runs with equal rows.
    """
    if len(graph.runs) < 2:
        return range(len(graph.nodes))
    wrt = differentiated(graph)
    alone = {graph.nodes[a].run for a in wrt}
    first: dict[object, int] = {}
    worlds = []
    for index, run in enumerate(graph.runs):
        key = index if index in alone else (run.tokens, run.inputs, run.generation)
        worlds.append(first.setdefault(key, index))
    if worlds == list(range(len(graph.runs))):
        return range(len(graph.nodes))
    return _merged(graph, card, worlds)


def _merged(graph: Graph, card: ModelCard, worlds: Sequence[int]) -> Sequence[int]:
    """For every node, the first that computes the same value; runs of one number in `worlds` have the same rows."""
    chains = site_chains(graph, card)
    order = topological_order(graph, chains)
    same = canonical(graph.bodies)
    own = differentiated(graph)
    #: A number for what is done, alike for equal operations with equal attributes; most nodes share their attributes.
    kinds: dict[tuple[str, int], int] = {}
    described: dict[object, int] = {}
    #: Values by what is done to which values (a read or write: in which world, after which write).
    known: dict[tuple[int | None, ...], int] = {}
    number = [0] * len(graph.nodes)
    smallest: list[int] = []
    for i in order:
        node = graph.nodes[i]
        kind = kinds.get((node.op, id(node.attrs)))
        if kind is None:
            # repr keeps 1, 1.0 and True apart, and NaN equal to itself
            given = sorted(with_bodies(node, same).attrs.items())
            attrs = tuple((k, repr(v) if not hasattr(v, "data") else v) for k, v in given)
            kind = kinds[node.op, id(node.attrs)] = described.setdefault((node.op, attrs), len(described))
        args = node.args
        key: tuple[int | None, ...]
        if node.run is not None:
            chain = chains[i]
            key = (kind, *[number[a] for a in args], worlds[node.run], None if chain is None else number[chain], None)
        elif i in own:
            key = (-1, i)
        elif len(args) == 2:
            key = (kind, number[args[0]], number[args[1]])
        else:
            key = (kind, *[number[a] for a in args])
        value = number[i] = known.setdefault(key, len(smallest))
        if value == len(smallest):
            smallest.append(i)
        elif smallest[value] > i:
            smallest[value] = i
    if len(smallest) == len(graph.nodes):
        return range(len(graph.nodes))
    return [i if node.op == "site.write" else smallest[number[i]] for i, node in enumerate(graph.nodes)]


def dead_code(graph: Graph, card: ModelCard) -> Sequence[int]:
    """Drop nodes that no output depends on, writes that no read sees among them.

    Precondition: a verified graph. Postcondition: every node is needed by an output.
    """
    chains = site_chains(graph, card)
    nodes = graph.nodes
    needed = bytearray(len(nodes))
    pending = list({output.node for output in graph.outputs})
    for i in pending:
        needed[i] = 1
    while pending:
        i = pending.pop()
        for a in nodes[i].args:
            if not needed[a]:
                needed[a] = 1
                pending.append(a)
        chain = chains[i]
        if chain is not None and not needed[chain]:
            needed[chain] = 1
            pending.append(chain)
    if all(needed):
        return range(len(graph.nodes))
    return [i if kept else DROPPED for i, kept in enumerate(needed)]


PASSES: Mapping[str, RewritePass] = MappingProxyType(
    {"common_subexpressions": common_subexpressions, MERGE_RUNS: merge_runs, "dead_code": dead_code}
)


def optimize(graph: Graph, card: ModelCard, disabled: Sequence[str] = ()) -> Rewritten:
    """Apply every pass that is not in `disabled`, in order."""
    origin: Sequence[int] = range(len(graph.nodes))
    saved: dict[str, int] = {}
    for name, rewrite in PASSES.items():
        if name in disabled:
            if rewrite is common_subexpressions and differentiated(graph):
                graph, origin = _apply(graph, origin, one_read_each(graph, card))
            continue
        before = len(graph.nodes)
        graph, origin = _apply(graph, origin, rewrite(graph, card))
        saved[name] = before - len(graph.nodes)
    return Rewritten(graph, origin, MappingProxyType(saved))


def _apply(graph: Graph, origin: Sequence[int], stands: Sequence[int]) -> tuple[Graph, Sequence[int]]:
    if stands == range(len(graph.nodes)):
        return graph, origin
    kept = [old for old, by in enumerate(stands) if by == old]
    new_id = [DROPPED] * len(stands)
    for new, old in enumerate(kept):
        new_id[old] = new
    nodes = []
    for old in kept:
        node = graph.nodes[old]
        args = node.args
        nodes.append(Node(node.op, tuple([new_id[stands[a]] for a in args]), node.attrs, node.run) if args else node)
    outputs = tuple(replace(o, node=new_id[stands[o.node]]) for o in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs), [origin[old] for old in kept]


__all__ = [
    "MERGE_RUNS",
    "PASSES",
    "Rewritten",
    "common_subexpressions",
    "dead_code",
    "differentiated",
    "merge_runs",
    "optimize",
]
