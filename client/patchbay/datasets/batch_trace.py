"""The trace of one batch's graph, and the runs in it.

What depends on the rows' contents (lengths, token ids, columns, places of words) is a value of the trace there, behind
which stands a constant that each batch fills in. So a graph that is traced for one batch fits all of its shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from patchbay.arrays import to_data
from patchbay.core import TOKENS
from patchbay.datasets import cells
from patchbay.datasets.axes import StepsOf, TokensOf
from patchbay.datasets.batching import PROMPT, Asked, Batch, Key, Row, Span
from patchbay.datasets.cells import Fill
from patchbay.datasets.columns import BatchRows, Column
from patchbay.datasets.reducers import Samples, StepSamples
from patchbay.errors import TraceError
from patchbay.inputs import Text
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.graph import Generation
from patchbay.ir.graph import Run as GraphRun
from patchbay.places import located
from patchbay.results import Price
from patchbay.tokens import Tokens
from patchbay.tracing.generation import GeneratingRun, How, check_how, settled, stop_texts
from patchbay.tracing.proxy import Proxy
from patchbay.tracing.runs import Run
from patchbay.tracing.trace import BaseTrace

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from patchbay.core import ModelCore, RunInputs
    from patchbay.model import Edit


class UntoldError(Exception):
    """The function needs tokens that have not been asked for yet; whoever traces asks for them, and traces again.

    Attributes:
        asked: of a column of every row; None where it is something else.
        inputs: what is the same for every batch; None likewise.
    """

    def __init__(self, asked: Asked | None = None, inputs: Any = None) -> None:
        super().__init__("tokens are not known yet")
        self.asked = asked
        self.inputs = inputs


@dataclass(frozen=True)
class Over:
    """What a run of every batch is made over.

    Attributes:
        key: the column of its prompt; None where it has none.
        inputs: columns of its further inputs, by name.
        generation: how it goes on.
    """

    key: Key | None
    inputs: Mapping[str, Key] = field(default_factory=dict)
    generation: Generation | None = None


def graph_run(core: ModelCore, batch: Batch, over: Over, label: str) -> GraphRun:
    """A run over the rows of a batch. Rows that draw tokens do so with the seed and their place in the data set."""
    generation = over.generation
    if generation is not None and generation.temperature:
        generation = replace(generation, seed=generation.seed + batch.rows[0].number)
    prompts = [] if over.key is None else [row.prompts[over.key] for row in batch.rows]
    if not over.inputs:
        return GraphRun(tuple(tokens.ids for tokens in prompts), label, generation=generation)
    named: dict[str, Any] = {name: cells.stacked(batch, key) for name, key in over.inputs.items()}
    if prompts:
        named[TOKENS] = prompts
    known = core.known_inputs_of(named)
    assert known is not None  # no text among them, so nothing to ask for
    return GraphRun(tuple(row.ids for row in known.rows), label, known.named, generation)


class BatchTrace(BaseTrace):
    """The trace of one batch's graph; it is never executed by itself.

    Args:
        core: the model.
        edits: of the model.
        batch: the rows that it is traced for.
        first: row of the data set.
        asked: tokens that the rows have.
        more_steps: how many tokens more each generating run makes than it was told to, by their order.

    Attributes:
        over: for each run over the rows, what it is made over.
        concrete: whether the function looked at the tokens themselves, so that its graph fits no other batch.
        returned: what the function returned.
    """

    def __init__(
        self,
        core: ModelCore,
        edits: Sequence[Edit],
        batch: Batch,
        first: Row,
        asked: Mapping[Asked, None],
        more_steps: Sequence[int] = (),
    ) -> None:
        super().__init__(core, options=ExecuteOptions(), timeout_s=None, progress=None)
        self._edits = tuple(edits)
        self._asked = asked
        self._more_steps = list(more_steps)
        self.batch = batch
        self.first = first
        self.concrete = False
        self.fills: dict[int, Fill] = {}
        self.over: dict[int, Over] = {}
        self.returned: Mapping[str, Any] = {}
        self._late: dict[object, Proxy] = {}

    # --- what the function calls --------------------------------------------------------------------------------------

    @located
    def run(self, inputs: Any, *, label: str | None = None) -> Run:
        """Adds a forward over the rows.

        Args:
            inputs: a column of the rows (``rows["clean"]``); for a model with other inputs a dict of columns by the
                inputs' names; or what any trace takes, the same for every batch.
            label: what to call it in errors and printed graphs.

        Raises:
            TraceError: a column that holds no prompts.
        """
        over = self._over(inputs)
        return self._fixed(inputs, label) if over is None else self.run_over(over, label)

    @located
    def generate(
        self, inputs: Any, *, max_new_tokens: int, label: str | None = None, **how: Unpack[How]
    ) -> GeneratingRun:
        """Adds a run that generates tokens after a column of the rows; the arguments are those of `Model.generate`.

        Row i of the data set draws its tokens with ``seed + i``, whatever batch it is in.

        Raises:
            TraceError: tokens are to be drawn, and there is no seed.
        """
        check_how(max_new_tokens, how)
        if how.get("temperature") and how.get("seed") is None:
            raise TraceError(
                "generate in a map draws tokens (temperature) and has no seed: give seed=, so that every row draws the"
                " same tokens whatever batch it is in, and when the map is taken up again"
            )
        texts = {text: self.tokens_of(text).ids for text in stop_texts(how)}
        generation = settled(max_new_tokens, how, texts)
        order = sum(r.generation is not None for r in self.builder.runs)
        if order < len(self._more_steps):
            generation = replace(generation, max_new_tokens=generation.max_new_tokens + self._more_steps[order])
        over = self._over(inputs)
        made = (
            self._fixed(inputs, label, generation)
            if over is None
            else self.run_over(replace(over, generation=generation), label)
        )
        assert isinstance(made, GeneratingRun)
        return made

    @located
    def save(self, *unnamed: Any, **trees: Any) -> None:
        """Not in a map: what the function returns is what comes back."""
        shown = ", ".join(f"{name!r}: ..." for name in trees) or "'name': ..."
        raise TraceError(f"in a map return what you want from the function: return {{{shown}}}")

    @located
    def save_proxy(self, proxy: Proxy, name: str | None) -> None:
        """Not in a map either."""
        del proxy
        raise TraceError(f"in a map return what you want from the function: return {{{name or 'name'!r}: value}}")

    @located
    def keep(self, name: str, tree: Any) -> Any:
        """Not in a map: `keep=True` leaves what the function returns on the server."""
        raise TraceError(f"in a map return {{{name!r}: value}} from the function, and call map(..., keep=True)")

    # --- runs ---------------------------------------------------------------------------------------------------------

    def default(self) -> Over:
        """What a run is made over that is not told."""
        if self._core.card.takes_tokens:
            return self._prompt(PROMPT)
        names = [spec.name for spec in self._core.card.inputs]
        inputs = {name: name for name in names if name in self.first.columns}
        if not inputs:
            raise TraceError(
                f"row {self.first.number} of the data set has none of the model's inputs: {', '.join(names)}"
            )
        return Over(None, inputs)

    def _over(self, inputs: Any) -> Over | None:
        """What a run over columns is made over; None for what is the same in every batch."""
        if isinstance(inputs, BatchRows):
            return self.default()
        if isinstance(inputs, Column):
            if self._core.card.takes_tokens:
                return self._prompt(inputs.key)
            names = [spec.name for spec in self._core.card.inputs]
            if len(names) > 1:
                raise TraceError(f"{self.builder.card.name!r} takes {', '.join(names)}: give a dict of columns by name")
            return Over(None, {names[0]: inputs.key})
        if isinstance(inputs, Mapping) and any(isinstance(value, Column) for value in inputs.values()):
            if not all(isinstance(value, Column) for value in inputs.values()):
                raise TraceError("the inputs of a run over the rows are columns, all of them")
            named = {name: column.key for name, column in inputs.items()}
            prompt = named.pop(TOKENS, None)
            return replace(Over(None) if prompt is None else self._prompt(prompt, named), inputs=named)
        if isinstance(inputs, Proxy):
            raise TraceError("a run is made over a column of the rows (rows['clean']) or over a text, not over a value")
        return None

    def _prompt(self, key: Key, inputs: Collection[str] = ()) -> Over:
        needed = [spec.name for spec in self._core.card.inputs if spec.required and spec.name not in inputs]
        if needed:
            raise TraceError(
                f"{self.builder.card.name!r} needs {', '.join(needed)} beside tokens: make its runs over a dict of"
                f" columns, t.run({{{TOKENS!r}: rows[...], {needed[0]!r}: rows[...]}})"
            )
        self.first.value(key)
        self.ask(Asked(key))
        return Over(key)

    def run_over(self, over: Over, label: str | None = None) -> Run:
        """A run over the batch's rows."""
        shown = f"{len(self.batch.rows)} rows of the data set" if over.key in (None, PROMPT) else f"rows[{over.key!r}]"
        data = graph_run(self._core, self.batch, over, shown if label is None else label)
        tokens = [] if over.key is None else [row.prompts[over.key] for row in self.batch.rows]
        index = self.builder.add_run(data)
        self.over[index] = over
        kind = BatchRun if over.generation is None else BatchGeneratingRun
        run = kind(self, index, tokens, False)
        for edit in self._edits:
            edit(run)
        return run

    def _fixed(self, inputs: Any, label: str | None, generation: Generation | None = None) -> Run:
        """A run over what is the same in every batch."""
        given = self._core.known_inputs_of(inputs)
        if given is None:
            raise UntoldError(inputs=inputs)
        return self._add_run(given, label, generation)

    def _add_run(self, given: RunInputs, label: str | None, generation: Generation | None = None) -> Run:
        run = super()._add_run(given, label, generation)
        self._outputs.clear()  # nobody asks for what a generating run generated unless the function returns it
        return run

    def spans(self) -> tuple[list[Span], int, int]:
        """The runs over the rows; and the rows and positions of those that are the same in every batch."""
        spans, rows, positions = [], 0, 0
        for index, run in enumerate(self.builder.runs):
            over = self.over.get(index)
            if over is not None:
                spans.append(Span(over.key, run.positions - run.seq))
            elif self.concrete and run.rows == len(self.batch.rows):  # the rows with a continuation behind them
                key = next(iter(self.batch.rows[0].prompts), None)
                spans.append(Span(key, run.positions - self.batch.seq, every=False))
            else:
                rows += run.rows
                positions += run.rows * run.positions
        return spans, rows, positions

    # --- what depends on the rows -------------------------------------------------------------------------------------

    def ask(self, asked: Asked) -> None:
        """Sees to it that the rows have these tokens."""
        if asked not in self._asked:
            raise UntoldError(asked)

    def tokens_of(self, text: str) -> Tokens:
        wanted = Text(text, special=False)
        known = self._core.known_tokens(wanted)
        if known is None:
            raise UntoldError(inputs=wanted)
        return known

    def column(self, key: Key) -> Column:
        """A column of the rows."""
        self.first.value(key)
        return Column(self, key)

    def late(self, key: object, fill: Fill) -> Proxy:
        """A constant that each batch fills in; one for equal keys."""
        if key not in self._late:
            data = to_data(fill(self.batch))
            self.fills[id(data)] = fill  # the node holds the object, so the id stays its own
            self._late[key] = Proxy(self, self.builder.add("const", (), {"value": data}))
        return self._late[key]

    @property
    def row_numbers(self) -> Proxy:
        """Places in the data set, int64 [rows]."""
        return self.late("rows", cells.row_numbers)

    def lengths_of(self, key: Key | None) -> Proxy:
        """Tokens of each row's prompt, int64 [rows]."""
        if key is None:
            raise TraceError(f"{self.builder.card.name!r} takes no tokens: its rows have no lengths, mask or ids")
        return self.late(("lengths", key), lambda batch: cells.lengths(batch, key))

    def mask_of(self, key: Key | None) -> Proxy:
        """True at tokens, bool [rows, seq]."""
        import numpy as np

        scopes = self.builder._scopes
        name = ("mask", key, None if scopes is None else scopes.current)  # what a loop's body makes exists only there
        if name not in self._late:
            lengths, seq = self.lengths_of(key), self.batch.seq_of(key)
            self._late[name] = self.constant(np.arange(seq)) >= (seq - lengths)[:, None]
        return self._late[name]

    def ids_of(self, key: Key | None) -> Proxy:
        """Token ids, int64 [rows, seq]; 0 at padding."""
        if key is None:
            return self.lengths_of(key)
        found: Proxy = self.late(("ids", key), lambda batch: cells.ids(batch, key)).astype("int64")
        return found

    def samples(self, along: TokensOf | StepsOf | None) -> Samples:
        """What a reduction over tokens, steps or rows folds."""
        stride = self.builder.card.n_ctx
        if isinstance(along, TokensOf):
            key = along.key
            return Samples(
                self, self.row_numbers, self.lengths_of(key), self.mask_of(key), lambda: self.ids_of(key), stride
            )
        if isinstance(along, StepsOf):
            made = GeneratingRun(self, along.run, (), False).generated
            mask = made >= 0
            return StepSamples(self, self.row_numbers, mask.astype("int64").sum(axis=1), mask, lambda: made, stride)
        return Samples(self, self.row_numbers, None, None, None, stride)

    def estimate(self, *, remote: bool = False) -> Price:
        """The graph's price; always worked out on this side."""
        del remote
        return self._local_estimate()

    def __repr__(self) -> str:
        size = f"{len(self.builder.runs)} runs, {len(self.builder.nodes)} nodes"
        return f"<trace of {len(self.batch.rows)} rows of the data set: {size}>"


class _OverRows:
    """What is known of the rows that a run is made over, as values of the trace."""

    __slots__ = ()

    if TYPE_CHECKING:
        _trace: BatchTrace
        _run_index: int
        _row_tokens: tuple[Tokens, ...]

    @property
    def _key(self) -> Key | None:
        return self._trace.over[self._run_index].key

    @property
    @located
    def mask(self) -> Any:
        """True at tokens, False at the padding on the left of shorter rows: bool [rows, seq]."""
        return self._trace.mask_of(self._key)

    @property
    @located
    def ids(self) -> Proxy:
        """Token ids, int64 [rows, seq]; 0 at padding."""
        return self._trace.ids_of(self._key)

    @property
    @located
    def lengths(self) -> Proxy:
        """Tokens of each row, int64 [rows]."""
        return self._trace.lengths_of(self._key)

    @property
    def row_numbers(self) -> Proxy:
        """Places of the rows in the data set, from 0, int64 [rows]."""
        return self._trace.row_numbers

    @located
    def column(self, name: Key, values: Sequence[Any] | None = None) -> Any:
        """A column of the rows; see `BatchRows.column`."""
        return BatchRows(self._trace).column(name, values)

    def again(self) -> BatchRun:
        """Another forward over the same rows, to compare an intervention with none."""
        run = self._trace.run_over(replace(self._trace.over[self._run_index], generation=None))
        assert isinstance(run, BatchRun)
        return run

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """The tokens themselves. A function that looks at them is traced for each batch anew; `ids` costs less."""
        self._trace.concrete = True
        return self._row_tokens

    @located
    def position(self, substring: Any, *, occurrence: int | None = None) -> Any:
        """Where a text ends in each row, counted along the sequence axis, int64 [rows]; see `Run.position`.

        Args:
            substring: a text, or a column of texts, one for each row.
            occurrence: which one, when it stands there several times.
        """
        key, own = self._key, isinstance(substring, Column)
        word = substring.key if own else substring
        return self._trace.late(
            ("position", key, own, word, occurrence),
            lambda batch: cells.positions(batch, key, word, own, occurrence),
        )


class BatchRun(_OverRows, Run):
    """A run over one batch of a data set. It also has what is known of its rows, as values of the trace."""

    __slots__ = ()

    if TYPE_CHECKING:
        _trace: BatchTrace  # type: ignore[assignment]

    @located
    def logprob(self, text: Any, *, occurrence: int | None = None, append: bool | None = None) -> Proxy:
        """How likely the model finds a text in each row, [rows]; see `Run.logprob`. Traced for each batch anew.

        Args:
            text: as for `Run.logprob`, or a column of texts or token ids, one for each row, which are appended.
            occurrence, append: as for `Run.logprob`.
        """
        self._trace.concrete = True
        if isinstance(text, Column):
            text, append = text.pieces(), True
        return super().logprob(text, occurrence=occurrence, append=append)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), "again", "column", "ids", "lengths", "row_numbers"})


class BatchGeneratingRun(_OverRows, GeneratingRun):
    """A generating run over one batch of a data set."""

    __slots__ = ()

    if TYPE_CHECKING:
        _trace: BatchTrace  # type: ignore[assignment]

    @property
    def text(self) -> Any:
        """Stands for the texts that were generated: returned from the function, it comes back as one for each row."""
        return GeneratedText(self.generated)

    @property
    @located
    def output(self) -> Any:
        """Not in a map."""
        raise TraceError(
            "in a map return run.text or run.generated (token ids, [rows, max_new_tokens]) from the function"
        )


@dataclass(frozen=True)
class GeneratedText:
    """A leaf that stands for texts.

    Attributes:
        ids: their token ids, [rows, max_new_tokens]; -1 behind each one's last.
    """

    ids: Proxy
