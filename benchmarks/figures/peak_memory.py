"""That reading one site costs no memory beside the forward's own."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.models import MODELS, load, prompts
from benchmarks.samples import Finding
from benchmarks.work import Work

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")

#: Every tensor of more than a page is a mapping of its own, given back when it is freed: otherwise what is left over
#: from loading, in whichever thread's arena, hides some of the growth of one contender and not of another.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    rows = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(key))


class Peak(Work):
    """Loads the model, runs a short prompt so that every library has set itself up, then measures one long one.

    Args:
        model: its name.
        length: tokens.
        layer: whose residual stream is read; None: nothing (the bare forward).
        logits: whether the bare forward computes logits; one that ends with the last layer does not.
        device: where.
    """

    def __init__(self, model: str, length: int, layer: int | None, logits: bool, device: str) -> None:
        self._name, self._length, self._layer, self._logits, self._device = model, length, layer, logits, device

    def prepare(self) -> None:
        self._model = load(self._name, self._device)
        for parameter in self._model.parameters():  # weights are mapped from their file when they are first touched
            parameter.detach().sum()
        if self._layer is not None:
            import patchbay as pb

            self._hosted = pb.local(self._model)

    def run(self, round_: int) -> Mapping[str, float]:
        short, long = (prompts(MODELS[self._name].vocabulary, 1, n, round_)[0] for n in (16, self._length))
        self._do(short)
        if self._device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._found = self._do(long)
            return {"peak_bytes": float(torch.cuda.max_memory_allocated() - before)}
        before = resident("VmRSS")
        _RESET.write_text("5")  # the high-water mark begins anew
        self._found = self._do(long)
        return {"peak_bytes": float(max(resident("VmHWM") - before, resource.getpagesize()))}

    def _do(self, ids: list[int]) -> Any:
        import torch

        if self._layer is not None:
            with self._hosted.trace(ids) as run:
                value = run.blocks[self._layer].resid_post.save()
            return value.value
        with torch.no_grad():
            model = self._model if self._logits else self._model.base_model
            model(torch.tensor([ids], device=self._device), use_cache=False)
        return None


def plan(scale: Scale) -> Plan:
    name = scale.choose(full="gpt2-12x768", quick="gpt2-4x256", gpu="gpt2-24x1024", tiny="gpt2-2x32")
    layers = MODELS[name].layers
    settings = {"model": name, "length": scale.choose(full=512, quick=512, tiny=64), "device": scale.device}

    def contender(key: str, label: str, layer: int | None, logits: bool = True) -> Contender:
        given = {**settings, "layer": layer, "logits": logits}
        return Contender(key, label, "Peak", settings=given, fresh=True, env=_MALLOC)

    return Plan(
        contenders=[
            contender("bare", "bare forward, logits included", None),
            contender("trunk", "bare forward without logits", None, logits=False),
            contender("middle", "read of the middle layer", layers // 2),
            contender("last", "read of the last layer", layers - 1),
        ],
        rounds=scale.choose(full=3, quick=1, tiny=1),
        settings=settings,
        models=[name],
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    what, peak = "peak memory of a one-site read on 512 tokens", "peak_bytes"
    return [
        *trials.share(
            ("middle", peak), ("bare", peak), f"{what}: middle layer / the bare forward", 1.05, at_least=False
        ),
        *trials.share(("last", peak), ("bare", peak), f"{what}: last layer / the bare forward", 1.05, at_least=False),
        *trials.share(
            ("last", peak), ("trunk", peak), "the same: last layer / a forward without logits", 1.05, at_least=False
        ),
    ]


FIGURE = Figure(
    name="peak_memory",
    title="Peak memory of a one-site read",
    what=(
        "A model of GPT-2 small's shape, one row of 512 tokens, the whole `resid_post` of a layer (1.5 MiB) as "
        "the result, in-process."
    ),
    why="Large models leave little memory free; a tool that keeps every activation cannot be used on them.",
    how=(
        "Every trial in a fresh process: load, run 16 tokens (libraries set themselves up), reset the kernel's"
        " high-water mark of resident memory (`/proc/self/clear_refs`), run once, and take the mark less the "
        "resident memory before; glibc's malloc is told to give freed tensors back at once. On CUDA: torch's own peak."
    ),
    plan=plan,
    findings=findings,
)
