"""The values' schema: typos and impossible combinations fail in helm, with a message that names them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchbay._version import __version__
from tests.chart import charts

SMALL = {"cpu": 1, "memory": "1Gi"}
WORKER = {"name": "w", "replicas": 1, "resources": {"requests": SMALL, "limits": SMALL}}
MODEL = {"name": "m", "source": "demo"}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown key at the top", {"serviceType": "ClusterIP"}, "serviceType"),
    ("unknown key in a section", {"service": {"prot": 9000}}, "prot"),
    ("unknown key of the configuration", {"config": {"prot": 9000}}, "prot"),
    ("unknown limit", {"config": {"limits": {"max_node": 1}}}, "max_node"),
    ("unknown key of a model", {"config": {"models": [{**MODEL, "num_gpu": 1}]}}, "num_gpu"),
    ("a model without a name", {"config": {"models": [{"source": "demo"}]}}, "name is required"),
    ("a model without a source", {"config": {"models": [{"name": "m"}]}}, "source is required"),
    ("a model name that is no name", {"config": {"models": [{**MODEL, "name": "../m"}]}}, "name"),
    ("no model", {"config": {"models": []}}, "models"),
    ("an unknown dtype", {"config": {"models": [{**MODEL, "dtype": "int4"}]}}, "dtype"),
    ("a limit below its least", {"config": {"limits": {"max_nodes": 0}}}, "max_nodes"),
    ("a port out of range", {"service": {"port": 70000}}, "port"),
    ("a number as text", {"config": {"port": "nine thousand"}}, "port"),
    ("a worker without resources", {"workers": [{"name": "w", "replicas": 1}]}, "resources"),
    ("no limits", {"workers": [{**WORKER, "resources": {"requests": SMALL}}]}, "limits"),
    (
        "no quantity",
        {"workers": [{**WORKER, "resources": {"requests": {**SMALL, "cpu": "two"}, "limits": SMALL}}]},
        "cpu",
    ),
    ("unknown key of a worker", {"workers": [{**WORKER, "gpus": 1}]}, "gpus"),
    ("an unknown upgrade strategy", {"upgradeStrategy": "Recreate"}, "upgradeStrategy"),
    ("a digest that is none", {"image": {"digest": "latest"}}, "digest"),
    # What the schema cannot see.
    ("more GPUs than the workers have", {"config": {"models": [{**MODEL, "num_gpus": 1}]}}, "would wait for ever"),
    ("more CPUs than the workers have", {"config": {"models": [{**MODEL, "num_cpus": 3}]}}, "CPUs in all"),
    (
        "a replica that is larger than any pod",
        {
            "config": {"models": [{**MODEL, "num_cpus": 3}]},
            "workers": [{**WORKER, "replicas": 4}],
        },
        "no worker group has pods of that size",
    ),
    ("keys where nothing is mounted", {"config": {"keys": {"file": "/tmp/keys.json"}}}, "config.keys.file"),
    ("keys written by pods", {"config": {"keys": {"write_local": True}}}, "write_local"),
    ("TLS in pods", {"config": {"tls": {"certificate_file": "a", "private_key_file": "b"}}}, "config.tls"),
    ("limits of a server that does not run", {"config": {"connections": {"max_calls": 9}}}, "config.connections"),
    ("a weight that is none", {"config": {"scheduling": {"account_weights": {"ada": 0}}}}, "account_weights"),
    ("an account that cannot be", {"config": {"scheduling": {"account_weights": {"a/b": 2}}}}, "account_weights"),
    ("an Ingress without TLS", {"ingress": {"enabled": True, "host": "a.example.org"}}, "TLS"),
    ("a Gateway without TLS", {"gateway": {"enabled": True, "create": True, "className": "c"}}, "TLS"),
    ("a route to nowhere", {"gateway": {"enabled": True}}, "parentRefs"),
]


@pytest.mark.chart
@pytest.mark.parametrize(("values", "named"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    """helm refuses the values and its message names what is wrong with them."""
    with pytest.raises(charts.HelmError, match=named):
        charts.render(values=values, tmp=tmp_path)


@pytest.mark.chart
def test_gpus_of_all_groups_count(tmp_path: Path) -> None:
    """The GPU check adds up replicas of models and pods of groups, fractions included."""
    gpu = {"requests": SMALL, "limits": {**SMALL, "nvidia.com/gpu": 1}}
    workers = [{**WORKER, "name": "a", "replicas": 2, "resources": gpu}, WORKER]
    fits = {"config": {"models": [{**MODEL, "num_cpus": 0.5, "num_gpus": 0.5, "replicas": 4}]}, "workers": workers}
    assert charts.render(values=fits, tmp=tmp_path).templates.keys() == {"head", "a", "w"}
    fits["config"]["models"][0]["replicas"] = 5  # type: ignore[call-overload, index]
    with pytest.raises(charts.HelmError, match=r"reserve 2\.5 GPUs"):
        charts.render(values=fits, tmp=tmp_path)


def test_generated_files_are_current() -> None:
    """The values' schema and Ray's variables are what the code says today."""
    done = subprocess.run(
        [sys.executable, str(charts.ROOT / "deploy" / "generate_chart.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_value_is_explained() -> None:
    """Every key of values.yaml's first two levels has a comment at it, or at the keys above it in the same block."""
    explained = False
    unexplained = []
    for line in (charts.CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if not text:
            explained = False
        elif text.startswith("#"):
            explained = True
        elif not line.startswith("   ") and not explained:
            unexplained.append(text)
    assert unexplained == []


def test_versions_agree() -> None:
    """The chart's appVersion is the package's version, and the values' Ray version is the one that is locked."""
    chart = yaml.safe_load((charts.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((charts.CHART / "values.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__
    pins = (charts.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={values['rayVersion']}" in pins
