"""Artifacts between accounts, under attack, beyond quotas, and in saved graphs; over messages, in this process.

What every transport does alike is in test_conformance.py; the store by itself in tests/serving/test_artifact_store.py.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay.client import AsyncClient, Client
from patchbay.errors import (
    DeadlineExceededError,
    DTypeError,
    InvalidRequestError,
    LimitExceededError,
    NotFoundError,
    ProtocolError,
    ResourceExhaustedError,
    ServiceError,
    ShapeError,
    TraceError,
    UnauthenticatedError,
    UnsupportedError,
    ValueNotReadyError,
)
from patchbay.ir.artifacts import ArtifactInfo, digest_of
from patchbay.ir.dtypes import float32
from patchbay.ir.events import ExecuteOptions, Kept
from patchbay.ir.graph import Graph, Node, Output, TensorData
from patchbay.testing import fake_client
from patchbay.transport.local import LocalContext, LocalTransport
from patchbay.v1 import artifact_pb2
from patchbay.wire.artifacts import encode_put
from patchbay_server.config import LimitsConfig
from patchbay_server.models.loader import host
from patchbay_server.serving import artifacts as serving_artifacts
from patchbay_server.serving.local import LocalBackend, LocalCatalog
from patchbay_server.store.artifacts import ArtifactStore
from patchbay_server.transport.artifact_calls import MAX_UPLOADS, ArtifactCalls
from patchbay_server.transport.auth import DigestKeys, KeyAuthenticator
from patchbay_server.transport.servicer import Servicer
from tests.tiny import D_MODEL, build

MIB = 2**20
LIMITS = LimitsConfig(max_const_bytes=4 * MIB)


class Service:
    """A servicer with two accounts over one backend, and how to reach it."""

    def __init__(self, folder: Path, hosted: Any, **options: Any) -> None:
        self.store = ArtifactStore(folder, **{"quota_bytes": 16 * MIB, "durable": False, **options})
        self.backend = LocalBackend(hosted, LIMITS, artifacts=self.store)
        keys = KeyAuthenticator(DigestKeys({"key-of-ada": "ada", "key-of-bob": "bob"}))
        self.servicer = Servicer(LocalCatalog({"m": self.backend}), keys, LIMITS, artifacts=self.store)

    def transport(self, who: str | None = "ada") -> LocalTransport:
        return LocalTransport(self.servicer, None if who is None else f"key-of-{who}")

    def client(self, who: str = "ada") -> Client:
        return Client(lambda: self.transport(who))

    async def put(self, parts: AsyncIterator[Any], who: str = "ada") -> None:
        """Send the messages of an upload as they are."""
        context = LocalContext((("authorization", f"Bearer key-of-{who}"),))
        await self.servicer.PutArtifact(parts, context)
        context.raise_for_status()


@pytest.fixture(scope="module")
def hosted() -> Any:
    return host(build("llama"), None, name="m")


@pytest.fixture
def service(tmp_path: Path, hosted: Any) -> Iterator[Service]:
    made = Service(tmp_path / "store", hosted)
    yield made
    made.backend.close()


@pytest.fixture
def ada(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


def array(mib: float = 2.0, seed: int = 0) -> np.ndarray:
    """Columns for a product with the residual stream."""
    columns = int(mib * MIB / 4 / D_MODEL)
    return np.random.default_rng(seed).standard_normal((D_MODEL, columns)).astype(np.float32)


def tensor(size: int = 300_000) -> TensorData:
    return TensorData(float32, (size,), np.arange(size, dtype=np.float32).tobytes())


def announced(value: TensorData) -> ArtifactInfo:
    return ArtifactInfo(digest_of(value), value.dtype, value.shape, value.nbytes)


def naming(digest: str, shape: tuple[int, ...] = (300_000,), dtype: str = "float32") -> Graph:
    const = Node("const", (), {"artifact": digest, "shape": shape, "dtype": dtype})
    return Graph((), (const, Node("sum", (0,), {})), (Output("x", 1),))


async def execute(service: Service, graph: Graph, who: str = "ada") -> list[Any]:
    return [event async for event in service.transport(who).execute("m", graph, ExecuteOptions())]


# --- whose they are -------------------------------------------------------------------------------------------------


async def test_another_account_meets_nothing(service: Service) -> None:
    """To bob, ada's artifact does not exist: in graphs, to fetch, to ask about, to list, to delete."""
    ada, bob = service.transport("ada"), service.transport("bob")
    digest = (await ada.put_artifact(announced(tensor()), tensor())).digest
    never = digest_of(tensor(7))
    said = []
    for wanted in (digest, never):
        for attempt in (bob.get_artifact(wanted), bob.delete_artifact(wanted), execute(service, naming(wanted), "bob")):
            with pytest.raises(NotFoundError) as error:
                await attempt
            said.append((str(error.value).replace(wanted, "DIGEST"), error.value.reason, len(error.value.metadata)))
    assert said[:3] == said[3:]
    assert (await bob.stat_artifacts([digest]), await bob.list_artifacts()) == ((), ())
    assert len(await ada.list_artifacts()) == 1
    # Bob's own copy of the same content is his own: deleting it leaves ada's.
    await bob.put_artifact(announced(tensor()), tensor())
    await bob.delete_artifact(digest)
    assert (await ada.get_artifact(digest))[1].data == tensor().data


async def test_strangers_are_turned_away_from_every_call(service: Service) -> None:
    """Without a key nothing is read, stored or told."""
    stranger = service.transport(None)
    for attempt in (
        stranger.put_artifact(announced(tensor()), tensor()),
        stranger.get_artifact("sha256:" + "0" * 64),
        stranger.stat_artifacts(["sha256:" + "0" * 64]),
        stranger.list_artifacts(),
        stranger.delete_artifact("sha256:" + "0" * 64),
    ):
        with pytest.raises(UnauthenticatedError):
            await attempt
    assert not service.store.root.exists()


# --- uploads under attack -------------------------------------------------------------------------------------------


def _parts() -> list[artifact_pb2.PutArtifactRequest]:
    return list(encode_put(announced(tensor()), tensor(), automatic=False))


def _damaged() -> list[Any]:
    parts = _parts()
    parts[2].chunk.crc32 ^= 1
    return parts


def _too_long() -> list[Any]:
    parts = _parts()
    extra = artifact_pb2.PutArtifactRequest()
    extra.chunk.offset, extra.chunk.data = tensor().nbytes, b"more"
    return [*parts, extra]


def _header(**changes: Any) -> list[Any]:
    parts = _parts()
    for name, value in changes.items():
        target = parts[0].header if name in ("name", "display_name") else parts[0].header.tensor
        if isinstance(value, list):
            del target.shape[:]
            target.shape.extend(value)
        else:
            setattr(target, name, value)
    return parts


@pytest.mark.parametrize(
    "parts",
    [
        [],
        _parts()[1:],
        _parts()[:1],
        _parts()[:-1],
        [_parts()[0], *_parts()],
        [_parts()[0], _parts()[2], _parts()[1]],
        _damaged(),
        _too_long(),
        [b"\xff\xff\xff", b""],
        [artifact_pb2.PutArtifactRequest()],
        _header(name="artifacts/../../etc/passwd"),
        _header(name=""),
        _header(display_name="x" * 2_000),
        _header(element_type=99),
        _header(size_bytes=-1),
        _header(shape=[-1, 300_000]),
        _header(shape=[2**40, 2**40]),
        _header(shape=[1] * 40),
        _header(shape=[300_001]),
    ],
)
async def test_a_malformed_upload_is_refused_and_leaves_nothing(service: Service, parts: list[Any]) -> None:
    """Whatever is wrong with the stream is a typed error about the request, and the disk is as before."""

    async def stream() -> AsyncIterator[Any]:
        for part in parts:
            yield part

    with pytest.raises((ProtocolError, InvalidRequestError)):
        await service.put(stream())
    assert [p for p in service.store.root.rglob("*") if p.is_file() and p.name != ".lock"] == []


async def test_an_upload_that_sends_nothing_is_given_up(service: Service) -> None:
    """An idle upload ends by itself, and its room is free again."""
    calls, waiting = ArtifactCalls(service.store, idle_s=0.05), asyncio.Event()

    async def stalled() -> AsyncIterator[Any]:
        yield _parts()[0]
        await waiting.wait()

    with pytest.raises(DeadlineExceededError, match="sent nothing"):
        await calls.put(stalled(), "ada")
    assert list(service.store.root.rglob("uploads/*")) == []


async def test_uploads_of_one_account_at_a_time_are_counted(service: Service) -> None:
    """One more than allowed is refused with a time to retry; another account is not held up."""
    waiting = asyncio.Event()

    async def held() -> AsyncIterator[Any]:
        await waiting.wait()
        for part in _parts():
            yield part

    service.store.quota_bytes = 64 * MIB
    under_way = [asyncio.ensure_future(service.put(held())) for _ in range(MAX_UPLOADS)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhaustedError) as error:
        await service.put(held())
    assert error.value.retry_after_s == 1.0
    await service.transport("bob").put_artifact(announced(tensor()), tensor())
    waiting.set()
    await asyncio.gather(*under_way)
    assert len(await service.transport().list_artifacts()) == 1


async def test_a_client_that_goes_away_leaves_nothing(service: Service) -> None:
    """An upload that is cancelled in the middle leaves no file and no reservation."""
    arrived = asyncio.Event()

    async def abandoned() -> AsyncIterator[Any]:
        for part in _parts()[:2]:
            yield part
        arrived.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(service.put(abandoned()))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(service.store.root.rglob("uploads/*")) == []


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "error"),
    [
        (naming(digest_of(tensor()), shape=(300, 1000)), ShapeError),
        (naming(digest_of(tensor()), dtype="int32"), DTypeError),
        (naming("sha256:../../secret"), pb.GraphError),
        (naming(digest_of(tensor()), shape=(-1,)), ShapeError),
        (naming(digest_of(tensor()), shape=(2**40, 2**40)), ShapeError),
        (naming(digest_of(tensor()), dtype="object"), pb.GraphError),
        (naming(digest_of(tensor()), shape=(2**33,)), (LimitExceededError, ShapeError)),
    ],
)
async def test_a_graph_that_lies_about_an_artifact_is_refused(service: Service, graph: Graph, error: Any) -> None:
    """Shape and dtype are part of the digest: a graph that says otherwise is an error at its node."""
    await service.transport().put_artifact(announced(tensor()), tensor())
    with pytest.raises(error) as caught:
        await execute(service, graph)
    assert caught.value.node == 0


async def test_a_graph_names_so_many_artifacts_and_no_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every artifact in use is an open file, so their number is a limit of its own."""
    monkeypatch.setattr(serving_artifacts, "MAX_PER_GRAPH", 3)
    nodes = tuple(
        Node("const", (), {"artifact": f"sha256:{i:064x}", "shape": (1,), "dtype": "float32"}) for i in range(4)
    )
    with pytest.raises(LimitExceededError, match="max_artifacts"):
        await execute(service, Graph((), nodes, (Output("x", 0),)))


async def test_a_large_artifact_counts_at_the_peak(service: Service) -> None:
    """The limit on live values holds for artifacts as for everything else, before anything is opened."""
    value = tensor(1000)
    await service.transport().put_artifact(announced(value), value)
    const = Node("const", (), {"artifact": digest_of(value), "shape": (1000,), "dtype": "float32"})
    big = Node("broadcast_to", (0,), {"shape": (2_000_000, 1000)})
    with pytest.raises(LimitExceededError) as error:
        await execute(service, Graph((), (const, big, Node("sum", (1,), {})), (Output("x", 2),)))
    assert error.value.limit == "max_peak_bytes"


def test_mistakes_with_a_handle_are_raised_at_the_line(ada: Client) -> None:
    """A handle's shape is known here: nothing is sent for a product that cannot be."""
    handle = ada.artifacts.put(np.ones((3, 5), np.float32))
    model = ada.model("m")
    with pytest.raises(ShapeError) as error, model.trace([[1, 2]]) as run:
        _ = run.blocks[0].resid_post @ handle
    assert "test_artifacts.py" in (error.value.location or "")


def test_a_handle_stands_wherever_a_constant_does(ada: Client) -> None:
    """Either side of an operator, in functions, in writes of every kind, indexed through t.constant."""
    model, ones = ada.model("m"), np.full(D_MODEL, 2.0, np.float32)
    handle = ada.artifacts.put(ones)
    with model.trace([[1, 2]]) as run:
        h = run.blocks[0].resid_post
        run.save(
            a=h + handle, b=handle * h, c=pb.ops.maximum(handle, h), d=h - run.trace.constant(handle)[:1], e=h @ handle
        )
        run.blocks[1].resid_post += handle
        run.blocks[1].resid_post[:, 0] = handle
        run.save(h=h, w=run.blocks[1].resid_post)
    r = run.results
    np.testing.assert_array_equal(r.a, r.h + ones)
    np.testing.assert_array_equal(r.b, ones * r.h)
    np.testing.assert_array_equal(r.c, np.maximum(ones, r.h))
    np.testing.assert_array_equal(r.d, r.h - 2.0)
    np.testing.assert_allclose(r.e, r.h @ ones, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(r.w[:, 0], ones[None])


def test_a_handle_is_not_its_numbers(ada: Client) -> None:
    """numpy does not fetch behind one's back, and a handle of a trace that has not run says so."""
    handle = ada.artifacts.put(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"\.get\(\)"):
        np.asarray(handle)
    with ada.model("m").trace([[1, 2]]) as run:
        kept = run.keep("k", run.blocks[0].resid_post)
        with pytest.raises(ValueNotReadyError, match="below the with block"):
            _ = kept.digest
        assert "kept once the trace has run" in repr(kept)
    assert kept.get().shape == kept.shape


# --- quotas ---------------------------------------------------------------------------------------------------------


def test_a_server_that_takes_no_more_is_sent_the_constant_inside(tmp_path: Path, hosted: Any) -> None:
    """Where the quota is spent, a graph still runs as far as constants may travel inside it; beyond, it says why."""
    small = Service(tmp_path, hosted, quota_bytes=MIB)
    with small.client() as client:
        model, encoder = client.model("m"), array(2.0)
        for _ in range(2):
            with model.trace([[1, 2]]) as run:
                f = (run.blocks[0].resid_post @ encoder).sum().save()
            assert run.usage.bytes_in > encoder.nbytes
            assert np.isfinite(f.value)
        with pytest.raises(ResourceExhaustedError, match="quota_bytes"), model.trace([[1, 2]]) as run:
            run.save(x=(run.blocks[0].resid_post @ array(5.0)).sum())
    small.backend.close()


def test_what_would_not_fit_is_refused_before_the_run(tmp_path: Path, hosted: Any) -> None:
    """A trace that keeps more than the quota has room for runs nothing."""
    small = Service(tmp_path, hosted, quota_bytes=1_000)
    with small.client() as client:
        with (
            pytest.raises(ResourceExhaustedError, match="quota_bytes"),
            client.model("m").trace([[1, 2, 3]] * 9) as run,
        ):
            run.keep("h", run.blocks[0].resid_post)
        with client.model("m").trace([[1, 2, 3]]) as run:
            run.keep("h", run.blocks[0].resid_post)
        assert run.estimate().kept_bytes == 3 * D_MODEL * 4
    small.backend.close()


async def test_a_server_without_a_store_says_so_and_takes_constants_inside(hosted: Any) -> None:
    """Artifacts are unsupported there, and graphs with constants below its limit run as ever."""
    backend = LocalBackend(hosted, LIMITS)
    servicer = Servicer(LocalCatalog({"m": backend}), KeyAuthenticator(DigestKeys({"key-of-ada": "ada"})), LIMITS)
    async with AsyncClient(lambda: LocalTransport(servicer, "key-of-ada")) as client:
        model = await client.model("m")
        async with model.trace([[1, 2]]) as run:
            f = (run.blocks[0].resid_post @ array(2.0)).sum().save()
        assert np.isfinite(f.value)
        with pytest.raises(UnsupportedError, match="keeps no artifacts"):
            await client.artifacts.list()
        with pytest.raises(UnsupportedError):
            async with model.trace([[1, 2]]) as run:
                run.keep("h", run.blocks[0].resid_post)
    backend.close()


def test_neither_side_holds_two_copies(ada: Client) -> None:
    """Uploading 12 MiB takes far less memory than that, on both sides together."""
    value = array(12.0)
    ada.artifacts.list()
    tracemalloc.start()
    try:
        ada.artifacts.put(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * MIB


def test_nothing_is_held_once_a_graph_has_ended(service: Service, ada: Client) -> None:
    """The second links of what graphs used go with the graphs; deleting while one waits takes nothing from it."""
    model, handle = ada.model("m"), ada.artifacts.put(array(2.0))
    for disabled in ([], ["artifact_cache"]):
        with model.trace([[1, 2]], disabled=disabled) as run:
            run.save(x=(run.blocks[0].resid_post @ handle).sum())
    with model.trace([[1, 2]]) as run:
        run.save(x=run.blocks[0].resid_post)
    gc.collect()
    assert list(service.store.root.rglob("in-use/*")) == []


def test_a_model_in_this_process_leaves_no_folder_behind() -> None:
    """Its artifacts are in a temporary folder that goes with it, but not with a fork of the process."""
    store = serving_artifacts.TemporaryArtifacts()
    store.put("ada", tensor())
    serving_artifacts._remove(str(store.root), owner=-1)
    assert store.root.exists()
    store.close()
    assert not store.root.exists()
    store.close()


# --- on the device --------------------------------------------------------------------------------------------------


def test_an_artifact_is_copied_to_the_device_once(ada: Client) -> None:
    """Later traces copy nothing, say so in their usage, and give the same bits as without the cache."""
    model, handle = ada.model("m"), ada.artifacts.put(array(2.0))
    found, saved = [], []
    for disabled in ([], [], ["artifact_cache"], []):
        with model.trace([[1, 2, 3]], disabled=disabled) as run:
            # Used in every way that could change it: written, edited after being written, sent back.
            product = run.blocks[0].resid_post @ handle
            run.blocks[1].resid_post[:, 0] = run.trace.constant(handle)[:, 0]
            run.blocks[1].resid_post[:, 0] += 1.0
            run.save(product=product, h=run.blocks[1].resid_post, itself=run.trace.constant(handle))
        found.append(run.results)
        saved.append(run.usage.saved.get("artifact_cache", 0))
    assert saved == [0, handle.nbytes, 0, handle.nbytes]
    for results in found:
        np.testing.assert_array_equal(results.itself, array(2.0))
        for name in ("product", "h"):
            np.testing.assert_array_equal(results[name], found[0][name])


def test_the_cache_on_the_device_is_bounded_and_one_accounts_own() -> None:
    """The least recently used goes first, what is too large is never kept, and a changed tensor is read again."""
    torch = pytest.importorskip("torch")
    from patchbay.ir.artifacts import KeyedTensor
    from patchbay_server.engine.constants import ConstantCache

    def keyed(key: str, size: int = 100) -> KeyedTensor:
        return KeyedTensor(float32, (size,), np.full(size, len(key), np.float32).tobytes(), key)

    cache, cpu = ConstantCache(1_000), torch.device("cpu")
    for key, size, hit in (("a", 100, 0), ("b", 100, 0), ("a", 100, 400), ("c", 100, 0), ("b", 100, 0), ("a", 100, 0)):
        assert cache.take(keyed(key, size), cpu)[1] == hit
        assert cache.nbytes <= 1_000
    assert cache.take(keyed("ada/x"), cpu)[0] is not cache.take(keyed("bob/x"), cpu)[0]
    cache.take(keyed("big", 300), cpu)
    assert cache.take(keyed("big", 300), cpu)[1] == 0
    kept, _ = cache.take(keyed("bob/x"), cpu)
    kept += 1
    again, saved = cache.take(keyed("bob/x"), cpu)
    assert saved == 0
    assert float(again[0]) == 5.0
    cache.clear()
    assert cache.nbytes == 0
    assert cache.take(keyed("bob/x"), cpu)[1] == 0


# --- the asynchronous client, several at once -----------------------------------------------------------------------


async def test_traces_at_the_same_time_upload_once(service: Service) -> None:
    """Eight traces with one new constant, started together, send it once; every call of the client is awaited."""
    encoder = array(2.0)
    async with AsyncClient(service.transport) as client:
        model = await client.model("m")
        transport = await client._connection.transport()

        async def experiment(i: int) -> float:
            async with model.trace([[i + 1, 2]]) as run:
                f = (run.blocks[0].resid_post @ encoder).sum().save()
            return float(f.value)

        values = await asyncio.gather(*map(experiment, range(8)))
        assert len(set(values)) == 8
        assert transport.bytes_sent < encoder.nbytes + 64 * 1024
        before = transport.bytes_sent
        handle = await client.artifacts.put(encoder, name="enc")
        assert transport.bytes_sent - before < 1_024  # it is there already
        assert (await client.artifacts.handle("enc")).digest == handle.digest
        np.testing.assert_array_equal(await client.artifacts.get("enc"), encoder)
        np.testing.assert_array_equal(await handle.get(), encoder)
        await handle.delete()
        assert await client.artifacts.list() == []


# --- saved graphs ---------------------------------------------------------------------------------------------------


def test_a_saved_graph_names_artifacts_or_carries_them(service: Service, ada: Client, tmp_path: Path) -> None:
    """By default the digest is in the file, and a server without it says what to do; inline, the file runs anywhere."""
    model = ada.model("m")
    handle = ada.artifacts.put(np.full(D_MODEL, 3.0, np.float32))
    with model.trace([[1, 2]]) as run:
        run.save(x=run.blocks[0].resid_post * handle)
    pb.save_graph(run, tmp_path / "named.graph")
    pb.save_graph(run, tmp_path / "whole.graph", inline=True)
    named, whole = pb.load_graph(tmp_path / "named.graph"), pb.load_graph(tmp_path / "whole.graph")
    pb.save_graph(named, tmp_path / "again.graph", inline=ada.artifacts)
    assert pb.load_graph(tmp_path / "again.graph") == whole
    with pytest.raises(TraceError, match=r"inline=client\.artifacts"):
        pb.save_graph(named, tmp_path / "x.graph", inline=True)
    assert f"artifact({handle.digest[:19]})" in str(named)
    np.testing.assert_array_equal(model.run(named)["x"], run.results.x)
    with service.client("bob") as bob:
        np.testing.assert_array_equal(bob.model("m").run(whole)["x"], run.results.x)
        with pytest.raises(NotFoundError, match=r"node \d of the graph; .*inline=True"):
            bob.model("m").run(named)


def test_a_saved_graph_keeps_what_it_kept(ada: Client, tmp_path: Path) -> None:
    """Outputs that stay on the server stay there when the graph runs from a file."""
    model = ada.model("m")
    with model.trace([[1, 2]]) as run:
        handle = run.keep("h", run.blocks[0].resid_post)
    pb.save_graph(run, tmp_path / "k.graph")
    results = model.run(pb.load_graph(tmp_path / "k.graph"))
    assert results["h"].digest == handle.digest


def test_a_graph_with_large_arrays_comes_back_from_its_file(ada: Client, tmp_path: Path) -> None:
    """A trace's own arrays are in the file, beyond the limit on constants inside a request too."""
    model, encoder = ada.model("m"), array(70.0)
    trace = model.trace()
    trace.save(f=(trace.run([1, 2]).blocks[0].resid_post @ encoder).sum())
    pb.save_graph(trace, tmp_path / "big.graph")
    assert pb.load_graph(tmp_path / "big.graph") == trace.graph


# --- the fake server ------------------------------------------------------------------------------------------------


def test_the_fake_server_keeps_artifacts_too() -> None:
    """Code that uses artifacts is tested without a server: put, keep, use, get, list, delete."""
    with fake_client() as client:
        model, big = client.model("fake"), np.ones((8, 100_000), np.float32)
        with model.trace("the cat") as run:
            kept = run.keep("h", run.blocks[0].resid_post)
            run.save(f=(run.blocks[0].resid_post @ big).sum(-1))
        with model.trace("the cat") as run:
            run.blocks[0].resid_post -= kept
            left = run.blocks[0].resid_post.save()
        np.testing.assert_array_equal(left.value, np.zeros_like(left.value))
        assert kept.get().shape == (1, 3, 8)
        assert len(client.artifacts.list()) == 2
        kept.delete()
        with pytest.raises(NotFoundError), model.trace("the cat") as run:
            run.save(x=run.blocks[0].resid_post + kept)


def test_events_of_kept_outputs_carry_no_elements(service: Service) -> None:
    """The stream of a graph that keeps its output holds what names it, and nothing of it."""
    graph = Graph((), (Node("zeros", (), {"shape": (1000, 1000)}),), (Output("z", 0, keep=True),))
    events = asyncio.run(execute(service, graph))
    (kept,) = [event for event in events if isinstance(event, Kept)]
    assert kept.artifact.nbytes == 4_000_000
    assert events[-1].usage.bytes_out == 0
    assert issubclass(NotFoundError, ServiceError)
