"""Hostile requests against a real server in a process of its own: a typed error each, and nothing else happens.

After every test the server must still answer a good request with the very same bytes as before the first one, and its
memory must not have grown by more than `MAX_GROWTH_BYTES` at any time, the largest request (32 MiB) included.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import sys
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import msgpack
import pytest

from patchbay.errors import (
    DTypeError,
    GraphError,
    IndexOutOfRangeError,
    LimitExceededError,
    NotFoundError,
    PatchbayError,
    ProtocolError,
    ResourceExhaustedError,
    ServiceError,
    ShapeError,
    SiteNotWritableError,
    UnauthenticatedError,
    UnknownOpError,
    UnknownSiteError,
)
from patchbay.ir.bodies import Body
from patchbay.ir.dtypes import bool_, float32, float64, int64
from patchbay.ir.events import Done, Event, ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.ir.ops.spec import TensorSpec
from patchbay.v1 import graph_pb2, service_pb2
from patchbay.wire.events import EventDecoder
from patchbay.wire.graphs import encode_graph
from patchbay.wire.parse import parse, serialize
from patchbay.wire.status import decode_status, service_error
from tests.e2e.victim import GOOD, READ, TOKENS, Victim, connection, execute, good, unharmed, victim
from tests.wire.hostile_server import KEY, MAX_REQUEST_BYTES

__all__ = ["unharmed", "victim"]  # fixtures

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc"),
    pytest.mark.timeout(120),
]

EXECUTE = "/patchbay.v1.PatchbayService/Execute"
R, N, O = TOKENS, Node, Output  # noqa: E741


async def _raw(victim: Victim, data: bytes, metadata: Sequence[tuple[str, Any]] | None = None) -> list[Event]:
    """Send bytes as an Execute request; events, or the error that came back."""
    if metadata is None:
        metadata = (("authorization", f"Bearer {KEY}"),)
    decoder, events = EventDecoder(), []
    async with grpc.aio.insecure_channel(victim.address) as channel:
        call = channel.unary_stream(EXECUTE)(data, metadata=metadata, timeout=60)
        try:
            async for answer in call:
                event = decoder.feed(parse(service_pb2.ExecuteResponse, answer))
                if event is not None:
                    events.append(event)
        except grpc.aio.AioRpcError as error:
            for key, value in error.trailing_metadata() or ():
                if key == "grpc-status-details-bin":
                    raise decode_status(value) from None
            raise service_error(error.code().name, error.details() or "") from None
    decoder.finish()
    return events


def _request(graph: graph_pb2.Graph | None = None, **fields: Any) -> bytes:
    return serialize(service_pb2.ExecuteRequest(**({"model": "models/tiny", "graph": graph} | fields)))


def _outputs(*nodes: Node, runs: tuple[Run, ...] = (R,)) -> Graph:
    """A graph of `nodes` that sends back the last one."""
    return Graph(runs=runs, nodes=nodes, outputs=(O("x", len(nodes) - 1),))


def _zeros(*shape: int) -> TensorData:
    return TensorData(float32, shape, bytes(4 * math.prod(shape)))


def _const(tensor: TensorData) -> Node:
    return N("const", attrs={"value": tensor})


# --- graphs that are too large ------------------------------------------------------------------------------------

BIG = 2**40
ROW = _const(_zeros(4_000))

_VECTOR = TensorSpec((4_000,), float32)


def _loop(length: int, *bodies: Body) -> Graph:
    """A scan of the last body."""
    attrs = {"body": len(bodies) - 1, "length": length, "carry": 1, "xs": 0}
    nodes = (ROW, N("scan", (0,), attrs), N("item", (1,), {"index": 0}))
    return Graph(nodes=nodes, outputs=(O("x", 2),), bodies=bodies)


def _nested_loops(depth: int, length: int) -> tuple[Body, ...]:
    """Each loops over the one before."""
    bodies = [Body((_VECTOR,), (N("add", (0, 0)),), (1,), (_VECTOR,))]
    for level in range(depth):
        scan = N("scan", (0,), {"body": level, "length": length, "carry": 1, "xs": 0})
        bodies.append(Body((_VECTOR,), (scan, N("item", (1,), {"index": 0})), (2,), (_VECTOR,)))
    return tuple(bodies)


HUGE: dict[str, Graph] = {
    "a loop of a billion steps": _loop(10**9, *_nested_loops(0, 0)),
    "loops in loops": _loop(10_000, *_nested_loops(6, 10_000)),
    "a body of 100,000 nodes": _loop(1, Body((_VECTOR,), (N("add", (0, 0)),) * 100_000, (1,), (_VECTOR,))),
    "100,000 bodies": _loop(1, *_nested_loops(0, 0) * 100_000),
    "a step that makes a terabyte": _loop(
        1,
        Body(
            (_VECTOR,),
            (N("outer", (0, 0)), N("outer", (0, 0)), N("matmul", (1, 2)), N("sum", (3,)), N("add", (0, 4))),
            (5,),
            (_VECTOR,),
        ),
    ),
    "expand": _outputs(_const(_zeros(1)), N("broadcast_to", (0,), {"shape": (BIG,)})),
    "expand, then sum": _outputs(
        _const(_zeros(1)), N("broadcast_to", (0,), {"shape": (2**20, 2**20)}), N("exp", (1,)), N("sum", (2,))
    ),
    "repeat": _outputs(ROW, N("repeat", (0,), {"repeats": BIG})),
    "tile": _outputs(ROW, N("tile", (0,), {"repetitions": (2**20, 2**20)})),
    "outer": _outputs(ROW, N("outer", (0, 0)), N("outer", (0, 0)), N("add", (1, 2))),
    "outer by broadcasting": _outputs(
        ROW,
        N("expand_dims", (0,), {"axis": 1}),
        N("multiply", (0, 1)),
        N("expand_dims", (2,), {"axis": 2}),
        N("multiply", (3, 0)),
        N("sum", (4,)),
    ),
    "einsum": _outputs(ROW, N("einsum", (0, 0, 0), {"equation": "a,b,c->abc"}), N("sum", (1,))),
    "matmul": _outputs(_const(_zeros(2_000, 2)), N("matrix_transpose", (0,)), N("matmul", (0, 1)), N("matmul", (2, 2))),
    "gram, then sum": _outputs(
        _const(_zeros(10_000, 1)), N("matrix_transpose", (0,)), N("matmul", (0, 1)), N("sum", (2,))
    ),
    "doubling": _outputs(ROW, *(N("concat", (i, i)) for i in range(40))),
    "one_hot": _outputs(_const(TensorData(int64, (1,), bytes(8))), N("one_hot", (0,), {"num_classes": BIG})),
    "zeros": _outputs(N("zeros", attrs={"shape": (BIG,)})),
    "arange": _outputs(N("arange", attrs={"start": 0, "stop": BIG})),
    "eye": _outputs(N("eye", attrs={"n_rows": 2**24})),
    "linspace": _outputs(N("linspace", attrs={"start": 0.0, "stop": 1.0, "num": BIG})),
    "pad": _outputs(ROW, N("pad", (0,), {"pad": (0, BIG)})),
    "many live values": _outputs(
        *(N("ones", attrs={"shape": (2**20,), "dtype": "float32"}) for _ in range(40)),
        *(N("add", (i, 40 + i - 1 if i else 0)) for i in range(40)),
    ),
    "results": Graph(nodes=(N("ones", attrs={"shape": (2**20,)}),), outputs=tuple(O(f"x{i}", 0) for i in range(100))),
    "constants": _outputs(_const(_zeros(5 * 2**20))),
    "tokens": _outputs(READ, runs=(Run(((2,) * 60,) * 60),)),
    "rows": _outputs(READ, runs=(Run(((2,),) * 65),)),
    "runs": _outputs(READ, runs=(R,) * 65),
    "100,000 nodes": Graph(nodes=(N("const", attrs={"scalar": 1.0}),) * 100_000),
    "100,000 arguments": _outputs(ROW, *(N("concat", (0,) * 20_000) for _ in range(40))),
    "100,000 outputs": Graph(nodes=(ROW,), outputs=tuple(O(str(i), 0) for i in range(100_000))),
}


@pytest.mark.parametrize("name", HUGE)
async def test_too_large(victim: Victim, name: str) -> None:
    """A small request that would need a lot is refused from its static shapes, naming the limit."""
    with pytest.raises(LimitExceededError) as caught:
        await execute(victim, HUGE[name])
    assert caught.value.limit
    assert caught.value.limit in str(caught.value)
    assert caught.value.requested > caught.value.allowed > 0


@pytest.mark.parametrize(
    "attrs",
    [
        {"shape": (2**62, 2**62)},
        {"shape": (2**63 - 1,)},
        {"shape": (0, 2**63 - 1)},
        {"shape": (-1,)},
        {"shape": (1,) * 100},
    ],
    ids=["2^124", "2^63", "zero times 2^63", "negative", "100 axes"],
)
async def test_shapes_beyond_machines(victim: Victim, attrs: dict[str, Any]) -> None:
    """Extents whose product overflows, negative ones, and a hundred axes are GraphErrors of that node."""
    with pytest.raises(GraphError) as caught:
        await execute(victim, _outputs(N("zeros", attrs=attrs)))
    assert caught.value.node == 0


async def test_a_long_chain_that_is_allowed(victim: Victim) -> None:
    """Ten thousand nodes in a row are no hazard: the depth of a graph is not the depth of any stack."""
    chain = [_const(_zeros(2)), N("const", attrs={"scalar": 1.0})]
    chain += [N("add", (i + 1 if i else 0, 1)) for i in range(10_000)]
    events = await execute(victim, _outputs(*chain))
    (value,) = (e.value for e in events if isinstance(e, TensorValue))
    assert memoryview(bytes(value.data)).cast("f").tolist() == [10_000.0] * 2


# --- graphs that are wrong ----------------------------------------------------------------------------------------

_INTS = _const(TensorData(int64, (2,), (7).to_bytes(8, "little") + (-9).to_bytes(8, "little", signed=True)))

WRONG: dict[str, tuple[Graph, type[GraphError]]] = {
    "a body that uses itself": (_loop(1, _nested_loops(1, 1)[1]), GraphError),
    "bodies too deep": (_loop(1, *_nested_loops(30, 1)), GraphError),
    "a body of no number": (_loop(1), GraphError),
    "a site in a body": (_loop(1, Body((_VECTOR,), (READ,), (0,), (_VECTOR,))), GraphError),
    "a body that announces something else": (
        _loop(1, Body((_VECTOR,), (N("sum", (0,)),), (1,), (_VECTOR,))),
        ShapeError,
    ),
    "a loop that goes backwards": (_loop(-1, *_nested_loops(0, 0)), GraphError),
    "cycle": (_outputs(N("add", (0, 0))), GraphError),
    "forward reference": (_outputs(N("add", (1, 1)), ROW), GraphError),
    "negative reference": (_outputs(ROW, N("exp", (-1,))), GraphError),
    "no such run": (_outputs(N("site.read", attrs={"site": "embed"}, run=3)), GraphError),
    "pure operation in a run": (_outputs(ROW, N("exp", (0,), run=0)), GraphError),
    "read without a run": (_outputs(N("site.read", attrs={"site": "embed"})), GraphError),
    "unknown operation": (_outputs(N("__import__('os').system('true')")), UnknownOpError),
    "unknown site": (_outputs(N("site.read", attrs={"site": "blocks.0.__class__"}, run=0)), UnknownSiteError),
    "path as a site": (_outputs(N("site.read", attrs={"site": "module:../../etc.output"}, run=0)), UnknownSiteError),
    "unknown callable": (_outputs(READ, N("call", (0,), {"target": "__del__"})), UnknownSiteError),
    "unknown attribute": (_outputs(ROW, N("exp", (0,), {"out": 0})), GraphError),
    "attribute of another kind": (_outputs(ROW, N("sum", (0,), {"axis": "x"})), GraphError),
    "shapes that do not fit": (_outputs(ROW, _const(_zeros(3)), N("add", (0, 1))), ShapeError),
    "dtypes that do not fit": (_outputs(_INTS, N("softmax", (0,))), DTypeError),
    "mask as an index": (
        _outputs(
            _const(_zeros(1)),
            _const(TensorData(bool_, (1,), b"\x01")),
            N("getitem", (0, 1), {"index": (("array", 0),)}),
        ),
        DTypeError,
    ),
    "gather out of range": (
        _outputs(ROW, _const(TensorData(int64, (1,), (2**62).to_bytes(8, "little"))), N("take", (0, 1))),
        IndexOutOfRangeError,
    ),
    "negative gather out of range": (
        _outputs(_const(_zeros(8)), _INTS, N("getitem", (0, 1), {"index": (("array", 0),)})),
        IndexOutOfRangeError,
    ),
    "embedding out of range": (_outputs(_INTS, _const(_zeros(4, 4)), N("embedding", (0, 1))), IndexOutOfRangeError),
    "write out of range": (
        Graph(
            runs=(R,),
            nodes=(
                _const(_zeros(1)),
                _const(TensorData(int64, (1,), (99).to_bytes(8, "little"))),
                N("site.write", (0, 1), {"site": "embed", "index": (("ellipsis",), ("array", 0))}, run=0),
                READ,
            ),
            outputs=(O("x", 3),),
        ),
        IndexOutOfRangeError,
    ),
    "write of another shape": (
        Graph(runs=(R,), nodes=(ROW, N("site.write", (0,), {"site": "embed"}, run=0), READ), outputs=(O("x", 2),)),
        ShapeError,
    ),
    "write as an output": (
        _outputs(_const(_zeros(1)), N("site.write", (0,), {"site": "embed"}, run=0)),
        GraphError,
    ),
    "token beyond the vocabulary": (_outputs(READ, runs=(Run(((10**6,),)),)), GraphError),
    "negative token": (_outputs(READ, runs=(Run(((-1,),)),)), GraphError),
    "huge token": (_outputs(READ, runs=(Run(((2**63 - 1,),)),)), GraphError),
    "empty row": (_outputs(READ, runs=(Run(((),)),)), GraphError),
    "no rows": (_outputs(READ, runs=(Run(()),)), GraphError),
    "row beyond the context": (_outputs(READ, runs=(Run(((2,) * 65,)),)), GraphError),
    "einsum of nonsense": (_outputs(ROW, N("einsum", (0,), {"equation": "a->" + "b" * 1_000})), GraphError),
    "einsum of many operands": (_outputs(ROW, N("einsum", (0,) * 52, {"equation": ",".join("a" * 52)})), GraphError),
    "slice with a negative step": (
        _outputs(ROW, N("getitem", (0,), {"index": (("slice", None, None, -1),)})),
        GraphError,
    ),
    "index of nonsense": (_outputs(ROW, N("getitem", (0,), {"index": (("import", "os"),)})), GraphError),
    "two ellipses": (_outputs(ROW, N("getitem", (0,), {"index": (("ellipsis",), ("ellipsis",))})), GraphError),
    "later site into an earlier one": (
        Graph(
            runs=(R,),
            nodes=(READ, N("site.write", (0,), {"site": "blocks.0.resid_pre"}, run=0)),
            outputs=(O("x", 0),),
        ),
        GraphError,
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong(victim: Victim, name: str) -> None:
    """A graph that breaks a rule is refused with the most specific error."""
    graph, expected = WRONG[name]
    with pytest.raises(expected) as caught:
        await execute(victim, graph)
    assert not isinstance(caught.value, LimitExceededError)


async def test_read_only_sites(victim: Victim) -> None:
    """Where the card names a site that cannot be written, writing it is refused."""
    async with connection(victim.address) as transport:
        card = await transport.get_model("tiny")
    locked = [site.name for site in card.sites if not site.writable and site.absent is None]
    for name in locked[:1]:
        nodes = (_const(_zeros(1)), N("site.write", (0,), {"site": name}, run=0), READ)
        with pytest.raises(SiteNotWritableError):
            await execute(victim, Graph((R,), nodes, (O("x", 2),)))
    assert any(site.writable for site in card.sites)


@pytest.mark.parametrize(
    "bits", [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"], ids=["nan", "inf", "-inf"]
)
async def test_nan_and_infinity_are_values(victim: Victim, bits: bytes) -> None:
    """NaN and infinity written into a forward come back marked as not finite, and poison nobody else."""
    nodes = (
        _const(TensorData(float32, (1,), bits)),
        N("site.write", (0,), {"site": "blocks.0.resid_post"}, run=0),
        READ,
    )
    both = Graph((R, R), (*nodes, N("site.read", attrs=READ.attrs, run=1)), (O("bad", 2), O("good", 3)))
    options = ExecuteOptions(deterministic=True)  # rows that share a forward may differ in the last bit
    values = {e.name: e for e in await execute(victim, both, options) if isinstance(e, TensorValue)}
    assert not values["bad"].finite
    assert values["good"].finite
    assert bytes(values["good"].value.data) == bytes(victim.expected[0].value.data)


@pytest.mark.parametrize("value", [1e308, 1.0])
async def test_double_constants(victim: Victim, value: float) -> None:
    """A float64 constant that overflows float32 is an infinity or an error of ours, never a crash."""
    import struct

    nodes = (
        _const(TensorData(float64, (1,), struct.pack("<d", value))),
        N("site.write", (0,), {"site": "blocks.0.resid_post"}, run=0),
        READ,
    )
    outcome: object
    try:
        outcome = await execute(victim, Graph((R,), nodes, (O("x", 2),)))
    except GraphError as error:
        outcome = error
    assert outcome


# --- requests that are no requests --------------------------------------------------------------------------------


def _nested(depth: int) -> bytes:
    data = b"\x18\x01"
    for _ in range(depth):
        for key in (0x0A, 0x3A):  # AttrList.values, Attr.list_value
            size, length = b"", len(data)
            while length > 127:
                size, length = size + bytes([length & 127 | 128]), length >> 7
            data = bytes([key]) + size + bytes([length]) + data
    return data


def _deep(depth: int) -> bytes:
    graph = graph_pb2.Graph()
    attr = graph.nodes.add(op="x").attrs["a"]
    attr.ParseFromString(_nested(min(depth, 40)))
    data = _request(graph)
    if depth > 40:  # deeper than protobuf itself can build: spliced in as bytes

        def field(number: int, payload: bytes) -> bytes:
            size, length = b"", len(payload)
            while length > 127:
                size, length = size + bytes([length & 127 | 128]), length >> 7
            return bytes([number << 3 | 2]) + size + bytes([length]) + payload

        data = field(2, field(2, field(3, field(1, b"a") + field(2, _nested(depth)))))
    return data


GOOD_BYTES = serialize(service_pb2.ExecuteRequest(model="models/tiny", graph=encode_graph(GOOD)))
_ATTRIBUTE = b"a" * 4

GARBAGE: dict[str, bytes] = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(1_000),
    "ones": b"\xff" * 1_000,
    "truncated": GOOD_BYTES[:-3],
    "pickle": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
    "msgpack": msgpack.packb({"graph": [1] * 100}),
    "not UTF-8": GOOD_BYTES.replace(b"tiny", b"\xff\xfe\xfd\xfc"),
    "lists 20 deep": _deep(20),
    "lists 40 deep": _deep(40),
    "lists 10,000 deep": _deep(10_000),
    "attribute of no kind": _request(graph_pb2.Graph(nodes=[graph_pb2.Node(op="x", attrs={"a": graph_pb2.Attr()})])),
    "unknown dtype": _request(
        graph_pb2.Graph(nodes=[graph_pb2.Node(op="x", attrs={"a": {"tensor_value": {"element_type": 99}}})])
    ),
    "negative shape": _request(
        graph_pb2.Graph(
            nodes=[graph_pb2.Node(op="x", attrs={"a": {"tensor_value": {"element_type": 11, "shape": [-1]}}})]
        )
    ),
    "lying length": _request(
        graph_pb2.Graph(
            nodes=[
                graph_pb2.Node(
                    op="x", attrs={"a": {"tensor_value": {"element_type": 11, "shape": [2**20], "data": b"1234"}}}
                )
            ]
        )
    ),
    "name that is a path": _request(None, model="models/../../etc/passwd"),
    "no name": _request(None, model=""),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage(victim: Victim, name: str) -> None:
    """Bytes that are no request, or one that contradicts itself, are a ProtocolError."""
    with pytest.raises(ProtocolError):
        await _raw(victim, GARBAGE[name])


BOMB_BYTES = 24 * 2**20


@pytest.mark.parametrize("kind", ["nodes", "runs", "outputs", "attributes", "args", "names", "packed"])
async def test_bombs(victim: Victim, kind: str) -> None:
    """Twenty-four megabytes of empty parts, which a parser would turn into a gigabyte, are refused unparsed."""
    from tests.wire.test_parse import _bombs

    with pytest.raises(LimitExceededError) as caught:
        await _raw(victim, _bombs(BOMB_BYTES)[kind])
    assert caught.value.limit == "max_parsed_bytes"


@pytest.mark.parametrize("kind", ["nodes", "names"])
async def test_bombs_of_strangers(victim: Victim, kind: str) -> None:
    """Without a key not even the bomb is looked at."""
    from tests.wire.test_parse import _bombs

    with pytest.raises(UnauthenticatedError):
        await _raw(victim, _bombs(BOMB_BYTES)[kind], ())


async def test_oversized(victim: Victim) -> None:
    """A request above max_request_bytes is refused on arrival."""
    with pytest.raises((ResourceExhaustedError, LimitExceededError)):
        await _raw(victim, bytes(MAX_REQUEST_BYTES + 1))


async def test_large_requests_at_once(victim: Victim) -> None:
    """Memory stays bounded when large refused requests come together."""
    graph = _outputs(_const(_zeros(5 * 2**20)))
    outcomes = await asyncio.gather(*(execute(victim, graph) for _ in range(4)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {LimitExceededError}


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong"),),
        (("authorization", ""),),
        (("authorization", f"Bearer {KEY}"), ("authorization", "Bearer wrong")),
        (("authorization", f"Basic {KEY}"),),
        (("authorization-bin", f"Bearer {KEY}".encode()),),
        (("authorization", "Bearer " + "x" * 4_000),),
        (("x", "y" * 1_000),) * 10,
        (("garbage-bin", bytes(range(256))), ("application", "' OR 1=1 --")),
    ],
    ids=["none", "wrong", "empty", "two", "basic", "binary", "long", "padding", "garbage"],
)
async def test_strangers(victim: Victim, metadata: tuple[tuple[str, Any], ...]) -> None:
    """No key, a wrong one, two at once, or garbage in its place is UNAUTHENTICATED."""
    with pytest.raises(UnauthenticatedError, match="PATCHBAY_API_KEY"):
        await _raw(victim, GOOD_BYTES, metadata)


async def test_headers_without_end(victim: Victim) -> None:
    """A hundred kilobytes of headers are refused by the server's HTTP/2 layer, as a service error."""
    with pytest.raises(ServiceError):
        await _raw(victim, GOOD_BYTES, (("authorization", f"Bearer {KEY}"), ("x", "y" * 100_000)))


async def test_garbage_metadata_beside_a_good_key(victim: Victim) -> None:
    """Metadata that nobody asked for is ignored."""
    metadata = (("authorization", f"Bearer {KEY}"), ("application", "nope"), ("x-bin", bytes(range(256))))
    assert isinstance((await _raw(victim, GOOD_BYTES, metadata))[-1], Done)


@pytest.mark.parametrize("model", ["nope", "TINY", "tiny.", "a/tiny"])
async def test_unknown_models(victim: Victim, model: str) -> None:
    """A model that is not there is NOT_FOUND."""
    with pytest.raises(NotFoundError):
        await _raw(victim, _request(encode_graph(GOOD), model=f"models/{model}"))


async def test_tokenize_of_nonsense(victim: Victim) -> None:
    """Control characters, unpaired marks, long words and no text at all are tokenized or refused, never fatal."""
    texts = ["", "\x00", "\u202e" * 100, "a" * 100_000, "👩‍👩‍👧‍👦" * 100, " " * 10_000]
    async with connection(victim.address) as transport:
        rows = await transport.tokenize("tiny", texts)
        assert [len(row.ids) == len(row.strings) for row in rows] == [True] * len(texts)
        with pytest.raises(LimitExceededError):
            await transport.tokenize("tiny", ["a"] * 100_000)
        with pytest.raises(ProtocolError):
            await transport.tokenize("tiny", ["\ud800"])


async def test_mutations_of_a_good_request(victim: Victim) -> None:
    """Five hundred requests with random bytes changed, cut or repeated run or fail with errors of ours."""
    rng = random.Random(20240917)
    outcomes: dict[str, int] = {}
    metadata = (("authorization", f"Bearer {KEY}"),)
    async with grpc.aio.insecure_channel(victim.address) as channel:
        for _ in range(500):
            data = bytearray(GOOD_BYTES)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                match rng.randrange(4):
                    case 0:
                        data[at] = rng.randrange(256)
                    case 1:
                        del data[at : at + rng.randint(1, 8)]
                    case 2:
                        data[at:at] = data[at : at + rng.randint(1, 16)]
                    case _:
                        data[at] ^= 1 << rng.randrange(8)
                data = data or bytearray(b"\x00")
            decoder = EventDecoder()
            outcome = "ran"
            try:
                async for answer in channel.unary_stream(EXECUTE)(bytes(data), metadata=metadata, timeout=60):
                    decoder.feed(parse(service_pb2.ExecuteResponse, answer))
            except PatchbayError as error:
                outcome = type(error).__name__
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == 500
    assert outcomes["ProtocolError"] > 50
    assert "InternalServerError" not in outcomes


async def test_cancelled_calls(victim: Victim) -> None:
    """Forty calls that are dropped at their first event leave nothing behind."""
    async with connection(victim.address) as transport:

        async def drop() -> Event:
            async with aclosing(transport.execute("tiny", GOOD, ExecuteOptions(), timeout_s=60)) as events:  # type: ignore[type-var]
                return await anext(events)

        assert all(await asyncio.gather(*(drop() for _ in range(30))))


async def test_other_protocols_on_the_port(victim: Victim) -> None:
    """HTTP/1, TLS and random bytes on the port, and connections that say nothing, are dropped or ignored."""
    host, port = victim.address.split(":")
    rng = random.Random(1)
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        rng.randbytes(10_000),
        b"PRI * HTTP/2.0\r\n\r\n",
    ):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(data)
    assert isinstance((await good(victim.address))[-1], Done)
    for connection in silent:
        connection.close()


async def test_the_log_knows_no_keys(victim: Victim) -> None:
    """After all of this the server's log holds no key and no token of a user's text."""
    assert KEY not in victim.log.read_text()
