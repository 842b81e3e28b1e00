"""The chart runs exactly what `patchbay serve --config` runs: same file, same applications, same keys."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from patchbay_server.config import Config
from patchbay_server.store.keys import KeyStore
from tests.chart import charts
from tests.chart.charts import Release

pytestmark = pytest.mark.chart
schema = charts.import_quietly("ray.serve.schema")


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
    assert loaded == Config.parse({**block, "port": 9000, "keys": keys}).dump()
    assert loaded["limits"]["max_flops"] == 10**18


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


def test_serve_accepts_the_config(release: Release) -> None:
    """Ray Serve's own schema takes what KubeRay will hand it."""
    parsed = schema.ServeDeploySchema.model_validate(release.serve_config)
    assert parsed.applications[0].name == "control"


def test_serve_config_has_no_unknown_keys(release: Release) -> None:
    """No key is unknown to Ray Serve's schemas, which would swallow it silently."""
    config = release.serve_config
    assert config.keys() <= schema.ServeDeploySchema.model_fields.keys()
    assert config["grpc_options"].keys() <= schema.gRPCOptionsSchema.model_fields.keys()
    assert config["http_options"].keys() <= schema.HTTPOptionsSchema.model_fields.keys()
    for application in config["applications"]:
        assert application.keys() <= schema.ServeApplicationSchema.model_fields.keys()


def test_ingress_is_set_up_as_on_one_machine(release: Release) -> None:
    """gRPC registration, reflection and log settings are those with which `patchbay serve` starts Ray Serve."""
    serving = charts.import_quietly("patchbay_server.serving.ray")
    options = release.serve_config["grpc_options"]
    assert options["grpc_servicer_functions"] == list(serving.SERVICER_FUNCTIONS)
    assert options["enable_reflection"] is True
    assert release.serve_config["applications"][0]["name"] == serving.CONTROL
    assert release.serve_config["logging_config"] == {"log_level": "INFO", "enable_access_log": False}


def test_applications_are_built_as_on_one_machine(release: Release, tmp_path: Path) -> None:
    """Each application's builder makes of the file the deployment that `patchbay serve` makes of it."""
    serving = charts.import_quietly("patchbay_server.serving.ray")
    control = charts.import_quietly("patchbay_server.serving.control")
    config = config_of(release, tmp_path)
    wanted = {m.name: serving.model_application(config, m) for m in config.models}
    wanted[serving.CONTROL] = control.control_application(config)
    built = {}
    for application in release.serve_config["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert application["route_prefix"] == f"/{application['name']}"
        arguments = {**application["args"], "config": str(tmp_path / "patchbay.yaml")}
        built[application["name"]] = getattr(charts.import_quietly(module), name)(arguments)
    assert built.keys() == wanted.keys()
    for name, application in built.items():
        mine, theirs = application._bound_deployment, wanted[name]._bound_deployment
        assert mine.func_or_class is theirs.func_or_class
        assert mine.init_args == theirs.init_args
        assert mine._deployment_config == theirs._deployment_config
        assert mine.ray_actor_options == theirs.ray_actor_options


def test_every_import_path_exists(release: Release) -> None:
    """Everything that Ray Serve is told to import can be imported and called."""
    config = release.serve_config
    paths = [a["import_path"].replace(":", ".") for a in config["applications"]]
    for path in {*paths, *config["grpc_options"]["grpc_servicer_functions"]}:
        module, _, name = path.rpartition(".")
        assert callable(getattr(charts.import_quietly(module), name))
