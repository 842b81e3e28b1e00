"""Environments that hold the built wheel and its base dependencies, and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Sequence
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Runs code with an environment's interpreter, outside the repository, and returns what it printed.
RunPython = Callable[[Path, str], str]


def _run(command: Sequence[str | Path], cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _environment(folder: Path, requirements: Sequence[str]) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements], cwd=folder)
    return python


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a release would build it, with the build backend that is already installed."""
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def base_requirements(wheel: Path) -> list[Requirement]:
    """What the wheel asks for when no extra is named."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="session")
def thin_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel and its base dependencies at the locked versions."""
    return _environment(tmp_path_factory.mktemp("thin") / "env", ["-c", str(ROOT / "constraints.txt"), str(wheel)])


@pytest.fixture(scope="session")
def lowest_python(wheel: Path, base_requirements: list[Requirement], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel and the oldest base dependencies that its bounds allow."""
    if sys.version_info >= (3, 13):
        pytest.skip("the oldest numpy that is allowed has no wheel for this Python")
    lowest = []
    for requirement in base_requirements:
        floor = re.search(r">=\s*([\w.]+)", str(requirement.specifier))
        assert floor, f"{requirement} has no lower bound"
        lowest.append(f"{requirement.name}=={floor.group(1)}")
    return _environment(tmp_path_factory.mktemp("lowest") / "env", [*lowest, str(wheel)])


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Runs code in an environment from an empty folder, so that only what is installed can be imported."""
    kept = {"PATH", "HOME", "LANG", "SYSTEMROOT", "TMPDIR"}
    env = {name: value for name, value in os.environ.items() if name in kept}

    def run(python: Path, code: str) -> str:
        return _run([python, "-W", "error", "-c", code], cwd=tmp_path, env=env)

    return run
