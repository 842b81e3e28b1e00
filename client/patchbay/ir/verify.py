"""Whether a graph is valid, decided from static facts alone: on the client before sending, on the server before
running.

The rules are a table of small checks over the whole graph; `patchbay.ir.infer` has those of each node. Each raises the
most specific `GraphError`; the verifier adds the node's id, so that the client can add the user's line.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from patchbay.errors import (
    DTypeError,
    GraphError,
    LimitExceededError,
    ShapeError,
)
from patchbay.ir.artifacts import UPLOAD_ABOVE_BYTES, KeyedTensor
from patchbay.ir.bodies import check_bodies, check_loop_steps, loop_steps
from patchbay.ir.card import LOGITS, InputSpec, ModelCard
from patchbay.ir.facts import Facts, Inference
from patchbay.ir.generation import STACK, unroll
from patchbay.ir.graph import Graph, Run, TensorData
from patchbay.ir.infer import BEHIND_THE_CACHE, CACHED, NO_VALUE, infer_node
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from patchbay.ir.params import outputs_respect_the_policy
from patchbay.ir.price import price
from patchbay.ir.schedule import dependents, site_chains, topological_order


@dataclass(frozen=True)
class Verified:
    """A graph known to be valid for a model.

    Attributes:
        graph: the graph.
        card: the model's card.
        specs: the value spec of every node (at the first step, for one that has another value at every step).
        flat: the graph with its generating runs written out step by step (`patchbay.ir.generation`); the graph itself
            where none generates.
        flat_specs: the value spec of every node of `flat`.
        origin: for every node of `flat`, the node of `graph` that it comes from.
        facts: of every node of `flat`.
    """

    graph: Graph
    card: ModelCard
    specs: tuple[ValueSpec, ...]
    flat: Graph
    flat_specs: tuple[ValueSpec, ...]
    origin: tuple[int, ...]
    facts: tuple[Facts, ...]


# --- rules over the whole graph -----------------------------------------------------------------------------------


def _runs_are_well_formed(graph: Graph, card: ModelCard) -> None:
    for index, run in enumerate(graph.runs):
        field = f"runs[{index}]"
        if not run.rows:
            raise GraphError(f"run {index} has no rows", field=field)
        if bool(run.tokens) != card.takes_tokens:
            says = "takes token ids" if card.takes_tokens else f"takes {_names(card.inputs)}, not token ids"
            raise GraphError(f"run {index}: {card.name!r} {says}", field=f"{field}.tokens")
        _check_tokens(index, run, card)
        _check_generation(index, run, card)
        _check_inputs(index, run, card)


def _check_tokens(index: int, run: Run, card: ModelCard) -> None:
    field = f"runs[{index}]"
    for row, tokens in enumerate(run.tokens):
        if not tokens:
            raise GraphError(f"run {index}, row {row} has no tokens", field=f"{field}.tokens[{row}]")
        if len(tokens) > card.n_ctx:
            raise GraphError(
                f"run {index}, row {row} has {len(tokens)} tokens; {card.name!r} takes at most {card.n_ctx}",
                field=f"{field}.tokens[{row}]",
            )
        if min(tokens) < 0 or max(tokens) >= card.d_vocab:
            bad = next(t for t in tokens if not 0 <= t < card.d_vocab)
            raise GraphError(
                f"run {index}, row {row}: token id {bad} is outside the vocabulary of {card.d_vocab}",
                field=f"{field}.tokens[{row}]",
            )
    if run.ragged and not card.ragged:
        raise GraphError(f"run {index}: {card.name!r} takes rows of one length only", field=field)


def _check_generation(index: int, run: Run, card: ModelCard) -> None:
    how, field = run.generation, f"runs[{index}].generation"
    if how is None:
        return
    if not card.causal or run.inputs or LOGITS not in card:
        raise GraphError(
            f"run {index}: tokens are generated only from token ids, by causal models that give logits", field=field
        )
    # The last token that is generated is never put through the model.
    if how.max_new_tokens < 1 or run.seq + how.max_new_tokens - 1 > card.n_ctx:
        room = card.n_ctx + 1 - run.seq
        raise GraphError(
            f"run {index}: {how.max_new_tokens} tokens after {run.seq}; {card.name!r} takes at most {card.n_ctx}, so "
            f"max_new_tokens is from 1 to {room} here",
            field=f"{field}.max_new_tokens",
        )
    problems = {
        "temperature": not (math.isfinite(how.temperature) and how.temperature >= 0),
        "top_k": how.top_k < 0,
        "top_p": not 0 < how.top_p <= 1,
        "seed": not 0 <= how.seed < 2**62,
        "stop": any(not sequence for sequence in how.stop),
    }
    for name, wrong in problems.items():
        if wrong:
            raise GraphError(f"run {index}: {name} cannot be {getattr(how, name)!r}", field=f"{field}.{name}")


def _check_inputs(index: int, run: Run, card: ModelCard) -> None:
    known = {spec.name: spec for spec in card.inputs}
    given = dict(run.inputs)
    if len(given) != len(run.inputs):
        raise GraphError(f"run {index} has an input twice", field=f"runs[{index}].inputs")
    for spec in card.inputs:
        if spec.required and spec.name not in given:
            raise GraphError(f"run {index} lacks the input {spec.name!r}", field=f"runs[{index}].inputs")
    for name, value in given.items():
        field = f"runs[{index}].inputs[{name}]"
        if name not in known:
            raise GraphError(f"run {index}: {card.name!r} has no input {name!r} ({_names(card.inputs)})", field=field)
        spec = known[name]
        out = TensorSpec(value.shape, value.dtype)
        if any(extent < 1 for extent in value.shape) or out.nbytes != value.nbytes:
            raise ShapeError(f"run {index}: {value.nbytes} bytes do not hold the input {name!r} of {out}", field=field)
        fits = len(value.shape) == len(spec.dims) and all(
            (d == size) if isinstance(d, int) else (d != "rows" or size == run.rows)
            for d, size in zip(spec.dims, value.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, spec.dims))
            raise ShapeError(f"run {index}: the input {name!r} is [{wanted}], got {out}", field=field)
        named = (n for d, n in zip(spec.dims, value.shape, strict=True) if isinstance(d, str) and d != "rows")
        if max(named, default=0) > card.n_ctx:
            says = f"longer than {card.n_ctx}, the most that {card.name!r} takes"
            raise GraphError(f"run {index}: the input {name!r} is {says}", field=field)
        if value.dtype != spec.dtype:
            raise DTypeError(f"run {index}: the input {name!r} holds {spec.dtype}, got {out}", field=field)
        if spec.below is not None and not _all_below(value, spec.below):
            raise GraphError(f"run {index}: an element of {name!r} is outside 0 to {spec.below - 1}", field=field)


def _all_below(value: TensorData, bound: int) -> bool:
    numbers = array("q")
    numbers.frombytes(value.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return min(numbers) >= 0 and max(numbers) < bound


def _names(inputs: Sequence[InputSpec]) -> str:
    return "its inputs: " + (", ".join(spec.name for spec in inputs) or "none but token ids")


def _arguments_refer_backwards(graph: Graph, card: ModelCard) -> None:
    del card
    for i, node in enumerate(graph.nodes):
        for arg in node.args:
            if arg >= i or arg < 0:
                position = node.args.index(arg)
                raise GraphError(
                    f"{node.op}: argument {position} refers to node {arg}; arguments refer to earlier nodes",
                    node=i,
                    field=f"nodes[{i}].args[{position}]",
                )


#: What to do instead of differentiating by a value that the metric does not depend on, by what made the value.
_NO_GRADIENT = {
    "getitem": "; take the gradient with respect to the site's whole value, then index the gradient",
    "param.read": "; the model goes on with its own weights: differentiate by a value that you put in their place, "
    "such as t.constant(zeros) added to the output that they make",
}


def _metrics_depend_on_what_they_are_differentiated_by(graph: Graph, card: ModelCard) -> None:
    if "grad" not in graph.ops:
        return
    grads = [i for i, node in enumerate(graph.nodes) if node.op == "grad" and len(node.args) > 1]
    sources: list[list[int]] = [[] for _ in graph.nodes]
    for source, users in enumerate(dependents(graph, card)):
        for user in users:
            sources[user].append(source)
    behind, of = set[int](), -1  # found once for a metric, however many values it is differentiated by
    for i in sorted(grads, key=lambda i: graph.nodes[i].args[0]):
        metric, *wrt = graph.nodes[i].args
        if metric != of:
            behind, of = _reached(sources, metric), metric
        for position, value in enumerate(wrt, start=1):
            read = graph.nodes[value]
            generating = read.run is not None and graph.runs[read.run].generation is not None
            if generating and str(read.attrs.get("site", "")).endswith(CACHED):
                shown = BEHIND_THE_CACHE.format("differentiated by", read.attrs["site"])
                raise GraphError(shown, node=i, related=[value])
            if value not in behind:
                what = graph.nodes[value]
                hint = _NO_GRADIENT.get(what.op, "")
                name = what.attrs.get("site", what.op)
                raise GraphError(
                    f"grad: the metric does not depend on argument {position} ({name}){hint}",
                    node=i,
                    related=[value, metric],
                    field=f"nodes[{i}].args[{position}]",
                )


def _reached(leads: Sequence[Sequence[int]], start: int) -> set[int]:
    """Everywhere that `start` leads, itself included."""
    reached, pending = {start}, [start]
    while pending:
        for there in leads[pending.pop()]:
            if there not in reached:
                reached.add(there)
                pending.append(there)
    return reached


def _outputs_are_values(graph: Graph, card: ModelCard) -> None:
    del card
    names: set[str] = set()
    for index, output in enumerate(graph.outputs):
        field = f"outputs[{index}]"
        if output.name in names:
            raise GraphError(f"two outputs are called {output.name!r}", field=field)
        names.add(output.name)
        if not 0 <= output.node < len(graph.nodes):
            raise GraphError(f"output {output.name!r} refers to node {output.node}, which does not exist", field=field)


GraphRule: TypeAlias = "Callable[[Graph, ModelCard], None]"
GRAPH_RULES: tuple[GraphRule, ...] = (_runs_are_well_formed, _arguments_refer_backwards, _outputs_are_values)
#: Checked once every node has been inferred, so that sites and operations are known to exist.
LATE_GRAPH_RULES: tuple[GraphRule, ...] = (
    _metrics_depend_on_what_they_are_differentiated_by,
    outputs_respect_the_policy,
)


def _check_counts(graph: Graph, limits: Limits) -> None:
    """The limits that cost nothing to check come first: nothing is inferred for a graph that is too large."""
    consts = sum(value.nbytes for run in graph.runs for _, value in run.inputs) + sum(
        v.nbytes for n in graph.nodes if n.op == "const" for v in n.attrs.values() if _travels_inside(v)
    )
    for limit, requested, what in (
        ("max_nodes", len(graph.nodes) + sum(1 + len(body.nodes) for body in graph.bodies), "nodes"),
        ("max_runs", len(graph.runs), "runs"),
        ("max_rows", sum(r.rows for r in graph.runs), "rows"),
        ("max_tokens", sum(r.rows * r.positions for r in graph.runs), "token positions"),
        ("max_const_bytes", consts, "bytes of constants"),
    ):
        _check_limit(limits, limit, requested, what)


def _travels_inside(value: object) -> TypeGuard[TensorData]:
    """Whether a constant is part of the graph's message: large ones travel beside it, as artifacts."""
    return isinstance(value, TensorData) and not isinstance(value, KeyedTensor) and value.nbytes <= UPLOAD_ABOVE_BYTES


def _check_limit(limits: Limits, limit: str, requested: int, what: str) -> None:
    allowed = getattr(limits, limit)
    if requested > allowed:
        raise LimitExceededError(
            f"the graph needs {requested:,} {what}; {limit} of this server is {allowed:,}",
            limit=limit,
            allowed=allowed,
            requested=requested,
        )


def verify(
    graph: Graph, card: ModelCard, limits: Limits | None = None, *, facts: Sequence[Facts] | None = None
) -> Verified:
    """Check every rule and infer every node.

    Args:
        graph: the graph.
        card: the card of the model it is meant for.
        limits: what to hold it to; the card's own limits when None.
        facts: of every node, where the caller has had each inferred for this card as it was made (tracing does); they
            are taken as they are, unless steps must be written out.

    Returns:
        The graph with the value spec of every node.

    Raises:
        GraphError: the most specific subclass, naming the node; nothing has been run or allocated by then.
    """
    limits = card.limits if limits is None else limits
    _check_counts(graph, limits)
    for rule in GRAPH_RULES:
        rule(graph, card)
    given = graph
    if graph.bodies:
        found = check_bodies(graph, card, infer_node)
        graph = Graph(graph.runs, graph.nodes, graph.outputs, graph.bodies, found)
    unrolled = unroll(graph, limits.max_nodes)
    flat = unrolled.graph
    try:
        flat_facts = _verify_flat(flat, card, limits, facts if flat is graph else None)
    except GraphError as error:
        if flat is not graph and error.node is not None:
            step = unrolled.graph.nodes[error.node].attrs.get("step")
            error.message += "" if step is None else f" (step {step})"
            error.node = unrolled.origin[error.node]
            if graph.nodes[error.node].op == STACK:
                error.message += "; only equal shapes can be stacked over the steps: index the newest position, [:, -1]"
            error.related = tuple(unrolled.origin[n] for n in error.related)
            error.field = f"nodes[{error.node}]"
        raise

    specs = flat_specs = tuple([known.spec for known in flat_facts])
    if flat is not graph:
        first = {of: i for i, of in reversed(list(enumerate(unrolled.origin)))}
        specs = tuple(flat_specs[first[i]] for i in range(len(graph.nodes)))
    return Verified(given, card, specs, flat, flat_specs, unrolled.origin, tuple(flat_facts))


def _infer_all(graph: Graph, card: ModelCard) -> list[Facts]:
    """The facts of every node."""
    inference = Inference(card, infer_node)
    facts: list[Facts] = []
    specs: list[ValueSpec] = []
    for i, node in enumerate(graph.nodes):
        try:
            known = inference.facts(graph, node, specs)
        except GraphError as error:
            if error.node is None:
                error.node = i
                error.field = error.field or f"nodes[{i}]"
            raise
        facts.append(known)
        specs.append(known.spec)
    return facts


def _verify_flat(graph: Graph, card: ModelCard, limits: Limits, known: Sequence[Facts] | None) -> Sequence[Facts]:
    """Check a graph whose steps are written out; returns the facts of its nodes, `known` where they are known."""
    facts = _infer_all(graph, card) if known is None else known
    specs = [each.spec for each in facts]
    for index, output in enumerate(graph.outputs):
        value = specs[output.node]
        if not isinstance(value, TensorSpec):
            what = "is a write and has no value" if value == NO_VALUE else f"has {len(value)} parts; pick one with item"
            raise GraphError(f"output {output.name!r} {what}", node=output.node, field=f"outputs[{index}]")
    topological_order(graph, site_chains(graph, card))
    for rule in LATE_GRAPH_RULES:
        rule(graph, card)
    check_loop_steps(loop_steps(graph, specs, graph.body_facts), limits.max_loop_steps)
    cost = price(graph, specs, facts)
    for limit, requested, what in (
        ("max_result_bytes", cost.result_bytes, "bytes of results"),
        ("max_peak_bytes", cost.peak_bytes, "bytes at its peak"),
        ("max_flops", cost.flops, "floating-point operations"),
    ):
        _check_limit(limits, limit, requested, what)
    return facts
