"""Where the functions given to `scan`, `cond` and `vmap` are traced: what they make becomes a body of the graph.

The function runs once, with stand-ins for what it will be given. Its nodes are appended like any others, and belong to
its scope: nothing outside can use them. When it has returned, those that its results need are cut out as a
`patchbay.ir.bodies.Body`; values from outside that they use become further parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from patchbay.errors import GraphError, TraceError
from patchbay.ir.bodies import Body, BodyFacts
from patchbay.ir.generation import ACCESSES, STACK
from patchbay.ir.graph import Node
from patchbay.ir.ops.spec import TensorSpec, ValueSpec

#: Stands in the builder for a parameter of a body; never part of a graph.
PARAM = "body.param"
#: What belongs to no scope wherever it is made: tensors travel once, however many bodies use them.
_ANYWHERE = frozenset({"const", "param.read"})


@dataclass(eq=False)
class Scope:
    """One function under trace.

    Attributes:
        op: what it is given to.
        place: ``file:line`` of that.
        params: nodes that stand for what it takes.
        closed: whether it has returned.
    """

    op: str
    place: str | None
    params: list[int] = field(default_factory=list)
    closed: bool = False


class Scopes:
    """The scopes of one graph under construction, and the bodies that they became.

    Args:
        nodes, specs: of the graph; they grow.
    """

    def __init__(self, nodes: Sequence[Node], specs: Sequence[ValueSpec]) -> None:
        self.bodies: list[Body] = []
        self.facts: list[BodyFacts] = []
        #: For every body, the node that each of its own was made as.
        self.origins: list[tuple[int, ...]] = []
        self.current: Scope | None = None
        self._nodes, self._specs = nodes, specs
        self._owners: dict[int, Scope] = {}
        self._known: dict[object, int] = {}

    @contextmanager
    def inside(self, scope: Scope) -> Iterator[Scope]:
        """Nodes that are made meanwhile belong to `scope`."""
        outer, self.current = self.current, scope
        try:
            yield scope
        finally:
            self.current = outer
            scope.closed = True

    def own(self, node: int, op: str) -> None:
        """A node was made."""
        if self.current is not None and op not in _ANYWHERE:
            self._owners[node] = self.current

    def check(self, op: str, args: Sequence[int]) -> None:
        """
        Raises:
            GraphError: an operation of a run inside a body.
            TraceError: an argument that lives inside a body which is finished.
        """
        if self.current is not None and (op in ACCESSES or op == STACK):
            raise GraphError(
                f"{op}: the function given to {self.current.op} at {self.current.place} is pure: it cannot read or "
                "write at a run. Read the value before and use it inside, or return what is to be written"
            )
        for a in args:
            self.check_visible(a)

    def check_visible(self, node: int) -> None:
        """
        Raises:
            TraceError: `node` lives inside a body, and is wanted outside it.
        """
        owner = self._owners.get(node)
        if owner is not None and owner.closed:
            raise TraceError(
                f"a value made inside the function given to {owner.op} at {owner.place} exists only there: return it "
                "from the function"
            )

    def check_outermost(self, what: str) -> None:
        """
        Raises:
            TraceError: a function is under trace.
        """
        if self.current is not None:
            raise TraceError(f"{what} inside the function given to {self.current.op} at {self.current.place}")

    # --- cutting out ----------------------------------------------------------------------------------------------

    def captured(self, scope: Scope, results: Sequence[int]) -> list[int]:
        """Values from outside that `results` need, in the order in which they are first used."""
        inside = set(scope.params)
        found: dict[int, None] = {}
        needed = self._needed(scope, results)
        for i in needed:
            for a in self._nodes[i].args:
                if self._owners.get(a) is not scope and not self._is_number(a):
                    found[a] = None
        for r in results:
            if self._owners.get(r) is not scope and r not in inside:
                found[r] = None
        return list(found)

    def cut(self, scope: Scope, results: Sequence[int], captured: Sequence[int]) -> tuple[Body, tuple[int, ...]]:
        """The body that computes `results`, and the node that each of its own was made as."""
        where = {node: i for i, node in enumerate((*scope.params, *captured))}
        params = [self._tensor(node) for node in where]
        nodes: list[Node] = []
        origins: list[int] = []

        def put(node: int, made: Node) -> None:
            where[node] = len(params) + len(nodes)
            nodes.append(made)
            origins.append(node)

        for i in self._needed(scope, results):
            made = self._nodes[i]
            for a in made.args:
                if a not in where:  # a number, which is made anew wherever it is used
                    put(a, self._nodes[a])
            put(i, Node(made.op, tuple(where[a] for a in made.args), made.attrs))
        gives = tuple(where[r] for r in results)
        return Body(tuple(params), tuple(nodes), gives, tuple(map(self._tensor, results))), tuple(origins)

    def add(self, body: Body, origins: tuple[int, ...], facts: BodyFacts, key: object) -> int:
        """Its number."""
        self._known[key] = len(self.bodies)
        self.bodies.append(body)
        self.facts.append(facts)
        self.origins.append(origins)
        return len(self.bodies) - 1

    def find(self, key: object) -> int | None:
        """The number of a body that was added under `key`."""
        return self._known.get(key)

    def _needed(self, scope: Scope, results: Sequence[int]) -> list[int]:
        params = set(scope.params)
        needed, pending = set[int](), list(results)
        while pending:
            i = pending.pop()
            if i not in needed and i not in params and self._owners.get(i) is scope:
                needed.add(i)
                pending.extend(self._nodes[i].args)
        return sorted(needed)

    def _is_number(self, node: int) -> bool:
        spec = self._specs[node]
        return isinstance(spec, TensorSpec) and spec.scalar is not None

    def _tensor(self, node: int) -> TensorSpec:
        spec = self._specs[node]
        assert isinstance(spec, TensorSpec) and spec.scalar is None
        return TensorSpec(spec.shape, spec.dtype)


def identity(bodies: Sequence[Body]) -> Mapping[int, int]:
    """Every body stands for itself."""
    return {i: i for i in range(len(bodies))}
