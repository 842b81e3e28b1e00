"""The same sweep over the last positions of a longer prompt, where most of every forward is the same."""

from __future__ import annotations

from benchmarks.figure import Figure, Plan, Scale, Trials
from benchmarks.figures import sweep_all_positions as sweep
from benchmarks.models import MODELS
from benchmarks.samples import Finding

# The workers look the classes up here.
Patchbay, Hooks, Bridge, Bare = sweep.Patchbay, sweep.Hooks, sweep.Bridge, sweep.Bare


def plan(scale: Scale) -> Plan:
    name = scale.choose(full="gpt2-12x768", quick="gpt2-4x256", gpu="gpt2-24x1024", tiny="gpt2-2x32")
    length, last = scale.choose(full=(512, 16), quick=(256, 8), gpu=(1024, 16), tiny=(12, 4))
    settings = {
        "model": name,
        "length": length,
        "positions": list(range(length - last, length)),
        "device": scale.device,
    }
    every = scale.choose(
        full={"hooks": 16, "bridge": 16},
        quick={"hooks": 4, "bridge": 8},
        gpu={"hooks": 4, "bridge": 16},
        tiny={"hooks": 2, "bridge": 4},
    )
    return Plan(
        contenders=sweep.contenders(settings, every, places=("transformerlens",)),
        rounds=scale.choose(full=3, quick=2, tiny=1),
        settings={**settings, "positions": f"the last {last}", "cells": MODELS[name].layers * last},
        models=[name],
        notes=sweep.fraction_note(every),
        tolerance=scale.tolerance,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    what = "sweep, last 16 of 512 positions"
    return [
        *trials.faster("patchbay", "hooks", f"{what}: against batched plain hooks", 15.0),
        *trials.faster("patchbay", "bridge", f"{what}: against TransformerBridge", 50.0),
        *trials.share(
            ("patchbay", "wall_s"), ("bare", "wall_s"), f"{what}: in plain forwards of one row", None, at_least=False
        ),
    ]


FIGURE = Figure(
    name="sweep_last_positions",
    title="Patching sweep, last 16 of 512 positions",
    what="As the sweep above, with 512 tokens and the last 16 positions of each of the 12 layers: 192 cells.",
    why="Prompts with few-shot examples or a document are long, and what is patched stands at their end.",
    how="As the sweep above.",
    plan=plan,
    findings=findings,
)
