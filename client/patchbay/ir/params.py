"""A model's weights as a graph may use them: their names, and the policy on reading them out.

The policy keeps the convenient ways closed, not every way: a graph that may multiply by a matrix can multiply an
identity by it. What it does and does not protect is said in docs/weights.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchbay.errors import GraphError, UnknownSiteError
from patchbay.ir.dtypes import DType
from patchbay.ir.ops import spec as op_spec

if TYPE_CHECKING:
    from patchbay.ir.card import ModelCard
    from patchbay.ir.graph import Graph

#: What begins the name of a parameter as the checkpoint has it.
RAW = "param:"

#: Policies: no graph may name a parameter; graphs may use them; graphs may also ask for them.
NONE, USED_IN_GRAPH, DOWNLOADABLE = "none", "used-in-graph", "downloadable"
POLICIES = (NONE, USED_IN_GRAPH, DOWNLOADABLE)

#: Operations whose result holds nothing but elements of their arguments, beside those of the categories below.
_COPIES = frozenset({"astype", "negative", "positive", "item", "stop_gradient"})
_COPYING_CATEGORIES = frozenset({"shape", "indexing"})


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """A parameter, or a canonical view of one.

    Attributes:
        name: canonical, such as ``"blocks.3.attn.W_O"``; or ``"param:"`` and the name in the checkpoint.
        shape: extents, outermost first.
        dtype: element type.
        doc: what its axes are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    doc: str = ""


def find_param(card: ModelCard, known: Mapping[str, ParamSpec], name: str) -> ParamSpec:
    """The parameter called `name`.

    Raises:
        GraphError: the model's weights may not be used.
        UnknownSiteError: there is none of that name; the message names the nearest.
    """
    if card.weights == NONE:
        raise GraphError(f"the weights of {card.name!r} may not be used in graphs (its server's policy: weights: none)")
    spec = known.get(name) or known.get(f"{RAW}{name}")
    if spec is None:
        # TransformerLens says model.W_E, and W_Q for all layers at once.
        ends = tuple(n for n in known if n.endswith(f".{name}"))[:3]
        near = ends or tuple(difflib.get_close_matches(name, known, n=3, cutoff=0.6))
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownSiteError(f"{card.name!r} has no parameter {name!r}{hint}", suggestions=near)
    return spec


def outputs_respect_the_policy(graph: Graph, card: ModelCard) -> None:
    """
    Raises:
        GraphError: an output is a parameter, or one reshaped, sliced, cast or joined, where that is not allowed.
    """
    if card.weights == DOWNLOADABLE or "param.read" not in graph.ops:
        return
    copies: dict[int, int] = {}  # node -> the parameter that it holds elements of
    for i, node in enumerate(graph.nodes):
        if node.op == "param.read":
            copies[i] = i
        elif node.op in _COPIES or op_spec(node.op).category in _COPYING_CATEGORIES:
            source = next((copies[a] for a in node.args if a in copies), None)
            if source is not None:
                copies[i] = source
    for index, output in enumerate(graph.outputs):
        if output.node in copies:
            source = copies[output.node]
            raise GraphError(
                f"output {output.name!r} is (part of) the parameter {graph.nodes[source].attrs['name']!r}; "
                f"{card.name!r} lets graphs use its weights, not download them (its server's policy: "
                f"weights: {card.weights})",
                node=output.node,
                related=[source],
                field=f"outputs[{index}]",
            )
