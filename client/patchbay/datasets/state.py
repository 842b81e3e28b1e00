"""How far a map has come, as a small file: what makes it resumable.

The file is replaced as a whole after every window of rows, so that it is always one of the states that a run was in.
The reductions' states themselves stay on the server, as artifacts that it names by digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from patchbay.datasets.template import Template
from patchbay.errors import NotFoundError, TraceError
from patchbay.ir.graph import TensorData

FORMAT = "patchbay-map"
VERSION = 1


@dataclass(frozen=True)
class Lane:
    """One chain of batches.

    Attributes:
        batches: how many batches it has folded.
        digest, size: of the artifact that is its state.
    """

    batches: int
    digest: str
    size: int


@dataclass(frozen=True)
class State:
    """What a map has done.

    Attributes:
        model, revision: of the model.
        graph: digest of what the function makes.
        settings: what batches depend on.
        salt: what makes this map's artifacts its own.
        windows, rows, batches: how many are done.
        data: digest of those rows.
        total: rows of the data set, where it says.
        lanes: the lanes' states; None for one that has not begun.
        shards: entries of the shards that were written.
        kept: batches whose values stay on the server.
        complete: whether the data set was at its end.
    """

    model: str
    revision: str
    graph: str
    settings: Mapping[str, Any]
    salt: int
    windows: int = 0
    rows: int = 0
    batches: int = 0
    data: str = ""
    total: int | None = None
    lanes: tuple[Lane | None, ...] = ()
    shards: tuple[Mapping[str, Any], ...] = ()
    kept: tuple[Mapping[str, Any], ...] = ()
    complete: bool = False


def load_state(path: Path) -> State | None:
    """The state in a file; None when there is no file.

    Raises:
        TraceError: the file is no such state.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        data = json.loads(text)
        if data.pop("format") != FORMAT or data.pop("version") != VERSION:
            raise ValueError("another format or version")
        lanes = tuple(None if lane is None else Lane(**lane) for lane in data.pop("lanes"))
        shards, kept = tuple(data.pop("shards")), tuple(data.pop("kept"))
        return State(**data, lanes=lanes, shards=shards, kept=kept)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TraceError(f"{path} is not the state of a map ({error}); name another file, or delete it") from None


def save_state(path: Path, state: State) -> float:
    """Replaces the file; it is the old state or the new one, whatever happens meanwhile.

    Returns:
        Seconds of this thread's work: what a state costs grows with the shards and kept values that it lists.
    """
    begun = time.thread_time()
    shown = {f.name: getattr(state, f.name) for f in fields(state)}
    shown["lanes"] = [None if lane is None else asdict(lane) for lane in state.lanes]
    replace_file(path, json.dumps({"format": FORMAT, "version": VERSION, **shown}).encode())
    return time.thread_time() - begun


def replace_file(path: Path, data: bytes | Sequence[bytes | memoryview]) -> None:
    """Writes a file as a whole, through to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_same(path: Path, found: State, wanted: State) -> None:
    """
    Raises:
        TraceError: the file belongs to another map; the message says in what they differ.
    """
    differences = []
    if (found.model, found.revision) != (wanted.model, wanted.revision):
        differences.append(
            f"the model (then {found.model!r} of revision {found.revision or 'unknown'}, now {wanted.model!r} of"
            f" revision {wanted.revision or 'unknown'})"
        )
    if found.graph != wanted.graph:
        differences.append("the function, or a constant in it: it makes another graph")
    for name, value in wanted.settings.items():
        if found.settings.get(name) != value:
            differences.append(f"{name} (then {found.settings.get(name)!r}, now {value!r})")
    if found.total is not None and wanted.total is not None and found.total != wanted.total:
        differences.append(f"the data set (then {found.total:,} rows, now {wanted.total:,})")
    if differences:
        raise TraceError(
            f"{path} belongs to another map; what differs: {'; '.join(differences)}. Call it as then, or delete"
            " the file to begin anew"
        )


def check_rows(path: Path, found: State, digest: str, read: int) -> None:
    """
    Raises:
        TraceError: the rows that were done are not the first rows of this data set.
    """
    if (found.data, found.rows) != (digest, read):
        raise TraceError(
            f"{path} belongs to a map over another data set: its first {found.rows:,} rows are not the first rows here."
            " Give the same data set in the same order to go on, or delete the file to begin anew"
        )


def graph_digest(template: Template) -> str:
    """A digest of what the function makes of a batch, whatever is in the batch."""
    whole = hashlib.sha256()
    graph = template.graph
    for i, node in enumerate(graph.nodes):
        attrs: list[Any] = []
        for name, value in sorted(node.attrs.items()):
            if isinstance(value, TensorData):
                data = b"" if i in template.fills or i == template.state else bytes(value.data)
                attrs.append((name, value.dtype.name, value.shape, hashlib.sha256(data).hexdigest()))
            else:
                attrs.append((name, repr(value)))
        whole.update(repr((node.op, node.args, attrs, node.run)).encode())
    for i, run in enumerate(graph.runs):
        over = template.over.get(i)
        rows = (
            (run.tokens, run.inputs, run.generation) if over is None else (over.key, dict(over.inputs), over.generation)
        )
        whole.update(repr(rows).encode())
    whole.update(repr(graph.bodies).encode())
    whole.update(repr([(output.name, output.node) for output in graph.outputs]).encode())
    whole.update(repr([(reduction.name, reduction.over) for reduction in template.reductions]).encode())
    return whole.hexdigest()


def lost(error: NotFoundError) -> TraceError:
    """The error about a lane's state that is gone."""
    return TraceError(
        "the server has lost what the map had reduced so far (its artifacts expire, and are deleted when a quota is"
        f" full): begin anew, without the state file. The server says: {error.message}"
    )
