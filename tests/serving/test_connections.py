"""What strangers and clients may keep open at the plain gRPC server: connections, calls, pings, unfinished messages."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from patchbay.transport.grpc import GrpcTransport
from patchbay_server.config import Config, KeysConfig
from patchbay_server.serving.local import LocalCatalog
from patchbay_server.serving.plain import PlainServer, channel_options, serve_grpc
from patchbay_server.serving.replica import MAX_WATCHES, servicer_of

SERVING = health_pb2.HealthCheckResponse.SERVING
METHOD = "/patchbay.v1.PatchbayService/"
#: Channels of a process share a connection, unless each has a pool of its own.
OWN = ("grpc.use_local_subchannel_pool", 1)


@asynccontextmanager
async def serving(*, insecure: bool = True, file: Path | None = None, **connections: Any) -> AsyncIterator[PlainServer]:
    """A server without models."""
    keys = KeysConfig(file=file, write_local=False)
    config = Config.parse(
        {"host": "127.0.0.1", "port": 0, "insecure": insecure, "connections": connections, "keys": keys.model_dump()}
    )
    server = await serve_grpc(servicer_of(config, LocalCatalog({})), config)
    try:
        yield server
    finally:
        await server.stop(0)


def channel(server: PlainServer, *options: tuple[str, int]) -> grpc.aio.Channel:
    """A connection of its own."""
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=[OWN, *options])


async def watching(one: grpc.aio.Channel, stack: AsyncExitStack) -> Any:
    """A health watch that has had its first answer; it is over when `stack` is."""
    watch = health_pb2_grpc.HealthStub(one).Watch(health_pb2.HealthCheckRequest())
    stack.push_async_callback(ended, watch)
    assert (await watch.read()).status == SERVING
    return watch


async def ended(call: Any) -> grpc.StatusCode:
    """Cancel a call where it is not over; how it ended."""
    call.cancel()
    return await status(call)


async def status(call: Any) -> grpc.StatusCode:
    """How a call ended that gives no answer."""
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        assert await call.read() is grpc.aio.EOF
    return await call.code()  # type: ignore[no-any-return]


async def test_a_connection_too_many_is_closed() -> None:
    """Whoever comes when the server has all the connections that it takes is UNAVAILABLE, until one leaves."""
    async with serving(max_connections=2) as server:
        channels = [channel(server) for _ in range(3)]
        for each in channels[:2]:
            await each.unary_unary(f"{METHOD}ListModels")(b"", timeout=60)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channels[2].unary_unary(f"{METHOD}ListModels")(b"", timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await channels[0].close()
        await channels[2].unary_unary(f"{METHOD}ListModels")(b"", timeout=60, wait_for_ready=True)
        for each in channels:
            await each.close()


async def test_a_call_too_many_waits_in_the_client() -> None:
    """On one connection the third call is not answered before one of the two that are allowed has ended."""
    async with serving(max_calls=2) as server, AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(channel(server)) for _ in range(2)]
        first, _ = await watching(one, stack), await watching(one, stack)
        third = asyncio.ensure_future(watching(one, stack))
        for _ in range(3):
            await health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert not third.done()
        await ended(first)
        await asyncio.wait_for(third, 60)


async def test_watches_are_counted() -> None:
    """Nobody is asked for a key there, so only so many may watch the health; Check is answered all the same."""
    async with serving() as server, channel(server) as one, AsyncExitStack() as stack:
        stub = health_pb2_grpc.HealthStub(one)
        for _ in range(MAX_WATCHES):
            await watching(one, stack)
        refused = stub.Watch(health_pb2.HealthCheckRequest())
        assert await status(refused) == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)).status == SERVING


async def test_who_has_no_key_is_turned_away_before_the_message(tmp_path: Path) -> None:
    """A call without a key is over on its headers: a message that never ends cannot fill the server's memory."""
    async with serving(insecure=False, file=tmp_path / "keys.json") as server, channel(server) as one:
        endless = asyncio.Event()

        async def never() -> AsyncIterator[bytes]:
            await endless.wait()
            yield b""

        for method in ("Execute", "Tokenize", "PutArtifact"):
            call = one.stream_stream(METHOD + method)(never(), timeout=60)
            assert await status(call) == grpc.StatusCode.UNAUTHENTICATED
            assert "PATCHBAY_API_KEY" in str(await call.details())
            assert "grpc-status-details-bin" in dict(await call.trailing_metadata())


async def test_an_old_connection_is_left_without_a_call_lost() -> None:
    """Connections of a hundredth of a second lose none of three hundred calls: clients open new ones by themselves."""
    async with serving(max_age_s=0.01, age_grace_s=60.0) as server:
        transport = GrpcTransport(f"127.0.0.1:{server.port}")
        assert [await transport.list_models() for _ in range(300)] == [()] * 300
        await transport.close()


async def test_an_idle_connection_is_closed_and_comes_back() -> None:
    """A connection without calls is closed; the next call opens another."""
    async with serving(max_idle_s=0.05) as server, channel(server) as one:
        await one.unary_unary(f"{METHOD}ListModels")(b"", timeout=60)
        while (state := one.get_state()) != grpc.ChannelConnectivity.IDLE:
            await asyncio.wait_for(one.wait_for_state_change(state), 60)
        await one.unary_unary(f"{METHOD}ListModels")(b"", timeout=60)


async def test_a_client_that_is_gone_without_a_word_is_noticed() -> None:
    """A connection whose other end answers no ping is closed (a laptop that was shut, a cable)."""
    async with serving(keepalive_s=1.0, keepalive_timeout_s=0.2) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as mute:
            mute.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(mute, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            heard = b"."
            while heard:
                try:
                    heard = await asyncio.wait_for(loop.sock_recv(mute, 4096), 60)
                except ConnectionResetError:
                    break


@pytest.mark.parametrize(("interval_s", "stays"), [(600.0, False), (0.001, True)])
async def test_pings_are_allowed_as_often_as_configured(interval_s: float, stays: bool) -> None:
    """A client that pings more often than it may is disconnected, one that keeps to it is not."""
    often = (("grpc.keepalive_time_ms", 50), ("grpc.http2.max_pings_without_data", 0))
    async with serving(min_ping_interval_s=interval_s) as server, channel(server, *often) as one:
        async with AsyncExitStack() as stack:
            watch = await watching(one, stack)
            over = asyncio.ensure_future(status(watch))
            await asyncio.wait([over], timeout=2.0 if stays else 60.0)
            assert over.done() is not stays
        assert await over == (grpc.StatusCode.CANCELLED if stays else grpc.StatusCode.UNAVAILABLE)


def test_calls_outlive_their_connections_age_by_the_deadline() -> None:
    """Unless said otherwise, a request on a connection that ends has its whole deadline, and time to be read."""
    options = dict(channel_options(Config.parse({"limits": {"deadline_s": 1000.0}})))
    assert options["grpc.max_connection_age_grace_ms"] == 1_300_000
    said = dict(channel_options(Config.parse({"connections": {"age_grace_s": 7.5}})))
    assert said["grpc.max_connection_age_grace_ms"] == 7_500
