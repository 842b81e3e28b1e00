"""Traces whose waiting is awaited: the `async with` blocks of `AsyncModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchbay.errors import GraphError, TraceError
from patchbay.inputs import Text, with_bos
from patchbay.places import here, located_awaited
from patchbay.results import Price
from patchbay.tokens import Tokens
from patchbay.tracing.generation import (
    GeneratingRun,
    How,
    check_how,
    generated_ids,
    generation_of,
    streaming,
    take_generated,
    texts_of,
)
from patchbay.tracing.printing import Printer, listener
from patchbay.tracing.runs import Run
from patchbay.tracing.trace import BaseTrace, Input, StreamCallback

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from patchbay.model import AsyncModel


class AsyncBase(BaseTrace):
    """A trace whose waiting is awaited."""

    def __init__(self, model: AsyncModel, **kwargs: Any) -> None:
        super().__init__(model.core, **kwargs)
        self._edits = model.edits
        self._printers: list[Printer] = []

    @located_awaited
    async def run(self, inputs: Input, *, label: str | None = None, prepend_bos: bool | None = None) -> Run:
        """Adds a forward over `inputs`; see `SyncTrace.run`."""
        self._check_open()
        inputs = with_bos(inputs, prepend_bos)
        return self._add_run(await self._core.inputs_of(inputs), label)

    @located_awaited
    async def generate(
        self,
        inputs: Input,
        *,
        max_new_tokens: int,
        label: str | None = None,
        stream: StreamCallback | bool | None = None,
        prepend_bos: bool | None = None,
        **how: Unpack[How],
    ) -> GeneratingRun:
        """Adds a run that generates tokens after `inputs`; the arguments are those of `Model.generate`."""
        self._check_open()
        check_how(max_new_tokens, how)
        inputs = with_bos(inputs, prepend_bos)
        hears = listener(stream, self._core)
        given = await self._core.inputs_of(inputs)
        run = self._add_run(given, label, await generation_of(self._core, max_new_tokens, how))
        assert isinstance(run, GeneratingRun)
        if hears is not None:
            self._progress = streaming(run, hears, self._progress)
        if isinstance(hears, Printer):
            self._printers.append(hears)
        return run

    def tokens_of(self, text: str) -> Tokens:
        known = self._core.known_tokens(Text(text, special=False))
        if known is None:
            raise TraceError(
                f"the tokens of {text!r} are not known yet: await model.tokenize({text!r}, add_special_tokens=False) "
                "before, or give token ids"
            )
        return known

    async def execute(self) -> None:
        """Verifies and runs the graph; see `SyncTrace.execute`."""
        graph = self._prepare()
        if graph is None:
            return
        try:
            outcome = await self._core.execute(graph, self._options, self._timeout_s, self._progress)
            self._finish(graph, outcome)
            if ids := generated_ids(self):
                take_generated(self, await texts_of(self._core, ids))
        except GraphError as error:
            self._fail(error)
            raise self._located(error, graph) from None
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            for printer in self._printers:
                await printer.finished()

    async def estimate(self, *, remote: bool = False) -> Price:
        """The graph's price without running it; see `SyncTrace.estimate`."""
        if not remote:
            return self._local_estimate()
        graph = self.graph
        self._verified(graph)
        return await self._core.price(graph, self._timeout_s)

    if not TYPE_CHECKING:  # only for the message

        def __enter__(self) -> None:
            raise TraceError("this model is awaited: use `async with`, or connect with pb.connect", location=here())

        def __exit__(self, *error: object) -> None:
            del error

    async def _leave(self, failed: bool) -> None:
        if failed:
            self._abandon()
        elif self._state == "open":
            await self.execute()


class AsyncTrace(AsyncBase):
    """Many runs: ``async with model.trace() as t: a = await t.run(...)``."""

    async def __aenter__(self) -> AsyncTrace:
        self._enter()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self._leave(failed=kind is not None)


class AsyncRunTrace(AsyncBase):
    """One run: ``async with model.trace(text) as run``."""

    async def __aenter__(self) -> Run:
        self._enter()
        return await self.run(self._first)

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self._leave(failed=kind is not None)


class AsyncGenerateTrace(AsyncBase):
    """One generating run: ``async with model.generate(text, max_new_tokens=20) as run``; see `GenerateTrace`."""

    def __init__(
        self, model: AsyncModel, *, how: Mapping[str, Any], stream: StreamCallback | bool | None, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        listener(stream, model.core)  # a mistake is told where it was made
        self._how, self._stream = how, stream

    async def __aenter__(self) -> GeneratingRun:
        self._enter()
        return await self.generate(self._first, stream=self._stream, **self._how)

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self._leave(failed=kind is not None)
