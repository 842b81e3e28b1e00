"""Which axes of a value follow the rows and the tokens of a batch.

Shapes alone do not tell (a batch of 16 tokens, a width of 16), so the function is traced once more for a batch of one
row and one token more: what grew by one of them follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchbay.datasets.batching import Batch, Row
from patchbay.errors import TraceError
from patchbay.tokens import Tokens

if TYPE_CHECKING:
    from patchbay.datasets.reducers import Reduction
    from patchbay.tracing.proxy import Proxy


@dataclass(frozen=True)
class Axes:
    """How a value depends on the batch.

    Attributes:
        sequence: axes whose extent grows with the longest row; None where that could not be found out.
    """

    sequence: tuple[int, ...] | None


def wider(batch: Batch, n_ctx: int) -> Batch:
    """A batch of one row more, of one token more (or less, where there is no room)."""
    if batch.seq == 0:  # no tokens
        return Batch(batch.number, batch.window, (*batch.rows, batch.rows[0]))
    grow = batch.seq < n_ctx
    rows = []
    for row in (*batch.rows, batch.rows[0]):
        tokens = row.tokens
        if grow:
            longer = Tokens(
                (*tokens.ids, tokens.ids[-1]),
                (*tokens.strings, "") if tokens.strings else (),
                (*tokens.offsets, (0, 0)) if tokens.offsets else (),
                (*tokens.special, True) if tokens.special else (),
                tokens.text,
            )
        elif len(tokens) == batch.seq and len(tokens) > 1:
            longer = Tokens(tokens.ids[:-1], tokens.strings[:-1], tokens.offsets[:-1], tokens.special[:-1], tokens.text)
        else:
            longer = tokens
        rows.append(Row(row.number, longer, row.fields, row.inputs))
    return Batch(batch.number, batch.window, tuple(rows))


def axes_of(name: str, value: Proxy, twin: Proxy | None, batch: Batch, wide: Batch) -> Axes:
    """
    Raises:
        TraceError: the value's first axis is not the rows.
    """
    rows, seq = batch.shape
    follows = value.ndim > 0 and value.shape[0] == rows
    if twin is None or twin.ndim != value.ndim:
        if not follows:
            raise TraceError(_no_rows(name, value, rows))
        return Axes(() if value.ndim == 1 else None)
    if not follows or twin.shape[0] != wide.shape[0]:
        raise TraceError(_no_rows(name, value, rows))
    moved = wide.seq - seq
    found = []
    for axis in range(1, value.ndim):
        change = twin.shape[axis] - value.shape[axis]
        if change == 0:
            continue
        if change != moved or value.shape[axis] != seq:
            raise TraceError(
                f"{name!r} {list(value.shape)} has an axis ({axis}) whose extent depends on the batch, but is not its"
                f" {seq} tokens"
            )
        found.append(axis)
    return Axes(tuple(found))


def _no_rows(name: str, value: Proxy, rows: int) -> str:
    return (
        f"{name!r} {list(value.shape)} has no entry for each of the {rows} rows of a batch along its first axis. Reduce"
        " over rows with pb.reduce, not in the graph: batches are of no fixed size"
    )


def known(axes: Axes, value: Proxy, name: str) -> tuple[int, ...]:
    """
    Raises:
        TraceError: which axes of a value follow the tokens is not known, so that padding could not be told apart.
    """
    if axes.sequence is None:
        raise TraceError(
            f"{name!r}: which axes of {list(value.shape)} follow the tokens cannot be seen here (the function takes one"
            " length only); index them, or reduce the value with over='rows' or over='tokens'"
        )
    return axes.sequence


def settle(reduction: Reduction, axes: Axes, name: str) -> None:
    """Decides what the samples of a reduction are."""
    takes_tokens = axes.sequence is not None and 1 in axes.sequence
    if reduction.over is None:
        if axes.sequence is None:
            raise TraceError(
                f"{name!r}: whether {list(reduction.value.shape)} has tokens along its second axis cannot be seen here"
                f" (the function looks at tokens, or takes one length only): say pb.reduce.{reduction.name}(...,"
                " over='rows') or over='tokens'"
            )
        reduction.over = "tokens" if takes_tokens else "rows"
    if axes.sequence is None:
        return
    left = [a for a in axes.sequence if a != 1 or reduction.over == "rows"]
    if left:
        raise TraceError(
            f"{name!r}: axis {left[0]} of {list(reduction.value.shape)} is as long as a batch's longest row, so the"
            " result would depend on the batch: fold it, index it, or bring the sequence axis behind the rows"
        )
    if reduction.over == "tokens" and not takes_tokens:
        raise TraceError(
            f"{name!r}: over='tokens', but {list(reduction.value.shape)} has no sequence axis behind its rows"
        )
