"""That a read at an early layer does not pay for the later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.models import MODELS, load, local_model, prompts, wait
from benchmarks.samples import Finding
from benchmarks.work import Work


class Bare(Work):
    """Full forwards, logits included; a hook takes the value of the last layer asked for."""

    def __init__(self, model: str, length: int, calls: int, device: str, layers: list[int]) -> None:
        self._name, self._length, self._calls, self._device, self._layers = model, length, calls, device, layers

    def prepare(self) -> None:
        self._model = load(self._name, self._device)

    def run(self, round_: int) -> None:
        import torch

        rows = prompts(MODELS[self._name].vocabulary, self._calls, self._length, round_)
        with torch.no_grad():
            for row in rows:
                self._model(torch.tensor([row], device=self._device))
            wait(self._device)
        self._last = rows[-1]

    def values(self) -> Mapping[str, Any]:
        import torch

        with torch.no_grad():
            states = self._model(
                torch.tensor([self._last], device=self._device), output_hidden_states=True
            ).hidden_states
        # transformers' last entry is after the final norm, so the last layer is not compared here.
        return {f"layer {k}": states[k + 1][0, -1].float().cpu().numpy() for k in self._layers if k + 2 < len(states)}


class Read(Work):
    """Reads of the residual stream after layer `layer`, at the last position."""

    def __init__(self, model: str, length: int, calls: int, device: str, layer: int) -> None:
        self._name, self._length, self._calls, self._device, self._layer = model, length, calls, device, layer

    def prepare(self) -> None:
        self._model = local_model(self._name, self._device)

    def run(self, round_: int) -> None:
        for row in prompts(MODELS[self._name].vocabulary, self._calls, self._length, round_):
            with self._model.trace(row) as run:
                self._last = run.blocks[self._layer].resid_post[:, -1].save()

    def values(self) -> Mapping[str, Any]:
        return {f"layer {self._layer}": self._last.value[0]}


def layers_of(scale: Scale) -> tuple[str, list[int]]:
    """The model and the layers to read."""
    name = scale.choose(full="gpt2-12x768", quick="gpt2-4x256", gpu="gpt2-24x1024", tiny="gpt2-2x32")
    count = MODELS[name].layers
    return name, sorted({0, count // 4, count // 2, count - 1})


def plan(scale: Scale) -> Plan:
    name, layers = layers_of(scale)
    settings = {
        "model": name,
        "length": scale.choose(full=64, quick=64, tiny=8),
        "calls": scale.choose(full=8, quick=4, tiny=1),
        "device": scale.device,
    }
    reads = [
        Contender(
            f"layer_{k}",
            f"read at layer {k}",
            "Read",
            settings={**settings, "layer": k},
            against="bare" if k + 1 < MODELS[name].layers else "",
        )
        for k in layers
    ]
    bare = Contender("bare", "full forward", "Bare", settings={**settings, "layers": layers})
    return Plan(
        contenders=[bare, *reads],
        rounds=scale.choose(full=7, quick=3, tiny=1),
        settings=settings,
        models=[name],
        tolerance=scale.tolerance,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    name, layers = layers_of(scale)
    count = MODELS[name].layers
    return [
        f
        for k in layers
        for f in trials.share(
            (f"layer_{k}", "wall_s"),
            ("bare", "wall_s"),
            f"read at layer {k} of {count} / a full forward",
            round((k + 1) / count + 0.1, 4),
            at_least=False,
        )
    ]


FIGURE = Figure(
    name="read_at_layer",
    title="A read at layer k of L",
    what="A model of GPT-2 small's shape, one row of 64 tokens, `blocks[k].resid_post[:, -1]`, in-process.",
    why="Many experiments look at early or middle layers; the rest of the forward is waste.",
    how="Time of a read over time of a full forward (logits included) of the same rows; target (k + 1) / L + 0.1.",
    plan=plan,
    findings=findings,
)
