"""Golden bytes: a change of the wire format shows as a difference from committed files, never by surprise.

To add a vector, add it to `VECTORS` and run this module (``python -m tests.wire.test_vectors``), which writes files
that do not exist yet and never touches those that do: an old client's bytes must stay readable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf.message import Message

from patchbay.errors import ShapeError
from patchbay.ir.dtypes import bfloat16, float32, int64
from patchbay.ir.events import Cost, Done, ExecuteOptions, Progress, Queued, Started, TensorValue, Usage
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.testing import fake_card
from patchbay.v1 import card_pb2, events_pb2, graph_pb2, service_pb2
from patchbay.wire.cards import decode_card, encode_card
from patchbay.wire.events import EventDecoder, encode_event, encode_options
from patchbay.wire.graphs import decode_graph, encode_graph
from patchbay.wire.parse import parse, serialize
from patchbay.wire.status import encode_status

FOLDER = Path(__file__).parent.parent / "vectors"

#: Patches two heads of one run with those of another, steers by a constant, and sends back the five likeliest tokens.
GRAPH = Graph(
    runs=(
        Run(tokens=((1, 5, 9), (1, 7)), label="The capital of France is"),
        Run(tokens=((1, 5, 8),), label="Ümlaut"),
    ),
    nodes=(
        Node("site.read", attrs={"site": "blocks.2.attn.z"}, run=0),
        Node("const", attrs={"value": TensorData(int64, (2,), b"\x00" * 8 + b"\x03" + b"\x00" * 7)}),
        Node(
            "getitem",
            args=(0, 1),
            attrs={"index": (("ellipsis",), ("array", 0), ("slice", None, -1, 2), ("int", 3), ("newaxis",))},
        ),
        Node("const", attrs={"scalar": -2.5}),
        Node("mul", args=(2, 3)),
        Node("const", attrs={"value": TensorData(bfloat16, (1, 2), b"\x80\x3f\x00\xc0")}),
        Node(
            "site.write", args=(4, 1), attrs={"site": "blocks.2.attn.z", "mode": "add", "index": (("array", 0),)}, run=1
        ),
        Node("softmax", args=(0,), attrs={"axis": -1, "keepdims": False, "dtype": None, "name": "π"}),
    ),
    outputs=(Output("p", 7), Output("top", 4)),
)
#: As written by a server that knew no loops.
CARD = replace(fake_card(), limits=replace(fake_card().limits, max_loop_steps=0))
EVENTS = (
    Queued(2),
    Started(),
    Progress(1, 2),
    TensorValue("p", TensorData(float32, (2, 1), b"\x00\x00\x80\x3f\x00\x00\x80\x7f"), finite=False),
    Done(
        Usage(
            tokens=6,
            passes=2,
            layers_run=5,
            layers_skipped=3,
            nodes=8,
            nodes_run=7,
            queue_ms=0.5,
            run_ms=12.25,
            bytes_in=321,
            bytes_out=8,
            cost=Cost(flops=10**12, peak_bytes=4096, result_bytes=8, tokens=6, passes=2),
            saved={"dead_code": 1, "early_stop": 3},
        )
    ),
)
ERROR = ShapeError("matmul: [2, 3] and [4, 5] do not fit", node=7, related=(3, 5), field="nodes[7].args[1]")


def _request() -> service_pb2.ExecuteRequest:
    options = encode_options(ExecuteOptions(deterministic=True, disabled=("early_stop",), dry_run=True))
    return service_pb2.ExecuteRequest(
        model="models/demo", graph=encode_graph(GRAPH), options=options, request_id="9f0c"
    )


def _stream() -> bytes:
    """Length-prefixed messages of a whole answer."""
    messages = [serialize(m) for event in EVENTS for m in encode_event(event)]
    error = events_pb2.ErrorEvent(status=serialize(encode_status(ERROR)))
    messages.append(serialize(service_pb2.ExecuteResponse(error=error)))
    return b"".join(len(m).to_bytes(4, "little") + m for m in messages)


VECTORS: Mapping[str, Callable[[], Message | bytes]] = {
    "graph.bin": lambda: encode_graph(GRAPH),
    "card.bin": lambda: encode_card(CARD),
    "execute_request.bin": _request,
    "execute_stream.bin": _stream,
}


def _bytes(name: str) -> bytes:
    vector = VECTORS[name]()
    return vector if isinstance(vector, bytes) else serialize(vector)


@pytest.mark.parametrize("name", VECTORS)
def test_bytes_are_those_committed(name: str) -> None:
    """What is encoded today is, byte for byte, what was encoded when the vector was made."""
    assert _bytes(name) == (FOLDER / name).read_bytes()


def test_committed_graph_is_read() -> None:
    """The committed graph decodes to the graph it was made from."""
    assert decode_graph(parse(graph_pb2.Graph, (FOLDER / "graph.bin").read_bytes())) == GRAPH


def test_committed_card_is_read() -> None:
    """The committed card decodes to the card it was made from."""
    assert decode_card(parse(card_pb2.ModelCard, (FOLDER / "card.bin").read_bytes())) == CARD


def test_committed_stream_is_read() -> None:
    """The committed answer decodes to its events and ends in its error."""
    data, messages = (FOLDER / "execute_stream.bin").read_bytes(), []
    while data:
        size = int.from_bytes(data[:4], "little")
        messages.append(parse(service_pb2.ExecuteResponse, data[4 : 4 + size]))
        data = data[4 + size :]
    decoder = EventDecoder()
    assert tuple(map(decoder.feed, messages[:-1])) == EVENTS
    with pytest.raises(ShapeError, match="do not fit") as caught:
        decoder.feed(messages[-1])
    assert (caught.value.node, caught.value.related, caught.value.field) == (7, (3, 5), "nodes[7].args[1]")


if __name__ == "__main__":
    for vector_name in VECTORS:
        path = FOLDER / vector_name
        if path.exists():
            print(f"{path.name}: kept")
        else:
            path.write_bytes(_bytes(vector_name))
            print(f"{path.name}: written")
