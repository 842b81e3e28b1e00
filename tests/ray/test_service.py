"""Real Ray Serve behind its HAProxy: every call, errors with their details, keys, cancellation, big results."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from patchbay.errors import (
    GraphError,
    IndexOutOfRangeError,
    LimitExceededError,
    NotFoundError,
    PatchbayError,
    ShapeError,
    UnauthenticatedError,
    UnknownSiteError,
)
from patchbay.ir.dtypes import float32
from patchbay.ir.events import Done, ExecuteOptions, Progress, Started, TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run, TensorData
from patchbay.transport.grpc import GrpcTransport
from patchbay_server.serving.environment import haproxy_binary
from tests.serving_fixtures import D_MODEL, N_LAYERS, TINY, Served, tiny_model

TEXT = "the capital of france is"
OPTIONS = ExecuteOptions()


def read(site: str, tokens: tuple[tuple[int, ...], ...]) -> Graph:
    """One run, one site, one output called x."""
    return Graph((Run(tokens),), (Node("site.read", (), {"site": site}, 0),), (Output("x", 0),))


async def values(
    transport: GrpcTransport, graph: Graph, options: ExecuteOptions = OPTIONS, *, model: str = TINY
) -> dict[str, np.ndarray]:
    found = {}
    async for event in transport.execute(model, graph, options, timeout_s=60.0):
        if isinstance(event, TensorValue):
            flat = np.frombuffer(event.value.data, dtype=event.value.dtype.name)
            found[event.name] = flat.reshape(event.value.shape)
    return found


async def tokens(transport: GrpcTransport) -> tuple[int, ...]:
    (row,) = await transport.tokenize(TINY, [TEXT])
    return row.ids


async def test_models_and_card(transport: GrpcTransport) -> None:
    """The control application lists every model by name; a model's own application gives its card."""
    demo, summary = await transport.list_models()
    assert (demo.name, demo.ready) == ("demo", True)
    assert (summary.name, summary.family, summary.n_layers, summary.ready) == (TINY, "llama", N_LAYERS, True)
    card = await transport.get_model(TINY)
    assert card.d_model == D_MODEL
    assert "blocks.1.attn.pattern" in card


async def test_tokenize(transport: GrpcTransport) -> None:
    """Ids, strings and offsets come from the replica's tokenizer."""
    (row,) = await transport.tokenize(TINY, [TEXT])
    assert row.strings == tuple(TEXT.split())
    assert [TEXT[a:b] for a, b in row.offsets] == TEXT.split()


async def test_read_and_patch(transport: GrpcTransport) -> None:
    """A patched run's logits equal the same edit by a plain PyTorch hook."""
    ids = await tokens(transport)
    value = TensorData(float32, (D_MODEL,), np.full(D_MODEL, 0.5, "<f4").tobytes())
    graph = Graph(
        (Run((ids,)),),
        (
            Node("const", (), {"value": value}),
            Node("site.write", (0,), {"site": "blocks.0.mlp_out", "mode": "add", "index": ()}, 0),
            Node("site.read", (), {"site": "logits"}, 0),
        ),
        (Output("logits", 2),),
    )
    found = await values(transport, graph, ExecuteOptions(deterministic=True))
    model = tiny_model()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + 0.5)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(found["logits"], wanted, rtol=1e-4, atol=1e-5)


async def test_each_model_answers_for_itself(transport: GrpcTransport) -> None:
    """Two models behind one port: the embedded one knows the capital of France, the random one has another width."""
    (row,) = await transport.tokenize("demo", ["The capital of France is"])
    (paris,) = await transport.tokenize("demo", ["Paris"], add_special_tokens=False)
    logits = (await values(transport, read("logits", (row.ids,)), model="demo"))["x"]
    assert logits[0, -1].argmax() == paris.ids[0]
    card = await transport.get_model("demo")
    assert card.d_model != D_MODEL
    assert logits.shape == (1, len(row.ids), card.d_vocab)


async def test_usage_and_event_order(transport: GrpcTransport) -> None:
    """Started comes first and Done last, with times and bytes."""
    graph = read("logits", (await tokens(transport),))
    events = [e async for e in transport.execute(TINY, graph, OPTIONS, timeout_s=60.0)]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Done)
    usage = events[-1].usage
    assert usage.bytes_in > 0
    assert usage.bytes_out == sum(e.value.nbytes for e in events if isinstance(e, TensorValue))
    assert usage.run_ms > 0


@pytest.mark.parametrize(
    ("node", "error", "text"),
    [
        (Node("site.read", (), {"site": "blocks.9.resid_post"}, 0), UnknownSiteError, "blocks.9.resid_post"),
        (Node("matmul", (0, 0)), ShapeError, "matmul"),
        (Node("getitem", (0,), {"index": (("int", 7),)}), IndexOutOfRangeError, "7"),
    ],
)
async def test_error_details_pass_the_ingress(
    transport: GrpcTransport, node: Node, error: type[GraphError], text: str
) -> None:
    """A broken rule arrives as its own class, with the node at fault, and the next request is served."""
    ids = await tokens(transport)
    graph = Graph((Run((ids,)),), (Node("site.read", (), {"site": "embed"}, 0), node), (Output("x", 1),))
    with pytest.raises(error) as caught:
        await values(transport, graph)
    assert caught.value.node == 1
    assert text in str(caught.value)
    assert (await values(transport, read("embed", (ids,))))["x"].shape == (1, len(ids), D_MODEL)


async def test_status_and_trailers_for_other_clients(channel: grpc.aio.Channel, service: Served) -> None:
    """A client that knows gRPC only sees the status code and google.rpc details in the trailers."""
    call = channel.unary_stream("/patchbay.v1.PatchbayService/Execute")(
        b"\xff\xff", metadata=(("application", TINY), ("authorization", f"Bearer {service.api_key}"))
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata() or ())


async def test_limits_are_enforced(transport: GrpcTransport) -> None:
    """A result beyond the limit is refused by name before it runs."""
    ids = await tokens(transport)
    huge = Node("broadcast_to", (0,), {"shape": (1 << 20, len(ids), D_MODEL)})
    graph = Graph((Run((ids,)),), (Node("site.read", (), {"site": "embed"}, 0), huge), (Output("x", 1),))
    with pytest.raises(LimitExceededError) as caught:
        await values(transport, graph)
    assert caught.value.limit.startswith("max_")


@pytest.mark.parametrize("key", [None, "", "pbk_wrong"])
async def test_strangers_are_refused(service: Served, key: str | None) -> None:
    """Without a valid key no call is answered, in either application."""
    transport = GrpcTransport(service.target, api_key=key)
    try:
        with pytest.raises(UnauthenticatedError):
            await transport.list_models()
        with pytest.raises(UnauthenticatedError):
            await transport.get_model(TINY)
        with pytest.raises(UnauthenticatedError):
            await values(transport, read("embed", ((2, 3),)))
    finally:
        await transport.close()


async def until(condition: str, attempt, timeout_s: float = 55.0):  # type: ignore[no-untyped-def]
    """Try again and again until `attempt` returns without a PatchbayError."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            return await attempt()
        except PatchbayError as error:
            assert asyncio.get_running_loop().time() < deadline, f"{condition}: still {error!r}"
            await asyncio.sleep(0.1)


async def test_keys_made_and_revoked_while_serving(service: Served) -> None:
    """A key that `patchbay keys` makes is accepted within a minute, and refused within a minute of being revoked."""
    assert service.config_home is not None
    file = service.config_home / "patchbay" / "keys.json"
    command = [sys.executable, "-m", "patchbay_server.cli", "keys", "--file", str(file)]
    made = subprocess.run([*command, "create", "ada"], capture_output=True, text=True, check=True)
    transport = GrpcTransport(service.target, api_key=made.stdout.strip())
    try:
        await until("a new key", lambda: transport.get_model(TINY))
        subprocess.run([*command, "revoke", "ada"], capture_output=True, check=True)

        async def refused() -> None:
            try:
                await transport.get_model(TINY)
            except UnauthenticatedError:
                return
            raise NotFoundError("still accepted")

        await until("a revoked key", refused)
    finally:
        await transport.close()


async def test_unknown_model(transport: GrpcTransport) -> None:
    """A model that nobody hosts is NOT_FOUND, with the names of those that are: the ingress alone knows none."""
    with pytest.raises(NotFoundError, match=f"hosts no model 'nobody'; it hosts: .*{TINY}"):
        await transport.get_model("nobody")
    with pytest.raises(NotFoundError, match=f"did you mean '{TINY}'"):
        await transport.get_model(f"{TINY}y")


async def test_cancelling_reaches_the_engine(transport: GrpcTransport) -> None:
    """Closing the stream of a long execution stops it between layers: the model is free long before it would be."""
    passes = 2_000
    nodes = tuple(Node("site.read", (), {"site": "logits"}, i) for i in range(passes))
    outputs = (Output("x", passes - 1), Output("y", 0))
    runs = tuple(Run(((2 + i % 9,) * 60,)) for i in range(passes))
    # Every run must be needed for it to be run: sum one number of each.
    sums = [Node("sum", (i,)) for i in range(passes)]
    total = [Node("add", (passes, passes + 1))]
    total += [Node("add", (2 * passes + i, passes + 2 + i)) for i in range(passes - 2)]
    graph = Graph(runs, (*nodes, *sums, *total), (Output("total", 3 * passes - 2), *outputs[1:]))
    events = transport.execute(TINY, graph, ExecuteOptions(deterministic=True), timeout_s=300.0)
    async for event in events:
        if isinstance(event, Progress):
            assert event.pass_index < passes // 2
            break
    await events.aclose()  # type: ignore[attr-defined]
    after = [e async for e in transport.execute(TINY, read("embed", ((2, 3),)), OPTIONS, timeout_s=5.0)]
    assert isinstance(after[-1], Done)


async def test_big_result(transport: GrpcTransport) -> None:
    """A result of 64 MiB arrives whole: the embeddings of 1024 rows of 64 tokens, bit for bit."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, size=(1024, 64))
    graph = read("embed", tuple(tuple(int(t) for t in row) for row in ids))
    found = (await values(transport, graph))["x"]
    assert found.nbytes == 64 * 2**20
    weights = tiny_model().get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(found, weights[ids])


async def test_health_through_the_ingress(channel: grpc.aio.Channel) -> None:
    """grpc.health.v1 answers for each application, without a key."""
    health = health_pb2_grpc.HealthStub(channel)
    for application in ("control", TINY):
        metadata = (("application", application),)
        answer = await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(), metadata=(("application", TINY),))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_reflection_through_the_ingress(channel: grpc.aio.Channel) -> None:
    """A tool such as grpcurl can ask which services there are."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    call = stub.ServerReflectionInfo(requests, metadata=(("application", "control"),))
    names = {s.name async for answer in call for s in answer.list_services_response.service}
    assert {"patchbay.v1.PatchbayService", "grpc.health.v1.Health"} <= names


async def test_the_ingress_is_haproxy_where_it_can_be(service: Served) -> None:
    """On machines with HAProxy the calls above went through it."""
    assert bool(service.pids("haproxy")) == (haproxy_binary() is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the listening sockets from /proc")
@pytest.mark.skipif(haproxy_binary() is None, reason="Serve's own proxy is not started through our script")
def test_only_the_grpc_port_of_haproxy_is_for_others(service: Served) -> None:
    """Of HAProxy's listeners one is on all interfaces, the configured port; figures and HTTP stay on loopback."""
    sockets = set()
    for pid in service.pids("haproxy"):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in sockets:
            address, _, port = fields[1].partition(":")
            found.add((address, int(port, 16)))
    assert {port for address, port in found if address != "0100007F"} == {service.config.port}
    assert len(found) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the replica's process in /proc")
async def test_a_killed_replica_is_replaced(service: Served, transport: GrpcTransport) -> None:
    """When a model's process dies, Ray Serve starts another, and requests succeed again."""
    (old,) = service.pids(f"ServeReplica:{TINY}")
    os.kill(old, signal.SIGKILL)
    found = await until("a new replica", lambda: values(transport, read("embed", ((2, 3),))))
    assert found["x"].shape == (1, 2, D_MODEL)
    assert old not in service.pids(f"ServeReplica:{TINY}")
