"""Starts the real service, waits until it answers, runs the client half, and stops everything that it started.

The service is the one that ``patchbay serve`` starts, by the same command; only its port (a free one) and its folder
for keys are this demo's own, so that neither a running service nor the user's keys are touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from patchbay.errors import PatchbayError, ServiceError
from patchbay_server.config import ModelConfig
from patchbay_server.demo.processes import Processes, Stopped

#: The client half, in the source tree.
CLIENT = Path(__file__).resolve().parents[3] / "examples" / "demo.py"
_POLL_S = 0.25
_STAGE = re.compile(r"^\[ *[\d.]+ s\] (.+)$", re.MULTILINE)
_LOG_LINES = 30


class DemoError(PatchbayError):
    """The service could not be started; the message holds the end of its log."""


@dataclass(frozen=True)
class Demo:
    """What to run.

    Attributes:
        source: the model: `demo`, a Hugging Face id or a folder.
        plain: plain grpc.aio instead of Ray Serve.
        report: where the client writes its report.
        client: the client half.
        timeout_s: how long the service may take to start.
        log: where the service's log is kept; None: thrown away with the demo's folder.
    """

    source: str
    plain: bool
    report: Path
    client: Path
    timeout_s: float
    log: Path | None = None


class ProgressLine:
    """One line that says what is awaited: rewritten in place on a terminal, written once elsewhere."""

    _FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty() and os.environ.get("TERM") != "dumb"
        self._frames = self._FRAMES if (out.encoding or "").lower().startswith("utf") else "|/-\\"
        self._said = ""

    def update(self, text: str, elapsed_s: float) -> None:
        """Say what is awaited, and since when."""
        if self._live:
            width = shutil.get_terminal_size().columns
            frame = self._frames[int(elapsed_s * 8) % len(self._frames)]
            self._write("\r\x1b[2K" + f"{frame} {text} ({elapsed_s:.0f} s)"[: width - 1])
        elif text != self._said:
            self._write(f"{text} ...\n")
        self._said = text

    def finish(self, text: str) -> None:
        """Replace the line by what came of it."""
        self._write(("\r\x1b[2K" if self._live else "") + text + "\n")
        self._said = ""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the reader is gone (a closed terminal, `| head`): stopping matters more
            self._out.write(text)
            self._out.flush()


def run_demo(demo: Demo, out: TextIO | None = None) -> int:
    """Run the demo.

    Returns:
        The exit status: the client's own (0 when every finding held), 1 when the service did not start, 128 + n after
        signal n.
    """
    out = sys.stdout if out is None else out
    progress = ProgressLine(out)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="pbdemo-"))
    processes = Processes(waiting=lambda s: progress.update("stopping what was started", s))
    try:
        with processes:
            status = _run(demo, processes, folder, progress)
        progress.finish(f"Everything is stopped. The demo took {time.monotonic() - started:.0f} s.")
        return status
    except Stopped as stopped:
        progress.finish(f"Stopped by {signal.Signals(stopped.number).name}; nothing is left running.")
        return 128 + stopped.number
    except DemoError as error:
        progress.finish(f"The demo cannot run: {error}")
        return 1
    finally:
        processes.stop_all()  # once more: the signal may have come just as the block above was left
        shutil.rmtree(folder, ignore_errors=True)


def _run(demo: Demo, processes: Processes, folder: Path, progress: ProgressLine) -> int:
    port = free_port()
    address = f"localhost:{port}"
    env = clean_environment(folder)
    log = folder / "service.log" if demo.log is None else demo.log
    name = ModelConfig(source=demo.source).name
    what = "plain grpc.aio" if demo.plain else "Ray Serve, HAProxy"
    with log.open("wb") as output:
        service = processes.start(
            serve_command(demo.source, port, plain=demo.plain), env=env, cwd=folder, output=output, follow=True
        )
    waited = _wait_until_ready(service, name, address, folder, demo.timeout_s, log, progress, what)
    progress.finish(f"The service ({what}) answers at {address} after {waited:.1f} s.")
    key = read_key(folder, port)
    client = processes.start(
        [sys.executable, str(demo.client), "--model", name, "--report", str(demo.report)],
        env={**env, "PATCHBAY_URL": address, **({"PATCHBAY_API_KEY": key} if key else {})},
        cwd=demo.report.parent,
    )
    while client.poll() is None:
        if service.poll() is not None:
            raise DemoError(f"the service ended while the demo ran (status {service.returncode}).\n{tail(log)}")
        time.sleep(_POLL_S / 5)
    return client.returncode if client.returncode >= 0 else 128 - client.returncode


def serve_command(source: str, port: int, *, plain: bool) -> list[str]:
    """The command line of the service."""
    command = [sys.executable, "-m", "patchbay_server.cli", "serve", "--model", source, "--port", str(port)]
    return [*command, "--plain", "--host", "127.0.0.1"] if plain else command


def clean_environment(folder: Path) -> dict[str, str]:
    """The environment of what is started: this one, with keys kept in `folder` and no setting of another service."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PATCHBAY_")}
    return {
        **env,
        "XDG_CONFIG_HOME": str(folder),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def read_key(folder: Path, port: int) -> str | None:
    """The key that the service left for this machine's clients."""
    try:
        return (folder / "patchbay" / "keys" / str(port)).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def tail(log: Path) -> str:
    """The last lines of the service's log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(["The end of its log:", *(f"  {row}" for row in lines[-_LOG_LINES:])])


def stage(log: Path) -> str:
    """What the service says that it is doing: the last of its ``[ 2.7 s] starting Ray`` lines."""
    try:
        said = _STAGE.findall(log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        said = []
    return said[-1] if said else "importing"


def _wait_until_ready(
    service: subprocess.Popen[bytes],
    name: str,
    address: str,
    folder: Path,
    timeout_s: float,
    log: Path,
    progress: ProgressLine,
    what: str,
) -> float:
    """Ask for the model list until the model is in it and ready; returns the seconds that took."""
    # The client half is started after gRPC runs here; no Python code runs in the child between fork and exec then.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    import patchbay

    start = time.monotonic()
    port = int(address.rpartition(":")[2])
    seen = "it did not answer"
    while (elapsed := time.monotonic() - start) < timeout_s:
        if service.poll() is not None:
            raise DemoError(f"the service ended with status {service.returncode}.\n{tail(log)}")
        progress.update(f"starting the service ({what}): {stage(log)}", elapsed)
        if _listens(port):
            try:
                with patchbay.connect(address, api_key=read_key(folder, port), timeout_s=5.0) as client:
                    if any(m.name == name and m.ready for m in client.models()):
                        return time.monotonic() - start
                    seen = "the model was not ready"
            except ServiceError as error:
                seen = error.message
        time.sleep(_POLL_S)
    raise DemoError(f"the service was not ready after {timeout_s:g} s: {seen}.\n{tail(log)}")


def _listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex(("127.0.0.1", port)) == 0


__all__ = ["CLIENT", "Demo", "DemoError", "ProgressLine", "run_demo"]
