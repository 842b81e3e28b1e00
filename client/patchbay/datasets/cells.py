"""What of a batch's rows stands in its graph as constants: numbers, ids, places of words, single tokens.

Each function takes a batch and gives an array, rows first. The kind of a column (integers, floats, and its shape) is
that of the data set's first row, so that it depends on no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from patchbay.datasets.batching import Batch, Key, Row
from patchbay.errors import TraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Makes a constant's array for a batch.
Fill: TypeAlias = "Callable[[Batch], NDArray[Any]]"
#: Kinds of numbers, each of which holds those before it.
_KINDS = "biuf"
_NAMES = {"b": "truth values", "i": "integers", "u": "integers", "f": "floats"}


def row_numbers(batch: Batch) -> NDArray[Any]:
    """Places in the data set, int64 [rows]."""
    import numpy as np

    return np.array([row.number for row in batch.rows], dtype=np.int64)


def lengths(batch: Batch, key: Key | None) -> NDArray[Any]:
    """Tokens of a prompt (the first one for None), int64 [rows]."""
    import numpy as np

    return np.array([len(row.tokens if key is None else row.prompts[key]) for row in batch.rows], dtype=np.int64)


def ids(batch: Batch, key: Key | None) -> NDArray[Any]:
    """Token ids of a prompt, int32 [rows, seq]; 0 at padding."""
    import numpy as np

    whole = np.zeros((len(batch.rows), batch.seq_of(key)), dtype=np.int32)
    for i, row in enumerate(batch.rows):
        tokens = row.tokens if key is None else row.prompts[key]
        whole[i, whole.shape[1] - len(tokens) :] = tokens.ids
    return whole


def numbers(batch: Batch, key: Key, first: Row) -> NDArray[Any]:
    """A column of numbers or arrays, bool, int64 or float32 [rows, ...].

    Args:
        batch: the rows.
        key: the column.
        first: of the data set: what it holds says what the column holds.

    Raises:
        TraceError: a row has no such column, or something else in it.
    """
    import numpy as np

    like = _array(first, key)
    found = []
    for row in batch.rows:
        array = _array(row, key)
        if _KINDS.index(array.dtype.kind) > _KINDS.index(like.dtype.kind):
            raise TraceError(
                f"row {row.number} of the data set has {row.value(key)!r:.60} as {key!r}, and row {first.number} has"
                f" {first.value(key)!r:.60}: a column of {_NAMES[like.dtype.kind]} holds nothing else; give"
                f" {_NAMES[array.dtype.kind]} in every row"
            )
        if array.shape != like.shape:
            raise TraceError(
                f"row {row.number} of the data set has an array {list(array.shape)} as {key!r}, and row {first.number}"
                f" has {list(like.shape)}: a column holds arrays of one shape"
            )
        found.append(array)
    dtype = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float32}[like.dtype.kind]
    return np.stack(found).astype(dtype)


def _array(row: Row, key: Key) -> NDArray[Any]:
    import numpy as np

    value = row.value(key)
    try:
        array = np.asarray(value)
    except ValueError:  # lists in it are of unequal length
        array = np.asarray(None)
    if array.dtype.kind not in _KINDS or (array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63):
        raise TraceError(_no_number(row, key, value))
    return array


def _no_number(row: Row, key: Key, value: object) -> str:
    says = f"row {row.number} of the data set has {value!r:.60} as {key!r}, which is no number"
    if not isinstance(value, str):
        return says
    return (
        f"{says}: say which values there are, column({key!r}, values=[...]), take the id of the token that it is,"
        f" column({key!r}).to_single_token(), or make a run over it, t.run(rows[{key!r}])"
    )


def labels(batch: Batch, key: Key, values: tuple[Any, ...]) -> NDArray[Any]:
    """Places among `values`, int64 [rows].

    Raises:
        TraceError: a row has no such column, or none of `values` in it.
    """
    import numpy as np

    found = []
    for row in batch.rows:
        label = row.value(key)
        if label not in values:
            raise TraceError(
                f"row {row.number} of the data set has {label!r:.60} as {key!r}, not one of {list(values)}"
            )
        found.append(values.index(label))
    return np.array(found, dtype=np.int64)


def single_tokens(batch: Batch, key: Key) -> NDArray[Any]:
    """Ids of texts that are one token each, int64 [rows].

    Raises:
        TraceError: one of them is not.
    """
    import numpy as np

    found = []
    for row in batch.rows:
        tokens = row.pieces[key]
        special = tokens.special or (False,) * len(tokens)
        plain = [i for i, added in zip(tokens.ids, special, strict=True) if not added]
        if len(plain) != 1:
            pieces = ", ".join(map(repr, tokens.strings or tokens.ids)) or "none"
            raise TraceError(
                f"row {row.number} of the data set has {row.value(key)!r:.60} as {key!r}, which is {len(plain)} tokens"
                f" ({pieces}), not one; try it with a leading space, or run.logprob(column({key!r})) for several tokens"
            )
        found.append(plain[0])
    return np.array(found, dtype=np.int64)


def positions(batch: Batch, key: Key | None, word: str | Key, own: bool, occurrence: int | None) -> NDArray[Any]:
    """Where a text ends in a prompt, counted along the padded sequence, int64 [rows].

    Args:
        batch: the rows.
        key: the prompt's column; None for the first.
        word: the text, or the column that holds each row's own.
        own: which of them.
        occurrence: as for `Run.position`.

    Raises:
        TraceError: as `Run.position`; the message has the row's number.
    """
    import numpy as np

    found = []
    seq = batch.seq_of(key)
    for row in batch.rows:
        tokens = row.tokens if key is None else row.prompts[key]
        text = row.value(word) if own else word
        if not isinstance(text, str):
            raise TraceError(f"row {row.number} of the data set has {text!r:.60} as {word!r}, which is no text to find")
        try:
            found.append(seq - len(tokens) + tokens.position(text, occurrence=occurrence))
        except TraceError as error:
            raise TraceError(f"row {row.number} of the data set: {error}") from None
    return np.array(found, dtype=np.int64)


def stacked(batch: Batch, key: Key) -> NDArray[Any]:
    """A column of arrays as they are, rows first.

    Raises:
        TraceError: a row has none, or one of another shape.
    """
    import numpy as np

    arrays = [np.asarray(row.value(key)) for row in batch.rows]
    if len({a.shape for a in arrays}) > 1:
        raise TraceError(f"{key!r} has another shape in some rows: {sorted({a.shape for a in arrays})}")
    return np.stack(arrays)


def check_pairs(rows: Sequence[Row], keys: Sequence[Key]) -> None:
    """
    Raises:
        TraceError: prompts whose positions the function pairs are of unequal length in a row.
    """
    for row in rows:
        first, *others = [(key, len(row.prompts[key])) for key in keys]
        for key, count in others:
            if count != first[1]:
                raise TraceError(
                    f"row {row.number} of the data set has {first[1]} tokens in {first[0]!r} and {count} in {key!r},"
                    " and the function pairs their positions: give prompts of equal length, or take positions that"
                    " mean the same in both, such as [:, -1] or run.position(...)"
                )
