"""From anything that yields rows to batches: rows read a window at a time, alike lengths put together.

Which rows form a batch depends on the data set, the function and three numbers alone, so that a run that is taken up
again makes the same batches. Rows keep their numbers; within a batch they stand in the data set's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from patchbay.core import split_rows
from patchbay.errors import TraceError
from patchbay.inputs import Text
from patchbay.tokens import Tokens

#: What a column is called: a name, or a place where rows are tuples.
Key: TypeAlias = "str | int"
#: The column of a row that is nothing but its prompt, and of runs that are not told another.
PROMPT = "text"


@dataclass(frozen=True)
class Asked:
    """Tokens that the function needs of every row.

    Attributes:
        key: of the column.
        prompt: whether a run is made over them; else they are tokenized by themselves, without special tokens.
    """

    key: Key
    prompt: bool = True


@dataclass(frozen=True)
class Row:
    """One row of the data set.

    Attributes:
        number: its place in the data set, from 0.
        columns: what it holds, by column.
        prompts: tokens of the columns that runs are made over, in the order in which the function does so.
        pieces: tokens of columns by themselves: answers, labels.
    """

    number: int
    columns: Mapping[Key, Any]
    prompts: Mapping[Key, Tokens] = field(default_factory=dict)
    pieces: Mapping[Key, Tokens] = field(default_factory=dict)

    @property
    def tokens(self) -> Tokens:
        """Of the first prompt; none for models that take none."""
        return next(iter(self.prompts.values()), _NO_TOKENS)

    def value(self, key: Key) -> Any:
        """What it holds in a column.

        Raises:
            TraceError: there is no such column.
        """
        try:
            return self.columns[key]
        except KeyError:
            raise TraceError(
                f"row {self.number} of the data set has no {key!r} (it has: {', '.join(map(repr, self.columns))})"
            ) from None


_NO_TOKENS = Tokens(())


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Attributes:
        number: of the batch, from 0.
        window: which window of the data set its rows are from.
        rows: the rows, in the data set's order.
    """

    number: int
    window: int
    rows: tuple[Row, ...]

    @property
    def seq(self) -> int:
        """Of the first prompt."""
        return max(len(row.tokens) for row in self.rows)

    def seq_of(self, key: Key | None) -> int:
        """Tokens of the longest row of a prompt; of the first one for None."""
        return self.seq if key is None else max(len(row.prompts[key]) for row in self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many rows, and the longest of each prompt: what the graph of a batch depends on."""
        return (len(self.rows), *map(self.seq_of, self.rows[0].prompts))


def columns_of(number: int, given: object) -> dict[Key, Any]:
    """A row of a data set, as the user gave it, by column.

    A dict has its own columns, a named tuple those of its fields, any other tuple that is neither token ids nor a
    conversation its places; whatever else may be a prompt is one, under ``"text"``.

    Raises:
        TraceError: a row without anything; the message has its number.
    """
    if isinstance(given, Mapping):
        found: dict[Key, Any] = {str(key): value for key, value in given.items()}
    elif isinstance(given, tuple) and hasattr(given, "_fields"):
        found = dict(zip(given._fields, given, strict=True))
    elif isinstance(given, tuple) and not (all(map(_is_id, given)) or all(isinstance(one, Mapping) for one in given)):
        found = dict(enumerate(given))
    else:
        return {PROMPT: given}
    if not found:
        raise TraceError(f"row {number} of the data set holds nothing")
    return found


def _is_id(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def input_columns(number: int, given: object, names: Sequence[str]) -> dict[Key, Any]:
    """A row of a data set for a model that takes arrays: by column, or its one input.

    Raises:
        TraceError: it is neither; the message has the row's number.
    """
    if isinstance(given, (Mapping, tuple)):
        return columns_of(number, given)
    if len(names) != 1 or not hasattr(given, "shape"):
        raise TraceError(f"row {number} of the data set is no dict of the model's inputs: {', '.join(names)}")
    return {names[0]: given}


def prompt_of(row: Row, key: Key, prepend_bos: bool | None) -> Text | Tokens:
    """What a run is made over, before it is tokens.

    Raises:
        TraceError: there is no such column, or it is no prompt; the message has the row's number.
    """
    try:
        prompts, single = split_rows(row.value(key))
    except TraceError as error:
        if key not in row.columns:
            raise
        raise TraceError(f"{_where(row, key)}: {error}") from None
    if not single:
        raise TraceError(f"{_where(row, key)} is several prompts ({len(prompts)}); give each a row of its own")
    prompt = prompts[0]
    if prepend_bos is not None and isinstance(prompt, Text):
        prompt = replace(prompt, prepend_bos=prepend_bos)
    return prompt


def piece_of(row: Row, key: Key) -> Text | Tokens:
    """A text by itself, or token ids.

    Raises:
        TraceError: there is no such column, or it is neither; the message has the row's number.
    """
    value = row.value(key)
    if isinstance(value, str):
        return Text(value, special=False)
    if isinstance(value, Tokens):
        return value
    ids = value.tolist() if hasattr(value, "tolist") else value
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    if not ids or not all(map(_is_id, ids)):
        raise TraceError(f"{_where(row, key)} is {value!r:.60}, not a text or token ids")
    return Tokens(tuple(map(int, ids)))


def _where(row: Row, key: Key) -> str:
    """Which cell, for errors."""
    return f"row {row.number} of the data set" + ("" if tuple(row.columns) == (PROMPT,) else f", {key!r}")


class Source:
    """Numbers the rows of a data set as they are read, and keeps a digest of them.

    Args:
        inputs: names of the model's inputs, where it takes no tokens.

    Attributes:
        read: rows so far.
    """

    def __init__(self, inputs: Sequence[str] | None = None) -> None:
        self._inputs = inputs
        self._digest = hashlib.sha256()
        self.read = 0

    def take(self, given: Sequence[Any]) -> list[Row]:
        """The next rows, without tokens yet.

        Raises:
            TraceError: one of them is none.
        """
        rows = []
        for number, one in enumerate(given, self.read):
            columns = columns_of(number, one) if self._inputs is None else input_columns(number, one, self._inputs)
            rows.append(Row(number, columns))
            shown = sorted(columns.items(), key=lambda item: str(item[0]))
            self._digest.update(json.dumps(shown, default=_plain, skipkeys=True).encode() + b"\n")
        self.read += len(rows)
        return rows

    @property
    def digest(self) -> str:
        """Of every row so far."""
        return self._digest.hexdigest()


def _plain(value: object) -> Any:
    """What JSON does not know, for the digest of a row."""
    if isinstance(value, Tokens):
        return list(value.ids)
    if hasattr(value, "tolist"):
        import numpy as np

        array = np.ascontiguousarray(value)
        return [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, (bytes, bytearray)):
        return hashlib.sha256(value).hexdigest()
    return f"{type(value).__name__}"


@dataclass(frozen=True)
class Span:
    """One run over the rows of a batch.

    Attributes:
        key: of its prompt; None for a run over other inputs.
        extra: positions behind the prompt: tokens that are generated, a continuation.
        every: whether there are as many in every row.
    """

    key: Key | None
    extra: int = 0
    every: bool = True


@dataclass(frozen=True)
class Bounds:
    """How large a batch may be.

    Attributes:
        rows: rows, at most.
        max_tokens: positions of one run, padding included.
        total_tokens: positions of all runs together, which the server limits.
        spans: the runs.
        ordered: whether rows stay in the data set's order: rows that draw tokens have seeds one behind the other.
    """

    rows: int
    max_tokens: int
    total_tokens: int
    spans: tuple[Span, ...]
    ordered: bool = False

    def fit(self, count: int, longest: Mapping[Key, int]) -> bool:
        """Whether so many rows, whose prompts are at most so long, may be a batch."""
        each = [count * (longest.get(s.key, 0) + s.extra) for s in self.spans if s.key is not None]
        return count <= self.rows and max(each, default=0) <= self.max_tokens and sum(each) <= self.total_tokens


def batches_of(rows: Sequence[Row], first: int, window: int, bounds: Bounds) -> list[Batch]:
    """The rows of one window as batches within the bounds. A row that is beyond them is a batch by itself.

    Args:
        rows: the window, in the data set's order.
        first: number of its first batch.
        window: number of the window.
        bounds: of a batch.
    """
    made: list[Batch] = []
    group: list[Row] = []
    longest: dict[Key, int] = {}

    def close() -> None:
        made.append(Batch(first + len(made), window, tuple(sorted(group, key=lambda row: row.number))))
        group.clear()
        longest.clear()

    ordered = rows if bounds.ordered else sorted(rows, key=lambda row: (*map(len, row.prompts.values()), row.number))
    for row in ordered:
        wanted = {key: max(longest.get(key, 0), len(tokens)) for key, tokens in row.prompts.items()}
        if group and not bounds.fit(len(group) + 1, wanted):
            close()
            wanted = {key: len(tokens) for key, tokens in row.prompts.items()}
        group.append(row)
        longest.update(wanted)
    if group:
        close()
    return made
