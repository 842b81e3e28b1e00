"""The rows of a batch as the user's function sees them: columns to make runs over, and columns as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchbay.datasets import cells
from patchbay.datasets.batching import Asked, Key
from patchbay.places import located
from patchbay.tracing.proxy import Proxy

if TYPE_CHECKING:
    from patchbay.datasets.batch_trace import BatchTrace
    from patchbay.tokens import Tokens


class Column(Proxy):
    """One column of the rows: what a run is made over (``t.run(column)``), or a value, [rows, ...].

    As a value it holds numbers or arrays of one shape. Texts become numbers by `to_single_token`, or by their place
    among known ones (`BatchRows.column`).
    """

    __slots__ = ("_key", "_made")

    if TYPE_CHECKING:
        _trace: BatchTrace

    def __init__(self, trace: BatchTrace, key: Key) -> None:
        self._trace = trace
        self._key = key
        self._update = None
        self._made: int | None = None

    @property
    def key(self) -> Key:
        """Its name, or its place where rows are tuples."""
        return self._key

    @property
    @located
    def _node(self) -> int:  # type: ignore[override] # the constant is made when the column is first used as a value
        if self._made is None:
            trace, key, first = self._trace, self._key, self._trace.first
            self._made = trace.late(("column", key), lambda batch: cells.numbers(batch, key, first))._node
        return self._made

    @located
    def to_single_token(self) -> Proxy:
        """The id of each row's text, which is one token by itself: int64 [rows].

        Raises:
            TraceError: a row's text is none or several.
        """
        trace, key = self._trace, self._key
        trace.ask(Asked(key, prompt=False))
        return trace.late(("token", key), lambda batch: cells.single_tokens(batch, key))

    def pieces(self) -> list[Tokens]:
        """Each row's text as tokens by itself. A function that looks at them is traced for each batch anew."""
        self._trace.ask(Asked(self._key, prompt=False))
        self._trace.concrete = True
        return [row.pieces[self._key] for row in self._trace.batch.rows]

    def __repr__(self) -> str:
        return f"<column {self._key!r} of {len(self._trace.batch.rows)} rows of the data set>"


class BatchRows:
    """The rows of one batch, by column: ``rows["clean"]``, or ``rows[0]`` where the data set's rows are tuples."""

    __slots__ = ("_trace",)

    def __init__(self, trace: BatchTrace) -> None:
        self._trace = trace

    @located
    def __getitem__(self, name: Key) -> Column:
        """A column.

        Raises:
            TraceError: the data set has none of that name.
        """
        return self._trace.column(name)

    @located
    def column(self, name: Key, values: Sequence[Any] | None = None) -> Any:
        """A column.

        Args:
            name: of the column.
            values: what may stand there (labels, say); then the place among them is given, int64 [rows].

        Raises:
            TraceError: a row has no such column, or holds something else than `values`.
        """
        if values is None:
            return self._trace.column(name)
        known = tuple(values)
        self._trace.column(name)
        return self._trace.late(("labels", name, known), lambda batch: cells.labels(batch, name, known))

    @property
    def numbers(self) -> Proxy:
        """Places of the rows in the data set, from 0, int64 [rows]."""
        return self._trace.row_numbers

    def __len__(self) -> int:
        return len(self._trace.batch.rows)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self._trace.first.columns))
        return f"<{len(self)} rows of the data set: {names}>"
