"""What a plan is made of: forwards, whose rows they carry, and what happens at each of their sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbay.ir.graph import Generation, TensorData

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Slot:
    """The rows of a forward that belong to one run.

    Attributes:
        run: the run.
        start, stop: its rows in the forward.
        seq: extent of its sequence axes as its user sees them.
        lengths: real length of each row.
        ragged: whether the lengths differ.
        first: the first position that the forward computes.
        short: axes of the site's value that begin at that position.
        flat: for a site whose value was computed at some positions alone, ``[1, all of them, ...]``: where the run's
            begin, `seq` of them for each row.
    """

    run: int
    start: int
    stop: int
    seq: int
    lengths: tuple[int, ...]
    ragged: bool
    first: int = 0
    short: tuple[int, ...] = ()
    flat: int | None = None

    def extent(self, axis: int) -> int:
        """Positions along an axis of the site's value that belong to the run."""
        return self.seq - self.first if axis in self.short else self.seq

    def covers(self, value: torch.Tensor, axes: Sequence[int]) -> bool:
        """Whether the run's rows, as its user sees them, are all of a forward's value."""
        whole = not self.ragged and self.flat is None and self.start == 0 and self.stop == value.shape[0]
        return whole and all(value.shape[axis] == self.extent(axis) for axis in axes)


@dataclass(frozen=True, slots=True)
class Part:
    """Which positions of what a forward shows a read takes, and where it has those that the forward does not compute.

    Attributes:
        axis: the axis over positions.
        start, count: the positions, counted from the first that is shown.
        before: the read of the base run that has the positions before; None where none are needed.
        before_start, before_count: which positions of that read's value.
    """

    axis: int
    start: int
    count: int
    before: int | None = None
    before_start: int = 0
    before_count: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """Take the value of a run's rows at the site.

    Attributes:
        node: the read.
        slot: the run's rows.
        differentiated: a gradient is taken with respect to the value, so the model goes on with it.
        part: which positions are taken; None for all.
        columns: which of the last axis; None for all.
    """

    node: int
    slot: Slot
    differentiated: bool = False
    part: Part | None = None
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a later forward of the run go on with the value that an earlier one read, so that gradients reach it.

    Attributes:
        node: the read.
        slot: the run's rows.
        free: values to forget afterwards.
    """

    node: int
    slot: Slot
    free: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Write:
    """Change a run's rows at the site.

    Attributes:
        node: the write.
        slot: the run's rows.
        value: what is written.
        indices: integer arrays of the index.
        mode: how it meets what is there.
        index: which part is written.
        free: values to forget afterwards.
        moved: arrays among `indices` that count positions: which, out of how many, and how many are not there.
    """

    node: int
    slot: Slot
    value: int
    indices: tuple[int, ...]
    mode: str
    index: tuple[Any, ...]
    free: tuple[int, ...] = ()
    moved: tuple[tuple[int, int, int], ...] = ()


class Compute(NamedTuple):
    """Apply an operation to values; a tuple, since a plan may hold tens of thousands.

    Attributes:
        node: the node.
        op: its operation.
        function: what is applied; None for constants, ``item``, ``call`` and the like, which the executor knows.
        args: nodes whose values it takes.
        attrs: what it takes beside them, by name.
        outputs: names under which the value is sent.
        free: values to forget afterwards.
        differentiated: whether a gradient is taken with respect to the value.
    """

    node: int
    op: str
    function: Callable[..., Any] | None
    args: tuple[int, ...]
    attrs: Mapping[str, Any]
    outputs: tuple[str, ...] = ()
    free: tuple[int, ...] = ()
    differentiated: bool = False


@dataclass(frozen=True, slots=True)
class Emit:
    """Send a value that was read, under each of the names."""

    node: int
    outputs: tuple[str, ...]
    free: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """Take the tokens that the run has generated so far."""

    node: int


Step = Read | Resume | Write | Compute | Emit | Generated


@dataclass(frozen=True, slots=True)
class Actions:
    """What happens when a forward reaches one site (or before it begins, or after the last).

    Attributes:
        steps: in program order.
        survivors: values made here that are needed later, and so must not share memory with the model's tensors.
        writes: whether the model goes on with something else than its own tensor.
    """

    steps: tuple[Step, ...] = ()
    survivors: tuple[int, ...] = ()
    writes: bool = False


@dataclass(frozen=True)
class Forward:
    """One of the forwards of a generating run.

    Attributes:
        before: what happens before it begins.
        sites: what happens at each site, in forward order.
    """

    before: Actions
    sites: Mapping[str, Actions]


@dataclass(frozen=True)
class Start:
    """Where the rows of a forward start that goes on from another one.

    Attributes:
        base: the run that they go on from.
        first: the first position that is computed.
        rows: for every row, the base's row.
        after: for every row, the layer after which it joins.
        last: the first position that anything reads behind the last layer, where that is computed from there on alone;
            None where it is computed at all positions.
    """

    base: int
    first: int
    rows: tuple[int, ...]
    after: tuple[int, ...]
    last: int | None = None

    @property
    def skipped(self) -> int:
        """Layers that none of the rows runs."""
        return max(self.after[0] + 1, 0)


@dataclass(frozen=True)
class Pass:
    """One forward of the model, or all of a generating run's.

    Attributes:
        slots: whose rows it carries.
        rows, seq: extents of its batch; shorter rows are padded on the right.
        tokens: one tuple of ids per row, unpadded; none where the model takes no tokens.
        inputs: further inputs by name, one value per slot.
        before: what happens before it begins.
        sites: what happens at each site, in forward order.
        stop_at: the last site that anything needs; None runs the model to its end.
        generation: how tokens are generated; None for a single forward.
        steps: the forwards of a generating run as far as anything needs them, instead of `sites`; the last may hold
            only what happens once the tokens are there.
        goes_on: where its rows start; None for a whole forward. `tokens` are the base's then.
        keeps: slots of runs that leave what others go on from.
        keeps_through: the layer after which the forward ends; None where `stop_at` says when.
        drops: runs that nothing goes on from any more when it has ended.
        logits: the only positions at which logits are computed: row, first position and number of positions.
        columns: the only tokens whose logits are computed; None for all.
        untouched: of a generating run's prompts: the positions at the beginning of every row that nothing looks at or
            changes, so that an earlier request's may stand for them.
        leaves: whether a later prompt may go on from what this one leaves: nothing changes it.
    """

    slots: tuple[Slot, ...]
    rows: int
    seq: int
    tokens: tuple[tuple[int, ...], ...]
    inputs: Mapping[str, tuple[TensorData, ...]]
    before: Actions
    sites: Mapping[str, Actions]
    stop_at: str | None
    generation: Generation | None = None
    steps: tuple[Forward, ...] = ()
    goes_on: Start | None = None
    keeps: tuple[Slot, ...] = ()
    keeps_through: int | None = None
    drops: tuple[int, ...] = ()
    logits: tuple[tuple[int, int, int], ...] | None = None
    columns: tuple[int, ...] | None = None
    untouched: int = 0
    leaves: bool = False

    @property
    def forwards(self) -> int:
        """Forwards of the model, at most."""
        return min(len(self.steps), self.generation.max_new_tokens) if self.generation else 1

    @property
    def positions(self) -> int:
        """Token positions that it puts through the model, at most."""
        first = 0 if self.goes_on is None else self.goes_on.first
        return self.rows * (self.seq - first + self.forwards - 1)
