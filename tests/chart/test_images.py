"""deploy/Dockerfile: linted, unprivileged, and in step with the code. No image is built here: there is no Docker."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from patchbay_server.serving.environment import RAY_ENVIRONMENT, NodePorts, node_environment
from tests.chart import charts

DOCKERFILE = charts.ROOT / "deploy" / "Dockerfile"
HADOLINT = charts.TOOLS / "hadolint"


def instructions() -> Iterator[tuple[str, str, str]]:
    """(stage, instruction, arguments) of every instruction, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    stage = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            stage = arguments.split()[-1]
        yield stage, name, arguments.strip()


def of_stage(stage: str, name: str) -> list[str]:
    return [arguments for at, instruction, arguments in instructions() if at == stage and instruction == name]


@pytest.mark.skipif(not HADOLINT.exists(), reason="no hadolint in .tools/bin: run tests/chart/install-tools.sh")
def test_lint() -> None:
    """hadolint finds nothing, not even a matter of style."""
    done = subprocess.run(
        [str(HADOLINT), "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["client", "server"])
def test_targets_run_unprivileged(target: str) -> None:
    """Both images end with a numeric user that is not root, the same one that the chart's pods ask for."""
    user = of_stage(target, "USER")[-1]
    values = yaml.safe_load((charts.CHART / "values.yaml").read_text(encoding="utf-8"))
    context = values["podSecurityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"
    order = [name for stage, name, _ in instructions() if stage == target]
    assert "RUN" not in order[order.index("USER") :]


def test_every_install_obeys_the_lock_and_leaves_no_cache() -> None:
    """Every pip install takes its versions from constraints.txt (or takes no dependency) and keeps no cache."""
    installs = [command for _, name, command in instructions() if name == "RUN" and "pip install" in command]
    assert len(installs) == 4
    for command in installs:
        assert re.search(r"-c (/src/)?constraints\.txt", command) or "--no-deps" in command
        assert "--no-cache-dir" in command


def test_client_image_takes_nothing_of_the_server() -> None:
    """The client's image copies from the client's install alone, and that installs the wheel without extras."""
    assert of_stage("client", "COPY") == ["--from=client-install /install /usr/local"]
    (install,) = [command for command in of_stage("client-install", "RUN") if "pip install" in command]
    assert install.endswith("/dist/*.whl")
    assert "[" not in install


def test_ray_variables_have_one_source() -> None:
    """The server's image and the chart's pods set Ray's variables as the code does for a single machine."""
    stated: dict[str, str] = {}
    for arguments in of_stage("server", "ENV"):
        stated |= dict(pair.split("=", 1) for pair in arguments.split())
    wanted = dict(RAY_ENVIRONMENT)
    assert {name: value for name, value in stated.items() if name in wanted} == wanted
    assert yaml.safe_load((charts.CHART / "files" / "ray-environment.yaml").read_text(encoding="utf-8")) == wanted


@pytest.mark.chart
@pytest.mark.parametrize("haproxy", [True, False])
def test_pods_get_the_variables_of_a_single_machine(haproxy: bool, tmp_path: Path) -> None:
    """Pods have Ray's variables as `patchbay serve` sets them, also where the configuration turns HAProxy off."""
    release = charts.render(values={"config": {"ray": {"haproxy": haproxy}}}, tmp=tmp_path)
    local = node_environment(NodePorts(9000, 1, 2, 3, 4, 5, 6, 7, 8), tmp_path, haproxy=haproxy)
    names = {*RAY_ENVIRONMENT, "RAY_SERVE_ENABLE_DIRECT_INGRESS"}
    for _, container in release.containers():
        stated = {e["name"]: e["value"] for e in container["env"] if e["name"] in names}
        assert stated == {name: value for name, value in local.items() if name in names}


def test_build_context_holds_what_the_build_copies() -> None:
    """.dockerignore lets in every path that a COPY names, and everything that the wheel's build needs."""
    ignore = (charts.ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for _, name, arguments in instructions():
        if name == "COPY" and "--from" not in arguments:
            copied |= {source.rstrip("*") for source in arguments.split()[:-1]}
    assert copied <= let_in
    assert next(line for line in ignore if not line.startswith("#")) == "*"
    project = (charts.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"\[tool\.hatch\.build\.targets\.wheel\]\npackages = (\[.*\])", project)
    assert packages is not None
    assert {path.split("/")[0] for path in yaml.safe_load(packages[1])} <= let_in
    for path in copied - {"README.md"}:
        assert (charts.ROOT / path).exists(), path
