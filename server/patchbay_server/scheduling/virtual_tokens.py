"""What each account has had of the engine, so that the one that has had least goes first (a virtual token counter).

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): every account has a counter of what was put
through for it; whoever's counter is lowest is served next; an account that comes back after a pause starts at the
lowest counter of those that are busy, so that nobody saves up credit by waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")

#: Idle accounts are forgotten, where that changes nothing, once there are so many.
_KEPT_ACCOUNTS = 4_096


class VirtualTokens:
    """Counters by account. Not thread-safe.

    Args:
        weights: shares of accounts that are not 1; an account of weight 2 gets twice as much.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._counters: dict[str, float] = {}
        self._active: dict[str, int] = {}
        self._floor = 0.0

    def of(self, account: str) -> float:
        """What the account has had, divided by its weight."""
        return self._counters.get(account, 0.0)

    def enter(self, account: str) -> None:
        """One more thing of the account waits; if nothing of it did, its counter rises to the lowest busy one."""
        count = self._active.get(account, 0)
        if not count:
            floor = min((self._counters[a] for a in self._active), default=self._floor)
            self._counters[account] = max(self.of(account), floor)
            if len(self._counters) > _KEPT_ACCOUNTS:
                self._forget(floor)
        self._active[account] = count + 1

    def leave(self, account: str) -> None:
        """One thing of the account no longer waits."""
        count = self._active[account] - 1
        if count:
            self._active[account] = count
        else:
            del self._active[account]
            if not self._active:  # whoever comes next starts where the last one left
                self._floor = max(self._floor, self.of(account))

    def charge(self, account: str, amount: float) -> None:
        """Something was put through for the account; a negative amount corrects what was charged before."""
        self._counters[account] = self.of(account) + self.share(account, amount)

    def weight(self, account: str) -> float:
        """The account's share, where 1 is everybody's."""
        return self._weights.get(account, 1.0)

    def share(self, account: str, amount: float) -> float:
        """By how much `amount` raises the account's counter."""
        return amount / self.weight(account)

    def _forget(self, floor: float) -> None:
        """Accounts that would start at the lowest busy counter anyway need no counter of their own."""
        kept = {a: c for a, c in self._counters.items() if a in self._active or c > floor}
        self._counters = kept


class VirtualTokenQueue(Generic[T]):
    """A `FairQueue` in which the account that has had least is next.

    An item's cost is charged when it is popped, so that several pops in a row alternate; `charge` corrects it by what
    the item turned out to cost.

    Args:
        weights: as those of `VirtualTokens`.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._tokens = VirtualTokens(weights)
        self._lines: dict[str, deque[tuple[T, float]]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, account: str, item: T, cost: float = 1.0) -> None:
        """Add an item at the end of its account's own line."""
        self._lines.setdefault(account, deque()).append((item, cost))
        self._tokens.enter(account)
        self._size += 1

    def pop(self) -> T | None:
        """Remove and return the first item of the account that has had least; None when nothing waits."""
        if not self._lines:
            return None
        account = min(self._lines, key=self._tokens.of)  # of equals, the one that has waited longest in line
        item, cost = self._lines[account].popleft()
        self._tokens.charge(account, cost)
        self._taken(account)
        return item

    def remove(self, account: str, item: T) -> bool:
        """Take an item out of its account's line; False when it was not waiting."""
        line = self._lines.get(account, ())
        entry = next((each for each in line if each[0] is item or each[0] == item), None)
        if entry is None:
            return False
        self._lines[account].remove(entry)
        self._taken(account)
        return True

    def _taken(self, account: str) -> None:
        self._size -= 1
        self._tokens.leave(account)
        if not self._lines[account]:
            del self._lines[account]

    def order(self) -> Iterator[T]:
        """The items in the order in which `pop` would return them, were nothing added and nothing charged."""
        lines = {account: deque(line) for account, line in self._lines.items()}
        counters = {account: self._tokens.of(account) for account in lines}
        while lines:
            account = min(lines, key=counters.__getitem__)
            item, cost = lines[account].popleft()
            counters[account] += self._tokens.share(account, cost)
            if not lines[account]:
                del lines[account]
            yield item

    def charge(self, account: str, cost: float) -> None:
        """Learn that the account's requests cost `cost` more (or less) than was said when they were pushed."""
        self._tokens.charge(account, cost)
