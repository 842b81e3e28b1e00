"""A plain grpc.aio server before the servicer: health and reflection, optional TLS, one process, no Ray.

For tests, for one machine, and where Ray cannot run. Whoever has no key is turned away before their message is taken,
and what connections may hold open is bounded (`connections` in the configuration).
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped,unused-ignore]
from grpc_reflection.v1alpha import reflection

from patchbay.errors import PatchbayError
from patchbay.transport.calls import SERVICE
from patchbay_server.config import Config, ConfigError
from patchbay_server.serving.replica import MAX_WATCHES
from patchbay_server.transport.auth import Authenticator
from patchbay_server.transport.context import key_among, set_error
from patchbay_server.transport.registration import add_servicer_to_server

if TYPE_CHECKING:
    from patchbay_server.transport.servicer import Servicer

#: Room for metadata: a key, a few names, and an error's details.
MAX_METADATA_BYTES = 32 * 1024
#: What the calls of a connection that has to end get for their results, beyond the deadline of a request.
READING_S = 300.0
#: How long a new connection may take to say that it speaks HTTP/2 (and TLS).
HANDSHAKE_S = 20.0


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


class _KeyFirst(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Refuses calls without a key on their headers: gRPC would take a whole message before the servicer sees either."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The call's own handler, or one that takes no message."""
        if handler_call_details.method.startswith(f"/{SERVICE}/"):
            try:
                self._authenticator.account_for(key_among(handler_call_details.invocation_metadata or ()))
            except PatchbayError as error:
                return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: PatchbayError) -> Any:
    async def refuse(requests: Any, context: Any) -> None:
        del requests  # a stream's messages are taken when they are asked for
        set_error(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


class _Health(health.aio.HealthServicer):  # type: ignore[misc,unused-ignore]
    """grpc.health.v1, whose watches are counted: nobody is asked for a key there."""

    _watches = 0

    async def Watch(self, request: Any, context: Any) -> None:
        """The health whenever it changes; for `MAX_WATCHES` callers at a time."""
        if self._watches >= MAX_WATCHES:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(f"{MAX_WATCHES} callers watch already; ask with Check")
            return
        self._watches += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watches -= 1


def channel_options(config: Config) -> list[tuple[str, int]]:
    """What gRPC holds connections and messages to, by its own names."""
    connections, grace_s = config.connections, config.connections.age_grace_s
    seconds = {
        "grpc.max_connection_idle_ms": connections.max_idle_s,
        "grpc.max_connection_age_ms": connections.max_age_s,
        "grpc.max_connection_age_grace_ms": config.limits.deadline_s + READING_S if grace_s is None else grace_s,
        "grpc.keepalive_time_ms": connections.keepalive_s,
        # gRPC waits for the longer of the two.
        "grpc.keepalive_timeout_ms": connections.keepalive_timeout_s,
        "grpc.http2.ping_timeout_ms": connections.keepalive_timeout_s,
        "grpc.http2.min_ping_interval_without_data_ms": connections.min_ping_interval_s,
        "grpc.server_handshake_timeout_ms": HANDSHAKE_S,
    }
    return [
        ("grpc.max_receive_message_length", config.limits.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        # Two servers silently sharing a port would each get half of the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", connections.max_connections),
        ("grpc.max_concurrent_streams", connections.max_calls),
        ("grpc.keepalive_permit_without_calls", 1),
        *((name, min(max(1, round(1e3 * value)), 2**31 - 1)) for name, value in seconds.items()),
    ]


async def serve_grpc(servicer: Servicer, config: Config | None = None) -> PlainServer:
    """Start a plain gRPC server for a servicer on the running loop.

    Args:
        servicer: the servicer.
        config: `host`, `port` (0: any free one), `tls`, `connections` and `limits.max_request_bytes` count. None:
            loopback, any port.

    Raises:
        ConfigError: the port is taken, or a TLS file cannot be read.
    """
    config = Config(host="127.0.0.1", port=0) if config is None else config
    server = grpc.aio.server(interceptors=(_KeyFirst(servicer.authenticator),), options=channel_options(config))
    add_servicer_to_server(servicer, server)
    health_servicer = _Health()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
    try:
        if config.tls is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials(config))
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address} (host, port): the port is taken, or the address is not this machine's; choose "
            "another"
        ) from None
    for name in ("", SERVICE):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    return PlainServer(port, server, health_servicer)


def credentials(config: Config) -> grpc.ServerCredentials:
    """What the configuration's `tls` names, tried out.

    Raises:
        ConfigError: a file cannot be read, or is not what it should be.
    """
    assert config.tls is not None
    parts = []
    for key in ("private_key_file", "certificate_file"):
        path = getattr(config.tls, key)
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"tls.{key}: cannot read {path}: {error.strerror}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.tls.certificate_file, config.tls.private_key_file, password=""
        )
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls: {config.tls.certificate_file} and {config.tls.private_key_file} are not a PEM certificate chain and "
            f"its key, without a password ({error.reason or error})"
        ) from None
    return grpc.ssl_server_credentials([(parts[0], parts[1])])
