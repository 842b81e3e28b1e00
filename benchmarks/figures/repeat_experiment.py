"""The tenth experiment on a prompt: everything but the patched position has been computed before."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.models import MODELS, load, local_model, prompts, shared_model, wait
from benchmarks.samples import Finding
from benchmarks.work import Work


class Experiment(Work):
    """Patches the last position of one prompt after a middle layer, with another vector every time; reads the logits.

    Args:
        model: its name.
        length: tokens of the prompt, which is the same in every call.
        calls: experiments per trial.
        device: where.
        salt: another prompt for another number.
    """

    #: The last experiment's logits.
    found: Any

    def __init__(self, model: str, length: int, calls: int, device: str, salt: int = 0) -> None:
        self.name, self.calls, self.device = model, calls, device
        self.layer = MODELS[model].layers // 2
        (self.prompt,) = prompts(MODELS[model].vocabulary, 1, length, 5 + 1000 * salt)

    def vectors(self, round_: int) -> list[list[float]]:
        """What is written, one a call."""
        draw = random.Random(900 + round_)
        return [[draw.gauss(0, 1) for _ in range(MODELS[self.name].width)] for _ in range(self.calls)]

    def values(self) -> Mapping[str, Any]:
        return {"logits": self.found}


class Patchbay(Experiment):
    """Separate requests, as they come from a notebook.

    Args:
        disabled: names of optimisations to leave out.
        shared: whether to use the one hosted model of this process.
    """

    def __init__(self, disabled: Sequence[str] = (), shared: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self._disabled, self._shared = tuple(disabled), shared

    def prepare(self) -> None:
        self._model = (shared_model if self._shared else local_model)(self.name, self.device)

    def warm(self) -> None:
        with self._model.trace(self.prompt, disabled=self._disabled) as run:  # somebody looks at the prompt first
            run.logits[:, -1].save()
        super().warm()

    def run(self, round_: int) -> None:
        import numpy as np

        for vector in self.vectors(round_):
            with self._model.trace(self.prompt, disabled=self._disabled) as run:
                run.blocks[self.layer].resid_post[:, -1] = np.asarray(vector, np.float32)
                logits = run.logits[:, -1].save()
        self.found = logits.value[0]


class Hooked(Experiment):
    """The same by a plain hook: a full forward each."""

    def prepare(self) -> None:
        self._model = load(self.name, self.device)
        trunk = self._model.base_model
        self._block = (trunk.h if hasattr(trunk, "h") else trunk.layers)[self.layer]

    def run(self, round_: int) -> None:
        import torch

        ids = torch.tensor([self.prompt], device=self.device)
        for vector in self.vectors(round_):
            new = torch.tensor(vector, device=self.device)

            def hook(module: Any, args: Any, out: Any, new: Any = new) -> Any:
                x = (out if isinstance(out, torch.Tensor) else out[0]).clone()
                x[:, -1] = new.to(x.dtype)
                return x if isinstance(out, torch.Tensor) else (x, *out[1:])

            handle = self._block.register_forward_hook(hook)
            with torch.no_grad():
                logits = self._model(ids).logits
            handle.remove()
        wait(self.device)
        self.found = logits[0, -1].float().cpu().numpy()


def plan(scale: Scale) -> Plan:
    settings = {
        "model": scale.choose(full="gpt2-12x768", quick="gpt2-4x256", gpu="gpt2-24x1024", tiny="gpt2-2x32"),
        "length": scale.choose(full=256, quick=128, gpu=1000, tiny=8),
        "calls": scale.choose(full=8, quick=5, tiny=2),
        "device": scale.device,
    }
    return Plan(
        contenders=[
            Contender("patchbay", "Patchbay, separate requests", "Patchbay", settings=settings),
            Contender("hooks", "full forwards with a plain hook", "Hooked", settings=settings, against="patchbay"),
        ],
        rounds=scale.choose(full=7, quick=3, tiny=1),
        settings=settings,
        models=[settings["model"]],
        tolerance=scale.tolerance,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    return trials.faster("patchbay", "hooks", "repeat experiment on a cached prompt: against a full forward", 10.0)


FIGURE = Figure(
    name="repeat_experiment",
    title="A repeated experiment on a cached prompt",
    what=(
        "A prompt of 256 tokens that was read once. Then, in request after request, the last position is "
        "overwritten after the middle layer with a new vector and the last position's logits are read."
    ),
    why="Research is interactive: one prompt, many ideas.",
    how="In-process, eight requests a trial, against full forwards with a plain hook that writes the same vectors.",
    plan=plan,
    findings=findings,
)
