"""Runs the real helm and hands its output to the tests as plain objects."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "patchbay"
TOOLS = ROOT / ".tools" / "bin"
HELM = TOOLS / "helm"

#: What the rendered core kinds are validated against.
KUBERNETES = "1.33"

EXAMPLES = sorted(path.stem.removesuffix("-values") for path in (CHART / "ci").glob("*-values.yaml"))

Manifest = dict[str, Any]


class HelmError(AssertionError):
    """helm refused; the message is what it said."""


@dataclass(frozen=True)
class Release:
    """One rendering: every object of the release."""

    manifests: tuple[Manifest, ...]
    text: str = field(repr=False)

    def of_kind(self, kind: str) -> list[Manifest]:
        return [m for m in self.manifests if m["kind"] == kind]

    def one(self, kind: str) -> Manifest:
        found = self.of_kind(kind)
        assert len(found) == 1, f"expected one {kind}, found {len(found)}"
        return found[0]

    @property
    def service(self) -> Manifest:
        """The Service that KubeRay is told to make, as a whole object."""
        spec = self.one("RayService")["spec"]["serveService"]
        return {"apiVersion": "v1", "kind": "Service", **spec}

    @property
    def templates(self) -> dict[str, Manifest]:
        """Pod templates by the name of their group; the head's is called head."""
        cluster = self.one("RayService")["spec"]["rayClusterConfig"]
        groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
        return {"head": cluster["headGroupSpec"]["template"], **groups}

    @property
    def pods(self) -> dict[str, Manifest]:
        """Pod templates as whole pods, so that they can be validated."""
        return {
            name: {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": name}}
            for name, template in self.templates.items()
        }

    def containers(self) -> Iterator[tuple[str, Manifest]]:
        for name, template in self.templates.items():
            for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
                yield f"{name}/{container['name']}", container

    @property
    def serve_config(self) -> dict[str, Any]:
        """What Ray Serve is told."""
        parsed = yaml.safe_load(self.one("RayService")["spec"]["serveConfigV2"])
        assert isinstance(parsed, dict)
        return parsed

    @property
    def patchbay_yaml(self) -> str:
        """The mounted configuration file."""
        text = self.one("ConfigMap")["data"]["patchbay.yaml"]
        assert isinstance(text, str)
        return text


def run(*arguments: str) -> str:
    done = subprocess.run([str(HELM), *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def render(
    *examples: str, values: dict[str, Any] | None = None, release: str = "patchbay", tmp: Path | None = None
) -> Release:
    """`helm template` with the named examples of helm/patchbay/ci and, over them, `values` (needs `tmp`)."""
    files: Sequence[Path] = [CHART / "ci" / f"{name}-values.yaml" for name in examples]
    if values is not None:
        assert tmp is not None
        extra = tmp / "values.yaml"
        extra.write_text(yaml.safe_dump(values), encoding="utf-8")
        files = [*files, extra]
    flags = [argument for path in files for argument in ("--values", str(path))]
    text = run("template", release, str(CHART), "--namespace", "research", "--kube-version", KUBERNETES, *flags)
    return Release(tuple(m for m in yaml.safe_load_all(text) if m), text)
