"""Child processes that cannot outlive this program: Ctrl-C, an error or a signal at any moment leaves none behind.

A service is a tree of processes, and daemons in it (Ray's, HAProxy) may outlive their parents. On Linux this program
makes itself the *subreaper*: whatever loses its parent below it becomes its child instead of init's, so that the tree
can always be found again from here. Elsewhere the process groups of the children are searched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from patchbay_server.serving import processes

_LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Time for what is left after the polite end, before it is killed.
_LEFTOVERS_S = 3.0


class Stopped(BaseException):
    """A signal asked this program to end; raised in the main thread, wherever it is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Processes:
    """The processes that this program started, with all that they started; leaving the `with` block ends every one.

    Args:
        grace_s: seconds that a process gets to end by itself after SIGTERM.
        waiting: called again and again while the end is awaited, with the seconds so far.
    """

    def __init__(self, *, grace_s: float = 45.0, waiting: Callable[[float], None] | None = None) -> None:
        self._grace_s = grace_s
        self._waiting = waiting or (lambda _: None)
        self._started: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, Any] = {}
        self._stopping = False
        self._hurry = False
        self._asked: int | None = None

    def __enter__(self) -> Processes:
        processes.adopt_orphans()
        for number in _ENDING:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping = True  # from here on a signal only shortens the wait
        try:
            self.stop_all()
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        if self._asked is not None and error is None:
            raise Stopped(self._asked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._stopping:
            self._hurry = True
            self._asked = self._asked or number
        else:
            self._stopping = True
            raise Stopped(number)

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        output: IO[bytes] | None = None,
        follow: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that a terminal's Ctrl-C reaches this program alone.

        Args:
            argv: program and arguments.
            env: its environment.
            cwd: its working directory.
            output: file for its output and errors; this program's own when left out.
            follow: end it (SIGTERM) even if this program is killed outright. Linux only; only before any thread runs.
        """
        process = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
            preexec_fn=_end_with_parent if follow and _LINUX else None,
        )
        self._started.append(process)
        return process

    def stop_all(self) -> None:
        """End all that was started: politely and in reverse order, then whatever is left of the tree by force."""
        start = time.monotonic()
        for process in reversed(self._started):
            if process.poll() is None:
                process.terminate()
                self._await(functools.partial(_has_ended, process), self._grace_s, start)
        for number, patience_s in ((signal.SIGTERM, _LEFTOVERS_S), (signal.SIGKILL, 2 * _LEFTOVERS_S)):
            if not self._alive():
                break
            processes.end_all(self._alive(), number)
            self._send_to_groups(number)
            self._await(lambda: not self._alive(), patience_s, start)

    def _await(self, done: Callable[[], bool], patience_s: float, start: float) -> None:
        deadline = time.monotonic() + patience_s
        while not done() and time.monotonic() < deadline and not self._hurry:
            self._waiting(time.monotonic() - start)
            time.sleep(0.05)
        if self._hurry and patience_s <= 2 * _LEFTOVERS_S:
            while not done() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _alive(self) -> list[int]:
        """Ids of all processes of the tree that still run; those that ended are reaped on the way."""
        own = {p.pid for p in self._started}
        running = {p.pid for p in self._started if p.poll() is None}
        for pid in processes.descendants(os.getpid()):
            if pid in own:
                continue
            with contextlib.suppress(ChildProcessError):  # a child of a child: not ours to wait for
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    continue
            running.add(pid)
        return sorted(running)

    def _send_to_groups(self, number: int) -> None:
        """Where descendants cannot be listed: a signal to the process group of everything that was started."""
        if not _LINUX:
            for process in self._started:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
