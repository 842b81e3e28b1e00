"""The order in which waiting requests run: accounts take turns, and one account's own requests keep their order.

Two queues have this interface: taking turns, one request each (here), and the account that has had least first
(`patchbay_server.scheduling.virtual_tokens`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class FairQueue(Protocol[T]):
    """Waiting items of several accounts. Not thread-safe: its owner holds a lock."""

    def push(self, account: str, item: T, cost: float = 1.0) -> None:
        """Add an item at the end of its account's own line; `cost` is what it is expected to take."""

    def pop(self) -> T | None:
        """Remove and return the item whose turn it is; None when nothing waits."""

    def remove(self, account: str, item: T) -> bool:
        """Take an item out of the line; False when it was not waiting."""

    def order(self) -> Iterator[T]:
        """The items in the order in which `pop` would return them, were nothing added."""

    def charge(self, account: str, cost: float) -> None:
        """Learn by how much a finished request of the account cost more than was expected; less, where negative."""

    def __len__(self) -> int:
        """How many items wait."""


class RoundRobinQueue(Generic[T]):
    """Accounts take turns, one request each; an account that was just served goes to the back."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}  # insertion order is the order of turns
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, account: str, item: T, cost: float = 1.0) -> None:
        """Add an item at the end of its account's own line; a new account joins at the back of the turns."""
        del cost
        self._lines.setdefault(account, deque()).append(item)
        self._size += 1

    def pop(self) -> T | None:
        """Remove and return the first item of the account whose turn it is; None when nothing waits."""
        for account, line in self._lines.items():
            item = line.popleft()
            del self._lines[account]
            if line:
                self._lines[account] = line
            self._size -= 1
            return item
        return None

    def remove(self, account: str, item: T) -> bool:
        """Take an item out of its account's line; False when it was not waiting."""
        line = self._lines.get(account)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self._lines[account]
        self._size -= 1
        return True

    def order(self) -> Iterator[T]:
        """The items, turn by turn."""
        lines = [deque(line) for line in self._lines.values()]
        while lines:
            for line in lines:
                yield line.popleft()
            lines = [line for line in lines if line]

    def charge(self, account: str, cost: float) -> None:
        """Turns are free of charge here."""
