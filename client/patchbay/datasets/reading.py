"""Reads the data set: windows of rows, their tokens, and the batches that they make."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from patchbay.datasets.batching import Asked, Batch, Bounds, Key, Row, Source, batches_of, piece_of, prompt_of
from patchbay.datasets.cells import check_pairs
from patchbay.errors import TraceError
from patchbay.inputs import Text
from patchbay.tokens import Tokens

if TYPE_CHECKING:
    from patchbay.core import ModelCore
    from patchbay.datasets.calls import Host, Patience
    from patchbay.datasets.plan import Plan
    from patchbay.datasets.template import Learnt


class Reader:
    """Windows of rows, and their batches.

    Args:
        core: the model.
        dataset: what yields rows.
        plan: how large windows and batches are.
        host: calls the user's code.
        patience: makes calls that wait for the server.

    Attributes:
        total: rows of the data set; None where it does not say.
        learnt: what is known of the function; set before batches are made.

    Raises:
        TraceError: it is no data set of rows.
    """

    def __init__(self, core: ModelCore, dataset: Any, plan: Plan, host: Host, patience: Patience) -> None:
        _check(dataset)
        self._core, self._plan, self._host, self._patience = core, plan, host, patience
        self._awaited: AsyncIterator[Any] | None = dataset.__aiter__() if hasattr(dataset, "__aiter__") else None
        self._iterator: Iterator[Any] = iter(()) if self._awaited is not None else _rows_of(dataset)
        self._source = Source(None if core.card.takes_tokens else [spec.name for spec in core.card.inputs])
        self._last: int | None = None
        self._behind: list[Any] = []
        self.total = len(dataset) if hasattr(dataset, "__len__") else None
        self.learnt: Learnt | None = None

    @property
    def read(self) -> int:
        """Rows so far."""
        return self._source.read

    @property
    def digest(self) -> str:
        """Of the rows so far."""
        return self._source.digest

    def ends_at(self, rows: int) -> None:
        """The map was complete, and this was its last row: those behind it are put aside."""
        self._last = rows

    async def window(self) -> list[Row]:
        """The next rows, without tokens; none at the end."""
        given = await self._given()
        if self._last is not None:
            room = self._last - self.read
            given, self._behind = given[:room], given[room:]
        return self._source.take(given)

    async def goes_on(self) -> bool:
        """Whether there is anything behind the last row."""
        return bool(self._behind or await self._given())

    async def _given(self) -> list[Any]:
        if self._awaited is None:
            return await self._host(_taken, self._iterator, self._plan.rows_of_window)  # type: ignore[no-any-return]
        found: list[Any] = []
        while len(found) < self._plan.rows_of_window:
            try:
                found.append(await self._awaited.__anext__())
            except StopAsyncIteration:
                break
        return found

    # --- tokens -------------------------------------------------------------------------------------------------------

    async def tokenized(self, rows: Sequence[Row], asked: Mapping[Asked, None]) -> list[Row]:
        """The rows with the tokens that the function needs of each.

        Raises:
            TraceError: a row has no such column, or no prompt in it, or one that is too long.
        """
        prompts: list[dict[Key, Tokens]] = [{} for _ in rows]
        pieces: list[dict[Key, Tokens]] = [{} for _ in rows]
        for each in asked:
            bos = self._plan.prepend_bos
            given = [prompt_of(row, each.key, bos) if each.prompt else piece_of(row, each.key) for row in rows]
            texts = [one for one in given if isinstance(one, Text)]
            tokens = iter(await self._tokens(texts) if texts else ())
            for row, one, into in zip(rows, given, prompts if each.prompt else pieces, strict=True):
                found = into[each.key] = one if isinstance(one, Tokens) else next(tokens)
                if each.prompt:
                    self._core.check_row(found, f"row {row.number} of the data set")
        return [Row(row.number, row.columns, p, q) for row, p, q in zip(rows, prompts, pieces, strict=True)]

    async def _tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        return await self._patience.call(lambda: self._core.tokenize(texts))

    # --- batches ------------------------------------------------------------------------------------------------------

    def batches(self, rows: Sequence[Row], first: int, window: int) -> list[Batch]:
        """The batches of a window.

        Raises:
            TraceError: a row is too long for what is generated after it; prompts whose positions are paired are not of
                equal length.
        """
        learnt, limits = self.learnt, self._core.card.limits
        assert learnt is not None
        if learnt.paired:
            check_pairs(rows, learnt.paired)
        self._check_room(rows, learnt)
        spans = learnt.spans
        most = (limits.max_rows - learnt.rows) // max(len(spans), 1)
        bounds = Bounds(
            max(min(self._plan.batch, most), 1),
            self._plan.max_tokens,
            limits.max_tokens - learnt.positions,
            spans,
            learnt.drawn,
        )
        return batches_of(rows, first, window, bounds)

    def _check_room(self, rows: Sequence[Row], learnt: Learnt) -> None:
        for span in learnt.spans:
            if span.key is None or span.extra <= 0 or not span.every:
                continue
            for row in rows:
                count = len(row.prompts[span.key])
                if count + span.extra > self._core.card.n_ctx:
                    raise TraceError(
                        f"row {row.number} of the data set has {count} tokens in {span.key!r}, and {span.extra} more"
                        f" follow in the run over them; {self._core.card.name!r} takes at most {self._core.card.n_ctx}"
                    )


def _check(dataset: Any) -> None:
    """
    Raises:
        TraceError: it does not yield rows.
    """
    if hasattr(dataset, "iterrows") and hasattr(dataset, "to_dict"):
        raise TraceError("map takes rows, and a data frame yields its columns' names: give frame.to_dict('records')")
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, list(dataset)[:5]))
        raise TraceError(
            f"map takes rows, and this is a dict ({names}): give one split of it, or, of a dict of columns,"
            " [dict(zip(columns, row)) for row in zip(*columns.values())]"
        )
    if isinstance(dataset, (str, bytes)) or not any(
        hasattr(dataset, name) for name in ("__iter__", "__aiter__", "__getitem__")
    ):
        raise TraceError(
            f"map takes a data set of many rows (a list of texts, a generator, ...), not {type(dataset).__name__}"
        )


def _rows_of(dataset: Any) -> Iterator[Any]:
    if not hasattr(dataset, "__iter__") and hasattr(dataset, "__len__"):  # and may not say where it ends
        return (dataset[i] for i in range(len(dataset)))
    return iter(dataset)


def _taken(iterator: Iterator[Any], count: int) -> list[Any]:
    return list(islice(iterator, count))
