"""Named parts of a graph (an SAE, a probe, an edit): how they read as one line each.

A fragment is where nodes came from, kept beside the graph on the client; the graph itself holds its plain nodes, and is
what is sent, saved and run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchbay.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class Fragment:
    """One use of a named function in a graph.

    Attributes:
        name: of the function.
        version: of the function; "" when it has none.
        number: tells uses of one function apart.
    """

    name: str
    version: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class Folded:
    """What one line says in place of a fragment's nodes.

    Attributes:
        fragment: the fragment.
        nodes: its nodes.
        takes: nodes outside that it uses, constants left out.
        gives: its nodes that are used outside, or are outputs; constants that only other fragments share left out.
        writes: its writes at sites.
    """

    fragment: Fragment
    nodes: tuple[int, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def statement(self) -> str:
        """``%7 = sae@1(%2)``."""
        result = ", ".join(f"%{i}" for i in self.gives)
        call = f"{self.fragment}({', '.join(f'%{i}' for i in self.takes)})"
        return f"{result} = {call}" if result else call


def fold(graph: Graph, fragments: Sequence[Fragment | None]) -> dict[int, Folded]:
    """The graph's fragments by their last node, where the line that stands for one belongs."""
    members: dict[Fragment, list[int]] = {}
    for i, fragment in enumerate(fragments):
        if fragment is not None:
            members.setdefault(fragment, []).append(i)
    used_by: dict[int, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        for a in node.args:
            used_by.setdefault(a, []).append(i)
    outputs = {output.node for output in graph.outputs}
    folded: dict[int, Folded] = {}
    for fragment, nodes in members.items():
        inside = set(nodes)
        takes = dict.fromkeys(a for i in nodes for a in graph.nodes[i].args if a not in inside)
        gives = [
            i
            for i in nodes
            if i in outputs
            or any(
                u not in inside and (graph.nodes[i].op != "const" or fragments[u] is None) for u in used_by.get(i, ())
            )
        ]
        folded[nodes[-1]] = Folded(
            fragment,
            tuple(nodes),
            tuple(a for a in takes if graph.nodes[a].op != "const"),
            tuple(gives),
            tuple(i for i in nodes if graph.nodes[i].op == "site.write"),
        )
    return folded
