"""Hostile uploads over a real connection: a typed error each, nothing left behind, and little memory taken.

The victim (`tests.e2e.victim`) is in a process of its own: after every test it still answers a good request with
the same bytes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
import pytest

from patchbay.errors import (
    InvalidRequestError,
    NotFoundError,
    PatchbayError,
    ProtocolError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from patchbay.ir.artifacts import ArtifactInfo, digest_of
from patchbay.ir.dtypes import float32, int32
from patchbay.ir.graph import Graph, Node, Output, TensorData
from patchbay.v1 import artifact_pb2
from patchbay.wire.artifacts import encode_put
from patchbay.wire.parse import serialize
from patchbay.wire.status import decode_status, service_error
from tests.e2e.victim import Victim, connection, execute, unharmed, victim
from tests.wire.hostile_server import KEY, MAX_ARTIFACTS

__all__ = ["unharmed", "victim"]  # fixtures

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads the server's memory from /proc"),
    pytest.mark.timeout(120),
]
#: Eight uploads of 12 MiB at once are to take a few chunks each, and not 96 MiB.
MAX_GROWTH_BYTES = 80 * 2**20


def tensor(seed: int = 0, size: int = 1_000) -> TensorData:
    return TensorData(int32, (size,), bytes([seed % 256, seed // 256 % 256, 0, 0]) * size)


def announced(value: TensorData) -> ArtifactInfo:
    return ArtifactInfo(digest_of(value), value.dtype, value.shape, value.nbytes)


async def _send(victim: Victim, parts: Iterable[bytes], key: str | None = KEY) -> None:
    """The messages of an upload as they are; raises what the server says.

    Through gRPC's blocking interface: where a server answers while the client still writes, grpc.aio reports the write
    that failed ("Internal error from Core") in the answer's place.
    """
    metadata = None if key is None else (("authorization", f"Bearer {key}"),)

    def blocking() -> None:
        with grpc.insecure_channel(victim.address) as channel:
            call: Any = channel.stream_unary("/patchbay.v1.PatchbayService/PutArtifact")
            try:
                call(iter(parts), metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                status: Any = error
                for name, value in status.trailing_metadata() or ():
                    if name == "grpc-status-details-bin":
                        raise decode_status(value) from None
                raise service_error(status.code().name, status.details() or "") from None

    await asyncio.to_thread(blocking)


def _parts(value: TensorData) -> list[bytes]:
    return [serialize(part) for part in encode_put(announced(value), value, automatic=False)]


def _big_chunk() -> bytes:
    part = artifact_pb2.PutArtifactRequest()
    part.chunk.data = bytes(20 * 2**20)
    return serialize(part)


GARBAGE: dict[str, list[bytes]] = {
    "nothing": [],
    "noise": [bytes(range(256)) * 64],
    "a huge chunk": [_parts(tensor())[0], _big_chunk()],
    "a huge header": [serialize(artifact_pb2.PutArtifactRequest(header={"display_name": "x" * 10_000_000}))],
    "truncated": _parts(tensor(size=400_000))[:-1],
    "header after header": [_parts(tensor())[0]] * 1_000,
    "wrong digest": [_parts(tensor(1))[0], *_parts(tensor(2))[1:]],
    "too many chunks": [*_parts(tensor()), *_parts(tensor())[1:] * 1_000],
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage(victim: Victim, name: str) -> None:
    """No stream of messages is anything but a typed error."""
    with pytest.raises((ProtocolError, InvalidRequestError)):
        await _send(victim, GARBAGE[name])


async def test_strangers_are_not_read(victim: Victim) -> None:
    """Without a key nothing of an upload is looked at."""
    for key in (None, "wrong"):
        with pytest.raises(UnauthenticatedError):
            await _send(victim, _parts(tensor(size=400_000)), key)


async def test_declarations_without_measure(victim: Victim) -> None:
    """Terabytes that are only announced take no memory, no disk and no time."""
    for shape in ((2**38,), (2**20, 2**20), (1,) * 31 + (2**34,)):
        message = artifact_pb2.PutArtifactRequest()
        message.header.name = "artifacts/" + "0" * 64
        message.header.tensor.element_type = 11
        message.header.tensor.shape.extend(shape)
        size = 4
        for extent in shape:
            size *= extent
        message.header.tensor.size_bytes = size
        with pytest.raises(ResourceExhaustedError) as error:
            await _send(victim, [serialize(message)])
        assert error.value.reason == "ARTIFACT_TOO_LARGE"


@pytest.mark.timeout(300)
async def test_ten_thousand_tiny_artifacts(victim: Victim) -> None:
    """A flood is stopped by the limit on their number; what was stored is all there, and can be deleted."""
    stored = refused = 0
    async with connection(victim.address) as transport:

        async def put(number: int) -> None:
            nonlocal stored, refused
            value = TensorData(int32, (), number.to_bytes(4, "little"))
            try:
                await transport.put_artifact(announced(value), value)
                stored += 1
            except ResourceExhaustedError as error:
                assert error.reason in ("ARTIFACT_COUNT", "TOO_MANY_UPLOADS")
                refused += error.reason == "ARTIFACT_COUNT"

        for start in range(0, 10_000, 10):
            await asyncio.gather(*(put(start + i) for i in range(10)))
        assert (stored, stored + refused) == (MAX_ARTIFACTS, 10_000)
        found = await transport.list_artifacts()
        assert len(found) == MAX_ARTIFACTS
        for info in found:
            await transport.delete_artifact(info.digest)
        assert await transport.list_artifacts() == ()


async def test_large_uploads_at_once_take_little_memory(victim: Victim) -> None:
    """Eight at a time stream through; those beyond the quota are refused, and the rest are whole."""
    values = [tensor(seed, 3 * 2**20) for seed in range(8)]
    async with connection(victim.address) as transport:
        results = await asyncio.gather(
            *(transport.put_artifact(announced(value), value) for value in values), return_exceptions=True
        )
        refused = [r for r in results if isinstance(r, PatchbayError)]
        assert {type(r) for r in refused} == {ResourceExhaustedError}
        assert len(refused) >= 6
        for info in await transport.list_artifacts():
            assert info.nbytes == 12 * 2**20
            await transport.delete_artifact(info.digest)
    grown = victim.peak_bytes() - victim.baseline_bytes
    assert grown < MAX_GROWTH_BYTES, f"{grown / 2**20:.0f} MiB"


@pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "sha256:../../../etc/passwd", "", "sha256:" + "g" * 64])
async def test_graphs_that_name_what_is_not_there(victim: Victim, digest: str) -> None:
    """A digest that nobody has, and what is no digest, are errors at their node; nothing outside is looked at."""
    const = Node("const", (), {"artifact": digest, "shape": (4,), "dtype": float32.name})
    with pytest.raises(PatchbayError) as error:
        await execute(victim, Graph((), (const,), (Output("x", 0),)))
    assert isinstance(error.value, NotFoundError) or getattr(error.value, "node", None) == 0


async def test_names_of_other_things(victim: Victim) -> None:
    """Fetching and deleting take artifacts' names only."""
    async with grpc.aio.insecure_channel(victim.address) as channel:
        for method, message in (
            ("DeleteArtifact", artifact_pb2.DeleteArtifactRequest(name="artifacts/../../x")),
            ("StatArtifacts", artifact_pb2.StatArtifactsRequest(names=["models/tiny"])),
            ("ListArtifacts", artifact_pb2.ListArtifactsRequest(page_token="artifacts/..")),
            ("ListArtifacts", artifact_pb2.ListArtifactsRequest(page_size=-1)),
        ):
            call: Any = channel.unary_unary(f"/patchbay.v1.PatchbayService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(serialize(message), metadata=(("authorization", f"Bearer {KEY}"),), timeout=60)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
