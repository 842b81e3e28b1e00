"""msgpack trees with every limit set."""

from __future__ import annotations

import msgpack
import pytest

from patchbay.errors import ProtocolError
from patchbay.wire.bounds import MAX_TREE_BYTES, MAX_TREE_DEPTH
from patchbay.wire.trees import TUPLE_KEY, dumps, loads


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xa2\xff\xfe",
        b"\xc4\x01a",
        b"\xc7\x01\x05a",
        b"\xd4\x01\x00",
        msgpack.packb(msgpack.Timestamp(1)),
        b"\x81\x01\x02",
        b"\x81\xc0\x02",
        b"\x91" * 40 + b"\xc0",
        b"\x91" * 100_000,
        msgpack.packb({TUPLE_KEY: 1}),
        msgpack.packb({TUPLE_KEY: [], "more": 1}),
        bytes(MAX_TREE_BYTES + 1),
    ],
    ids=[
        "empty",
        "reserved byte",
        "truncated",
        "trailing bytes",
        "array of 4 billion",
        "map of 4 billion",
        "string of 4 GB",
        "not UTF-8",
        "bytes",
        "extension",
        "fixed extension",
        "timestamp",
        "int key",
        "nil key",
        "too deep",
        "far too deep",
        "tuple of no list",
        "tuple with more",
        "too large",
    ],
)
def test_hostile_trees_are_refused(data: bytes) -> None:
    """Malformed, deep, huge, binary and extended msgpack becomes a ProtocolError."""
    with pytest.raises(ProtocolError):
        loads(data)


@pytest.mark.parametrize(
    "tree",
    [{1: 2}, {"a": b"bytes"}, object(), 2**70, "\ud800", {TUPLE_KEY: 1}, 1j, {"x": {1, 2}}],
    ids=["int key", "bytes", "object", "huge int", "surrogate", "reserved key", "complex", "set"],
)
def test_what_a_tree_does_not_hold_is_refused_when_written(tree: object) -> None:
    """Anything but lists, dicts with text keys, tuples, text, numbers and None is refused on the way out."""
    with pytest.raises(ProtocolError):
        dumps(tree)  # type: ignore[arg-type]


def test_depth_is_limited_both_ways() -> None:
    """A tree of the greatest depth passes; one deeper is refused by writer and reader alike."""
    tree: list[object] = []
    for _ in range(MAX_TREE_DEPTH):
        tree = [tree]
    assert loads(dumps(tree)) == tree  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="nests more than"):
        dumps([tree])  # type: ignore[list-item]
    with pytest.raises(ProtocolError, match="nests more than"):
        loads(b"\x91" * (MAX_TREE_DEPTH + 1) + b"\x90")
