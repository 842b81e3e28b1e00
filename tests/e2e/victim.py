"""The server that hostile requests are sent to: a process of its own, and what must hold of it after every test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from patchbay.ir.events import Done, Event, ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.transport.grpc import GrpcTransport
from tests.wire.hostile_server import KEY

#: Four requests of 20 MiB at once are held as network buffers, bytes and messages: 3 x 80 MiB; measured 320 MiB.
MAX_GROWTH_BYTES = 448 * 2**20
ROOT = Path(__file__).resolve().parents[2]
TOKENS = Run(((2, 3, 4),))
READ = Node("site.read", attrs={"site": "blocks.1.resid_post"}, run=0)
GOOD = Graph(runs=(TOKENS,), nodes=(READ,), outputs=(Output("h", 0),))


@dataclass
class Victim:
    """The server's process.

    Attributes:
        process: its process.
        address: host:port.
        log: what it wrote to stderr.
        expected: events of the good request before anything hostile was sent.
        baseline_bytes: its memory then.
    """

    process: subprocess.Popen[str]
    address: str
    log: Path
    expected: list[TensorValue] = field(default_factory=list)
    baseline_bytes: int = 0

    def peak_bytes(self) -> int:
        """The most memory that it has ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    log = tmp_path_factory.mktemp("hostile") / "server.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.wire.hostile_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    victim = Victim(process, f"127.0.0.1:{line.strip()}", log)
    victim.expected = [e for e in asyncio.run(good(victim.address)) if isinstance(e, TensorValue)]
    victim.baseline_bytes = victim.peak_bytes()
    yield victim
    process.communicate(timeout=30)
    assert process.returncode == 0, log.read_text()


async def good(address: str) -> list[Event]:
    async with connection(address) as transport:
        return [e async for e in transport.execute("tiny", GOOD, ExecuteOptions(), timeout_s=60)]


@contextlib.asynccontextmanager
async def connection(address: str, key: str | None = KEY) -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(address, api_key=key)
    try:
        yield transport
    finally:
        await transport.close()


@pytest.fixture(autouse=True)
async def unharmed(victim: Victim) -> AsyncIterator[None]:
    """After each test: alive, right, small, and without a traceback in the log."""
    yield
    assert victim.process.poll() is None
    events = await good(victim.address)
    assert [e for e in events if isinstance(e, TensorValue)] == victim.expected
    assert isinstance(events[-1], Done)
    grown = victim.peak_bytes() - victim.baseline_bytes
    assert grown < MAX_GROWTH_BYTES, f"{grown / 2**20:.0f} MiB"
    assert "Traceback" not in victim.log.read_text()


async def execute(victim: Victim, graph: Graph, options: ExecuteOptions | None = None) -> list[Event]:
    async with connection(victim.address) as transport:
        return [e async for e in transport.execute("tiny", graph, options or ExecuteOptions(), timeout_s=60)]
