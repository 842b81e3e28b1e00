"""`patchbay serve` on Ray, seen from outside: starts the node's process, passes its progress on, cleans up after it.

This process stays small and imports no Ray. It adopts whatever the node leaves behind, so that a node that crashes or
is killed takes every process of its own with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from patchbay_server.config import Config, ConfigError
from patchbay_server.serving import environment, processes

#: Time for a node to stop in order, beyond what running requests are given.
STOP_S = 30.0
#: The node's program; it imports Ray, so that this process need not.
NODE = (sys.executable, "-m", "patchbay_server.serving.node")
#: How often a node is started that gives up before its models are loaded, because the machine is too busy for Ray.
START_ATTEMPTS = 3


@dataclass
class Launch:
    """How a launch went.

    Attributes:
        ready: whether the service ever served.
        failure: why it did not, or stopped by itself; None after an orderly stop.
        log: the node's log; None when it was removed, after an orderly stop or because nothing was logged.
        killed: processes that had to be ended by force.
        again: whether what failed may well succeed at a second try.
    """

    ready: bool = False
    failure: str | None = None
    log: Path | None = None
    killed: int = 0
    again: bool = False


def run(config: Config, *, progress: Callable[[str], None], ready: Callable[[Path], None]) -> Launch:
    """Start the service, serve until SIGINT, SIGTERM or SIGHUP, and stop it. Blocks; belongs in the main thread.

    Args:
        config: the configuration.
        progress: called with what is being done while the service starts.
        ready: called once, when the service answers, with the folder that holds its logs.
    """
    processes.adopt_orphans()
    for _ in range(START_ATTEMPTS - 1):
        launch = _launch(config, progress, ready)
        if not launch.again:
            return launch
        progress("starting Ray again: this machine was too busy for it")
    return _launch(config, progress, ready)


def _launch(config: Config, progress: Callable[[str], None], ready: Callable[[Path], None]) -> Launch:
    launch = Launch()
    folder = _make_folder(config)
    launch.log = folder / "node.log"
    with open(launch.log, "wb") as log:
        node = subprocess.Popen(
            NODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            # A Ray of the user's own is none of our business.
            env=environment.without(os.environ, ("RAY_ADDRESS", "RAY_JOB_", "RAY_NAMESPACE")),
        )
    try:
        with _signals(node):
            _follow(node, config, folder, launch, progress, ready)
    finally:
        if node.poll() is None:
            node.kill()
        node.wait()
        launch.killed = processes.end_descendants()
        if launch.failure is None or launch.again or not launch.log.stat().st_size:
            shutil.rmtree(folder, ignore_errors=True)
            launch.log = None
    return launch


def _follow(
    node: subprocess.Popen[bytes],
    config: Config,
    folder: Path,
    launch: Launch,
    progress: Callable[[str], None],
    ready: Callable[[Path], None],
) -> None:
    assert node.stdin is not None
    assert node.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        node.stdin.write(json.dumps({"config": config.dump(), "folder": str(folder)}).encode() + b"\n")
        node.stdin.flush()
    for line in node.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if "progress" in message:
            progress(message["progress"])
        elif "ready" in message:
            launch.ready = True
            ready(folder)
        elif "failed" in message:
            launch.failure = message["failed"]
        elif "too slow" in message:
            launch.failure, launch.again = message["too slow"], True
    # The pipe is closed: the node has stopped, or its last steps are under way.
    try:
        status = node.wait(STOP_S + config.ray.drain_s)
    except subprocess.TimeoutExpired:
        launch.failure = "the service did not stop in time and was ended by force"
        return
    if status != 0 and launch.failure is None:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        launch.failure = f"the service ended unexpectedly ({how})"


@contextlib.contextmanager
def _signals(node: subprocess.Popen[bytes]) -> Iterator[None]:
    """The first signal asks the node to stop by closing its input, the second ends it."""
    assert node.stdin is not None
    stdin = node.stdin

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stdin.closed:
            node.kill()
        else:
            stdin.close()

    names = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):
        names.append(signal.SIGHUP)
    before = {name: signal.signal(name, on_signal) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _make_folder(config: Config) -> Path:
    """A new folder for the node, short enough for the Unix sockets in it (macOS's own temporary folders are not).

    Raises:
        ConfigError: the configured folder is too long, or cannot be written to.
    """
    parent = config.ray.temp_dir
    try:
        if parent is None:
            return Path(tempfile.mkdtemp(prefix="patchbay-", dir="/tmp" if os.path.isdir("/tmp") else None))
        parent = parent.absolute()
        room = environment.MAX_FOLDER_LENGTH - len("/12345678")
        if len(str(parent)) > room:
            raise ConfigError(f"ray.temp_dir: {parent} is too long for Unix sockets; at most {room} characters fit")
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(prefix="", dir=parent))
    except OSError as error:
        raise ConfigError(f"ray.temp_dir: cannot make a folder in {parent or '/tmp'}: {error.strerror}") from None
