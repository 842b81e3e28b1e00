"""What each optimisation is worth: workloads of the table with one switch off at a time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.figures import repeat_experiment
from benchmarks.figures import sweep_all_positions as sweep
from benchmarks.models import MODELS, local_model, prompts, shared_model
from benchmarks.samples import Finding
from benchmarks.spread import ratio
from benchmarks.work import Work

Sweep, Repeat = sweep.Patchbay, repeat_experiment.Patchbay
#: Workload -> what it is.
WORKLOADS = {
    "sweep": "sweep, last 4 positions of every layer",
    "read": "read at a quarter of the depth",
    "repeat": "repeated experiment on a cached prompt",
    "threads": "8 threads that read at once",
}
EVERYTHING = "everything"


class Read(Work):
    """One early read a request, other tokens in each.

    Args:
        model: its name.
        length: tokens of a row.
        calls: requests a trial.
        device: where.
        salt: other prompts for another number.
        disabled: names of optimisations to leave out.
        shared: as for the other workloads here: they all use one hosted model.
    """

    def __init__(
        self,
        model: str,
        length: int,
        calls: int,
        device: str,
        salt: int = 0,
        disabled: Sequence[str] = (),
        shared: bool = True,
    ) -> None:
        self.name, self.length, self.calls, self.device, self.salt = model, length, calls, device, salt
        self.disabled, self.shared = tuple(disabled), shared

    def prepare(self) -> None:
        self._model = (shared_model if self.shared else local_model)(self.name, self.device)

    def rows(self, round_: int, count: int) -> list[list[int]]:
        """Prompts that no other workload and no other round has: nobody answers from what another left behind."""
        return prompts(MODELS[self.name].vocabulary, count, self.length, 50_000 + round_ + 1000 * self.salt)

    def run(self, round_: int) -> None:
        for row in self.rows(round_, self.calls):
            self._read(row)

    def _read(self, row: list[int]) -> None:
        with self._model.trace(row, disabled=self.disabled) as run:
            run.blocks[MODELS[self.name].layers // 4].resid_post[:, -1].save()


class Threads(Read):
    """The same from several threads at once."""

    def run(self, round_: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._read, self.rows(round_, self.calls * 4)))


def _variants(scale: Scale) -> list[tuple[str, tuple[str, ...]]]:
    variants = [("all on", ()), *((name, (name,)) for name in scale.switches)]
    return [*variants, (EVERYTHING, scale.switches)] if scale.switches else variants


def plan(scale: Scale) -> Plan:
    name = scale.choose(full="gpt2-12x768", quick="gpt2-4x256", gpu="gpt2-24x1024", tiny="gpt2-2x32")
    length = scale.choose(full=64, quick=32, tiny=6)
    common = {"model": name, "device": scale.device, "length": length}
    settings = {
        "sweep": {**common, "positions": list(range(length))[-4:], "every": 1},
        "read": {**common, "calls": 4},
        "repeat": {**common, "calls": 4, "length": scale.choose(full=256, quick=64, tiny=6)},
        "threads": {**common, "calls": 4},
    }
    works = {"sweep": "Sweep", "read": "Read", "repeat": "Repeat", "threads": "Threads"}
    chosen = _variants(scale)[:2] if scale.mode == "tiny" else _variants(scale)
    return Plan(
        contenders=[
            Contender(
                f"{w}: {v}",
                f"{WORKLOADS[w]}, {v}{' off' if off else ''}",
                works[w],
                # Equal prompts would let one contender profit from what another left in the cache.
                settings={**settings[w], "disabled": off, "shared": True, "salt": 1 + number},
            )
            for w in (WORKLOADS if scale.mode != "quick" else ("sweep", "repeat"))
            for number, (v, off) in enumerate(chosen)
        ],
        rounds=scale.choose(full=2, quick=1, tiny=1),
        settings={"model": name, "switches": list(scale.switches)},
        models=[name],
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    found = []
    for workload, what in WORKLOADS.items():
        base = f"{workload}: all on"
        for variant, off in _variants(scale):
            name = f"{workload}: {variant}"
            if off and trials.has(base, name):
                reached = ratio(trials.series(name), trials.series(base))
                found.append(Finding(f"{what}|{variant}", reached, "x", None))
    return found


FIGURE = Figure(
    name="ablation",
    title="What each optimisation is worth",
    what=(
        "Small forms of the workloads above, with one optimisation switched off at a time (`disabled=` of a "
        "trace), and with all off."
    ),
    why="An optimisation that does not pay should go.",
    how=(
        "Time with the switch off over time with all on, in-process. 1.0 means that this workload does not use "
        "it, or that others do its work."
    ),
    plan=plan,
    findings=findings,
)

__all__ = ["FIGURE", "Read", "Repeat", "Sweep", "Threads"]
