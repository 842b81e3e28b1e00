"""Graphs that an account sends again, byte for byte, are not read again: a loop over one experiment, a dashboard.

The same bytes give the very same object, by which the engine knows that it has planned the graph before
(`patchbay_server.engine.recurring`). Accounts do not share: how long a request takes must not tell what others do.
"""

from __future__ import annotations

from collections import OrderedDict

from patchbay.ir.graph import Graph
from patchbay.ir.limits import Limits
from patchbay.v1 import graph_pb2
from patchbay.wire.graphs import decode_graph

#: Bytes of all graphs that are remembered, as they came; read, they take some twenty times as much.
MAX_BYTES = 2**20
#: A graph of more bytes is not remembered.
MAX_GRAPH_BYTES = 128 * 2**10


class RecurringGraphs:
    """Reads graphs, each once."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._known: OrderedDict[tuple[str, bytes], Graph] = OrderedDict()

    def decode(self, account: str, message: graph_pb2.Graph, limits: Limits) -> Graph:
        """The graph in `message`.

        Raises:
            GraphError, ProtocolError: what `decode_graph` raises.
        """
        if message.ByteSize() > MAX_GRAPH_BYTES:
            return decode_graph(message, limits)
        key = (account, message.SerializeToString(deterministic=True))
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            return found
        graph = self._known[key] = decode_graph(message, limits)
        self._bytes += len(key[1])
        while self._bytes > self._max_bytes:
            (_, dropped), _ = self._known.popitem(last=False)
            self._bytes -= len(dropped)
        return graph
