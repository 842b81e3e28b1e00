"""Parsing at a bounded price."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay.errors import LimitExceededError, ProtocolError
from patchbay.ir.graph import Graph
from patchbay.v1 import graph_pb2, service_pb2
from patchbay.wire.graphs import encode_graph
from patchbay.wire.parse import UNCHECKED_BYTES, check_parsed_size, parse, serialize
from tests.wire import strategies as wire


def _field(number: int, payload: bytes) -> bytes:
    size, length = [], len(payload)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + payload


def _bombs(size: int) -> dict[str, bytes]:
    many = size // 2
    attr = b"\x0a\x00" * many  # AttrList.values, each empty
    node = _field(3, _field(1, b"a") + _field(2, _field(7, attr)))
    return {
        "nodes": _field(2, b"\x12\x00" * many),
        "runs": _field(2, b"\x0a\x00" * many),
        "outputs": _field(2, b"\x1a\x00" * many),
        "attributes": _field(2, _field(2, node)),
        "args": _field(2, _field(2, _field(2, bytes(size)))),
        "names": _field(3, b"\x12\x00" * many),
        "packed": _field(2, _field(1, _field(1, bytes(size)))),
    }


@pytest.mark.parametrize("kind", _bombs(2))
def test_bombs_are_refused_before_they_are_built(kind: str) -> None:
    """A few megabytes of tiny fields are refused by what they would become, in any part of a request."""
    data = _bombs(8 * 2**20)[kind]
    with pytest.raises(LimitExceededError) as caught:
        parse(service_pb2.ExecuteRequest, data, max_parsed_bytes=32 * 2**20)
    assert caught.value.limit == "max_parsed_bytes"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("kind", ["nodes", "attributes", "names", "packed", "args"])
def test_the_estimate_is_not_below_what_parsing_takes(kind: str) -> None:
    """The price put on a message is at least the memory that the parser then takes, measured in a fresh process."""
    code = f"""
from patchbay.v1 import service_pb2
from patchbay.wire.parse import check_parsed_size
from tests.wire.test_parse import _bombs
data = _bombs(4 * 2**20)[{kind!r}]
estimate = check_parsed_size(data, service_pb2.ExecuteRequest.DESCRIPTOR, 2**40)
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = rss()
message = service_pb2.ExecuteRequest.FromString(data)
print(estimate, rss() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    estimate, grown = map(int, done.stdout.split())
    assert grown > 2**20
    assert grown < estimate + 4 * 2**20


def test_a_large_constant_is_cheap() -> None:
    """The bytes of a tensor cost nothing extra, so a request may be large when its constants are."""
    graph = graph_pb2.Graph()
    graph.nodes.add(op="const").attrs["value"].tensor_value.data = bytes(16 * 2**20)
    data = serialize(graph)
    assert check_parsed_size(data, graph_pb2.Graph.DESCRIPTOR, 2**20) < 2_000
    assert parse(graph_pb2.Graph, data, max_parsed_bytes=2**20) == graph


@pytest.mark.parametrize("keep", [1, 10, 1_000, 500_000])
def test_truncated_large_messages(keep: int) -> None:
    """A large message cut anywhere is a ProtocolError."""
    graph = graph_pb2.Graph()
    for _ in range(30_000):
        graph.nodes.add(op="some.operation", args=[1, 2, 3])
    data = serialize(graph)
    assert len(data) > max(UNCHECKED_BYTES, keep + 1)
    with pytest.raises(ProtocolError):
        parse(graph_pb2.Graph, data[:-keep])


@pytest.mark.parametrize(
    "tail",
    [
        b"\x0b",
        b"\x0c",
        b"\x0e",
        b"\x80" * 20,
        b"\x09\x01",
        b"\x0d\x01",
        b"\x08",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
    ids=["group", "end group", "wire type 6", "endless", "cut fixed64", "cut fixed32", "cut varint", "exabytes"],
)
def test_malformed_fields_in_large_messages(tail: bytes) -> None:
    """Groups, endless numbers, cut fields and exabyte lengths are ProtocolErrors of the walk."""
    data = _field(15, bytes(UNCHECKED_BYTES)) + tail
    with pytest.raises(ProtocolError):
        parse(graph_pb2.Graph, data)


@given(wire.graphs())
def test_the_walk_accepts_what_the_parser_accepts(graph: Graph) -> None:
    """Every graph that we encode passes the walk, at a price within reason."""
    data = serialize(encode_graph(graph))
    assert check_parsed_size(data, graph_pb2.Graph.DESCRIPTOR, 2**30) <= 100 * len(data)


@given(st.binary(max_size=300))
def test_the_walk_never_fails_otherwise(data: bytes) -> None:
    """On random bytes the walk returns or raises one of our own errors."""
    outcome = None
    try:
        cost = check_parsed_size(data, service_pb2.ExecuteRequest.DESCRIPTOR, 2**30)
    except ProtocolError as error:
        outcome = error
    assert outcome is not None or 0 <= cost <= 100 * len(data)
