"""docs/language.md: its examples run in order, and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from tests.tiny import build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "language.md"
_BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<shown>.*?)```)?", re.DOTALL)


def test_the_examples_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line of a text block begins a line that the example above it printed."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {"pb": pb, "model": pb.local(build("llama"))}
    count = 0
    for match in _BLOCK.finditer(text):
        padding = "\n" * text[: match.start("code")].count("\n")
        exec(compile(padding + match["code"], str(PAGE), "exec"), names)
        printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
        for line in (match["shown"] or "").splitlines():
            wanted = line.strip()
            assert any(p.startswith(wanted) for p in printed), (wanted, printed)
        count += 1
    assert count == 4
    tuned = names["tuned"]
    assert [edit.__name__ for edit in tuned.edits] == ["without_feature_3", "lora"]
