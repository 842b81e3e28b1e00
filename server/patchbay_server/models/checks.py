"""What an identity is, and what it is checked on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from patchbay_server.models.binding import close
from patchbay_server.models.taps import FlatTap, Tap

Values: TypeAlias = "Mapping[str, torch.Tensor]"


@dataclass(frozen=True)
class Check:
    """What an identity is checked on.

    Attributes:
        now: values of this forward, written ones as written.
        plain: values of the forward in which nothing was written.
        written: the sites whose rows changed places; empty for the plain forward.
    """

    now: Values
    plain: Values
    written: frozenset[str]

    def follows(self, source: str, target: str) -> bool:
        """Whether writing `source` with its rows in other places put the rows of `target` in the same places."""
        return source not in self.written or close(self.now[target], self.plain[target].roll(1, 0))


@dataclass(frozen=True)
class Identity:
    """One identity.

    Attributes:
        sentence: it, in words.
        names: the sites that it proves when it holds.
        sources: those of them from which the rest follows: it must hold too when one of these was written.
        holds: the check.
        plain: whether it says anything when nothing was written.
        essential: whether a site from which nothing follows as it should is not what it is called.
    """

    sentence: str
    names: tuple[str, ...]
    sources: tuple[str, ...]
    holds: Callable[[Check], bool]
    plain: bool = True
    essential: bool = False


def factor_between(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """The one factor that turns `a` into `b`, or None."""
    if a.shape != b.shape:
        return None
    size = float((a.double() * a.double()).sum())
    factor = float((a.double() * b.double()).sum()) / size if size else 0.0
    return factor if factor > 0 and close(a * factor, b) else None


def bare(tap: Tap) -> Tap:
    """A tap without what only takes rows and positions apart."""
    return tap.inner if isinstance(tap, FlatTap) else tap


# --- comparisons --------------------------------------------------------------------------------------------------
