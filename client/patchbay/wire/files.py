"""A graph as the bytes of a file.

    magic  8 bytes  "\\x93PBGRAPH"
    schema 2 bytes  version of what follows, little-endian
    sizes  4 + 8    bytes of the header and of the graph, little-endian
    header          a msgpack tree: the model's name and revision, and what wrote the file
    graph           the wire message
    crc32  4 bytes  of everything before

Nothing in a file is trusted: sizes are compared with what is there before anything is built, and a field that this
version does not know is refused instead of dropped, since a graph without it would be another graph.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from patchbay._version import __version__
from patchbay.errors import ProtocolError
from patchbay.ir.graph import Graph
from patchbay.ir.limits import Limits
from patchbay.v1 import graph_pb2
from patchbay.wire.bounds import MAX_NAME_CHARS
from patchbay.wire.checksum import crc32
from patchbay.wire.graphs import decode_graph, encode_graph
from patchbay.wire.parse import parse, serialize
from patchbay.wire.trees import dumps, loads

MAGIC = b"\x93PBGRAPH"
#: Version of the files that are written; those of other versions are refused.
SCHEMA = 1
#: What protobuf can hold in one message.
MAX_FILE_BYTES = 2**31 - 1

_HEAD = struct.Struct("<8sHIQ")
_TAIL = struct.Struct("<I")


@dataclass(frozen=True)
class GraphFile:
    """What a file says.

    Attributes:
        graph: the graph.
        model: name of the model that it was made for; "" when unknown.
        revision: digest of that model's weights; "" when unknown.
        writer: version of Patchbay that wrote the file.
        schema: version of the file.
    """

    graph: Graph
    model: str = ""
    revision: str = ""
    writer: str = __version__
    schema: int = SCHEMA


def encode_file(graph: Graph, *, model: str = "", revision: str = "") -> bytes:
    """
    Raises:
        GraphError: a value that no message can hold.
        ProtocolError: the graph does not fit into a file.
    """
    header = dumps({"model": model, "revision": revision, "writer": __version__})
    body = serialize(encode_graph(graph))
    if len(header) + len(body) > MAX_FILE_BYTES - _HEAD.size - _TAIL.size:
        raise ProtocolError(f"a graph of {len(body)} bytes; a file holds at most {MAX_FILE_BYTES}")
    data = _HEAD.pack(MAGIC, SCHEMA, len(header), len(body)) + header + body
    return data + _TAIL.pack(crc32(data))


def decode_file(data: bytes, limits: Limits | None = None) -> GraphFile:
    """
    Args:
        data: the whole file.
        limits: what to hold the graph to; the defaults of `Limits` when None.

    Raises:
        ProtocolError: not such a file, damaged, or of a version that this one does not read.
        LimitExceededError: a graph beyond `limits`.
        GraphError: a reference to a node or run that does not exist yet.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ProtocolError("not a saved graph: it does not begin as one")
    if not _HEAD.size + _TAIL.size <= len(data) <= MAX_FILE_BYTES:
        raise ProtocolError(f"a saved graph of {len(data)} bytes is cut short, or larger than any")
    _, schema, header_size, body_size = _HEAD.unpack_from(data)
    if schema != SCHEMA:
        raise ProtocolError(f"a saved graph of schema {schema}; this version of Patchbay reads schema {SCHEMA}")
    if _HEAD.size + header_size + body_size + _TAIL.size != len(data):
        raise ProtocolError(f"a saved graph of {len(data)} bytes that announces another size")
    if _TAIL.unpack_from(data, len(data) - _TAIL.size)[0] != crc32(memoryview(data)[: -_TAIL.size]):
        raise ProtocolError("the saved graph is damaged (its checksum differs)")
    header = loads(data[_HEAD.size : _HEAD.size + header_size])
    keys = {"model", "revision", "writer"}
    if not isinstance(header, dict) or set(header) != keys:
        raise ProtocolError(f"header: a saved graph says its {', '.join(sorted(keys))}", field="header")
    facts: dict[str, str] = {}
    for key, value in header.items():
        if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
            raise ProtocolError(f"header.{key}: not a text of at most {MAX_NAME_CHARS} characters", field="header")
        facts[key] = value
    message = parse(graph_pb2.Graph, data[_HEAD.size + header_size : -_TAIL.size])
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        raise ProtocolError("the saved graph has fields that this version of Patchbay does not know", field="graph")
    return GraphFile(decode_graph(message, limits), schema=schema, **facts)
