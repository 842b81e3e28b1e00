"""The graph of a batch, traced once for each shape: only the constants that depend on the rows are made anew.

The user's function sees a `BatchRun`. What depends on the rows' contents (lengths, token ids, fields, places of words)
is a value of the trace there, behind which stands a constant that each batch fills in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchbay.datasets.axes import Axes, axes_of, known, settle, wider
from patchbay.datasets.batching import Batch, Row
from patchbay.datasets.reducers import HEADER, Parts, Reduction, Samples, layout_of, pack, unpack
from patchbay.errors import GraphError, TraceError
from patchbay.ir.events import ExecuteOptions
from patchbay.ir.graph import Graph, Node, Output, TensorData
from patchbay.ir.graph import Run as GraphRun
from patchbay.results import Price, map_tree
from patchbay.tokens import Tokens
from patchbay.tracing.arrays import to_data
from patchbay.tracing.builder import GraphBuilder, TracedGraph
from patchbay.tracing.proxy import Created, Proxy
from patchbay.tracing.runs import Run
from patchbay.tracing.trace import BaseTrace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.core import ModelCore
    from patchbay.model import Edit

#: Makes a constant's array for a batch.
Fill = Callable[[Batch], "NDArray[Any]"]
#: Name of the output that is the reductions' state.
STATE = "state"


class BatchTrace(BaseTrace):
    """The trace of one batch's graph; it is never executed by itself.

    Attributes:
        batch: the rows that it is traced for.
        concrete: whether the function looked at the tokens themselves, so that its graph fits no other batch.
    """

    def __init__(
        self, core: ModelCore, edits: Sequence[Edit], batch: Batch, tokens_of: Callable[[str], Tokens] | None = None
    ) -> None:
        super().__init__(core, options=ExecuteOptions(), timeout_s=None, progress=None)
        self._tokens_of = tokens_of
        self._edits = tuple(edits)
        self.batch = batch
        self.concrete = False
        self.fills: dict[int, Fill] = {}
        self.returned: Mapping[str, Any] = {}
        self._late: dict[object, Proxy] = {}

    def estimate(self, *, remote: bool = False) -> Price:
        """The graph's price; always worked out on this side."""
        del remote
        return self._local_estimate()

    def tokens_of(self, text: str) -> Tokens:
        assert self._tokens_of is not None
        return self._tokens_of(text)

    def late(self, key: object, fill: Fill) -> Proxy:
        """A constant that each batch fills in; one for equal keys."""
        if key not in self._late:
            data = to_data(fill(self.batch))
            self.fills[id(data)] = fill  # the node holds the object, so the id stays its own
            self._late[key] = Proxy(self, self.builder.add("const", (), {"value": data}))
        return self._late[key]

    def run_over_batch(self) -> BatchRun:
        """A run over the batch's rows."""
        tokens = [row.tokens for row in self.batch.rows]
        data = _run_over(self._core, self.batch, f"{len(tokens)} rows of the data set")
        run = BatchRun(self, self.builder.add_run(data), tokens, False)
        self.runs.append(run)
        for edit in self._edits:
            edit(run)
        return run

    @property
    def samples(self) -> Samples:
        """What reductions fold."""
        stride = self.builder.card.n_ctx
        if not self.builder.card.takes_tokens:
            return Samples(self, self.row_numbers, None, None, None, stride)
        return Samples(self, self.row_numbers, self.lengths, self.mask, lambda: self.ids, stride)

    @property
    def row_numbers(self) -> Proxy:
        return self.late("rows", _row_numbers)

    @property
    def lengths(self) -> Proxy:
        if not self.builder.card.takes_tokens:
            raise TraceError(f"{self.builder.card.name!r} takes no tokens: its rows have no lengths, mask or ids")
        return self.late("lengths", _lengths)

    @property
    def mask(self) -> Proxy:
        """True at tokens, bool [rows, seq]."""
        import numpy as np

        if "mask" not in self._late:
            seq = self.batch.seq
            self._late["mask"] = self.constant(np.arange(seq)) >= (seq - self.lengths)[:, None]
        return self._late["mask"]

    @property
    def ids(self) -> Proxy:
        """Token ids, int64 [rows, seq]; 0 at padding."""
        found: Proxy = self.late("ids", _ids).astype("int64") if self.builder.card.takes_tokens else self.lengths
        return found


class BatchRun(Run):
    """A run over one batch of a data set. It also has what is known of its rows, as values of the trace."""

    __slots__ = ()

    if TYPE_CHECKING:
        _trace: BatchTrace

    @property
    def mask(self) -> Any:
        """True at tokens, False at the padding on the left of shorter rows: bool [rows, seq]."""
        return self._trace.mask

    @property
    def ids(self) -> Proxy:
        """Token ids, int64 [rows, seq]; 0 at padding."""
        return self._trace.ids

    @property
    def lengths(self) -> Proxy:
        """Tokens of each row, int64 [rows]."""
        return self._trace.lengths

    @property
    def row_numbers(self) -> Proxy:
        """Places of the rows in the data set, from 0, int64 [rows]."""
        return self._trace.row_numbers

    def column(self, name: str, values: Sequence[Any] | None = None) -> Proxy:
        """What the rows' dicts hold under `name`, [rows, ...].

        Args:
            name: a field of every row beside ``"text"``: a number, or an array of one shape for all rows.
            values: what may stand there (labels, say); then the place among them is given, int64 [rows].

        Raises:
            TraceError: a row has no such field, or holds something else than `values`.
        """
        if values is None:
            return self._trace.late(("column", name), lambda batch: _column(batch, name))
        known = tuple(values)
        return self._trace.late(("labels", name, known), lambda batch: _labels(batch, name, known))

    def again(self) -> BatchRun:
        """Another run over the same rows, to compare an intervention with none."""
        return self._trace.run_over_batch()

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """The tokens themselves. A function that looks at them is traced for each batch anew; `ids` costs less."""
        self._trace.concrete = True
        return self._row_tokens

    def position(self, substring: str, *, occurrence: int | None = None) -> Any:
        """Where `substring` ends in each row, counted along the sequence axis, int64 [rows]; see `Run.position`."""
        return self._trace.late(
            ("position", substring, occurrence), lambda batch: _positions(batch, substring, occurrence)
        )

    def logprob(self, text: Any, *, occurrence: int | None = None, append: bool | None = None) -> Proxy:
        """How likely the model finds a text in each row, [rows]; see `Run.logprob`. Traced for each batch anew."""
        self._trace.concrete = True
        return super().logprob(text, occurrence=occurrence, append=append)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), "again", "column", "ids", "lengths", "row_numbers"})


@dataclass(frozen=True)
class Template:
    """A graph for every batch of one shape.

    Attributes:
        graph: the graph, with one batch's constants.
        fills: nodes of constants that depend on the batch, and what makes them.
        state: the node of the lane's state so far; None for a lane's first batch.
        tree: what the function returned, its leaves replaced by `Collected` and `Reduced`.
        collected: values that are wanted for every row.
        reductions: the reductions, in the order of the state.
        layout: names and shapes of their parts.
        concrete: whether it fits its own batch only.
        core: the model.
        uploaded: digests of constants that the server was given.
    """

    graph: TracedGraph
    fills: Mapping[int, Fill]
    state: int | None
    tree: Any
    collected: tuple[Collected, ...]
    reductions: tuple[Reduction, ...]
    layout: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    concrete: bool
    core: ModelCore
    uploaded: frozenset[str] = frozenset()

    def locate(self, error: GraphError) -> GraphError:
        """An error about a node, with the user's line."""
        return GraphBuilder(self.core.card).locate(error, self.graph)

    def lightened(self, named: Graph) -> Template:
        """The template with `named`, its graph with large constants named by their digests, in the graph's place."""
        for reduction in self.reductions:
            reduction.release()
        pairs = zip(self.graph.nodes, named.nodes, strict=True)
        digests = {str(new.attrs["artifact"]) for old, new in pairs if old is not new and "artifact" in new.attrs}
        old = self.graph
        graph = TracedGraph(
            named, old.specs, old.places, fragments=old.fragments, model=old.model, revision=old.revision
        )
        return replace(self, graph=graph, uploaded=frozenset(digests))

    def fill(self, batch: Batch, header: NDArray[Any], state: Mapping[str, Any] | None) -> Graph:
        """The graph for `batch`.

        Args:
            batch: rows of the template's shape.
            header: what the new state begins with.
            state: attributes of the constant that is the state so far.
        """
        nodes = list(self.graph.nodes)
        for i, make in self.fills.items():
            value = header if make is _header else make(batch)
            nodes[i] = Node("const", (), {"value": to_data(value)})
        if self.state is not None and state is not None:
            nodes[self.state] = Node("const", (), state)
        runs = self.graph.runs
        if not self.concrete:
            run = _run_over(self.core, batch, f"rows {batch.rows[0].number} to {batch.rows[-1].number}")
            runs = (run,) * len(runs)
        return Graph(runs, tuple(nodes), self.graph.outputs, self.graph.bodies)


@dataclass(frozen=True)
class Collected:
    """A leaf that is sent back for every row.

    Attributes:
        name: its place in what the function returned, dots between.
        output: name of the output.
        sequence: axes (that of the rows counted) that follow the tokens.
    """

    name: str
    output: str
    sequence: tuple[int, ...]


@dataclass(frozen=True)
class Reduced:
    """A leaf that is a reduction: which one."""

    index: int


class Tracer:
    """Traces the user's function for batches.

    Args:
        core: the model.
        edits: of the model.
        function: the user's function.
        tokens_of: tokens of a text by itself, without special tokens.
    """

    def __init__(
        self,
        core: ModelCore,
        edits: Sequence[Edit],
        function: Callable[[Any], Any],
        tokens_of: Callable[[str], Tokens],
    ) -> None:
        self._core = core
        self._tokens_of = tokens_of
        self._edits = edits
        self._function = function
        self._axes: dict[tuple[str, ...], Axes] | None = None
        self.first: Template | None = None

    def trace(self, batch: Batch, begins: bool, keep: bool) -> Template:
        """The template for batches of this shape.

        Args:
            batch: the first of them.
            begins: whether the lane has no state yet.
            keep: whether values of rows stay on the server.

        Raises:
            GraphError: the graph breaks a rule; the message has the user's line.
            TraceError: the function returned what cannot be a result.
        """
        trace, returned = self._call(batch)
        if self._axes is None:
            self._axes = self._compare(batch, trace, returned)
        template = self._finish(trace, returned, self._axes, begins, keep)
        if self.first is None:
            self.first = template
        elif [r.name for r in template.reductions] != [r.name for r in self.first.reductions] or (
            template.layout != self.first.layout
        ):
            raise GraphError(
                f"a reduction has other extents for the batch of {batch.shape[0]} rows and {batch.seq} tokens than for"
                " the first: fold the axes that depend on the batch"
            )
        return template

    def _call(self, batch: Batch) -> tuple[BatchTrace, dict[tuple[str, ...], Any]]:
        trace = BatchTrace(self._core, self._edits, batch, self._tokens_of)
        returned = self._function(trace.run_over_batch())
        if not isinstance(returned, Mapping):
            raise TraceError(
                f"the function of a map returns a dict of values and reductions by name, not {type(returned).__name__}"
            )
        trace.returned = returned
        leaves: dict[tuple[str, ...], Any] = {}

        def note(leaf: object, path: tuple[str, ...]) -> object:
            leaves[path] = trace.constant(leaf) if isinstance(leaf, Created) else leaf
            return leaf

        map_tree(returned, note)
        if not any(isinstance(leaf, (Proxy, Reduction)) for leaf in leaves.values()):
            raise TraceError("the function of a map returned no value of the run and no reduction: nothing to compute")
        return trace, leaves

    def _compare(
        self, batch: Batch, trace: BatchTrace, leaves: dict[tuple[str, ...], Any]
    ) -> dict[tuple[str, ...], Axes]:
        """Which axes follow the rows and the longest row: found by tracing the function for one more of each."""
        other: dict[tuple[str, ...], Any] | None
        wide = wider(batch, self._core.card.n_ctx)
        try:
            other = self._call(wide)[1]
        except Exception:  # noqa: BLE001 - the user's code; the function may be made for one length; then the user says over=
            other = None
        axes = {}
        for path, leaf in leaves.items():
            value = leaf.value if isinstance(leaf, Reduction) else leaf
            if not isinstance(value, Proxy):
                continue
            twin = None if other is None else other.get(path)
            twin = twin.value if isinstance(twin, Reduction) else twin
            axes[path] = axes_of(".".join(path), value, twin if isinstance(twin, Proxy) else None, batch, wide)
        return axes

    def _finish(
        self,
        trace: BatchTrace,
        leaves: dict[tuple[str, ...], Any],
        axes: Mapping[tuple[str, ...], Axes],
        begins: bool,
        keep: bool,
    ) -> Template:
        samples = trace.samples
        outputs: list[Output] = []
        collected: list[Collected] = []
        sent: dict[int, str] = {}
        reductions: list[Reduction] = []
        parts: list[Parts] = []
        replaced: dict[tuple[str, ...], Any] = {}
        for path, leaf in leaves.items():
            name = ".".join(path)
            if isinstance(leaf, Reduction):
                settle(leaf, axes[path], name)
                replaced[path] = Reduced(len(reductions))
                reductions.append(leaf)
                parts.append(leaf.fold(samples))
            elif isinstance(leaf, Proxy):
                if leaf._trace is not trace:
                    raise TraceError(f"{name!r} is a value of another trace")
                output = sent.get(leaf._node, f"value.{name}")
                one = Collected(name, output, known(axes[path], leaf, name))
                replaced[path] = one
                collected.append(one)
                if leaf._node not in sent:
                    sent[leaf._node] = output
                    outputs.append(Output(output, leaf._node, keep))
        layout = layout_of(parts)
        state_data: TensorData | None = None
        if reductions:
            import numpy as np

            if not begins:
                size = HEADER + sum(int(np.prod(shape)) for names in layout for _, shape in names)
                state_data = to_data(np.zeros(size))
                before = Proxy(trace, trace.builder.add("const", (), {"value": state_data}))
                parts = [r.merge(a, b) for r, a, b in zip(reductions, unpack(before, layout), parts, strict=True)]
            packed = pack(trace.late(STATE, _header), parts)
            outputs.append(Output(STATE, packed._node, True))
        graph = trace.builder.finish(outputs)
        trace._verified(graph)
        constants = {id(n.attrs["value"]): i for i, n in enumerate(graph.nodes) if "value" in n.attrs}
        fills = {constants[key]: fill for key, fill in trace.fills.items() if key in constants}
        tree = map_tree(trace.returned, lambda leaf, path: replaced.get(path, leaf))
        state = None if state_data is None else constants[id(state_data)]
        return Template(
            graph, fills, state, tree, tuple(collected), tuple(reductions), layout, trace.concrete, self._core
        )


def merged_graph(
    core: ModelCore, template: Template, states: Sequence[Mapping[str, Any]]
) -> tuple[TracedGraph, list[tuple[int, str, str]]]:
    """The graph that merges the lanes' states and finishes the reductions.

    Args:
        core: the model.
        template: any template of the map.
        states: attributes of the constants that are the lanes' states.

    Returns:
        The graph, and for each output: which reduction, the name of its array, the name of the output.
    """
    trace = BatchTrace(core, (), Batch(0, 0, ()))
    lanes = [unpack(Proxy(trace, trace.builder.add("const", (), dict(s))), template.layout) for s in states]
    outputs, wanted = [], []
    for i, reduction in enumerate(template.reductions):
        parts = lanes[0][i]
        for lane in lanes[1:]:
            parts = reduction.merge(parts, lane[i])
        for name, value in reduction.finish(parts).items():
            outputs.append(Output(f"{i}.{name}", value._node))
            wanted.append((i, name, f"{i}.{name}"))
    graph = trace.builder.finish(outputs)
    trace._verified(graph)
    return graph, wanted


def _run_over(core: ModelCore, batch: Batch, label: str) -> GraphRun:
    """A run over the batch's rows."""
    if core.card.takes_tokens:
        return GraphRun(tuple(row.tokens.ids for row in batch.rows), label)
    import numpy as np

    stacked: dict[str, Any] = {}
    for name in batch.rows[0].inputs:
        arrays = [np.asarray(row.inputs.get(name)) for row in batch.rows]
        if len({a.shape for a in arrays}) > 1:
            raise TraceError(f"{name!r} has another shape in some rows: {sorted({a.shape for a in arrays})}")
        stacked[name] = np.stack(arrays)
    known = core.known_inputs_of(stacked)
    assert known is not None  # no text among them, so nothing to ask for
    return GraphRun((), label, known.named)


# --- what depends on the batch ----------------------------------------------------------------------------------------


def _header(batch: Batch) -> NDArray[Any]:
    import numpy as np

    del batch
    return np.zeros(HEADER)


def _row_numbers(batch: Batch) -> NDArray[Any]:
    import numpy as np

    return np.array([row.number for row in batch.rows], dtype=np.int64)


def _lengths(batch: Batch) -> NDArray[Any]:
    import numpy as np

    return np.array([len(row.tokens) for row in batch.rows], dtype=np.int64)


def _ids(batch: Batch) -> NDArray[Any]:
    import numpy as np

    whole = np.zeros(batch.shape, dtype=np.int32)
    for i, row in enumerate(batch.rows):
        whole[i, whole.shape[1] - len(row.tokens) :] = row.tokens.ids
    return whole


def _column(batch: Batch, name: str) -> NDArray[Any]:
    import numpy as np

    found = [np.asarray(_field(row, name)) for row in batch.rows]
    if any(f.dtype.kind not in "biuf" for f in found):
        bad = next(row for row, f in zip(batch.rows, found, strict=True) if f.dtype.kind not in "biuf")
        raise TraceError(
            f"row {bad.number} of the data set has {_field(bad, name)!r:.60} as {name!r}, which is no number: say which"
            f" values there are, run.column({name!r}, values=[...])"
        )
    if len({f.shape for f in found}) > 1:
        raise TraceError(f"{name!r} has another shape in some rows of the data set: {sorted({f.shape for f in found})}")
    whole = np.stack(found)
    return whole.astype({"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float32}[whole.dtype.kind])


def _labels(batch: Batch, name: str, values: tuple[Any, ...]) -> NDArray[Any]:
    import numpy as np

    found = []
    for row in batch.rows:
        label = _field(row, name)
        if label not in values:
            raise TraceError(
                f"row {row.number} of the data set has {label!r:.60} as {name!r}, not one of {list(values)}"
            )
        found.append(values.index(label))
    return np.array(found, dtype=np.int64)


def _field(row: Row, name: str) -> Any:
    try:
        return row.fields[name]
    except KeyError:
        has = ", ".join(map(repr, row.fields)) or "nothing"
        raise TraceError(f"row {row.number} of the data set has no {name!r} beside its text (it has: {has})") from None


def _positions(batch: Batch, substring: str, occurrence: int | None) -> NDArray[Any]:
    import numpy as np

    found = []
    for row in batch.rows:
        try:
            found.append(batch.seq - len(row.tokens) + row.tokens.position(substring, occurrence=occurrence))
        except TraceError as error:
            raise TraceError(f"row {row.number} of the data set: {error}") from None
    return np.array(found, dtype=np.int64)
