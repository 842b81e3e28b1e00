"""Generated text on standard output as it appears: ``model.generate(..., stream=True)``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.arguments import check_function, refused, seen
from patchbay.errors import InvalidRequestError

if TYPE_CHECKING:
    from patchbay.core import ModelCore

#: What a decoder gives for bytes that are no character yet: more tokens may make them one.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Printer:
    """Prints tokens as they come: one row's text as it grows; of several rows a line for each step, tabs between.

    Args:
        core: of the model, which has the tokenizer.
        wait: waits for a coroutine; None in an event loop, where texts are asked for beside the events that come.
    """

    def __init__(self, core: ModelCore, wait: Callable[[Coroutine[Any, Any, None]], None] | None) -> None:
        self._core, self._wait = core, wait
        self._last: asyncio.Future[None] | None = None
        self._ids: list[int] = []
        self._shown = ""
        self._open = False  # whether a line of text waits for its end

    def __call__(self, step: int, ids: list[int]) -> None:
        """The next token of each row, -1 for rows that had stopped."""
        del step
        if self._wait is not None:
            self._wait(self.take(ids))
        else:
            self._last = asyncio.ensure_future(self._after(self._last, ids))

    async def _after(self, last: asyncio.Future[None] | None, ids: list[int]) -> None:
        if last is not None:
            await last
        await self.take(ids)

    async def finished(self) -> None:
        """In an event loop: all that came is printed, and nothing more comes."""
        if self._last is not None:
            await self._last
        self.end()

    async def take(self, ids: Sequence[int]) -> None:
        """The next token of each row, -1 for rows that had stopped."""
        if len(ids) > 1:
            words = iter(await self._strings([i for i in ids if i >= 0]))
            print(*(next(words) if i >= 0 else "" for i in ids), sep="\t", flush=True)
            return
        self._ids += ids
        try:
            text = (await self._core.decode(self._ids)).text
        except InvalidRequestError:  # hosted without a tokenizer
            text = " ".join(map(str, self._ids))
        if text.startswith(self._shown) and not text.endswith(_UNFINISHED):
            print(text[len(self._shown) :], end="", flush=True)
            self._shown, self._open = text, True

    def end(self) -> None:
        """Nothing more comes."""
        if self._open:
            print(flush=True)
        self._open = False

    async def _strings(self, ids: Sequence[int]) -> Sequence[str]:
        try:
            return await self._core.token_strings(ids)
        except InvalidRequestError:
            return [str(i) for i in ids]


def listener(
    stream: Any, core: ModelCore, wait: Callable[[Coroutine[Any, Any, None]], None] | None = None
) -> Callable[[int, list[int]], Any] | None:
    """What is to hear of a generating run's tokens: called with each step and one id per row.

    Args:
        stream: a function, True for a `Printer`, None or False for nothing.
        core, wait: of the printer.

    Raises:
        ArgumentError: `stream` is neither True nor a function.
    """
    if stream is None or stream is False:
        return None
    if stream is True:
        return Printer(core, wait)
    if not callable(stream):
        raise refused(
            f"stream is True, to print what appears, or a function of a step and its tokens, not {seen(stream)}"
        )
    check_function("stream", stream, "step", "ids")
    return stream  # type: ignore[no-any-return]
