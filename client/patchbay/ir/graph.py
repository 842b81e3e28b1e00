"""The intervention graph: frozen, flat, pure data.

A graph is runs, nodes and outputs. A node is its position in ``graph.nodes``; every argument refers to a smaller
position, so a graph holds no cycle and no nesting. Nothing here computes, checks or sends anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from patchbay.ir.dtypes import DType

if TYPE_CHECKING:
    from patchbay.ir.bodies import Body, BodyFacts


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor as bytes.

    Attributes:
        dtype: element type.
        shape: extents, outermost first.
        data: little-endian, C-contiguous elements; ``bytes`` or a byte-format ``memoryview``.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)


#: What an attribute may hold; tuples nest. Every value is immutable and hashable.
Attr: TypeAlias = "None | bool | int | float | str | TensorData | tuple[Attr, ...]"

_NO_ATTRS: Mapping[str, Attr] = MappingProxyType({})


@dataclass(frozen=True, slots=True, init=False)
class Node:
    """One operation.

    Attributes:
        op: name of an OpSpec, such as ``"add"`` or ``"site.read"``.
        args: positions of the nodes whose values it takes, each smaller than its own.
        attrs: static parameters, as the OpSpec declares them.
        run: index of the run it belongs to, for operations at sites; None for pure operations.
    """

    op: str
    args: tuple[int, ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=lambda: _NO_ATTRS)
    run: int | None = None

    def __init__(
        self, op: str, args: tuple[int, ...] = (), attrs: Mapping[str, Attr] = _NO_ATTRS, run: int | None = None
    ) -> None:
        # As a frozen dataclass does it, but with the setters looked up once: graphs hold thousands of nodes.
        _SET_OP(self, op)
        _SET_ARGS(self, args)
        _SET_ATTRS(self, attrs)
        _SET_RUN(self, run)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two nodes that compute the same value; hashable."""
        return (self.op, self.args, tuple(sorted(self.attrs.items())), self.run)


_SET_OP, _SET_ARGS, _SET_ATTRS, _SET_RUN = (getattr(Node, f.name).__set__ for f in fields(Node))


@dataclass(frozen=True, slots=True)
class Generation:
    """How a run goes on after its prompt.

    Forward 0 carries the prompt, forward k (a decode step) the token that came out of forward k - 1; each ends with
    one more token for every row that has not stopped.

    Attributes:
        max_new_tokens: forwards, and so tokens per row, at most; at least 1.
        temperature: what logits are divided by before a token is drawn; 0 takes the most likely token.
        top_k: how many of the most likely tokens may be drawn; 0 for all.
        top_p: the fewest of the most likely tokens that together have this probability may be drawn; 1 for all.
        seed: of the random numbers: row i draws from a generator of its own, seeded with ``seed + i``.
        stop: a row stops once its new tokens end in one of these sequences of ids, which stay in it.
        eos: whether the model's own end-of-text tokens stop a row too.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    eos: bool = True


@dataclass(frozen=True)
class Run:
    """One forward of the model over some rows, or as many as it takes to generate tokens after them.

    Attributes:
        tokens: one tuple of token ids per row; rows may differ in length. Empty for models that take no tokens.
        label: what the user called it or typed, for printing; never interpreted.
        inputs: further inputs by name (``pixel_values``, ``decoder_input_ids``, ...), one row per row.
        generation: how it goes on after `tokens`; None for a single forward.
    """

    tokens: tuple[tuple[int, ...], ...] = ()
    label: str = ""
    inputs: tuple[tuple[str, TensorData], ...] = ()
    generation: Generation | None = None

    @cached_property
    def rows(self) -> int:
        if self.tokens or not self.inputs:
            return len(self.tokens)
        shape = self.inputs[0][1].shape
        return shape[0] if shape else 0

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.tokens)

    @cached_property
    def seq(self) -> int:
        """Length of the longest row: the extent of the ``seq`` axis that users see."""
        return max(self.lengths, default=0)

    @property
    def positions(self) -> int:
        """Token positions that each row takes in the model: the last token that is generated takes none."""
        return self.seq + (self.generation.max_new_tokens - 1 if self.generation else 0)

    @property
    def ragged(self) -> bool:
        return any(length != self.seq for length in self.lengths)


@dataclass(frozen=True, slots=True)
class Output:
    """A value to send back: a name, unique in the graph, and a node.

    Attributes:
        name: its name.
        node: position of its node.
        keep: the value stays on the server as an artifact of the caller's, and only what names it is sent.
    """

    name: str
    node: int
    keep: bool = False


@dataclass(frozen=True)
class Graph:
    """Runs, nodes in topological order, and the outputs: all that is ever sent back.

    Attributes:
        runs: forwards of the model.
        nodes: operations.
        outputs: what is sent back.
        bodies: sub-programs that loops, choices and maps among the nodes run (`patchbay.ir.bodies`).
        body_facts: what is known of each body; found by whoever checks the graph, never received.
    """

    runs: tuple[Run, ...] = ()
    nodes: tuple[Node, ...] = ()
    outputs: tuple[Output, ...] = field(default=())
    bodies: tuple[Body, ...] = ()
    body_facts: tuple[BodyFacts, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def ops(self) -> frozenset[str]:
        """Names of the operations among the nodes: what a graph has nothing of need not be looked for."""
        return frozenset([node.op for node in self.nodes])

    @cached_property
    def in_runs(self) -> tuple[int, ...]:
        """Positions of the nodes that belong to a run: a few, where most of a graph is arithmetic."""
        return tuple([i for i, node in enumerate(self.nodes) if node.run is not None])
