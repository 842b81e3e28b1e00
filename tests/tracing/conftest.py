"""Models over the shipped fake server, and one whose calls are counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from patchbay.client import Client
from patchbay.ir.events import Event, ExecuteOptions, TokenizedRow
from patchbay.ir.graph import Graph
from patchbay.model import Model
from patchbay.testing import FakeTransport

FRANCE = "The capital of France is"
ITALY = "The capital of Italy is"


class CountingTransport(FakeTransport):
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenized: list[list[str]] = []
        self.executed: list[tuple[Graph, ExecuteOptions, float | None]] = []
        self.closed = 0

    async def tokenize(
        self, model: str, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> tuple[TokenizedRow, ...]:
        self.tokenized.append(list(texts))
        return await super().tokenize(model, texts, add_special_tokens=add_special_tokens)

    async def execute(
        self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        self.executed.append((graph, options, timeout_s))
        async for event in super().execute(model, graph, options, timeout_s=timeout_s):
            yield event

    async def close(self) -> None:
        self.closed += 1
        await super().close()


@pytest.fixture
def transport() -> CountingTransport:
    return CountingTransport()


@pytest.fixture
def client(transport: CountingTransport) -> Iterator[Client]:
    with Client(transport) as client:
        yield client


@pytest.fixture
def model(client: Client) -> Model:
    return client.model("fake")
