"""A plain grpc.aio server before the servicer: health and reflection, optional TLS, one process, no Ray.

For tests, for one machine, and where Ray cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped,unused-ignore]
from grpc_reflection.v1alpha import reflection

from patchbay.transport.calls import SERVICE
from patchbay_server.config import Config, ConfigError
from patchbay_server.transport.registration import add_servicer_to_server

if TYPE_CHECKING:
    from patchbay_server.transport.servicer import Servicer

#: Room for metadata: a key, a few names, and an error's details.
MAX_METADATA_BYTES = 32 * 1024


@dataclass
class PlainServer:
    """A running server; await its methods on the loop that started it.

    Attributes:
        port: the port that it listens on.
    """

    port: int
    _server: grpc.aio.Server
    _health: Any

    async def stop(self, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, take no new calls, and give running ones `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Wait until it has stopped."""
        await self._server.wait_for_termination()


async def serve_grpc(servicer: Servicer, config: Config | None = None) -> PlainServer:
    """Start a plain gRPC server for a servicer on the running loop.

    Args:
        servicer: the servicer.
        config: `host`, `port` (0: any free one), `tls` and `limits.max_request_bytes` count. None: loopback, any port.

    Raises:
        ConfigError: the port is taken, or a TLS file cannot be read.
    """
    config = Config(host="127.0.0.1", port=0) if config is None else config
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            # Two servers silently sharing a port would each get half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]
    )
    add_servicer_to_server(servicer, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
    try:
        if config.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(config))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken, or the address is not this machine's; choose another"
        ) from None
    for name in ("", SERVICE):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    return PlainServer(port, server, health_servicer)


def _credentials(config: Config) -> grpc.ServerCredentials:
    assert config.tls is not None
    parts = []
    for key in ("private_key_file", "certificate_file"):
        path = getattr(config.tls, key)
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"tls.{key}: cannot read {path}: {error.strerror}") from None
    return grpc.ssl_server_credentials([(parts[0], parts[1])])
