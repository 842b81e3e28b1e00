"""Chunks of large results, compressed for slow links: bytes regrouped by significance, then Zstandard.

Neighbouring activations have like exponents and unlike mantissas; side by side, the like bytes compress. `zstandard`
(the extra `patchbay[compression]`) is imported when first needed.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from patchbay.errors import ProtocolError

#: Zstandard's own scale; the lowest is the fastest, and the higher ones gain little on shuffled floats.
LEVEL = 1
#: What a frame may ask for to be decompressed: chunks are far smaller.
_MAX_WINDOW_BYTES = 2**23


@cache
def is_available() -> bool:
    """Whether this process can compress and decompress."""
    return importlib.util.find_spec("zstandard") is not None


def compress(data: memoryview, itemsize: int) -> bytes:
    """`data`, elements of `itemsize` bytes, as one Zstandard frame that says its content size."""
    import numpy as np
    import zstandard

    elements = np.frombuffer(data, np.uint8).reshape(-1, itemsize)
    shuffled = elements if itemsize == 1 else np.ascontiguousarray(elements.T)
    return zstandard.ZstdCompressor(level=LEVEL).compress(shuffled.reshape(-1).data)


def decompress(data: bytes | memoryview, size: int, itemsize: int, field: str) -> memoryview:
    """The `size` bytes that `compress` was given; never allocates more.

    Raises:
        ProtocolError: not a frame of exactly so many bytes, or not of whole elements.
    """
    import numpy as np
    import zstandard

    try:
        found = zstandard.frame_content_size(data)
        if found != size or size % itemsize:
            raise ProtocolError(f"{field}: a chunk of {found} bytes decompressed, announced as {size}", field=field)
        plain = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"{field}: a chunk that cannot be decompressed: {error}", field=field) from None
    if len(plain) != size:
        raise ProtocolError(f"{field}: a chunk of {len(plain)} bytes decompressed, announced as {size}", field=field)
    if itemsize == 1:
        return memoryview(plain)
    shuffled = np.frombuffer(plain, np.uint8).reshape(itemsize, -1)
    return np.ascontiguousarray(shuffled.T).reshape(-1).data
