"""One map at a time for a state file or a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from patchbay.errors import TraceError

try:
    import fcntl

    _LOCKS = True
except ImportError:  # Windows: files have no such locks there, and nothing is held
    _LOCKS = False


@contextmanager
def held(*paths: Path) -> Iterator[None]:
    """Holds each of the paths, which need not exist.

    Raises:
        TraceError: another map holds one.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            stack.enter_context(_held(path))
        yield


@contextmanager
def _held(path: Path) -> Iterator[None]:
    if not _LOCKS:
        yield
        return
    file = path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(file)
    if handle is None:
        raise TraceError(f"another map is writing {path} right now: wait for it, or name another place")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held, so that it is nobody else's
        os.close(handle)


def _locked(file: Path) -> int | None:
    """The lock; None where somebody else has it."""
    while True:
        handle = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file before we had it: then what we hold is a lock to nothing.
            if os.fstat(handle).st_ino == os.stat(file).st_ino:
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a file system without locks
            return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
