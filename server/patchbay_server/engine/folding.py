"""Constant folding: small values that depend on nothing but constants are computed while the plan is made.

A direction divided by its norm and scaled is then a constant like any other: it can be fused with the writes of other
requests, and indices made of it are known before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from patchbay.errors import GraphError
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from patchbay_server.engine.optimize import differentiated
from patchbay_server.kernels import from_torch_dtype, kernel, to_data, to_tensor

FOLD_CONSTANTS = "fold_constants"

#: Elements of the largest value that is folded, or folded from: planning must stay a matter of milliseconds.
MAX_ELEMENTS = 4_096
#: Operations of one node at most.
MAX_FLOPS = 1_000_000
#: Elements and operations of all nodes of a graph at most: a plan keeps its constants, and may itself be kept.
MAX_ALL_ELEMENTS, MAX_ALL_FLOPS = 1_000_000, 20_000_000


@dataclass
class _Room:
    """What may still be folded."""

    elements: int = MAX_ALL_ELEMENTS
    flops: int = MAX_ALL_FLOPS


def fold_constants(graph: Graph, specs: Sequence[ValueSpec]) -> tuple[Graph, int]:
    """`graph` with nodes that compute small constants replaced by those constants, and how many those are.

    Nodes keep their ids; what they were computed from is left for `dead_code`. A node that a gradient is taken with
    respect to is no constant, and nothing that is computed from it; one that fails is left to fail where it runs.

    Args:
        graph: a verified graph, generating runs written out.
        specs: shape and dtype of every node's value.
    """
    wrt = differentiated(graph)
    known: dict[int, torch.Tensor | bool | int | float] = {}
    nodes: dict[int, Node] = {}
    used: set[int] | None = None
    room = _Room()
    for i, node in enumerate(graph.nodes):
        args = node.args
        # Most nodes are told by their first argument.
        if args and (args[0] not in known or not all(a in known for a in args)):
            continue
        if i in wrt or not _small(specs[i]):
            continue
        if node.op == "const":
            scalar, value = node.attrs.get("scalar"), node.attrs.get("value")
            if isinstance(value, TensorData):
                known[i] = to_tensor(value, torch.device("cpu"))
            elif isinstance(scalar, (bool, int, float)):
                known[i] = scalar
            continue
        if used is None:
            used = {a for other in graph.nodes for a in other.args} | {output.node for output in graph.outputs}
        if i not in used:
            continue
        folded = _value(node, [known[a] for a in args], [specs[a] for a in args], specs[i], room)
        if folded is not None:
            data = to_data(folded)
            known[i] = folded
            nodes[i] = Node("const", (), {"value": TensorData(data.dtype, data.shape, bytes(data.data))})
    if not nodes:
        return graph, 0
    return replace(graph, nodes=tuple([nodes.get(i, node) for i, node in enumerate(graph.nodes)])), len(nodes)


def _small(spec: ValueSpec) -> bool:
    return isinstance(spec, TensorSpec) and spec.size <= MAX_ELEMENTS


def _value(
    node: Node,
    args: Sequence[torch.Tensor | bool | int | float],
    specs: Sequence[ValueSpec],
    result: ValueSpec,
    room: _Room,
) -> torch.Tensor | None:
    """What `node` computes, taken from `room`; None where that is left to the run."""
    op = op_spec(node.op)
    if op.structural or not isinstance(result, TensorSpec) or result.scalar is not None:
        return None
    attrs = op.fill(node.attrs)
    tensors = [spec for spec in specs if isinstance(spec, TensorSpec)]
    flops = op.flops(tensors, result, attrs)
    if flops > min(MAX_FLOPS, room.flops) or result.size > room.elements:
        return None
    if op.workspace(tensors, result, attrs) > 16 * MAX_ELEMENTS:
        return None
    room.flops -= flops
    room.elements -= result.size
    try:
        value = kernel(op)(*args, **attrs)
    except (GraphError, RuntimeError):
        return None
    same = isinstance(value, torch.Tensor) and tuple(value.shape) == result.shape
    return value if same and from_torch_dtype(value.dtype) == result.dtype else None
