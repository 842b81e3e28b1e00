"""The harness: workers in processes of their own, rounds in turns, failures that stay where they are."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import figures
from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.harness import Bench, compare
from benchmarks.models import FOLDER_VARIABLE, save
from benchmarks.processes import Worker, WorkerError
from benchmarks.samples import Finding, Measured, Sample
from benchmarks.work import Work


class Count(Work):
    """Says in which round and process it ran; `fail_in` makes it fail there."""

    def __init__(self, offset: float = 0.0, fail_in: int | None = None) -> None:
        self._offset, self._fail_in = offset, fail_in

    def run(self, round_: int) -> Mapping[str, float]:
        """Prints too: what a library says must not disturb the answers."""
        if round_ == self._fail_in:
            raise ValueError("it was asked to fail")
        print("a library talks")
        return {
            "wall_s": 1.0 + self._offset,
            "pid": float(os.getpid()),
            "threads": float(os.environ["OMP_NUM_THREADS"]),
        }

    def values(self) -> Mapping[str, Any]:
        return {"x": [1.0 + self._offset, 2.0, float("nan")]}


def make_plan(scale: Scale) -> Plan:
    """Contenders that agree, differ, fail, are scaled, run anew each time, or have no environment."""
    del scale
    return Plan(
        contenders=[
            Contender("a", "first", "Count"),
            Contender("b", "second", "Count", against="a", scale=4),
            Contender("far", "differs", "Count", settings={"offset": 0.5}, against="a", own_process=True),
            Contender("fails", "fails", "Count", settings={"fail_in": 1}),
            Contender("fresh", "anew", "Count", fresh=True, against="a"),
            Contender("nowhere", "has no environment", "Count", "elsewhere"),
        ],
        rounds=3,
    )


def find(trials: Trials, scale: Scale) -> list[Finding]:
    """One ratio."""
    del scale
    return trials.faster("a", "b", "b against a", 2.0)


#: A worker imports it by the name of this module.
FIGURE = Figure("harness", "Harness", "what", "why", "how", make_plan, find)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The figure of this module, measured once, everything in this interpreter's environment."""
    return Bench({"patchbay": sys.executable}, Scale("tiny", 1), tmp_path_factory.mktemp("models")).measure(FIGURE)


def test_rounds(measured: Measured) -> None:
    """Every contender runs once a round; scaled ones count for more; the same place is one process, others are not."""
    trials = Trials(measured.samples)
    assert measured.error == ""
    assert trials.series("a") == [1.0, 1.0, 1.0]
    assert trials.series("b") == [4.0, 4.0, 4.0]
    assert set(trials.series("a", "pid")) == set(trials.series("b", "pid"))
    assert set(trials.series("far", "pid")) != set(trials.series("a", "pid"))
    assert len(set(trials.series("fresh", "pid"))) == 3
    assert set(trials.series("a", "threads")) == {1.0}
    first = [next(s.contender for s in measured.samples if s.round == r) for r in range(3)]
    assert len(set(first)) > 1, "who begins changes from round to round"
    assert measured.findings[0].reached.median == 4.0


def test_values_are_compared(measured: Measured) -> None:
    """Equal values pass, others are told; what one side left out (NaN) is not compared."""
    checks = {c.contender: c for c in measured.checks}
    assert checks["b"].equal
    assert checks["fresh"].equal
    assert checks["b"].values == 2
    assert not checks["far"].equal
    assert checks["far"].largest == 0.5


def test_failures_leave_out_their_contender_alone(measured: Measured) -> None:
    """A contender that fails, or has no environment, is left out with a note that says why."""
    assert not Trials(measured.samples).has("fails")
    assert measured.failed == ["fails"]
    assert any("it was asked to fail" in note for note in measured.notes)
    assert any("'elsewhere'" in note for note in measured.notes)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    """A process that ends instead of answering is an error with its last words, not a hang."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nread line\necho out of memory >&2\nexit 3\n", encoding="utf-8")
    program.chmod(0o700)
    with Worker(str(program), dict(os.environ), tmp_path / "log") as worker, pytest.raises(WorkerError, match="memory"):
        worker.ask("warm", name="x")


#: Those whose tiny form needs no service; their contenders are run here, without workers.
LOCAL = (
    "one_site_read",
    "read_at_layer",
    "sweep_all_positions",
    "sweep_last_positions",
    "repeat_experiment",
    "peak_memory",
    "pure_nodes",
    "ablation",
)


@pytest.mark.parametrize("name", LOCAL)
def test_tiny_workloads(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each workload runs on a model of two layers, its contenders agree, and it comes to findings."""
    models = tmp_path_factory.getbasetemp() / "bench-models"
    models.mkdir(exist_ok=True)
    monkeypatch.setenv(FOLDER_VARIABLE, str(models))
    scale, figure = Scale("tiny", 1, ("early_stop",)), figures.load(name)
    plan = figure.plan(scale)
    for model in plan.models:
        save(model)
    module = importlib.import_module(f"benchmarks.figures.{name}")
    contenders = [c for c in plan.contenders if c.place == "patchbay" and not c.service]
    samples = []
    for contender in contenders:
        work = getattr(module, contender.work)(**contender.settings)
        work.prepare()
        extra = dict(work.run(0) or {})
        samples.append(Sample(contender.name, 0, extra.pop("wall_s", 1.0), extra.pop("cpu_s", 1.0), extra))
        np.savez(tmp_path / contender.name, **{k: np.asarray(v) for k, v in work.values().items()})
        work.close()
    assert figure.findings(Trials(samples), scale)
    by_name = {c.name: c for c in contenders}
    for contender in contenders:
        if contender.against:
            paths = [tmp_path / f"{n}.npz" for n in (contender.name, contender.against)]
            assert compare(*paths, contender, by_name[contender.against], plan.tolerance).equal
