"""Constant folding: small values that depend on nothing but constants are computed while the plan is made.

A direction divided by its norm and scaled is then a constant like any other: it can be fused with the writes of other
requests, and indices made of it are known before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from patchbay.errors import GraphError
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from patchbay_server.kernels import from_torch_dtype, kernel, to_data, to_tensor

FOLD_CONSTANTS = "fold_constants"

#: Elements of the largest value that is folded, or folded from: planning must stay a matter of milliseconds.
MAX_ELEMENTS = 4_096
#: Operations of one node at most.
MAX_FLOPS = 1_000_000


def fold_constants(graph: Graph, specs: Sequence[ValueSpec]) -> tuple[Graph, int]:
    """`graph` with nodes that compute small constants replaced by those constants, and how many those are.

    Nodes keep their ids; what they were computed from is left for `dead_code`. A node that a gradient is taken with
    respect to is no constant, and nothing that is computed from it; one that fails is left to fail where it runs.

    Args:
        graph: a verified graph, generating runs written out.
        specs: shape and dtype of every node's value.
    """
    wrt = {a for node in graph.nodes if node.op == "grad" for a in node.args[1:]}
    known: dict[int, torch.Tensor | bool | int | float] = {}
    nodes: dict[int, Node] = {}
    used = {a for node in graph.nodes for a in node.args} | {output.node for output in graph.outputs}
    for i, node in enumerate(graph.nodes):
        if i in wrt:
            continue
        if node.op == "const":
            scalar, value = node.attrs.get("scalar"), node.attrs.get("value")
            if isinstance(value, TensorData):
                if _small(specs[i]):
                    known[i] = to_tensor(value, torch.device("cpu"))
            elif isinstance(scalar, (bool, int, float)):
                known[i] = scalar
            continue
        if i not in used or not _small(specs[i]) or not all(a in known for a in node.args):
            continue
        folded = _value(node, [known[a] for a in node.args], [specs[a] for a in node.args], specs[i])
        if folded is not None:
            data = to_data(folded)
            known[i] = folded
            nodes[i] = Node("const", (), {"value": TensorData(data.dtype, data.shape, bytes(data.data))})
    if not nodes:
        return graph, 0
    return replace(graph, nodes=tuple(nodes.get(i, node) for i, node in enumerate(graph.nodes))), len(nodes)


def _small(spec: ValueSpec) -> bool:
    return isinstance(spec, TensorSpec) and spec.size <= MAX_ELEMENTS


def _value(
    node: Node,
    args: Sequence[torch.Tensor | bool | int | float],
    specs: Sequence[ValueSpec],
    result: ValueSpec,
) -> torch.Tensor | None:
    """What `node` computes; None where that is left to the run."""
    op = op_spec(node.op)
    if op.structural or not isinstance(result, TensorSpec) or result.scalar is not None:
        return None
    attrs = op.fill(node.attrs)
    tensors = [spec for spec in specs if isinstance(spec, TensorSpec)]
    if op.flops(tensors, result, attrs) > MAX_FLOPS or op.workspace(tensors, result, attrs) > 16 * MAX_ELEMENTS:
        return None
    try:
        value = kernel(op)(*args, **attrs)
    except (GraphError, RuntimeError):
        return None
    same = isinstance(value, torch.Tensor) and tuple(value.shape) == result.shape
    return value if same and from_torch_dtype(value.dtype) == result.dtype else None
