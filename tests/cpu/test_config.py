"""The configuration: what is accepted, in which order sources win, and what the messages say."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="the configuration needs the server extra")

from patchbay.ir.limits import Limits
from patchbay_server.config import Config, ConfigError, LimitsConfig, keys_markdown

EXAMPLE = Path(__file__).parents[2] / "deploy" / "patchbay.yaml"


def test_defaults_serve_the_demo() -> None:
    """Without any source the configuration hosts the demo model on port 9000, with keys required."""
    config = Config.load(env={})
    assert [(m.name, m.source) for m in config.models] == [("demo", "demo")]
    assert config.port == 9000
    assert config.insecure is False


def test_example_file_states_the_defaults() -> None:
    """deploy/patchbay.yaml is valid and changes nothing."""
    assert Config.load(EXAMPLE, env={}) == Config.load(env={})


def test_later_sources_win(tmp_path: Path) -> None:
    """The file beats the defaults, the environment the file, flags the environment; sections merge key by key."""
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nlimits: {max_nodes: 5, max_rows: 6, max_runs: 7}\n")
    config = Config.load(
        file,
        env={"PATCHBAY_LIMITS__MAX_ROWS": "60", "PATCHBAY_LIMITS__MAX_RUNS": "70", "PATCHBAY_INSECURE": "true"},
        overrides={"limits": {"max_runs": 700}},
    )
    assert (config.port, config.insecure) == (1, True)
    assert (config.limits.max_nodes, config.limits.max_rows, config.limits.max_runs) == (5, 60, 700)


def test_file_named_by_the_environment(tmp_path: Path) -> None:
    """PATCHBAY_CONFIG names the file when no path is given."""
    file = tmp_path / "c.yaml"
    file.write_text("port: 4321")
    assert Config.load(env={"PATCHBAY_CONFIG": str(file)}).port == 4321


def test_models_from_the_environment() -> None:
    """A list in the environment is YAML or JSON; a bare string is a source, named after its last part."""
    config = Config.load(env={"PATCHBAY_MODELS": '["acme/tiny-llama", {"source": "demo", "replicas": 2}]'})
    assert [(m.name, m.source, m.replicas) for m in config.models] == [
        ("tiny-llama", "acme/tiny-llama", 1),
        ("demo", "demo", 2),
    ]


def test_service_links_are_not_configuration() -> None:
    """What Kubernetes sets for a Service called patchbay, and the client's variables, are left alone."""
    env = {
        "PATCHBAY_PORT": "tcp://10.0.0.1:9000",
        "PATCHBAY_SERVICE_HOST": "10.0.0.1",
        "PATCHBAY_PORT_9000_TCP_ADDR": "10.0.0.1",
        "PATCHBAY_URL": "localhost:1",
        "PATCHBAY_API_KEY": "x",
    }
    assert Config.load(env=env) == Config.load(env={})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot: 1", "prot: unknown key; did you mean 'port'?"),
        ("limits: {max_node: 1}", "limits.max_node: unknown key; did you mean 'max_nodes'?"),
        ("models: [{source: demo, gpus: 1}]", "models[0].gpus: unknown key; did you mean 'num_gpus'?"),
        ("limits: {max_nodes: 0}", "limits.max_nodes: input should be greater than or equal to 1 (got 0)"),
        ("models: [{name: a}]", "models[0].source: required, but not given"),
        ("models: []", "models: "),
        ("models: [demo, demo]", "models: two models are called 'demo'"),
        ("models: [{name: control, source: demo}]", "models[0].name: 'control' is the name"),
        ("models: [{name: ../x, source: demo}]", "models[0].name: "),
        ("port: seven", "port: "),
        ("port: yes", "port: neither true nor false can be said here (got True)"),
        ("limits: {deadline_s: true}", "limits.deadline_s: neither true nor false"),
        ("scheduling: {account_weights: {a/b: 1}}", "scheduling.account_weights.a/b: string should match"),
        ("scheduling: {account_weights: {ada: 0}}", "scheduling.account_weights.ada: input should be greater"),
        ("scheduling: {account_weights: {ada: 2}, fairness: round-robin}", "scheduling: account_weights needs"),
        ("connections: {max_calls: 0}", "connections.max_calls: input should be greater than or equal to 1 (got 0)"),
        ("connections: {max_agee_s: 1}", "connections.max_agee_s: unknown key; did you mean 'max_age_s'?"),
        ("- 1", "expected keys and values at the top"),
        ("a: [", "not valid YAML"),
    ],
)
def test_faults_name_the_key(tmp_path: Path, text: str, expected: str) -> None:
    """Each fault is one ConfigError whose message names the file and the key."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(file, env={})
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_section_without_lines_says_nothing(tmp_path: Path) -> None:
    """``limits:`` with everything below it commented out is as if it were not there; ``tls:`` too."""
    file = tmp_path / "c.yaml"
    file.write_text("limits:\n#  max_nodes: 1\nscheduling:\nartifacts:\nconnections:\nkeys:\nray:\ntls:\n")
    assert Config.load(file, env={}) == Config.load(env={})


def test_entries_that_are_wrong_are_not_counted() -> None:
    """One wrong model is one fault; that no model is left is not told as another."""
    with pytest.raises(ConfigError) as caught:
        Config.parse({"models": [{"source": "demo", "dtype": "fp16"}]})
    assert str(caught.value).count("models") == 1
    with pytest.raises(ConfigError, match="models: tuple should have at least 1 item"):
        Config.parse({"models": []})


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    """Two faults give two lines, so that an operator mends both in one go."""
    file = tmp_path / "c.yaml"
    file.write_text("prot: 1\nlimits: {max_rows: -1}")
    with pytest.raises(ConfigError) as caught:
        Config.load(file, env={})
    assert "prot: " in str(caught.value)
    assert "limits.max_rows: " in str(caught.value)


def test_unknown_environment_variable() -> None:
    """A misspelt variable is refused with the nearest name."""
    with pytest.raises(ConfigError, match=r"PATCHBAY_PROT names no key.*did you mean PATCHBAY_PORT"):
        Config.load(env={"PATCHBAY_PROT": "1"})


def test_missing_file() -> None:
    """A file that is not there is named."""
    with pytest.raises(ConfigError, match="cannot read the configuration file /nonexistent"):
        Config.load("/nonexistent.yaml", env={})


def test_limits_cover_the_graph_limits() -> None:
    """Every field of the verifier's Limits is a key, with the same default."""
    config = LimitsConfig()
    assert config.graph_limits() == Limits()
    assert {f.name for f in fields(Limits)} <= set(LimitsConfig.model_fields)


def test_dump_round_trips_through_json() -> None:
    """What a replica receives is the configuration that the launcher validated."""
    config = Config.load(env={}, overrides={"keys": {"file": "/x/keys.json"}, "limits": {"max_nodes": 9}})
    assert Config.parse(json.loads(json.dumps(config.dump()))) == config


def test_schema_refuses_unknown_keys_and_describes_all() -> None:
    """The JSON schema forbids further keys in every section and describes every key."""
    schema = Config.json_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
    assert all(meaning for _, _, meaning in Config.keys_table())


def test_the_operators_page_lists_every_key() -> None:
    """docs/serving.md holds the table of keys as the code prints it (``python -m patchbay_server.config``)."""
    page = (EXAMPLE.parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert keys_markdown() in page
