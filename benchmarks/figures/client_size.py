"""How heavy the client is: bytes on disk and CPU time of the import, beside nnsight's."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from benchmarks.figure import Contender, Figure, Plan, Scale, Trials
from benchmarks.samples import Finding
from benchmarks.work import Work

#: What an environment holds before anything is installed into it.
_EMPTY = ("pip", "setuptools", "wheel", "_distutils_hack", "__pycache__")
FIRST_TRACE = (
    "import patchbay as pb, patchbay.ops; from patchbay.testing import fake_client\n"
    "model = fake_client().model('fake')\n"
    "with model.trace('The capital of France is') as run: run.blocks[1].resid_post[:, -1].save()\n"
)


class Import(Work):
    """Runs a program in fresh interpreters of this environment.

    Args:
        program: what to run.
        repeats: interpreters per trial.
    """

    def __init__(self, program: str, repeats: int) -> None:
        self._program, self._repeats = program, repeats

    def run(self, round_: int) -> Mapping[str, float]:
        """CPU seconds of one interpreter with the program, less those of one without."""
        del round_
        measured, empty = self._cpu(self._program), self._cpu("pass")
        return {"cpu_s": (measured - empty) / self._repeats, "installed_bytes": float(installed_bytes())}

    def _cpu(self, program: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(self._repeats):
            subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def installed_bytes() -> int:
    """Bytes of the files in this environment's site-packages: without pip and the like, without compiled caches."""
    total = 0
    for kind in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for top in Path(kind).iterdir():
            if top.name.partition("-")[0] in _EMPTY:
                continue
            for folder, _, files in os.walk(top) if top.is_dir() else [(kind, [], [top.name])]:
                if not folder.endswith("__pycache__"):
                    total += sum((Path(folder) / name).lstat().st_size for name in files)
    return total


def plan(scale: Scale) -> Plan:
    repeats = scale.choose(full=3, quick=1)
    import_ = {"repeats": repeats}
    return Plan(
        contenders=[
            Contender("patchbay", "import patchbay", "Import", "client", {"program": "import patchbay", **import_}),
            Contender(
                "first_trace", "import, and a first trace", "Import", "client", {"program": FIRST_TRACE, **import_}
            ),
            Contender("nnsight", "import nnsight", "Import", "nnsight", {"program": "import nnsight", **import_}),
        ],
        rounds=scale.choose(full=7, quick=2),
        settings={"interpreters per trial": repeats},
    )


def findings(trials: Trials, scale: Scale) -> list[Finding]:
    del scale
    size, cpu = "installed_bytes", "cpu_s"
    return [
        *trials.share(("patchbay", size), ("nnsight", size), "client: installed size / nnsight's", 0.1, at_least=False),
        *trials.share(("patchbay", cpu), ("nnsight", cpu), "client: import CPU / nnsight's", 0.1, at_least=False),
        *trials.share(
            ("first_trace", cpu),
            ("nnsight", cpu),
            "client: import and a first trace, CPU / nnsight's import",
            None,
            at_least=False,
        ),
    ]


FIGURE = Figure(
    name="client_size",
    title="The client: installed size and import",
    what=(
        "Each tool is installed by itself into an empty environment. Size: the files in site-packages, without"
        " pip and without `__pycache__`. Patchbay is one distribution: its size includes the service's own "
        "code and the demo model, not the service's dependencies. Import: `import patchbay` and `import "
        "nnsight` in fresh interpreters."
    ),
    why="A client that installs and starts at once can be used from a laptop, a notebook on a phone line, or a test.",
    how=(
        "CPU seconds (user and system) of fresh interpreters less those of interpreters that do nothing. "
        "Patchbay imports numpy and gRPC when they are first needed, so a second row counts a whole first "
        "trace (built, encoded, answered by the fake server)."
    ),
    plan=plan,
    findings=findings,
)
