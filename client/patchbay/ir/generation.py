"""Generating runs written out: every step becomes nodes of its own, and nothing after this knows of loops.

A run that generates N tokens is N forwards of the model: forward 0 carries the prompt, forward k the token that came
out of forward k - 1. An access without a step happens in every one of them, and so does whatever is computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from patchbay.errors import GraphError, LimitExceededError
from patchbay.ir.graph import Attr, Graph, Node

#: Operations of a run that happen at a moment of its forwards.
ACCESSES = frozenset({"site.read", "site.write", "run.tokens"})
STACK = "steps.stack"


@dataclass(frozen=True)
class Unrolled:
    """A graph whose accesses to generating runs all name their step.

    Attributes:
        graph: the graph.
        origin: for every node, the one of the graph as received that it comes from.
    """

    graph: Graph
    origin: tuple[int, ...]


def unroll(graph: Graph, max_nodes: int | None = None) -> Unrolled:
    """Write every step of every generating run out; a graph that is written out already stays as it is.

    Raises:
        GraphError: a value that differs from step to step is used where there is no step.
        LimitExceededError: more than `max_nodes` nodes.
    """
    if not any(run.generation for run in graph.runs):
        return Unrolled(graph, tuple(range(len(graph.nodes))))
    owners = _owners(graph)
    counts = [1 if owner is None else _steps(graph, owner) for owner in owners]
    if max_nodes is not None and sum(counts) > max_nodes:
        raise LimitExceededError(
            f"the graph needs {sum(counts):,} nodes with every generated token's own counted; max_nodes of this server "
            f"is {max_nodes:,}",
            limit="max_nodes",
            allowed=max_nodes,
            requested=sum(counts),
        )
    nodes: list[Node] = []
    origin: list[int] = []
    first: list[int] = []  # of each node's instances, which lie together

    def instance(of: int, step: int) -> int:
        return first[of] + (step if owners[of] is not None else 0)

    for i, node in enumerate(graph.nodes):
        first.append(len(nodes))
        owner = owners[i]
        if node.op == STACK:
            assert node.run is not None
            args = tuple(instance(node.args[0], step) for step in range(_steps(graph, node.run)))
            nodes.append(Node("stack", args, {"axis": 0}))
        elif owner is None:
            step = node.attrs.get("step") if node.op in ACCESSES else None
            args = tuple(instance(a, step if isinstance(step, int) else 0) for a in node.args)
            nodes.append(replace(node, args=args))
        else:
            for step in range(counts[i]):
                attrs: Mapping[str, Attr] = {**node.attrs, "step": step} if node.op in ACCESSES else node.attrs
                nodes.append(Node(node.op, tuple(instance(a, step) for a in node.args), attrs, node.run))
        origin.extend([i] * counts[i])
    for index, output in enumerate(graph.outputs):
        if owners[output.node] is not None:
            raise GraphError(
                f"output {output.name!r} is another value at every step of run {owners[output.node]}: save "
                "run.stacked(value) for all of them, or take the site of one step, run.steps[k]",
                node=output.node,
                field=f"outputs[{index}]",
            )
    outputs = tuple(replace(o, node=first[o.node]) for o in graph.outputs)
    return Unrolled(Graph(graph.runs, tuple(nodes), outputs, graph.bodies, graph.body_facts), tuple(origin))


def _steps(graph: Graph, run: int) -> int:
    generation = graph.runs[run].generation
    assert generation is not None
    return generation.max_new_tokens


def _owners(graph: Graph) -> list[int | None]:
    """For every node, the run at whose every step it has another value; None where it has one value."""
    owners: list[int | None] = []
    for i, node in enumerate(graph.nodes):
        found = {owner for a in node.args if (owner := owners[a]) is not None}
        generates = node.run is not None and 0 <= node.run < len(graph.runs) and graph.runs[node.run].generation
        own = node.run if node.op in ACCESSES or node.op == STACK else None
        if own is not None and found - {own}:
            other = (found - {own}).pop()
            raise GraphError(
                f"{node.op} of run {own} takes a value that differs at every step of run {other}; take it from one "
                "step, run.steps[k]",
                node=i,
            )
        if node.op == STACK:
            if generates and not found:
                raise GraphError("a value that is the same at every step cannot be stacked over the steps", node=i)
            owners.append(None)
        elif node.op in ACCESSES:
            owners.append(node.run if generates and node.attrs.get("step") is None else None)
        elif len(found) > 1:
            shown = " and ".join(map(str, sorted(found)))
            raise GraphError(
                f"{node.op} takes values that differ at every step of runs {shown}, whose steps do not run together; "
                "take them from one step each, run.steps[k]",
                node=i,
            )
        else:
            owners.append(found.pop() if found else None)
    return owners
