"""A graph evaluated the slow and obvious way: every read is a forward of its own, with plain hooks for the writes
before it.

Independent of the verifier, the planner and the executor: it shares with them only the graph and, for pure
operations, the kernels (which are tested against numpy on their own).
"""

from __future__ import annotations

from typing import Any

import torch

from patchbay.ir.graph import Graph, TensorData
from patchbay.ir.ops import spec as op_spec
from patchbay_server.kernels import kernel, to_tensor
from tests.tiny import Place, run_hooked


class CircularError(Exception):
    """A value depends on itself."""


class Oracle:
    """Values of one graph on one plain model."""

    def __init__(self, model: Any, where: dict[str, Place], graph: Graph) -> None:
        self.model, self.where, self.graph = model, where, graph
        self.position = {site: i for i, site in enumerate(where)}
        self.known: dict[int, Any] = {}
        self.asking: set[int] = set()

    def value(self, i: int) -> Any:
        """The value of node `i`.

        Raises:
            CircularError: it depends on itself.
        """
        if i in self.known:
            return self.known[i]
        if i in self.asking:
            raise CircularError(i)
        self.asking.add(i)
        node = self.graph.nodes[i]
        if node.op == "const":
            value = node.attrs.get("value")
            result: Any = to_tensor(value) if isinstance(value, TensorData) else node.attrs["scalar"]
        elif node.op == "item":
            result = self.value(node.args[0])[node.attrs["index"]]
        elif node.op == "site.read":
            result = self._read(i)
        else:
            spec = op_spec(node.op)
            result = kernel(spec)(*[self.value(a) for a in node.args], **spec.fill(node.attrs))
        self.asking.discard(i)
        self.known[i] = result
        return result

    def _read(self, i: int) -> torch.Tensor:
        node = self.graph.nodes[i]
        site = str(node.attrs["site"])
        edits, before_here = [], 0
        for j, other in enumerate(self.graph.nodes):
            if other.op != "site.write" or other.run != node.run:
                continue
            there = str(other.attrs["site"])
            if self.position[there] < self.position[site] or (there == site and j < i):
                edits.append((there, self._edit(j)))
                before_here += there == site
        ids = torch.tensor(self.graph.runs[node.run or 0].tokens)
        return run_hooked(self.model, self.where, ids, edits, site, before_here)

    def _edit(self, j: int):
        node = self.graph.nodes[j]
        value = self.value(node.args[0])
        index = _python_index(node.attrs.get("index", ()))
        mode = node.attrs.get("mode", "set")

        def edit(tensor: torch.Tensor) -> None:
            if mode == "add":
                tensor[index] = tensor[index] + value
            elif mode == "mul":
                tensor[index] = tensor[index] * value
            else:
                tensor[index] = value

        return edit


def _python_index(index: Any) -> Any:
    items: list[Any] = []
    for item in index:
        kind, *rest = item
        items.append({"int": lambda r: r[0], "slice": lambda r: slice(*r), "ellipsis": lambda r: ...}[kind](rest))
    return tuple(items) if items else ...
