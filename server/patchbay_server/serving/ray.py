"""Ray Serve: one application per hosted model, chosen by a call's ``application`` metadata, and `control` beside them.

`build_app` is what a Serve configuration file names (the chart does); `start` and `stop` are `patchbay serve` on one
machine. The environment must be set before this module is imported: `patchbay_server.serving.environment`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped,unused-ignore]
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from patchbay.errors import UnavailableError
from patchbay.ir.events import ModelSummary
from patchbay_server.config import Config, ModelConfig
from patchbay_server.serving.artifacts import store_of
from patchbay_server.serving.environment import RAY_ENVIRONMENT, NodePorts
from patchbay_server.serving.local import LocalBackend, LocalCatalog, exit_replica
from patchbay_server.serving.replica import GrpcMethods, servicer_of, set_up_logging
from patchbay_server.serving.threads import thread_candidates

__all__ = [
    "CONTROL",
    "RAY_ENVIRONMENT",
    "SERVICER_FUNCTIONS",
    "ModelReplica",
    "StartError",
    "build_app",
    "model_application",
    "start",
    "stop",
]

#: Name of the application that knows about all models.
CONTROL = "control"
#: What Serve's ``grpc_servicer_functions`` must list; the first hands requests over unparsed.
SERVICER_FUNCTIONS = (
    "patchbay_server.transport.registration.add_servicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
#: Calls that are not executions (cards, tokens, health) and so are not in our queue.
_OTHER_CALLS = 256
#: Starts of a replica before its application counts as failed.
_START_ATTEMPTS = 2
_POLL_S = 0.1
#: What ray.init says when it gives up on its own node; it waits 30 s, and has no setting for it.
_RAYS_OWN_TIMEOUT = "timed out during startup"
#: Exceptions whose messages are sentences for people.
_OURS = re.compile(r"\b(patchbay\.errors\.\w+|ConfigError|KeyStoreError): ")
_RAISED = re.compile(r"([a-z]\w*\.)*[A-Z]\w*(Error|Exception)\b")


class StartError(Exception):
    """The service did not come up; the message is for the operator."""


class SlowStartError(StartError):
    """Ray gave up on its own node, which a busy machine had not let start yet."""


class ModelReplica(GrpcMethods):
    """One model in one process: Ray Serve starts as many as the configuration asks for.

    Args:
        config: the configuration, as `Config.dump` gives it.
        model: name of the model.
        sharing: replicas that share this machine's cores.
    """

    async def __init__(self, config: Mapping[str, Any], model: str, sharing: int = 1) -> None:  # type: ignore[misc]
        self._config = Config.parse(config)
        set_up_logging(self._config)
        chosen = model_config(self._config, model)
        self._backend = await asyncio.to_thread(_load, self._config, chosen, sharing)
        self._check = self._backend.check
        self._servicer = servicer_of(self._config, LocalCatalog({model: self._backend}))

    async def summary(self) -> ModelSummary:
        """The model's line in ListModels, for `control`."""
        return self._backend.summary

    def __del__(self) -> None:
        backend = getattr(self, "_backend", None)
        if backend is not None:
            backend.close()


def _load(config: Config, model: ModelConfig, sharing: int) -> LocalBackend:
    from patchbay_server.models.loader import load

    loaded = load(model.source, name=model.name, dtype=model.dtype, device=model.device, compile_layers=model.compile)
    return LocalBackend(
        loaded.with_weights(model.weights),
        config.limits,
        artifacts=store_of(config.artifacts),
        artifact_cache_bytes=config.artifacts.device_cache_bytes,
        scheduling=config.scheduling,
        torch_threads=thread_candidates(config.torch_threads, sharing=sharing),
        on_device_failure=exit_replica,
    )


def model_config(config: Config, name: str) -> ModelConfig:
    """The configuration of the model called `name`.

    Raises:
        ValueError: it has none.
    """
    for model in config.models:
        if model.name == name:
            return model
    raise ValueError(f"the configuration has no model called {name!r}")


def replica_options(config: Config) -> dict[str, Any]:
    """Deployment options that every application shares."""
    limits = config.limits
    return {
        # Our own queue answers first, with the limit's name and a time to retry; this is only the wall behind it.
        "max_ongoing_requests": limits.max_queue_length + 1 + _OTHER_CALLS,
        "graceful_shutdown_timeout_s": config.ray.drain_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "max_constructor_retry_count": _START_ATTEMPTS,
        "logging_config": LoggingConfig(log_level=config.log_level.upper(), enable_access_log=False),
    }


def model_application(config: Config, model: ModelConfig, sharing: int = 1) -> Any:
    """The Serve application of one hosted model; `sharing`: replicas that share one machine's cores."""
    deployment = serve.deployment(name=model.name)(ModelReplica).options(
        num_replicas=model.replicas,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        **replica_options(config),
    )
    return deployment.bind(config.dump(), model.name, sharing)


def build_app(args: Mapping[str, str]) -> Any:
    """The application of one model, for a Serve configuration file.

    Args:
        args: ``config``: path of patchbay.yaml; ``model``: name of the model in it.
    """
    config = Config.load(args["config"])
    return model_application(config, model_config(config, args["model"]))


def start(config: Config, ports: NodePorts, folder: Path, progress: Callable[[str], None]) -> None:
    """Start a Ray node of our own with every application on it, and return when calls are answered through the ingress.

    Raises:
        StartError: something did not come up in time; says what.
    """
    from patchbay_server.serving.control import control_application

    deadline = time.monotonic() + config.ray.start_timeout_s
    progress("starting Ray")
    reserved = 1 + sum(m.replicas * m.num_cpus for m in config.models)
    try:
        ray.init(
            address="local",
            # Reservations, not measurements: the node must offer at least what the models ask for.
            num_cpus=max(2, int(-(-reserved // 1))),
            include_dashboard=False,
            object_store_memory=config.ray.object_store_bytes,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
    except Exception as error:
        if _RAYS_OWN_TIMEOUT in str(error):
            raise SlowStartError("Ray's node did not come up within Ray's own 30 s; the machine is too busy") from error
        raise
    progress("starting the gRPC ingress")
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=ports.http),
        grpc_options=gRPCOptions(
            port=ports.grpc, grpc_servicer_functions=list(SERVICER_FUNCTIONS), enable_reflection=True
        ),
        logging_config=LoggingConfig(log_level=config.log_level.upper(), enable_access_log=False),
    )
    names = ", ".join(model.name for model in config.models)
    progress(f"loading {names}")
    applications = {CONTROL: control_application(config)}
    sharing = sum(model.replicas for model in config.models)
    applications |= {model.name: model_application(config, model, sharing) for model in config.models}
    serve.run_many(
        [serve.RunTarget(target=app, name=name, route_prefix=f"/{name}") for name, app in applications.items()],
        wait_for_applications_running=False,
    )
    _wait_running(set(applications), deadline, config)
    progress("waiting for the ingress")
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    _wait_answering(f"{host}:{ports.grpc}", applications, deadline)


def _wait_running(names: set[str], deadline: float, config: Config) -> None:
    while True:
        states = serve.status().applications
        for name in names:
            state = states.get(name)
            if state is not None and state.status == ApplicationStatus.DEPLOY_FAILED:
                details = [d.message for d in state.deployments.values()] + [state.message]
                raise StartError(f"{name} did not start: {_reason(details)}")
        waiting = [n for n in names if n not in states or states[n].status != ApplicationStatus.RUNNING]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise StartError(
                f"{', '.join(sorted(waiting))} did not start within {config.ray.start_timeout_s:g} s "
                "(ray.start_timeout_s); large models need more, and reserved GPUs must exist"
            )
        time.sleep(_POLL_S)


def _reason(messages: list[str]) -> str:
    """The sentence in a deployment's failure message that was written for people, else the last exception in it."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    for line in lines:
        if _OURS.search(line):
            return line.partition(": ")[2] or line
    raised = [line for line in lines if _RAISED.match(line)]
    return raised[-1] if raised else lines[-1] if lines else "Ray Serve gave no reason"


def _wait_answering(target: str, names: Mapping[str, Any], deadline: float) -> None:
    """Ask every application for its health through the ingress until all say SERVING."""
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in names:
            while True:
                try:
                    answer = health.Check(
                        health_pb2.HealthCheckRequest(), metadata=(("application", name),), timeout=5.0
                    )
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                    seen = "it does not serve"
                except grpc.RpcError as error:
                    seen = str(error.details())
                if time.monotonic() > deadline:
                    raise StartError(f"no answer from {name} at {target}: {seen}")
                time.sleep(_POLL_S)


def _drain(deadline: float) -> None:
    """Take the applications away, each when its running requests have ended, until the deadline."""
    for name in serve.status().applications:
        serve.delete(name, _blocking=False)
    while serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def stop(drain_s: float = 0.0) -> None:
    """Stop every application and the Ray node of this process; safe at any stage of `start`.

    Args:
        drain_s: how long running requests get. Serve itself ends its ingress together with the replicas, and with it
            what runs: so the applications go first.
    """
    if not ray.is_initialized():
        return
    try:
        if drain_s:
            _drain(time.monotonic() + drain_s)
        serve.shutdown()
    except (RuntimeError, ray.exceptions.RayError, UnavailableError):
        pass  # what is left is ended with the node
    finally:
        ray.shutdown()
