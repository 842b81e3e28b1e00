"""The one background thread in which a synchronous client's asynchronous core runs.

Everything that talks to a server is written once, as coroutines; `Client` and its models run them here and wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from patchbay.errors import TraceError

T = TypeVar("T")
_JOIN_S = 5.0

#: How long a wait lasts at most before it is begun again: a Ctrl-C that comes just before the thread falls asleep is
#: only seen when it wakes.
_LISTEN_S = 0.5


class Portal:
    """An event loop in a daemon thread, started on first use; a forked child starts another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid: int | None = None

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one in which the loop ran; its connections are not usable here."""
        return self._pid is not None and self._pid != os.getpid()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` in the loop and waits; Ctrl-C cancels it."""
        future = self._submit(work)
        try:
            while True:
                try:
                    return future.result(_LISTEN_S)
                except concurrent.futures.TimeoutError:
                    if future.done():  # the work's own, or it ended just now
                        return future.result()
        except BaseException:
            future.cancel()
            raise

    def run_with_events(
        self,
        make: Callable[[Callable[[Any], None]], Coroutine[Any, Any, T]],
        on_event: Callable[[Any], Any],
    ) -> T:
        """Runs ``make(emit)``; what it emits is handed to `on_event` in the calling thread, as it comes.

        An exception in `on_event` cancels the work and is raised here.
        """
        events: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        future = self._submit(make(lambda event: events.put((True, event))))
        future.add_done_callback(lambda _: events.put((False, None)))
        try:
            while True:
                try:
                    more, event = events.get(timeout=_LISTEN_S)
                except queue.Empty:
                    continue
                if not more:
                    return future.result()
                on_event(event)
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """Runs `last` and ends the thread; in a fork, or when the thread never began, `last` is dropped."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None or self.forked or not thread.is_alive():
            if last is not None:
                last.close()
            return
        self._loop = None
        if last is not None:
            finished = asyncio.run_coroutine_threadsafe(last, loop)
            if threading.current_thread() is not thread:  # garbage collection may run anywhere
                with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
                    finished.result(_JOIN_S)
        loop.call_soon_threadsafe(loop.stop)
        if threading.current_thread() is not thread:
            thread.join(_JOIN_S)

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        try:
            loop = self._running_loop()
        except BaseException:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock if not self.forked else threading.Lock():  # the parent may have forked while it held the lock
            if self._loop is not None and not self.forked:
                if threading.current_thread() is self._thread:
                    raise TraceError(
                        "the synchronous client cannot be used in its own event loop; use pb.connect_async"
                    )
                return self._loop
            if self.forked:
                self._lock = threading.Lock()
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(loop,), name="patchbay-client", daemon=True)
            thread.start()
            self._loop, self._thread, self._pid = loop, thread, os.getpid()
            return loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
