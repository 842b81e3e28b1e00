"""Calls that wait: for a server that is away, and for code that belongs in the caller's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from patchbay.errors import (
    AbortedError,
    InternalServerError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)

T = TypeVar("T")
#: Calls a function where the user's code belongs: in the caller's thread for a blocking model.
Host: TypeAlias = "Callable[..., Awaitable[Any]]"
_FIRST_DELAY_S, _MAX_DELAY_S = 0.25, 15.0


class Patience:
    """Makes calls again, at growing distances, while the server is away or full.

    Args:
        seconds: how long one call may fail in a row.
        show: called when something has changed.

    Attributes:
        retries: how often a call was made again.
        waiting: why nothing moves right now; None when all is well.
    """

    def __init__(self, seconds: float, show: Callable[[], None]) -> None:
        self._seconds = seconds
        self._show = show
        self.retries = 0
        self.waiting: str | None = None

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """What ``await make()`` gives, sooner or later.

        Raises:
            ServiceError: it will not succeed, or has not in time.
        """
        delay_s = _FIRST_DELAY_S
        give_up: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            try:
                answer = await make()
            except ServiceError as error:
                now = loop.time()
                give_up = now + self._seconds if give_up is None else give_up
                if not passes(error) or now >= give_up:
                    raise
                self.retries += 1
                self.waiting = f"waiting for the server ({error.code.lower()})"
                self._show()
                wait_s = delay_s if error.retry_after_s is None else max(error.retry_after_s, 0.05)
                await asyncio.sleep(min(wait_s, max(give_up - now, 0.01)))
                delay_s = min(2 * delay_s, _MAX_DELAY_S)
                continue
            self.waiting = None
            return answer


def passes(error: ServiceError) -> bool:
    """Whether the same request may succeed in a while: a graph changes nothing, so it may be sent again."""
    if isinstance(error, InternalServerError):
        return not error.reason  # a lost replica; an error of the service's own has a reason
    if isinstance(error, ResourceExhaustedError):
        return error.retry_after_s is not None
    return isinstance(error, (UnavailableError, AbortedError))


async def to_its_end(function: Callable[..., T], *args: Any) -> T:
    """Calls a function in a thread and waits until it has ended, also when this is cancelled meanwhile: what writes a
    file must not go on behind the back of whoever calls next.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # cancelled a second time, too
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        raise


def blocking_host(emit: Callable[[Callable[[], None]], None]) -> Host:
    """Calls functions in the thread that handles what is emitted, and waits for them."""

    async def call(function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def work() -> None:
            try:
                result = function(*args)
            except Exception as error:  # noqa: BLE001 - raised again where the result is awaited
                loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                loop.call_soon_threadsafe(_settle, future, result, None)

        emit(work)
        return await future

    return call


async def direct_host(function: Callable[..., Any], *args: Any) -> Any:
    """Calls functions at once, in the event loop."""
    return function(*args)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(RuntimeError(str(error)) if isinstance(error, StopIteration) else error)
