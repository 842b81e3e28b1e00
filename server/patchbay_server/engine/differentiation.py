"""What every gradient needs recorded, and for how long: found out before anything runs.

Recording begins at the first value that a gradient is taken with respect to and goes on until no value that has begun
waits for its metric. What one gradient used up is let go unless a later one goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from patchbay.ir.card import ModelCard
from patchbay.ir.graph import Graph
from patchbay.ir.schedule import dependents, is_access
from patchbay_server.engine.timing import Time


@dataclass(frozen=True, slots=True)
class Gradient:
    """How one gradient is taken.

    Attributes:
        twice: whether a later gradient is taken of something that depends on this one.
        shared: whether a later gradient goes back through something that this one goes back through.
        goes_on: whether values are being differentiated by whose metric is still to come.
        needed: values through which later gradients are taken; of all others the history is let go.
    """

    twice: bool = False
    shared: bool = False
    goes_on: bool = False
    needed: frozenset[int] = frozenset()


def plan_gradients(graph: Graph, card: ModelCard, times: Callable[[int], tuple[Time, ...]]) -> Mapping[int, Gradient]:
    """How each gradient of `graph` is taken.

    Args:
        graph: a verified graph, generating runs written out.
        card: the model's.
        times: of a node: when it happens.
    """
    if "grad" not in graph.ops:
        return {}
    grads = [i for i, node in enumerate(graph.nodes) if node.op == "grad"]
    grads.sort(key=lambda i: (max(times(i)), i))
    users = dependents(graph, card)
    sources: list[list[int]] = [[] for _ in graph.nodes]
    for i, following in enumerate(users):
        for user in following:
            sources[user].append(i)
    ways = {i: _between(users, sources, graph.nodes[i].args[1:], graph.nodes[i].args[0]) for i in grads}
    passes = {i: {time[0] for n in ways[i] if is_access(graph.nodes[n]) for time in times(n)} for i in grads}
    found: dict[int, Gradient] = {}
    later_values: set[int] = set()
    later_passes: set[int] = set()
    later_grads: set[int] = set()  # on the way back of a later one
    begins: list[Time] = []
    for i in reversed(grads):
        when = max(times(i))
        found[i] = Gradient(
            twice=i in later_grads,
            shared=bool(passes[i] & later_passes) or bool(ways[i] & later_values),
            goes_on=any(begun <= when for begun in begins),
            needed=frozenset(later_values),
        )
        later_values |= ways[i]
        later_passes |= passes[i]
        later_grads |= {n for n in ways[i] if graph.nodes[n].op == "grad"}
        begins += [min(times(value)) for value in graph.nodes[i].args[1:]]
    return found


def _between(
    users: Sequence[Sequence[int]], sources: Sequence[Sequence[int]], start: Sequence[int], end: int
) -> set[int]:
    """Every node that lies on a way from one of `start` to `end`, both included."""
    before = _reached(sources, [end], None)
    return _reached(users, [value for value in start if value in before], before)


def _reached(edges: Sequence[Sequence[int]], start: Sequence[int], within: set[int] | None) -> set[int]:
    reached, pending = set(start), list(start)
    while pending:
        for each in edges[pending.pop()]:
            if each not in reached and (within is None or each in within):
                reached.add(each)
                pending.append(each)
    return reached
