"""Writes the parts of the Helm chart that have their source in the code; `--check` only says whether they are current.

- helm/patchbay/values.schema.json: the shape of values.yaml. Written out below for what the chart owns; the `config`
  block is `Config.json_schema()`, so that an operator's typo fails in `helm install` and not in a pod.
- helm/patchbay/files/ray-environment.yaml: the variables that Ray Serve must find before it starts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from patchbay_server.config import Config
from patchbay_server.serving.environment import RAY_ENVIRONMENT

CHART = Path(__file__).resolve().parent.parent / "helm" / "patchbay"

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TEXT_MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
#: Whatever Kubernetes allows there: not the chart's to judge.
FOREIGN: Schema = {"type": "object"}
FOREIGN_LIST: Schema = {"type": "array", "items": FOREIGN}
ACCOUNT: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9]([A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?$"}
DURATION: Schema = {"type": "string", "pattern": r"^[0-9]+(ms|s|m)$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
#: Names of Kubernetes objects (DNS subdomain), or nothing.
NAME: Schema = {"type": "string", "maxLength": 253, "pattern": r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$"}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$"}
RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["requests", "limits"],
    "properties": {
        part: {"type": "object", "required": ["cpu", "memory"], "additionalProperties": QUANTITY}
        for part in ("requests", "limits")
    },
}


def closed(properties: dict[str, Schema], *required: str) -> Schema:
    """An object that may hold these keys and no others."""
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"required": list(required)} if required else {})


def choice(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def at_least(minimum: int) -> Schema:
    return {"type": "integer", "minimum": minimum}


#: A folder of the pods: a shared volume, or an empty one for each.
VOLUME: Schema = closed(
    {
        "persistent": FLAG,
        "existingClaim": NAME,
        "size": QUANTITY,
        "storageClassName": NAME,
        "accessModes": {
            "type": "array",
            "minItems": 1,
            "items": choice("ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"),
        },
        "emptyDirSize": QUANTITY,
    }
)

#: Where pods of a group may run.
PLACEMENT: dict[str, Schema] = {
    "resources": RESOURCES,
    "nodeSelector": TEXT_MAP,
    "tolerations": FOREIGN_LIST,
    "affinity": FOREIGN,
    "priorityClassName": NAME,
}


def chart_values() -> dict[str, Schema]:
    """Everything in values.yaml but `config`."""
    return {
        "keys": closed({"existingSecret": NAME, "firstAccount": ACCOUNT}),
        "image": closed(
            {
                "repository": {"type": "string", "minLength": 1},
                "tag": TEXT,
                "digest": {"type": "string", "pattern": r"^(sha256:[0-9a-f]{64})?$"},
                "pullPolicy": choice("Always", "IfNotPresent", "Never"),
                "pullSecrets": {"type": "array", "items": closed({"name": NAME}, "name")},
            },
            "repository",
        ),
        "rayVersion": {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
        "head": closed(PLACEMENT, "resources"),
        "workers": {
            "type": "array",
            "minItems": 1,
            "items": closed(
                PLACEMENT
                | {
                    "name": {"type": "string", "maxLength": 40, "pattern": r"^[a-z]([a-z0-9-]*[a-z0-9])?$"},
                    "replicas": at_least(0),
                    "topologySpreadConstraints": FOREIGN_LIST,
                    "runtimeClassName": NAME,
                },
                "name",
                "replicas",
                "resources",
            ),
        },
        "service": closed(
            {"type": choice("ClusterIP", "NodePort", "LoadBalancer"), "port": PORT, "annotations": TEXT_MAP},
            "type",
            "port",
        ),
        "gateway": closed(
            {
                "enabled": FLAG,
                "parentRefs": FOREIGN_LIST,
                "hostnames": {"type": "array", "items": TEXT},
                "create": FLAG,
                "className": TEXT,
                "tlsSecretName": NAME,
            }
        ),
        "ingress": closed(
            {"enabled": FLAG, "className": TEXT, "host": TEXT, "tlsSecretName": NAME, "annotations": TEXT_MAP}
        ),
        "networkPolicy": closed(
            {
                "enabled": FLAG,
                "allowFrom": FOREIGN_LIST,
                "operatorFrom": {"type": "array", "minItems": 1, "items": FOREIGN},
                "metricsFrom": FOREIGN_LIST,
                "egress": closed({"enabled": FLAG, "https": FLAG}),
            }
        ),
        "rayAuth": closed({"existingSecret": NAME}),
        "huggingFace": closed(
            {
                "tokenSecret": closed({"name": NAME, "key": TEXT}),
                "offline": FLAG,
                "cache": VOLUME,
            }
        ),
        "artifacts": VOLUME,
        "serviceAccount": closed({"create": FLAG, "name": NAME, "annotations": TEXT_MAP}),
        "podSecurityContext": FOREIGN,
        "securityContext": FOREIGN,
        "tmpSize": QUANTITY,
        "podDisruptionBudget": closed({"enabled": FLAG, "minAvailable": at_least(1)}),
        "upgradeStrategy": choice("NewCluster", "None"),
        "deletionDelaySeconds": at_least(0),
        "terminationGracePeriodSeconds": at_least(0),
        "metrics": closed(
            {
                "annotations": FLAG,
                "podMonitor": closed(
                    {
                        "enabled": FLAG,
                        "labels": TEXT_MAP,
                        "interval": {"type": "string", "pattern": r"^[0-9]+(ms|s|m)$"},
                    }
                ),
            }
        ),
        "podLabels": TEXT_MAP,
        "podAnnotations": TEXT_MAP,
        "extraEnv": FOREIGN_LIST,
        "extraVolumes": FOREIGN_LIST,
        "extraVolumeMounts": FOREIGN_LIST,
        "nameOverride": NAME,
        "fullnameOverride": {"type": "string", "pattern": r"^([a-z]([a-z0-9-]*[a-z0-9])?)?$"},
        # Helm puts these into every chart's values.
        "global": FOREIGN,
    }


def values_schema() -> Schema:
    """The whole schema; `config` is the service's own, but a model needs its name: it names an application."""
    config = Config.json_schema()
    definitions = config.pop("$defs")
    model = definitions["ModelConfig"]
    model["required"] = sorted({*model.get("required", []), "name"})
    name = {key: value for key, value in model["properties"]["name"].items() if key != "default"}
    model["properties"]["name"] = {**name, "minLength": 1}
    config["required"] = ["models", "keys"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the Patchbay chart",
        "description": "Written by deploy/generate_chart.py; do not edit.",
        "type": "object",
        "additionalProperties": False,
        "required": ["config", "image", "head", "workers", "service"],
        "properties": {"config": config, **chart_values()},
        "$defs": definitions,
    }


def files() -> dict[Path, str]:
    """Every generated file's path and what it should hold."""
    head = "# Written by deploy/generate_chart.py from patchbay_server.serving.environment; do not edit.\n"
    environment = yaml.safe_dump(dict(RAY_ENVIRONMENT), sort_keys=True)
    return {
        CHART / "values.schema.json": json.dumps(values_schema(), indent=2) + "\n",
        CHART / "files" / "ray-environment.yaml": head + environment,
    }


def main(arguments: list[str]) -> int:
    stale = [path for path, text in files().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if arguments == ["--check"]:
        for path in stale:
            print(f"{path.relative_to(CHART.parent.parent)} is not current: run python deploy/generate_chart.py")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(files()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(CHART.parent.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
