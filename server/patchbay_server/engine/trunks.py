"""What recent requests left for later ones over the same tokens to go on from: bounded, and each account's own.

The key holds the account, an account's entries make room for its own alone, and what an account has seen before is
remembered per account; so that nothing of one account can be told from another's answers. Entries that nobody used for
a while go, so that room is found for accounts that come later.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from patchbay.ir.card import ModelCard
from patchbay.ir.graph import Run
from patchbay_server.models.continuation import Trunk
from patchbay_server.models.row_cache import Known

Tokens: TypeAlias = "tuple[tuple[int, ...], ...]"

#: Prompts of an account that are remembered as seen once.
_SEEN = 256


@dataclass
class _Account:
    """One account's entries, the least recently used first."""

    entries: OrderedDict[Tokens, tuple[Trunk, int, float]] = field(default_factory=OrderedDict)
    seen: OrderedDict[int, float] = field(default_factory=OrderedDict)
    nbytes: int = 0


class TrunkCache:
    """Trunks by account and tokens. May be used from any thread.

    Args:
        max_bytes: of all entries together; 0 keeps nothing.
        account_bytes: of one account's entries.
        idle_s: seconds after its last use after which an entry goes.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        max_bytes: int,
        account_bytes: int | None = None,
        idle_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._account_bytes = max_bytes // 4 if account_bytes is None else account_bytes
        self._idle_s, self._clock = idle_s, clock
        self._accounts: dict[str, _Account] = {}
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._nbytes

    def get(self, account: str, tokens: Tokens) -> Trunk | None:
        """What a request of `account` left for `tokens`."""
        with self._lock:
            mine = self._accounts.get(account)
            found = None if mine is None else mine.entries.get(tokens)
            if mine is None or found is None:
                return None
            trunk, nbytes, _ = found
            mine.entries[tokens] = (trunk, nbytes, self._clock())
            mine.entries.move_to_end(tokens)
            return trunk

    def longest(
        self, account: str, tokens: Sequence[int], least: int, usable: Callable[[Trunk], bool] = lambda _: True
    ) -> Known | None:
        """What a request of `account` left that begins with most of `tokens`; None for fewer than `least` of them.

        Args:
            account: who asks.
            tokens: how a prompt begins.
            least: the fewest positions that are of use, 1 at least.
            usable: whether a trunk holds what is needed.
        """
        wanted, best, found = tuple(tokens), least - 1, None
        with self._lock:
            mine = self._accounts.get(account)
            if mine is None or len(wanted) < least:
                return None
            for rows, (trunk, _, _) in mine.entries.items():
                for number, row in enumerate(rows):
                    longer = best < min(len(row), len(wanted)) and row[: best + 1] == wanted[: best + 1]
                    if longer and usable(trunk):
                        best = _common(row, wanted)
                        found = rows, Known(trunk, number, best)
            if found is None:
                return None
            rows, known = found
            mine.entries[rows] = (known.trunk, mine.entries[rows][1], self._clock())
            mine.entries.move_to_end(rows)
            return known

    def fits(self, nbytes: int) -> bool:
        """Whether something of that size may be kept at all."""
        return nbytes <= min(self._max_bytes, self._account_bytes)

    def wants(self, account: str, tokens: Tokens, nbytes: int) -> bool:
        """Whether `account` has asked for `tokens` before, so that what a run over them leaves is worth making.

        Args:
            account: who asks.
            tokens: of the run.
            nbytes: what would be kept, about.
        """
        if not self.fits(nbytes):
            return False
        with self._lock:
            mine = self._accounts.setdefault(account, _Account())
            key = hash(tokens)
            before = key in mine.seen
            mine.seen[key] = self._clock()
            mine.seen.move_to_end(key)
            while len(mine.seen) > _SEEN:
                mine.seen.popitem(last=False)
            return before

    def put(self, account: str, tokens: Tokens, trunk: Trunk) -> None:
        """Keep `trunk` if there is room for it; the account's own least recently used entries make way."""
        nbytes = trunk.nbytes
        if not self.fits(nbytes):
            return
        with self._lock:
            self._expire()
            mine = self._accounts.setdefault(account, _Account())
            self._drop(mine, tokens)
            while mine.nbytes + nbytes > self._account_bytes:
                self._drop(mine, next(iter(mine.entries)))
            if self._nbytes + nbytes > self._max_bytes:
                return
            mine.entries[tokens] = (_compact(trunk), nbytes, self._clock())
            mine.nbytes += nbytes
            self._nbytes += nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._accounts.clear()
            self._nbytes = 0

    def _drop(self, mine: _Account, tokens: Tokens) -> None:
        _, nbytes, _ = mine.entries.pop(tokens, (None, 0, 0.0))
        mine.nbytes -= nbytes
        self._nbytes -= nbytes

    def _expire(self) -> None:
        oldest = self._clock() - self._idle_s
        for account, mine in list(self._accounts.items()):
            for tokens in [t for t, (_, _, used) in mine.entries.items() if used < oldest]:
                self._drop(mine, tokens)
            for key in [k for k, used in mine.seen.items() if used < oldest]:
                del mine.seen[key]
            if not mine.entries and not mine.seen:
                del self._accounts[account]


def trunk_bytes(card: ModelCard, run: Run) -> int:
    """What a run over some tokens leaves, about: the residual stream between layers, keys and values of all."""
    wide = card.dtype.itemsize
    position = (card.n_layers + 1) * card.d_model + 2 * card.n_layers * card.n_kv_heads * card.d_head
    return run.rows * run.seq * position * wide


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first items are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _compact(trunk: Trunk) -> Trunk:
    """`trunk` with every tensor in memory of its own size: a view would hold all that it is a part of."""

    def own(value: torch.Tensor) -> torch.Tensor:
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone(memory_format=torch.contiguous_format)

    return Trunk(
        {n: own(v) for n, v in trunk.streams.items()},
        {n: own(v) for n, v in trunk.keys.items()},
        {n: own(v) for n, v in trunk.values.items()},
    )
