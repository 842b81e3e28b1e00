"""Whatever the wire carries comes back equal, and equal things are the same bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from patchbay.ir.card import ModelCard
from patchbay.ir.events import Done, Event, ExecuteOptions, ModelSummary, TensorValue, TokenizedRow
from patchbay.ir.graph import Graph, TensorData
from patchbay.v1 import card_pb2, graph_pb2, service_pb2, tensor_pb2
from patchbay.wire.cards import decode_card, decode_summary, encode_card, encode_summary
from patchbay.wire.events import EventDecoder, decode_options, encode_event, encode_options
from patchbay.wire.graphs import decode_graph, encode_graph
from patchbay.wire.names import decode_model, encode_model
from patchbay.wire.parse import parse, serialize
from patchbay.wire.tensors import decode_tensor, encode_tensor
from patchbay.wire.tokens import decode_row, encode_row
from patchbay.wire.trees import dumps, loads
from tests.wire import strategies as wire


@given(wire.tensors())
def test_tensor(tensor: TensorData) -> None:
    """A tensor of any dtype and shape survives, and encodes to the same bytes again."""
    data = serialize(encode_tensor(tensor))
    back = decode_tensor(parse(tensor_pb2.Tensor, data), "tensor")
    assert back == tensor
    assert serialize(encode_tensor(back)) == data


@given(wire.graphs())
def test_graph(graph: Graph) -> None:
    """A graph survives with every attribute's exact Python type, and encodes to the same bytes again."""
    data = serialize(encode_graph(graph))
    back = decode_graph(parse(graph_pb2.Graph, data))
    assert back == graph
    assert [_types(tuple(n.attrs.values())) for n in back.nodes] == [
        _types(tuple(back_attrs[k] for k in n.attrs))
        for n, back_attrs in ((b, dict(g.attrs)) for b, g in zip(back.nodes, graph.nodes, strict=True))
    ]
    assert serialize(encode_graph(back)) == data


def _types(value: object) -> object:
    # True == 1 == 1.0, so equality alone would not notice a bool that came back as an int.
    return tuple(map(_types, value)) if isinstance(value, tuple) else type(value)


@given(wire.graphs(), st.randoms(use_true_random=False))
def test_graph_bytes_do_not_depend_on_the_order_of_attributes(graph: Graph, random: object) -> None:
    """Two equal graphs whose attributes were inserted in different orders are the same bytes."""
    shuffled = []
    for node in graph.nodes:
        items = list(node.attrs.items())
        random.shuffle(items)  # type: ignore[attr-defined]
        shuffled.append(type(node)(node.op, node.args, dict(items), node.run))
    other = Graph(graph.runs, tuple(shuffled), graph.outputs, graph.bodies)
    assert serialize(encode_graph(other)) == serialize(encode_graph(graph))


@given(wire.cards)
def test_card(card: ModelCard) -> None:
    """A card survives, absent sites and limits included."""
    data = serialize(encode_card(card))
    back = decode_card(parse(card_pb2.ModelCard, data))
    assert back == card
    assert serialize(encode_card(back)) == data


@given(wire.summaries)
def test_summary(summary: ModelSummary) -> None:
    """A line of ListModels survives."""
    assert decode_summary(encode_summary(summary), "models[0]") == summary


@given(wire.rows())
def test_tokenized_row(row: TokenizedRow) -> None:
    """A tokenized text survives."""
    assert decode_row(encode_row(row), "texts[0]") == row


@given(wire.options)
def test_options(options: ExecuteOptions) -> None:
    """Options survive."""
    assert decode_options(encode_options(options)) == options


@given(wire.model_names)
def test_model_name(name: str) -> None:
    """A model's name survives becoming a resource name."""
    assert decode_model(encode_model(name), "name") == name


@given(wire.trees)
def test_tree(tree: object) -> None:
    """A tree survives, with tuples still tuples and lists still lists, and packs to the same bytes again."""
    data = dumps(tree)  # type: ignore[arg-type]
    back = loads(data)
    assert back == tree
    assert repr(back) == repr(tree)
    assert dumps(back) == data


@given(st.lists(wire.events.filter(lambda e: not isinstance(e, Done)), max_size=4), wire.usages)
def test_events(events: list[Event], usage: object) -> None:
    """A stream of events survives, in order."""
    stream = [*events, Done(usage)]  # type: ignore[arg-type]
    decoder = EventDecoder()
    back = [decoder.feed(parse(service_pb2.ExecuteResponse, serialize(m))) for e in stream for m in encode_event(e)]
    decoder.finish()
    assert back == stream


@given(wire.tensors(), st.integers(1, 97), st.booleans())
def test_large_tensors_in_chunks_of_any_size(tensor: TensorData, chunk_bytes: int, finite: bool) -> None:
    """A tensor cut into chunks of any size is put together to the same bytes."""
    from patchbay.v1 import events_pb2
    from patchbay.wire.tensors import chunk_offsets, encode_header, fill_chunk

    decoder = EventDecoder()
    header = events_pb2.TensorEvent(name="x", header=encode_header(tensor), finite=finite)
    messages = [service_pb2.ExecuteResponse(tensor=header)]
    for offset in chunk_offsets(tensor, chunk_bytes):
        messages.append(service_pb2.ExecuteResponse())
        fill_chunk(messages[-1].chunk, tensor, offset, chunk_bytes)
    back = [decoder.feed(message) for message in messages]
    assert back[:-1] == [None] * (len(messages) - 1)
    assert back[-1] == TensorValue("x", tensor, finite)
