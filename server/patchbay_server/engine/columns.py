"""Logits of a few tokens alone: where every use of every logit names its tokens, the others are not computed.

Indices into the vocabulary become indices into the list of those tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.dtypes import int64
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from patchbay_server.engine.windows import item_at

#: Tokens whose logits are computed one by one; for more of them, all logits are as quick.
_FEW = 256
_VOCABULARY_AXIS = 2


def find_columns(graph: Graph, card: ModelCard, differentiated: frozenset[int]) -> tuple[int, ...] | None:
    """The tokens that all uses of logits name, in order; None where some use may see any token's.

    Args:
        graph: the graph.
        card: the model's.
        differentiated: values that a gradient is taken with respect to.
    """
    reads = _reads(graph)
    if not reads or len(card.site(LOGITS).dims) != _VOCABULARY_AXIS + 1:
        return None
    whole = {output.node for output in graph.outputs} | differentiated
    tokens: set[int] = set()
    for i in reads:
        if i in whole:
            return None
    for node in graph.nodes:
        if node.op == "site.write" and node.attrs["site"] == LOGITS:
            return None
        for place, a in enumerate(node.args):
            if a not in reads or node.op == "site.read":
                continue
            named = _named(graph, node, place, card.d_vocab)
            if named is None:
                return None
            tokens |= named
            if len(tokens) > min(_FEW, card.d_vocab // 4):
                return None
    return tuple(sorted(tokens)) or None


def _reads(graph: Graph) -> frozenset[int]:
    """Reads of logits in runs that do not generate."""
    return frozenset(
        i
        for i in graph.in_runs
        if (node := graph.nodes[i]).op == "site.read"
        and node.attrs["site"] == LOGITS
        and node.run is not None
        and graph.runs[node.run].generation is None
    )


def _named(graph: Graph, node: Node, place: int, d_vocab: int) -> set[int] | None:
    """The tokens that a use of logits names; None for any."""
    if node.op != "getitem" or place != 0 or node.args[0] in node.args[1:]:
        return None
    index: Any = node.attrs["index"]
    at = item_at(index, _VOCABULARY_AXIS + 1, _VOCABULARY_AXIS)
    if at is None:
        return None
    if index[at][0] == "int":
        return {index[at][1] % d_vocab}
    if index[at][0] == "array":
        found = _numbers(graph.nodes[node.args[1 + index[at][1]]])
        if found is not None and all(-d_vocab <= token < d_vocab for token in found):
            return {token % d_vocab for token in found}
    return None


def _numbers(node: Node) -> list[int] | None:
    """The numbers in a small constant of integers."""
    value = node.attrs.get("value")
    if node.op != "const" or not isinstance(value, TensorData) or not value.dtype.is_integer:
        return None
    wide = value.dtype.itemsize
    if value.nbytes // wide > _FEW:
        return None
    data, signed = bytes(value.data), not value.dtype.name.startswith("u")
    return [int.from_bytes(data[at : at + wide], "little", signed=signed) for at in range(0, len(data), wide)]


def renumbered(
    graph: Graph, specs: Sequence[ValueSpec], origin: Sequence[int], columns: Sequence[int], d_vocab: int
) -> tuple[Graph, tuple[ValueSpec, ...], tuple[int, ...]]:
    """`graph` with logits that hold `columns` alone; constant indices become further constants before their uses.

    Postcondition: every value but those of the reads of logits themselves is what it was.
    """
    where = {token: number for number, token in enumerate(columns)}
    reads = _reads(graph)
    new_id: list[int] = []
    nodes: list[Node] = []
    found: list[ValueSpec] = []
    origins: list[int] = []

    def add(node: Node, spec: ValueSpec, of: int) -> int:
        nodes.append(node)
        found.append(spec)
        origins.append(of)
        return len(nodes) - 1

    constants: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        args = [new_id[a] for a in node.args]
        spec = specs[i]
        if i in reads:
            assert isinstance(spec, TensorSpec)
            spec = replace(spec, shape=(*spec.shape[:_VOCABULARY_AXIS], len(columns)))
        elif node.args and node.args[0] in reads and node.op == "getitem":
            index: Any = node.attrs["index"]
            at = item_at(index, _VOCABULARY_AXIS + 1, _VOCABULARY_AXIS)
            assert at is not None
            item = index[at]
            if item[0] == "int":
                item = ("int", where[item[1] % d_vocab])
            else:
                array = node.args[1 + item[1]]
                if array not in constants:
                    moved, held = _renumbered(graph.nodes[array], where, d_vocab), specs[array]
                    assert isinstance(held, TensorSpec)
                    constants[array] = add(moved, replace(held, dtype=int64), origin[array])
                args[1 + item[1]] = constants[array]
            node = replace(node, attrs={**node.attrs, "index": (*index[:at], item, *index[at + 1 :])})
        new_id.append(add(replace(node, args=tuple(args)), spec, origin[i]))
    outputs = tuple(replace(o, node=new_id[o.node]) for o in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs), tuple(found), tuple(origins)


def _renumbered(node: Node, where: Mapping[int, int], d_vocab: int) -> Node:
    """A constant of indices into the vocabulary as one of places, in a type that holds them whatever held the first."""
    value, numbers = node.attrs["value"], _numbers(node)
    assert isinstance(value, TensorData) and numbers is not None
    data = b"".join(where[n % d_vocab].to_bytes(8, "little") for n in numbers)
    return replace(node, attrs={**node.attrs, "value": TensorData(int64, value.shape, data)})
