"""One real Ray service for the folder (and for whoever else asks `shared_ray`), and ways to talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest

pytest.importorskip("pydantic", reason="the service needs the server extra")

from patchbay.transport.grpc import GrpcTransport
from tests.serving_fixtures import Served, shared_ray, why_no_ray


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here starts or uses a Ray node; starting takes half a minute on two cores."""
    reason = why_no_ray()
    for item in items:
        if "tests/ray/" in item.path.as_posix():
            item.add_marker(pytest.mark.ray)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def service() -> Served:
    """The session's Ray service with the tiny model."""
    return shared_ray()


@pytest.fixture
async def transport(service: Served) -> AsyncIterator[GrpcTransport]:
    """A client's transport with the local key."""
    transport = GrpcTransport(service.target, api_key=service.api_key)
    yield transport
    await transport.close()


@pytest.fixture
async def channel(service: Served) -> AsyncIterator[grpc.aio.Channel]:
    """A bare gRPC channel."""
    async with grpc.aio.insecure_channel(service.target) as channel:
        yield channel
