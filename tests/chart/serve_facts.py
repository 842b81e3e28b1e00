"""Asks Ray Serve and the service what they make of rendered charts; a program, so that pytest itself never imports Ray.

Ray Serve reads its environment when it is imported; tests elsewhere must be the first to do so.
Reads a JSON object from stdin: example -> [Serve configuration, patchbay.yaml]. Writes one: example -> facts.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema, gRPCOptionsSchema

from patchbay_server.config import Config
from patchbay_server.serving import control, ray


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """Keys that Ray Serve's schemas do not know (and would swallow silently)."""
    parts = [(config, ServeDeploySchema), (config["grpc_options"], gRPCOptionsSchema)]
    parts += [(config["http_options"], HTTPOptionsSchema)]
    parts += [(application, ServeApplicationSchema) for application in config["applications"]]
    return [key for part, schema in parts for key in part if key not in schema.model_fields]


def attribute(path: str) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)


def same_deployment(mine: Any, theirs: Any) -> bool:
    """Whether two built applications are one class with the same arguments, options and reservations."""
    first, second = mine._bound_deployment, theirs._bound_deployment
    return (
        first.func_or_class is second.func_or_class
        and first.init_args == second.init_args
        and first._deployment_config == second._deployment_config
        and first.ray_actor_options == second.ray_actor_options
    )


def facts(config: dict[str, Any], file: Path) -> dict[str, Any]:
    parsed = ServeDeploySchema.model_validate(config)
    mine = Config.load(file, env={})
    wanted = {model.name: ray.model_application(mine, model) for model in mine.models}
    wanted[ray.CONTROL] = control.control_application(mine)
    built = {a["name"]: attribute(a["import_path"])({**a["args"], "config": str(file)}) for a in config["applications"]}
    functions = config["grpc_options"]["grpc_servicer_functions"]
    return {
        "applications": [application.name for application in parsed.applications],
        "unknown_keys": unknown_keys(config),
        "registers_as_serve": functions == list(ray.SERVICER_FUNCTIONS),
        "registration_importable": [callable(attribute(path)) for path in functions],
        "same": {name: same_deployment(app, wanted[name]) for name, app in built.items()},
        "missing": sorted(wanted.keys() - built.keys()),
        "control": ray.CONTROL,
    }


def main() -> None:
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for example, (config, text) in json.load(sys.stdin).items():
            file = Path(folder) / f"{example}.yaml"
            file.write_text(text, encoding="utf-8")
            answers[example] = facts(config, file)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
