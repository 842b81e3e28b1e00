"""The patching sweep that everybody runs: every layer and every position, residual stream, one metric a cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.models import MODELS, folder, load, local_model, prompts, shared_model, tokenizer, wait
from benchmarks.samples import Finding
from benchmarks.work import Work

#: The metric: the difference of these two logits at the last position.
YES, NO = 11, 23
Cell = tuple[int, int]


class Sweep(Work):
    """What all contenders share: which cells, which prompts, and where the results go.

    Args:
        model: its name.
        length: tokens of the prompt.
        positions: which are patched, in every layer.
        every: only each so many-th position is done.
        device: where.
        salt: other prompts for another number.
    """

    def __init__(
        self, model: str, length: int, positions: Sequence[int], every: int, device: str, salt: int = 0
    ) -> None:
        self.name, self.length, self.device, self.salt = model, length, device, salt
        self.layers = MODELS[model].layers
        self.positions, self.every = list(positions), every
        self.cells: list[Cell] = [(layer, p) for layer in range(self.layers) for p in self.positions[::every]]

    def inputs(self, round_: int) -> tuple[list[int], list[int]]:
        """Clean and corrupted token ids, other ones every round."""
        clean, corrupted = prompts(MODELS[self.name].vocabulary, 2, self.length, 77 + round_ + 1000 * self.salt)
        return clean, corrupted

    def sweep(self, clean: list[int], corrupted: list[int], cells: Sequence[Cell]) -> Any:
        """The metric of each cell, a numpy array."""
        raise NotImplementedError

    def warm(self) -> None:
        self.sweep(*self.inputs(-1), self.cells[:: max(1, len(self.cells) // 6)])

    def run(self, round_: int) -> None:
        self._found = self.sweep(*self.inputs(round_), self.cells)

    def values(self) -> Mapping[str, Any]:
        import numpy as np

        grid = np.full((self.layers, len(self.positions)), np.nan)
        grid[:, :: self.every] = np.asarray(self._found, np.float64).reshape(self.layers, -1)
        return {"grid": grid}


class Patchbay(Sweep):
    """A plain Python loop of runs, as a user writes it.

    Args:
        disabled: names of optimisations to leave out.
        shared: whether to use the one hosted model of this process.
    """

    def __init__(self, disabled: Sequence[str] = (), shared: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self._disabled, self._shared = tuple(disabled), shared

    def prepare(self) -> None:
        import patchbay as pb

        self._stack = pb.ops.stack
        self._model = (shared_model if self._shared else local_model)(self.name, self.device)

    def sweep(self, clean: list[int], corrupted: list[int], cells: Sequence[Cell]) -> Any:
        with self._model.trace(disabled=self._disabled) as t:
            source = t.run(clean)
            found = []
            for layer, position in cells:
                run = t.run(corrupted)
                run.blocks[layer].resid_pre[:, position] = source.blocks[layer].resid_pre[:, position]
                found.append(run.logits[0, -1, YES] - run.logits[0, -1, NO])
            t.save(grid=self._stack(found))
        self.usage = t.usage
        return t.results.grid

    def run(self, round_: int) -> Mapping[str, float]:  # type: ignore[override]
        super().run(round_)
        return {"engine_s": self.usage.run_ms / 1e3, "passes": float(self.usage.passes)}


class Hooks(Sweep):
    """Plain PyTorch hooks at their best: cells batched, and only the last position's logits computed.

    How many rows a forward carries is chosen in `prepare`, by trying.
    """

    def prepare(self) -> None:
        import torch

        self._torch = torch
        self._model = load(self.name, self.device)
        self._trunk = self._model.base_model
        self._blocks = self._trunk.h if hasattr(self._trunk, "h") else self._trunk.layers
        costs = {}
        for tokens in (1024, 4096):
            self._rows = max(1, min(len(self.cells), tokens // self.length))
            cells = (self.cells * self._rows)[: self._rows]
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                self.sweep(*self.inputs(-2), cells)
                costs[self._rows] = (time.perf_counter() - start) / len(cells)
        self._rows = min(costs, key=costs.__getitem__)

    def sweep(self, clean: list[int], corrupted: list[int], cells: Sequence[Cell]) -> Any:
        torch = self._torch
        with torch.no_grad():
            stored = self._stored(torch.tensor([clean], device=self.device))
            found = []
            for start in range(0, len(cells), self._rows):
                chunk = cells[start : start + self._rows]
                ids = torch.tensor([corrupted] * len(chunk), device=self.device)
                with self._patched(chunk, stored):
                    last = self._trunk(ids).last_hidden_state[:, -1]
                logits = self._model.lm_head(last)
                found.append(logits[:, YES] - logits[:, NO])
            return torch.cat(found).float().cpu().numpy()

    def _stored(self, ids: Any) -> list[Any]:
        """The residual stream before each layer of the clean run, [seq, d] each."""
        stored: list[Any] = []
        handles = [b.register_forward_pre_hook(lambda module, args: stored.append(args[0][0])) for b in self._blocks]
        try:
            self._trunk(ids)
        finally:
            for handle in handles:
                handle.remove()
        return stored

    def _patched(self, chunk: Sequence[Cell], stored: Sequence[Any]) -> Any:
        import contextlib

        @contextlib.contextmanager
        def attached() -> Iterator[None]:
            handles = []
            for layer in sorted({layer for layer, _ in chunk}):
                rows = [i for i, cell in enumerate(chunk) if cell[0] == layer]
                at = [chunk[i][1] for i in rows]

                def hook(module: Any, args: Any, rows: Any = rows, at: Any = at, new: Any = stored[layer]) -> Any:
                    x = args[0].clone()
                    x[rows, at] = new[at]
                    return (x, *args[1:])

                handles.append(self._blocks[layer].register_forward_pre_hook(hook))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

        return attached()


class Bridge(Sweep):
    """TransformerLens 4's own sweep, `patching.generic_activation_patch` over `resid_pre`, on a TransformerBridge."""

    def prepare(self) -> None:
        import pandas as pd
        import torch
        from transformer_lens import patching
        from transformer_lens.model_bridge import TransformerBridge

        self._torch, self._patching, self._pandas = torch, patching, pd
        self._bridge = TransformerBridge.boot_transformers(str(folder(self.name)), device=self.device)
        self._bridge.eval()

    def sweep(self, clean: list[int], corrupted: list[int], cells: Sequence[Cell]) -> Any:
        torch = self._torch
        with torch.no_grad():
            _, cache = self._bridge.run_with_cache(
                torch.tensor([clean], device=self.device), names_filter=lambda name: name.endswith("hook_resid_pre")
            )
            found = self._patching.generic_activation_patch(
                self._bridge,
                torch.tensor([corrupted], device=self.device),
                cache,
                lambda logits: logits[0, -1, YES] - logits[0, -1, NO],
                self._patching.layer_pos_patch_setter,
                "resid_pre",
                index_df=self._pandas.DataFrame(cells, columns=["layer", "pos"]),
            )
        return found.float().cpu().numpy()


class Nnsight(Sweep):
    """nnsight's batched invokes: one trace a batch, one invoke a cell."""

    def prepare(self) -> None:
        import torch
        from nnsight import TransformersModel

        self._torch = torch
        model = load(self.name, self.device)
        self._wrapped = TransformersModel(model, tokenizer=tokenizer(self.name), task="text-generation")
        self._rows = max(1, 2048 // self.length)

    def sweep(self, clean: list[int], corrupted: list[int], cells: Sequence[Cell]) -> Any:
        torch, model = self._torch, self._wrapped
        source, target = torch.tensor([clean], device=self.device), torch.tensor([corrupted], device=self.device)
        found = []
        with torch.no_grad():
            with model.trace(source):
                stored = list().save()  # noqa: C408 - nnsight saves objects, and a literal has no .save
                for layer in range(self.layers):
                    stored.append(model.transformer.h[layer].input)
            for start in range(0, len(cells), self._rows):
                with model.trace() as tracer:
                    part = list().save()  # noqa: C408
                    for layer, position in cells[start : start + self._rows]:
                        with tracer.invoke(target):
                            model.transformer.h[layer].input[:, position] = stored[layer][:, position]
                            part.append(model.lm_head.output[0, -1])
                found += [logits[YES] - logits[NO] for logits in part]
        return torch.stack(found).float().cpu().numpy()


class Bare(Sweep):
    """One plain forward of one row: the unit in which sweeps are often counted."""

    def prepare(self) -> None:
        self._model = load(self.name, self.device)

    def sweep(self, clean: list[int], corrupted: list[int], cells: Sequence[Cell]) -> Any:
        import torch

        del clean, cells
        with torch.no_grad():
            self._model(torch.tensor([corrupted], device=self.device))
        wait(self.device)

    def values(self) -> Mapping[str, Any]:
        return {}


def contenders(
    settings: Mapping[str, Any], every: Mapping[str, int], places: Sequence[str] = ("transformerlens", "nnsight")
) -> list[Contender]:
    """Everybody who sweeps; `every` says who does only a part of the positions."""
    whole = {**settings, "every": 1}
    parts = {who: {**settings, "every": n} for who, n in every.items()}
    listed = [
        Contender("patchbay", "Patchbay, a loop of runs", "Patchbay", settings=whole),
        Contender("bare", "one plain forward of one row", "Bare", settings=whole),
        Contender(
            "hooks",
            "batched plain hooks, last position's logits",
            "Hooks",
            settings=parts["hooks"],
            scale=every["hooks"],
            against="patchbay",
        ),
    ]
    if "transformerlens" in places:
        listed.append(
            Contender(
                "bridge",
                "TransformerBridge 4.3, generic_activation_patch",
                "Bridge",
                "transformerlens",
                parts["bridge"],
                every["bridge"],
                against="patchbay",
            )
        )
    if "nnsight" in places:
        listed.append(
            Contender(
                "nnsight",
                "nnsight 0.8.1, batched invokes",
                "Nnsight",
                "nnsight",
                parts["nnsight"],
                every["nnsight"],
                against="patchbay",
            )
        )
    return listed


def fraction_note(every: Mapping[str, int]) -> list[str]:
    """What a reader must know about fractions."""
    said = [f"{who} did each {n}th position of every layer" for who, n in every.items() if n > 1]
    if not said:
        return []
    return [
        (
            f"{'; '.join(said)}; their times are multiplied accordingly, since every cell costs them the same (a "
            "full forward). The cells that they did are compared with ours, value by value."
        )
    ]


def plan(scale: Scale) -> Plan:
    name = scale.choose(full="gpt2-12x768", quick="gpt2-4x256", gpu="gpt2-24x1024", tiny="gpt2-2x32")
    length = scale.choose(full=64, quick=32, gpu=256, tiny=6)
    settings = {"model": name, "length": length, "positions": list(range(length)), "device": scale.device}
    every = scale.choose(
        full={"hooks": 8, "bridge": 16, "nnsight": 8},
        quick={"hooks": 2, "bridge": 4, "nnsight": 4},
        gpu={"hooks": 4, "bridge": 16, "nnsight": 16},
        tiny={"hooks": 2, "bridge": 3, "nnsight": 2},
    )
    return Plan(
        contenders=contenders(settings, every),
        rounds=scale.choose(full=3, quick=2, tiny=1),
        settings={**settings, "positions": f"all {length}", "cells": MODELS[name].layers * length},
        models=[name],
        notes=fraction_note(every),
        tolerance=scale.tolerance,
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    what = "sweep, all layers x all positions"
    return [
        *trials.faster("patchbay", "hooks", f"{what}: against batched plain hooks", 2.5),
        *trials.faster("patchbay", "bridge", f"{what}: against TransformerBridge", 8.0),
        *trials.faster("patchbay", "nnsight", f"{what}: against nnsight's batched invokes", 3.0),
        *trials.share(
            ("patchbay", "wall_s"), ("bare", "wall_s"), f"{what}: in plain forwards of one row", None, at_least=False
        ),
    ]


FIGURE = Figure(
    name="sweep_all_positions",
    title="Patching sweep, all layers and positions",
    what=(
        "A model of GPT-2 small's shape (12 layers, d 768, vocabulary 50257), 64 tokens: for each of the 12 x "
        "64 cells the corrupted prompt is run with `resid_pre` of that layer and position taken from the clean"
        " prompt; the metric is a difference of two logits at the last position."
    ),
    why=(
        "Activation patching over layers and positions is the most common experiment of the field, and the most"
        " wasteful."
    ),
    how=(
        "In-process; the whole sweep, clean run included, other prompts every round; hooks choose their own "
        "batch size by trying."
    ),
    plan=plan,
    findings=findings,
)
