"""Tensors that stay on the server: the calls behind ``client.artifacts``, and what graphs need of them.

`StoredArtifacts` is the part that waits, as coroutines: it also names a graph's large constants by their digests and
uploads those that the server lacks, so that each crosses the wire once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchbay.arguments import check_name, check_path, check_text
from patchbay.errors import (
    GraphError,
    NotFoundError,
    ProtocolError,
    ResourceExhaustedError,
    TraceError,
    UnsupportedError,
)
from patchbay.ir.artifacts import NOT_THERE, UPLOAD_ABOVE_BYTES, ArtifactInfo, check_digest, digest_of, not_there
from patchbay.ir.graph import Attr, Graph, Node, TensorData

if TYPE_CHECKING:
    from patchbay.client import Connection
    from patchbay.ir.limits import Limits
    from patchbay.tracing.artifacts import Artifact

#: Digests that a connection remembers to be on the server.
_REMEMBERED = 65_536


class StoredArtifacts:
    """The artifacts that one connection reaches.

    Args:
        connection: the connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._there: dict[str, None] = {}
        self._lock: asyncio.Lock | None = None
        #: Waits for a coroutine where the client is synchronous; None where its user awaits it.
        self.wait: Callable[[Coroutine[Any, Any, Any]], Any] | None = None

    def finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, or, for an asynchronous client, `work` itself."""
        return work if self.wait is None else self.wait(work)

    # --- what graphs need -----------------------------------------------------------------------------------------

    async def named(self, graph: Graph, model: str, limits: Limits, *, again: bool = False) -> Graph:
        """`graph` with its large constants named by their digests, each of them on the server.

        Where the server takes no more, constants stay inside the graph as far as its limits allow.

        Args:
            graph: the graph.
            model: name of the model that it is for.
            limits: of that model.
            again: the server lacks one of them, whatever it said before: upload all of them.

        Raises:
            ServiceError: the server does not take one, and it is too large to travel inside the graph.
        """
        large = {
            i: value
            for i, node in enumerate(graph.nodes)
            if node.op == "const"
            and isinstance(value := node.attrs.get("value"), TensorData)
            and value.nbytes > UPLOAD_ABOVE_BYTES
        }
        if not large:
            return graph
        digests = await asyncio.to_thread(lambda: {i: digest_of(value) for i, value in large.items()})
        values = {digest: large[i] for i, digest in digests.items()}
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:  # traces that run at the same time upload a constant once
            refused, reason = await self._ensure(values, model, again)
        inside = sum(values[digest].nbytes for digest in refused)
        if reason is not None and inside > limits.max_const_bytes:
            raise reason
        nodes = list(graph.nodes)
        for i, digest in digests.items():
            if digest not in refused:
                nodes[i] = _constant(digest, large[i])
        return Graph(**({f.name: getattr(graph, f.name) for f in fields(Graph)} | {"nodes": tuple(nodes)}))

    async def _ensure(
        self, values: Mapping[str, TensorData], model: str, again: bool
    ) -> tuple[set[str], ResourceExhaustedError | UnsupportedError | None]:
        """Upload what the server lacks; returns what it refused, and why."""
        transport = await self._connection.transport()
        missing = [d for d in values if again or d not in self._there]
        refused: set[str] = set()
        reason: ResourceExhaustedError | UnsupportedError | None = None
        try:
            if missing and not again:
                there = await transport.stat_artifacts(missing, model=model)
                self._remember(*(info.digest for info in there))
                missing = [d for d in missing if d not in self._there]
        except UnsupportedError as error:
            return set(missing), error
        for digest in missing:
            value = values[digest]
            info = ArtifactInfo(digest, value.dtype, value.shape, value.nbytes)
            try:
                await transport.put_artifact(info, value, automatic=True, model=model)
            except (ResourceExhaustedError, UnsupportedError) as error:
                refused.add(digest)
                reason = error
            else:
                self._remember(digest)
        return refused, reason

    def _remember(self, *digests: str) -> None:
        self._there.update(dict.fromkeys(digests))
        while len(self._there) > _REMEMBERED:
            del self._there[next(iter(self._there))]

    @staticmethod
    def uploaded(graph: Graph, named: Graph) -> set[str]:
        """Digests of the constants of `graph` that `named` names: those that can be uploaded again."""
        pairs = zip(graph.nodes, named.nodes, strict=True)
        return {str(new.attrs["artifact"]) for old, new in pairs if old is not new and "artifact" in new.attrs}

    def explain(self, error: NotFoundError, graph: Graph) -> NotFoundError:
        """`error`, about an artifact that `graph` names, with the user's line."""
        node = error.metadata.get("node", "")
        locations = getattr(graph, "locations", ())
        place = locations[int(node)] if node.isdecimal() and int(node) < len(locations) else None
        where = f"\n  used at {place}" if place else f"\n  it is node {node} of the graph" if node else ""
        if hasattr(graph, "schema"):  # it comes from a file
            where += "; a file that was saved with save_graph(..., inline=True) carries its artifacts"
        return NotFoundError(str(error) + where, reason=error.reason, metadata=error.metadata)

    # --- what users ask for ---------------------------------------------------------------------------------------

    async def put(self, value: object, *, name: str = "") -> Any:
        """See `Artifacts.put`."""
        if isinstance(value, (str, os.PathLike)):
            from patchbay.saving import read_safetensors

            tensors = await asyncio.to_thread(read_safetensors, Path(value))
            return {key: await self._put(tensor, f"{name}{key}") for key, tensor in tensors.items()}
        from patchbay.arrays import as_array, shared_data

        return await self._put(shared_data(as_array(value)), name)

    def _handle(self, info: ArtifactInfo) -> Artifact:
        from patchbay.tracing.artifacts import Artifact

        return Artifact(info, self)

    async def _put(self, tensor: TensorData, name: str) -> Artifact:
        transport = await self._connection.transport()
        digest = await asyncio.to_thread(digest_of, tensor)
        wanted = ArtifactInfo(digest, tensor.dtype, tensor.shape, tensor.nbytes, name)
        known = bool(await transport.stat_artifacts([digest])) if tensor.nbytes > UPLOAD_ABOVE_BYTES else False
        try:
            info = await transport.put_artifact(wanted, tensor, known=known)
        except ProtocolError:
            if not known:
                raise
            info = await transport.put_artifact(wanted, tensor)  # it went in between
        self._remember(digest)
        return self._handle(info)

    async def list(self) -> list[Artifact]:
        """See `Artifacts.list`."""
        transport = await self._connection.transport()
        return [self._handle(info) for info in await transport.list_artifacts()]

    async def find(self, which: Artifact | str) -> str:
        """The digest of a handle, of a digest, or of the newest artifact of a name.

        Raises:
            NotFoundError: there is none of that name.
        """
        if not isinstance(which, str):
            if which._stored is not self:
                raise TraceError(f"{which!r} belongs to another client")
            return which.digest
        try:
            return check_digest(which)
        except GraphError:
            named = [handle.info for handle in await self.list() if handle.name == which]
        if not named:
            raise NotFoundError(f"you have no artifact called {which!r}; see client.artifacts.list()", reason=NOT_THERE)
        return max(named, key=lambda info: info.created_at).digest

    async def handle(self, which: str) -> Artifact:
        """See `Artifacts.handle`."""
        digest = await self.find(which)
        transport = await self._connection.transport()
        for info in await transport.stat_artifacts([digest]):
            return self._handle(info)
        raise not_there(digest)

    async def get(self, which: Artifact | str, path: str | os.PathLike[str] | None = None) -> Any:
        """See `Artifacts.get`."""
        digest = await self.find(which)
        transport = await self._connection.transport()
        info, tensor = await transport.get_artifact(digest)
        if await asyncio.to_thread(digest_of, tensor) != digest:
            raise ProtocolError(f"what the server sent is not {digest}")
        from patchbay.arrays import to_array

        array = to_array(tensor)
        if path is None:
            return array
        from patchbay.saving import save_results

        await asyncio.to_thread(save_results, {info.name or "value": array}, path)
        return None

    async def delete(self, which: Artifact | str) -> None:
        """See `Artifacts.delete`."""
        digest = await self.find(which)
        self._there.pop(digest, None)
        transport = await self._connection.transport()
        await transport.delete_artifact(digest)


def _constant(digest: str, value: TensorData) -> Node:
    attrs: dict[str, Attr] = {"artifact": digest, "shape": value.shape, "dtype": value.dtype.name}
    return Node("const", (), attrs)


def _check_which(which: object) -> None:
    """
    Raises:
        ArgumentError: neither a handle nor a text.
    """
    if not hasattr(which, "_stored"):
        check_text("which artifact it is (a handle, a digest or a name)", which)


class Artifacts:
    """``client.artifacts``: tensors that stay on the server. With an asynchronous client every call is awaited."""

    def __init__(self, stored: StoredArtifacts) -> None:
        self._stored = stored

    @property
    def stored(self) -> StoredArtifacts:
        """The coroutines behind the calls."""
        return self._stored

    def put(self, value: object, *, name: str = "") -> Any:
        """Uploads an array, or every tensor of a safetensors file; what the server has already is not sent.

        Args:
            value: an array (list, number, CPU tensor), or the path of a ``.safetensors`` file.
            name: what to call it; before the names of a file's tensors.

        Returns:
            An `Artifact`; for a file a dict of them by the names of its tensors.

        Raises:
            ResourceExhaustedError: beyond your quota, or the server's disk is full.
            ProtocolError: not a safetensors file.
        """
        if name != "":
            check_name("the name of an artifact", name)
        return self._stored.finish(self._stored.put(value, name=name))

    def list(self) -> Any:
        """Yours, ordered by digest: a list of `Artifact`."""
        return self._stored.finish(self._stored.list())

    def handle(self, which: str) -> Any:
        """A handle to one of yours, by digest or name (the newest of that name), to be used as a constant.

        Raises:
            NotFoundError: you have no such artifact.
        """
        check_text("which artifact it is", which)
        return self._stored.finish(self._stored.handle(which))

    def get(self, which: Artifact | str, path: str | os.PathLike[str] | None = None) -> Any:
        """Fetches the numbers.

        Args:
            which: a handle, a digest, or a name.
            path: a ``.safetensors`` (or ``.npz``) file to write them to instead of returning them.

        Returns:
            The array; None when it was written to a file.

        Raises:
            NotFoundError: you have no such artifact.
        """
        _check_which(which)
        if path is not None:
            check_path("where to write it", path)
        return self._stored.finish(self._stored.get(which, path))

    def delete(self, which: Artifact | str) -> Any:
        """Removes it; a graph that is using it goes on.

        Raises:
            NotFoundError: you have no such artifact.
        """
        _check_which(which)
        return self._stored.finish(self._stored.delete(which))

    def __repr__(self) -> str:
        return "<artifacts: put, list, handle, get, delete>"
