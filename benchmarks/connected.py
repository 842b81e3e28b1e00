"""A work that talks to a service through the asynchronous client, over one connection that outlives its trials."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Connected:
    """Mixed into works: `connect` in `prepare`, `wait` in `run`.

    Attributes:
        hosted: the service's only model.
    """

    hosted: Any

    def connect(self, address: str, keys: Mapping[str, str | None]) -> None:
        """Connect, and fetch the card of the only model there."""
        self._loop = asyncio.new_event_loop()
        self.hosted = self._loop.run_until_complete(self._open(address, keys.get("")))

    async def _open(self, address: str, key: str | None) -> Any:
        import patchbay as pb

        self._client = pb.connect_async(address, api_key=key)
        (summary,) = await self._client.models()
        return await self._client.model(summary.name)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        """Close the connection."""
        self._loop.run_until_complete(self._client.close())
        self._loop.close()
