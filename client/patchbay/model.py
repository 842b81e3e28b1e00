"""A hosted model as an object: its card, its tokenizer, and traces over it.

`ModelCore` does the talking, as coroutines; `Model` waits for it in the client's thread, `AsyncModel` awaits it.
"""

from __future__ import annotations

import copy
import operator
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from patchbay.errors import ProtocolError, TraceError
from patchbay.inputs import Chat, Text, WithBos, chat_of
from patchbay.ir.card import InputSpec, ModelCard
from patchbay.ir.events import Done, Event, ExecuteOptions, TensorValue, TokenizedRow, Usage
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.sites import is_module_site
from patchbay.results import Price, Results, RunUsage
from patchbay.tokens import Tokens

if TYPE_CHECKING:
    from typing_extensions import Self

    from patchbay.client import Connection
    from patchbay.ir.graph import Graph, TensorData
    from patchbay.portal import Portal
    from patchbay.tracing.namespaces import SiteTree
    from patchbay.tracing.params import ModelParams
    from patchbay.tracing.runs import Run
    from patchbay.tracing.trace import (
        AsyncGenerateTrace,
        AsyncRunTrace,
        AsyncTrace,
        GenerateTrace,
        Input,
        ProgressCallback,
        RunTrace,
        StreamCallback,
        Trace,
    )

T = TypeVar("T")
#: A function of a `Run`, applied to every run of an edited model.
Edit: TypeAlias = "Callable[[Run], object]"
_CACHED_TEXTS = 4096
#: Under this name a dict of inputs holds the text or token ids.
TOKENS = "text"


@dataclass(frozen=True)
class Outcome:
    """What an execution gave."""

    values: dict[str, TensorValue]
    usage: Usage
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True)
class RunInputs:
    """What one run is made from: rows of tokens (and whether they were one row not in a list), and named arrays."""

    rows: list[Tokens]
    single: bool
    named: tuple[tuple[str, TensorData], ...]


class ModelCore:
    """Everything about a model that may wait for its server."""

    def __init__(self, connection: Connection, card: ModelCard) -> None:
        self.card = card
        self._connection = connection
        self._texts: OrderedDict[Text, Tokens] = OrderedDict()
        self._chats: OrderedDict[Chat, str] = OrderedDict()
        self._strings: dict[int, str] = {}  # at most the vocabulary

    @cached_property
    def site_tree(self) -> SiteTree:
        """The model's sites by the parts of their names."""
        from patchbay.tracing.namespaces import site_tree

        return site_tree(self.card)

    # --- tokens ---------------------------------------------------------------------------------------------------

    async def tokenize(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokens of each text; texts seen before cost nothing, the others one call for each way of tokenizing."""
        await self._render({t.chat for t in texts if t.chat is not None and t.chat not in self._chats})
        texts = [self._rendered(t) for t in texts]
        cache = self._texts
        found: dict[Text, Tokens] = {}
        new: dict[tuple[bool, bool | None], list[Text]] = {}
        for text in dict.fromkeys(texts):
            if text in cache:
                cache.move_to_end(text)
                found[text] = cache[text]
            else:
                new.setdefault((text.special, text.prepend_bos), []).append(text)
        for (special, prepend_bos), group in new.items():
            transport = await self._connection.transport()
            plain = [t.text for t in group]
            how: dict[str, Any] = {"add_special_tokens": special}
            if prepend_bos is not None:
                how["prepend_bos"] = prepend_bos
            rows = await transport.tokenize(self.card.name, plain, **how)
            if len(rows) != len(group):
                raise ProtocolError(f"the server tokenized {len(rows)} texts of {len(group)}")
            for text, row in zip(group, rows, strict=True):
                found[text] = cache[text] = Tokens.from_row(text.text, row)
        while len(cache) > _CACHED_TEXTS:
            cache.popitem(last=False)
        return [found[text] for text in texts]

    async def _render(self, chats: Collection[Chat]) -> None:
        """Ask for the texts of conversations."""
        if chats:
            ordered = list(chats)
            transport = await self._connection.transport()
            self._chats.update(zip(ordered, await transport.render_chats(self.card.name, ordered), strict=True))
            while len(self._chats) > _CACHED_TEXTS:
                self._chats.popitem(last=False)

    def _rendered(self, text: Text) -> Text:
        """A conversation's text, which already holds its special tokens."""
        if text.chat is None:
            return text
        return Text(self._chats[text.chat], special=False, prepend_bos=text.prepend_bos)

    async def token_id(self, text: str) -> int:
        """The id of a text that is exactly one token."""
        (tokens,) = await self.tokenize([Text(text, special=False)])
        ids = [i for i, special in zip(tokens.ids, tokens.special, strict=True) if not special]
        if len(ids) != 1:
            pieces = ", ".join(map(repr, tokens.strings)) or "none"
            raise TraceError(f"{text!r} is {len(ids)} tokens ({pieces}), not one; try it with a leading space")
        return ids[0]

    async def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The text of each token id; ids asked for before cost nothing."""
        new = sorted({i for i in ids if i not in self._strings})
        if new:
            transport = await self._connection.transport()
            row = await transport.token_strings(self.card.name, new)
            if row.ids != tuple(new):
                raise ProtocolError("the server named other token ids than it was asked for")
            self._strings.update(zip(row.ids, row.strings, strict=True))
        return [self._strings[i] for i in ids]

    async def decode(self, ids: Sequence[int]) -> TokenizedRow:
        """The text of each token id, and of all together."""
        transport = await self._connection.transport()
        row = await transport.token_strings(self.card.name, ids)
        if row.ids != tuple(ids):
            raise ProtocolError("the server named other token ids than it was asked for")
        return row

    async def inputs_of(self, inputs: Input) -> RunInputs:
        """`inputs` as rows of tokens and named arrays, checked against the card."""
        given, single, named = self._split(inputs)
        texts = await self.tokenize([g for g in given if isinstance(g, Text)])
        return self._run_inputs(given, texts, single, named)

    def known_inputs_of(self, inputs: Input) -> RunInputs | None:
        """Like `inputs_of`, when nothing needs to be asked for: the runs of a sweep read the same few texts."""
        given, single, named = self._split(inputs)
        if any(g.chat is not None and g.chat not in self._chats for g in given if isinstance(g, Text)):
            return None
        texts = [self._texts.get(self._rendered(g)) for g in given if isinstance(g, Text)]
        known = [t for t in texts if t is not None]
        return self._run_inputs(given, known, single, named) if len(known) == len(texts) else None

    def _run_inputs(
        self,
        given: Sequence[Text | Tokens],
        texts: Sequence[Tokens],
        single: bool,
        named: tuple[tuple[str, TensorData], ...],
    ) -> RunInputs:
        rows = self._checked(given, texts)
        counts = {name: value.shape[0] for name, value in named} | ({TOKENS: len(rows)} if rows else {})
        if len(set(counts.values())) > 1:
            raise TraceError(f"the inputs of a run have one entry per row each, but their rows differ: {counts}")
        return RunInputs(rows, single, named)

    def _split(self, inputs: Input) -> tuple[list[Text | Tokens], bool, tuple[tuple[str, TensorData], ...]]:
        if isinstance(inputs, WithBos):
            given, single, named = self._split(inputs.inputs)
            if not any(isinstance(g, Text) for g in given):
                raise TraceError("prepend_bos concerns texts; token ids begin with what they begin with")
            return [replace(g, prepend_bos=inputs.prepend) if isinstance(g, Text) else g for g in given], single, named
        if not isinstance(inputs, Mapping):
            if not self.card.takes_tokens:
                wanted = ", ".join(spec.name for spec in self.card.inputs)
                raise TraceError(f"{self.card.name!r} takes no tokens; give a dict of its inputs: {wanted}")
            self._check_complete(())
            return (*split_rows(inputs), ())
        rest = dict(inputs)
        tokens = rest.pop(TOKENS, None)
        if (tokens is not None) != self.card.takes_tokens:
            says = f"needs {TOKENS!r}" if self.card.takes_tokens else "takes no tokens"
            raise TraceError(f"{self.card.name!r} {says}; it has the inputs {[s.name for s in self.card.inputs]}")
        named = tuple((name, self._named_input(name, rest[name])) for name in sorted(rest))
        self._check_complete(rest)
        return (*(([], False) if tokens is None else split_rows(tokens)), named)

    def _check_complete(self, given: Collection[str]) -> None:
        for spec in self.card.inputs:
            if spec.required and spec.name not in given:
                raise TraceError(f"{self.card.name!r} needs the input {spec.name!r} [{_shown(spec)}]: {spec.doc}")

    def _named_input(self, name: str, value: object) -> TensorData:
        import numpy as np

        from patchbay.tracing.arrays import numpy_dtype, to_data

        spec = next((s for s in self.card.inputs if s.name == name), None)
        if spec is None:
            known = ", ".join(s.name for s in self.card.inputs) or "none beside tokens"
            raise TraceError(f"{self.card.name!r} has no input {name!r} (it has: {known})")
        try:
            array = np.asarray(value).astype(numpy_dtype(spec.dtype), casting="same_kind", copy=False)
        except (TypeError, ValueError):
            raise TraceError(f"the input {name!r} is an array of {spec.dtype}, not {type(value).__name__}") from None
        pairs = list(zip(spec.dims, array.shape, strict=False))
        if array.ndim != len(spec.dims) or any(isinstance(d, int) and d != n for d, n in pairs):
            raise TraceError(f"the input {name!r} is [{_shown(spec)}], not {list(array.shape)}: {spec.doc}")
        if any(isinstance(d, str) and d != "rows" and n > self.card.n_ctx for d, n in pairs):
            raise TraceError(f"{self.card.name!r} takes at most {self.card.n_ctx} positions; {name!r} has more")
        if spec.below is not None and array.size and not 0 <= int(array.min()) <= int(array.max()) < spec.below:
            raise TraceError(f"the input {name!r} holds numbers outside 0 to {spec.below - 1}")
        return to_data(array)

    def _checked(self, given: Sequence[Text | Tokens], texts: Sequence[Tokens]) -> list[Tokens]:
        """`given` with its texts replaced by their tokens, each row checked against the card."""
        tokenized = iter(texts)
        rows = [next(tokenized) if isinstance(g, Text) else g for g in given]
        for number, row in enumerate(rows):
            self._check_row(row, f"row {number}" if len(rows) > 1 else "the input")
        return rows

    def _check_row(self, row: Tokens, what: str) -> None:
        card = self.card
        shown = f" {row.text!r}" if row.text is not None else ""
        if not row.ids:
            raise TraceError(f"{what}{shown} has no tokens")
        if len(row) > card.n_ctx:
            raise TraceError(f"{what} has {len(row)} tokens; {card.name!r} takes at most {card.n_ctx}")
        low, high = min(row.ids), max(row.ids)
        if low < 0 or high >= card.d_vocab:
            bad = low if low < 0 else high
            raise TraceError(f"{what} holds the token id {bad}; those of {card.name!r} go from 0 to {card.d_vocab - 1}")

    # --- running --------------------------------------------------------------------------------------------------

    async def execute(
        self,
        graph: Graph,
        options: ExecuteOptions,
        timeout_s: float | None,
        on_event: Callable[[Event], Any] | None = None,
    ) -> Outcome:
        """Runs a graph and gathers what it sends back."""
        transport = await self._connection.transport()
        sent, received = transport.bytes_sent, transport.bytes_received
        limit = self._connection.timeout_s if timeout_s is None else timeout_s
        values: dict[str, TensorValue] = {}
        usage: Usage | None = None
        async with aclosing(transport.execute(self.card.name, graph, options, timeout_s=limit)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, TensorValue):
                    values[event.name] = event
                elif isinstance(event, Done):
                    usage = event.usage
                if on_event is not None:
                    on_event(event)
        if usage is None:
            raise ProtocolError("the server ended the stream without saying that it was done")
        return Outcome(values, usage, transport.bytes_sent - sent, transport.bytes_received - received)

    async def run(
        self,
        graph: Graph,
        options: ExecuteOptions,
        timeout_s: float | None,
        on_event: Callable[[Event], Any] | None = None,
    ) -> Results:
        """Runs a graph that no trace of this process made; see `Model.run`."""
        from patchbay.ir.verify import verify
        from patchbay.tracing.arrays import to_array

        revision = getattr(graph, "revision", "")
        if revision and revision != self.card.revision:
            warnings.warn(
                f"the graph was made for {getattr(graph, 'model', '')!r} of revision {revision}; this is"
                f" {self.card.name!r} of revision {self.card.revision}: sites may mean the same, numbers will differ",
                stacklevel=2,
            )
        specs = verify(graph, self.card, self.card.limits).specs
        if not graph.outputs:
            return Results({})
        outcome = await self.execute(graph, options, timeout_s, on_event)
        arrays = {}
        for output in graph.outputs:
            if output.name not in outcome.values:
                raise ProtocolError(f"the server did not send {output.name!r}")
            value, spec = outcome.values[output.name].value, specs[output.node]
            if not isinstance(spec, TensorSpec) or (value.shape, value.dtype) != (spec.shape, spec.dtype):
                raise ProtocolError(f"the server sent {value.dtype}{list(value.shape)} as {output.name!r}, not {spec}")
            arrays[output.name] = to_array(value)
        nonfinite = tuple(name for name, value in outcome.values.items() if not value.finite)
        return Results(arrays, nonfinite, RunUsage.of(outcome.usage))

    async def price(self, graph: Graph, timeout_s: float | None) -> Price:
        """The server's own price for a graph."""
        outcome = await self.execute(graph, ExecuteOptions(dry_run=True), timeout_s)
        return Price.of(outcome.usage.cost)


def _shown(spec: InputSpec) -> str:
    """Its extents, for errors."""
    return ", ".join(map(str, spec.dims))


def split_rows(inputs: Input) -> tuple[list[Text | Tokens], bool]:
    """The rows of anything that a run takes, texts still as they are; and whether it was one row, not a list of rows.

    Raises:
        TraceError: it is none of the forms.
    """
    one = _row(inputs)
    if one is not None:
        return [one], True
    if hasattr(inputs, "ndim") and hasattr(inputs, "tolist"):
        if inputs.ndim not in (1, 2) or getattr(inputs.dtype, "kind", "i") not in "iu":
            raise TraceError(
                f"an array of token ids has integers and 1 or 2 axes, not {inputs.dtype}{list(inputs.shape)}"
            )
        return split_rows(inputs.tolist())
    if isinstance(inputs, Sequence) and not isinstance(inputs, (bytes, bytearray)):
        rows = [_row(item) for item in inputs]
        if rows and all(row is not None for row in rows):
            return [row for row in rows if row is not None], False
        if not rows:
            raise TraceError("a run needs at least one row; this list is empty")
    raise TraceError(
        "a run takes a text, a list of texts, a conversation (a list of {'role': ..., 'content': ...}), token ids, a"
        " list of lists of ids, an integer array or Tokens,"
        f" not {type(inputs).__name__} {repr(inputs)[:80]}"
    )


def _row(item: object) -> Text | Tokens | None:
    """One row: a text, a conversation, tokens or a sequence of ids; None when it is something else (rows, perhaps)."""
    if isinstance(item, str):
        return Text(item)
    if isinstance(item, Tokens):
        return item
    if (chat := chat_of(item)) is not None:
        return Text("", chat=chat)
    if getattr(item, "ndim", None) == 1 and hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, (list, tuple, range)) and item and all(_is_id(i) for i in item):
        return Tokens(tuple(int(i) for i in item))
    return None


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


class BaseModel:
    """What a model shows without waiting."""

    def __init__(self, core: ModelCore) -> None:
        self.core = core
        self.edits: tuple[Edit, ...] = ()

    def edited(self, edit: Edit) -> Self:
        """A model whose every trace applies `edit` to each run before anything else; this one stays as it is.

        Edits stack: ``model.edited(a).edited(b)`` applies `a`, then `b`. They live in this client; the server's model
        is not touched. Graphs that are run as they are (`run`) carry no edits.

        Args:
            edit: a function of a run that reads and writes its sites; what it returns is left alone.
        """
        if not callable(edit):
            raise TraceError(f"an edit is a function of a run, not {type(edit).__name__}")
        other = copy.copy(self)
        other.edits = (*self.edits, edit)
        return other

    @property
    def card(self) -> ModelCard:
        """Widths, sites (absent ones with the reason), callables and limits."""
        return self.core.card

    @property
    def name(self) -> str:
        """The name that it is served under."""
        return self.core.card.name

    @property
    def params(self) -> ModelParams:
        """The weights by name, to stand beside values of any trace: ``model.params["blocks.3.attn.W_O"]``."""
        from patchbay.tracing.params import ModelParams

        return ModelParams(self.core.card)

    def __repr__(self) -> str:
        shown = describe_model(self.core.card)
        if not self.edits:
            return shown
        from patchbay.tracing.trace import edit_name

        return f"{shown}\n  edited by: {', '.join(map(edit_name, self.edits))}"


class Model(BaseModel):
    """A model whose calls block."""

    def __init__(
        self,
        core: ModelCore,
        portal: Portal,
        owner: object,
    ) -> None:
        super().__init__(core)
        self._portal = portal
        self._owner = owner  # the client: it must outlive its models

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine of the core in the client's thread."""
        return self._portal.run(work)

    def wait_with_events(
        self,
        make: Callable[[Callable[[Event], None] | None], Coroutine[Any, Any, T]],
        on_event: Callable[[Event], Any] | None,
    ) -> T:
        """Like `wait`; events reach `on_event` in the calling thread."""
        return self._portal.run(make(None)) if on_event is None else self._portal.run_with_events(make, on_event)

    @overload
    def tokenize(self, text: str, *, add_special_tokens: bool = True, prepend_bos: bool | None = None) -> Tokens: ...

    @overload
    def tokenize(
        self, text: list[str] | tuple[str, ...], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> list[Tokens]: ...

    def tokenize(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> Tokens | list[Tokens]:
        """Tokens of a text (or of each of several): ids, strings, offsets.

        Args:
            text: the text, or several.
            add_special_tokens: whether the tokenizer adds what it adds by itself.
            prepend_bos: whether each begins with the beginning-of-sequence token; None leaves it to the tokenizer.
        """
        given = [text] if isinstance(text, str) else text
        texts = [Text(t, add_special_tokens, prepend_bos) for t in given]
        rows = self.wait(self.core.tokenize(texts))
        return rows[0] if isinstance(text, str) else rows

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The text of each token id, as the tokenizer shows it; takes integer arrays too.

        Raises:
            RequestRangeError: an id outside the vocabulary.
        """
        return self.wait(self.core.token_strings([operator.index(i) for i in ids]))

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token, special tokens aside.

        Raises:
            TraceError: it is several tokens, or none.
        """
        return self.wait(self.core.token_id(text))

    token_id = to_single_token

    def run(
        self,
        graph: Graph,
        *,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> Results:
        """Runs a graph as it is, such as one from `patchbay.load_graph`.

        Args:
            graph: the graph.
            deterministic, disabled, timeout_s, progress: as for `trace`.

        Returns:
            An array for each of the graph's outputs, by name; ``.usage`` says what they cost.

        Raises:
            GraphError: the graph breaks a rule for this model; raised before anything is sent, or by the server.
            ServiceError: the server, or the way to it, failed.
        """
        options = ExecuteOptions(deterministic=deterministic, disabled=tuple(disabled))
        return self.wait_with_events(lambda emit: self.core.run(graph, options, timeout_s, emit), progress)

    @overload
    def trace(
        self,
        inputs: None = None,
        *,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> Trace: ...

    @overload
    def trace(
        self,
        inputs: Input,
        *,
        prepend_bos: bool | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> RunTrace: ...

    def trace(
        self,
        inputs: Input | None = None,
        *,
        prepend_bos: bool | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> Trace | RunTrace:
        """A trace: inside the ``with`` block a graph is built, on leaving it is run.

        Args:
            inputs: of the one run (see `Trace.run`); left out, the block makes its runs with ``t.run(...)``.
            prepend_bos: whether its texts begin with the beginning-of-sequence token; None leaves it to the tokenizer.
            deterministic: run alone and one run at a time, bit for bit like the same forwards done by hand.
            disabled: names of the engine's optimisations to leave out.
            timeout_s: seconds the execution may take; the client's own by default.
            progress: called with every event of the execution, in this thread.
        """
        from patchbay.tracing import trace as tracing

        options = ExecuteOptions(deterministic=deterministic, disabled=tuple(disabled))
        if inputs is not None and prepend_bos is not None:
            inputs = WithBos(inputs, prepend_bos)
        kind = tracing.Trace if inputs is None else tracing.RunTrace
        return kind(self, options=options, timeout_s=timeout_s, progress=progress, first=inputs)

    def generate(
        self,
        inputs: Input,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: Any = (),
        eos: bool = True,
        seed: int | None = None,
        stream: StreamCallback | None = None,
        label: str | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> GenerateTrace:
        """Generates tokens: ``with model.generate(text, max_new_tokens=20) as run`` gives the run to read and write at.

        Args:
            inputs: a prompt or a list of them (see `Trace.run`).
            max_new_tokens: tokens that each row gets at most.
            temperature: what logits are divided by before a token is drawn; None or 0 takes the most likely token.
            top_p: draw from the fewest of the most likely tokens that together have this probability.
            top_k: draw from this many of the most likely tokens.
            stop: texts, token ids or sequences of ids that end a row; they stay in it. A text is tokenized by itself.
            eos: whether the model's own end-of-text tokens end a row too.
            seed: of the random numbers; one is made up, and kept in ``run.generation.seed``, where none is given. Row
                i of a list equals the same prompt alone with ``seed + i``.
            stream: called with each step and its tokens, one id per row, as they appear.
            label, deterministic, disabled, timeout_s, progress: as for `trace`.

        Returns:
            A context manager that gives a `patchbay.tracing.generation.GeneratingRun`; ``run.text`` and ``run.output``
            hold what was generated, below the block.
        """
        from patchbay.tracing import trace as tracing

        how = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": stop,
            "eos": eos,
            "seed": seed,
            "label": label,
        }
        options = ExecuteOptions(deterministic=deterministic, disabled=tuple(disabled))
        return tracing.GenerateTrace(
            self, how=how, stream=stream, options=options, timeout_s=timeout_s, progress=progress, first=inputs
        )


class AsyncModel(BaseModel):
    """A model whose calls are awaited."""

    @overload
    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> Tokens: ...

    @overload
    async def tokenize(
        self, text: list[str] | tuple[str, ...], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> list[Tokens]: ...

    async def tokenize(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> Tokens | list[Tokens]:
        """Tokens of a text (or of each of several): ids, strings, offsets.

        Args:
            text: the text, or several.
            add_special_tokens: whether the tokenizer adds what it adds by itself.
            prepend_bos: whether each begins with the beginning-of-sequence token; None leaves it to the tokenizer.
        """
        given = [text] if isinstance(text, str) else text
        texts = [Text(t, add_special_tokens, prepend_bos) for t in given]
        rows = await self.core.tokenize(texts)
        return rows[0] if isinstance(text, str) else rows

    async def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The text of each token id, as the tokenizer shows it; see `Model.token_strings`."""
        return await self.core.token_strings([operator.index(i) for i in ids])

    async def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token; see `Model.to_single_token`."""
        return await self.core.token_id(text)

    token_id = to_single_token

    async def run(
        self,
        graph: Graph,
        *,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> Results:
        """Runs a graph as it is; see `Model.run`."""
        options = ExecuteOptions(deterministic=deterministic, disabled=tuple(disabled))
        return await self.core.run(graph, options, timeout_s, progress)

    @overload
    def trace(
        self,
        inputs: None = None,
        *,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> AsyncTrace: ...

    @overload
    def trace(
        self,
        inputs: Input,
        *,
        prepend_bos: bool | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> AsyncRunTrace: ...

    def trace(
        self,
        inputs: Input | None = None,
        *,
        prepend_bos: bool | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> AsyncTrace | AsyncRunTrace:
        """A trace for ``async with``; see `Model.trace`. `progress` is called in the event loop."""
        from patchbay.tracing import trace as tracing

        options = ExecuteOptions(deterministic=deterministic, disabled=tuple(disabled))
        if inputs is not None and prepend_bos is not None:
            inputs = WithBos(inputs, prepend_bos)
        kind = tracing.AsyncTrace if inputs is None else tracing.AsyncRunTrace
        return kind(self, options=options, timeout_s=timeout_s, progress=progress, first=inputs)

    def generate(
        self,
        inputs: Input,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: Any = (),
        eos: bool = True,
        seed: int | None = None,
        stream: StreamCallback | None = None,
        label: str | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> AsyncGenerateTrace:
        """Generates tokens; see `Model.generate`."""
        from patchbay.tracing import trace as tracing

        how = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": stop,
            "eos": eos,
            "seed": seed,
            "label": label,
        }
        options = ExecuteOptions(deterministic=deterministic, disabled=tuple(disabled))
        return tracing.AsyncGenerateTrace(
            self, how=how, stream=stream, options=options, timeout_s=timeout_s, progress=progress, first=inputs
        )


def describe_model(card: ModelCard) -> str:
    """Layers, widths, dtype, and the sites as a compact tree."""
    heads = f"{card.n_heads} heads" + (f" ({card.n_kv_heads} key-value)" if card.n_kv_heads != card.n_heads else "")
    lines = [
        f"{card.name}: {card.family}, {card.n_params:,} parameters, {card.dtype}, from {card.source}",
    ]
    widths = f"{card.n_layers} layers, d_model {card.d_model}, {heads} of {card.d_head}, d_mlp {card.d_mlp}"
    lines.append(f"  {widths}, vocabulary {card.d_vocab:,}, context {card.n_ctx:,}")
    groups: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
    modules = absent = 0
    for site in card.sites:
        if site.absent is not None:
            absent += 1
        elif is_module_site(site.name):
            modules += 1
        else:
            name = re.sub(r"\.\d+\.", "[i].", site.name, count=1)
            group, _, leaf = name.rpartition(".")
            groups.setdefault(group, OrderedDict())[leaf] = None
    if "" in groups:
        lines.append(f"  {', '.join(groups.pop(''))}")
    lines += [f"  {group}: {', '.join(leaves)}" for group, leaves in groups.items()]
    if modules:
        lines.append(f"  {modules} module sites: run.module(path).output, .input")
    if card.callables:
        lines.append("  callable: " + ", ".join(c.name for c in card.callables))
    if absent:
        lines.append(f"  {absent} canonical sites absent (reasons in model.card.sites)")
    return "\n".join(lines)
