"""What a Ray Serve replica does besides our own calls, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped,unused-ignore]

from patchbay_server.config import Config
from patchbay_server.serving.replica import MAX_WATCHES, GrpcMethods, set_up_logging


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


@pytest.fixture
def core_log() -> Iterator[logging.Logger]:
    """gRPC's own logger, left as it was."""
    logger = logging.getLogger("grpc._cython.cygrpc")
    level, filters = logger.level, list(logger.filters)
    yield logger
    logger.setLevel(level)
    logger.filters[:] = filters


def test_a_client_that_left_is_no_story_in_the_log(
    core_log: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC's traceback for a call that was cancelled while it was answered is left out; what else went wrong is not."""
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    set_up_logging(Config.parse({"log_level": "debug"}))
    set_up_logging(Config.parse({"log_level": "debug"}))
    for kind in (type("ExecuteBatchError", (Exception,), {}), RuntimeError):
        try:
            raise kind
        except Exception:
            core_log.exception("raised in core by servicer method")
    core_log.error("no exception")
    told = [record.exc_info[0] if record.exc_info else None for record in caplog.records]
    assert told == [RuntimeError, None]
