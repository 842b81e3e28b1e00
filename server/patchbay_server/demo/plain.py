"""The embedded model under plain grpc.aio: ``python -m patchbay_server.demo.plain PORT``.

The same servicer, backend, engine and keys as under Ray Serve; only the process that they live in differs.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from patchbay_server.config import Config


async def serve(port: int) -> None:
    """Serve the embedded model on loopback until SIGTERM or SIGINT."""
    from patchbay_server.models.loader import load
    from patchbay_server.serving.local import LocalCatalog, backends_of
    from patchbay_server.serving.plain import run_until, serve_grpc
    from patchbay_server.store.keys import KeyStore, ensure_local_key
    from patchbay_server.transport.auth import KeyAuthenticator
    from patchbay_server.transport.servicer import Servicer

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    config = Config(host="127.0.0.1", port=port)
    backends = backends_of(config, [load("demo")], exit_on_device_failure=True)
    keys = KeyStore()
    ensure_local_key(keys, port)
    servicer = Servicer(LocalCatalog(backends), KeyAuthenticator(keys), config.limits)
    try:
        await run_until(await serve_grpc(servicer, config), stop, grace_s=2.0)
    finally:
        for backend in backends.values():
            backend.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
