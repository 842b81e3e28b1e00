"""What a request needs of the store of artifacts: constants taken from it before it runs, results left in it after.

The engine never hears of artifacts: a constant that names one becomes an ordinary constant over a map of its file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import replace

from patchbay.errors import DTypeError, GraphError, LimitExceededError, NotFoundError, ShapeError, UnsupportedError
from patchbay.ir.artifacts import KeyedTensor, check_digest, not_there
from patchbay.ir.events import Kept, TensorValue
from patchbay.ir.graph import Graph, Node
from patchbay_server.config import ArtifactsConfig
from patchbay_server.store.artifacts import ArtifactStore

#: Artifacts that one graph may name: each is an open file.
MAX_PER_GRAPH = 1_024


def needs_store(graph: Graph) -> bool:
    """Whether a graph names artifacts, or leaves some."""
    return any(output.keep for output in graph.outputs) or any("artifact" in node.attrs for node in graph.nodes)


def take(store: ArtifactStore | None, account: str, graph: Graph) -> Graph:
    """`graph` with every artifact that it names in its place, readable for as long as the graph is there. Blocks.

    Raises:
        NotFoundError: the account has no such artifact; its metadata holds the node.
        ShapeError, DTypeError: it is of another form than the graph says.
        LimitExceededError: more artifacts than one graph may name.
        UnsupportedError: this server keeps none.
    """
    if store is None:
        raise UnsupportedError("this server keeps no artifacts", reason="NO_ARTIFACTS")
    named = {i: node for i, node in enumerate(graph.nodes) if node.op == "const" and "artifact" in node.attrs}
    digests = {_digest(i, node) for i, node in named.items()}
    if len(digests) > MAX_PER_GRAPH:
        raise LimitExceededError(
            f"the graph names {len(digests):,} artifacts; at most {MAX_PER_GRAPH:,} are allowed (limit max_artifacts)",
            limit="max_artifacts",
            allowed=MAX_PER_GRAPH,
            requested=len(digests),
        )
    found: dict[str, KeyedTensor] = {}
    nodes = list(graph.nodes)
    for i, node in named.items():
        nodes[i] = _constant(store, account, i, node, found)
    return replace(graph, nodes=tuple(nodes))


def _constant(store: ArtifactStore, account: str, i: int, node: Node, found: dict[str, KeyedTensor]) -> Node:
    digest = _digest(i, node)
    if digest not in found:
        try:
            _, found[digest] = store.open(account, digest)
        except NotFoundError:
            raise not_there(digest, node=str(i)) from None
    tensor = found[digest]
    if node.attrs.get("dtype") != tensor.dtype.name:
        raise DTypeError(f"const: the artifact {digest} holds {tensor.dtype}, not {node.attrs.get('dtype')}", node=i)
    if node.attrs.get("shape") != tensor.shape:
        shown = list(tensor.shape)
        raise ShapeError(f"const: the artifact {digest} has the shape {shown}, not {node.attrs.get('shape')}", node=i)
    return Node("const", (), {"value": tensor})


def _digest(i: int, node: Node) -> str:
    try:
        return check_digest(node.attrs["artifact"])
    except GraphError as error:
        error.node, error.field = i, f"nodes[{i}]"
        raise


def leave(store: ArtifactStore, account: str, event: TensorValue) -> Kept:
    """Store an output's value. Blocks.

    Raises:
        ResourceExhaustedError: beyond the account's quota, or the disk is full.
    """
    return Kept(event.name, store.put(account, event.value, event.name), event.finite)


def store_of(config: ArtifactsConfig) -> ArtifactStore | None:
    """The store that a configuration asks for; None where it keeps none."""
    if not config.quota_bytes:
        return None
    return ArtifactStore(
        config.folder,
        quota_bytes=config.quota_bytes,
        total_bytes=config.total_bytes,
        ttl_s=config.ttl_s,
        max_bytes=config.max_bytes,
        max_count=config.max_count,
    )


class TemporaryArtifacts(ArtifactStore):
    """A store in a temporary folder, for a model inside its user's process; `close` removes it."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="patchbay-artifacts-")
        super().__init__(folder, durable=False)
        self._finalizer = weakref.finalize(self, _remove, folder, os.getpid())

    def close(self) -> None:
        """Remove everything; the garbage collector and the end of the process do it too."""
        self._finalizer()


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a fork that ends must not take its parent's
        shutil.rmtree(folder, ignore_errors=True)
