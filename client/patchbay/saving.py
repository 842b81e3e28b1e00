"""Graphs and results as files: `save_graph`, `load_graph`, and results for programs that know nothing of Patchbay."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.arguments import check_path
from patchbay.errors import ProtocolError, TraceError
from patchbay.ir.artifacts import SAFETENSORS_NAMES
from patchbay.ir.dtypes import DTYPES
from patchbay.ir.graph import Graph, Node, TensorData
from patchbay.ir.limits import Limits
from patchbay.ir.render import render

if TYPE_CHECKING:
    from patchbay.artifacts import Artifacts
    from patchbay.tracing.runs import Run
    from patchbay.tracing.trace import BaseTrace

_MAX_HEADER_BYTES = 100 * 2**20
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


def save_graph(
    what: BaseTrace | Run | Graph, path: str | os.PathLike[str], *, inline: bool | Artifacts = False
) -> None:
    """Writes a graph to a file, with the name and revision of its model; the file is complete or not there at all.

    Arrays of the trace are in the file. Artifacts are named in it, and must be on the server where it runs.

    Args:
        what: a trace, a run of one (the whole trace is meant), or a graph.
        path: where to; an existing file is replaced.
        inline: fetch the artifacts and put them into the file too, so that it runs anywhere: True for a trace or run,
            ``client.artifacts`` for a graph.

    Raises:
        TraceError: it is none of these, or asks for no value, or nobody says where its artifacts are.
        NotFoundError: an artifact that it names is not on the server.
        GraphError: a value that no file can hold.
    """
    from patchbay.wire.files import encode_file

    check_path("the file of a graph", path)
    graph = what if isinstance(what, Graph) else getattr(what, "graph", None)
    if not isinstance(graph, Graph):
        raise TraceError(f"save_graph takes a trace, a run or a graph, not {type(what).__name__}")
    if not graph.outputs:
        raise TraceError("the graph asks for no value: save one (t.save(...)) before saving the graph")
    model, revision = getattr(graph, "model", ""), getattr(graph, "revision", "")
    graph = getattr(getattr(what, "trace", what), "whole_graph", graph)
    if inline:
        graph = _with_artifacts(graph, what if inline is True else inline)
    _write(Path(path), encode_file(graph, model=model, revision=revision))


def _with_artifacts(graph: Graph, source: object) -> Graph:
    """`graph` with the elements of its artifacts in it."""
    from patchbay.arrays import to_data

    named = {i: str(node.attrs["artifact"]) for i, node in enumerate(graph.nodes) if "artifact" in node.attrs}
    if not named:
        return graph
    stored = getattr(getattr(source, "trace", source), "stored", None)
    if stored is None:
        raise TraceError("a graph does not know its server: save_graph(graph, path, inline=client.artifacts)")
    if stored.wait is None:
        raise TraceError(
            "save_graph waits for artifacts, so it needs those of a synchronous client: inline=client.artifacts"
        )
    data = {digest: to_data(stored.wait(stored.get(digest))) for digest in set(named.values())}
    nodes = [Node("const", (), {"value": data[named[i]]}) if i in named else n for i, n in enumerate(graph.nodes)]
    return Graph(**({f.name: getattr(graph, f.name) for f in fields(Graph)} | {"nodes": tuple(nodes)}))


def load_graph(path: str | os.PathLike[str], *, limits: Limits | None = None) -> SavedGraph:
    """Reads a graph from a file.

    Args:
        path: a file that `save_graph` wrote.
        limits: what to hold the graph to; the defaults of `Limits` when None, with constants as large as a file may
            be. A model's own limits hold when it runs.

    Raises:
        ProtocolError: not a saved graph, damaged, or of another version.
        LimitExceededError: a graph beyond `limits`.
        GraphError: a graph that refers to what is not in it.
        OSError: the file cannot be read.
    """
    from patchbay.wire.files import MAX_FILE_BYTES, decode_file

    check_path("the file of a graph", path)
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    found = decode_file(data, Limits(max_const_bytes=MAX_FILE_BYTES) if limits is None else limits)
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
        if array.dtype.name not in SAFETENSORS_NAMES:
            raise ProtocolError(f"{name!r} ({array.dtype}) is no array of numbers")
    if where.suffix == ".npz":
        buffer = io.BytesIO()
        plain = {n: a.astype(np.float32) if a.dtype.name in _WIDENED else a for n, a in arrays.items()}
        np.savez(buffer, **plain)  # type: ignore[arg-type]
        _write(where, buffer.getvalue())
    elif where.suffix == ".safetensors":
        _write(where, *safetensors_parts(arrays))
    else:
        raise ProtocolError(f"results are saved as .npz or .safetensors, not as {where.name!r}")


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, TensorData]:
    """The tensors of a safetensors file by name, over a map of it: nothing is copied.

    Raises:
        ProtocolError: not such a file, damaged, or with element types that Patchbay does not carry.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ProtocolError(f"{Path(path).name}: not a safetensors file ({size} bytes)")
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (length,) = struct.unpack("<Q", data[:8])
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ProtocolError(f"{Path(path).name}: not a safetensors file (a header of {length} bytes)")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _entry(name, entry, data[8 + length :]) for name, entry in entries.items()}
    except ProtocolError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProtocolError(
            f"{Path(path).name}: not a safetensors file ({type(error).__name__} in its header)"
        ) from None


def _entry(name: str, entry: Mapping[str, Any], data: memoryview) -> TensorData:
    dtype = next((DTYPES[ours] for ours, theirs in SAFETENSORS_NAMES.items() if theirs == entry["dtype"]), None)
    if dtype is None:
        known = ", ".join(SAFETENSORS_NAMES.values())
        raise ProtocolError(f"the tensor {name!r} is of the type {entry['dtype']!r}; Patchbay carries {known}")
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ProtocolError(f"the tensor {name!r} has an extent or an offset that is none")
    if not start <= stop <= len(data) or stop - start != math.prod(shape) * dtype.itemsize:
        where = f"bytes {start} to {stop} of {len(data)}"
        raise ProtocolError(f"the tensor {name!r}, {dtype}{list(shape)}, cannot be {where}")
    return TensorData(dtype, shape, data[start:stop])


def safetensors_parts(arrays: Mapping[str, Any]) -> list[bytes | memoryview]:
    """A safetensors file in pieces: header size, a JSON header, the elements one tensor after the other.

    The elements are not copied where an array's layout allows.
    """
    from patchbay.arrays import shared_data

    header: dict[str, object] = {}
    parts: list[bytes | memoryview] = []
    offset = 0
    # Wider elements first, so that every tensor is aligned to its element size.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        data = shared_data(array).data
        end = offset + len(data)
        kind = SAFETENSORS_NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, end]}
        parts.append(data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *parts]


def _write(path: Path, *parts: bytes | memoryview) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
        # mkstemp makes files for their owner alone; give the file the mode that open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
