"""Admission and dispatch: which requests may enter, which runs next, and what the waiting ones are told.

A request is a `Ticket`. `Scheduler.enter` admits it or refuses with ResourceExhaustedError, `Scheduler.expect` does so
again once the size of its results is known; `Scheduler.submit` starts it at once when a slot of the engine is free, or
queues it; `Scheduler.release` gives the slot back and starts the next.
Every method may be called from any thread; the callbacks of a ticket run in the caller's thread, outside the lock, and
must not block.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from patchbay.errors import ResourceExhaustedError
from patchbay_server.scheduling.fair_queue import FairQueue, RoundRobinQueue

#: Weight of the newest run in the running mean of run times.
_RUN_TIME_WEIGHT = 0.2
_MIN_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much may wait.

    Attributes:
        max_queue_length: requests that may wait.
        max_concurrent_per_account: requests of one account that are admitted and not yet finished.
        slots: requests that the engine holds open at a time. An account that holds none need not wait for one: up to
            as many again may be open for such accounts.
        max_unread_bytes_per_account: results of one account's admitted requests that its clients have not read yet; one
            request alone may have more.
    """

    max_queue_length: int = 256
    max_concurrent_per_account: int = 32
    slots: int = 1
    max_unread_bytes_per_account: int = 1 << 32


@dataclass(eq=False, slots=True)
class Ticket:
    """One admitted request.

    Attributes:
        account: whose it is.
        on_start: called once, when a slot is given to it.
        on_position: called with the number of requests that run or wait before it, whenever that number changes.
        cost: what it is expected to take, in any one unit (FLOPs, say).
        position: the number last told, or None before it waited.
        holds_slot: whether it occupies a slot of the engine.
        unread: bytes of its results that its client has not read yet, those to come included.
    """

    account: str
    on_start: Callable[[], None] = lambda: None
    on_position: Callable[[int], None] = lambda position: None
    cost: float = 1.0
    position: int | None = None
    holds_slot: bool = False
    unread: int = 0
    _open: bool = field(default=False)
    _entering: bool = field(default=False)
    _charged: bool = field(default=False)


class Scheduler:
    """Admits requests and hands out the engine's slots, fairly between accounts."""

    def __init__(self, limits: AdmissionLimits, queue: FairQueue[Ticket] | None = None) -> None:
        self._limits = limits
        self._queue: FairQueue[Ticket] = RoundRobinQueue[Ticket]() if queue is None else queue
        self._lock = threading.Lock()
        self._concurrent: dict[str, int] = {}
        self._held: Counter[str] = Counter()  # slots by account
        self._unread: Counter[str] = Counter()  # bytes of results by account
        self._running = 0
        self._entering = 0  # admitted, not yet submitted: they will need a place in the queue
        self._mean_run_s = 0.0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many requests hold a slot."""
        return self._running

    def admitted(self, account: str) -> int:
        """How many requests of the account are admitted and not yet left."""
        return self._concurrent.get(account, 0)

    def unread(self, account: str) -> int:
        """Bytes of the account's results that nobody has read yet, those to come included."""
        return self._unread[account]

    def enter(self, ticket: Ticket) -> None:
        """Count the request in.

        Raises:
            ResourceExhaustedError: the queue is full, or the account has too many requests already; says when to retry.
        """
        with self._lock:
            limits, account = self._limits, ticket.account
            count = self._concurrent.get(account, 0)
            retry_s = self._retry_s()
            if count >= limits.max_concurrent_per_account:
                raise ResourceExhaustedError(
                    f"this account has {count} requests waiting or running; the limit is "
                    f"{limits.max_concurrent_per_account}. Wait for one to end, or ask the operator for a higher "
                    "limits.max_concurrent_per_account",
                    reason="TOO_MANY_CONCURRENT_REQUESTS",
                    metadata={
                        "limit": "max_concurrent_per_account",
                        "allowed": str(limits.max_concurrent_per_account),
                    },
                    retry_after_s=retry_s,
                )
            ahead = self._running + self._entering + len(self._queue)
            if ahead >= limits.slots + limits.max_queue_length:
                raise ResourceExhaustedError(
                    f"the queue of this model is full ({len(self._queue)} requests wait); try again in {retry_s:.2g} s",
                    reason="QUEUE_FULL",
                    metadata={"limit": "max_queue_length", "allowed": str(limits.max_queue_length)},
                    retry_after_s=retry_s,
                )
            self._concurrent[account] = count + 1
            self._entering += 1
            ticket._open = ticket._entering = True

    def expect(self, ticket: Ticket, nbytes: int) -> None:
        """Make room for the results of an entered request. What a client does not read stays in memory here.

        Raises:
            ResourceExhaustedError: the account has too much that waits to be read; says when to retry.
        """
        with self._lock:
            unread, most = self._unread[ticket.account], self._limits.max_unread_bytes_per_account
            if unread and unread + nbytes > most:
                raise ResourceExhaustedError(
                    f"results of this account's other requests, {unread:,} bytes, have not been read yet; with the "
                    f"{nbytes:,} of this one they would be more than {most:,} (limits.max_unread_bytes_per_account). "
                    "Read them, or end those requests",
                    reason="RESULTS_NOT_READ",
                    metadata={"limit": "max_unread_bytes_per_account", "allowed": str(most)},
                    retry_after_s=self._retry_s(),
                )
            self._add_unread(ticket, nbytes)

    def read(self, ticket: Ticket, nbytes: int) -> None:
        """The client of a request has read so many bytes of its results."""
        with self._lock:
            self._add_unread(ticket, -min(nbytes, ticket.unread))

    def submit(self, ticket: Ticket) -> None:
        """Start an entered request, or put it in the queue and tell it its position."""
        with self._lock:
            self._entered(ticket)
            start = self._has_room(ticket.account)
            moved: list[Ticket] = []
            if start:
                if len(self._queue):  # with nobody waiting nobody is owed anything
                    self._charge(ticket)
                self._hold(ticket)
            else:
                self._queue.push(ticket.account, ticket, ticket.cost)
                moved = self._moved()
        if start:
            ticket.on_start()
        for other in moved:
            _tell(other)

    def release(self, ticket: Ticket, run_s: float = 0.0, cost: float | None = None) -> None:
        """Take back the slot of a request, and start the next.

        Args:
            ticket: the request.
            run_s: seconds for which it kept the engine from serving others.
            cost: what it took, in the unit of its own expectation; None: as expected.
        """
        with self._lock:
            if not ticket.holds_slot:
                return
            ticket.holds_slot = False
            self._running -= 1
            self._held[ticket.account] -= 1
            if not self._held[ticket.account]:
                del self._held[ticket.account]
            weight = _RUN_TIME_WEIGHT if self._mean_run_s else 1.0
            self._mean_run_s += weight * (run_s - self._mean_run_s)
            if cost is not None and ticket._charged:
                self._queue.charge(ticket.account, cost - ticket.cost)
            following = self._next()
            if following is not None:
                self._hold(following)
            moved = self._moved()
        if following is not None:
            following.on_start()
        for other in moved:
            _tell(other)

    def leave(self, ticket: Ticket) -> None:
        """Count the request out (its client has everything, or is gone); a waiting one leaves the queue. Idempotent."""
        with self._lock:
            if not ticket._open:
                return
            ticket._open = False
            self._entered(ticket)
            self._add_unread(ticket, -ticket.unread)
            left = self._concurrent[ticket.account] - 1
            if left:
                self._concurrent[ticket.account] = left
            else:
                del self._concurrent[ticket.account]
            moved = self._moved() if self._queue.remove(ticket.account, ticket) else []
        for other in moved:
            _tell(other)

    def _retry_s(self) -> float:
        return max(_MIN_RETRY_S, self._mean_run_s * (len(self._queue) + 1) / self._limits.slots)

    def _add_unread(self, ticket: Ticket, nbytes: int) -> None:
        ticket.unread += nbytes
        self._unread[ticket.account] += nbytes
        if not self._unread[ticket.account]:
            del self._unread[ticket.account]

    def _has_room(self, account: str) -> bool:
        """Whether a request of the account may start now: slots are free, or it has none and the spare ones are."""
        slots = self._limits.slots
        return self._running < slots or (slots > 1 and self._running < 2 * slots and not self._held[account])

    def _hold(self, ticket: Ticket) -> None:
        self._running += 1
        self._held[ticket.account] += 1
        ticket.holds_slot = True

    def _next(self) -> Ticket | None:
        """The waiting request that may start now, taken out of the queue."""
        if self._running < self._limits.slots:
            found = self._queue.pop()
            if found is not None:
                found._charged = True
            return found
        found = next((ticket for ticket in self._queue.order() if self._has_room(ticket.account)), None)
        if found is not None:
            self._queue.remove(found.account, found)
            self._charge(found)
        return found

    def _charge(self, ticket: Ticket) -> None:
        self._queue.charge(ticket.account, ticket.cost)
        ticket._charged = True

    def _entered(self, ticket: Ticket) -> None:
        if ticket._entering:
            ticket._entering = False
            self._entering -= 1

    def _moved(self) -> list[Ticket]:
        """Waiting tickets whose position is not the one last told; their new position is noted."""
        changed = []
        for position, ticket in enumerate(self._queue.order(), start=self._running):
            if ticket.position != position:
                ticket.position = position
                changed.append(ticket)
        return changed


def _tell(ticket: Ticket) -> None:
    if ticket.position is not None:
        ticket.on_position(ticket.position)
