"""docs/switches.md: every optimisation that can be switched off has its line there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patchbay_server.engine.switches import OPTIMISATIONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "switches.md"
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<what>[^|]+) \| (?P<figure>[^|]+) \| \[(?P<page>[\w.]+)\]", re.MULTILINE)


def test_every_switch_has_a_line() -> None:
    """The table names every optimisation of the service once, and nothing else."""
    rows = [match["name"] for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    assert sorted(rows) == sorted(OPTIMISATIONS)


@pytest.mark.parametrize("name", OPTIMISATIONS)
def test_every_switch_is_compared_with_the_path_without_it(name: str) -> None:
    """Some test beside the one on generated graphs switches it off by its name."""
    constant = re.compile(rf"\b{name.upper()}\b|[\"']{name}[\"']")
    tests = [p for p in Path(ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    assert any(constant.search(path.read_text(encoding="utf-8")) for path in tests)
