"""A hosted model as an object: its card, its tokenizer, and traces over it.

`patchbay.core.ModelCore` does the talking, as coroutines; `Model` waits for it in the client's thread, `AsyncModel`
awaits it.
"""

from __future__ import annotations

import abc
import re
from collections import OrderedDict
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, overload

from patchbay import arguments
from patchbay.core import ModelCore
from patchbay.errors import TraceError
from patchbay.inputs import ids_of, texts_of, with_bos
from patchbay.ir.card import ModelCard
from patchbay.ir.events import Event
from patchbay.ir.sites import is_module_site
from patchbay.places import located
from patchbay.results import Results
from patchbay.tokens import Tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Self, Unpack

    from patchbay.artifacts import Artifacts
    from patchbay.datasets.entry import MapFunction, MapHow
    from patchbay.datasets.results import MapResults
    from patchbay.ir.graph import Graph
    from patchbay.portal import Portal
    from patchbay.tracing.async_trace import AsyncGenerateTrace, AsyncRunTrace, AsyncTrace
    from patchbay.tracing.params import ModelParams
    from patchbay.tracing.proxy import Proxy
    from patchbay.tracing.runs import Run
    from patchbay.tracing.sync_trace import GenerateTrace, RunTrace, Trace
    from patchbay.tracing.trace import Input, ProgressCallback, StreamCallback

T = TypeVar("T")
TraceT = TypeVar("TraceT")
RunTraceT = TypeVar("RunTraceT")
GenerateTraceT = TypeVar("GenerateTraceT")
#: A function of a `Run`, applied to every run of an edited model.
Edit: TypeAlias = "Callable[[Run], object]"


class BaseModel(abc.ABC, Generic[TraceT, RunTraceT, GenerateTraceT]):
    """What a model shows without waiting, and the traces over it."""

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
        arguments.check_function("edited: an edit", edit, "run")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.edits = (*self.edits, edit)
        return other

    @abc.abstractmethod
    def _traces(self) -> tuple[Callable[..., TraceT], Callable[..., RunTraceT], Callable[..., GenerateTraceT]]:
        """What makes its traces: of many runs, of one, of one that generates."""

    @property
    def card(self) -> ModelCard:
        """Widths, sites (absent ones with the reason), callables and limits."""
        return self.core.card

    @property
    def name(self) -> str:
        """The name that it is served under."""
        return self.core.card.name

    @property
    def artifacts(self) -> Artifacts:
        """Tensors of yours that stay on this model's server."""
        from patchbay.artifacts import Artifacts

        return Artifacts(self.core.stored)

    @property
    def params(self) -> ModelParams:
        """The weights by name, to stand beside values of any trace: ``model.params["blocks.3.attn.W_O"]``."""
        from patchbay.tracing.params import ModelParams

        return ModelParams(self.core.card)

    @overload
    def trace(
        self,
        inputs: None = None,
        *,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> TraceT: ...

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
    ) -> RunTraceT: ...

    def trace(
        self,
        inputs: Input | None = None,
        *,
        prepend_bos: bool | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> TraceT | RunTraceT:
        """A trace: inside the ``with`` block a graph is built, on leaving it is run (an `AsyncModel`: ``async with``).

        Args:
            inputs: of the one run (see `Trace.run`); left out, the block makes its runs with ``t.run(...)``.
            prepend_bos: whether its texts begin with the beginning-of-sequence token; None leaves it to the tokenizer.
            deterministic: run alone and one run at a time, bit for bit like the same forwards done by hand.
            disabled: names of the engine's optimisations to leave out.
            timeout_s: seconds the execution may take; the client's own by default.
            progress: called with every event of the execution, in this thread (in the event loop, of an `AsyncModel`).
        """
        how = self._how(deterministic, disabled, timeout_s, progress)
        many, one, _ = self._traces()
        if inputs is not None:
            return one(self, first=with_bos(inputs, prepend_bos), **how)
        if prepend_bos is not None:
            raise arguments.refused("prepend_bos is of an input: give it to t.run(text, prepend_bos=...)")
        return many(self, **how)

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
        stream: StreamCallback | bool | None = None,
        prepend_bos: bool | None = None,
        label: str | None = None,
        deterministic: bool = False,
        disabled: Sequence[str] = (),
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> GenerateTraceT:
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
            stream: called with each step and its tokens, one id per row, as they appear; True prints them instead.
            prepend_bos, label, deterministic, disabled, timeout_s, progress: as for `trace`.

        Returns:
            A context manager that gives a `patchbay.tracing.generation.GeneratingRun`; ``run.text`` and ``run.output``
            hold what was generated, below the block.
        """
        generation = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": stop,
            "eos": eos,
            "seed": seed,
            "prepend_bos": prepend_bos,
            "label": label,
        }
        how = self._how(deterministic, disabled, timeout_s, progress)
        return self._traces()[2](self, how=generation, stream=stream, first=inputs, **how)

    def _how(
        self, deterministic: bool, disabled: Sequence[str], timeout_s: float | None, progress: ProgressCallback | None
    ) -> dict[str, Any]:
        """How to run a graph, as traces take it.

        Raises:
            ArgumentError: one of these is of another type, or an optimisation is not known.
        """
        arguments.check_timeout(timeout_s)
        arguments.check_callback("progress", progress)
        options = arguments.options(deterministic, disabled, self.core.card.attributes)
        return {"options": options, "timeout_s": timeout_s, "progress": progress}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a model belongs to its connection and cannot be pickled; connect again where it is needed")

    def __repr__(self) -> str:
        shown = describe_model(self.core.card)
        if not self.edits:
            return shown
        from patchbay.tracing.trace import edit_name

        return f"{shown}\n  edited by: {', '.join(map(edit_name, self.edits))}"


class Model(BaseModel["Trace", "RunTrace", "GenerateTrace"]):
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

    def _traces(self) -> tuple[type[Trace], type[RunTrace], type[GenerateTrace]]:
        from patchbay.tracing.sync_trace import GenerateTrace, RunTrace, Trace

        return Trace, RunTrace, GenerateTrace

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
        texts = texts_of(text, add_special_tokens, prepend_bos)
        rows = self.wait(self.core.tokenize(texts))
        return rows[0] if isinstance(text, str) else rows

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The text of each token id, as the tokenizer shows it; takes integer arrays too.

        Raises:
            RequestRangeError: an id outside the vocabulary.
        """
        return self.wait(self.core.token_strings(ids_of(ids)))

    @located
    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token, special tokens aside.

        Raises:
            TraceError: it is several tokens, or none.
        """
        arguments.check_text("what becomes a token", text)
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
        arguments.check_graph(graph)
        how = self._how(deterministic, disabled, timeout_s, progress)
        return self.wait_with_events(lambda emit: self.core.run(graph, how["options"], timeout_s, emit), progress)

    @overload
    def apply(self, name: str, value: Proxy) -> Proxy: ...

    @overload
    def apply(self, name: str, value: ArrayLike) -> NDArray[Any]: ...

    def apply(self, name: str, value: Any) -> Any:
        """`value` put through a module of the model over its last axis.

        Args:
            name: ``"ln_final"``, ``"unembed"``, ``"blocks.3.mlp"``, ..., or the module's path in the checkpoint.
            value: a value of a trace, or an array, which is sent at once.

        Returns:
            A value of the same trace, or an array.

        Raises:
            GraphError, UnknownSiteError, ShapeError: as `patchbay.tracing.trace.BaseTrace.apply`.
        """
        if hasattr(value, "_trace"):
            return value._trace.apply(name, value)
        with self.trace() as trace:
            result = trace.apply(name, value).save()
        return result.value

    @located
    def map(self, dataset: Iterable[Any], function: MapFunction, **how: Unpack[MapHow]) -> MapResults:
        """Runs one graph over every row of a data set, in batches, and gives what the function makes of all of them.

        Args:
            dataset: texts, token ids, conversations; or rows of several columns (dicts, named tuples, tuples), prompts
                and numbers; any iterable, a generator too, which is read as it is needed.
            function: takes a run over the column ``"text"`` of a batch (`patchbay.datasets.BatchRun`), or a trace and
                the batch's rows (`patchbay.datasets.BatchTrace`, `BatchRows`) to make runs of its own, ``t.run(
                rows["clean"])`` and ``t.generate(...)``. It returns a dict (of dicts, lists) of reductions
                (`patchbay.reduce`), which are folded over all rows on the server, and values, rows first, which come
                back for every row. It is called once for each shape of batch.
            how: batch: rows that go through the model together, at most (32). max_tokens: positions of a batch, padding
                included, at most (16384). window: rows that are sorted by length together, make one shard, and after
                which progress is saved (8 batches). lanes: batches in flight (4). prepend_bos: as for `trace`. to: a
                folder to write values of rows to. keep: leave them on the server as artifacts. resume: a file that
                records what is done; the same call goes on from there. progress: called with a `MapProgress` after each
                batch; left out, a terminal shows a line. deterministic, disabled, timeout_s: as for `trace`, of each
                batch; left out, only what makes the last bits depend on other requests is disabled, so that the same
                call gives the same bits. patience_s: how long to wait for a server that is away or full (300).

        Returns:
            The same tree with numbers. A value of rows is an array where all rows have one shape, else an array for
            each row; what was written to a folder comes back as `patchbay.datasets.Shards`.

        Raises:
            TraceError: the data set, the function's result or the state to resume from cannot be used.
            GraphError: the graph breaks a rule; raised before anything is sent.
            ServiceError: the server failed, and did not come back in time.
        """
        from patchbay.datasets.entry import map_blocking

        return map_blocking(self, dataset, function, how)


class AsyncModel(BaseModel["AsyncTrace", "AsyncRunTrace", "AsyncGenerateTrace"]):
    """A model whose calls are awaited."""

    def _traces(self) -> tuple[type[AsyncTrace], type[AsyncRunTrace], type[AsyncGenerateTrace]]:
        from patchbay.tracing.async_trace import AsyncGenerateTrace, AsyncRunTrace, AsyncTrace

        return AsyncTrace, AsyncRunTrace, AsyncGenerateTrace

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
        texts = texts_of(text, add_special_tokens, prepend_bos)
        rows = await self.core.tokenize(texts)
        return rows[0] if isinstance(text, str) else rows

    async def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The text of each token id, as the tokenizer shows it; see `Model.token_strings`."""
        return await self.core.token_strings(ids_of(ids))

    async def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token; see `Model.to_single_token`."""
        arguments.check_text("what becomes a token", text)
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
        arguments.check_graph(graph)
        how = self._how(deterministic, disabled, timeout_s, progress)
        return await self.core.run(graph, how["options"], timeout_s, progress)

    @overload
    def apply(self, name: str, value: Proxy) -> Proxy: ...

    @overload
    def apply(self, name: str, value: ArrayLike) -> Coroutine[Any, Any, NDArray[Any]]: ...

    def apply(self, name: str, value: Any) -> Any:
        """`value` put through a module of the model; see `Model.apply`. Awaited for an array, not for a value."""
        return value._trace.apply(name, value) if hasattr(value, "_trace") else self._applied(name, value)

    async def _applied(self, name: str, value: ArrayLike) -> NDArray[Any]:
        async with self.trace() as trace:
            result = trace.apply(name, value).save()
        return result.value

    async def map(
        self,
        dataset: Iterable[Any] | AsyncIterable[Any],
        function: MapFunction,
        **how: Unpack[MapHow],
    ) -> MapResults:
        """Runs one graph over every row of a data set; see `Model.map`. Asynchronous iterables are taken too."""
        from patchbay.datasets.entry import map_awaited

        return await map_awaited(self, dataset, function, how)


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
    named = dict.fromkeys(
        re.sub(r"^blocks\.\d+", "blocks[i]", c.name) for c in card.callables if c.canonical and c.absent is None
    )
    if named:
        lines.append("  callable: " + ", ".join(named) + ", and modules by path")
    if absent:
        lines.append(f"  {absent} canonical sites absent (reasons in model.card.sites)")
    return "\n".join(lines)
