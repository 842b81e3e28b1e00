"""Values of a data set's rows as safetensors files in a folder, and reading them again.

Each shard holds a window of consecutive rows. A value of one shape for all rows is stacked, ``[rows, ...]``; one that
has an entry for each token is joined along the tokens, ``[tokens, ...]``, and the rows' lengths tell them apart; one
that depends on the tokens in another way is padded on the left. ``index.json`` says which, and which rows lie where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.datasets.batching import Key, Row
from patchbay.datasets.results import RowArrays
from patchbay.datasets.state import replace_file
from patchbay.errors import ProtocolError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

FORMAT = "patchbay-rows"
VERSION = 1
INDEX = "index.json"
#: Tensors that every shard has beside the values: row numbers, tokens per row, token ids one row after the other. The
#: latter two are those of the first prompt; further prompts have their own, the column's name behind a dot.
ROWS, LENGTHS, TOKENS = "_rows", "_lengths", "_tokens"
_STACKED, _JOINED, _PADDED = "stacked", "joined", "padded"


def layout_of(sequence: Mapping[int, Key]) -> str:
    """How the rows of a value lie in a shard, from the axes (rows counted) that follow the tokens of a prompt."""
    return _STACKED if not sequence else _JOINED if tuple(sequence) == (1,) else _PADDED


def write_shard(
    folder: Path,
    number: int,
    rows: Sequence[Row],
    values: Mapping[str, Sequence[NDArray[Any]]],
    layouts: Mapping[str, str],
) -> dict[str, Any]:
    """Writes one shard; returns its entry for the index.

    Args:
        folder: where.
        number: of the shard, from 0.
        rows: its rows, in the data set's order.
        values: for each name an array for each row, without padding.
        layouts: how each is laid out.
    """
    import numpy as np

    from patchbay.saving import safetensors_parts

    tensors: dict[str, NDArray[Any]] = {
        ROWS: np.array([row.number for row in rows], dtype=np.int64),
        LENGTHS: np.array([len(row.tokens) for row in rows], dtype=np.int64),
        TOKENS: np.array([i for row in rows for i in row.tokens.ids], dtype=np.int32),
    }
    for key in list(rows[0].prompts)[1:]:
        prompts = [row.prompts[key] for row in rows]
        tensors[f"{LENGTHS}.{key}"] = np.array([len(tokens) for tokens in prompts], dtype=np.int64)
        tensors[f"{TOKENS}.{key}"] = np.array([i for tokens in prompts for i in tokens.ids], dtype=np.int32)
    for name, arrays in values.items():
        if layouts[name] == _STACKED:
            tensors[name] = np.stack(arrays)
        elif layouts[name] == _JOINED:
            tensors[name] = np.concatenate(arrays)
        else:
            tensors[name] = RowArrays(arrays).padded()[0]
    file = f"shard-{number:06d}.safetensors"
    replace_file(folder / file, safetensors_parts(tensors))
    return {"file": file, "first_row": rows[0].number, "rows": len(rows), "tokens": int(tensors[LENGTHS].sum())}


def write_index(folder: Path, about: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> None:
    """Writes the index, last of all: a folder with an index is complete."""
    counts = {"rows": sum(s["rows"] for s in shards), "tokens": sum(s["tokens"] for s in shards)}
    index = {"format": FORMAT, "version": VERSION, **about, **counts, "shards": list(shards)}
    replace_file(folder / INDEX, json.dumps(index, indent=1).encode())


def begin_folder(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Makes a folder ready to be written: not complete any more, and with the shards that are done and no others.

    Args:
        folder: where.
        shards: entries of those that are done.
    """
    done = {entry["file"] for entry in shards}
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("shard-*.safetensors"):
        if path.name not in done:
            path.unlink()


class Shard:
    """One file of a folder of shards; its arrays are views of the file, read as they are used.

    Attributes:
        rows: numbers of its rows in the data set, int64 [rows].
        lengths: their tokens, int64 [rows]; of the first prompt, where rows have several.
        tokens: token ids of all of them, one row after the other, int32.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self._arrays = read_safetensors(path)
        self._values: Mapping[str, Mapping[str, Any]] = index["values"]
        self._prompts: list[Key] = index["prompts"]
        self.rows = self._arrays[ROWS]
        self.lengths = self._arrays[LENGTHS]
        self.tokens = self._arrays[TOKENS]

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._values:
            raise KeyError(f"these shards hold no {name!r}; they hold: {', '.join(self._values)}")
        return self._arrays[name]

    def lengths_of(self, key: Key) -> NDArray[Any]:
        """Tokens of each row in a column that runs were made over, int64 [rows]."""
        return self._of_prompt(LENGTHS, key)

    def _of_prompt(self, kind: str, key: Key | None) -> NDArray[Any]:
        if key is not None and key not in self._prompts:
            raise KeyError(f"no run was made over {key!r}; there are: {', '.join(map(repr, self._prompts))}")
        return self._arrays[kind if key is None or key == self._prompts[0] else f"{kind}.{key}"]

    def row_arrays(self, name: str) -> list[NDArray[Any]]:
        """The value of each row, without padding."""
        whole, layout = self[name], self._values[name]["layout"]
        if layout == _STACKED:
            return list(whole)
        lengths = {int(axis): self.lengths_of(key) for axis, key in self._values[name]["sequence_axes"]}
        if layout == _JOINED:
            return _cut(whole, lengths[1])
        rows = []
        for i, row in enumerate(whole):
            where = [slice(None)] * row.ndim
            for axis, each in lengths.items():
                where[axis - 1] = slice(int(each.max() - each[i]), None)
            rows.append(row[tuple(where)])
        return rows

    def row_tokens(self, key: Key | None = None) -> list[NDArray[Any]]:
        """The token ids of each row, in the first prompt or in the column `key`."""
        return _cut(self._of_prompt(TOKENS, key), self._of_prompt(LENGTHS, key))


def _cut(whole: NDArray[Any], lengths: NDArray[Any]) -> list[NDArray[Any]]:
    return [whole[end - n : end] for end, n in zip(lengths.cumsum(), lengths, strict=True)]


class Shards:
    """A folder of shards that is complete: iterate over it, or take a value of all rows by name.

    Args:
        folder: the folder that `Model.map` wrote.

    Attributes:
        index: what its index says.

    Raises:
        ProtocolError: no such folder, or one that is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        try:
            self.index: dict[str, Any] = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ProtocolError(f"{folder} has no {INDEX}: it is no folder of shards, or not complete") from None
        except ValueError as error:
            raise ProtocolError(f"{self._folder / INDEX} cannot be read: {error}") from None
        if self.index.get("format") != FORMAT or self.index.get("version") != VERSION:
            raise ProtocolError(f"{self._folder / INDEX} is of another format or version than this Patchbay reads")
        self._values: dict[str, dict[str, Any]] = self.index["values"]

    @property
    def names(self) -> tuple[str, ...]:
        """The values that each row has."""
        return tuple(self._values)

    def __len__(self) -> int:
        return len(self.index["shards"])

    def __getitem__(self, number: int) -> Shard:
        return Shard(self._folder / self.index["shards"][number]["file"], self.index)

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))

    def value(self, name: str) -> NDArray[Any] | RowArrays:
        """The value of all rows, in memory: one array where every row has the same shape, else one for each."""
        return joined([row for shard in self for row in shard.row_arrays(name)])

    def __repr__(self) -> str:
        rows, tokens = self.index["rows"], self.index["tokens"]
        return f"<{len(self)} shards of {rows:,} rows, {tokens:,} tokens: {', '.join(self.names)}>"


def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any] | RowArrays:
    """Rows as one array where they all have one shape, else as they are."""
    import numpy as np

    return np.stack(arrays) if len({a.shape for a in arrays}) == 1 else RowArrays(arrays)


def stacked(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Rows of one shape as one array."""
    import numpy as np

    return np.stack(rows)


def concatenated(windows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Windows of rows as one array."""
    import numpy as np

    return windows[0] if len(windows) == 1 else np.concatenate(windows)


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file, as views of the file that cannot be written to.

    Raises:
        ProtocolError: the file is damaged.
    """
    from patchbay import saving
    from patchbay.arrays import view_of

    try:
        return {name: view_of(tensor) for name, tensor in saving.read_safetensors(path).items()}
    except ProtocolError as error:
        raise ProtocolError(f"{path} is damaged: {error}") from None
