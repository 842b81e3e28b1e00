"""The directions of imports (DESIGN: `[tool.importlinter]` in pyproject.toml) hold in the code as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_import_contracts_hold(repository: Path) -> None:
    """import-linter finds every contract of pyproject.toml kept."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["client", "server"])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
