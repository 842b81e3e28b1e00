"""The built wheel: what is in it, what it asks for, and how little it imports."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .conftest import RunPython

HEAVY = set("torch ray transformers pydantic grpc numpy google msgpack ml_dtypes matplotlib rich".split())


def test_wheel_holds_every_tracked_file_of_both_packages(wheel: Path, repository: Path) -> None:
    """Whatever git tracks inside the two packages (code, gencode, data, py.typed) is in the wheel."""
    tracked = subprocess.run(
        ["git", "ls-files", "client/patchbay", "server/patchbay_server"], cwd=repository, capture_output=True, text=True
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of files to compare with")
    expected = {path.split("/", 1)[1] for path in tracked.stdout.splitlines() if (repository / path).exists()}
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    assert {"patchbay/py.typed", "patchbay_server/py.typed"} <= expected
    assert not expected - shipped


def test_wheel_holds_nothing_but_the_two_packages(wheel: Path) -> None:
    """Tests, docs, benchmarks and deployment files stay out of the wheel; the licence is in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/", 1)[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"patchbay", "patchbay_server"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_base_dependencies_are_the_agreed_few(base_requirements: list[Requirement]) -> None:
    """A plain install brings exactly the small dependencies of the thin client, each with both bounds."""
    assert {r.name.replace("_", "-") for r in base_requirements} == {
        "googleapis-common-protos",
        "grpcio",
        "ml-dtypes",
        "msgpack",
        "numpy",
        "protobuf",
        "zlib-ng",
    }
    for requirement in base_requirements:
        assert {s.operator for s in requirement.specifier} == {">=", "<"}


def test_import_is_light(thin_python: Path, run_python: RunPython) -> None:
    """Importing patchbay loads no heavy library; even gRPC and numpy wait for their first use."""
    printed = run_python(
        thin_python,
        "import sys, patchbay\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))",
    )
    assert "patchbay" in printed.split()
    assert not HEAVY & set(printed.split())


@pytest.mark.parametrize("module", ["patchbay.ir", "patchbay.ir.verify", "patchbay.errors"])
def test_ir_imports_only_the_standard_library(module: str, thin_python: Path, run_python: RunPython) -> None:
    """The graph, its rules and the errors load nothing that is not Python's own or patchbay's."""
    printed = run_python(
        thin_python,
        f"import sys; before = set(sys.modules); import {module}\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))",
    )
    loaded = set(printed.split())
    assert "patchbay" in loaded
    assert loaded - {"patchbay"} <= sys.stdlib_module_names


def test_every_client_module_imports_without_the_server_extra(thin_python: Path, run_python: RunPython) -> None:
    """Every module of the client imports on the base dependencies alone; plots look for matplotlib only when used."""
    printed = run_python(
        thin_python,
        "import importlib, pkgutil, sys, patchbay\n"
        "for found in pkgutil.walk_packages(patchbay.__path__, 'patchbay.'):\n"
        "    importlib.import_module(found.name)\n"
        "print(*sorted(sys.modules))",
    )
    loaded = set(printed.split())
    assert {"patchbay.client", "patchbay.tracing", "patchbay.wire", "patchbay.transport.grpc"} <= loaded
    assert not {"torch", "ray", "transformers", "pydantic", "matplotlib", "rich", "patchbay_server"} & loaded


def test_version_is_the_wheels(thin_python: Path, wheel: Path, run_python: RunPython) -> None:
    """patchbay.__version__ says what the wheel's name says."""
    printed = run_python(thin_python, "import patchbay; print(patchbay.__version__)")
    assert wheel.name.split("-")[1] == printed.strip()


def test_command_line_works_on_a_thin_install(thin_python: Path, wheel: Path) -> None:
    """The console script answers --version and --help without the server extra."""
    script = thin_python.with_name("patchbay")
    version = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert version.returncode == 0, version.stderr
    assert wheel.name.split("-")[1] in version.stdout
    help_text = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0, help_text.stderr
    assert "serve" in help_text.stdout


def test_serving_without_the_extra_says_what_to_install(thin_python: Path, tmp_path: Path) -> None:
    """`patchbay serve` on a thin install names the missing extra instead of showing a traceback."""
    script = thin_python.with_name("patchbay")
    done = subprocess.run([script, "serve"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "patchbay[server]" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
