"""Generation of many users, each with a steering vector of their own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from benchmarks.connected import Connected
from benchmarks.figure import Contender, Figure, Plan, Scale, Service, Trials
from benchmarks.models import MODELS, load, prompts, wait
from benchmarks.samples import Finding
from benchmarks.work import Work


class Generate(Work):
    """Rows to go on with, and a vector for each, added after the middle layer at every position and step.

    Args:
        model: its name.
        rows: how many.
        length: tokens of a prompt.
        new: tokens to generate.
        device: where.
    """

    #: Tokens, a row each.
    found: Any

    def __init__(self, model: str, rows: int, length: int, new: int, device: str) -> None:
        self.name, self.count, self.length, self.new, self.device = model, rows, length, new, device
        self.layer = MODELS[model].layers // 2

    def rows(self, round_: int) -> list[list[int]]:
        return prompts(MODELS[self.name].vocabulary, self.count, self.length, 500 + round_)

    def vectors(self, round_: int) -> list[list[float]]:
        draw = random.Random(600 + round_)
        return [[draw.gauss(0, 0.3) for _ in range(MODELS[self.name].width)] for _ in range(self.count)]

    def values(self) -> Mapping[str, Any]:
        return {"tokens": self.found}


class Clients(Connected, Generate):
    """One request a row, all at once, each with its own vector.

    Args:
        address: of the service.
        keys: of its accounts.
    """

    def __init__(self, address: str, keys: Mapping[str, str | None], **settings: Any) -> None:
        super().__init__(**settings)
        self._address, self._keys = address, keys

    def prepare(self) -> None:
        self.connect(self._address, self._keys)

    def run(self, round_: int) -> Mapping[str, float]:
        import numpy as np

        self.found = np.full((self.count, self.new), -1)
        self.wait(self._all(self.rows(round_), self.vectors(round_)))
        return {"tokens": float(self.count * self.new)}

    async def _all(self, rows: list[list[int]], vectors: list[list[float]]) -> None:
        await asyncio.gather(*(self._one(i, rows[i], vectors[i]) for i in range(len(rows))))

    async def _one(self, at: int, row: list[int], vector: list[float]) -> None:
        import numpy as np

        async with self.hosted.generate(row, max_new_tokens=self.new, eos=False) as run:
            run.blocks[self.layer].resid_post += np.asarray(vector, np.float32)
        self.found[at] = run.generated.value[0]


class Transformers(Generate):
    """transformers' own `generate`, greedy.

    Args:
        together: all rows in one batch; else one row after the other.
        steered: with the rows' vectors, by a plain hook.
        part: one in how many rows is done.
    """

    def __init__(self, together: bool, steered: bool, part: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self._together, self._steered, self._part = together, steered, part

    def prepare(self) -> None:
        self._model = load(self.name, self.device)
        trunk = self._model.base_model
        self._block = (trunk.h if hasattr(trunk, "h") else trunk.layers)[self.layer]

    def run(self, round_: int) -> Mapping[str, float]:
        import numpy as np
        import torch

        rows, vectors = self.rows(round_), self.vectors(round_)
        self.found = np.full((self.count, self.new), np.nan)
        done = range(0, self.count, self._part)
        groups = [list(done)] if self._together else [[i] for i in done]
        for group in groups:
            ids = torch.tensor([rows[i] for i in group], device=self.device)
            new = torch.tensor([vectors[i] for i in group], device=self.device)[:, None]

            def steer(module: Any, args: Any, out: Any, new: Any = new) -> Any:
                del module, args
                return (
                    out + new.to(out.dtype)
                    if isinstance(out, torch.Tensor)
                    else (out[0] + new.to(out[0].dtype), *out[1:])
                )

            handle = self._block.register_forward_hook(steer) if self._steered else None
            try:
                made = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=self.new,
                    min_new_tokens=self.new,
                    pad_token_id=0,
                )
            finally:
                if handle is not None:
                    handle.remove()
            self.found[group] = made[:, self.length :].cpu().numpy()
        wait(self.device)
        return {"tokens": float(len(done) * self.new)}


def plan(scale: Scale) -> Plan:
    settings = {
        "model": scale.choose(full="llama-12x768", quick="llama-4x256", gpu="llama-32x4096", tiny="llama-2x32"),
        "rows": scale.choose(full=16, quick=16, tiny=3),
        "length": scale.choose(full=32, quick=16, tiny=6),
        "new": scale.choose(full=32, quick=16, gpu=128, tiny=4),
        "device": scale.device,
    }
    part = scale.choose(full=4, quick=2, tiny=1)
    exact = scale.dtype == "float32"
    compared = (
        "Tokens are compared, every one."
        if exact
        else "Tokens are not compared: in bfloat16 rounding decides between near ties (the float32 run compares them)."
    )
    return Plan(
        contenders=[
            Contender(
                "patchbay",
                "16 requests at once, each steered",
                "Clients",
                settings=settings,
                service="plain",
                own_process=True,
            ),
            Contender(
                "plain",
                "plain batched generate, not steered",
                "Transformers",
                settings={**settings, "together": True, "steered": False},
            ),
            Contender(
                "steered",
                "steered generate, one after another",
                "Transformers",
                settings={**settings, "together": False, "steered": True, "part": part},
                scale=part,
                against="patchbay" if exact else "",
            ),
            Contender(
                "steered_batch",
                "steered generate, one batch",
                "Transformers",
                settings={**settings, "together": True, "steered": True},
                against="patchbay" if exact else "",
            ),
        ],
        rounds=scale.choose(full=5, quick=3, tiny=1),
        settings=settings,
        models=[settings["model"]],
        services={"plain": Service(settings["model"])},
        notes=[f"One after another: one row in {part}, scaled. {compared}"],
        tolerance=0.0,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    found = [
        *trials.faster("patchbay", "plain", "steered generation, 16 requests: against plain batched generate", 0.85),
        *trials.faster("patchbay", "steered", "steered generation, 16 requests: against one after another", 3.5),
        *trials.faster("plain", "steered", "the same: what the batch itself gives", None),
    ]
    if trials.has("patchbay"):
        pairs = zip(trials.series("patchbay", "tokens"), trials.series("patchbay"), strict=True)
        from benchmarks.spread import spread

        found.append(Finding("steered generation, 16 requests", spread([n / s for n, s in pairs]), "tokens/s"))
    return found


FIGURE = Figure(
    name="steered_generation",
    title="Steered generation, 16 concurrent requests",
    what=(
        "A random Llama (12 layers, d 768) behind plain gRPC; 16 clients, each with a prompt of 32 tokens, 32 "
        "new tokens, greedy, and a steering vector of its own added after the middle layer at every position "
        "and step."
    ),
    why="Steering is looked at by what the model then writes, and demos are used by many at once.",
    how=(
        "Time from the first request to the last token. Against transformers' `generate` of the 16 rows in one"
        " batch without any hook, and against `generate` with the steering hook, a row at a time."
    ),
    plan=plan,
    findings=findings,
)
