"""Handles to tensors that stay on the server: they stand wherever a constant may."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from patchbay.errors import ProtocolError, TraceError, ValueNotReadyError
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.dtypes import DType
from patchbay.ir.ops.spec import TensorSpec
from patchbay.results import show_bytes
from patchbay.tracing.proxy import Created

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchbay.artifacts import StoredArtifacts
    from patchbay.tracing.trace import BaseTrace


class Artifact(Created):
    """A tensor on the server. It stands for a constant in every trace of that server; its numbers stay where they are.

    ``run.blocks[3].resid_post += handle``, ``pb.ops.matmul(x, handle)``, ``t.constant(handle)[0]``.
    """

    __slots__ = ("_expected", "_info", "_stored")

    def __init__(self, info: ArtifactInfo, stored: StoredArtifacts) -> None:
        self._info: ArtifactInfo | None = info
        self._stored = stored
        self._expected = TensorSpec(info.shape, info.dtype)

    @classmethod
    def awaited(cls, stored: StoredArtifacts, dtype: DType, shape: tuple[int, ...], name: str) -> Artifact:
        """A handle to what a trace will keep; `arrive` makes it usable."""
        handle = cls(ArtifactInfo("", dtype, shape, TensorSpec(shape, dtype).nbytes, name), stored)
        handle._info = None
        return handle

    def arrive(self, info: ArtifactInfo | None) -> None:
        """The trace has run.

        Raises:
            ProtocolError: the server kept nothing, or something else than it was asked to.
        """
        if info is None or (info.shape, info.dtype) != (self._expected.shape, self._expected.dtype):
            raise ProtocolError(f"the server was to keep {self._expected}, and kept {info}")
        self._info = info

    @property
    def info(self) -> ArtifactInfo:
        """All that is known of it.

        Raises:
            ValueNotReadyError: the trace that keeps it has not run.
        """
        if self._info is None:
            raise ValueNotReadyError("what a trace keeps is there once it has run: use the handle below the with block")
        return self._info

    @property
    def digest(self) -> str:
        """``sha256:`` and 64 hexadecimal digits; equal for equal contents."""
        return self.info.digest

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first."""
        return self._expected.shape

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self._expected.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self._expected.nbytes

    @property
    def name(self) -> str:
        """What you called it; "" when nothing."""
        return self.info.name

    def get(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Fetches the numbers; see `Artifacts.get` (awaited with an asynchronous client)."""
        return self._stored.finish(self._stored.get(self, path))

    def delete(self) -> Any:
        """Removes it from the server; see `Artifacts.delete` (awaited with an asynchronous client)."""
        return self._stored.finish(self._stored.delete(self))

    def add_to(self, trace: BaseTrace) -> int:
        """The node of this value in `trace`."""
        return trace.builder.artifact(self.info)

    @property
    def _joined(self) -> str:
        return "t.constant(handle), its value in the trace t; handle.get() fetches the numbers"

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("an artifact's numbers are on the server; .get() fetches them")

    def __copy__(self) -> Artifact:
        return self

    def __deepcopy__(self, memo: object) -> Artifact:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a handle belongs to its client and cannot be pickled; keep its .digest or its name")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Artifact):
            return NotImplemented
        return self is other or (self._info is not None and self._info == other._info)

    def __hash__(self) -> int:
        return hash(self._expected)

    def __repr__(self) -> str:
        if self._info is None:
            return f"<artifact to be: {self._expected}, kept once the trace has run>"
        name = f" {self._info.name!r}" if self._info.name else ""
        return f"<artifact{name} {self._info.digest[:19]}: {self._expected}, {show_bytes(self._info.nbytes)}>"
