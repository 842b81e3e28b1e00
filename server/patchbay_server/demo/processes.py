"""Child processes that cannot outlive this program: Ctrl-C, an error or a signal at any moment leaves none behind.

A service is a tree of processes, and daemons in it (Ray's, HAProxy) may outlive their parents. On Linux this program
makes itself the *subreaper*: whatever loses its parent below it becomes its child instead of init's, so that the tree
can always be found again from here. Elsewhere the process groups of the children are searched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

_LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
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

    def __init__(self, *, grace_s: float = 30.0, waiting: Callable[[float], None] | None = None) -> None:
        self._grace_s = grace_s
        self._waiting = waiting or (lambda _: None)
        self._started: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, Any] = {}
        self._stopping = False
        self._hurry = False
        self._asked: int | None = None

    def __enter__(self) -> Processes:
        if _LINUX:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
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
                _send(process.pid, signal.SIGTERM)
                self._await(lambda p=process: p.poll() is not None, self._grace_s, start)
        for number, patience_s in ((signal.SIGTERM, _LEFTOVERS_S), (signal.SIGKILL, 2 * _LEFTOVERS_S)):
            if not self._alive():
                break
            for pid in self._alive():
                _send(pid, number)
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
        for process in self._started:
            process.poll()
        mine = {p.pid for p in self._started if p.returncode is None}
        if _LINUX:
            known = {p.pid for p in self._started}
            for pid, parent, state in _table():
                if parent == os.getpid() and state == "Z" and pid not in known:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
        groups = {p.pid for p in self._started}
        return sorted(mine | set(_descendants(os.getpid(), groups)))


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _end_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _table() -> Iterator[tuple[int, int, str]]:
    """(id, parent's id, state) of every process of the machine."""
    if _LINUX:
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    text = Path("/proc", entry, "stat").read_text(encoding="ascii", errors="replace")
                    state, parent = text.rpartition(")")[2].split()[:2]
                    yield int(entry), int(parent), state
        return
    with subprocess.Popen(["ps", "-axo", "pid=,ppid=,stat="], stdout=subprocess.PIPE, text=True) as ps:
        shown = ps.communicate()[0]
    for row in shown.splitlines():
        pid, parent, state = row.split(None, 2)
        if int(pid) != ps.pid:
            yield int(pid), int(parent), state[:1]


def _descendants(root: int, groups: set[int]) -> Iterator[int]:
    """Living processes below `root`, and elsewhere than on Linux those in the process `groups` of what was started."""
    children: dict[int, list[int]] = {}
    living: set[int] = set()
    for pid, parent, state in _table():
        children.setdefault(parent, []).append(pid)
        if state != "Z":
            living.add(pid)
    below = list(children.get(root, ()))
    for pid in below:
        below += children.get(pid, ())
    found = set(below) & living
    if not _LINUX:
        for pid in living - {root}:
            with contextlib.suppress(OSError):
                if os.getpgid(pid) in groups:
                    found.add(pid)
    yield from found
