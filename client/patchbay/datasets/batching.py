"""From anything that yields prompts to batches: rows read a window at a time, alike lengths put together.

Which rows form a batch depends on the data set and three numbers alone, so that a run that is taken up again makes the
same batches. Rows keep their numbers; within a batch they stand in the data set's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patchbay.core import split_rows
from patchbay.errors import TraceError
from patchbay.inputs import Text
from patchbay.tokens import Tokens

#: The field of a row that is a dict that holds its prompt.
PROMPT = "text"


@dataclass(frozen=True)
class Item:
    """One row of the data set, before its texts are tokens.

    Attributes:
        number: its place in the data set, from 0.
        prompt: its text or tokens; no tokens for models that take none.
        fields: what else it has, by name.
        inputs: the model's own inputs by name, for models that take no tokens.
    """

    number: int
    prompt: Text | Tokens
    fields: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of the data set.

    Attributes:
        number: its place in the data set, from 0.
        tokens: its prompt.
        fields: what else it has, by name.
        inputs: the model's own inputs by name.
    """

    number: int
    tokens: Tokens
    fields: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)


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
        return max(len(row.tokens) for row in self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return (len(self.rows), self.seq)


def item_of(number: int, given: object, prepend_bos: bool | None = None) -> Item:
    """A row of a data set as the user gave it.

    Raises:
        TraceError: it is no prompt; the message has its number.
    """
    fields: dict[str, Any] = {}
    if isinstance(given, Mapping):
        fields = {str(key): value for key, value in given.items()}
        if PROMPT not in fields:
            raise TraceError(
                f"row {number} of the data set has no {PROMPT!r} (it has: {', '.join(fields) or 'nothing'})"
            )
        given = fields.pop(PROMPT)
    try:
        prompts, single = split_rows(given)
    except TraceError as error:
        raise TraceError(f"row {number} of the data set: {error}") from None
    if not single:
        raise TraceError(
            f"row {number} of the data set is several prompts ({len(prompts)}); give each a row of its own"
        )
    prompt = prompts[0]
    if prepend_bos is not None and isinstance(prompt, Text):
        prompt = Text(prompt.text, prompt.special, prepend_bos, prompt.chat)
    return Item(number, prompt, fields)


def input_item(number: int, given: object, names: Sequence[str]) -> Item:
    """A row of a data set for a model that takes arrays: a dict with them by name, or the array where there is one.

    Raises:
        TraceError: an input is missing; the message has the row's number.
    """
    if not isinstance(given, Mapping):
        if len(names) != 1 or not hasattr(given, "shape"):
            raise TraceError(f"row {number} of the data set is no dict of the model's inputs: {', '.join(names)}")
        given = {names[0]: given}
    inputs = {name: given[name] for name in names if name in given}
    if not inputs:
        raise TraceError(f"row {number} of the data set has none of the model's inputs: {', '.join(names)}")
    return Item(number, Tokens(()), {str(k): v for k, v in given.items() if k not in inputs}, inputs)


class Source:
    """Numbers the rows of a data set as they are read, and keeps a digest of them.

    Attributes:
        read: rows so far.
    """

    def __init__(self, prepend_bos: bool | None, inputs: Sequence[str] | None = None) -> None:
        self._prepend_bos = prepend_bos
        self._inputs = inputs
        self._digest = hashlib.sha256()
        self.read = 0

    def take(self, given: Sequence[Any]) -> list[Item]:
        """The next rows.

        Raises:
            TraceError: one of them is no prompt.
        """
        if self._inputs is not None:
            items = [input_item(self.read + i, one, self._inputs) for i, one in enumerate(given)]
        else:
            items = [item_of(self.read + i, one, self._prepend_bos) for i, one in enumerate(given)]
        for item in items:
            self._digest.update(_fingerprint(item))
        self.read += len(items)
        return items

    @property
    def digest(self) -> str:
        """Of every row so far."""
        return self._digest.hexdigest()


def _fingerprint(item: Item) -> bytes:
    prompt = item.prompt
    if isinstance(prompt, Text):
        chat = None if prompt.chat is None else [[m.role, m.content] for m in prompt.chat]
        shown: Any = [prompt.text, prompt.special, prompt.prepend_bos, chat]
    else:
        shown = list(prompt.ids)
    return json.dumps([shown, item.fields, item.inputs], default=_plain, sort_keys=True).encode() + b"\n"


def _plain(value: object) -> Any:
    """A field of a row for its fingerprint."""
    if hasattr(value, "tolist"):
        import numpy as np

        array = np.ascontiguousarray(value)
        return [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
    return f"{type(value).__name__}"


def batches_of(rows: Sequence[Row], first: int, window: int, batch: int, max_tokens: int) -> list[Batch]:
    """The rows of one window as batches of at most `batch` rows and `max_tokens` positions, padding included.

    A row of more than `max_tokens` tokens is a batch by itself.

    Args:
        rows: the window, in the data set's order.
        first: number of its first batch.
        window: number of the window.
        batch, max_tokens: the bounds.
    """
    made: list[Batch] = []
    group: list[Row] = []

    def close() -> None:
        made.append(Batch(first + len(made), window, tuple(sorted(group, key=lambda row: row.number))))
        group.clear()

    for row in sorted(rows, key=lambda row: (len(row.tokens), row.number)):
        if group and (len(group) == batch or (len(group) + 1) * len(row.tokens) > max_tokens):
            close()
        group.append(row)
    if group:
        close()
    return made
