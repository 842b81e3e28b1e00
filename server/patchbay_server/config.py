"""The service's configuration: one validated object, from defaults, a YAML file, the environment and the command line.

The same file configures a laptop (``patchbay serve --config``) and the Helm chart, whose values schema is made from
`Config.json_schema`. Unknown keys are errors: Ray Serve's own schemas swallow them silently, so a typo would go unseen.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from patchbay.errors import PatchbayError
from patchbay.ir.limits import Limits

#: Where the defaults of the graph limits come from.
_GRAPH = Limits()

ENV_PREFIX = "PATCHBAY_"
#: Names under the prefix that are not keys of the configuration (those of the client, this loader, demo, tests).
OTHER_ENV = re.compile(r"(URL|API_KEY|CONFIG|(DEMO|TEST|BENCH|GPU)(_.*)?)")
#: What Kubernetes sets for a Service called ``patchbay`` (service links); ``PATCHBAY_PORT=tcp://...`` is one of them.
SERVICE_LINK_ENV = re.compile(r"SERVICE_(HOST|PORT)(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?")


class ConfigError(PatchbayError, ValueError):
    """The configuration is wrong; the message names the source and the key of every fault."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python would take ``port: yes`` for 1."""
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("neither true nor false can be said here")
        return value


class ModelConfig(_Section):
    """One hosted model."""

    name: str = Field(
        default="",
        max_length=63,
        pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$",
        description="Name that clients ask for. Empty: derived from the source (the last part of a path or hub id).",
    )
    source: str = Field(min_length=1, description="`demo`, a Hugging Face hub id, or a local folder.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Element type of the weights; `auto`: as the checkpoint says."
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N`.",
    )
    weights: Literal["none", "used-in-graph", "downloadable"] = Field(
        default="used-in-graph",
        description="What graphs may do with the weights: not name them, use them, or also ask for them.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the decoder layers with torch.compile when the model is loaded (seconds to minutes; needs "
        "a C++ compiler on a CPU). They are used in forwards that look at nothing inside a layer.",
    )
    replicas: int = Field(default=1, ge=1, le=1024, description="Copies of the model, each in a process of its own.")
    num_cpus: float = Field(default=1.0, ge=0, description="Logical CPUs that Ray reserves for each replica.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each replica.")

    @model_validator(mode="before")
    @classmethod
    def _named_after_source(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"source": data}
        if isinstance(data, Mapping) and not data.get("name") and isinstance(data.get("source"), str):
            tail = re.sub(r"[^A-Za-z0-9._-]+", "-", data["source"].rstrip("/").rsplit("/", 1)[-1]).strip("-._")
            data = {**data, "name": tail[:63].rstrip("-._")}
        return data

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str) -> str:
        if not name:
            raise ValueError("no name could be derived from the source; give one")
        if name == "control":
            raise ValueError("'control' is the name of the service's own application; choose another")
        return name


class LimitsConfig(_Section):
    """What one request, one account and the queue are held to. Everything is checked before anything runs."""

    max_nodes: int = Field(default=_GRAPH.max_nodes, ge=1, description="Nodes of one graph.")
    max_runs: int = Field(default=_GRAPH.max_runs, ge=1, description="Runs of one graph.")
    max_rows: int = Field(default=_GRAPH.max_rows, ge=1, description="Rows over all runs of one graph.")
    max_tokens: int = Field(
        default=_GRAPH.max_tokens, ge=1, description="Token positions, padding included, over all runs of one graph."
    )
    max_const_bytes: int = Field(
        default=_GRAPH.max_const_bytes, ge=0, description="Bytes of one graph's inline constants."
    )
    max_result_bytes: int = Field(
        default=_GRAPH.max_result_bytes, ge=1, description="Bytes of all outputs of one graph."
    )
    max_peak_bytes: int = Field(
        default=_GRAPH.max_peak_bytes, ge=1, description="Highest sum of one graph's live values, in bytes."
    )
    max_flops: int = Field(
        default=_GRAPH.max_flops, ge=1, description="Floating-point operations of one graph's own nodes."
    )
    max_loop_steps: int = Field(
        default=_GRAPH.max_loop_steps, ge=1, description="Operations that one graph's loops run, every step counted."
    )
    max_request_bytes: int = Field(
        default=256 * 2**20, ge=1024, le=2**31 - 1, description="Bytes of one request message."
    )
    max_queue_length: int = Field(
        default=256,
        ge=0,
        description="Requests that may wait in one replica; one more is refused with a time to retry.",
    )
    max_concurrent_per_account: int = Field(
        default=32, ge=1, description="Requests of one account that may wait or run in one replica at a time."
    )
    max_unread_bytes_per_account: int = Field(
        default=4 * 2**30,
        ge=1,
        description="Bytes of one account's results in one replica that its clients have not read yet, those of running"
        " requests included; a request that is the account's only one may have more.",
    )
    deadline_s: float = Field(
        default=600.0, gt=0, description="Seconds after which a request is given up, waiting included."
    )

    def graph_limits(self) -> Limits:
        """The part that a single graph is held to, as the verifier takes it."""
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})


#: As `patchbay_server.store.keys.ACCOUNT`.
AccountName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?$")]
Weight = Annotated[float, Field(ge=0.001, le=1000.0)]


class SchedulingConfig(_Section):
    """Which requests share a forward, and whose turn it is."""

    max_open_requests: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="Requests that the engine holds open at once; their forwards may be shared. As many again may be"
        " open for accounts that have none.",
    )
    max_forward_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Token positions of one forward shared by several requests. Default: 512 on a CPU, 16384 on a GPU.",
    )
    max_pass_tokens: int = Field(
        default=16_384,
        ge=1,
        description="Token positions after which the runs of one request go on in a further forward; others get their "
        "turn in between. A single run is never split.",
    )
    fairness: Literal["virtual-tokens", "round-robin"] = Field(
        default="virtual-tokens",
        description="Whose turn it is: the account that had least put through, or accounts one request each.",
    )
    account_weights: dict[AccountName, Weight] = Field(
        default={},
        description="Shares of accounts that are not 1, by name: while both wait, an account of weight 2 has twice as "
        "much put through as one of weight 1.",
        json_schema_extra={"additionalProperties": False},
    )
    prefix_cache_bytes: int = Field(
        default=512 * 2**20,
        ge=0,
        description="Bytes on each model's device for what recent prompts left to go on from, at most a quarter of them"
        " for one account; 0: none.",
    )

    @model_validator(mode="after")
    def _weights_are_used(self) -> SchedulingConfig:
        if self.account_weights and self.fairness != "virtual-tokens":
            raise ValueError(f"account_weights needs `fairness: virtual-tokens`, not {self.fairness}")
        return self


class ArtifactsConfig(_Section):
    """Tensors that clients leave on the server: large constants, uploaded once, and results that are kept."""

    path: Path | None = Field(
        default=None,
        description="Folder for them; replicas of one service must see the same one. Default: `<cache folder>/patchbay/"
        "artifacts`.",
    )
    quota_bytes: int = Field(
        default=32 * 2**30, ge=0, description="Bytes of one account's artifacts; 0: this server keeps none."
    )
    total_bytes: int | None = Field(
        default=None, ge=1, description="Bytes of all accounts' artifacts together. Default: what the disk holds."
    )
    max_bytes: int = Field(default=8 * 2**30, ge=1, description="Bytes of one artifact.")
    max_count: int = Field(default=10_000, ge=1, description="Artifacts of one account.")
    ttl_s: float = Field(
        default=30 * 24 * 3600.0, gt=0, description="Seconds after its last use after which an artifact goes."
    )
    device_cache_bytes: int = Field(
        default=1 * 2**30,
        ge=0,
        description="Bytes of artifacts that each model keeps on its device for their next use; 0: none.",
    )

    @property
    def folder(self) -> Path:
        """Where they are."""
        if self.path is not None:
            return self.path
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "patchbay" / "artifacts"


class KeysConfig(_Section):
    """Where the keys that may use the service are kept."""

    file: Path | None = Field(
        default=None,
        description="File of key digests, read again when it changes. Default: `<config folder>/patchbay/keys.json`.",
    )
    secrets_dir: Path | None = Field(
        default=None,
        description="Folder with one plain-text key per file, named after its account, as Kubernetes mounts a Secret.",
    )
    write_local: bool = Field(
        default=True,
        description="Create a key for this machine's clients on start and leave it where they find it (mode 0600).",
    )


class TlsConfig(_Section):
    """TLS of the plain server. Under Ray Serve TLS ends at the gateway before it."""

    certificate_file: Path = Field(description="PEM certificate chain.")
    private_key_file: Path = Field(description="PEM private key.")


class ConnectionsConfig(_Section):
    """What strangers and clients may keep open at the plain server. Under Ray Serve the ingress sees to it."""

    max_connections: int = Field(default=1024, ge=1, le=2**20, description="Connections to the plain server at a time.")
    max_calls: int = Field(
        default=256, ge=1, le=2**20, description="Calls at a time on one connection; further ones wait in the client."
    )
    max_idle_s: float = Field(
        default=900.0,
        gt=0,
        le=7 * 24 * 3600.0,
        description="Seconds after which a connection without calls is closed; clients open a new one by themselves.",
    )
    max_age_s: float = Field(
        default=3600.0,
        gt=0,
        le=7 * 24 * 3600.0,
        description="Seconds (a tenth more or less) after which a connection takes no new calls.",
    )
    age_grace_s: float | None = Field(
        default=None,
        ge=0,
        le=7 * 24 * 3600.0,
        description="Seconds that the calls on such a connection get to end. Default: `limits.deadline_s`, and five"
        " minutes for reading the results.",
    )
    keepalive_s: float = Field(
        default=60.0,
        ge=1,
        le=24 * 3600.0,
        description="Seconds of silence after which a client is asked whether it is still there.",
    )
    keepalive_timeout_s: float = Field(
        default=20.0, gt=0, le=3600.0, description="Seconds that it has to answer; then the connection is closed."
    )
    min_ping_interval_s: float = Field(
        default=10.0,
        gt=0,
        le=3600.0,
        description="Seconds between two pings of a client; one that asks more often is disconnected.",
    )


class RayConfig(_Section):
    """The Ray node that `patchbay serve` starts for itself."""

    temp_dir: Path | None = Field(
        default=None, description="Ray's folder; at most 20 characters (Unix sockets). Default: /tmp."
    )
    object_store_bytes: int = Field(
        default=128 * 2**20, ge=80 * 2**20, description="Ray's object store; requests do not pass through it."
    )
    haproxy: bool = Field(
        default=True, description="HAProxy as ingress where its wheel exists; false: Ray Serve's own proxy."
    )
    start_timeout_s: float = Field(default=300.0, gt=0, description="Seconds to wait for every replica to be ready.")
    drain_s: float = Field(default=5.0, ge=0, description="Seconds that running requests get when the service stops.")


#: What has keys of its own.
_SECTIONS: Mapping[str, type[BaseModel]] = {
    "models": ModelConfig,
    "limits": LimitsConfig,
    "scheduling": SchedulingConfig,
    "artifacts": ArtifactsConfig,
    "keys": KeysConfig,
    "tls": TlsConfig,
    "connections": ConnectionsConfig,
    "ray": RayConfig,
}


class Config(_Section):
    """Everything that an operator may set."""

    models: tuple[ModelConfig, ...] = Field(
        default=(ModelConfig(source="demo"),), min_length=1, description="Hosted models."
    )
    host: str = Field(
        default="0.0.0.0",
        description="Address that the gRPC port listens on. Replicas' own ports are on all interfaces, with keys too.",
    )
    port: int = Field(default=9000, ge=0, le=65535, description="gRPC port; 0: any free one (plain server only).")
    insecure: bool = Field(default=False, description="Serve without keys: anybody who reaches the port may use it.")
    torch_threads: int | None = Field(
        default=None, ge=1, description="Threads of one forward on the CPU. Default: tried when a replica starts."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="What is logged.")
    limits: LimitsConfig = LimitsConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    artifacts: ArtifactsConfig = ArtifactsConfig()
    keys: KeysConfig = KeysConfig()
    tls: TlsConfig | None = None
    connections: ConnectionsConfig = ConnectionsConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_says_nothing(cls, data: Any) -> Any:
        """``limits:`` with every line of it commented out."""
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in _SECTIONS}

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        names = [m.name for m in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}; give each a name of its own")
        return models

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Config:
        """Read the configuration; later sources win: defaults, the YAML file, the environment, `overrides`.

        Args:
            path: YAML file; None: the file that ``PATCHBAY_CONFIG`` names, or no file.
            env: environment; ``PATCHBAY_PORT``, ``PATCHBAY_LIMITS__MAX_NODES`` (two underscores enter a section) and so
                on; a list or section as YAML or JSON. None: the process's own.
            overrides: nested mapping with the keys of the configuration (the command line's flags).

        Raises:
            ConfigError: a file that cannot be read, an unknown key, or a value out of range; the message names it.
        """
        env = os.environ if env is None else env
        path = path if path is not None else env.get(ENV_PREFIX + "CONFIG") or None
        merged: dict[str, Any] = {}
        if path is not None:
            merged = _read_yaml(Path(path))
        merged = _merge(merged, _read_env(env))
        merged = _merge(merged, overrides or {})
        return cls.parse(merged, source=None if path is None else str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, source: str | None = None) -> Config:
        """Validate nested plain data (as `dump` gives it).

        Raises:
            ConfigError: an unknown key or a bad value; the message names every one.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            # Entries that are wrong are not counted, which is not a fault of its own.
            counted = [e for e in errors if not (e["type"] == "too_short" and e["input"])]
            lines = [_fault(e) for e in counted or errors]
            head = "the configuration" if source is None else source
            raise ConfigError(f"{head} is not valid:\n  " + "\n  ".join(lines)) from None

    def dump(self) -> dict[str, Any]:
        """Plain data that `parse` and JSON take (handed to replicas, which may run on other machines)."""
        return self.model_dump(mode="json")

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of the YAML file; the chart's values schema embeds it."""
        return cls.model_json_schema()

    @classmethod
    def keys_table(cls) -> list[tuple[str, str, str]]:
        """(key, default, meaning) of every key, in the order of the file; docs/serving.md prints it."""
        return [(key, default, meaning) for key, default, meaning in _walk(cls, "")]


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, info in section.model_fields.items():
        key = prefix + name
        if section is Config and name in _SECTIONS:
            yield from _walk(_SECTIONS[name], f"{key}[]." if name == "models" else f"{key}.")
            continue
        default = "required" if info.is_required() else "none" if info.default is None else str(info.default)
        yield key, default if default != "" else "derived", info.description or ""


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, found {type(data).__name__}")
    return data


def _read_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Nested data from ``PATCHBAY_*``; unknown names are left in, so that validation names them."""
    import yaml

    data: dict[str, Any] = {}
    for name, value in sorted(env.items()):
        if not name.startswith(ENV_PREFIX):
            continue
        tail = name[len(ENV_PREFIX) :]
        if OTHER_ENV.fullmatch(tail) or SERVICE_LINK_ENV.fullmatch(tail) or (tail == "PORT" and "://" in value):
            continue
        parts = tail.lower().split("__")
        if parts[0] not in Config.model_fields:
            near = difflib.get_close_matches(parts[0], list(Config.model_fields), n=1)
            hint = f"; did you mean {ENV_PREFIX}{near[0].upper()}?" if near else ""
            raise ConfigError(f"the environment variable {name} names no key of the configuration{hint}")
        target = data
        for part in parts[:-1]:
            target = target.setdefault(part, {})
        try:
            target[parts[-1]] = yaml.safe_load(value) if value.lstrip()[:1] in ("[", "{") else value
        except yaml.YAMLError:
            raise ConfigError(f"the environment variable {name} holds neither a plain value nor YAML") from None
    return data


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        below = out.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        out[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return out


def _fault(error: Any) -> str:
    """One line for one of pydantic's errors: the key, what is wrong, what was seen."""
    where = ""
    for part in error["loc"]:
        if part == "[key]":  # pydantic's word for the name of the entry just named
            continue
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    where = where or "top level"
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    seen = error.get("input")
    shown = f" (got {seen!r})" if isinstance(seen, str | int | float | bool | None) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    section = _SECTIONS.get(str(path[0]), Config) if path else Config
    return list(section.model_fields)


def keys_markdown() -> str:
    """The table of keys in docs/serving.md; ``python -m patchbay_server.config`` prints it, and a test compares."""
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in Config.keys_table()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(keys_markdown())
