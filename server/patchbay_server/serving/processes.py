"""Leave no process behind: orphans come back to us, and whatever is left at the end is ended by its id.

Linux offers what this needs (a child subreaper, ``/proc``); elsewhere Ray's own cleaning up has to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0
    return False


def adopt_orphans() -> bool:
    """From now on descendants whose parent dies become this process's children; False where that cannot be had."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int) -> list[int]:
    """Ids of every process below `root`, parents before children; empty where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            # "pid (name) state ppid ...": the name may hold spaces and parentheses.
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def end_all(pids: Iterable[int], sig: int = signal.SIGKILL) -> None:
    """Send a signal to processes by id; those that are gone do not matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, sig)


def end_descendants(timeout_s: float = 10.0) -> int:
    """Kill and reap everything below this process; returns how many processes had to be killed.

    Call it in a process that adopted its orphans, when all its children should be gone.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while True:
        _reap()
        alive = descendants(os.getpid())
        if not alive or time.monotonic() > deadline:
            return len(killed)
        end_all(alive)
        killed.update(alive)
        time.sleep(0.02)


def _reap() -> None:
    """Collect every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
