"""A `grpc.aio` server that streams an array's bytes and knows nothing else; it stops when its stdin ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

METHOD = "/bare.Stream/Bytes"
#: Large windows, as Patchbay's own transports use, so that the comparison is of the same gRPC.
OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.http2.lookahead_bytes", 16 * 2**20),
    ("grpc.http2.max_frame_size", 256 * 2**10),
]


async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    """The bytes of `total` / 4 float32 numbers, counted from 0 and made anew, in messages of `chunk` bytes."""
    del context
    total, chunk = map(int, request.split())
    data = memoryview(np.arange(total // 4, dtype=np.float32)).cast("B")
    for start in range(0, total, chunk):
        yield bytes(data[start : start + chunk])


async def main() -> None:
    import grpc
    import grpc.aio

    server = grpc.aio.server(options=OPTIONS)
    handler: Any = grpc.unary_stream_rpc_method_handler(stream)
    service = grpc.method_handlers_generic_handler("bare.Stream", {"Bytes": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(grace=0)


if __name__ == "__main__":
    asyncio.run(main())
