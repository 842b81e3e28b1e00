"""Messages that no client of ours would send: refused with the path of the field, before anything large exists."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay.errors import GraphError, InvalidRequestError, LimitExceededError, PatchbayError, ProtocolError
from patchbay.ir.events import Progress
from patchbay.ir.graph import Graph, Node, Run
from patchbay.ir.limits import Limits
from patchbay.testing import fake_card
from patchbay.v1 import card_pb2, events_pb2, graph_pb2, service_pb2, tensor_pb2
from patchbay.wire.bounds import MAX_ATTR_DEPTH, MAX_ATTR_ITEMS, MAX_ATTRS, MAX_LABEL_CHARS, MAX_NAME_CHARS
from patchbay.wire.cards import decode_card, decode_limits, encode_card
from patchbay.wire.events import EventDecoder, decode_options
from patchbay.wire.graphs import decode_graph, encode_graph
from patchbay.wire.names import decode_model, encode_model
from patchbay.wire.parse import parse, serialize
from patchbay.wire.tokens import decode_row

F32 = tensor_pb2.ELEMENT_TYPE_FLOAT32


# --- tensors ------------------------------------------------------------------------------------------------------


def _tensor_in_a_graph(**fields: object) -> graph_pb2.Graph:
    graph = graph_pb2.Graph()
    graph.nodes.add(op="const").attrs["value"].tensor_value.CopyFrom(tensor_pb2.Tensor(**fields))
    return graph


@pytest.mark.parametrize(
    ("tensor", "field", "message"),
    [
        ({"element_type": 0}, ".element_type", "0 is not an element type"),
        ({"element_type": 99}, ".element_type", "99 is not an element type"),
        ({"element_type": F32, "shape": [-1]}, ".shape", "negative extent"),
        ({"element_type": F32, "shape": [2**32, 2**32]}, ".shape", "larger than any memory"),
        ({"element_type": F32, "shape": [0, 2**62]}, ".shape", "larger than any memory"),
        ({"element_type": F32, "shape": [1] * 33}, ".shape", "33 dimensions; at most 32"),
        ({"element_type": F32, "shape": [2], "data": b"1234567"}, ".data", "7 bytes for float32.2., which takes 8"),
        ({"element_type": F32, "shape": [2**20], "data": b"1234"}, ".data", "4 bytes for"),
        ({"element_type": F32, "shape": [], "data": b""}, ".data", "0 bytes for float32.., which takes 4"),
        ({"element_type": tensor_pb2.ELEMENT_TYPE_BOOL, "shape": [1], "data": b"\x02"}, ".data", "0 or 1"),
    ],
)
def test_tensors(tensor: dict[str, object], field: str, message: str) -> None:
    """Unknown dtypes, impossible shapes and bytes that do not fill them are refused at their field."""
    with pytest.raises(ProtocolError, match=message) as caught:
        decode_graph(_tensor_in_a_graph(**tensor))
    assert caught.value.field == f'nodes[0].attrs["value"]{field}'


# --- bodies -------------------------------------------------------------------------------------------------------


def _body(**fields: object) -> graph_pb2.Graph:
    return graph_pb2.Graph(bodies=[graph_pb2.Body(**fields)])  # type: ignore[arg-type]


NODE = graph_pb2.Node


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (_body(nodes=[NODE(op="add", args=[0])]), "bodies[0].nodes[0]"),
        (
            _body(params=[graph_pb2.TensorType(element_type=F32)], nodes=[NODE(op="add", args=[1])]),
            "bodies[0].nodes[0]",
        ),
        (_body(nodes=[NODE(op="zeros"), NODE(op="add", args=[-1])]), "bodies[0].nodes[1]"),
        (_body(nodes=[NODE(op="embed", run=0)]), "bodies[0].nodes[0]"),
        (_body(nodes=[NODE(op="")]), "bodies[0].nodes[0]"),
        (_body(results=[0]), "bodies[0].results"),
        (_body(nodes=[NODE(op="zeros")], results=[-1]), "bodies[0].results"),
        (_body(params=[graph_pb2.TensorType()]), "bodies[0].params[0].element_type"),
        (_body(params=[graph_pb2.TensorType(element_type=F32, shape=[-1])]), "bodies[0].params[0].shape"),
        (_body(returns=[graph_pb2.TensorType(element_type=F32, shape=[1] * 33)]), "bodies[0].returns[0].shape"),
        (_body(returns=[graph_pb2.TensorType(element_type=F32, shape=[2**61, 2**61])]), "bodies[0].returns[0].shape"),
    ],
)
def test_bodies(message: graph_pb2.Graph, field: str) -> None:
    """References out of a body, runs in it and impossible types are refused at their field."""
    with pytest.raises((GraphError, ProtocolError)) as caught:
        decode_graph(message)
    assert caught.value.field == field


def test_bodies_are_counted_before_they_are_built() -> None:
    """Empty bodies, their nodes and their arguments are held to the graph's own limits."""
    for message in (
        graph_pb2.Graph(bodies=[graph_pb2.Body()] * 11),
        _body(nodes=[NODE(op="zeros")] * 11),
        _body(params=[graph_pb2.TensorType(element_type=F32)] * 400),
        _body(nodes=[NODE(op="zeros")], results=[0] * 400),
    ):
        with pytest.raises(LimitExceededError):
            decode_graph(message, Limits(max_nodes=10))
    tensor = tensor_pb2.Tensor(element_type=F32, shape=[8], data=b"0" * 32)
    body = _body(nodes=[NODE(op="const", attrs={"value": graph_pb2.Attr(tensor_value=tensor)})])
    with pytest.raises(LimitExceededError, match="max_const_bytes"):
        decode_graph(body, Limits(max_const_bytes=16))


# --- graphs -------------------------------------------------------------------------------------------------------


def _nodes(*nodes: graph_pb2.Node, outputs: tuple[graph_pb2.Output, ...] = ()) -> graph_pb2.Graph:
    return graph_pb2.Graph(nodes=nodes, outputs=outputs)


N, O = graph_pb2.Node, graph_pb2.Output  # noqa: E741


@pytest.mark.parametrize(
    ("graph", "field"),
    [
        (_nodes(N(op="add", args=[0])), "nodes[0].args[0]"),
        (_nodes(N(op="x"), N(op="add", args=[0, 2]), N(op="x")), "nodes[1].args[1]"),
        (_nodes(N(op="x"), N(op="add", args=[-1])), "nodes[1].args[0]"),
        (_nodes(N(op="x"), N(op="add", args=[0, 2**31 - 1])), "nodes[1].args[1]"),
        (_nodes(N(op="site.read", run=0)), "nodes[0].run"),
        (_nodes(N(op="site.read", run=-1)), "nodes[0].run"),
        (_nodes(N(op="x"), outputs=(O(name="a", node=1),)), "outputs[0].node"),
        (_nodes(N(op="x"), outputs=(O(name="a", node=-1),)), "outputs[0].node"),
        (_nodes(N(op="x"), outputs=(O(name="a"), O(name="a"))), "outputs[1].name"),
    ],
    ids=["itself", "forward", "negative", "far", "no run", "negative run", "no node", "negative node", "same name"],
)
def test_references(graph: graph_pb2.Graph, field: str) -> None:
    """A cycle, a forward reference, or any other reference to what does not exist is a GraphError at its field."""
    with pytest.raises(GraphError) as caught:
        decode_graph(graph)
    assert caught.value.field == field


def _attrs(count: int) -> graph_pb2.Graph:
    node = N(op="x")
    for i in range(count):
        node.attrs[f"a{i}"].int_value = 1
    return _nodes(node)


def _attr(fill: Callable[[graph_pb2.Attr], object]) -> graph_pb2.Graph:
    node = N(op="x")
    fill(node.attrs["a"])
    return _nodes(node)


def _deep(depth: int) -> graph_pb2.Graph:
    def fill(attr: graph_pb2.Attr) -> None:
        for _ in range(depth):
            attr = attr.list_value.values.add()
        attr.int_value = 1

    return _attr(fill)


def _run(**fields: object) -> graph_pb2.Graph:
    return graph_pb2.Graph(runs=[graph_pb2.Run(**fields)])


@pytest.mark.parametrize(
    ("graph", "field"),
    [
        (_nodes(N(op="")), "nodes[0].op"),
        (_nodes(N(op="x" * (MAX_NAME_CHARS + 1))), "nodes[0].op"),
        (_nodes(N(op="x"), outputs=(O(name=""),)), "outputs[0].name"),
        (_attrs(MAX_ATTRS + 1), "nodes[0].attrs"),
        (_attr(lambda a: a.SetInParent()), 'nodes[0].attrs["a"]'),
        (_attr(lambda a: setattr(a, "string_value", "x" * 65_537)), 'nodes[0].attrs["a"]'),
        (
            _attr(lambda a: a.list_value.values.extend([graph_pb2.Attr(int_value=0)] * (MAX_ATTR_ITEMS + 1))),
            'nodes[0].attrs["a"]',
        ),
        (_deep(MAX_ATTR_DEPTH + 1), 'nodes[0].attrs["a"]' + "[0]" * MAX_ATTR_DEPTH),
        (_run(tokens=[1, 2], row_lengths=[1]), "runs[0].row_lengths"),
        (_run(tokens=[1], row_lengths=[2]), "runs[0].row_lengths"),
        (_run(tokens=[1], row_lengths=[2, -1]), "runs[0].row_lengths"),
        (_run(label="x" * (MAX_LABEL_CHARS + 1)), "runs[0].label"),
        (_run(inputs=[{"name": ""}]), "runs[0].inputs[0].name"),
        (_run(inputs=[{"name": "x", "value": {"element_type": 99}}]), "runs[0].inputs[0].value.element_type"),
        (_run(inputs=[{"name": "x"}] * 65), "runs[0].inputs"),
    ],
    ids=[
        "no op",
        "long op",
        "no output name",
        "many attributes",
        "attribute of no kind",
        "long string",
        "long list",
        "deep list",
        "tokens left over",
        "tokens missing",
        "negative row",
        "long label",
        "input without a name",
        "input of an unknown dtype",
        "many inputs",
    ],
)
def test_malformed_graphs(graph: graph_pb2.Graph, field: str) -> None:
    """Empty and endless names, attributes without a kind, deep lists and rows that do not add up are refused."""
    with pytest.raises(ProtocolError) as caught:
        decode_graph(graph)
    assert caught.value.field == field


def test_lists_of_the_greatest_depth_pass() -> None:
    """The depth limit refuses what lies beyond it and nothing else."""
    graph = decode_graph(_deep(MAX_ATTR_DEPTH))
    value = graph.nodes[0].attrs["a"]
    for _ in range(MAX_ATTR_DEPTH):
        assert isinstance(value, tuple)
        (value,) = value
    assert value == 1


@pytest.mark.parametrize(
    ("graph", "limits", "limit", "requested"),
    [
        (_nodes(N(op="x"), N(op="x"), N(op="x")), Limits(max_nodes=2), "max_nodes", 3),
        (_nodes(N(op="x"), outputs=(O(name="a"), O(name="b"))), Limits(max_nodes=1), "max_nodes", 2),
        (graph_pb2.Graph(runs=[graph_pb2.Run()] * 3), Limits(max_runs=2), "max_runs", 3),
        (_run(row_lengths=[0] * 5), Limits(max_rows=4), "max_rows", 5),
        (_run(tokens=[0] * 5, row_lengths=[5]), Limits(max_tokens=4), "max_tokens", 5),
        (_nodes(N(op="x"), N(op="y", args=[0] * 65)), Limits(max_nodes=2), "max_args", 65),
        (
            _tensor_in_a_graph(element_type=F32, shape=[2], data=bytes(8)),
            Limits(max_const_bytes=7),
            "max_const_bytes",
            8,
        ),
        (_tensor_in_a_graph(element_type=F32, shape=[2**40]), Limits(max_const_bytes=7), "max_const_bytes", 2**42),
        (
            _run(inputs=[{"name": "pixel_values", "value": {"element_type": F32, "shape": [2]}}]),
            Limits(max_const_bytes=7),
            "max_const_bytes",
            8,
        ),
    ],
    ids=["nodes", "outputs", "runs", "rows", "tokens", "args", "constants", "claimed constants", "inputs"],
)
def test_counts(graph: graph_pb2.Graph, limits: Limits, limit: str, requested: int) -> None:
    """Counts above the limits are refused before Python objects are built, and the error names the limit."""
    with pytest.raises(LimitExceededError) as caught:
        decode_graph(graph, limits)
    assert (caught.value.limit, caught.value.requested) == (limit, requested)
    assert f"limit {limit}" in str(caught.value)


def test_text_that_is_not_utf8() -> None:
    """A name that is not UTF-8 fails to parse as a message at all, as a ProtocolError."""
    data = serialize(_nodes(N(op="abc"))).replace(b"abc", b"\xff\xfe\xfd")
    with pytest.raises(ProtocolError, match="not a valid Graph"):
        parse(graph_pb2.Graph, data)


@pytest.mark.parametrize(
    ("graph", "field"),
    [
        (Graph(nodes=(Node("x", attrs={"a": 2**63}),)), "nodes[0]"),
        (Graph(nodes=(Node("x", attrs={"a": "\ud800"}),)), "nodes[0]"),
        (Graph(nodes=(Node("x", attrs={"a": (1, [2])}),)), "nodes[0]"),  # type: ignore[dict-item]
        (Graph(nodes=(Node("x", args=(2**31,)),)), "nodes[0]"),
        (Graph(runs=(Run(((2**63,),)),)), "runs[0]"),
    ],
    ids=["huge int", "surrogate", "list", "huge argument", "huge token"],
)
def test_what_cannot_be_encoded_is_a_graph_error(graph: Graph, field: str) -> None:
    """A value that no message can hold is refused by the encoder, naming the node or run."""
    with pytest.raises(GraphError, match="cannot be sent") as caught:
        encode_graph(graph)
    assert caught.value.field == field


def test_nan_and_infinite_scalars_survive() -> None:
    """NaN and infinities are values like others in a float attribute."""
    graph = Graph(nodes=(Node("const", attrs={"a": math.nan, "b": -math.inf, "c": -0.0}),))
    attrs = decode_graph(encode_graph(graph)).nodes[0].attrs
    assert math.isnan(attrs["a"])  # type: ignore[arg-type]
    assert attrs["b"] == -math.inf
    assert math.copysign(1, attrs["c"]) == -1  # type: ignore[arg-type]


def test_long_labels_are_cut_when_encoded() -> None:
    """A label is never interpreted, so a long one is shortened instead of refused."""
    graph = decode_graph(encode_graph(Graph(runs=(Run(((1,),), label="x" * 10_000),))))
    assert graph.runs[0].label == "x" * MAX_LABEL_CHARS


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    """Random bytes are a valid graph or one of our own errors, never anything else."""
    outcome: Graph | PatchbayError
    try:
        outcome = decode_graph(parse(graph_pb2.Graph, data))
    except PatchbayError as error:
        outcome = error
    assert isinstance(outcome, (Graph, GraphError, ProtocolError))


# --- cards, tokens, options, names --------------------------------------------------------------------------------


def _card(change: Callable[[card_pb2.ModelCard], object]) -> card_pb2.ModelCard:
    message = encode_card(fake_card())
    change(message)
    return message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: setattr(m, "d_model", -1), "card.d_model"),
        (lambda m: setattr(m, "name", "models/../etc"), "card.name"),
        (lambda m: setattr(m, "element_type", 77), "card.element_type"),
        (lambda m: setattr(m.sites[1], "element_type", 77), "card.sites[1].element_type"),
        (lambda m: setattr(m.sites[0].dims[0], "symbol", "nonsense"), "card.sites[0].dims[0]"),
        (lambda m: m.sites[0].dims[0].ClearField("extent"), "card.sites[0].dims[0]"),
        (lambda m: m.sites[0].ClearField("dims"), "card.sites[0].dims"),
        (lambda m: setattr(m.sites[0].dims[0], "size", -5), "card.sites[0].dims[0].size"),
        (lambda m: setattr(m.callables[0], "d_in", -5), "card.callables[0].d_in"),
        (lambda m: setattr(m.limits, "max_nodes", -5), "limits.max_nodes"),
        (lambda m: m.inputs.add(name="x", dims=[{"symbol": "rows"}], element_type=77), "card.inputs[0].element_type"),
        (
            lambda m: m.inputs.add(name="x", dims=[{"symbol": "rows"}], element_type=F32, below=-1),
            "card.inputs[0].below",
        ),
    ],
)
def test_cards(change: Callable[[card_pb2.ModelCard], object], field: str) -> None:
    """A card with negative widths, unknown dtypes or extents, or a path for a name is refused at its field."""
    with pytest.raises(ProtocolError) as caught:
        decode_card(_card(change))
    assert caught.value.field == field


def test_limits_must_not_be_negative() -> None:
    """A negative limit is refused."""
    with pytest.raises(ProtocolError, match="-1 is negative"):
        decode_limits(card_pb2.Limits(max_tokens=-1))


def test_tokenized_lists_must_be_equally_long() -> None:
    """Token ids without as many strings, spans and flags are refused."""
    with pytest.raises(ProtocolError, match="lists of different lengths"):
        decode_row(service_pb2.TokenizedText(ids=[1, 2], strings=["a"]), "texts[0]")


def test_options_hold_few_names() -> None:
    """Thousands of disabled optimisations are refused: there are not that many."""
    with pytest.raises(ProtocolError, match="at most 256 names"):
        decode_options(service_pb2.ExecuteOptions(disabled_optimizations=["x"] * 257))


@pytest.mark.parametrize(
    "name", ["", "demo", "models/", "models/..", "models/../x", "models/a/b/c", "models//a", "models/a b", "models/a\n"]
)
def test_model_names(name: str) -> None:
    """A name is models/ and one or two plain words: nothing that could walk a file system."""
    with pytest.raises(ProtocolError, match="not a model's name"):
        decode_model(name, "name")


def test_model_names_are_checked_before_they_are_sent() -> None:
    """A name that no model can have is refused on the client."""
    with pytest.raises(InvalidRequestError, match="cannot be a model's name"):
        encode_model("a/../b")


# --- streams ------------------------------------------------------------------------------------------------------


def _header(n: int, size: int | None = None) -> service_pb2.ExecuteResponse:
    header = tensor_pb2.TensorHeader(element_type=F32, shape=[n], size_bytes=4 * n if size is None else size)
    return service_pb2.ExecuteResponse(tensor=events_pb2.TensorEvent(name="x", header=header))


R = service_pb2.ExecuteResponse
_CHUNK = R(chunk=tensor_pb2.TensorChunk(data=b"1234", crc32=0x9BE3E0A3))
_DONE = R(done=events_pb2.DoneEvent())


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([_CHUNK], "a chunk that belongs to no tensor"),
        ([_header(2), _DONE], "8 bytes of 'x' were to come"),
        ([_header(2), _CHUNK, _header(2)], "4 bytes of 'x' were to come"),
        ([_header(1), _CHUNK, _CHUNK], "a chunk that belongs to no tensor"),
        ([_DONE, _DONE], "after the end"),
        ([R()], "no kind that this version knows"),
    ],
    ids=["stray chunk", "done inside", "tensor inside", "extra chunk", "after the end", "no kind"],
)
def test_streams_out_of_order(stream: list[service_pb2.ExecuteResponse], message: str) -> None:
    """Events where they may not come are refused."""
    decoder = EventDecoder()
    for response in stream[:-1]:
        decoder.feed(response)
    with pytest.raises(ProtocolError, match=message):
        decoder.feed(stream[-1])


def test_a_stream_that_just_ends() -> None:
    """A stream without its last event is an error, not a short answer."""
    decoder = EventDecoder()
    assert decoder.feed(R(progress=events_pb2.ProgressEvent(passes_done=1, passes_total=2))) == Progress(1, 2)
    with pytest.raises(ProtocolError, match="ended before everything was sent"):
        decoder.finish()


def test_results_are_limited_in_sum() -> None:
    """A client's limit on results counts all tensors of a stream together, before each is allocated."""
    decoder = EventDecoder(max_result_bytes=6)
    decoder.feed(_header(1))
    decoder.feed(_CHUNK)
    with pytest.raises(LimitExceededError) as caught:
        decoder.feed(_header(1))
    assert caught.value.limit == "max_result_bytes"
