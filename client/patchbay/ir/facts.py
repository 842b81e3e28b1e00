"""What is known of nodes before they run, found out once for all nodes that do the same to values of the same shapes.

A graph of thousands of nodes holds a few dozen different ones: the value of a node and its price follow from its
operation, its attributes, its run and the specs of its arguments alone.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from patchbay.ir.bodies import loop_cost
from patchbay.ir.card import CallableSpec, ModelCard
from patchbay.ir.graph import Attr, Graph, Node
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.ir.ops.spec import TensorSpec, ValueSpec

#: Attributes of nodes that have none, so that they share one object.
NO_ATTRS: Mapping[str, Attr] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of a node.

    Attributes:
        spec: its value's shape and dtype.
        flops: floating-point operations.
        workspace: bytes of temporaries while it runs.
        nbytes: bytes of its value, all parts together.
    """

    spec: ValueSpec
    flops: int
    workspace: int
    nbytes: int


def value_bytes(value: ValueSpec) -> int:
    """Bytes of a node's value, all parts together."""
    return value.nbytes if isinstance(value, TensorSpec) else sum(part.nbytes for part in value)


def facts_of(
    graph: Graph, node: Node, specs: Sequence[ValueSpec], value: ValueSpec, card: ModelCard | None = None
) -> Facts:
    """The facts of a node whose value is `value`.

    Args:
        graph: what it belongs to.
        node: the node.
        specs: of the nodes before it.
        value: its own.
        card: the model's; without it a module that is applied costs what one matrix would.
    """
    args = [s for a in node.args if isinstance(s := specs[a], TensorSpec)]
    spec = op_spec(node.op)
    attrs = spec.fill(node.attrs)
    if node.op in BODY_ATTRS:
        loop = loop_cost(node.op, attrs, args, value, graph.body_facts)
        return Facts(value, loop.flops, loop.workspace, value_bytes(value))
    if node.op == "call" and card is not None:
        flops, workspace = _module_cost(card.callable(attrs["target"]), args[0])
        return Facts(value, flops, workspace, value_bytes(value))
    workspace = 0 if spec.structural else spec.workspace(args, value, attrs)
    return Facts(value, spec.flops(args, value, attrs), workspace, value_bytes(value))


def _module_cost(module: CallableSpec, value: TensorSpec) -> tuple[int, int]:
    """Floating-point operations and bytes of temporaries of applying a module to a value.

    Two operations for each weight and position; its inner values have, at each position, no more elements than it has
    weights for each of its narrowest extent.
    """
    positions = value.size // max(value.shape[-1], 1)
    inner = module.params // max(min(module.d_in, module.d_out), 1)
    return 2 * max(module.params, module.d_in) * positions, inner * positions * value.dtype.itemsize


#: Finds the value of a node: `patchbay.ir.infer.infer_node`.
Infer: TypeAlias = "Callable[[Graph, ModelCard, Node, Sequence[ValueSpec]], ValueSpec]"


class Inference:
    """Finds the facts of one graph's nodes, in order; a node like an earlier one costs a look into a table.

    Nodes are alike when operation and run are equal and attributes and specs of the arguments are the same objects,
    which is what `AttrTable` and this class make of equal ones. (By value, 1, 1.0 and True would be alike.)
    """

    def __init__(self, card: ModelCard, infer: Infer) -> None:
        self._card, self._infer = card, infer
        # The objects behind the ids of a key stay alive with its entry, so that no other object can get their ids.
        self._known: dict[tuple[object, ...], tuple[Facts, object, list[ValueSpec]]] = {}
        self._specs: dict[ValueSpec, ValueSpec] = {}

    def facts(self, graph: Graph, node: Node, specs: Sequence[ValueSpec]) -> Facts:
        """The facts of `node`.

        Args:
            graph: what it belongs to; runs that it had in an earlier call must be the same now.
            node: the node.
            specs: of the nodes before it.

        Raises:
            GraphError: what `infer` raises.
        """
        args = node.args
        if node.op == "const" and _is_plain_number(node):
            # Whichever number it is: a graph may hold thousands.
            key: tuple[object, ...] = (node.op, type(node.attrs["scalar"]), node.run)
        elif len(args) == 2:
            key = (node.op, id(node.attrs), node.run, id(specs[args[0]]), id(specs[args[1]]))
        else:
            key = (node.op, id(node.attrs), node.run, *[id(specs[a]) for a in args])
        found = self._known.get(key)
        if found is not None:
            return found[0]
        value = self._infer(graph, self._card, node, specs)
        value = self._specs.setdefault(value, value)
        facts = facts_of(graph, node, specs, value, self._card)
        self._known[key] = (facts, node.attrs, [specs[a] for a in args])
        return facts


def _is_plain_number(node: Node) -> bool:
    """Whether a constant is a number of a kind whose every value is alike."""
    if len(node.attrs) != 1 or node.args:
        return False
    scalar = node.attrs.get("scalar")
    return type(scalar) in (float, bool) or (type(scalar) is int and -(2**63) <= scalar < 2**63)


class AttrTable:
    """Makes equal attributes the same object, of exactly equal types."""

    def __init__(self) -> None:
        self._known: dict[bytes, Mapping[str, Attr]] = {}

    def shared(self, attrs: Mapping[str, Attr]) -> Mapping[str, Attr]:
        """`attrs`, or equal ones that were given before; those that hold tensors are not looked for."""
        if not attrs:
            return NO_ATTRS
        try:
            # Tells 1, 1.0 and True apart, and 0.0 from -0.0.
            key = marshal.dumps(attrs, 2)  # type: ignore[arg-type]
        except ValueError:
            return attrs
        found = self._known.get(key)
        if found is not None:
            return found
        if repr(marshal.loads(key)) == repr(attrs):  # numpy's numbers become bytes
            self._known[key] = attrs
        return attrs
