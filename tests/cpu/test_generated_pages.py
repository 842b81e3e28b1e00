"""Pages written from the code say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchbay_server.docs.__main__ import main
from patchbay_server.docs.pages import PAGES, between_markers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_current(name: str) -> None:
    """What `make docs` would write is what is committed."""
    page = (ROOT / name).read_text(encoding="utf-8")
    assert PAGES[name](page) == page, "run make docs and commit the result"


def test_a_stale_page_is_found_and_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check fails on a page that differs and writes nothing; without it the page is mended."""
    for name in PAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    page = tmp_path / "docs/architecture.md"
    good = page.read_text(encoding="utf-8")
    page.write_text(good.replace("| `executor` |", "| `exekutor` |"), encoding="utf-8")
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert "docs/architecture.md" in capsys.readouterr().err
    assert main(["--root", str(tmp_path)]) == 0
    assert page.read_text(encoding="utf-8") == good


def test_a_page_without_markers_is_refused() -> None:
    """A hand-written page that lost its markers is not overwritten."""
    with pytest.raises(ValueError, match="generated: begin"):
        between_markers("# A page", "text")
