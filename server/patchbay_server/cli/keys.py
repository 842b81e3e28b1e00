"""`patchbay keys`: make, list and revoke API keys in the file that the service reads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from patchbay_server.cli.text import table
from patchbay_server.store.keys import KeyStore


def run(args: argparse.Namespace) -> int:
    """Do what was asked with the key file; returns the exit status."""
    store = KeyStore(_file(args))
    if args.action == "create":
        key = store.create(args.account)
        # The key alone on stdout, so that a script can catch it.
        print(f"a key for {args.account}, shown this once; the server knows it within seconds:", file=sys.stderr)
        print(key)
    elif args.action == "list":
        records = store.list()
        if records:
            print(table([(r.id, r.account, r.created) for r in records], head=("ID", "ACCOUNT", "CREATED")))
        else:
            print(f"no keys in {store.path}; `patchbay keys create NAME` makes one", file=sys.stderr)
    else:
        gone = store.revoke(args.name)
        for record in gone:
            print(f"revoked {record.id} of {record.account}; servers refuse it within seconds")
    return 0


def _file(args: argparse.Namespace) -> Path | None:
    """The key file: as given, else as configured, else the default. A configuration needs the server extra."""
    if args.file:
        return Path(args.file)
    if args.config or any(name.startswith("PATCHBAY_KEYS") or name == "PATCHBAY_CONFIG" for name in os.environ):
        from patchbay_server.config import Config

        return Config.load(args.config).keys.file
    return None
