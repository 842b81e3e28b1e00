"""The `with` block: collects what the user's program does, then verifies it, sends it and hands the results out.

`BaseTrace` holds all of it that needs no waiting; `sync_trace` and `async_trace` add the two places that do: tokenizing
an input and executing the graph.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from patchbay.arguments import check_name, check_text, nearest, refused, seen
from patchbay.arrays import as_array, to_array, to_data
from patchbay.errors import GraphError, MissingAttributeError, ProtocolError, TraceError, ValueNotReadyError
from patchbay.ir.events import Event, ExecuteOptions, Usage
from patchbay.ir.graph import Graph, Output
from patchbay.ir.graph import Run as GraphRun
from patchbay.ir.ops.spec import TensorSpec
from patchbay.ir.price import price, with_forwards
from patchbay.ir.verify import verify
from patchbay.places import here, located, stack_level
from patchbay.results import Price, Results, RunUsage, map_tree
from patchbay.tokens import Tokens, label_of
from patchbay.tracing.artifacts import Artifact
from patchbay.tracing.builder import GraphBuilder, TracedGraph
from patchbay.tracing.generation import (
    GeneratingRun,
)
from patchbay.tracing.namespaces import Callable as ModelCallable
from patchbay.tracing.namespaces import ModuleSites, SiteNamespace
from patchbay.tracing.params import TraceParams
from patchbay.tracing.proxy import Created, Proxy, lift, not_saved, numbers_of
from patchbay.tracing.runs import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Never, Self

    from patchbay.artifacts import StoredArtifacts
    from patchbay.core import ModelCore, Outcome, RunInputs
    from patchbay.ir.graph import Generation
    from patchbay.model import Edit
    from patchbay.tracing.namespaces import SiteTree


def check_leaf(leaf: object) -> None:
    """
    Raises:
        ArgumentError: a leaf of a tree to be saved that is no value, or hides values where they are not looked for.
    """
    if isinstance(leaf, (Proxy, Created, str, int, float)) or leaf is None:
        return
    if isinstance(leaf, SiteNamespace):
        raise leaf._group_error()
    if isinstance(leaf, (ModuleSites, ModelCallable)):
        raise refused(f"{leaf!r} is no value; take its .output or .input, or call it with a value")
    if isinstance(getattr(leaf, "__self__", None), Proxy):
        raise refused(f"{seen(leaf)} is a method of a value, not yet called: add ()")
    if isinstance(leaf, Iterator):
        raise refused(f"a {type(leaf).__name__} can be gone through only once; make a list of it")
    if any(isinstance(value, Proxy) for value in _inside(leaf)):
        raise refused(f"values inside a {type(leaf).__name__} are not found; save a dict, list or tuple of them")


def _inside(leaf: Any) -> Iterable[object]:
    """What a leaf holds, where that may be values: a set, an array of objects, an object of a class of the user's."""
    if isinstance(leaf, (bytes, bytearray, memoryview)):
        return ()
    if hasattr(leaf, "dtype"):
        return leaf.flat if getattr(leaf.dtype, "hasobject", False) and hasattr(leaf, "flat") else ()
    if isinstance(leaf, Collection):
        return leaf
    return vars(leaf).values() if hasattr(leaf, "__dict__") and not isinstance(leaf, type) else ()


def edit_name(edit: Edit) -> str:
    """What an edit of a model is called in printed graphs."""
    name = getattr(edit, "name", None) or getattr(edit, "__name__", None)
    return name if isinstance(name, str) else type(edit).__name__


#: What `Trace.run` takes: a text, token ids, `Tokens`, an integer array, or a list of any of the first three (rows).
Input = Any
ProgressCallback = Callable[[Event], None]
#: Called with a step and one token id per row (-1 for rows that have stopped).
StreamCallback = Callable[[int, list[int]], Any]


class BaseTrace(abc.ABC):
    """A graph under construction, and its results once it has run.

    Attributes:
        builder: the graph so far.
        sent_bytes, received_bytes: payload that crossed the client's connection while this trace was executed.
    """

    def __init__(
        self,
        core: ModelCore,
        *,
        options: ExecuteOptions,
        timeout_s: float | None,
        progress: ProgressCallback | None,
        first: Input | None = None,
    ) -> None:
        self.builder = GraphBuilder(core.card)
        self._runs: list[Run | tuple[int, tuple[Tokens, ...], bool]] = []
        self.sent_bytes = 0
        self.received_bytes = 0
        self._core = core
        self._edits: tuple[Edit, ...] = ()
        self._options = options
        self._timeout_s = timeout_s
        self._progress = progress
        self._first = first
        #: Results of ``+=`` and the like on values read at sites that were not assigned back (yet).
        self.updated: set[int] = set()
        self._state = "open"
        self._entered = False
        self._trees: dict[str, Any] = {}
        self._outputs: dict[int, str] = {}
        #: Further names of what is sent once: a file of the graph has them all.
        self._aliases: list[Output] = []
        self._kept: dict[int, tuple[str, Artifact]] = {}
        self._output_names: set[str] = set()
        self._arrays: dict[int, NDArray[Any]] = {}
        self._results: Results | None = None
        self._usage: RunUsage | None = None

    # --- building -------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """The runs so far."""
        return [run if isinstance(run, Run) else Run(self, *run) for run in self._runs]

    @property
    def site_tree(self) -> SiteTree:
        """The model's sites by the parts of their names."""
        return self._core.site_tree

    @property
    def stored(self) -> StoredArtifacts:
        """The artifacts of the trace's connection."""
        return self._core.stored

    @property
    def params(self) -> TraceParams:
        """The model's weights by name, as values of this trace: ``t.params["blocks.3.attn.W_O"]``."""
        return TraceParams(self)

    @property
    def has_run(self) -> bool:
        """Whether results are here."""
        return self._state == "done"

    def _add_run(self, given: RunInputs, label: str | None, generation: Generation | None = None) -> Run:
        if label is not None:
            check_text("label", label)
        rows, single = given.rows, given.single
        shown = label_of(rows) if rows else ", ".join(name for name, _ in given.named)
        data = GraphRun(tuple(row.ids for row in rows), shown if label is None else label, given.named, generation)
        kind = Run if generation is None else GeneratingRun
        run = kind(self, self.builder.add_run(data), rows, single)
        self._runs.append(run)
        for edit in self._edits:
            with self.builder.fragment(edit_name(edit), getattr(edit, "version", "")):
                edit(run)
        if isinstance(run, GeneratingRun):
            self.want(run.generated, f"run{run.index}.generated")
        return run

    @abc.abstractmethod
    def tokens_of(self, text: str) -> Tokens:
        """Tokens of a continuation: of `text` by itself, without special tokens."""

    @located
    def apply(self, name: str, value: object) -> Proxy:
        """`value` put through a module of the model over its last axis.

        Args:
            name: a canonical name (``"ln_final"``, ``"unembed"``, ``"blocks.3.mlp"``) or the module's path in the
                checkpoint; ``model.card.callables`` lists them.
            value: floating-point ``[..., d_in]``; ``[rows, seq, d_in]`` for modules that look at several positions.

        Returns:
            ``[..., d_out]``. The sites of runs are not visited: taps of a run see nothing of it.

        Raises:
            GraphError: the module needs more than one tensor, or does not map positions to positions.
            UnknownSiteError: there is no such module; the message names the nearest.
            ShapeError: a last axis of another extent.
        """
        check_text("apply: the module's name", name)
        return ModelCallable(self, name)(value)

    def constant(self, value: object) -> Proxy:
        """A proxy for an array, list or number, for when an operation has no other proxy to begin from.

        Floating-point constants are each a value of their own, also where their numbers are equal: a gradient by one of
        two vectors of zeros (`patchbay.grad`) is not the gradient by the other.
        """
        if isinstance(value, (Proxy, Created)):
            return Proxy(self, lift(self, value))
        one = isinstance(value, (bool, int, float))
        array = as_array([value])[0:1].reshape(()) if one else numbers_of(value, what="constant: ")
        data = to_data(array)
        return Proxy(self, self.builder.constant(data, shared=not data.dtype.is_floating))

    def save(self, *unnamed: Never, **trees: Any) -> None:
        """Asks for values by name: ``t.save(top=values, rest=[a, b])``.

        Args:
            unnamed: none; a value without a name is saved with its own ``.save()``.
            trees: proxies, or dicts, lists, tuples and named tuples that hold proxies. Anything else in them (strings,
                numbers, arrays) stays on this side and comes back as it is.

        Raises:
            TraceError: a name is taken, or the trace is over.
            ArgumentError: no name was given, or a tree holds what is no value (a block, a run, a generator).
        """
        if unnamed:
            raise refused("save takes values by name, t.save(h=value); without a name: value.save()")
        self._check_open()
        for name, tree in trees.items():
            self._save_tree(name, tree)

    def keep(self, name: str, tree: Any) -> Any:
        """Leaves values on the server as artifacts of yours; nothing of them is sent.

        Args:
            name: what they are called in the results, and what the artifacts are called (with the path of each in a
                tree, as ``means.0``).
            tree: a proxy, or a dict, list or tuple that holds proxies.

        Returns:
            A `patchbay.Artifact` (or the tree with one in the place of every proxy), also in ``results[name]``: once
            the trace has run, it stands for a constant in any trace of the same server.

        Raises:
            TraceError: the name is taken, or the trace is over.
        """
        if not isinstance(name, str):
            raise refused(f"keep takes a name and then what to keep, t.keep('means', value), not {seen(name)} first")
        self._check_open()
        self._check_name(name)

        found = False

        def keep(leaf: object, path: tuple[str, ...]) -> object:
            nonlocal found
            check_leaf(leaf)
            if isinstance(leaf, Created):
                leaf = self.constant(leaf)
            if not isinstance(leaf, Proxy):
                return leaf
            found = True
            return self._keep(leaf, ".".join((name, *path)))

        kept = map_tree(tree, keep)
        if not found:
            raise refused(f"keep takes values of the trace, not {seen(tree)}; arrays are sent with model.artifacts.put")
        self._trees[name] = kept
        return kept

    def _keep(self, proxy: Proxy, name: str) -> Artifact:
        node = lift(self, proxy)
        if node not in self._kept:
            unique = self._unique(name)
            self._kept[node] = (unique, Artifact.awaited(self._core.stored, proxy.dtype, proxy.shape, unique))
        return self._kept[node][1]

    def _unique(self, name: str) -> str:
        while name in self._output_names:
            name += "_"
        self._output_names.add(name)
        return name

    def _check_name(self, name: object) -> None:
        check_name("the name of what is saved", name)
        if name in self._trees:
            raise TraceError(f"a value was already saved as {name!r}; choose another name", location=here())

    def _save_tree(self, name: str, tree: Any) -> None:
        self._check_name(name)

        def want(leaf: object, path: tuple[str, ...]) -> object:
            check_leaf(leaf)
            if isinstance(leaf, Created):
                leaf = self.constant(leaf)
            if isinstance(leaf, Proxy):
                self._want(lift(self, leaf), ".".join((name, *path)))
            return leaf

        self._trees[name] = map_tree(tree, want)

    def save_proxy(self, proxy: Proxy, name: str | None) -> None:
        """`Proxy.save`: under `name`, or under one made up from where the value comes from."""
        self._check_open()
        node = lift(self, proxy)
        if name is None:
            if any(tree is proxy for tree in self._trees.values()):
                return
            name = self._auto_name(node)
        self._save_tree(name, proxy)

    def _auto_name(self, node: int) -> str:
        nodes = self.builder.nodes
        made = nodes[node]
        while made.op == "getitem":
            made = nodes[made.args[0]]
        if made.op == "site.read":
            base = str(made.attrs["site"])
            if base not in self._trees:
                return base
            return next(n for i in range(2, len(self._trees) + 3) if (n := f"{base}_{i}") not in self._trees)
        return next(n for i in range(1, len(self._trees) + 2) if (n := f"value_{i}") not in self._trees)

    def want(self, value: Proxy, name: str) -> str:
        """Ask for a value that is no result of the user's; returns the name that it is sent under."""
        self._want(value._node, name)
        return self._outputs[value._node]

    def _want(self, node: int, name: str) -> None:
        self.builder.check_visible(node)
        if node in self._outputs:  # sent once; every name gets an array of its own
            self._aliases.append(Output(self._unique(name), node))
            return
        self._outputs[node] = self._unique(name)

    # --- looking, without running ---------------------------------------------------------------------------------

    @property
    def graph(self) -> TracedGraph:
        """The graph as it would be (or was) sent; ``print(t.graph)`` shows it as text."""
        outputs = [Output(name, node) for node, name in self._outputs.items()]
        outputs += [Output(name, node, keep=True) for node, (name, _) in self._kept.items()]
        return self.builder.finish(outputs)

    @property
    def whole_graph(self) -> Graph:
        """`graph` with an output for every name under which a value was saved, as files have it."""
        graph = self.graph
        return Graph(graph.runs, graph.nodes, (*graph.outputs, *self._aliases), graph.bodies)

    def validate(self) -> None:
        """Checks every rule and limit, as the server will.

        Raises:
            GraphError: the most specific subclass, with the user's line.
        """
        self._verified(self.graph)

    def _verified(self, graph: TracedGraph) -> None:
        try:
            # Every node was inferred as it was made, by the same rules.
            verify(graph, self.builder.card, self.builder.card.limits, facts=graph.facts)
        except GraphError as error:
            raise self.builder.locate(error, graph) from None

    @abc.abstractmethod
    def estimate(self, *, remote: bool = False) -> Any:
        """The graph's price without running it."""

    def _local_estimate(self) -> Price:
        """The graph's price, worked out on this side.

        Raises:
            GraphError: the graph is not valid.
        """
        graph = self.graph
        self._verified(graph)
        return Price.of(with_forwards(price(graph, graph.specs, graph.facts), self.builder.card))

    # --- running --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.builder.closed is not None:
            raise TraceError(self.builder.closed, location=here())

    def _enter(self) -> None:
        """The with block begins.

        Raises:
            TraceError: it began before.
        """
        self._check_open()
        if self._entered:
            raise TraceError("this trace is already in a with block; make another", location=here())
        self._entered = True

    def _prepare(self) -> TracedGraph | None:
        """The graph to send, verified; None when nothing was saved, for then there is nothing to ask for."""
        self._check_open()
        graph = self.graph
        try:
            self._verified(graph)
        except BaseException as error:
            self._fail(error)
            raise
        self._warn_of_lost_updates()
        self.builder.closed = "this trace has been sent; make another for further values"
        if graph.outputs:
            return graph
        self._finish(graph, None)
        return None

    def _warn_of_lost_updates(self) -> None:
        """``x = run.blocks[2].resid_post`` and then ``x *= 0`` changes nothing in the run: a value never changes."""
        if not self.updated:
            return
        needed = set(self.builder.needed([*self._outputs, *self._kept]))
        for node in sorted(self.updated - needed):
            what, place = self.builder.describe(node), self.builder.location(node)
            warnings.warn(
                f"{what} was computed at {place} and is not used: += and *= on a variable make a new value; to write at"
                " the site, assign to it: run.blocks[2].resid_post += v",
                stacklevel=stack_level(),
            )

    def _finish(self, graph: TracedGraph, outcome: Outcome | None) -> None:
        """Takes the results in."""
        values = {} if outcome is None else outcome.values
        by_name = {name: node for node, name in self._outputs.items()}
        handles = dict(self._kept.values())
        for output in graph.outputs:
            if output.keep:
                handles[output.name].arrive(None if outcome is None else outcome.kept.get(output.name))
                continue
            if output.name not in values:
                raise ProtocolError(f"the server did not send {output.name!r}")
            value = values[output.name].value
            spec = graph.specs[output.node]
            if not isinstance(spec, TensorSpec) or (value.shape, value.dtype) != (spec.shape, spec.dtype):
                raise ProtocolError(f"the server sent {value.dtype}{list(value.shape)} as {output.name!r}, not {spec}")
            self._arrays[by_name[output.name]] = to_array(value)
        handed_out: set[int] = set()

        def take(leaf: object, path: tuple[str, ...]) -> object:
            del path
            if not isinstance(leaf, Proxy):
                return leaf
            array = self._arrays[leaf._node]
            if leaf._node in handed_out:
                return array.copy()
            handed_out.add(leaf._node)
            return array

        nonfinite = () if outcome is None else outcome.nonfinite
        self._usage = RunUsage.of(Usage() if outcome is None else outcome.usage)
        trees = {name: map_tree(tree, take) for name, tree in self._trees.items()}
        self._results = Results(trees, nonfinite, self._usage)
        if outcome is not None:
            self.sent_bytes, self.received_bytes = outcome.sent_bytes, outcome.received_bytes
        # Runs and proxies know their trace. Did it go on knowing them, the results would outlive all of it until the
        # garbage collector comes by, which counts objects and not their bytes.
        self._trees = dict.fromkeys(self._trees)
        self._runs = [(run.index, run.tokens, run._single) if type(run) is Run else run for run in self.runs]
        self._state = "done"
        self.builder.closed = (
            "this trace has run; make another for further values (the numbers of what was saved are in .value)"
        )

    def _fail(self, error: BaseException) -> None:
        self._state = "failed"
        self.builder.closed = f"this trace failed ({type(error).__name__}: {error}); it has no values"

    def _abandon(self) -> None:
        """The block was left by an exception: nothing is sent."""
        if self._state == "open":
            self._state = "abandoned"
            self.builder.closed = "the with block of this trace was left by an exception: nothing was sent"

    def _located(self, error: GraphError, graph: TracedGraph) -> GraphError:
        return self.builder.locate(error, graph)

    # --- results --------------------------------------------------------------------------------------------------

    def _need_run(self, what: str) -> None:
        if self._state == "open":
            where = "use it below the with block" if self._entered else "build it in a with block, which runs it"
            raise ValueNotReadyError(f"{what} is known after the trace has run: {where}")
        if self._state != "done":
            raise ValueNotReadyError(f"{what} was never computed: {self.builder.closed}")

    def holds(self, proxy: Proxy) -> bool:
        """Whether the numbers of a value are here."""
        return proxy._node in self._arrays

    def value_of(self, proxy: Proxy) -> NDArray[Any]:
        """`Proxy.value`."""
        if self._state != "done":
            self._need_run(f"the value of {self.builder.describe(proxy._node)}")
        if proxy._node not in self._arrays:
            raise not_saved(proxy)
        return self._arrays[proxy._node]

    @property
    def results(self) -> Results:
        """Saved values by name.

        Raises:
            ValueNotReadyError: the trace has not run.
        """
        self._need_run("results")
        assert self._results is not None
        return self._results

    @property
    def usage(self) -> RunUsage:
        """What the execution cost and saved; all zero when nothing was saved and so nothing was sent.

        Raises:
            ValueNotReadyError: the trace has not run.
        """
        self._need_run("usage")
        assert self._usage is not None
        return self._usage

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a trace belongs to its connection and cannot be pickled; keep its results")

    if not TYPE_CHECKING:  # a checker is to find misspelt names itself

        def __getattr__(self, name: str) -> Any:
            hint = ""
            if not name.startswith("_"):
                if name in self.site_tree or hasattr(GeneratingRun, name):
                    one = self._first is not None
                    how = "what `with ... as run:` gives" if one else "what run = t.run(text) gives"
                    hint = f"; it belongs to a run, {how}: run.{name}"
                else:
                    hint = nearest(name, dir(self))
            raise MissingAttributeError(f"a trace has no attribute {name!r}{hint}", location=here())

    def __repr__(self) -> str:
        shown = {"open": "not run yet", "done": "has run", "failed": "failed", "abandoned": "abandoned"}[self._state]
        saved = ", ".join(self._trees) or "nothing"
        size = f"{len(self.runs)} runs, {len(self.builder.nodes)} nodes"
        return f"<trace of {self.builder.card.name!r}, {shown}: {size}; saves {saved}>"
