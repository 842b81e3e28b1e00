"""Uploads across gRPC: whatever a server answers, and whenever, is what the user hears, at the first attempt."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc.aio
import pytest

from patchbay.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    PatchbayError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from patchbay.ir.artifacts import ArtifactInfo, digest_of
from patchbay.ir.dtypes import float32
from patchbay.ir.graph import TensorData
from patchbay.transport.grpc import GrpcTransport
from patchbay.wire.bounds import CHUNK_BYTES
from patchbay_server.transport.auth import DigestKeys, KeyAuthenticator
from patchbay_server.transport.registration import add_servicer_to_server
from patchbay_server.transport.servicer import Servicer
from tests.wire.conftest import KEY
from tests.wire.fakes import FakeBackend, FakeCatalog

#: Of each kind of answer.
UPLOADS = 100
CHUNKS = 6
TENSOR = TensorData(float32, (CHUNKS * CHUNK_BYTES // 4,), bytes(CHUNKS * CHUNK_BYTES))
INFO = ArtifactInfo(digest_of(TENSOR), float32, TENSOR.shape, TENSOR.nbytes)


class FakeStore:
    """A store that answers as it is told.

    Attributes:
        header: called when an upload begins; may raise, or return an artifact that is there already.
        chunk: called with the number of each chunk; may raise.
        end: called when all has come; may raise.
        begun, written, aborted: how many uploads began, chunks were written, uploads were left.
    """

    def __init__(self) -> None:
        self.header: Callable[[], ArtifactInfo | None] = lambda: None
        self.chunk: Callable[[int], None] = lambda number: None
        self.end: Callable[[], None] = lambda: None
        self.begun = self.written = 0
        self.aborted = threading.Event()

    def begin(self, account: str, info: ArtifactInfo, *, automatic: bool = False) -> FakeUpload | ArtifactInfo:
        self.begun += 1
        known = self.header()
        return FakeUpload(self, info) if known is None else known

    def stat(self, account: str, digests: Sequence[str]) -> list[ArtifactInfo]:
        raise NotImplementedError

    def list(self, account: str, *, after: str = "", limit: int = 100) -> tuple[list[ArtifactInfo], bool]:
        raise NotImplementedError

    def open(self, account: str, digest: str) -> tuple[ArtifactInfo, TensorData]:
        raise NotImplementedError

    def delete(self, account: str, digest: str) -> None:
        raise NotImplementedError


class FakeUpload:
    """One upload to a `FakeStore`."""

    def __init__(self, store: FakeStore, info: ArtifactInfo) -> None:
        self._store, self._info, self._number = store, info, 0

    def write(self, data: bytes | memoryview) -> None:
        self._store.chunk(self._number)
        self._number += 1
        self._store.written += 1

    def finish(self) -> ArtifactInfo:
        self._store.end()
        return self._info

    def abort(self) -> None:
        self._store.aborted.set()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def address(store: FakeStore) -> AsyncIterator[str]:
    """A plain gRPC server before the store."""
    keys = KeyAuthenticator(DigestKeys({KEY: "ada"}))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_servicer_to_server(Servicer(FakeCatalog(FakeBackend()), keys, artifacts=store), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def transport(address: str) -> AsyncIterator[GrpcTransport]:
    made = GrpcTransport(address, api_key=KEY, timeout_s=60)
    yield made
    await made.close()


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes that take what they can get of the machine."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


def raises(error: PatchbayError) -> Callable[..., Any]:
    """A function that raises `error`."""

    def call(*_: object) -> None:
        raise error

    return call


def midway(error: PatchbayError) -> Callable[[int], None]:
    """Refuses the third chunk, when the next ones are on their way."""

    def chunk(number: int) -> None:
        if number == 2:
            raise error

    return chunk


FULL = ResourceExhaustedError("no room for it", reason="ARTIFACT_QUOTA", metadata={"limit": "quota_bytes"})
OTHER = InvalidRequestError("what came is something else", reason="ARTIFACT_DIGEST_MISMATCH")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("when", "answer", "error"),
    [("header", raises(FULL), FULL), ("chunk", midway(FULL), FULL), ("end", raises(OTHER), OTHER)],
    ids=["at once", "midway", "at the end"],
)
async def test_a_refusal_is_what_the_user_hears(
    busy: None, store: FakeStore, transport: GrpcTransport, when: str, answer: Any, error: PatchbayError
) -> None:
    """Before the first chunk, between two, and after the last, on a busy machine: every time, with its reason."""
    setattr(store, when, answer)
    for number in range(UPLOADS):
        with pytest.raises(type(error)) as caught:
            await transport.put_artifact(INFO, TENSOR)
        assert (caught.value.reason, caught.value.metadata) == (error.reason, error.metadata)  # type: ignore[attr-defined]
        assert store.begun == number + 1


@pytest.mark.timeout(300)
async def test_a_stranger_hears_that_there_is_no_such_key(busy: None, store: FakeStore, address: str) -> None:
    """A wrong key is said to be wrong, however much was being sent, and nothing of it reaches the store."""
    transport = GrpcTransport(address, api_key="another", timeout_s=60)
    for _ in range(UPLOADS):
        with pytest.raises(UnauthenticatedError) as caught:
            await transport.put_artifact(INFO, TENSOR)
        assert caught.value.reason == "UNKNOWN_API_KEY"
    assert store.begun == 0
    await transport.close()


@pytest.mark.timeout(300)
async def test_what_is_there_already_is_not_sent(busy: None, store: FakeStore, transport: GrpcTransport) -> None:
    """The server's answer to the header counts, also when it comes while chunks are being sent."""
    store.header = lambda: INFO
    for number in range(UPLOADS):
        assert await transport.put_artifact(INFO, TENSOR) == INFO
        assert store.begun == number + 1
    assert store.written == 0


async def test_uploads_at_the_same_time(store: FakeStore, transport: GrpcTransport) -> None:
    """Several uploads share a connection, and what was sent is counted."""
    before = transport.bytes_sent
    assert await asyncio.gather(*(transport.put_artifact(INFO, TENSOR) for _ in range(8))) == [INFO] * 8
    assert store.written == 8 * CHUNKS
    assert 8 * TENSOR.nbytes < transport.bytes_sent - before < 8.1 * TENSOR.nbytes


async def test_an_upload_that_was_lost_is_sent_once_more(store: FakeStore, transport: GrpcTransport) -> None:
    """A replica that is away is asked again, once; the second answer is the user's."""
    away = UnavailableError("starting")
    answers: list[PatchbayError | None] = [away, None]

    def header() -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    store.header = header
    assert await transport.put_artifact(INFO, TENSOR) == INFO
    answers[:] = [away, away]
    with pytest.raises(UnavailableError, match="starting"):
        await transport.put_artifact(INFO, TENSOR)
    assert (store.begun, answers) == (4, [])


async def test_a_name_that_cannot_be_sent_is_refused_here(store: FakeStore, transport: GrpcTransport) -> None:
    """A name that is no text is an error of the caller's, before anything is sent."""
    info = ArtifactInfo(INFO.digest, float32, TENSOR.shape, TENSOR.nbytes, "\ud800")
    with pytest.raises(InvalidRequestError) as caught:
        await transport.put_artifact(info, TENSOR)
    assert caught.value.reason == "INVALID_NAME"
    assert (store.begun, transport.bytes_sent) == (0, 0)


class Held:
    """Holds an upload at its first chunk until it is let go."""

    def __init__(self, store: FakeStore) -> None:
        self.reached, self._go = threading.Event(), threading.Event()
        store.chunk = self._wait

    def _wait(self, number: int) -> None:
        self.reached.set()
        self._go.wait(60)

    async def __aenter__(self) -> Held:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._go.set()


async def test_a_cancelled_upload_is_over_on_the_server(store: FakeStore, transport: GrpcTransport) -> None:
    """Cancelling the task ends the call: the server lets go of what came."""
    async with Held(store) as held:
        task = asyncio.create_task(transport.put_artifact(INFO, TENSOR))
        assert await asyncio.to_thread(held.reached.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await asyncio.to_thread(store.aborted.wait, 60)


async def test_closing_ends_uploads(store: FakeStore, transport: GrpcTransport) -> None:
    """An upload that is under way when the connection is closed fails with an error of ours, and later ones do too."""
    async with Held(store) as held:
        task = asyncio.create_task(transport.put_artifact(INFO, TENSOR, known=False))
        assert await asyncio.to_thread(held.reached.wait, 60)
        await transport.close()
        with pytest.raises(PatchbayError):
            await task
    with pytest.raises(UnavailableError, match="closed"):
        await transport.put_artifact(INFO, TENSOR)


async def test_an_upload_that_takes_too_long_is_given_up(
    store: FakeStore, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its deadline an upload ends with the error that says so."""
    monkeypatch.setattr("patchbay.transport.grpc.SLOWEST_BYTES_PER_S", 2**40)
    transport = GrpcTransport(address, api_key=KEY, timeout_s=0.5)
    async with Held(store):
        with pytest.raises(DeadlineExceededError, match="did not finish within"):
            await transport.put_artifact(INFO, TENSOR)
    await transport.close()


async def test_an_upload_to_nobody() -> None:
    """Where no server listens, an upload says so as every call does."""
    transport = GrpcTransport("127.0.0.1:1", api_key=KEY, timeout_s=30)
    with pytest.raises(UnavailableError, match="no Patchbay server answers"):
        await transport.put_artifact(INFO, TENSOR)
    await transport.close()
