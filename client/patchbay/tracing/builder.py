"""Appends nodes to a graph while the user's program runs; every node's shape and dtype is known as it is made.

A mistake therefore raises at the user's own line. Where each node was made stays here, on the client, and is joined to
what the verifier or the server says later.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

from patchbay.errors import CausalityError, DTypeError, GraphError, TraceError
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.bodies import body_key, check_body
from patchbay.ir.card import ModelCard
from patchbay.ir.facts import NO_ATTRS, AttrTable, Facts, Inference
from patchbay.ir.fragments import Fragment
from patchbay.ir.graph import Attr, Graph, Node, Output, Run, TensorData
from patchbay.ir.infer import infer_node
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.ir.ops.spec import TensorSpec, ValueSpec
from patchbay.ir.render import INFIX, expression, render, show_index, show_spec, site_path
from patchbay.places import PACKAGE, Place, here, show_place, users_place
from patchbay.tracing.scopes import PARAM, Scope, Scopes, identity

_MAX_DEPTH = 3
#: Arguments of one operation that are shown in words, at most.
_MAX_SHOWN = 4
_BODY_NODE = re.compile(r"bodies\[(\d{1,9})\]\.nodes\[(\d{1,9})\]")

_Error = TypeVar("_Error", bound=GraphError)


class TracedGraph(Graph):
    """A graph that knows its values' shapes, its model and the user's lines, and prints as readable text."""

    specs: tuple[ValueSpec, ...]
    places: tuple[Place, ...]
    fragments: tuple[Fragment | None, ...]
    facts: tuple[Facts, ...] | None
    body_places: tuple[tuple[Place, ...], ...]
    model: str
    revision: str

    def __init__(
        self,
        graph: Graph,
        specs: Sequence[ValueSpec],
        places: Sequence[Place],
        *,
        fragments: Sequence[Fragment | None] | None = None,
        facts: Sequence[Facts] | None = None,
        body_places: Sequence[tuple[Place, ...]] = (),
        model: str = "",
        revision: str = "",
    ) -> None:
        super().__init__(graph.runs, graph.nodes, graph.outputs, graph.bodies, graph.body_facts)
        object.__setattr__(self, "body_places", tuple(body_places))
        object.__setattr__(self, "specs", tuple(specs))
        object.__setattr__(self, "places", tuple(places))
        object.__setattr__(self, "fragments", (None,) * len(graph.nodes) if fragments is None else tuple(fragments))
        object.__setattr__(self, "facts", None if facts is None else tuple(facts))
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "revision", revision)

    @cached_property
    def locations(self) -> tuple[str | None, ...]:
        """``file:line`` of the user's code that made each node."""
        return tuple(map(show_place, self.places))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        mine = (self.runs, self.nodes, self.outputs, self.bodies)
        return mine == (other.runs, other.nodes, other.outputs, other.bodies)

    __hash__ = Graph.__hash__

    def __copy__(self) -> TracedGraph:
        return self

    def __deepcopy__(self, memo: object) -> TracedGraph:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a traced graph cannot be pickled; pb.save_graph(graph, path) writes it to a file")

    def __str__(self) -> str:
        return self.text()

    def text(self, *, expand: bool = False) -> str:
        """The graph as text: every named part (`patchbay.function`) as one line, or, expanded, node by node."""
        return render(
            self,
            specs=self.specs,
            locations=self.locations,
            fragments=None if expand else self.fragments,
            body_locations=[[show_place(place) for place in places] for places in self.body_places],
        )

    __repr__ = __str__


class GraphBuilder:
    """A graph under construction.

    Attributes:
        card: the model's card.
        runs, nodes, specs: so far, in order.
        closed: why nothing more can be added, or None while it is open.
    """

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.runs: list[Run] = []
        self.nodes: list[Node] = []
        self.specs: list[ValueSpec] = []
        self.closed: str | None = None
        self._places: list[Place] = []
        self._fragments: list[Fragment | None] = []
        self._fragment: Fragment | None = None
        self._uses = 0
        self._constants: dict[object, int] = {}
        self._last_write: dict[tuple[int, str], int] = {}
        self._attrs = AttrTable()
        self._inference = Inference(card, infer_node)
        self._facts: list[Facts] = []
        self._draft = Graph()
        self._scopes: Scopes | None = None

    # --- growing --------------------------------------------------------------------------------------------------

    def add_run(self, run: Run) -> int:
        """Appends a run; returns its index."""
        self._check_open()
        if self._scopes is not None:
            self._scopes.check_outermost("a run cannot begin")
        self.runs.append(run)
        self._draft = replace(self._draft, runs=tuple(self.runs))
        return len(self.runs) - 1

    def add(
        self, op: str, args: tuple[int, ...] = (), attrs: Mapping[str, Attr] = NO_ATTRS, run: int | None = None
    ) -> int:
        """Appends a node; returns its position.

        Raises:
            GraphError: what the operation's rule says; the message names the operands and where they were made.
            TraceError: the trace is over.
        """
        if self.closed is not None:
            self._check_open()
        node = Node(op, args, self._attrs.shared(attrs) if attrs and op != "const" else attrs or NO_ATTRS, run)
        try:
            if self._scopes is not None:
                self._scopes.check(op, args)
            facts = self._inference.facts(self._draft, node, self.specs)
        except GraphError as error:
            error.location = here()
            raise self._explain(error, args) from None
        nodes = self.nodes
        position = len(nodes)
        nodes.append(node)
        self.specs.append(facts.spec)
        self._facts.append(facts)
        # Inlined: this runs once a node, and a call would be a frame more to walk out of.
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back  # type: ignore[assignment]
        self._places.append(None if frame is None else (frame.f_code, frame.f_lasti))
        self._fragments.append(self._fragment)
        if self._scopes is not None:
            self._scopes.own(position, op)
        if op == "site.write":
            self._last_write[(run, attrs["site"])] = position  # type: ignore[index]
        return position

    def constant(self, data: TensorData, *, shared: bool = True) -> int:
        """The node of a constant; equal contents share one, unless it is to be a value of its own."""
        key = (data.dtype, data.shape, data.data)
        found = self._constants.get(key) if shared else None
        if found is None:
            found = self._constants[key] = self.add("const", (), {"value": data})
        return found

    def artifact(self, info: ArtifactInfo) -> int:
        """The node of a tensor that the server keeps."""
        found = self._constants.get(info.digest)
        if found is None:
            attrs: dict[str, Attr] = {"artifact": info.digest, "shape": info.shape, "dtype": info.dtype.name}
            found = self._constants[info.digest] = self.add("const", (), attrs)
        return found

    def scalar(self, value: bool | int | float) -> int:
        """The node of a Python number; equal numbers of the same type share one."""
        # repr tells -0.0 from 0.0 and joins NaNs; of other numbers it is far slower than the number itself
        key = (type(value), value if value and value == value else repr(value))
        found = self._constants.get(key)
        if found is None:
            found = self._constants[key] = self.add("const", (), {"scalar": value})
        return found

    @contextmanager
    def fragment(self, name: str, version: str = "") -> Iterator[None]:
        """Nodes that are made inside belong to one use of the function `name`; uses inside a use are part of it."""
        if self._fragment is not None:
            yield
            return
        self._uses += 1
        self._fragment = Fragment(name, version, self._uses)
        try:
            yield
        finally:
            self._fragment = None

    # --- bodies: functions that are traced to be run by the server as often as it takes ---------------------------

    def body(self, op: str) -> AbstractContextManager[Scope]:
        """Nodes that are made inside belong to a function given to `op`."""
        self._check_open()
        if self._scopes is None:
            self._scopes = Scopes(self.nodes, self.specs)
        return self._scopes.inside(Scope(op, here()))

    def add_param(self, scope: Scope, spec: TensorSpec, name: str) -> int:
        """The node that stands for what a function takes."""
        assert self._scopes is not None and self._scopes.current is scope
        self.nodes.append(Node(PARAM, (), {"name": name}))
        self.specs.append(spec)
        self._facts.append(Facts(spec, 0, 0, spec.nbytes))
        self._places.append(users_place())
        self._fragments.append(None)
        self._scopes.own(len(self.nodes) - 1, PARAM)
        scope.params.append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def captured(self, scope: Scope, results: Sequence[int]) -> list[int]:
        """Values from outside that a function's results need."""
        assert self._scopes is not None
        return self._scopes.captured(scope, results)

    def add_body(self, scope: Scope, results: Sequence[int], captured: Sequence[int]) -> int:
        """The body that a traced function became: parameters first, then `captured`; returns its number.

        Raises:
            GraphError: a rule of bodies is broken; the user's line is named.
        """
        scopes = self._scopes
        assert scopes is not None
        body, origins = scopes.cut(scope, results, captured)
        key = body_key(body, identity(scopes.bodies))
        known = scopes.find(key)
        if known is not None:
            return known
        draft = replace(self._draft, bodies=(*scopes.bodies, body), body_facts=tuple(scopes.facts))
        try:
            facts = check_body(draft, self.card, len(scopes.bodies), scopes.facts, infer_node)
        except GraphError as error:
            at = body_node(error.field)
            error.location = scope.place if at is None else self.location(origins[at[1]])
            raise
        number = scopes.add(body, origins, facts, key)
        self._draft = replace(draft, body_facts=tuple(scopes.facts))
        return number

    def check_visible(self, node: int) -> None:
        """
        Raises:
            TraceError: the value lives inside a function that is run by the server as often as it takes.
        """
        if self._scopes is not None:
            self._scopes.check_outermost("no value can be asked for")
            self._scopes.check_visible(node)

    def written_since(self, run: int, site: str, node: int) -> bool:
        """Whether the site was written after `node` was made."""
        return self._last_write.get((run, site), -1) > node

    def _check_open(self) -> None:
        if self.closed is not None:
            raise TraceError(self.closed)

    # --- finishing ------------------------------------------------------------------------------------------------

    def finish(self, outputs: Sequence[Output], *, prune: bool = True) -> TracedGraph:
        """The graph that leads to `outputs`.

        Values that nothing uses are left out: ``x[...] = v`` makes Python read ``x`` first, and ``+=`` makes it add.
        Writes always stay, so that a mistake in one is found even where nothing reads past it.
        """
        keep = self.needed(o.node for o in outputs) if prune else list(range(len(self.nodes)))
        runs = tuple(self.runs)
        if len(keep) == len(self.nodes):
            return self._traced(Graph(runs, tuple(self.nodes), tuple(outputs)), range(len(self.nodes)))
        where = dict(zip(keep, range(len(keep)), strict=True))
        nodes: list[Node] = []
        for i in keep:
            node = self.nodes[i]
            if node.args:
                node = Node(node.op, tuple(where[a] for a in node.args), node.attrs, node.run)
            nodes.append(node)
        graph = Graph(runs, tuple(nodes), tuple(replace(o, node=where[o.node]) for o in outputs))
        return self._traced(graph, keep)

    def _traced(self, graph: Graph, kept: Sequence[int]) -> TracedGraph:
        origins: list[tuple[int, ...]] = []
        if self._scopes is not None and any(node.op in BODY_ATTRS for node in graph.nodes):
            graph = replace(graph, bodies=self._draft.bodies, body_facts=self._draft.body_facts)
            origins = self._scopes.origins
        return TracedGraph(
            graph,
            [self.specs[i] for i in kept],
            [self._places[i] for i in kept],
            body_places=[tuple(self._places[i] for i in nodes) for nodes in origins],
            fragments=[self._fragments[i] for i in kept],
            facts=[self._facts[i] for i in kept],
            model=self.card.name,
            revision=self.card.revision,
        )

    def needed(self, wanted: Iterable[int]) -> list[int]:
        """The nodes that lead to those that are wanted, and all writes with what leads to them."""
        needed = bytearray(len(self.nodes))
        for i in wanted:
            needed[i] = 1
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            if needed[i] or node.op == "site.write":
                needed[i] = 1
                for a in node.args:
                    needed[a] = 1
        return [i for i, n in enumerate(needed) if n]

    # --- talking about nodes --------------------------------------------------------------------------------------

    def location(self, node: int) -> str | None:
        """``file:line`` of the user's code that made `node`."""
        return show_place(self._places[node])

    def describe(self, node: int, depth: int = _MAX_DEPTH) -> str:
        """What made `node`, such as ``blocks.2.resid_post[:, -1] of run 'The capital of France is'``."""
        text = self._formula(node, depth)
        run = self._run_of(node)
        return text if run is None else f"{text} of run {self.run_name(run)}"

    def run_name(self, run: int) -> str:
        """A run's label in quotes, or its number."""
        label = self.runs[run].label
        return repr(label) if label else str(run)

    def _formula(self, node: int, depth: int) -> str:
        made = self.nodes[node]
        if made.op == "site.read":
            return str(made.attrs["site"])
        if made.op == "site.write":
            arrays = ["..." for _ in made.args[1:]]
            return f"the write at {made.attrs['site']}{show_index(made.attrs.get('index', ()), arrays)}"
        if made.op == PARAM:
            return str(made.attrs["name"])
        if depth == 0:
            return "..."
        # A stack of hundreds of values of stacks is shown by its first few.
        args = [self._formula(a, depth - 1) if i < _MAX_SHOWN else "..." for i, a in enumerate(made.args)]
        binds = made.op in INFIX or bool(made.attrs.get("index"))
        for i, a in enumerate(made.args[:2] if binds else ()):
            chained = i == 0 and self.nodes[a].op == made.op  # a + b + c
            if self.nodes[a].op in INFIX and args[i] != "..." and not chained:
                args[i] = f"({args[i]})"
        if len(args) > _MAX_SHOWN and not binds and made.op not in BODY_ATTRS:
            args[_MAX_SHOWN:] = [f"and {len(args) - _MAX_SHOWN} more"]
        return expression(made, args)

    def _run_of(self, node: int) -> int | None:
        """The one run whose sites `node` is an indexing or method call of; None when that is not one."""
        for _ in range(_MAX_DEPTH + 1):
            made = self.nodes[node]
            if made.run is not None:
                return made.run
            tensors = [a for a in made.args if self.nodes[a].op != "const"]
            if len(tensors) != 1:
                return None
            node = tensors[0]
        return None

    def _explain(self, error: _Error, args: tuple[int, ...]) -> _Error:
        """`error` with a line for each operand: what it is, its spec, where it was made."""
        lines = []
        known = [a for a in dict.fromkeys(args) if 0 <= a < len(self.nodes)]
        if len(known) > _MAX_SHOWN:  # of many alike, one: the others are not what is wrong
            known = list({self.specs[a]: a for a in reversed(known)}.values())[::-1][:_MAX_SHOWN]
        for a in known:
            spec = self.specs[a]
            if isinstance(spec, TensorSpec) and spec.scalar is not None:
                if isinstance(error, DTypeError):
                    lines.append(f"\n  {self._formula(a, 1)}: a Python number")
                continue
            what = "a constant" if self.nodes[a].op == "const" else self.describe(a)
            place = self.location(a)
            lines.append(f"\n  {show_spec(spec)}: {what}" + (f", made at {place}" if place else ""))
        error.message += "".join(lines)
        return error

    def locate(self, error: _Error, graph: TracedGraph) -> _Error:
        """`error`, raised about a node of `graph`, with the user's lines joined to it."""
        known = len(graph.locations)
        at = body_node(error.field)
        if at is not None and error.location is None and at[0] < len(graph.body_places):
            places = graph.body_places[at[0]]
            error.location = show_place(places[at[1]]) if at[1] < len(places) else None
        if error.node is not None and 0 <= error.node < known and error.location is None:
            error.location = graph.locations[error.node]
        others = [i for i in error.related if 0 <= i < known]
        if others:
            shown = [f"\n  {_what(graph, i)} at {graph.locations[i]}" for i in others]
            if isinstance(error, CausalityError) and error.node is not None and 0 <= error.node < known:
                shown.insert(0, f"\n  {_what(graph, error.node)} at {graph.locations[error.node]}")
            error.message += "".join(shown)
        return error


def body_node(field: str | None) -> tuple[int, int] | None:
    """Body and node of a field such as ``bodies[2].nodes[5]``; None for any other."""
    found = _BODY_NODE.match(field or "")
    return None if found is None else (int(found[1]), int(found[2]))


def _what(graph: Graph, i: int) -> str:
    node = graph.nodes[i]
    if node.op == "site.write":
        return f"write: run{node.run}.{site_path(str(node.attrs['site']))}"
    if node.op == "site.read":
        return f"read: run{node.run}.{site_path(str(node.attrs['site']))}"
    return node.op
