"""Which of the waiting forwards share the next one. Pure logic: it knows extents, accounts and costs, but no tensor.

The account that has had least goes first, with the forward of its that has waited longest. Others join it where that is
cheaper than a forward of their own: rows that would be mostly padding, or run much deeper than they need, do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from patchbay_server.scheduling.virtual_tokens import VirtualTokens

#: An account with so many times the waiting calls of the one whose turn it is counts as a flood.
_FLOOD = 2
#: Positions of an account that is no flood may join one that has nothing more waiting, up to so many.
_PEER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Waiting:
    """A forward that somebody waits for.

    Attributes:
        account: who.
        rows, seq: extents of its batch.
        depth: layers that it needs.
        together: forwards with equal ones may share; None shares with nobody.
        bound: those with an equal `together` must go all at once (rows of one batch that generates).
        nbytes: memory that it needs while it runs.
        since: when it began to wait, in any rising unit.
    """

    account: str
    rows: int
    seq: int
    depth: int = 1
    together: Hashable | None = None
    bound: bool = False
    nbytes: int = 0
    since: float = 0.0

    @property
    def work(self) -> float:
        """What it is charged: positions times layers."""
        return float(max(1, self.rows * self.seq * self.depth))


@dataclass(frozen=True, slots=True)
class Budget:
    """What one shared forward is held to; a single call that exceeds it runs alone.

    Attributes:
        tokens: positions, padding included.
        nbytes: memory of the calls.
        filled: share of the positions that must not be padding.
        level: the least depth of a call, as a share of the deepest.
        free_tokens: positions that cost no time beside others (on a device that so few do not fill): so many of any
            account may join.
    """

    tokens: int = 4_096
    nbytes: int = 1 << 30
    filled: float = 0.75
    level: float = 0.75
    free_tokens: int = 0


class Batcher:
    """Chooses forwards, and keeps the accounts' counters. Not thread-safe.

    Args:
        budget: what one forward is held to.
        fair: whether the account that has had least goes first; else whoever has waited longest.
        weights: shares of accounts that are not 1, where it is fair.
    """

    def __init__(
        self, budget: Budget | None = None, *, fair: bool = True, weights: Mapping[str, float] | None = None
    ) -> None:
        self.budget = Budget() if budget is None else budget
        self.tokens = VirtualTokens(weights)
        self._fair = fair

    def enter(self, account: str) -> None:
        """A request of the account was opened."""
        self.tokens.enter(account)

    def leave(self, account: str) -> None:
        """A request of the account was closed."""
        self.tokens.leave(account)

    def pick(self, waiting: Sequence[Waiting]) -> list[int]:
        """Indices of the calls that share the next forward; never empty. Their accounts are charged.

        Args:
            waiting: at least one call.
        """
        lines: dict[str, list[int]] = defaultdict(list)
        load: dict[str, float] = defaultdict(float)
        for i in sorted(range(len(waiting)), key=lambda i: waiting[i].since):
            lines[waiting[i].account].append(i)
            load[waiting[i].account] += waiting[i].work if self._fair else 0.0
        # Who has just come has as much as the least of the others: of equals, the one that asks for less goes first.
        account = min(lines, key=lambda a: (self.tokens.of(a), load[a], waiting[lines[a][0]].since))
        head = lines[account][0]
        first = waiting[head]
        if first.together is None:
            chosen = [head]
        elif first.bound:
            chosen = [i for i, each in enumerate(waiting) if each.together == first.together]
        else:
            chosen = self._joined(waiting, lines, head)
        if self._fair:
            for i in chosen:
                self.tokens.charge(waiting[i].account, waiting[i].work)
        return chosen

    def _joined(self, waiting: Sequence[Waiting], lines: dict[str, list[int]], head: int) -> list[int]:
        """`head` and those that go with it, best fits of its own account first, then the other accounts in turn."""
        budget, first = self.budget, waiting[head]
        forward = _Forward(first)
        chosen = [head]
        partners = {
            account: [i for i in line if i != head and waiting[i].together == first.together and not waiting[i].bound]
            for account, line in lines.items()
        }
        mine, theirs = self.tokens.weight(first.account), [a for a in partners if partners[a] and a != first.account]
        share = float(budget.tokens)
        if theirs and self._fair:  # room is left for one other, as its weight is to this one's
            share *= mine / (mine + max(map(self.tokens.weight, theirs)))
        had = first.rows * first.seq
        own = partners.pop(first.account)
        for i in own:
            size = waiting[i].rows * waiting[i].seq
            if had + size <= share and forward.takes(waiting[i], budget):
                chosen.append(i)
                had += size
        least = _PEER_TOKENS if len(chosen) > len(own) else 0  # with more of its own waiting, weights alone decide
        # No account gets more of this forward, by its weight, than the one whose turn it is, and one that has many more
        # waiting gets next to nothing, so that somebody else's flood does not make it long.
        allowances: dict[str, int] = {}
        for account in partners:
            flood = len(lines[account]) > _FLOOD * len(lines[first.account])
            fitting = max(int(had * self.tokens.weight(account) / mine), least)
            most = budget.free_tokens if flood else max(fitting, budget.free_tokens)
            allowances[account] = most if self._fair else budget.tokens
        for i in _in_turn(partners, self.tokens, waiting, allowances):
            if forward.takes(waiting[i], budget):
                chosen.append(i)
        return chosen


def _in_turn(
    lines: dict[str, list[int]], tokens: VirtualTokens, waiting: Sequence[Waiting], allowances: Mapping[str, int]
) -> Iterator[int]:
    """Calls of each account up to so many positions, the account that has had least first."""
    counters = {account: tokens.of(account) for account, line in lines.items() if line}
    had: dict[str, int] = defaultdict(int)
    while counters:
        account = min(counters, key=counters.__getitem__)
        i = lines[account].pop(0)
        size = waiting[i].rows * waiting[i].seq
        if had[account] + size <= allowances[account]:
            yield i
            had[account] += size
            counters[account] += tokens.share(account, waiting[i].work)
        if not lines[account]:
            del counters[account]


class _Forward:
    """The forward under construction."""

    def __init__(self, first: Waiting) -> None:
        self._rows, self._seq, self._real = first.rows, first.seq, first.rows * first.seq
        self._least = self._deepest = first.depth
        self._nbytes = first.nbytes

    def takes(self, call: Waiting, budget: Budget) -> bool:
        """Whether `call` fits; it is in, where it does."""
        rows, seq = self._rows + call.rows, max(self._seq, call.seq)
        real, nbytes = self._real + call.rows * call.seq, self._nbytes + call.nbytes
        least, deepest = min(self._least, call.depth), max(self._deepest, call.depth)
        if rows * seq > budget.tokens or nbytes > budget.nbytes:
            return False
        if real < budget.filled * rows * seq or least < budget.level * deepest:
            return False
        self._rows, self._seq, self._real, self._nbytes = rows, seq, real, nbytes
        self._least, self._deepest = least, deepest
        return True
