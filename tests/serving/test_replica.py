"""What a Ray Serve replica does besides our own calls, without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped,unused-ignore]

from patchbay_server.serving.replica import MAX_WATCHES, GrpcMethods


class Context:
    """The part of a call's context that the health service uses."""

    code: Any = None

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        assert details


async def test_watches_of_health_are_few() -> None:
    """Nobody is asked for a key to watch, so watches cannot fill a replica; one that ends makes room."""
    replica = GrpcMethods()
    replica._check = lambda: None
    request = SimpleNamespace(service="")
    watches = [replica.Watch(request, Context()) for _ in range(MAX_WATCHES)]
    for watch in watches:
        assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVING
    refused = Context()
    assert [answer async for answer in replica.Watch(request, refused)] == []
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await watches.pop().aclose()  # type: ignore[attr-defined]
    again = replica.Watch(request, Context())
    assert (await anext(again)).status == health_pb2.HealthCheckResponse.SERVING
    for watch in (*watches, again):
        await watch.aclose()  # type: ignore[attr-defined]
    assert replica._watches == 0
