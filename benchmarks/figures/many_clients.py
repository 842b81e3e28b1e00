"""Many users at once: requests of different clients must share forwards."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from benchmarks.connected import Connected
from benchmarks.figure import Contender, Figure, Plan, Scale, Service, Trials
from benchmarks.models import MODELS, load, prompts, wait
from benchmarks.samples import Finding
from benchmarks.work import Work


class Rows(Work):
    """The rows that somebody reads, `clients` x `each` of them.

    Args:
        model: its name.
        length: tokens of a row.
        clients: how many work at once.
        each: requests of each, one after the other.
        device: where.
    """

    #: What was read, a row each.
    found: Any

    def __init__(self, model: str, length: int, clients: int, each: int, device: str) -> None:
        self.name, self.length, self.clients, self.each, self.device = model, length, clients, each, device
        self.layer = MODELS[model].layers - 1

    def rows(self, round_: int) -> list[list[int]]:
        return prompts(MODELS[self.name].vocabulary, self.clients * self.each, self.length, 300 + round_)

    def values(self) -> Mapping[str, Any]:
        return {"last": self.found}


class Clients(Connected, Rows):
    """Closed-loop clients of a service in another process: each asks again when it has its answer.

    Args:
        address: of the service.
        keys: of its accounts.
        of: how many rows the round has; clients that do fewer take the first ones.
    """

    def __init__(self, address: str, keys: Mapping[str, str | None], of: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self._address, self._keys = address, keys
        self._of = of or self.clients * self.each

    def prepare(self) -> None:
        self.connect(self._address, self._keys)

    def run(self, round_: int) -> Mapping[str, float]:
        import numpy as np

        self.found = np.full((self._of, MODELS[self.name].width), np.nan, np.float32)
        self.wait(self._all(self.rows(round_)))
        return {"rows": float(self.clients * self.each)}

    async def _all(self, rows: list[list[int]]) -> None:
        await asyncio.gather(*(self._one(rows, i) for i in range(self.clients)))

    async def _one(self, rows: list[list[int]], client: int) -> None:
        for at in range(client, len(rows), self.clients):
            async with self.hosted.trace(rows[at]) as run:
                value = run.blocks[self.layer].resid_post[:, -1].save()
            self.found[at] = value.value[0]


class Ideal(Rows):
    """The same rows in plain batched forwards of the model without its unembedding, which the read does not need."""

    def prepare(self) -> None:
        self._trunk = load(self.name, self.device).base_model
        layers = self._trunk.layers if hasattr(self._trunk, "layers") else self._trunk.h
        layers[-1].register_forward_hook(self._take)

    def _take(self, module: Any, args: Any, out: Any) -> None:
        self._last = (out if hasattr(out, "shape") else out[0])[:, -1].clone()

    def run(self, round_: int) -> Mapping[str, float]:
        import torch

        rows = self.rows(round_)
        found = []
        with torch.no_grad():
            for start in range(0, len(rows), self.clients):
                self._trunk(torch.tensor(rows[start : start + self.clients], device=self.device))
                found.append(self._last)
        wait(self.device)
        self.found = torch.cat(found).float().cpu().numpy()
        return {"rows": float(len(rows))}


def plan(scale: Scale) -> Plan:
    clients, each = scale.choose(full=(32, 5), quick=(32, 3), gpu=(32, 20), tiny=(3, 2))
    settings = {
        "model": scale.choose(full="llama-12x768", quick="llama-4x256", gpu="llama-32x4096", tiny="llama-2x32"),
        "length": scale.choose(full=32, quick=32, tiny=8),
        "device": scale.device,
    }
    many = {**settings, "clients": clients, "each": each}
    single = {**settings, "clients": 1, "each": clients * each // scale.choose(full=5, quick=3, tiny=1)}
    scaled = clients * each / single["each"]
    shared: dict[str, Any] = {"service": "plain", "own_process": True, "against": "ideal"}
    return Plan(
        contenders=[
            Contender("patchbay", f"{clients} clients at once", "Clients", settings=many, **shared),
            Contender(
                "alone",
                "one request at a time",
                "Clients",
                settings={**single, "of": clients * each},
                scale=scaled,
                **shared,
            ),
            Contender("ideal", f"plain batched forwards of {clients} rows", "Ideal", settings=many),
        ],
        rounds=scale.choose(full=5, quick=3, tiny=1),
        settings=many,
        models=[settings["model"]],
        services={"plain": Service(settings["model"])},
        notes=[
            f"One request at a time: {single['each']} of the {clients * each} requests, scaled; the others do all.",
        ],
        tolerance=scale.choose(full=1e-3, quick=1e-3, gpu=0.3),
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    gain = 10.0 if scale.mode == "gpu" else 1.3
    return [
        *trials.faster("patchbay", "ideal", "32 clients, rows per second: against ideal batched forwards", 0.85),
        *trials.faster("patchbay", "alone", "32 clients, rows per second: against one request at a time", gain),
        *trials.faster("ideal", "alone", "the same: what ideal batches give over one request at a time", None),
    ]


FIGURE = Figure(
    name="many_clients",
    title="32 clients with one-site reads",
    what=(
        "A random Llama (12 layers, d 768) behind plain gRPC, rows of 32 tokens, `blocks[11].resid_post[:, "
        "-1]`. 32 closed-loop clients in one process, one account. The ideal: plain forwards of 32 rows each, "
        "without the unembedding, in a process of their own."
    ),
    why="A hosted model is shared; what one forward costs should be shared too.",
    how="Time for all rows, clients' and service's work on the same cores; torch threads alike.",
    plan=plan,
    findings=findings,
)
