"""Bounds that decoding holds every message to, beside the configurable limits on a graph (`patchbay.ir.limits`)."""

from __future__ import annotations

#: Tensors below this many bytes travel inside one event.
INLINE_BYTES = 64 * 2**10
#: Larger ones travel in chunks of this many bytes.
CHUNK_BYTES = 512 * 2**10
#: A chunk larger than this is refused.
MAX_CHUNK_BYTES = 4 * 2**20
#: How deeply attribute lists nest; an index is a list of lists.
MAX_ATTR_DEPTH = 8
#: Entries of one attribute list.
MAX_ATTR_ITEMS = 65_536
#: Attributes of one node.
MAX_ATTRS = 64
#: Arguments of all nodes together, for every node that the limits allow.
MAX_ARGS_PER_NODE = 32
#: Characters of a name: an operation, an attribute, an output.
MAX_NAME_CHARS = 1_024
#: Characters of a string attribute.
MAX_STRING_CHARS = 65_536
#: Characters of a run's label; encoding cuts longer ones, since a label is never interpreted.
MAX_LABEL_CHARS = 4_096
#: Sites and callables of a card.
MAX_SITES = 1_000_000
#: Bytes of a serialized error.
MAX_STATUS_BYTES = 2**20
#: Bytes of all results of one execution that a client is willing to hold.
MAX_RESULT_BYTES = 16 * 2**30
#: Bytes of a msgpack tree; the objects take up to 64 times as much.
MAX_TREE_BYTES = 2**20
#: Depth of a msgpack tree.
MAX_TREE_DEPTH = 32
