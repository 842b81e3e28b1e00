"""`patchbay artifacts`: what you left on a server: list it, put files there, fetch them, delete them."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from patchbay.client import Client, connect
from patchbay.errors import PatchbayError
from patchbay.results import show_bytes
from patchbay.tracing import Artifact
from patchbay_server.cli.text import table


def run(args: argparse.Namespace) -> int:
    """Do what the action says.

    Raises:
        PatchbayError: the server, or a file, will not do.
    """
    with connect(args.url, api_key=args.api_key) as client:
        try:
            {"list": _list, "put": _put, "get": _get, "delete": _delete}[args.action](client, args)
        except OSError as error:
            if isinstance(error, PatchbayError):
                raise
            raise PatchbayError(f"{error.filename or args.action}: {error.strerror}") from None
    return 0


def _list(client: Client, args: argparse.Namespace) -> None:
    del args
    found = client.artifacts.list()
    if not found:
        print("no artifacts")
        return
    print(table(map(_row, found), head=("DIGEST", "TENSOR", "SIZE", "EXPIRES", "NAME")))
    print(f"{len(found)} in all, {show_bytes(sum(a.nbytes for a in found))}")


def _row(artifact: Artifact) -> tuple[str, ...]:
    info = artifact.info
    expires = time.strftime("%Y-%m-%d", time.gmtime(info.expires_at)) if info.expires_at else "-"
    tensor = f"{info.dtype}{list(info.shape)}"
    return info.digest, tensor, show_bytes(info.nbytes), expires, info.name or "-"


def _put(client: Client, args: argparse.Namespace) -> None:
    stored = client.artifacts.put(Path(args.file), name=args.name)
    print(table(map(_row, stored.values()), head=("DIGEST", "TENSOR", "SIZE", "EXPIRES", "NAME")))


def _get(client: Client, args: argparse.Namespace) -> None:
    client.artifacts.get(args.which, args.file)
    print(f"saved to {args.file}")


def _delete(client: Client, args: argparse.Namespace) -> None:
    for which in args.which:
        client.artifacts.delete(which)
        print(f"deleted {which}")
