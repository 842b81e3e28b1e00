"""Tensors that stay on a server: named by a digest of their content, kept as safetensors files.

The digest is the SHA-256 of the one file that holds the tensor: a safetensors file with a single tensor called
``value`` and a header without freedom, so that a digest stands for element type, shape and every byte, and
``sha256sum`` on the server's disk says the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from patchbay.errors import DTypeError, GraphError, NotFoundError, ShapeError
from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.graph import TensorData
from patchbay.ir.limits import MAX_DIMS, MAX_TENSOR_SPAN

#: Constants above this many bytes travel beside a graph, once, instead of inside it every time.
UPLOAD_ABOVE_BYTES = 2**20

#: Dtypes' names in the safetensors format.
SAFETENSORS_NAMES: Mapping[str, str] = MappingProxyType(
    {
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
)

PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_HASH_BYTES = 4 * 2**20


#: Reason of the error about an artifact that its caller does not have.
NOT_THERE = "ARTIFACT_NOT_FOUND"


@dataclass(frozen=True, slots=True)
class ArtifactInfo:
    """What is known of a tensor on a server.

    Attributes:
        digest: ``sha256:`` and 64 hexadecimal digits.
        dtype: element type.
        shape: extents, outermost first.
        nbytes: bytes of its elements.
        name: what its owner calls it; "" for constants that were uploaded by themselves.
        created_at: when it was stored, in seconds since 1970 (UTC); 0 when not known.
        expires_at: when it goes unless it is used before, likewise.
    """

    digest: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    name: str = ""
    created_at: float = 0.0
    expires_at: float = 0.0


class KeyedTensor(TensorData):
    """A tensor whose content has a name, so that nobody needs to read it to know whether it is another.

    Attributes:
        key: equal for equal contents, among tensors that the same account may see.
    """

    __slots__ = ("key",)

    key: str

    def __init__(self, dtype: DType, shape: tuple[int, ...], data: bytes | memoryview, key: str) -> None:
        super().__init__(dtype, shape, data)
        object.__setattr__(self, "key", key)

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, KeyedTensor) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)


def check_digest(digest: object) -> str:
    """`digest`, if it is one.

    Raises:
        GraphError: it is not.
    """
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
        raise GraphError(f"an artifact is named by 'sha256:' and 64 hexadecimal digits, not by {str(digest)[:100]!r}")
    return digest


def check_form(dtype: object, shape: object) -> DType:
    """The dtype called `dtype`, if it and `shape` can belong to an artifact.

    Raises:
        DTypeError: no such dtype.
        ShapeError: a negative extent, too many, or more than any memory.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if found is None:
        raise DTypeError(f"an artifact's dtype is one of {', '.join(DTYPES)}, not {str(dtype)[:100]!r}")
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape) or len(shape) > MAX_DIMS:
        raise ShapeError(f"an artifact's shape is at most {MAX_DIMS} extents of at least 0, not {str(shape)[:100]}")
    if math.prod(max(n, 1) for n in shape) * found.itemsize >= MAX_TENSOR_SPAN:
        raise ShapeError(f"{found}{list(shape)} is larger than any memory")
    return found


def file_header(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """Everything before the elements in the file of such a tensor."""
    size = math.prod(shape) * dtype.itemsize
    entry = {"dtype": SAFETENSORS_NAMES[dtype.name], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"value": entry}, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def digest_of(tensor: TensorData) -> str:
    """The digest of a tensor's element type, shape and elements."""
    state = hashlib.sha256(file_header(tensor.dtype, tensor.shape))
    data = memoryview(tensor.data)
    for offset in range(0, len(data), _HASH_BYTES):
        state.update(data[offset : offset + _HASH_BYTES])
    return PREFIX + state.hexdigest()


def not_there(digest: str, **metadata: str) -> NotFoundError:
    """The error for an artifact that is not there or is somebody else's: nobody can tell which."""
    return NotFoundError(
        f"you have no artifact {digest} on this server: it was deleted, or was not used until it expired, or was never"
        " there. Put it there again (client.artifacts.put, or the trace that kept it)",
        reason=NOT_THERE,
        metadata={"digest": digest, **metadata},
    )
