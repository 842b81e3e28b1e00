"""A servicer over a fake model, reached in-process and across a real gRPC connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio
import pytest

from patchbay.transport.base import Transport
from patchbay.transport.grpc import GrpcTransport
from patchbay.transport.local import LocalTransport
from patchbay_server.transport.auth import DigestKeys, KeyAuthenticator
from patchbay_server.transport.registration import add_servicer_to_server
from patchbay_server.transport.servicer import Servicer
from tests.wire.fakes import FakeBackend, FakeCatalog

KEY = "pb_test_key"


@dataclass
class Service:
    """A running servicer.

    Attributes:
        backend: the fake model behind it.
        servicer: the servicer.
        transport: a connection to it, with a valid key.
        address: host:port of its gRPC server; empty in-process.
    """

    backend: FakeBackend
    servicer: Servicer
    transport: Transport
    address: str


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def servicer(backend: FakeBackend) -> Servicer:
    return Servicer(FakeCatalog(backend), KeyAuthenticator(DigestKeys({KEY: "ada"})))


@pytest.fixture
async def address(servicer: Servicer) -> AsyncIterator[str]:
    """Address of a plain gRPC server with the servicer."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_servicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture(params=["local", "grpc"])
async def service(
    request: pytest.FixtureRequest, backend: FakeBackend, servicer: Servicer, address: str
) -> AsyncIterator[Service]:
    """The servicer behind each transport in turn."""
    if request.param == "local":
        transport: Transport = LocalTransport(servicer, KEY)
        address = ""
    else:
        transport = GrpcTransport(address, api_key=KEY, timeout_s=30)
    yield Service(backend, servicer, transport, address)
    await transport.close()
