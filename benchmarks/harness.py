"""Measures one figure: contenders in their own processes, round after round in turns, then a look at their values."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.models import FOLDER_VARIABLE
from benchmarks.processes import ROOT, Running, Worker, WorkerError, serving
from benchmarks.samples import Check, Measured, Sample

Say = Callable[[str], None]


@dataclass
class Bench:
    """Where and how figures are measured.

    Attributes:
        environments: place -> interpreter. ``"patchbay"`` must be there.
        scale: how large.
        models: folder in which models are kept between runs.
        say: told what goes on, one line at a time.
        rounds: of every figure; None: as each figure says.
    """

    environments: Mapping[str, str]
    scale: Scale
    models: Path
    say: Say = field(default=lambda _: None)
    rounds: int | None = None

    def environment(self, place: str) -> dict[str, str]:
        """The variables of a worker: nothing fetched, nothing reported, one number of threads everywhere."""
        ours = ("PATCHBAY_", "OMP_", "MKL_") if place == "patchbay" else ("PATCHBAY_", "OMP_", "MKL_", "PYTHONPATH")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        threads = str(self.scale.threads)
        hidden = {} if self.scale.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        return {
            **kept,
            **hidden,
            FOLDER_VARIABLE: str(self.models),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def measure(self, figure: Figure) -> Measured:
        """Measure `figure`. A contender that fails is left out, with a note; a figure that fails has an error."""
        started = time.monotonic()
        plan = figure.plan(self.scale)
        if self.rounds is not None:
            plan = replace(plan, rounds=self.rounds)
        with tempfile.TemporaryDirectory(prefix="pbbench-") as scratch:
            session = _Session(self, figure, plan, Path(scratch))
            error = ""
            try:
                session.measure()
            except (WorkerError, OSError, ValueError) as problem:
                error = public(str(problem))
                self.say(f"    {figure.name} cannot be measured: {error}")
        trials = Trials(session.samples)
        return Measured(
            name=figure.name,
            title=figure.title,
            settings={**plan.settings, "rounds": plan.rounds, "threads": self.scale.threads},
            labels={c.name: c.label for c in plan.contenders},
            samples=session.samples,
            findings=[] if error else figure.findings(trials, self.scale),
            checks=session.checks,
            notes=[*plan.notes, *session.notes],
            failed=session.failed,
            error=error,
            elapsed_s=time.monotonic() - started,
        )


class _Session:
    """The measuring of one figure."""

    def __init__(self, bench: Bench, figure: Figure, plan: Plan, scratch: Path) -> None:
        self._bench, self._figure, self._plan, self._scratch = bench, figure, plan, scratch
        self._workers: dict[str, Worker] = {}
        self._services: dict[str, Running] = {}
        self._stack = contextlib.ExitStack()
        self._contenders = list(plan.contenders)
        self.samples: list[Sample] = []
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.failed: list[str] = []

    def measure(self) -> None:
        with self._stack:
            self._save_models()
            for contender in list(self._contenders):
                if contender.place not in self._bench.environments:
                    self._leave_out(contender, f"there is no environment {contender.place!r}")
            for name, service in self._plan.services.items():
                if any(c.service == name for c in self._contenders):
                    self._bench.say(f"    starting the service {name!r}")
                    log = self._scratch / f"service-{name}.log"
                    scale = self._bench.scale
                    self._services[name] = self._stack.enter_context(
                        serving(service, threads=scale.threads, device=scale.device, log=log)
                    )
            for contender in list(self._contenders):
                if not contender.fresh:
                    self._attempt(contender, self._load, contender)
                    self._attempt(contender, self._ask, contender, "warm")
            for round_ in range(self._plan.rounds):
                turn = round_ % max(1, len(self._contenders))
                for contender in [*self._contenders[turn:], *self._contenders[:turn]]:
                    self._attempt(contender, self._trial, contender, round_)
            if not self.samples:
                raise WorkerError("no contender could be measured: " + "; ".join(self.notes))
            self._compare()

    def _save_models(self) -> None:
        os.environ[FOLDER_VARIABLE] = str(self._bench.models)
        self._bench.models.mkdir(parents=True, exist_ok=True)
        from benchmarks.models import folder

        missing = [name for name in self._plan.models if not folder(name).exists()]
        if missing:
            self._bench.say(f"    making {', '.join(missing)}")
            settings = {"names": missing}
            with self._start("patchbay") as worker:
                worker.ask("load", name="models", module="benchmarks.harness", work="SaveModels", settings=settings)

    def _start(self, place: str, env: Mapping[str, str] | None = None) -> Worker:
        log = self._scratch / f"{place}-{len(list(self._scratch.iterdir()))}.log"
        return Worker(self._bench.environments[place], {**self._bench.environment(place), **(env or {})}, log)

    def _load(self, contender: Contender) -> None:
        key = contender.name if contender.own_process else contender.place
        if key not in self._workers:
            self._workers[key] = self._start(contender.place, contender.env)
            self._stack.callback(self._workers[key].close)
        self._workers[contender.name] = self._workers[key]
        self._load_in(self._workers[key], contender)

    def _load_in(self, worker: Worker, contender: Contender) -> None:
        settings: dict[str, Any] = dict(contender.settings)
        if contender.service:
            service = self._services[contender.service]
            settings |= {"address": service.address, "keys": dict(service.keys)}
        module = self._figure.plan.__module__
        worker.ask("load", name=contender.name, module=module, work=contender.work, settings=settings)

    def _ask(self, contender: Contender, verb: str, **question: Any) -> dict[str, Any]:
        return self._workers[contender.name].ask(verb, name=contender.name, **question)

    def _trial(self, contender: Contender, round_: int) -> None:
        service = self._services.get(contender.service)
        before = service.cpu_s() if service is not None else 0.0
        if contender.fresh:
            with self._start(contender.place, contender.env) as worker:
                self._load_in(worker, contender)
                answer = worker.ask("run", name=contender.name, round=round_)
                worker.ask("values", name=contender.name, path=str(self._values(contender)))
        else:
            answer = self._ask(contender, "run", round=round_)
        behind = service.cpu_s() - before if service is not None else 0.0
        wall_s, cpu_s = answer["wall_s"] * contender.scale, (answer["cpu_s"] + behind) * contender.scale
        self.samples.append(Sample(contender.name, round_, wall_s, cpu_s, answer["extra"]))
        self._bench.say(f"    round {round_ + 1}/{self._plan.rounds}  {contender.name:<24} {answer['wall_s']:8.3f} s")

    def _attempt(self, contender: Contender, what: Callable[..., Any], *args: Any) -> None:
        if contender not in self._contenders:
            return
        try:
            what(*args)
        except WorkerError as error:
            self.failed.append(contender.name)
            self._leave_out(contender, str(error))

    def _leave_out(self, contender: Contender, why: str) -> None:
        self._contenders.remove(contender)
        self.samples = [s for s in self.samples if s.contender != contender.name]
        self.notes.append(f"{contender.label} was left out: {public(why)}")
        self._bench.say(f"    left out: {contender.name}: {why}")

    # --- the same work

    def _values(self, contender: Contender) -> Path:
        return self._scratch / f"values-{contender.name}.npz"

    def _compare(self) -> None:
        for contender in list(self._contenders):
            if not contender.fresh:
                self._attempt(contender, lambda c: self._ask(c, "values", path=str(self._values(c))), contender)
        for contender in list(self._contenders):
            if contender.against and self._values(contender).exists():
                reference = next((c for c in self._contenders if c.name == contender.against), None)
                if reference is not None and self._values(reference).exists():
                    check = compare(
                        self._values(contender), self._values(reference), contender, reference, self._plan.tolerance
                    )
                    self.checks.append(check)
                    if not check.equal:
                        self._bench.say(f"    NOT EQUAL: {contender.name} and {reference.name}: {check.largest:.3g}")


def compare(mine: Path, other: Path, contender: Contender, reference: Contender, tolerance: float) -> Check:
    """Hold two contenders' arrays of the same names to each other, where neither has left a value out.

    Raises:
        ValueError: they have no array in common, or its shapes differ.
    """
    import numpy as np

    largest, count, everything = 0.0, 0, []
    with np.load(mine) as a, np.load(other) as b:
        names = sorted(set(a.files) & set(b.files))
        if not names:
            raise ValueError(f"{contender.name} and {reference.name} have no values in common")
        for name in names:
            x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
            if x.shape != y.shape:
                raise ValueError(f"{name} is {x.shape} for {contender.name} and {y.shape} for {reference.name}")
            both = ~(np.isnan(x) | np.isnan(y))
            if both.any():
                largest = max(largest, float(np.abs(x - y)[both].max()))
            count += int(both.sum())
            everything.append(y[both].ravel())
    values = np.concatenate(everything)
    spread = float(values.std()) if values.size else 0.0
    return Check(contender.name, reference.name, largest, spread, tolerance, count)


def public(reason: str) -> str:
    """An error's text without the path of this checkout: it goes into files that are committed."""
    return reason.replace(f"{ROOT}{os.sep}", "")


class SaveModels:
    """Work of a worker before the first figure: make the models that are missing."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def prepare(self) -> None:
        """Make and save them."""
        from benchmarks.models import save

        for name in self._names:
            save(name)

    def close(self) -> None:
        """Nothing is held."""


def to_stderr(line: str) -> None:
    """Tell the person who waits."""
    print(line, file=sys.stderr, flush=True)


__all__ = ["ROOT", "Bench", "compare", "to_stderr"]
