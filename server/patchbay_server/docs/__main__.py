"""Writes every generated page: ``python -m patchbay_server.docs [--check]``; `make docs` calls it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from patchbay_server.docs.pages import PAGES


def main(arguments: list[str] | None = None) -> int:
    """Write the pages into the current checkout; with ``--check`` say which are out of date. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m patchbay_server.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    options = parser.parse_args(arguments)
    stale = []
    for name, write in PAGES.items():
        path = options.root / name
        text = write(path.read_text(encoding="utf-8") if path.exists() else "")
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {name}")
    if options.check and stale:
        print(f"out of date: {', '.join(stale)}; run make docs and commit the result", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
