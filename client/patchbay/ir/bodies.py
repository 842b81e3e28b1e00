"""Bodies: the pure sub-programs that loops, choices and maps of a graph run; what they take, give and cost.

A body is flat like the graph: values 0, 1, ... are its parameters, its nodes come after, and arguments refer to smaller
values. It holds pure operations alone: no site, no run. It may use bodies of smaller number only, so nothing recurs.
It says what it takes and gives, so whoever uses it is checked without looking inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from patchbay.errors import DTypeError, GraphError, LimitExceededError, ShapeError
from patchbay.ir.dtypes import bool_
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.ir.ops.spec import TensorSpec, ValueSpec

if TYPE_CHECKING:
    from patchbay.ir.card import ModelCard

#: How deeply loops may stand inside one another.
MAX_DEPTH = 8
#: Gradients that one body takes; whether each depends on its values is found out by going through the body.
MAX_GRADS = 16
#: Steps of one loop; the configured limits are on all of them together.
MAX_LENGTH = 2**31 - 1
#: Bytes of values that are the same at every step and may be kept instead of being computed again.
MAX_KEPT_BYTES = 64 * 2**20
#: Bytes that the slices of a map which run side by side may take; of one slice at least.
MAX_MAPPED_BYTES = 64 * 2**20
#: What a body may hold beside pure operations.
_ALLOWED = frozenset({"const", "item", "call", "grad", *BODY_ATTRS})


@dataclass(frozen=True)
class Body:
    """A sub-program.

    Attributes:
        params: shape and dtype of what it takes; tensors, never Python numbers.
        nodes: its operations; node k is value ``len(params) + k``.
        results: the values that it gives; parameters may be among them.
        returns: shape and dtype of each.
    """

    params: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    results: tuple[int, ...]
    returns: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class BodyFacts:
    """What is known of a body without running it.

    Attributes:
        specs: shape and dtype of every value, parameters first.
        flops: floating-point operations of one run of it, gradients and inner loops included.
        steps: operations that one run of it runs.
        depth: how deeply loops stand inside it, itself counted.
        peak_bytes: highest sum of its own live values.
        recorded_bytes: what is kept of one run of it while a gradient is to be taken through it.
    """

    specs: tuple[ValueSpec, ...]
    flops: int
    steps: int
    depth: int
    peak_bytes: int
    recorded_bytes: int


@dataclass(frozen=True, slots=True)
class LoopCost:
    """The price of one loop, choice or map.

    Attributes:
        flops, steps: as in `BodyFacts`, over all its steps.
        workspace: bytes of temporaries while it runs, beside its arguments and results.
        recorded: bytes kept of it while a gradient is to be taken through it.
    """

    flops: int
    steps: int
    workspace: int
    recorded: int


#: Infers one node's value: `patchbay.ir.infer.infer_node`.
Infer: TypeAlias = "Callable[[Graph, ModelCard, Node, Sequence[ValueSpec]], ValueSpec]"


# --- what a use of a body is --------------------------------------------------------------------------------------


def infer_scan(bodies: Sequence[Body], attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> ValueSpec:
    """The parts of a ``scan``: what is carried at the end, then what each step gave, stacked.

    Raises:
        GraphError: the values do not fit the body.
    """
    length, carry, xs = attrs["length"], attrs["carry"], attrs["xs"]
    if not 0 <= length <= MAX_LENGTH:
        raise GraphError(f"scan: {length} steps; 0 to {MAX_LENGTH} are possible")
    if carry < 0 or xs < 0 or carry + xs > len(args):
        raise GraphError(f"scan: {carry} values carried and {xs} sliced, of {len(args)} in all")
    body = _body("scan", bodies, attrs["body"])
    slices = _slices("scan", args[carry : carry + xs], length)
    _check_takes("scan", body, [*args[:carry], *slices, *args[carry + xs :]])
    if len(body.returns) < carry:
        raise GraphError(f"scan: {carry} values are carried, but a step gives {len(body.returns)}")
    for i, (enters, leaves) in enumerate(zip(args[:carry], body.returns, strict=False)):
        if (enters.shape, enters.dtype) != (leaves.shape, leaves.dtype):
            wrong = ShapeError if enters.shape != leaves.shape else DTypeError
            raise wrong(f"scan: carried value {i} enters a step as {enters} and leaves it as {leaves}")
    return (*body.returns[:carry], *(_stacked(y, length) for y in body.returns[carry:]))


def infer_cond(bodies: Sequence[Body], attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> ValueSpec:
    """The parts of a ``cond``.

    Raises:
        GraphError: the condition is no single bool, or the values do not fit the bodies, or these give other things.
    """
    condition, *values = args
    if condition.shape or condition.dtype != bool_:
        raise ShapeError(f"cond: the condition must be a bool of no dimensions, got {condition}")
    then, otherwise = (_body("cond", bodies, attrs[name]) for name in ("then", "otherwise"))
    for body in (then, otherwise):
        _check_takes("cond", body, values)
    if then.returns != otherwise.returns:
        raise ShapeError(f"cond: where true it gives {list(then.returns)}, where false {list(otherwise.returns)}")
    return then.returns


def infer_map(bodies: Sequence[Body], attrs: Mapping[str, Any], args: Sequence[TensorSpec]) -> ValueSpec:
    """The parts of a ``map``.

    Raises:
        GraphError: the values do not fit the body.
    """
    mapped = attrs["mapped"]
    if not 1 <= mapped <= len(args) or not args[0].shape:
        raise GraphError(f"map: {mapped} values to take slices of, of {len(args)} in all")
    body = _body("map", bodies, attrs["body"])
    length = args[0].shape[0]
    _check_takes("map", body, [*_slices("map", args[:mapped], length), *args[mapped:]])
    return tuple(_stacked(y, length) for y in body.returns)


INFER: Mapping[str, Callable[[Sequence[Body], Mapping[str, Any], Sequence[TensorSpec]], ValueSpec]] = {
    "scan": infer_scan,
    "cond": infer_cond,
    "map": infer_map,
}


def _body(op: str, bodies: Sequence[Body], number: int) -> Body:
    if not 0 <= number < len(bodies):
        raise GraphError(f"{op}: body {number} of a graph with {len(bodies)}")
    found = bodies[number]
    if not found.returns:
        raise GraphError(f"{op}: body {number} gives nothing")
    return found


def _slices(op: str, xs: Sequence[TensorSpec], length: int) -> list[TensorSpec]:
    for i, x in enumerate(xs):
        if not x.shape or x.shape[0] != length:
            raise ShapeError(f"{op}: value {i} is taken slice by slice {length} times, but is {x}")
    return [TensorSpec(x.shape[1:], x.dtype) for x in xs]


def _stacked(spec: TensorSpec, length: int) -> TensorSpec:
    return TensorSpec((length, *spec.shape), spec.dtype)


def _check_takes(op: str, body: Body, given: Sequence[TensorSpec]) -> None:
    if any(value.scalar for value in given):
        raise DTypeError(f"{op} takes tensors, got a Python scalar")
    if len(given) != len(body.params):
        raise GraphError(f"{op}: its body takes {len(body.params)} values, got {len(given)}")
    for i, (param, value) in enumerate(zip(body.params, given, strict=True)):
        if param != value:
            raise ShapeError(f"{op}: value {i} of its body is {param}, got {value}")


# --- what a body is -----------------------------------------------------------------------------------------------


def check_bodies(graph: Graph, card: ModelCard, infer: Infer) -> tuple[BodyFacts, ...]:
    """Check every body of `graph`, in order, and price it.

    Raises:
        GraphError: the most specific subclass; its field names body and node.
    """
    facts: list[BodyFacts] = []
    for number in range(len(graph.bodies)):
        facts.append(check_body(graph, card, number, facts, infer))
    return tuple(facts)


def check_body(graph: Graph, card: ModelCard, number: int, facts: Sequence[BodyFacts], infer: Infer) -> BodyFacts:
    """Check one body, those before it being known to be right.

    Raises:
        GraphError: the most specific subclass; its field names body and node.
    """
    from patchbay.ir.facts import facts_of  # which prices loops by what is found here

    body, name = graph.bodies[number], f"bodies[{number}]"
    specs: list[ValueSpec] = list(body.params)
    for i, param in enumerate(body.params):
        if param.scalar is not None or any(extent < 0 for extent in param.shape):
            raise ShapeError(f"a body cannot take {param}", field=f"{name}.params[{i}]")
    depth = flops = steps = 0
    workspaces = [0] * len(body.nodes)
    recorded = 0
    for k, node in enumerate(body.nodes):
        try:
            _check_node(body, k, node, number)
            spec = infer(graph, card, node, specs)
            if node.op == "grad":
                _check_grad(body, k, node)
        except GraphError as error:
            error.node, error.related = None, ()
            error.field = f"{name}.nodes[{k}]"
            raise
        specs.append(spec)
        steps += node.op != "const"
        args = [value for a in node.args if isinstance(value := specs[a], TensorSpec)]
        attrs = op_spec(node.op).fill(node.attrs)
        if node.op in BODY_ATTRS:
            depth = max(depth, *(facts[b].depth for b in bodies_of(node)))
            inner = loop_cost(node.op, attrs, args, spec, facts)
            flops, steps = flops + inner.flops, steps + inner.steps
            workspaces[k], recorded = inner.workspace, recorded + inner.recorded
        elif node.op == "grad":
            flops += 2 * flops  # a backward pass costs about twice its forward
        else:
            known = facts_of(graph, node, specs, spec, card)
            flops, workspaces[k] = flops + known.flops, known.workspace
        recorded += _bytes(spec) if node.op != "item" else 0
    if depth + 1 > MAX_DEPTH:
        raise GraphError(f"loops stand {depth + 1} deep; at most {MAX_DEPTH}", field=name)
    _check_results(body, specs, name)
    graded = any(node.op == "grad" for node in body.nodes)
    peak = _peak(body, specs, workspaces)
    if graded:  # what a gradient needs is kept until it is taken, and as much again made on the way back
        peak, recorded = max(peak, 2 * recorded), 3 * recorded
    return BodyFacts(tuple(specs), flops, steps, depth + 1, peak, recorded)


def _check_node(body: Body, k: int, node: Node, number: int) -> None:
    here = len(body.params) + k
    if node.op not in _ALLOWED and op_spec(node.op).structural:
        raise GraphError(f"{node.op} cannot stand in a body: bodies hold pure operations, no sites and no runs")
    if node.run is not None:
        raise GraphError(f"{node.op} in a body belongs to no run")
    if any(not 0 <= a < here for a in node.args):
        raise GraphError(f"{node.op}: arguments refer to earlier values of the same body")
    if node.op == "const" and any(isinstance(v, TensorData) for v in node.attrs.values()):
        raise GraphError("a body holds numbers as constants, no tensors: give it the tensor as an argument")
    if node.op == "const" and node.attrs.get("scalar") is None:
        raise GraphError("a body holds numbers as constants")
    for used in bodies_of(node):
        if not 0 <= used < number:
            raise GraphError(f"{node.op}: body {number} refers to body {used}; bodies refer to earlier ones only")


def _check_grad(body: Body, k: int, node: Node) -> None:
    metric, *wrt = node.args
    first = len(body.params)
    behind, pending = {metric}, [metric]
    while pending:
        value = pending.pop() - first
        for a in body.nodes[value].args if value >= 0 else ():
            if a not in behind:
                behind.add(a)
                pending.append(a)
    if not behind.issuperset(wrt):
        raise GraphError(
            "grad: the metric does not depend on a value that it is differentiated by; inside a loop, both must be "
            "made there, or the value be one that it carries or takes"
        )
    if sum(other.op == "grad" for other in body.nodes[: k + 1]) > MAX_GRADS:
        raise GraphError(f"a body takes gradients at most {MAX_GRADS} times; each may be by many values")


def _check_results(body: Body, specs: Sequence[ValueSpec], name: str) -> None:
    if len(body.results) != len(body.returns):
        raise GraphError(f"a body with {len(body.results)} results that announces {len(body.returns)}", field=name)
    for i, (result, announced) in enumerate(zip(body.results, body.returns, strict=True)):
        field = f"{name}.results[{i}]"
        if not 0 <= result < len(specs):
            raise GraphError(f"a body gives value {result} of {len(specs)}", field=field)
        if specs[result] != announced:
            raise ShapeError(f"a body announces {announced} and gives {specs[result]}", field=field)


def _peak(body: Body, specs: Sequence[ValueSpec], workspaces: Sequence[int]) -> int:
    first = len(body.params)
    last_use = list(range(first, first + len(body.nodes)))
    for k, node in enumerate(body.nodes):
        for a in node.args:
            if a >= first:
                last_use[a - first] = first + k
    for result in body.results:
        if result >= first:
            last_use[result - first] = first + len(body.nodes)
    dying: dict[int, int] = {}
    for i, last in enumerate(last_use):
        dying[last] = dying.get(last, 0) + _bytes(specs[first + i])
    live = peak = 0
    for k, workspace in enumerate(workspaces):
        live += _bytes(specs[first + k])
        peak = max(peak, live + workspace)
        live -= dying.get(first + k, 0)
    return peak


def _bytes(value: ValueSpec) -> int:
    return value.nbytes if isinstance(value, TensorSpec) else sum(part.nbytes for part in value)


# --- what a use of a body costs -----------------------------------------------------------------------------------


def loop_cost(
    op: str, attrs: Mapping[str, Any], args: Sequence[TensorSpec], out: ValueSpec, facts: Sequence[BodyFacts]
) -> LoopCost:
    """The price of one loop, choice or map, whose body's facts are known."""
    if op == "cond":
        a, b = facts[attrs["then"]], facts[attrs["otherwise"]]
        return LoopCost(
            max(a.flops, b.flops),
            max(a.steps, b.steps),
            max(a.peak_bytes, b.peak_bytes),
            max(a.recorded_bytes, b.recorded_bytes),
        )
    body = facts[attrs["body"]]
    if op == "scan":
        length, carried = attrs["length"], sum(a.nbytes for a in args[: attrs["carry"]])
        # Two steps' carried values exist at once.
        workspace = body.peak_bytes + 2 * carried + min(body.recorded_bytes, MAX_KEPT_BYTES)
    else:
        length = args[0].shape[0]
        workspace = body.peak_bytes * side_by_side(body, length) + min(body.recorded_bytes, MAX_KEPT_BYTES)
        workspace += min(_bytes(out), MAX_KEPT_BYTES)
    return LoopCost(length * body.flops, length * body.steps, workspace, length * body.recorded_bytes)


def side_by_side(body: BodyFacts, length: int) -> int:
    """How many slices of a map may run at once."""
    return max(1, min(length, MAX_MAPPED_BYTES // max(body.peak_bytes, 1)))


def loop_steps(graph: Graph, specs: Sequence[ValueSpec], facts: Sequence[BodyFacts]) -> int:
    """Operations that all loops of `graph` run, every step of each counted."""
    steps = 0
    if graph.ops.isdisjoint(BODY_ATTRS):
        return steps
    for i, node in enumerate(graph.nodes):
        if node.op in BODY_ATTRS:
            args = [value for a in node.args if isinstance(value := specs[a], TensorSpec)]
            steps += loop_cost(node.op, op_spec(node.op).fill(node.attrs), args, specs[i], facts).steps
    return steps


def recorded_bytes(graph: Graph, specs: Sequence[ValueSpec]) -> int:
    """What is kept of loops that a gradient of the graph is taken through; those that it might be are all counted."""
    if not graph.bodies:
        return 0
    users: list[list[int]] = [[] for _ in graph.nodes]
    for i, node in enumerate(graph.nodes):
        for a in node.args:
            users[a].append(i)
    # What a write changes may reach any metric, by way of the model.
    metrics = {n.args[0] for n in graph.nodes if n.op == "grad"}
    if not metrics:
        return 0
    leads = bytearray(len(graph.nodes))
    for i in range(len(graph.nodes) - 1, -1, -1):
        leads[i] = i in metrics or graph.nodes[i].op == "site.write" or any(leads[u] for u in users[i])
    wrt = {a for n in graph.nodes if n.op == "grad" for a in n.args[1:]}
    reads = any(graph.nodes[w].op == "site.read" for w in wrt)
    follows = bytearray(len(graph.nodes))
    total = 0
    for i, node in enumerate(graph.nodes):
        seen = node.op == "site.read" and reads
        follows[i] = i in wrt or seen or any(follows[a] for a in node.args)
        if follows[i] and leads[i] and node.op in BODY_ATTRS:
            args = [value for a in node.args if isinstance(value := specs[a], TensorSpec)]
            attrs = op_spec(node.op).fill(node.attrs)
            total += loop_cost(node.op, attrs, args, specs[i], graph.body_facts).recorded
    return total


def check_loop_steps(steps: int, allowed: int) -> None:
    """
    Raises:
        LimitExceededError: the loops of a graph run more operations than `allowed`.
    """
    if steps > allowed:
        raise LimitExceededError(
            f"the graph's loops run {steps:,} operations, every step counted; max_loop_steps of this server is "
            f"{allowed:,}",
            limit="max_loop_steps",
            allowed=allowed,
            requested=steps,
        )


# --- bodies among one another -------------------------------------------------------------------------------------


def bodies_of(node: Node) -> tuple[int, ...]:
    """Numbers of the bodies that `node` uses.

    Raises:
        GraphError: an attribute that should be a number is none.
    """
    names = BODY_ATTRS.get(node.op)
    if names is None:
        return ()
    attrs = op_spec(node.op).fill(node.attrs)
    return tuple(attrs[name] for name in names)


def with_bodies(node: Node, number: Mapping[int, int]) -> Node:
    """`node` with the bodies that it uses called by other numbers."""
    names = BODY_ATTRS.get(node.op)
    if names is None:
        return node
    renamed: dict[str, Any] = {name: number[b] for name, b in zip(names, bodies_of(node), strict=True)}
    return Node(node.op, node.args, {**node.attrs, **renamed}, node.run)


def body_key(body: Body, number: Mapping[int, int]) -> object:
    """Equal for two bodies that compute the same; hashable. `number`: which body stands for which."""
    nodes = []
    for node in body.nodes:
        # repr keeps 1, 1.0 and True apart, and NaN equal to itself
        attrs = tuple((k, repr(v)) for k, v in sorted(with_bodies(node, number).attrs.items()))
        nodes.append((node.op, node.args, attrs))
    return (body.params, tuple(nodes), body.results)


def canonical(bodies: Sequence[Body]) -> dict[int, int]:
    """For every body, the first one that computes the same."""
    first: dict[object, int] = {}
    number: dict[int, int] = {}
    for i, body in enumerate(bodies):
        number[i] = first.setdefault(body_key(body, number), i)
    return number
