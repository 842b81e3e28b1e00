"""A backend and a catalog around `patchbay.testing.FakeModel`, so that the servicer can be tested without torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from patchbay.errors import NotFoundError
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, Event, ExecuteOptions, ModelSummary, TokenizedRow
from patchbay.ir.graph import Graph
from patchbay.testing import FakeModel


class FakeBackend:
    """A `Backend` over a `FakeModel`; counts the executions that were started and closed."""

    def __init__(self, name: str = "fake") -> None:
        self.model = FakeModel(name)
        self.started = 0
        self.closed = 0
        self.accounts: list[str] = []

    @property
    def summary(self) -> ModelSummary:
        return self.model.summary

    @property
    def card(self) -> ModelCard:
        return self.model.card

    async def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        return self.model.tokenize(texts, add_special_tokens if prepend_bos is None else prepend_bos)

    async def render_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        return self.model.render_chats(chats)

    async def token_strings(self, ids: Sequence[int]) -> TokenizedRow:
        return self.model.token_strings(ids)

    async def execute(
        self, graph: Graph, options: ExecuteOptions, *, account: str, bytes_in: int = 0
    ) -> AsyncIterator[Event]:
        del bytes_in
        self.started += 1
        self.accounts.append(account)
        try:
            for event in self.events(graph, options):
                yield event
        finally:
            self.closed += 1

    def events(self, graph: Graph, options: ExecuteOptions) -> Sequence[Event]:
        """What an execution says; tests replace it."""
        return list(self.model.execute(graph, options))


class FakeCatalog:
    """A `Catalog` of the given backends."""

    def __init__(self, *backends: FakeBackend) -> None:
        self.backends = {backend.card.name: backend for backend in backends}

    async def list_models(self) -> tuple[ModelSummary, ...]:
        return tuple(backend.summary for _, backend in sorted(self.backends.items()))

    def get(self, name: str) -> FakeBackend:
        if name not in self.backends:
            raise NotFoundError(f"no model {name!r} here; it hosts: {', '.join(self.backends)}")
        return self.backends[name]
