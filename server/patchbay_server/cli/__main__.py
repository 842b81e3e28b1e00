"""``python -m patchbay_server.cli``: the `patchbay` command, where its script is not on the path."""

from __future__ import annotations

import sys

from patchbay_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
