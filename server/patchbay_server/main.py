"""The composition root: from a configuration to a running service."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from patchbay_server.config import Config, ConfigError
from patchbay_server.serving import launcher
from patchbay_server.serving.environment import RAY_ENVIRONMENT
from patchbay_server.store.keys import KeyStore, KeyStoreError, ensure_local_key


def prepare_keys(config: Config) -> Path | None:
    """Leave a key where clients on this machine find it; None where no keys are asked for or none should be written.

    Raises:
        KeyStoreError: a file cannot be written.
    """
    if config.insecure or not config.keys.write_local:
        return None
    store = KeyStore(config.keys.file, secrets_dir=config.keys.secrets_dir)
    return ensure_local_key(store, config.port)


def check(config: Config) -> None:
    """See to it that what the configuration names on this machine is there, before minutes go into loading models.

    Raises:
        ConfigError: a file or folder that cannot be used; names its key.
    """
    if not config.insecure:
        try:
            KeyStore(config.keys.file, secrets_dir=config.keys.secrets_dir).check()
        except KeyStoreError as error:
            raise ConfigError(f"keys: {error}") from None
    if config.artifacts.quota_bytes:
        folder = config.artifacts.folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"artifacts.path: cannot write to {folder}: {error.strerror}; name another folder, or keep none with "
                "artifacts.quota_bytes: 0"
            ) from None


def serve_on_ray(config: Config, *, progress: Callable[[str], None], ready: Callable[[Path], None]) -> launcher.Launch:
    """Serve on a Ray node of our own until a signal comes; see `patchbay_server.serving.launcher.run`.

    Raises:
        ConfigError: what cannot be; names its key.
    """
    if config.tls is not None:
        raise ConfigError(
            "tls: Ray Serve's port has no TLS; serve with --plain, or leave `tls` out and let a gateway before it end "
            "TLS"
        )
    check(config)
    prepare_keys(config)
    return launcher.run(config, progress=progress, ready=ready)


def serve_plain(config: Config, *, progress: Callable[[str], None], ready: Callable[[int], None]) -> None:
    """Serve from this process with plain gRPC, without Ray, until a signal comes.

    Args:
        config: the configuration.
        progress: called with what is being done while the service starts.
        ready: called once with the port, when the service answers.

    Raises:
        PatchbayError: what the configuration names is not there, a model cannot be loaded, the port is taken, a key
            cannot be written.
    """
    from patchbay_server.serving.plain import credentials, serve_grpc

    check(config)
    if config.tls is not None:
        credentials(config)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", RAY_ENVIRONMENT["THP_MEM_ALLOC_ENABLE"])  # before torch allocates
    from transformers.utils.logging import disable_progress_bar

    from patchbay_server.models.loader import load
    from patchbay_server.serving.local import LocalCatalog, backends_of
    from patchbay_server.serving.replica import servicer_of

    disable_progress_bar()  # our own line says what is going on
    hosted = []
    for model in config.models:
        progress(f"loading {model.name}")
        loaded = load(
            model.source, name=model.name, dtype=model.dtype, device=model.device, compile_layers=model.compile
        )
        hosted.append(loaded.with_weights(model.weights))
    backends = backends_of(config, hosted, exit_on_device_failure=True)

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(number, stop.set)
        server = await serve_grpc(servicer_of(config, LocalCatalog(backends)), config)
        try:
            prepare_keys(config.model_copy(update={"port": server.port}))
            ready(server.port)
            await stop.wait()
        finally:
            await server.stop(config.ray.drain_s)

    try:
        asyncio.run(serve())
    finally:
        for backend in backends.values():
            backend.close()
