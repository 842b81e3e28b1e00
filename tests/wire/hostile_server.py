"""A plain gRPC server with a tiny random model and tight limits, for the hostile suite; stops when its stdin closes.

Prints its port once it serves. Its key is `KEY`. What it logs goes to stderr, where the suite looks for tracebacks.
"""

from __future__ import annotations

import asyncio
import logging
import sys

KEY = "pb_hostile_suite"
MAX_REQUEST_BYTES = 32 * 2**20
MAX_ARTIFACTS = 40


async def main() -> None:
    """Serve until stdin closes."""
    from patchbay_server.config import Config, LimitsConfig
    from patchbay_server.models.loader import host
    from patchbay_server.serving.artifacts import TemporaryArtifacts
    from patchbay_server.serving.local import LocalBackend, LocalCatalog
    from patchbay_server.serving.plain import serve_grpc
    from patchbay_server.transport.auth import DigestKeys, KeyAuthenticator
    from patchbay_server.transport.servicer import Servicer
    from tests.thin.plain_server import tiny_model, tiny_tokenizer

    limits = LimitsConfig(
        max_nodes=20_000,
        max_runs=64,
        max_rows=64,
        max_tokens=2_048,
        max_const_bytes=16 * 2**20,
        max_result_bytes=16 * 2**20,
        max_peak_bytes=64 * 2**20,
        max_flops=10**9,
        max_request_bytes=MAX_REQUEST_BYTES,
    )
    hosted = host(tiny_model(), tiny_tokenizer(), name="tiny")
    store = TemporaryArtifacts()
    store.quota_bytes, store.max_bytes, store.max_count = 24 * 2**20, 16 * 2**20, MAX_ARTIFACTS
    catalog = LocalCatalog({"tiny": LocalBackend(hosted, limits, artifacts=store, torch_threads=1)})
    servicer = Servicer(catalog, KeyAuthenticator(DigestKeys({KEY: "mallory"})), limits, artifacts=store)
    server = await serve_grpc(servicer, Config(host="127.0.0.1", port=0, limits=limits))
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(grace_s=0)


if __name__ == "__main__":
    logging.basicConfig(level="WARNING")
    asyncio.run(main())
