"""The process in which Ray runs: `patchbay serve` starts it, tells it the configuration, and hears how it goes.

``python -m patchbay_server.serving.node`` reads one JSON object from stdin and writes JSON lines to stdout:
``progress`` while it starts, ``ready``, or ``failed`` with a sentence for people. It stops when stdin is closed, so it
ends with its launcher however that ends (a signal would not do: Ray takes SIGTERM for itself). Everything that Ray
prints goes to stderr, which is the log file.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from patchbay.errors import PatchbayError
from patchbay_server.config import Config
from patchbay_server.serving import environment, processes

log = logging.getLogger("patchbay.serving")


def main() -> int:
    """Run the node until it is told to stop; returns the exit status."""
    request = json.loads(sys.stdin.readline())
    processes.adopt_orphans()
    # Ray prints to stdout at will: that goes to the log, and the pipe keeps a descriptor of its own.
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as pipe:
        os.dup2(2, 1)
        status = _Node(request, pipe).run()
    processes.end_descendants()
    return status


class _Node:
    """One service on one Ray node."""

    def __init__(self, request: dict[str, Any], pipe: TextIO) -> None:
        self._request = request
        self._pipe = pipe
        self._stop = threading.Event()
        self._starting = True

    def run(self) -> int:
        """Start, serve until told to stop, stop; returns the exit status."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=self._await_end_of_input, name="patchbay-stdin", daemon=True).start()
        try:
            return self._serve()
        except KeyboardInterrupt:  # told to stop while starting
            return 0
        except PatchbayError as error:
            self._say("failed", str(error))
        except Exception as error:
            log.exception("the node failed")
            self._say("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        return 1

    def _serve(self) -> int:
        config = Config.parse(self._request["config"])
        folder = Path(self._request["folder"])
        ports = environment.find_ports(config)
        haproxy = environment.haproxy_binary() if config.ray.haproxy else None
        if haproxy is None:
            why = "there is no HAProxy here" if config.ray.haproxy else "ray.haproxy is false"
            self._say("progress", f"using Ray Serve's own proxy, since {why}")
        environment.prepare_folder(folder, ports, haproxy)
        os.environ.update(environment.node_environment(ports, folder, haproxy, drain_s=config.ray.drain_s))
        self._say("progress", "importing Ray")
        from patchbay_server.serving import ray as serving

        drain_s = 0.0
        try:
            serving.start(config, ports, folder, lambda text: self._say("progress", text))
            self._starting, drain_s = False, config.ray.drain_s
            self._say("ready")
            self._stop.wait()
        except serving.SlowStartError as error:
            self._say("too slow", str(error))
            return 1
        except serving.StartError as error:
            self._say("failed", str(error))
            return 1
        finally:
            self._starting = False
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            serving.stop(drain_s)
        return 0

    def _await_end_of_input(self) -> None:
        while os.read(0, 4096):
            pass
        self._stop.set()
        if self._starting:
            _thread.interrupt_main()

    def _say(self, kind: str, text: str = "") -> None:
        try:
            self._pipe.write(json.dumps({kind: text}) + "\n")
        except OSError:  # the launcher is gone, and the end of input on its way
            log.warning("nobody hears: %s %s", kind, text)


if __name__ == "__main__":
    sys.exit(main())
