"""Which axes of a value follow the rows, the tokens and the steps of a batch.

Shapes alone do not tell (a batch of 16 tokens, a width of 16), so the function is traced again for a batch of one row
more, whose prompts are longer and whose generating runs make more steps, each by a number of its own: what grew by one
of these numbers follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from patchbay.datasets.batching import Batch, Key, Span
from patchbay.errors import TraceError
from patchbay.tokens import Tokens

if TYPE_CHECKING:
    from patchbay.datasets.reducers import Reduction
    from patchbay.tracing.proxy import Proxy


@dataclass(frozen=True)
class TokensOf:
    """An axis has an entry for each token of a prompt, padding on the left.

    Attributes:
        key: the prompt's column.
    """

    key: Key


@dataclass(frozen=True)
class StepsOf:
    """An axis has an entry for each step of a generating run; a row's own end before it.

    Attributes:
        run: number of the run in the graph.
    """

    run: int


Along: TypeAlias = "TokensOf | StepsOf"


@dataclass(frozen=True)
class Growth:
    """By how much the other batch is larger (or smaller, where there is no room).

    Attributes:
        tokens: of each prompt.
        steps: of each generating run, by its number in the graph.
        counts: how many steps each makes in the first batch.
    """

    tokens: Mapping[Key, int]
    steps: Mapping[int, int]
    counts: Mapping[int, int]

    @property
    def tells(self) -> bool:
        """Whether everything grows: there is room for it, one way or the other."""
        return all(self.tokens.values()) and all(self.steps.values())


def growth_of(
    batch: Batch, spans: Sequence[Span], generating: Mapping[int, tuple[Key | None, int]], n_ctx: int, order: int
) -> Growth:
    """Numbers of which no two are equal, nor any the sum of others.

    Args:
        batch: the rows.
        spans: the runs over them.
        generating: for each generating run its prompt and how many tokens it makes.
        n_ctx: positions that the model takes.
        order: 1, or -1 for the prompts' numbers the other way round.
    """
    keys = list(batch.rows[0].prompts)
    extra = {key: max((s.extra for s in spans if s.key == key), default=0) for key in keys}
    size, tokens, steps = 1, dict[Key, int](), dict[int, int]()
    for key in keys[::order]:
        longest = batch.seq_of(key)
        fits = longest + extra[key] + size <= n_ctx
        tokens[key] = size if fits else -size if longest > size else 0
        size *= 2
    for run, (prompt, count) in generating.items():
        taken = 0 if prompt is None else batch.seq_of(prompt) + max(tokens[prompt], 0)
        fits = taken + count - 1 + size <= n_ctx
        steps[run] = size if fits else -size if count > size else 0
        size *= 2
    return Growth(tokens, steps, {run: count for run, (_, count) in generating.items()})


def wider(batch: Batch, tokens: Mapping[Key, int]) -> Batch:
    """A batch of one row more, whose prompts are longer or shorter by so many tokens."""
    rows = []
    for row in (*batch.rows, batch.rows[0]):
        prompts = {key: _resized(found, tokens[key], batch.seq_of(key)) for key, found in row.prompts.items()}
        rows.append(replace(row, prompts=prompts))
    return Batch(batch.number, batch.window, tuple(rows))


def _resized(tokens: Tokens, by: int, longest: int) -> Tokens:
    if by < 0:
        keep = min(len(tokens), longest + by)
        return Tokens(
            tokens.ids[:keep], tokens.strings[:keep], tokens.offsets[:keep], tokens.special[:keep], tokens.text
        )
    return Tokens(
        (*tokens.ids, *(tokens.ids[-1:] * by)),
        (*tokens.strings, *("",) * by) if tokens.strings else (),
        (*tokens.offsets, *((0, 0),) * by) if tokens.offsets else (),
        (*tokens.special, *(True,) * by) if tokens.special else (),
        tokens.text,
    )


@dataclass(frozen=True)
class Axes:
    """How a value depends on the batch.

    Attributes:
        follows: what each axis behind the rows follows, where it follows anything; None where that could not be found
            out.
    """

    follows: Mapping[int, Along] | None


def axes_of(
    name: str, value: Proxy, twin: Proxy | None, batch: Batch, growth: Growth, paired: Sequence[Key] = ()
) -> Axes:
    """
    Args:
        name: of the value.
        value: of the batch.
        twin: the same of the other batch; None where it cannot be had.
        batch: the rows.
        growth: by which the other differs.
        paired: prompts of equal length in every row; what follows one of them follows them all, and so the first.

    Raises:
        TraceError: the value's first axis is not the rows.
    """
    rows = len(batch.rows)
    follows = value.ndim > 0 and value.shape[0] == rows
    if twin is None or twin.ndim != value.ndim:
        if not follows:
            raise TraceError(_no_rows(name, value, rows))
        return Axes({} if value.ndim == 1 else None)
    if not follows or twin.shape[0] != rows + 1:
        raise TraceError(_no_rows(name, value, rows, twin))
    found: dict[int, Along] = {}
    for axis in range(1, value.ndim):
        change = twin.shape[axis] - value.shape[axis]
        if change == 0:
            continue
        along = _grown(change, value.shape[axis], batch, growth, paired)
        if along is None:
            raise TraceError(
                f"{name!r} {list(value.shape)} has an axis ({axis}) whose extent depends on the batch, but is not its"
                f" {' or '.join(str(batch.seq_of(key)) for key in growth.tokens)} tokens"
                + (" or its steps" if growth.steps else "")
            )
        found[axis] = along
    return Axes(found)


def _grown(change: int, extent: int, batch: Batch, growth: Growth, paired: Sequence[Key]) -> Along | None:
    for key in (*paired, *growth.tokens):
        if change == growth.tokens[key] and extent == batch.seq_of(key):
            return TokensOf(key)
    counts = growth.counts
    return next((StepsOf(run) for run, by in growth.steps.items() if (change, extent) == (by, counts[run])), None)


def _no_rows(name: str, value: Proxy, rows: int, twin: Proxy | None = None) -> str:
    says = f"{name!r} {list(value.shape)} has no entry for each of the {rows} rows of a batch along its first axis. "
    if twin is not None and value.ndim > 1 and (value.shape[1], twin.shape[1]) == (rows, rows + 1):
        return f"{says}Its second axis is the rows (steps stand before them): swap the two, value.swapaxes(0, 1)"
    return f"{says}Reduce over rows with pb.reduce, not in the graph: batches are of no fixed size"


def known(axes: Axes, value: Proxy, name: str) -> dict[int, Key]:
    """Axes that follow a prompt's tokens, by their numbers (that of the rows counted).

    Raises:
        TraceError: which axes of a value follow the tokens is not known, so that padding could not be told apart.
    """
    if axes.follows is None:
        raise TraceError(
            f"{name!r}: which axes of {list(value.shape)} follow the tokens cannot be seen here (the function takes one"
            " length only); index them, or reduce the value with over='rows' or over='tokens'"
        )
    return {axis: along.key for axis, along in axes.follows.items() if isinstance(along, TokensOf)}


def settle(reduction: Reduction, axes: Axes, name: str, batch: Batch, steps: Mapping[int, int]) -> None:
    """Decides what the samples of a reduction are.

    Args:
        reduction: the reduction.
        axes: of its value.
        name: of the result.
        batch: the rows.
        steps: for each generating run, how many it makes.

    Raises:
        TraceError: it cannot be decided, or the result would depend on the batch.
    """
    shown = list(reduction.value.shape)
    if axes.follows is None:
        if reduction.over is None:
            raise TraceError(
                f"{name!r}: whether {shown} has tokens along its second axis cannot be seen here (the function looks at"
                f" tokens, or takes one length only): say pb.reduce.{reduction.name}(..., over='rows') or over='tokens'"
            )
        if reduction.over != "rows":
            reduction.along = _told(reduction, batch, steps)
            if reduction.along is None:
                raise TraceError(f"{name!r}: over={reduction.over!r}, but {shown} has no such axis behind its rows")
        return
    second = axes.follows.get(1)
    late = [axis for axis, along in axes.follows.items() if isinstance(along, StepsOf)]
    if reduction.over is None and late:
        raise TraceError(
            f"{name!r}: axis {late[0]} of {shown} is the steps of a generating run, and rows end at different ones: say"
            f" pb.reduce.{reduction.name}(..., over='steps') to take each step that a row came to as a sample, or"
            " over='rows' to count those that never came as the zeros that they read as"
        )
    if reduction.over is None:
        reduction.over = "tokens" if isinstance(second, TokensOf) else "rows"
    if reduction.over != "rows":
        reduction.along = second
        if not isinstance(second, TokensOf if reduction.over == "tokens" else StepsOf):
            what = "sequence axis" if reduction.over == "tokens" else "axis of steps"
            raise TraceError(f"{name!r}: over={reduction.over!r}, but {shown} has no {what} behind its rows")
    left = [
        axis
        for axis, along in axes.follows.items()
        if isinstance(along, TokensOf) and (axis != 1 or reduction.over != "tokens")
    ]
    if left:
        raise TraceError(
            f"{name!r}: axis {left[0]} of {shown} is as long as a batch's longest row, so the result would depend on"
            " the batch: fold it, index it, or bring the sequence axis behind the rows"
        )


def _told(reduction: Reduction, batch: Batch, steps: Mapping[int, int]) -> Along | None:
    """What the second axis is, when the user says so and nothing else does: by its extent."""
    extent = reduction.value.shape[1] if reduction.value.ndim > 1 else None
    if reduction.over == "steps":
        return next((StepsOf(run) for run, count in steps.items() if count == extent), None)
    return next((TokensOf(key) for key in batch.rows[0].prompts if batch.seq_of(key) == extent), None)
