"""The chart runs exactly what `patchbay serve --config` runs: same file, same applications, same keys."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchbay_server.config import Config
from patchbay_server.store.keys import KeyStore
from tests.chart import charts
from tests.chart.charts import Release

pytestmark = pytest.mark.chart


def config_of(release: Release, tmp: Path) -> Config:
    path = tmp / "patchbay.yaml"
    path.write_text(release.patchbay_yaml, encoding="utf-8")
    return Config.load(path, env={})


def test_mounted_file_is_a_valid_config(release: Release, tmp_path: Path) -> None:
    """The rendered patchbay.yaml loads, and says to every key what the values' config block says."""
    config = config_of(release, tmp_path)
    assert {model.name for model in config.models} == {
        a["args"]["model"] for a in release.serve_config["applications"][1:]
    }
    ports = {
        port["containerPort"] for _, c in release.containers() for port in c["ports"] if port["name"] == "serve-grpc"
    }
    assert ports == {config.port}


def test_values_reach_the_file_unchanged(tmp_path: Path) -> None:
    """Large numbers, fractions and unusual names survive Helm's own YAML on their way into patchbay.yaml."""
    block = {
        "models": [{"name": "a.b_c-1", "source": "org/model", "num_cpus": 0.5, "replicas": 2}],
        "limits": {"max_flops": 10**18, "max_result_bytes": 2**40, "deadline_s": 0.25},
        "log_level": "debug",
    }
    loaded = config_of(charts.render(values={"config": block}, tmp=tmp_path), tmp_path).dump()
    keys = {"file": "/etc/patchbay/keys/keys.json", "write_local": False}
    artifacts = {"path": "/var/lib/patchbay/artifacts", "total_bytes": loaded["artifacts"]["total_bytes"]}
    assert loaded == Config.parse({**block, "port": 9000, "keys": keys, "artifacts": artifacts}).dump()
    assert 0 < artifacts["total_bytes"] < 2**50
    assert loaded["limits"]["max_flops"] == 10**18


def test_single_machine_file_is_a_config_block(tmp_path: Path) -> None:
    """deploy/patchbay.yaml, which `patchbay serve --config` takes, is accepted as it stands as the chart's config."""
    path = charts.ROOT / "deploy" / "patchbay.yaml"
    block = yaml.safe_load(path.read_text(encoding="utf-8"))
    release = charts.render(values={"config": block}, tmp=tmp_path)
    alone, mounted = Config.load(path, env={}).dump(), config_of(release, tmp_path).dump()
    # Where keys and artifacts lie, and how much room there is for those, is all that differs.
    assert alone.pop("keys") != mounted.pop("keys")
    for name in ("path", "total_bytes"):
        assert alone["artifacts"].pop(name) != mounted["artifacts"].pop(name)
    assert alone == mounted


def test_config_is_mounted_where_it_is_named(release: Release) -> None:
    """Every pod has the file at the path that the applications are built from."""
    paths = {a["args"]["config"] for a in release.serve_config["applications"]}
    assert len(paths) == 1
    for _, container in release.containers():
        mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
        mount = mounts[next(iter(paths))]
        assert mount["subPath"] in release.one("ConfigMap")["data"]
        assert mount["readOnly"] is True


def test_generated_key_is_accepted(tmp_path: Path) -> None:
    """The service's own key store takes the generated key for the first account's, and no other."""
    secrets = {s["metadata"]["name"]: s["data"] for s in charts.render().of_kind("Secret")}
    path = tmp_path / "keys.json"
    path.write_bytes(base64.b64decode(secrets["patchbay-keys"]["keys.json"]))
    key = base64.b64decode(secrets["patchbay-first-key"]["key"]).decode()
    store = KeyStore(path)
    assert store.verify(key) == "admin"
    assert store.verify(key[:-1] + ("a" if key[-1] != "a" else "b")) is None
    (record,) = store.list()
    assert record.account == "admin"


def test_every_rendering_makes_another_key() -> None:
    """Generated keys are random and long enough: 256 bits."""
    keys = {
        base64.b64decode(s["data"]["key"])
        for _ in range(3)
        for s in charts.render().of_kind("Secret")
        if "key" in s["data"]
    }
    assert len(keys) == 3
    assert all(len(key.removeprefix(b"pbk_")) == 43 for key in keys)


@pytest.fixture(scope="module")
def serve_facts() -> dict[str, dict[str, Any]]:
    """What Ray Serve and the service say of every example, asked of one fresh Python."""
    releases = {"defaults": charts.render(), **{name: charts.render(name) for name in charts.EXAMPLES}}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("serve_facts.py"))],
        input=json.dumps({name: [r.serve_config, r.patchbay_yaml] for name, r in releases.items()}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(facts, dict)
    return facts


each_example = pytest.mark.parametrize("example", ["defaults", *charts.EXAMPLES])


@each_example
def test_serve_accepts_the_config(example: str, serve_facts: dict[str, dict[str, Any]]) -> None:
    """Ray Serve's own schema takes what KubeRay will hand it, and knows every key of it."""
    assert serve_facts[example]["applications"][0] == serve_facts[example]["control"]
    assert serve_facts[example]["unknown_keys"] == []


@each_example
def test_ingress_is_set_up_as_on_one_machine(example: str, serve_facts: dict[str, dict[str, Any]]) -> None:
    """The gRPC services that are registered are those of `patchbay serve`, and can be imported."""
    assert serve_facts[example]["registers_as_serve"] is True
    assert serve_facts[example]["registration_importable"] == [True, True]


@each_example
def test_applications_are_built_as_on_one_machine(example: str, serve_facts: dict[str, dict[str, Any]]) -> None:
    """Each builder makes of the file the deployment that `patchbay serve` makes of it; none is missing."""
    same = serve_facts[example]["same"]
    assert len(same) >= 2
    assert all(same.values())
    assert serve_facts[example]["missing"] == []


def test_applications_follow_the_config(tmp_path: Path) -> None:
    """Log settings reach Ray Serve, and each application's route is its own name."""
    config = charts.render(values={"config": {"log_level": "warning"}}, tmp=tmp_path).serve_config
    assert config["logging_config"] == {"log_level": "WARNING", "enable_access_log": False}
    assert config["grpc_options"]["enable_reflection"] is True
    assert [a["route_prefix"] for a in config["applications"]] == ["/control", "/demo"]
