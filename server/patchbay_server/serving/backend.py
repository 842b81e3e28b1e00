"""What the servicer needs of whatever runs the models, and what a backend needs of an engine.

The servicer sees only `Catalog` and `Backend`, so the same servicer serves in-process, under plain gRPC and in a Ray
Serve replica.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

from patchbay.errors import NotFoundError
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, Cost, Event, ExecuteOptions, ModelSummary, TokenizedRow, Usage
from patchbay.ir.graph import Graph


class Backend(Protocol):
    """One hosted model."""

    @property
    def summary(self) -> ModelSummary:
        """The model's line in ListModels."""

    @property
    def card(self) -> ModelCard:
        """The model's card."""

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        """Tokenize texts with the model's own tokenizer; one row per text, in order."""

    async def render_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        """Conversations as texts, by the tokenizer's chat template."""

    async def token_strings(self, ids: Sequence[int]) -> TokenizedRow:
        """The text of each token id, as the model's tokenizer shows it."""

    def execute(
        self, graph: Graph, options: ExecuteOptions, *, account: str, bytes_in: int = 0
    ) -> AsyncIterator[Event]:
        """Run a graph; closing the iterator cancels.

        Args:
            graph: the graph.
            options: how to run it.
            account: who is charged and queued.
            bytes_in: bytes of the request, for `Usage`.

        Raises:
            GraphError: the graph breaks a rule or a limit.
            ServiceError: the queue is full, the deadline has passed, the device failed, ...
        """


class Catalog(Protocol):
    """The models that a server offers."""

    async def list_models(self) -> tuple[ModelSummary, ...]:
        """A summary of each model, ordered by name."""

    def get(self, name: str) -> Backend:
        """The model called `name`.

        Raises:
            NotFoundError: there is none; the message names those there are.
        """


class Plan(Protocol):
    """A graph made ready to run."""

    @property
    def cost(self) -> Cost:
        """What running it will need."""


class Wanted(Protocol):
    """The forward that an open execution waits for, as far as the scheduler needs to know it."""

    @property
    def rows(self) -> int:
        """Rows of its batch."""

    @property
    def seq(self) -> int:
        """Positions of its batch."""

    @property
    def depth(self) -> int:
        """Layers that it needs."""

    @property
    def together(self) -> Hashable | None:
        """Those with equal ones may share a forward; None shares with nobody."""

    @property
    def bound(self) -> bool:
        """Whether those with an equal `together` must go all at once."""

    @property
    def nbytes(self) -> int:
        """Memory that it needs while it runs."""


class OpenExecution(Protocol):
    """One plan under way beside others."""

    @property
    def wanted(self) -> Wanted | None:
        """The forward that it waits for; None before `begin` and after the end."""

    @property
    def usage(self) -> Usage | None:
        """What was used, once it has ended well."""

    @property
    def error(self) -> BaseException | None:
        """What ended it, once it has not."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""

    @property
    def run_s(self) -> float:
        """Seconds that it ran, forwards that it shared counted in full."""

    def begin(self) -> None:
        """Do what comes before the first forward."""

    def close(self) -> None:
        """Let go of everything."""


class ExecutionEngine(Protocol):
    """The interface of `patchbay_server.engine.Engine` that a backend uses (tests put a fake in its place)."""

    def prepare(self, graph: Graph, options: ExecuteOptions, *, account: str | None = None) -> Any:
        """Verify, optimise and price a graph; returns a `Plan`."""

    def open(self, plan: Any, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> OpenExecution:
        """A plan as one of several that run side by side; all of them belong in one thread."""

    def advance(self, group: Sequence[Any]) -> None:
        """Run the forward that all of a group of open executions want; blocks.

        Raises:
            BaseException: the device failed; what went wrong for one of them is its own `error`.
        """


class Hosted(Protocol):
    """The interface of `patchbay_server.models.loader.HostedModel` that a backend uses."""

    @property
    def card(self) -> ModelCard:
        """The model's card."""

    @property
    def summary(self) -> ModelSummary:
        """The model's line in ListModels."""

    def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        """Tokenize texts; blocks."""

    def render_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        """Conversations as texts; blocks."""

    def token_strings(self, ids: Sequence[int]) -> TokenizedRow:
        """The text of each token id; blocks."""


def no_such_model(name: str, hosted: Iterable[str]) -> NotFoundError:
    """The error for a model that is none of those that are hosted; names the nearest, or all."""
    names = list(hosted)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it hosts: {', '.join(names) or 'none'}"
    return NotFoundError(f"this server hosts no model {name!r}; {hint}", reason="MODEL_NOT_FOUND")
