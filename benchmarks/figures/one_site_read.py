"""What the whole service adds to one forward of a small model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Service, Trials
from benchmarks.models import prompts, wait
from benchmarks.samples import Finding
from benchmarks.spread import percentile
from benchmarks.work import Work

LENGTH = 8
#: Ids of the demo model's vocabulary that are words.
VOCABULARY = 700
LAYER = 3


def rows(round_: int, calls: int) -> list[list[int]]:
    """One prompt a call, never the same twice: no cache can answer."""
    return prompts(VOCABULARY, calls, LENGTH, 1000 + round_)


def of(times: list[float]) -> dict[str, float]:
    """Median and tail of single calls, seconds."""
    return {"p50": percentile(times, 0.5), "p90": percentile(times, 0.9), "p99": percentile(times, 0.99)}


class Bare(Work):
    """A plain forward of the model, logits included, and the value read from it by a hook.

    Args:
        calls: forwards per trial.
        device: where.
    """

    def __init__(self, calls: int, device: str) -> None:
        self._calls, self._device = calls, device

    def prepare(self) -> None:
        from patchbay_server.models.demo import load

        model, _ = load()
        self._model = model.to(self._device)

    def run(self, round_: int) -> Mapping[str, float]:
        import torch

        times, found = [], []
        for row in rows(round_, self._calls):
            start = time.perf_counter()
            with torch.no_grad():
                self._model(torch.tensor([row], device=self._device))
                wait(self._device)
            times.append(time.perf_counter() - start)
        layer = self._model.model.layers[LAYER]
        handle = layer.register_forward_hook(lambda module, args, out: found.append(out[0, -1].clone()))
        with torch.no_grad():
            self._model(torch.tensor([rows(round_, self._calls)[-1]], device=self._device))
        handle.remove()
        self._found = found[0].cpu().numpy()
        return of(times)

    def values(self) -> Mapping[str, Any]:
        return {"last": self._found}


class Read(Work):
    """The same through Patchbay, by the public client.

    Args:
        calls: traces per trial.
        device: of a model in this process.
        address: of the service; "" for a model in this process.
        keys: of its accounts.
    """

    def __init__(
        self, calls: int, device: str, address: str = "", keys: Mapping[str, str | None] | None = None
    ) -> None:
        self._calls, self._device, self._address, self._keys = calls, device, address, keys or {}

    def prepare(self) -> None:
        import patchbay as pb

        if self._address:
            self._client = pb.connect(self._address, api_key=self._keys.get(""))
            self._model = self._client.model("demo")
        else:
            from patchbay_server.models.demo import load

            model, tokenizer = load()
            self._model = pb.local(model.to(self._device), tokenizer)

    def run(self, round_: int) -> Mapping[str, float]:
        times, inside, waited = [], [], []
        for row in rows(round_, self._calls):
            start = time.perf_counter()
            with self._model.trace(row) as run:
                value = run.blocks[LAYER].resid_post[:, -1].save()
            times.append(time.perf_counter() - start)
            inside.append(run.usage.run_ms / 1e3)
            waited.append(run.usage.queue_ms / 1e3)
        self._found = value.value[0]
        return {**of(times), "engine_p50": percentile(inside, 0.5), "queue_p50": percentile(waited, 0.5)}

    def values(self) -> Mapping[str, Any]:
        return {"last": self._found}


def plan(scale: Scale) -> Plan:
    settings = {"calls": scale.choose(full=200, quick=100, tiny=5), "device": scale.device}
    contenders = [
        Contender("bare", "bare forward", "Bare", settings=settings),
        Contender("in_process", "in-process (pb.local)", "Read", settings=settings, against="bare"),
    ]
    if scale.mode != "tiny":
        shared: dict[str, Any] = {"settings": settings, "against": "bare", "own_process": True}
        contenders += [
            Contender("plain", "plain gRPC", "Read", service="plain", **shared),
            Contender("ray", "Ray Serve through HAProxy", "Read", service="ray", **shared),
        ]
    return Plan(
        contenders=contenders,
        rounds=scale.choose(full=9, quick=3, tiny=1),
        settings={**settings, "tokens": LENGTH, "model": "demo"},
        services={"plain": Service("demo"), "ray": Service("demo", plain=False)},
        tolerance=1e-4,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    found = []
    for name, way in (("ray", "Ray and HAProxy"), ("plain", "plain gRPC"), ("in_process", "in-process")):
        found += trials.excess_ms((name, "p50"), ("bare", "p50"), f"one-site read minus the bare forward: {way}", 3.0)
    for name, way in (("ray", "Ray and HAProxy"), ("plain", "plain gRPC"), ("in_process", "in-process")):
        found += trials.excess_ms((name, "p50"), (name, "engine_p50"), f"the same, outside the engine: {way}", None)
    found += trials.excess_ms(("in_process", "engine_p50"), ("bare", "p50"), "the same, inside the engine", None)
    return found


FIGURE = Figure(
    name="one_site_read",
    title="One-site read through the whole service",
    what=(
        "The embedded demo model, one row of 8 tokens, `blocks[3].resid_post[:, -1]`: the last layer, so "
        "nothing is saved by stopping early but the logits. One client, one request at a time, other tokens in"
        " every call."
    ),
    why="This is the floor under every interactive experiment.",
    how=(
        "p50 of the calls of a trial less the p50 of bare forwards of the same rows in the same round; torch "
        "threads alike."
    ),
    plan=plan,
    findings=findings,
)
