"""That one account's flood does not starve another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Service, Trials
from benchmarks.figures.many_clients import Ideal
from benchmarks.models import MODELS, prompts
from benchmarks.samples import Finding
from benchmarks.spread import percentile, ratio
from benchmarks.work import Work

FLOOD, QUIET = "flood", "quiet"


class Quiet(Work):
    """An account that sends one request after the other, alone or beside another that floods.

    Args:
        model: its name.
        length: tokens of a row.
        requests: of the quiet account.
        flood: requests that the other account keeps in the service; 0: it is idle.
        address: of the service.
        keys: of its accounts.
    """

    def __init__(
        self, model: str, length: int, requests: int, flood: int, address: str, keys: Mapping[str, str | None]
    ) -> None:
        self._model, self._length, self._requests, self._flood = model, length, requests, flood
        self._address, self._keys = address, keys

    def warm(self) -> None:
        requests, self._requests = self._requests, 2
        self.run(-1)
        self._requests = requests

    def run(self, round_: int) -> Mapping[str, float]:
        return asyncio.run(self._measure(round_))

    async def _measure(self, round_: int) -> dict[str, float]:
        import patchbay as pb

        vocabulary = MODELS[self._model].vocabulary
        rows = prompts(vocabulary, self._requests, self._length, 4000 + round_)
        others = prompts(vocabulary, 64, self._length, 5000 + round_)
        done = 0
        async with (
            pb.connect_async(self._address, api_key=self._keys[QUIET]) as quiet,
            pb.connect_async(self._address, api_key=self._keys[FLOOD]) as flooding,
        ):
            (summary,) = await quiet.models()
            mine, theirs = await quiet.model(summary.name), await flooding.model(summary.name)
            at_work = asyncio.Semaphore(0)

            async def pour(number: int) -> None:
                nonlocal done
                for i in range(1_000_000):
                    await self._read(theirs, others[(number + 7 * i) % len(others)])
                    done += 1
                    at_work.release()

            tasks = [asyncio.create_task(pour(n)) for n in range(self._flood)]
            try:
                for _ in tasks:  # every one has had an answer: the flood is steady
                    await at_work.acquire()
                before, start = done, time.perf_counter()
                times = []
                for row in rows:
                    asked = time.perf_counter()
                    await self._read(mine, row)
                    times.append(time.perf_counter() - asked)
                elapsed = time.perf_counter() - start
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result
        return {
            "p50": percentile(times, 0.5),
            "p99": percentile(times, 0.99),
            "flood_rows_per_s": (done - before) / elapsed,
        }

    async def _read(self, model: Any, row: list[int]) -> None:
        async with model.trace(row) as run:
            run.blocks[-1].resid_post[:, -1].save()


class Batch(Ideal):
    """One batch of the flood: a plain forward of as many rows as it keeps in the service."""


def plan(scale: Scale) -> Plan:
    name = scale.choose(full="llama-12x768", quick="llama-4x256", gpu="llama-32x4096", tiny="llama-2x32")
    flood = scale.choose(full=24, quick=24, tiny=3)
    length = scale.choose(full=32, quick=32, tiny=8)
    shared = {"model": name, "length": length, "requests": scale.choose(full=20, quick=15, tiny=3)}
    batch = {"model": name, "length": length, "clients": flood, "each": 1, "device": scale.device}
    way: dict[str, Any] = {"service": "plain", "own_process": True}
    return Plan(
        contenders=[
            Contender("alone", "the quiet account alone", "Quiet", settings={**shared, "flood": 0}, **way),
            Contender("flooded", "beside a flood", "Quiet", settings={**shared, "flood": flood}, **way),
            Contender("batch", "one plain forward of the flood's rows", "Batch", settings=batch),
        ],
        rounds=scale.choose(full=3, quick=2, tiny=1),
        settings={**shared, "flood": flood},
        models=[name],
        services={"plain": Service(name, accounts=(FLOOD, QUIET))},
        notes=["With so few requests a trial, its p99 is the slowest of them."],
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    if not trials.has("alone", "flooded", "batch"):
        return []
    alone, flooded = trials.series("alone", "p99"), trials.series("flooded", "p99")
    allowed = [2 * a + b for a, b in zip(alone, trials.series("batch"), strict=True)]
    what = "fairness: p99 beside a flood / (twice its p99 alone + one batch)"
    return [
        Finding(what, ratio(flooded, allowed), "x", 1.0, at_least=False),
        Finding("the same: p99 beside a flood / p99 alone", ratio(flooded, alone), "x", None, at_least=False),
        *trials.value("flooded", "flood_rows_per_s", "the same: rows per second of the flood meanwhile", "rows/s"),
    ]


FIGURE = Figure(
    name="fairness",
    title="Fairness between accounts",
    what=(
        "A random Llama (12 layers, d 768) behind plain gRPC with two keys. One account keeps 24 one-site "
        "reads in the service at all times, another sends 20, one after the other."
    ),
    why="On a shared server one user's loop must not end the others' day.",
    how=(
        "The quiet account's p99 beside the flood, against twice its p99 on the idle server plus the time of "
        "one plain forward of 24 rows."
    ),
    plan=plan,
    findings=findings,
)
