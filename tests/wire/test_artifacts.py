"""Artifacts as messages: they come back as they were, and nothing malformed is taken."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given

from patchbay.errors import InvalidRequestError, LimitExceededError, NotFoundError, ProtocolError
from patchbay.ir.artifacts import ArtifactInfo, digest_of, not_there
from patchbay.ir.dtypes import bool_, float32
from patchbay.ir.graph import TensorData
from patchbay.v1 import artifact_pb2
from patchbay.wire.artifacts import (
    ArtifactDecoder,
    decode_artifact,
    decode_put_header,
    encode_artifact,
    encode_digest,
    encode_get,
    encode_put,
)
from patchbay.wire.parse import parse, serialize
from patchbay.wire.status import encode_status
from patchbay.wire.tensors import ChunkOrder
from tests.wire import strategies as wire

DIGEST = "sha256:" + "0" * 64


def announced(tensor: TensorData, name: str = "") -> ArtifactInfo:
    return ArtifactInfo(digest_of(tensor), tensor.dtype, tensor.shape, tensor.nbytes, name)


@given(wire.artifacts())
def test_what_is_known_of_one_survives(info: ArtifactInfo) -> None:
    """Digest, form, name and times."""
    assert decode_artifact(parse(artifact_pb2.Artifact, serialize(encode_artifact(info))), "a") == info


@given(wire.tensors(), wire.texts)
def test_uploads_survive(tensor: TensorData, name: str) -> None:
    """A header and chunks, put together again."""
    parts = [
        parse(artifact_pb2.PutArtifactRequest, serialize(p)) for p in encode_put(announced(tensor, name), tensor, True)
    ]
    info, automatic = decode_put_header(parts[0].header)
    order = ChunkOrder(info.dtype, info.nbytes, "chunk")
    data = b"".join(bytes(order.take(part.chunk)) for part in parts[1:])
    assert (info, automatic, data) == (announced(tensor, name), True, bytes(tensor.data))
    assert order.missing_bytes == 0
    assert len(list(encode_put(announced(tensor, name), tensor, False, known=True))) == 1


@given(wire.tensors())
def test_downloads_survive(tensor: TensorData) -> None:
    """What is handed out in chunks is the tensor."""
    decoder = ArtifactDecoder(2**20)
    for part in encode_get(announced(tensor), tensor):
        decoder.feed(parse(artifact_pb2.GetArtifactResponse, serialize(part)))
    info, back = decoder.finish()
    assert info == announced(tensor)
    assert (back.dtype, back.shape, bytes(back.data)) == (tensor.dtype, tensor.shape, bytes(tensor.data))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "artifacts/"),
        ("name", "artifacts/" + "A" * 64),
        ("name", "artifacts/" + "0" * 64 + "/.."),
        ("name", "models/" + "0" * 64),
        ("display_name", "x" * 2_000),
        ("element_type", 0),
        ("element_type", 77),
        ("size_bytes", 13),
        ("size_bytes", -12),
    ],
)
def test_a_malformed_artifact_is_refused(field: str, value: Any) -> None:
    """Names that are no digests, unknown types, sizes that do not fit the shape."""
    message = encode_artifact(ArtifactInfo(DIGEST, float32, (3,), 12))
    setattr(message, field, value)
    with pytest.raises(ProtocolError):
        decode_artifact(message, "a")


def test_names_that_cannot_be_sent_are_said_here() -> None:
    """A digest that is none, and a name that UTF-8 cannot carry, never leave."""
    tensor = TensorData(float32, (1,), b"abcd")
    with pytest.raises(InvalidRequestError):
        encode_digest("sha256:../../x")
    for name in ("\ud800", "x" * 2_000):
        with pytest.raises(InvalidRequestError):
            next(encode_put(announced(tensor, name), tensor, False))


def test_a_broken_server_is_not_believed() -> None:
    """Chunks without a header, two headers, the end before the end, more than this client takes: typed errors."""
    tensor = TensorData(float32, (2,), bytes(8))
    header, chunk = list(encode_get(announced(tensor), tensor))
    for parts in (
        [],
        [header],
        [chunk],
        [header, header],
        [header, chunk, chunk],
        [artifact_pb2.GetArtifactResponse()],
    ):
        decoder = ArtifactDecoder(100)
        with pytest.raises(ProtocolError):
            for part in parts:
                decoder.feed(part)
            decoder.finish()
    with pytest.raises(LimitExceededError):
        ArtifactDecoder(7).feed(header)
    status = encode_status(not_there(DIGEST, node="3")).SerializeToString()
    with pytest.raises(NotFoundError) as error:
        ArtifactDecoder(7).feed(artifact_pb2.GetArtifactResponse(error_status=status))
    assert dict(error.value.metadata) == {"digest": DIGEST, "node": "3"}


def test_bools_of_other_bytes_are_refused_as_they_come() -> None:
    """Before they reach a disk."""
    tensor = TensorData(bool_, (3,), b"\x00\x01\x02")
    parts = list(encode_put(dataclasses.replace(announced(tensor)), tensor, False))
    with pytest.raises(ProtocolError, match="0 or 1"):
        ChunkOrder(bool_, 3, "chunk").take(parts[1].chunk)
