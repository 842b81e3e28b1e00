"""Whatever ends the service, no process of it stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from patchbay.errors import GraphError, UnknownSiteError
from patchbay.ir.events import Done, Event, ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.transport.grpc import GrpcTransport
from tests.serving_fixtures import (
    TINY,
    Served,
    start_cli,
    stop_cli,
    tiny_config,
    wait_for_line,
    wait_gone,
    wait_ready,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="follows processes through /proc and pidfds")

STOP_TIMEOUT_S = 60.0


@pytest.fixture(params=[{}])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """`patchbay serve`, just started, with every file of its own under one folder (short enough for Ray's sockets).

    The parameter is what the configuration says of Ray.
    """
    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp") as home:
        ray = {"temp_dir": f"{home}/r", **request.param}
        served = start_cli(tiny_config(torch_threads=1, ray=ray), Path(home))
        try:
            yield served
        finally:
            stop_cli(served)


def folders(served: Served) -> list[Path]:
    """What the service left of its own folder."""
    assert served.config.ray.temp_dir is not None
    return list(served.config.ray.temp_dir.glob("*"))


@pytest.mark.parametrize("served", [{"haproxy": False}], indirect=True)
def test_without_haproxy_and_ctrl_c(served: Served) -> None:
    """Serve's own proxy serves as well, and says so; SIGINT: status 0, every process gone, the folder removed."""
    served = wait_ready(served)
    assert "using Ray Serve's own proxy, since ray.haproxy is false" in "".join(served.log)
    assert not served.pids("haproxy -")

    async def ask() -> tuple[str, type[Exception]]:
        transport = GrpcTransport(served.target, api_key=served.api_key)
        try:
            (summary,) = await transport.list_models()
            run, read = Run(((2, 3),)), Node("site.read", (), {"site": "nowhere"}, 0)
            with pytest.raises(GraphError) as caught:
                async for _ in transport.execute(TINY, Graph((run,), (read,), (Output("x", 0),)), ExecuteOptions()):
                    pass
            return summary.name, caught.type
        finally:
            await transport.close()

    assert asyncio.run(ask()) == (TINY, UnknownSiteError)
    pids = served.pids()
    assert served.pids("gcs_server")
    assert served.pids("ServeReplica")
    assert stop_cli(served) == 0
    assert wait_gone(pids, STOP_TIMEOUT_S) == []
    assert folders(served) == []


@pytest.mark.parametrize("served", [{"drain_s": 120.0}], indirect=True)
def test_what_runs_may_end(served: Served) -> None:
    """SIGTERM while a request of many forwards runs: its client gets every value, and then all is gone."""
    served = wait_ready(served)
    rows = tuple(tuple(range(1, 19)) * 3 for _ in range(64))
    reads = [Node("site.read", (), {"site": "blocks.1.resid_post"}, run) for run in range(64)]
    means = [Node("mean", (run,), {}) for run in range(64)]
    outputs = tuple(Output(f"x{run}", 64 + run) for run in range(64))
    graph = Graph(tuple(Run(rows) for _ in range(64)), (*reads, *means), outputs)
    options = ExecuteOptions(disabled=("merge_runs", "common_subexpressions", "batch_runs"))

    async def ask() -> list[Event]:
        transport = GrpcTransport(served.target, api_key=served.api_key)
        events = []
        try:
            async for event in transport.execute(TINY, graph, options):
                if isinstance(event, TensorValue) and not any(isinstance(e, TensorValue) for e in events):
                    assert served.process is not None
                    served.process.send_signal(signal.SIGTERM)
                events.append(event)
            return events
        finally:
            await transport.close()

    pids = served.pids()
    events = asyncio.run(ask())
    assert len([event for event in events if isinstance(event, TensorValue)]) == 64
    assert isinstance(events[-1], Done)
    assert served.process is not None
    assert served.process.wait(STOP_TIMEOUT_S) == 0  # a second signal would not wait
    assert wait_gone(pids, STOP_TIMEOUT_S) == []


def test_ctrl_c_while_starting(served: Served) -> None:
    """SIGTERM before the service is up ends it just as well."""
    wait_for_line(served, "starting the gRPC ingress")
    pids = served.pids()
    assert served.pids("raylet")
    assert stop_cli(served, signal.SIGTERM) == 0
    assert wait_gone(pids, STOP_TIMEOUT_S) == []
    assert folders(served) == []


def test_the_node_is_killed(served: Served) -> None:
    """When Ray's driver dies without a word, the launcher ends what is left and says that it was not asked to."""
    wait_for_line(served, "loading")
    (node,) = served.pids("patchbay_server.serving.node")
    pids = served.pids()
    os.kill(node, signal.SIGKILL)
    assert served.process is not None
    assert served.process.wait(STOP_TIMEOUT_S) == 1
    assert wait_gone(pids, STOP_TIMEOUT_S) == []
    wait_for_line(served, "ended unexpectedly (signal 9)")


def test_the_launcher_is_killed(served: Served) -> None:
    """When the launcher itself is killed, the node notices and takes everything down with it."""
    wait_for_line(served, "loading")
    pids = served.pids()
    assert served.process is not None
    served.process.kill()
    served.process.wait(STOP_TIMEOUT_S)
    assert wait_gone(pids, STOP_TIMEOUT_S) == []
