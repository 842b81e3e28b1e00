"""How fast a large result travels, beside the same bytes through gRPC alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Service, Trials
from benchmarks.samples import Finding
from benchmarks.work import Work

#: The largest block that was freed is what glibc's malloc keeps from then on: that of Patchbay's client.
KEPT_BYTES = 16 * 2**20
#: Sizes of the bare stream's messages.
SIZES_KIB = (512, 1024)


def check(found: Any) -> None:
    """Whether an array counts from 0.

    Raises:
        ValueError: it does not.
    """
    import numpy as np

    if not np.array_equal(found[:: 2**10], np.arange(0, len(found), 2**10, dtype=np.float32)):
        raise ValueError("the result is not what was asked for")


class Bare(Work):
    """A generic `grpc.aio` stream between two processes: no protobuf, no checksum, no graph.

    Args:
        megabytes: MiB of a result.
        chunk_kib: size of a message.
        keeping: whether memory is used again as Patchbay's client does it: malloc is brought to keep what messages
            free, and the array is that of the trial before.
    """

    def __init__(self, megabytes: int, chunk_kib: int, *, keeping: bool = False) -> None:
        self._bytes, self._chunk, self._keeping = megabytes * 2**20, chunk_kib * 2**10, keeping
        self._found: Any = None

    def prepare(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_stream"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        self._port = int(self._server.stdout.readline())
        self._loop = asyncio.new_event_loop()
        if self._keeping:
            bytes(KEPT_BYTES)

    def run(self, round_: int) -> Mapping[str, float]:
        return self._loop.run_until_complete(self._receive())

    async def _receive(self) -> Mapping[str, float]:
        import grpc.aio
        import numpy as np

        from benchmarks.bare_stream import METHOD, OPTIONS

        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=OPTIONS) as channel:
            await channel.channel_ready()
            call: Any = channel.unary_stream(METHOD)
            start = time.perf_counter()
            if self._found is None or not self._keeping:
                self._found = np.empty(self._bytes, np.uint8)
            into, at = memoryview(self._found), 0
            async for piece in call(f"{self._bytes} {self._chunk}".encode()):
                into[at : at + len(piece)] = piece
                at += len(piece)
            wall_s = time.perf_counter() - start
        if at != self._bytes:
            raise ValueError(f"received {at} bytes of {self._bytes}")
        check(self._found.view(np.float32))
        return {"wall_s": wall_s, "bytes": float(at)}

    def close(self) -> None:
        self._loop.close()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=20)


class Result(Work):
    """The same number of bytes as a result of Patchbay: an `arange`, so that the model does nothing.

    Args:
        megabytes: MiB of a result.
        address: of the service.
        keys: of its accounts.
    """

    def __init__(self, megabytes: int, address: str, keys: Mapping[str, str | None]) -> None:
        self._count = megabytes * 2**20 // 4
        self._address, self._keys = address, keys

    def prepare(self) -> None:
        import patchbay as pb

        self._arange = pb.ops.arange
        self._client = pb.connect(self._address, api_key=self._keys.get(""))
        (summary,) = self._client.models()
        self._model = self._client.model(summary.name)

    def run(self, round_: int) -> Mapping[str, float]:
        start = time.perf_counter()
        with self._model.trace() as t:
            t.save(x=self._arange(self._count, dtype="float32"))
        found = t.results.x
        wall_s = time.perf_counter() - start
        if found.shape != (self._count,):
            raise ValueError(f"the result has the shape {found.shape}")
        check(found)
        return {"wall_s": wall_s, "bytes": float(found.nbytes), "engine_s": t.usage.run_ms / 1e3}

    def close(self) -> None:
        self._client.close()


def plan(scale: Scale) -> Plan:
    megabytes = scale.choose(full=64, quick=64, tiny=4)
    shared: dict[str, Any] = {"settings": {"megabytes": megabytes}, "own_process": True}
    bare = [
        Contender(
            f"bare_{kib}{'_keeping' if keeping else ''}",
            f"bare grpc.aio stream, {kib} KiB messages{', memory used again' if keeping else ''}",
            "Bare",
            own_process=True,
            settings={"megabytes": megabytes, "chunk_kib": kib, "keeping": keeping},
        )
        for keeping in (False, True)
        for kib in SIZES_KIB
    ]
    ours = [
        Contender("plain", "Patchbay, plain gRPC (direct)", "Result", service="plain", **shared),
        Contender("ray", "Patchbay, Ray Serve through HAProxy", "Result", service="ray", **shared),
    ]
    return Plan(
        contenders=bare[:1] if scale.mode == "tiny" else [*bare, *ours],
        rounds=scale.choose(full=15, quick=5, tiny=1),
        settings={"megabytes": megabytes},
        services={"plain": Service("demo"), "ray": Service("demo", plain=False)},
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    best = _fastest(trials, "")
    if best is None:
        return []
    found = [
        *trials.faster("ray", best, "64 MB result through HAProxy: against a bare stream", 0.6),
        *trials.faster("plain", best, "64 MB result, direct: against a bare stream", 0.9),
    ]
    keeping = _fastest(trials, "_keeping")
    if keeping is not None:
        what = "the same: against a bare stream that uses memory again too"
        found += trials.faster("plain", keeping, what, None)
    from benchmarks.spread import spread

    for name, what in (
        (best, "the bare stream itself"),
        ("plain", "64 MB result, direct"),
        ("ray", "64 MB result through HAProxy"),
    ):
        if trials.has(name):
            pairs = zip(trials.series(name, "bytes"), trials.series(name), strict=True)
            found.append(Finding(what, spread([b / s / 1e9 for b, s in pairs]), "GB/s"))
    return found


def _fastest(trials: Trials, kind: str) -> str | None:
    names = [name for kib in SIZES_KIB if trials.has(name := f"bare_{kib}{kind}")]
    return min(names, key=trials.median, default=None)


FIGURE = Figure(
    name="large_result",
    title="A result of 64 MB",
    what=(
        "64 MiB of float32 made by one operation (`arange`), received as a numpy array. The bare stream: the "
        "same array, made anew by numpy, from one `grpc.aio` process to another in messages of raw bytes, "
        "written into a preallocated array. Both sides' values are checked."
    ),
    why="Harvesting activations is bound by the wire.",
    how=(
        "Time of the call as the client sees it, the making of the values included; for Patchbay the checksums "
        "and the decoding too. The bare stream is the one with the faster of two sizes of message, and as gRPC comes: "
        "a process of its own, in which malloc gives the memory of messages back to the system and the array is new. "
        "Patchbay's client uses both again; a bare stream that does so too is measured beside it."
    ),
    plan=plan,
    findings=findings,
)
