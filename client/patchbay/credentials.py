"""Where a client finds the server's address and its key without being told: environment, then key files."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_PORT = 9000
URL_VARIABLE = "PATCHBAY_URL"
KEY_VARIABLE = "PATCHBAY_API_KEY"
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})


def config_dir() -> Path:
    """``$XDG_CONFIG_HOME/patchbay``, by default ``~/.config/patchbay``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "patchbay"


def key_path(port: int) -> Path:
    """The file in which ``patchbay serve`` leaves a key for clients of the same user and machine."""
    return config_dir() / "keys" / str(port)


def find_target(target: str | None) -> str:
    """`target`, else ``PATCHBAY_URL``, else this machine's default port."""
    return target or os.environ.get(URL_VARIABLE) or f"localhost:{DEFAULT_PORT}"


def find_api_key(target: str, api_key: str | None = None) -> str | None:
    """`api_key`, else ``PATCHBAY_API_KEY``, else, for a server on this machine, its key file; None when there is none.

    A key file is never used for another host: it would hand the key to a stranger.
    """
    if api_key is not None:
        return api_key
    given = os.environ.get(KEY_VARIABLE)
    if given:
        return given.strip()
    host, port = split_target(target)
    if host not in _LOCAL_HOSTS:
        return None
    try:
        key = key_path(port).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return key or None


def split_target(target: str) -> tuple[str, int]:
    """Host and port of ``host:port``, ``[v6]:port`` or a URL; the default port where none is named."""
    rest = target.split("://", 1)[-1].split("/", 1)[0]
    if rest.startswith("["):
        host, _, tail = rest[1:].partition("]")
        port = tail.lstrip(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    else:
        host, port = rest, ""
    return host.lower(), int(port) if port.isdigit() else DEFAULT_PORT
