"""What a graph's own operations cost, from static shapes: floating-point operations and the peak of its live values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchbay.ir.card import ModelCard
from patchbay.ir.events import Cost
from patchbay.ir.graph import Graph
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import TensorSpec, ValueSpec


def value_bytes(value: ValueSpec) -> int:
    """Bytes of a node's value, all parts together."""
    return value.nbytes if isinstance(value, TensorSpec) else sum(part.nbytes for part in value)


def price(graph: Graph, specs: Sequence[ValueSpec]) -> Cost:
    """The price of `graph`, every value charged at its full size as if it were materialized.

    Returns:
        Cost with ``flops``, ``peak_bytes`` and ``result_bytes`` of the graph's nodes, ``tokens`` as if every run went
        through the model once, and ``passes`` zero (the planner knows those).
    """
    last_use = list(range(len(graph.nodes)))
    for i, node in enumerate(graph.nodes):
        for a in node.args:
            last_use[a] = i
    kept = {output.node for output in graph.outputs}
    dying: list[list[int]] = [[] for _ in graph.nodes]
    for i, last in enumerate(last_use):
        if i not in kept:
            dying[last].append(i)
    flops = live = peak = 0
    for i, node in enumerate(graph.nodes):
        args = [value for a in node.args if isinstance(value := specs[a], TensorSpec)]
        spec = op_spec(node.op)
        attrs = spec.fill(node.attrs)
        flops += spec.flops(args, specs[i], attrs)
        live += value_bytes(specs[i])
        # What an operation needs while it runs may outgrow what it takes and gives.
        peak = max(peak, live + (0 if spec.structural else spec.workspace(args, specs[i], attrs)))
        live -= sum(value_bytes(specs[d]) for d in dying[i])
    results = sum(value_bytes(specs[output.node]) for output in graph.outputs)
    tokens = sum(run.rows * run.positions for run in graph.runs)
    return Cost(flops=flops, peak_bytes=peak, result_bytes=results, tokens=tokens)


def with_forwards(cost: Cost, card: ModelCard) -> Cost:
    """`cost` with the model's own work added: two operations per parameter and token (Kaplan et al. 2020, 2.1).

    The limit ``max_flops`` is on the graph's own operations; forwards are bounded by ``max_tokens``.
    """
    return replace(cost, flops=cost.flops + 2 * card.n_params * cost.tokens)
