"""What a model's object does that may wait for its server, as coroutines: tokens, inputs, executions, prices."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from patchbay.artifacts import StoredArtifacts
from patchbay.errors import NotFoundError, ProtocolError, TraceError
from patchbay.inputs import Chat, Text, WithBos, chat_of
from patchbay.ir.artifacts import NOT_THERE, ArtifactInfo
from patchbay.ir.card import InputSpec, ModelCard
from patchbay.ir.events import Done, Event, ExecuteOptions, Kept, TensorValue, TokenizedRow, Usage
from patchbay.ir.ops.spec import TensorSpec
from patchbay.results import Price, Results, RunUsage
from patchbay.tokens import Tokens

if TYPE_CHECKING:
    from patchbay.client import Connection
    from patchbay.ir.graph import Graph, TensorData
    from patchbay.tracing.namespaces import SiteTree
    from patchbay.tracing.trace import Input

_CACHED_TEXTS = 4096
#: Under this name a dict of inputs holds the text or token ids.
TOKENS = "text"


@dataclass(frozen=True)
class Outcome:
    """What an execution gave."""

    values: dict[str, TensorValue]
    kept: dict[str, ArtifactInfo]
    nonfinite: tuple[str, ...]
    usage: Usage
    sent_bytes: int = 0
    received_bytes: int = 0


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

    @property
    def stored(self) -> StoredArtifacts:
        """The artifacts of this connection."""
        return self._connection.artifacts

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

    def known_tokens(self, text: Text) -> Tokens | None:
        """Tokens of a text that were asked for before; None otherwise."""
        return self._texts.get(text)

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
            known = ", ".join(s.name for s in self.card.inputs)
            also = f", beside {known}" if known else ""
            says = f"takes a text or token ids, under {TOKENS!r}{also}" if self.card.takes_tokens else "takes no tokens"
            says += "" if self.card.takes_tokens else f"; it takes: {known}"
            raise TraceError(f"{self.card.name!r} {says}; this dict has {', '.join(map(repr, inputs)) or 'nothing'}")
        named = tuple((name, self._named_input(name, rest[name])) for name in sorted(rest))
        self._check_complete(rest)
        return (*(([], False) if tokens is None else split_rows(tokens)), named)

    def _check_complete(self, given: Collection[str]) -> None:
        for spec in self.card.inputs:
            if spec.required and spec.name not in given:
                raise TraceError(f"{self.card.name!r} needs the input {spec.name!r} [{_shown(spec)}]: {spec.doc}")

    def _named_input(self, name: str, value: object) -> TensorData:
        import numpy as np

        from patchbay.arrays import numpy_dtype, to_data

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
            self.check_row(row, f"row {number}" if len(rows) > 1 else "the input")
        return rows

    def check_row(self, row: Tokens, what: str) -> None:
        """
        Raises:
            TraceError: the model cannot take these tokens; the message begins with `what`.
        """
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
        """Runs a graph and gathers what it sends back; constants that are large travel beside it, once."""
        transport = await self._connection.transport()
        before = (transport.bytes_sent, transport.bytes_received)
        limits = self.card.limits
        named = await self.stored.named(graph, self.card.name, limits)
        try:
            outcome = await self._execute(named, options, timeout_s, on_event)
        except NotFoundError as error:
            if error.reason != NOT_THERE:
                raise
            if error.metadata.get("digest") not in self.stored.uploaded(graph, named):
                raise self.stored.explain(error, graph) from None
            # It was there once, and has expired or given way to others. Nothing has been handed on by then.
            named = await self.stored.named(graph, self.card.name, limits, again=True)
            outcome = await self._execute(named, options, timeout_s, on_event)
        traffic = (transport.bytes_sent - before[0], transport.bytes_received - before[1])
        return replace(outcome, sent_bytes=traffic[0], received_bytes=traffic[1])

    async def _execute(
        self,
        graph: Graph,
        options: ExecuteOptions,
        timeout_s: float | None,
        on_event: Callable[[Event], Any] | None,
    ) -> Outcome:
        transport = await self._connection.transport()
        limit = self._connection.timeout_s if timeout_s is None else timeout_s
        values: dict[str, TensorValue] = {}
        kept: dict[str, ArtifactInfo] = {}
        nonfinite: list[str] = []
        usage: Usage | None = None
        async with aclosing(transport.execute(self.card.name, graph, options, timeout_s=limit)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, (TensorValue, Kept)) and not event.finite:
                    nonfinite.append(event.name)
                if isinstance(event, TensorValue):
                    values[event.name] = event
                elif isinstance(event, Kept):
                    kept[event.name] = event.artifact
                elif isinstance(event, Done):
                    usage = event.usage
                if on_event is not None:
                    on_event(event)
        if usage is None:
            raise ProtocolError("the server ended the stream without saying that it was done")
        return Outcome(values, kept, tuple(nonfinite), usage)

    async def run(
        self,
        graph: Graph,
        options: ExecuteOptions,
        timeout_s: float | None,
        on_event: Callable[[Event], Any] | None = None,
    ) -> Results:
        """Runs a graph that no trace of this process made; see `Model.run`."""
        from patchbay.arrays import to_array
        from patchbay.ir.verify import verify
        from patchbay.tracing.artifacts import Artifact

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
        arrays: dict[str, Any] = {}
        for output in graph.outputs:
            if output.keep:
                spec = specs[output.node]
                assert isinstance(spec, TensorSpec)
                arrays[output.name] = Artifact.awaited(self.stored, spec.dtype, spec.shape, output.name)
                arrays[output.name].arrive(outcome.kept.get(output.name))
                continue
            if output.name not in outcome.values:
                raise ProtocolError(f"the server did not send {output.name!r}")
            value, spec = outcome.values[output.name].value, specs[output.node]
            if not isinstance(spec, TensorSpec) or (value.shape, value.dtype) != (spec.shape, spec.dtype):
                raise ProtocolError(f"the server sent {value.dtype}{list(value.shape)} as {output.name!r}, not {spec}")
            arrays[output.name] = to_array(value)
        return Results(arrays, outcome.nonfinite, RunUsage.of(outcome.usage))

    async def traffic(self) -> tuple[int, int]:
        """Payload bytes sent and received over the connection so far."""
        transport = await self._connection.transport()
        return transport.bytes_sent, transport.bytes_received

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
    from patchbay.tracing.proxy import Proxy

    if isinstance(inputs, Proxy):
        raise TraceError(
            f"{inputs!r} is known after the trace has run, and a run's tokens must be known before it: "
            "make another trace with them (below the block run.output has what was generated)"
        )
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
    if isinstance(item, (list, tuple, range)) and item and (set(map(type, item)) == {int} or all(map(_is_id, item))):
        return Tokens(tuple(map(int, item)))
    return None


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0
