"""The graph of a batch, traced once for each shape: only the constants that depend on the rows are made anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from patchbay.arrays import to_data
from patchbay.datasets.axes import Axes, Growth, axes_of, growth_of, known, settle, wider
from patchbay.datasets.batch_trace import BatchTrace, GeneratedText, Over, graph_run
from patchbay.datasets.batching import Asked, Batch, Key, Row, Span
from patchbay.datasets.cells import Fill, check_pairs
from patchbay.datasets.columns import BatchRows
from patchbay.datasets.reducers import HEADER, Parts, Reduction, layout_of, pack, unpack
from patchbay.errors import GraphError, TraceError
from patchbay.ir.graph import Graph, Node, Output, TensorData
from patchbay.results import map_tree
from patchbay.tracing.builder import GraphBuilder, TracedGraph
from patchbay.tracing.proxy import Created, Proxy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.core import ModelCore
    from patchbay.model import Edit

#: Name of the output that is the reductions' state.
STATE = "state"


@dataclass(frozen=True)
class Template:
    """A graph for every batch of one shape.

    Attributes:
        graph: the graph, with one batch's constants.
        over: for each of its runs over the rows, what it is made over.
        prompts: columns that runs are made over.
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
    over: Mapping[int, Over]
    prompts: tuple[Key, ...]
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

    def fill(self, batch: Batch, header: NDArray[Any], state: Mapping[str, Any] | None, tag: str) -> Graph:
        """The graph for `batch`.

        Args:
            batch: rows of the template's shape.
            header: what the new state begins with.
            state: attributes of the constant that is the state so far.
            tag: behind the names of what stays on the server, by which the map knows its own.
        """
        nodes = list(self.graph.nodes)
        for i, make in self.fills.items():
            value = header if make is _header else make(batch)
            nodes[i] = Node("const", (), {"value": to_data(value)})
        if self.state is not None and state is not None:
            nodes[self.state] = Node("const", (), state)
        runs = list(self.graph.runs)
        if not self.concrete:
            label = f"rows {batch.rows[0].number} to {batch.rows[-1].number}"
            for i, over in self.over.items():
                runs[i] = graph_run(self.core, batch, over, label)
        outputs = tuple(replace(o, name=o.name + tag) if o.keep else o for o in self.graph.outputs)
        return Graph(tuple(runs), tuple(nodes), outputs, self.graph.bodies)


@dataclass(frozen=True)
class Collected:
    """A leaf that is sent back for every row.

    Attributes:
        name: its place in what the function returned, dots between.
        output: name of the output.
        sequence: axes (that of the rows counted) that follow the tokens of a prompt, and of which.
        text: whether it is token ids that stand for a text.
    """

    name: str
    output: str
    sequence: Mapping[int, Key]
    text: bool = False


@dataclass(frozen=True)
class Reduced:
    """A leaf that is a reduction: which one."""

    index: int


@dataclass(frozen=True)
class Learnt:
    """What one row told of the function.

    Attributes:
        spans: the runs that it makes over the rows.
        rows, positions: of the runs that are the same in every batch.
        drawn: whether tokens are drawn at random.
        paired: prompts whose positions it pairs, so that they must be of equal length in every row.
        axes: how each leaf depends on the batch.
    """

    spans: tuple[Span, ...]
    rows: int
    positions: int
    drawn: bool
    paired: tuple[Key, ...]
    axes: Mapping[tuple[str, ...], Axes]


class Tracer:
    """Traces the user's function for batches.

    Args:
        core: the model.
        edits: of the model.
        function: the user's function: of a run, or of a trace and its rows.
        with_rows: whether it is the latter.

    Attributes:
        asked: tokens that the function needs of every row, in the order in which it asked for them.
        first: row of the data set.
        learnt: what one row told; there once `probe` has been called.
    """

    def __init__(self, core: ModelCore, edits: Sequence[Edit], function: Callable[..., Any], with_rows: bool) -> None:
        self._core = core
        self._edits = edits
        self._function = function
        self._with_rows = with_rows
        self._made: Template | None = None
        self.asked: dict[Asked, None] = {}
        self.first: Row
        self.learnt: Learnt

    # --- one row --------------------------------------------------------------------------------------------------

    def probe(self, row: Row) -> None:
        """Learns from one row what the function needs, and how what it returns depends on the batch.

        Raises:
            UntoldError: tokens that it needs are not there yet: get them, and call this again.
            GraphError, TraceError: the function makes a mistake.
        """
        self.first = row
        batch = Batch(0, 0, (row,))
        try:
            trace, leaves = self._call(batch)
        except GraphError:
            self._blame_lengths(row, batch)
            raise
        spans, rows, positions = trace.spans()
        growth, paired, other = self._other(batch, trace)
        axes = {}
        for path, leaf in leaves.items():
            value = _value(leaf)
            if value is not None:
                twin = None if other is None else _value(other.get(path))
                axes[path] = axes_of(".".join(path), value, twin, batch, growth, paired)
        drawn = any(over.generation is not None and over.generation.temperature for over in trace.over.values())
        self.learnt = Learnt(tuple(spans), rows, positions, drawn, paired, axes)

    def _blame_lengths(self, row: Row, batch: Batch) -> None:
        """
        Raises:
            TraceError: the function fails for this row, and would not if its prompts were equally long.
        """
        longest = max(map(len, row.prompts.values()), default=0)
        missing = {key: longest - len(tokens) for key, tokens in row.prompts.items()}
        if any(missing.values()) and self._wider(batch, Growth(missing, {}, {})) is not None:
            check_pairs([row], list(row.prompts))

    def _other(
        self, batch: Batch, trace: BatchTrace
    ) -> tuple[Growth, tuple[Key, ...], Mapping[tuple[str, ...], Any] | None]:
        """What the function returns for a batch that is larger in every way; in which way; and prompts whose positions
        it pairs, which is found out by giving them unequal lengths.
        """
        spans = trace.spans()[0]
        runs = trace.builder.runs
        generating = {
            i: (trace.over[i].key if i in trace.over else None, how.max_new_tokens)
            for i, run in enumerate(runs)
            if (how := run.generation) is not None
        }
        keys = list(batch.rows[0].prompts)

        def grown(order: int) -> Growth:
            return growth_of(batch, spans, generating, self._core.card.n_ctx, order)

        growth = grown(1)
        if not growth.tells:
            return growth, (), None
        other = self._wider(batch, growth)
        if len(keys) < 2 or (other is not None and self._wider(batch, grown(-1)) is not None):
            return growth, (), other
        by = {key: 1 if growth.tokens[key] > 0 else -1 for key in keys}

        def alone(key: Key, others: bool) -> Growth:
            """One prompt longer than the others, or all the others longer than it."""
            tokens = {k: by[k] if (k == key) != others else 0 for k in keys}
            return Growth(tokens, dict.fromkeys(generating, 0), growth.counts)

        paired = tuple(key for key in keys if any(self._wider(batch, alone(key, way)) is None for way in (False, True)))
        if paired:
            growth = replace(growth, tokens={k: growth.tokens[paired[0] if k in paired else k] for k in keys})
        return growth, paired, self._wider(batch, growth)

    def _wider(self, batch: Batch, growth: Growth) -> Mapping[tuple[str, ...], Any] | None:
        """What the function returns for the larger batch; None where it cannot do with it."""
        try:
            return self._call(wider(batch, growth.tokens), list(growth.steps.values()))[1]
        except Exception:  # noqa: BLE001 - the user's code; it may be made for one length; then the user says over=
            return None

    # --- a batch --------------------------------------------------------------------------------------------------

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
        template = self._finish(trace, returned, begins, keep)
        made = self._made
        if made is None:
            self._made = template
        elif [r.name for r in template.reductions] != [r.name for r in made.reductions] or (
            template.layout != made.layout
        ):
            raise GraphError(
                f"a reduction has other extents for the batch of {len(batch.rows)} rows and {batch.seq} tokens than for"
                " the first: fold the axes that depend on the batch"
            )
        return template

    def _call(self, batch: Batch, more_steps: Sequence[int] = ()) -> tuple[BatchTrace, dict[tuple[str, ...], Any]]:
        trace = BatchTrace(self._core, self._edits, batch, self.first, self.asked, more_steps)
        returned = (
            self._function(trace, BatchRows(trace))
            if self._with_rows
            else self._function(trace.run_over(trace.default()))
        )
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
        if not any(isinstance(leaf, (Proxy, Reduction, GeneratedText)) for leaf in leaves.values()):
            raise TraceError("the function of a map returned no value of the run and no reduction: nothing to compute")
        for path, leaf in leaves.items():
            value = _value(leaf)
            if value is not None and value._trace is not trace:
                raise TraceError(f"{'.'.join(path)!r} is a value of another trace")
        return trace, leaves

    def _finish(self, trace: BatchTrace, leaves: dict[tuple[str, ...], Any], begins: bool, keep: bool) -> Template:
        axes = self.learnt.axes
        steps = {i: how.max_new_tokens for i, run in enumerate(trace.builder.runs) if (how := run.generation)}
        outputs: list[Output] = []
        collected: list[Collected] = []
        sent: dict[int, str] = {}
        reductions: list[Reduction] = []
        parts: list[Parts] = []
        replaced: dict[tuple[str, ...], Any] = {}
        for path, leaf in leaves.items():
            name = ".".join(path)
            if isinstance(leaf, Reduction):
                if path not in axes:
                    raise _other_tree(name)
                settle(leaf, axes[path], name, trace.batch, steps)
                replaced[path] = Reduced(len(reductions))
                reductions.append(leaf)
                parts.append(leaf.fold(trace.samples(leaf.along)))
            elif (value := _value(leaf)) is not None:
                if path not in axes:
                    raise _other_tree(name)
                text = isinstance(leaf, GeneratedText)
                if text and keep:
                    raise TraceError(
                        f"{name!r} is texts, which are no tensors to stay on the server; return run.generated"
                    )
                output = sent.get(value._node, f"value.{name}")
                one = Collected(name, output, known(axes[path], value, name), text)
                replaced[path] = one
                collected.append(one)
                if value._node not in sent:
                    sent[value._node] = output
                    outputs.append(Output(output, value._node, keep))
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
        over = {} if trace.concrete else trace.over
        return Template(
            graph,
            over,
            tuple(trace.batch.rows[0].prompts),
            fills,
            state,
            tree,
            tuple(collected),
            tuple(reductions),
            layout,
            trace.concrete,
            self._core,
        )


def _value(leaf: object) -> Proxy | None:
    """The value of the trace behind a leaf; None where it is something else."""
    found = leaf.value if isinstance(leaf, Reduction) else leaf.ids if isinstance(leaf, GeneratedText) else leaf
    return found if isinstance(found, Proxy) else None


def _other_tree(name: str) -> TraceError:
    return TraceError(f"the function returned {name!r} for this batch and not for the first row: return the same names")


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
    trace = BatchTrace(core, (), Batch(0, 0, ()), Row(0, {}), {})
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


def _header(batch: Batch) -> NDArray[Any]:
    import numpy as np

    del batch
    return np.zeros(HEADER)
