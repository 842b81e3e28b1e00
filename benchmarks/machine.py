"""Facts of the machine and of the environments: without them no figure means anything."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = "patchbay torch transformers tokenizers numpy grpcio protobuf ray nnsight transformer-lens".split()
_ASK = (
    "import importlib.metadata as m, json, platform, sys\n"
    "found = {'python': platform.python_version()}\n"
    "for name in sys.argv[1:]:\n"
    "    try: found[name] = m.version(name)\n"
    "    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(found))"
)


def machine() -> dict[str, Any]:
    """The processor, its cores, the memory, the system, and how busy the machine is now."""
    from patchbay_server.serving.threads import usable_cores

    load = os.getloadavg()
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": usable_cores(),
        "memory_gib": round(_kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_before": [round(v, 2) for v in load],
        "gpu": _gpu(),
    }


def versions(environments: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The packages that matter, in each environment."""
    found = {}
    for place, python in environments.items():
        said = subprocess.run([python, "-c", _ASK, *_PACKAGES], capture_output=True, text=True, check=True)
        found[place] = json.loads(said.stdout)
    return found


def switches(python: str) -> tuple[str, ...]:
    """The engine's off switches; asked for in another process, since the engine imports torch."""
    ask = "from patchbay_server.engine.plan import OPTIMISATIONS; print(*OPTIMISATIONS)"
    said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    return tuple(said.stdout.split())


def _line(path: str, key: str) -> str:
    try:
        rows = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((row.partition(":")[2].strip() for row in rows if row.startswith(key)), "")


def _kib(path: str, key: str) -> int:
    words = _line(path, key).split()
    return int(words[0]) if words else 0


def _gpu() -> str:
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return said.stdout.strip().partition("\n")[0] if said.returncode == 0 else ""
