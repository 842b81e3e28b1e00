"""What a graph's own operations cost, from static shapes: floating-point operations and the peak of its live values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchbay.ir.bodies import recorded_bytes
from patchbay.ir.card import ModelCard
from patchbay.ir.events import Cost
from patchbay.ir.facts import Facts, facts_of, value_bytes
from patchbay.ir.graph import Graph
from patchbay.ir.ops.spec import ValueSpec


def price(graph: Graph, specs: Sequence[ValueSpec], facts: Sequence[Facts] | None = None) -> Cost:
    """The price of `graph`, every value charged at its full size as if it were materialized.

    Args:
        graph: a valid graph.
        specs: of its nodes.
        facts: of its nodes, where they are known already.

    Returns:
        Cost with ``flops``, ``peak_bytes``, ``result_bytes`` and ``kept_bytes`` of the graph's nodes, ``tokens`` as if
        every run went through the model once, and ``passes`` zero (the planner knows those).
    """
    if facts is None:
        facts = [facts_of(graph, node, specs, specs[i]) for i, node in enumerate(graph.nodes)]
    return replace(totals(graph, facts), peak_bytes=_peak_bytes(graph, facts) + recorded_bytes(graph, specs))


def totals(graph: Graph, facts: Sequence[Facts]) -> Cost:
    """What `price` says, but for the peak, which depends on the order in which the nodes run."""
    results = sum(facts[output.node].nbytes for output in graph.outputs if not output.keep)
    stays = sum(facts[output.node].nbytes for output in graph.outputs if output.keep)
    tokens = sum(run.rows * run.positions for run in graph.runs)
    flops = sum([known.flops for known in facts])
    return Cost(flops=flops, result_bytes=results, tokens=tokens, kept_bytes=stays)


def _peak_bytes(graph: Graph, facts: Sequence[Facts]) -> int:
    """The most that values and temporaries take while the nodes run in the order of the program."""
    nodes = graph.nodes
    last_use = list(range(len(nodes)))
    for i, node in enumerate(nodes):
        for a in node.args:
            last_use[a] = i
    for output in graph.outputs:
        last_use[output.node] = len(nodes)
    dying = [0] * (len(nodes) + 1)  # bytes that are let go after each node
    for last, known in zip(last_use, facts, strict=True):
        dying[last] += known.nbytes
    live = peak = 0
    for known, freed in zip(facts, dying, strict=False):
        live += known.nbytes
        # What an operation needs while it runs may outgrow what it takes and gives.
        if live + known.workspace > peak:
            peak = live + known.workspace
        live -= freed
    return peak


def with_forwards(cost: Cost, card: ModelCard) -> Cost:
    """`cost` with the model's own work added: two operations per parameter and token (Kaplan et al. 2020, 2.1).

    The limit ``max_flops`` is on the graph's own operations; forwards are bounded by ``max_tokens``.
    """
    return replace(cost, flops=cost.flops + 2 * card.n_params * cost.tokens)


__all__ = ["price", "totals", "value_bytes", "with_forwards"]
