"""What a figure is: a workload, who runs it, how often, and what is made of the samples. No heavy imports here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.samples import Finding, Sample
from benchmarks.spread import difference, ratio, spread


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        mode: ``"full"``, ``"quick"`` (small models, few rounds: shows that everything works, not how fast it is),
            ``"gpu"`` (a larger model in bfloat16 on CUDA) or ``"tiny"`` (tests).
        threads: torch threads of everything that is compared.
        switches: the engine's off switches, by name.
    """

    mode: str
    threads: int
    switches: tuple[str, ...] = ()

    def choose(self, *, full: Any, quick: Any, gpu: Any = None, tiny: Any = None) -> Any:
        """The value for this mode; GPU runs take `full`, and tiny ones `quick`, where nothing else is said."""
        if self.mode == "gpu":
            return full if gpu is None else gpu
        if self.mode == "tiny":
            return quick if tiny is None else tiny
        return full if self.mode == "full" else quick

    @property
    def device(self) -> str:
        return "cuda" if self.mode == "gpu" else "cpu"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.mode == "gpu" else "float32"

    @property
    def tolerance(self) -> float:
        """How far results may be apart: rounding in another order."""
        return 5e-2 if self.mode == "gpu" else 1e-4


@dataclass(frozen=True)
class Service:
    """A service that contenders talk to; it runs while its figure is measured.

    Attributes:
        model: name in `benchmarks.models`, or ``"demo"``.
        plain: plain grpc.aio in one process; else Ray Serve with HAProxy.
        accounts: accounts that have a key each; none: the service asks for no key.
    """

    model: str
    plain: bool = True
    accounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        name: unique in the figure.
        label: what it is, for a reader.
        work: name of a class in the figure's module (`Work`).
        place: the environment that it runs in: ``"patchbay"``, ``"transformerlens"``, ``"nnsight"``, ``"client"``.
        settings: keyword arguments of the class.
        scale: a trial does one part in `scale` of the workload, because every part costs the same: its times are
            multiplied.
        service: name of the figure's service that it talks to; the class gets ``address`` and ``keys`` as well.
        against: the contender whose values its own must equal; "" for none.
        fresh: every trial runs in a new process.
        own_process: it does not share its worker with the figure's other contenders.
        env: environment variables of its worker, where it has one to itself.
    """

    name: str
    label: str
    work: str
    place: str = "patchbay"
    settings: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    service: str = ""
    against: str = ""
    fresh: bool = False
    own_process: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A figure at some scale.

    Attributes:
        contenders: who takes part.
        rounds: trials of each, in turns.
        settings: sizes, for the report.
        models: names in `benchmarks.models` that must lie on disk before.
        services: by name.
        notes: what a reader must know.
        tolerance: how far the contenders' values may be apart.
    """

    contenders: Sequence[Contender]
    rounds: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[str] = ()
    services: Mapping[str, Service] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tolerance: float = 1e-4


class Trials:
    """The samples of one figure, by contender, in the order of the rounds."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def has(self, *contenders: str) -> bool:
        """Whether each of them was measured."""
        return all(any(s.contender == c for s in self._samples) for c in contenders)

    def series(self, contender: str, value: str = "wall_s") -> list[float]:
        """One value of every round: ``wall_s``, ``cpu_s``, or a name of `Sample.extra`."""
        found = [s for s in self._samples if s.contender == contender]
        return [getattr(s, value) if value in ("wall_s", "cpu_s") else s.extra[value] for s in found]

    def faster(self, ours: str, other: str, what: str, target: float | None) -> list[Finding]:
        """How many times less time `ours` takes than `other`; nothing when either is missing."""
        if not self.has(ours, other):
            return []
        return [Finding(what, ratio(self.series(other), self.series(ours)), "x", target)]

    def share(
        self,
        over: tuple[str, str],
        under: tuple[str, str],
        what: str,
        target: float | None,
        *,
        at_least: bool,
    ) -> list[Finding]:
        """The ratio of two values, each a contender and a name; nothing when either is missing."""
        if not self.has(over[0], under[0]):
            return []
        return [Finding(what, ratio(self.series(*over), self.series(*under)), "x", target, at_least)]

    def excess_ms(
        self, over: tuple[str, str], under: tuple[str, str], what: str, target: float | None
    ) -> list[Finding]:
        """How many milliseconds a value in seconds exceeds another by; less is better."""
        if not self.has(over[0], under[0]):
            return []
        values = [[1e3 * v for v in self.series(*which)] for which in (over, under)]
        return [Finding(what, difference(*values), "ms", target, at_least=False)]

    def value(
        self, contender: str, name: str, what: str, unit: str, target: float | None = None, *, at_least: bool = True
    ) -> list[Finding]:
        """A value as it was measured; nothing when the contender is missing."""
        if not self.has(contender):
            return []
        return [Finding(what, spread(self.series(contender, name)), unit, target, at_least)]

    def median(self, contender: str, value: str = "wall_s") -> float:
        """Median over the rounds."""
        return statistics.median(self.series(contender, value))


@dataclass(frozen=True)
class Figure:
    """One row (or a few) of the table of docs/performance.md.

    Attributes:
        name: for ``--only``, and the name of its module.
        title: what it is about.
        what: the workload, exactly.
        why: why it is worth knowing.
        how: how it is measured.
        plan: from a scale to contenders and rounds.
        findings: from the samples to rows.
    """

    name: str
    title: str
    what: str
    why: str
    how: str
    plan: Callable[[Scale], Plan]
    findings: Callable[[Trials, Scale], list[Finding]]
