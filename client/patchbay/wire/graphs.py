"""Graphs between the IR and messages.

Decoding checks everything that can be checked without knowing operations or the model: counts against the limits before
a Python object is built, references, nesting, tensors. What an operation or a site means is the verifier's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, cast

from google.protobuf.struct_pb2 import NULL_VALUE

from patchbay.errors import GraphError, LimitExceededError, ProtocolError
from patchbay.ir.bodies import Body
from patchbay.ir.facts import NO_ATTRS
from patchbay.ir.graph import Attr, Generation, Graph, Node, Output, Run, TensorData
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import TensorSpec
from patchbay.v1 import graph_pb2
from patchbay.wire.bounds import (
    MAX_ARGS_PER_NODE,
    MAX_ATTR_DEPTH,
    MAX_ATTR_ITEMS,
    MAX_ATTRS,
    MAX_LABEL_CHARS,
    MAX_NAME_CHARS,
    MAX_STRING_CHARS,
)
from patchbay.wire.tensors import decode_dtype, decode_shape, decode_tensor, encode_dtype, encode_tensor

if TYPE_CHECKING:
    from google.protobuf.struct_pb2 import NullValue

# --- encoding -----------------------------------------------------------------------------------------------------


def encode_graph(graph: Graph) -> graph_pb2.Graph:
    """
    Raises:
        GraphError: a value that no message can hold (an int of more than 64 bits, text with lone surrogates).
    """
    message = graph_pb2.Graph()
    for index, run in enumerate(graph.runs):
        try:
            encoded_run = message.runs.add(
                tokens=[token for row in run.tokens for token in row],
                row_lengths=run.lengths,
                label=run.label[:MAX_LABEL_CHARS],
                inputs=[graph_pb2.RunInput(name=name, value=encode_tensor(value)) for name, value in run.inputs],
            )
            if run.generation is not None:
                encoded_run.generation.CopyFrom(_encode_generation(run.generation))
        except (ValueError, TypeError) as error:
            raise GraphError(f"runs[{index}] cannot be sent: {error}", field=f"runs[{index}]") from None
    add = message.nodes.add
    for position, node in enumerate(graph.nodes):
        try:
            _encode_node(node, add())
        except GraphError:
            raise
        except (ValueError, TypeError) as error:
            raise GraphError(f"{node.op} cannot be sent: {error}", node=position) from None
    for index, body in enumerate(graph.bodies):
        try:
            _encode_body(body, message.bodies.add())
        except GraphError:
            raise
        except (ValueError, TypeError) as error:
            raise GraphError(f"bodies[{index}] cannot be sent: {error}", field=f"bodies[{index}]") from None
    for index, output in enumerate(graph.outputs):
        try:
            message.outputs.add(name=output.name, node=output.node, keep=output.keep)
        except (ValueError, TypeError) as error:
            raise GraphError(f"outputs[{index}] cannot be sent: {error}", field=f"outputs[{index}]") from None
    return message


def _encode_node(node: Node, into: graph_pb2.Node) -> None:
    into.op = node.op
    into.args.extend(node.args)
    if node.run is not None:
        into.run = node.run
    if node.attrs:
        for name, value in node.attrs.items():
            _encode_attr(value, into.attrs[name])


def _encode_body(body: Body, into: graph_pb2.Body) -> None:
    for node in body.nodes:
        _encode_node(node, into.nodes.add())
    into.results.extend(body.results)
    for types, specs in ((into.params, body.params), (into.returns, body.returns)):
        for spec in specs:
            types.add(element_type=encode_dtype(spec.dtype), shape=spec.shape)


def _encode_generation(how: Generation) -> graph_pb2.Generation:
    return graph_pb2.Generation(
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=how.seed,
        stop=[graph_pb2.TokenSequence(ids=sequence) for sequence in how.stop],
        ignore_eos=not how.eos,
    )


def _encode_attr(value: Attr, into: graph_pb2.Attr) -> None:
    if value is None:
        into.null_value = cast("NullValue", NULL_VALUE)
    elif isinstance(value, bool):
        into.bool_value = value
    elif isinstance(value, int):
        into.int_value = value
    elif isinstance(value, float):
        into.float_value = value
    elif isinstance(value, str):
        into.string_value = value
    elif isinstance(value, TensorData):
        into.tensor_value.CopyFrom(encode_tensor(value))
    elif isinstance(value, tuple):
        into.list_value.SetInParent()
        for item in value:
            _encode_attr(item, into.list_value.values.add())
    else:
        raise TypeError(f"an attribute cannot hold a {type(value).__name__}")


#: Attributes of more bytes are not looked up among those decoded before.
_MAX_SHARED_BYTES = 1_024

# --- decoding -----------------------------------------------------------------------------------------------------


def decode_graph(message: graph_pb2.Graph, limits: Limits | None = None) -> Graph:
    """
    Raises:
        LimitExceededError: more runs, rows, tokens, nodes or constants than `limits` allow.
        GraphError: a reference to a node or run that does not exist yet.
        ProtocolError: anything else that no client of ours would send.
    """
    limits = limits or Limits()
    _check_counts(message, limits)
    state = _State(len(message.runs), limits)
    runs = tuple(_decode_run(run, f"runs[{index}]", state) for index, run in enumerate(message.runs))
    nodes = tuple(_decode_nodes(message.nodes, 0, state))
    bodies = tuple(_decode_body(body, f"bodies[{index}]", state) for index, body in enumerate(message.bodies))
    return Graph(runs=runs, nodes=nodes, outputs=_decode_outputs(message, len(nodes)), bodies=bodies)


class _State:
    """What decoding one graph carries from node to node."""

    def __init__(self, n_runs: int, limits: Limits) -> None:
        self.n_runs = n_runs
        self.max_args = MAX_ARGS_PER_NODE * limits.max_nodes
        self.n_args = 0
        self._max_const_bytes = limits.max_const_bytes
        self._const_bytes = 0
        #: One object for equal names, and for equal attributes: thousands of nodes share a few dozen.
        self.names: dict[str, str] = {}
        self.attrs: dict[tuple[object, ...], Mapping[str, Attr]] = {}
        self.charged = 0

    def intern(self, name: str) -> str:
        return self.names.setdefault(name, name)

    def charge(self, size: int, field: str) -> None:
        """Charge an inline tensor, before its bytes are copied out of the message."""
        self.charged += 1
        self._const_bytes += size
        _check_limit("max_const_bytes", field, self._const_bytes, self._max_const_bytes)


def _check_counts(message: graph_pb2.Graph, limits: Limits) -> None:
    # len() of a repeated field is known without building its elements.
    counts = (
        # A body counts as a node, so that empty ones are not free.
        ("max_nodes", "nodes", len(message.nodes) + len(message.bodies), limits.max_nodes),
        ("max_runs", "runs", len(message.runs), limits.max_runs),
        ("max_nodes", "outputs", len(message.outputs), limits.max_nodes),
    )
    for limit, field, count, allowed in counts:
        _check_limit(limit, field, count, allowed)
    _check_limit("max_rows", "runs", sum(len(run.row_lengths) for run in message.runs), limits.max_rows)
    _check_limit("max_tokens", "runs", sum(len(run.tokens) for run in message.runs), limits.max_tokens)
    inside = sum(1 + len(body.nodes) for body in message.bodies)
    _check_limit("max_nodes", "nodes", len(message.nodes) + inside, limits.max_nodes)
    around = sum(len(body.params) + len(body.results) + len(body.returns) for body in message.bodies)
    _check_limit("max_args", "nodes", around, MAX_ARGS_PER_NODE * limits.max_nodes)


def _check_limit(limit: str, field: str, count: int, allowed: int) -> None:
    if count > allowed:
        what = "outputs" if field == "outputs" else limit.removeprefix("max_").replace("_bytes", " bytes")
        raise LimitExceededError(
            f"the graph has {count} {what}; at most {allowed} are allowed (limit {limit})",
            limit=limit,
            allowed=allowed,
            requested=count,
            field=field,
        )


def _decode_run(message: graph_pb2.Run, field: str, state: _State) -> Run:
    lengths = tuple(message.row_lengths)
    if any(length < 0 for length in lengths) or sum(lengths) != len(message.tokens):
        raise ProtocolError(
            f"{field}.row_lengths: rows of {sum(lengths)} tokens in all, but there are {len(message.tokens)}",
            field=f"{field}.row_lengths",
        )
    if len(message.label) > MAX_LABEL_CHARS:
        raise ProtocolError(
            f"{field}.label: {len(message.label)} characters; at most {MAX_LABEL_CHARS}", field=f"{field}.label"
        )
    tokens = tuple(message.tokens)
    rows, start = [], 0
    for length in lengths:
        rows.append(tokens[start : start + length])
        start += length
    if len(message.inputs) > MAX_ATTRS:
        raise ProtocolError(
            f"{field}.inputs: {len(message.inputs)} of them; at most {MAX_ATTRS}", field=f"{field}.inputs"
        )
    inputs = []
    for index, given in enumerate(message.inputs):
        place = f"{field}.inputs[{index}]"
        _check_name(given.name, f"{place}.name")
        inputs.append((given.name, decode_tensor(given.value, f"{place}.value", state.charge)))
    generation = _decode_generation(message.generation, field) if message.HasField("generation") else None
    return Run(tokens=tuple(rows), label=message.label, inputs=tuple(inputs), generation=generation)


def _decode_generation(message: graph_pb2.Generation, field: str) -> Generation:
    if len(message.stop) > MAX_ATTR_ITEMS or sum(len(sequence.ids) for sequence in message.stop) > MAX_ATTR_ITEMS:
        raise ProtocolError(
            f"{field}.generation.stop: more than {MAX_ATTR_ITEMS} token ids", field=f"{field}.generation.stop"
        )
    return Generation(
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        stop=tuple(tuple(sequence.ids) for sequence in message.stop),
        eos=not message.ignore_eos,
    )


def _decode_nodes(messages: Iterable[graph_pb2.Node], first: int, state: _State) -> Iterator[Node]:
    """The nodes, the first of which is at the position `first`."""
    names, n_runs = state.names, state.n_runs
    for position, message in enumerate(messages, first):
        args = tuple(message.args[:])  # a slice is copied at once, what is iterated over number by number
        state.n_args += len(args)
        if state.n_args > state.max_args:
            _check_limit("max_args", "nodes", state.n_args, state.max_args)
        for arg in args:
            if arg >= position or arg < 0:
                raise _forward_reference(args, position)
        run = message.run if message.HasField("run") else None
        if run is not None and not 0 <= run < n_runs:
            raise GraphError(
                f"node {position} belongs to run {run}, but the graph has {n_runs}",
                node=position,
                field=f"nodes[{position}].run",
            )
        name = message.op
        op = names.get(name)
        if op is None:
            _check_name(name, f"nodes[{position}].op")
            op = state.intern(name)
        attrs = message.attrs
        yield Node(op, args, _decode_attrs(op, attrs, position, state) if attrs else NO_ATTRS, run)


def _forward_reference(args: tuple[int, ...], position: int) -> GraphError:
    index = next(i for i, arg in enumerate(args) if not 0 <= arg < position)
    return GraphError(
        f"argument {index} of node {position} is node {args[index]}; arguments refer to earlier nodes only",
        node=position,
        related=(args[index],),
        field=f"nodes[{position}].args[{index}]",
    )


def _decode_attrs(
    op: str, attrs: MutableMapping[str, graph_pb2.Attr], position: int, state: _State
) -> Mapping[str, Attr]:
    """The attributes of a node; nodes whose attributes are the same bytes share one object."""
    if len(attrs) > MAX_ATTRS:
        field = f"nodes[{position}].attrs"
        raise ProtocolError(f"{field}: {len(attrs)} attributes; at most {MAX_ATTRS}", field=field)
    key: tuple[object, ...] | None = None
    if op != "const":
        parts: list[object] = []
        for name in attrs:
            value = attrs[name]
            if value.ByteSize() > _MAX_SHARED_BYTES:  # a tensor, most likely: its bytes are not worth a copy
                break
            parts += (name, value.SerializeToString())
        else:
            key = tuple(parts)
            known = state.attrs.get(key)
            if known is not None:
                return known
    decoded: dict[str, Attr] = {}
    charged = state.charged
    for name in attrs:
        value = attrs[name]
        if value.WhichOneof("kind") == "float_value" and name in state.names:
            decoded[state.names[name]] = value.float_value
            continue
        _check_name(name, f"nodes[{position}].attrs")
        field = f'nodes[{position}].attrs["{name}"]'
        decoded[state.intern(name)] = _decode_attr(value, field, 0, state)
    if key is not None and state.charged == charged:  # tensors are charged each time
        state.attrs[key] = decoded
    return decoded


def _decode_body(message: graph_pb2.Body, field: str, state: _State) -> Body:
    first = len(message.params)
    nodes: list[Node] = []
    following = _decode_nodes(message.nodes, first, state)
    for k in range(len(message.nodes)):
        place = f"{field}.nodes[{k}]"
        try:
            decoded = next(following)
        except LimitExceededError:
            raise
        except GraphError as error:
            raise GraphError(f"{place}: {error.message}", field=place) from None
        except ProtocolError as error:
            raise ProtocolError(f"{field}: {error}", field=place) from None
        if decoded.run is not None:
            raise GraphError(f"{place} belongs to run {decoded.run}; bodies have no runs", field=place)
        nodes.append(decoded)
    results = tuple(message.results)
    if any(not 0 <= result < first + len(nodes) for result in results):
        raise GraphError(f"{field}: a result of a body is none of its values", field=f"{field}.results")
    params = tuple(_decode_type(t, f"{field}.params[{i}]") for i, t in enumerate(message.params))
    returns = tuple(_decode_type(t, f"{field}.returns[{i}]") for i, t in enumerate(message.returns))
    return Body(params=params, nodes=tuple(nodes), results=results, returns=returns)


def _decode_type(message: graph_pb2.TensorType, field: str) -> TensorSpec:
    dtype = decode_dtype(message.element_type, f"{field}.element_type")
    return TensorSpec(decode_shape(message.shape, dtype, f"{field}.shape"), dtype)


def _decode_attr(message: graph_pb2.Attr, field: str, depth: int, state: _State) -> Attr:
    kind = message.WhichOneof("kind")
    if kind == "int_value":
        return message.int_value
    if kind == "string_value":
        text = message.string_value
        if len(text) > MAX_STRING_CHARS:
            raise ProtocolError(f"{field}: {len(text)} characters; at most {MAX_STRING_CHARS}", field=field)
        return text
    if kind == "float_value":
        return message.float_value
    if kind == "bool_value":
        return message.bool_value
    if kind == "null_value":
        return None
    if kind == "tensor_value":
        return decode_tensor(message.tensor_value, field, state.charge)
    if kind == "list_value":
        values = message.list_value.values
        if depth >= MAX_ATTR_DEPTH:
            raise ProtocolError(f"{field}: lists nest more than {MAX_ATTR_DEPTH} deep", field=field)
        if len(values) > MAX_ATTR_ITEMS:
            raise ProtocolError(f"{field}: {len(values)} entries; at most {MAX_ATTR_ITEMS}", field=field)
        return tuple(_decode_attr(value, f"{field}[{index}]", depth + 1, state) for index, value in enumerate(values))
    raise ProtocolError(f"{field}: an attribute of no kind that this version knows", field=field)


def _decode_outputs(message: graph_pb2.Graph, n_nodes: int) -> tuple[Output, ...]:
    outputs: list[Output] = []
    seen: dict[str, int] = {}
    for index, output in enumerate(message.outputs):
        field = f"outputs[{index}]"
        _check_name(output.name, f"{field}.name")
        if not 0 <= output.node < n_nodes:
            raise GraphError(
                f"output {output.name!r} is node {output.node}, but the graph has {n_nodes}", field=f"{field}.node"
            )
        if seen.setdefault(output.name, index) != index:
            raise GraphError(f"two outputs are called {output.name!r}", field=f"{field}.name")
        outputs.append(Output(output.name, output.node, output.keep))
    return tuple(outputs)


def _check_name(name: str, field: str) -> None:
    if not name or len(name) > MAX_NAME_CHARS:
        raise ProtocolError(
            f"{field}: a name of {len(name)} characters; 1 to {MAX_NAME_CHARS} are allowed", field=field
        )
