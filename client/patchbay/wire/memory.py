"""Memory for large results: what nobody looks at any more is written over by the next result.

Memory that is new to a process costs a page fault for every page: 4 ms for 64 MB at best, and 150 ms on a virtual
machine whose host has to find the pages first, where receiving the bytes takes 20. Whoever fetches activations in a
loop would pay that for each result, did not the result before the last make room for it.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Smaller results are left to malloc, which keeps small memory by itself.
KEPT_ABOVE_BYTES = 4 * 2**20
#: What is kept for later results at most: two of 64 MB, for a loop holds on to one while it asks for the next.
MAX_KEPT_BYTES = 128 * 2**20
#: A result may lie in memory of this many times its size, so that batches of nearly the same shape take turns.
MAX_SLACK = 1.25


class ResultMemory:
    """Where the large results of one connection lie.

    A result's memory is taken back when the last array, view or tensor over it is gone, wherever that happens; until
    then nobody else gets it. A result is handed out only when every byte of it was written.

    Args:
        max_kept_bytes: of memory that no result uses; 0: none, every result gets new memory.
    """

    def __init__(self, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_kept_bytes = max_kept_bytes
        # Arrays die in any thread, and inside a garbage collection that begins anywhere below: no lock can be held
        # then, so whatever happens to this dictionary is a single operation. By id, oldest first.
        self._kept: dict[int, NDArray[np.uint8]] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes that no result uses."""
        return sum(map(len, tuple(self._kept.values())))

    def take(self, size: int) -> memoryview:
        """`size` bytes to write a result to, all of them; whatever was there before is still there."""
        import numpy as np

        if size < KEPT_ABOVE_BYTES or size > self._max_kept_bytes:
            # Not filled with zeros first, unlike a bytearray: that would touch all of its memory once more.
            return np.empty(size, np.uint8).data
        block = self._find(size)
        if block is None:
            block = np.empty(size, np.uint8)
        lent: NDArray[np.uint8] = block[:size].view(_lent_type())
        weakref.finalize(lent, self._take_back, block).atexit = False
        return lent.data

    def close(self) -> None:
        """Let go of everything; results that are in use stay as they are."""
        self._max_kept_bytes = 0
        self._kept.clear()

    def _find(self, size: int) -> NDArray[np.uint8] | None:
        """The smallest block that fits, taken out of what is kept."""
        for block in sorted(self._kept.values(), key=len):
            if size <= len(block) <= size * MAX_SLACK:
                return self._kept.pop(id(block), None)
        return None

    def _take_back(self, block: NDArray[np.uint8]) -> None:
        if len(block) > self._max_kept_bytes:
            return
        self._kept[id(block)] = block
        for oldest in tuple(self._kept):
            if self.kept_bytes <= self._max_kept_bytes:
                break
            self._kept.pop(oldest, None)


@cache
def _lent_type() -> Any:
    """Arrays that can be watched. Whatever is made from a memoryview of one keeps that very object alive."""
    import numpy as np

    class Lent(np.ndarray[Any, np.dtype[np.uint8]]):
        """An array over memory that is not its own."""

    return Lent
