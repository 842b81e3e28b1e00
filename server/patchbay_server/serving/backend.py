"""What the servicer needs of whatever runs the models, and what a backend needs of an engine.

The servicer sees only `Catalog` and `Backend`, so the same servicer serves in-process, under plain gRPC and in a Ray
Serve replica.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
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


class ExecutionEngine(Protocol):
    """The interface of `patchbay_server.engine.Engine` that a backend uses (tests put a fake in its place)."""

    def prepare(self, graph: Graph, options: ExecuteOptions) -> Any:
        """Verify, optimise and price a graph; returns a `Plan`."""

    def run(self, plan: Any, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> Usage:
        """Run a plan; blocks, and belongs in one thread."""


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
