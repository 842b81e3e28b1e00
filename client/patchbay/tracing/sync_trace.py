"""Traces whose waiting blocks: the `with` blocks of `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchbay.errors import GraphError, TraceError
from patchbay.inputs import Text, with_bos
from patchbay.places import here, located
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

    from patchbay.model import Model


class SyncTrace(BaseTrace):
    """A trace whose waiting blocks."""

    def __init__(self, model: Model, **kwargs: Any) -> None:
        super().__init__(model.core, **kwargs)
        self._edits = model.edits
        self._model = model
        self._printers: list[Printer] = []

    @located
    def run(self, inputs: Input, *, label: str | None = None, prepend_bos: bool | None = None) -> Run:
        """Adds a forward over `inputs`.

        Args:
            inputs: a text, a list of texts (rows), a conversation (a list of dicts with ``role`` and ``content``, made
                into a text by the model's chat template) or a list of them, token ids, a list of lists of ids, an
                integer array, or `Tokens`; or, for models with other inputs (`model.card.inputs`), a dict of arrays by
                name, token ids or text under ``"text"``: ``{"pixel_values": image}``.
            label: what to call it in errors and printed graphs; the text by default.
            prepend_bos: whether texts begin with the beginning-of-sequence token; None leaves it to the tokenizer.

        Raises:
            TraceError: not an input; ids outside the vocabulary; too long.
            InvalidRequestError: the model has no chat template, or no such token.
        """
        self._check_open()
        inputs = with_bos(inputs, prepend_bos)
        given = self._core.known_inputs_of(inputs) or self._model.wait(self._core.inputs_of(inputs))
        return self._add_run(given, label)

    @located
    def generate(
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
        hears = listener(stream, self._core, self._model.wait)
        given = self._core.known_inputs_of(inputs) or self._model.wait(self._core.inputs_of(inputs))
        generation = self._model.wait(generation_of(self._core, max_new_tokens, how))
        run = self._add_run(given, label, generation)
        assert isinstance(run, GeneratingRun)
        if hears is not None:
            self._progress = streaming(run, hears, self._progress)
        if isinstance(hears, Printer):
            self._printers.append(hears)
        return run

    def tokens_of(self, text: str) -> Tokens:
        wanted = Text(text, special=False)
        known = self._core.known_tokens(wanted)
        return self._model.wait(self._core.tokenize([wanted]))[0] if known is None else known

    def execute(self) -> None:
        """Verifies and runs the graph; leaving the ``with`` block does this.

        Raises:
            GraphError: the graph breaks a rule: raised before anything is sent, or by the server.
            ServiceError: the server, or the way to it, failed.
        """
        graph = self._prepare()
        if graph is None:
            return
        try:
            outcome = self._model.wait_with_events(
                lambda emit: self._core.execute(graph, self._options, self._timeout_s, emit), self._progress
            )
            self._finish(graph, outcome)
            if ids := generated_ids(self):
                take_generated(self, self._model.wait(texts_of(self._core, ids)))
        except GraphError as error:
            self._fail(error)
            raise self._located(error, graph) from None
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            for printer in self._printers:
                printer.end()

    def estimate(self, *, remote: bool = False) -> Price:
        """The graph's price without running it.

        Args:
            remote: ask the server, which knows what its optimisations save, instead of working it out here.

        Raises:
            GraphError: the graph is not valid.
        """
        if not remote:
            return self._local_estimate()
        graph = self.graph
        self._verified(graph)
        return self._model.wait(self._core.price(graph, self._timeout_s))

    if not TYPE_CHECKING:  # only for the message

        async def __aenter__(self) -> None:
            raise TraceError("this model blocks: use `with`, or connect with pb.connect_async", location=here())

        async def __aexit__(self, *error: object) -> None:
            del error

    def _leave(self, failed: bool) -> None:
        if failed:
            self._abandon()
        elif self._state == "open":
            self.execute()


class Trace(SyncTrace):
    """Many runs: ``with model.trace() as t: a = t.run(...)``."""

    def __enter__(self) -> Trace:
        self._enter()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._leave(failed=kind is not None)


class RunTrace(SyncTrace):
    """One run: ``with model.trace(text) as run``."""

    def __enter__(self) -> Run:
        self._enter()
        return self.run(self._first)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._leave(failed=kind is not None)


class GenerateTrace(SyncTrace):
    """One generating run: ``with model.generate(text, max_new_tokens=20) as run``.

    Args:
        how: arguments of `SyncTrace.generate` beside the input.
        stream: called with each step and its tokens as they appear; True prints them.
    """

    def __init__(
        self, model: Model, *, how: Mapping[str, Any], stream: StreamCallback | bool | None, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        listener(stream, model.core)  # a mistake is told where it was made
        self._how, self._stream = how, stream

    def __enter__(self) -> GeneratingRun:
        self._enter()
        return self.generate(self._first, stream=self._stream, **self._how)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._leave(failed=kind is not None)
