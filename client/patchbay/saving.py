"""Graphs and results as files: `save_graph`, `load_graph`, and results for programs that know nothing of Patchbay."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.errors import ProtocolError, TraceError
from patchbay.ir.graph import Graph
from patchbay.ir.limits import Limits
from patchbay.ir.render import render

if TYPE_CHECKING:
    from patchbay.tracing.runs import Run
    from patchbay.tracing.trace import BaseTrace

#: Dtypes' names in the safetensors format.
_SAFETENSORS: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
#: Dtypes that an npz file forgets the name of; they are widened, which changes no value.
_WIDENED = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})


class SavedGraph(Graph):
    """A graph that was read from a file; ``model.run(graph)`` runs it, ``print(graph)`` shows it.

    Attributes:
        model: name of the model that it was made for; "" when the file does not say.
        revision: digest of that model's weights.
        schema: version of the file.
        writer: version of Patchbay that wrote it.
    """

    model: str
    revision: str
    schema: int
    writer: str

    def __init__(self, graph: Graph, *, model: str, revision: str, schema: int, writer: str) -> None:
        super().__init__(graph.runs, graph.nodes, graph.outputs, graph.bodies)
        for name, value in (("model", model), ("revision", revision), ("schema", schema), ("writer", writer)):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        mine = (self.runs, self.nodes, self.outputs, self.bodies)
        return mine == (other.runs, other.nodes, other.outputs, other.bodies)

    __hash__ = Graph.__hash__

    def __str__(self) -> str:
        return render(self)

    __repr__ = __str__


def save_graph(what: BaseTrace | Run | Graph, path: str | os.PathLike[str]) -> None:
    """Writes a graph to a file, with the name and revision of its model; the file is complete or not there at all.

    Args:
        what: a trace, a run of one (the whole trace is meant), or a graph.
        path: where to; an existing file is replaced.

    Raises:
        TraceError: it is none of these, or asks for no value.
        GraphError: a value that no file can hold.
    """
    from patchbay.wire.files import encode_file

    graph = what if isinstance(what, Graph) else getattr(what, "graph", None)
    if not isinstance(graph, Graph):
        raise TraceError(f"save_graph takes a trace, a run or a graph, not {type(what).__name__}")
    if not graph.outputs:
        raise TraceError("the graph asks for no value: save one (t.save(...)) before saving the graph")
    model, revision = getattr(graph, "model", ""), getattr(graph, "revision", "")
    _write(Path(path), encode_file(graph, model=model, revision=revision))


def load_graph(path: str | os.PathLike[str], *, limits: Limits | None = None) -> SavedGraph:
    """Reads a graph from a file.

    Args:
        path: a file that `save_graph` wrote.
        limits: what to hold the graph to; the defaults of `Limits` when None. A model's own limits hold when it runs.

    Raises:
        ProtocolError: not a saved graph, damaged, or of another version.
        LimitExceededError: a graph beyond `limits`.
        GraphError: a graph that refers to what is not in it.
        OSError: the file cannot be read.
    """
    from patchbay.wire.files import MAX_FILE_BYTES, decode_file

    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    found = decode_file(data, limits)
    return SavedGraph(found.graph, model=found.model, revision=found.revision, schema=found.schema, writer=found.writer)


def save_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes arrays by name to a ``.npz`` or ``.safetensors`` file.

    safetensors keeps every dtype to the bit; npz knows no bfloat16 and 8-bit floats, so they are stored as float32.

    Raises:
        ProtocolError: another kind of file, or something that is no array.
    """
    import io

    import numpy as np

    where = Path(path)
    arrays = {name: np.asarray(value) for name, value in results.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _SAFETENSORS:
            raise ProtocolError(f"{name!r} ({array.dtype}) is no array of numbers")
    if where.suffix == ".npz":
        buffer = io.BytesIO()
        plain = {n: a.astype(np.float32) if a.dtype.name in _WIDENED else a for n, a in arrays.items()}
        np.savez(buffer, **plain)  # type: ignore[arg-type]
        _write(where, buffer.getvalue())
    elif where.suffix == ".safetensors":
        _write(where, b"".join(safetensors_parts(arrays)))
    else:
        raise ProtocolError(f"results are saved as .npz or .safetensors, not as {where.name!r}")


def safetensors_parts(arrays: Mapping[str, Any]) -> list[bytes]:
    """A safetensors file in pieces: header size, a JSON header, the elements one tensor after the other."""
    header: dict[str, object] = {}
    offset, parts = 0, []
    # Wider elements first, so that every tensor is aligned to its element size.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        data = array.tobytes()
        end = offset + len(data)
        kind = _SAFETENSORS[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, end]}
        parts.append(data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *parts]


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files for their owner alone; give the file the mode that open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
