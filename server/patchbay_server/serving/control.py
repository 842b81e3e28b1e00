"""The `control` application: what is global to a service rather than one model's. Today that is the list of models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray import serve

from patchbay.errors import NotFoundError
from patchbay.ir.events import ModelSummary
from patchbay_server.config import Config
from patchbay_server.serving.backend import Backend, no_such_model
from patchbay_server.serving.ray import CONTROL, replica_options
from patchbay_server.serving.replica import GrpcMethods, servicer_of, set_up_logging

log = logging.getLogger("patchbay.serving")

#: How long a model's replica may take to say who it is before its line says that it is not ready.
SUMMARY_TIMEOUT_S = 2.0


class ServeCatalog:
    """The models of this service, asked of their applications; it runs none of them itself."""

    def __init__(self, config: Config) -> None:
        self._models = {model.name: model for model in sorted(config.models, key=lambda m: m.name)}
        self._known: dict[str, ModelSummary] = {}

    async def list_models(self) -> tuple[ModelSummary, ...]:
        """A summary of each configured model, ordered by name; ``ready`` is False while no replica answers."""
        return tuple(await asyncio.gather(*map(self._summary, self._models)))

    async def _summary(self, name: str) -> ModelSummary:
        try:
            handle = serve.get_app_handle(name)
            summary: ModelSummary = await asyncio.wait_for(handle.summary.remote(), SUMMARY_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever keeps a replica from answering, it is not ready
            log.warning("model %s does not answer: %s", name, error)
            unknown = ModelSummary(name, "", self._models[name].source, 0, 0, 0)
            return replace(self._known.get(name, unknown), ready=False)
        self._known[name] = summary
        return summary

    def get(self, name: str) -> Backend:
        """Nothing is run here.

        Raises:
            NotFoundError: always; says where the model is.
        """
        if name in self._models:
            raise NotFoundError(
                f"the model {name!r} is another application of this port: send `application: {name}` as metadata",
                reason="WRONG_APPLICATION",
            )
        raise no_such_model(name, self._models)


class ControlReplica(GrpcMethods):
    """The replica of `control`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        parsed = Config.parse(config)
        set_up_logging(parsed)
        self._servicer = servicer_of(parsed, ServeCatalog(parsed))
        self._check = lambda: None


def control_application(config: Config) -> Any:
    """The Serve application `control`."""
    deployment = serve.deployment(name=CONTROL)(ControlReplica).options(
        num_replicas=1, ray_actor_options={"num_cpus": 0.1}, **replica_options(config)
    )
    return deployment.bind(config.dump())


def build_app(args: Mapping[str, str]) -> Any:
    """The application `control`, for a Serve configuration file.

    Args:
        args: ``config``: path of patchbay.yaml.
    """
    return control_application(Config.load(args["config"]))
