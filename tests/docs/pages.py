"""Runs a page of documentation: its python blocks in order, in one namespace, and what each prints against the page.

A block of ```python runs unless a comment on the line before it says otherwise:

- ``<!-- not run: why -->``: never;
- ``<!-- needs a real model -->``: only where what is named is offered (`run_page`'s ``offers``);
- ``<!-- checked -->``: runs, and what it prints must be the following ```text block exactly.

A ```text block that follows a python block (with nothing but a blank line, or ``<!-- printed with a fake model -->``,
between them) holds what it prints: each of its lines begins a printed line, in that order. So a page may leave out
lines in between and what stands at the end of one. Places in programs (``experiment.py:3``) are taken for equal.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

#: The folder of the pages.
DOCS = Path(__file__).resolve().parents[2] / "docs"

_BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^\n]*?) -->\n)?```python\n(?P<code>.*?)```"
    r"(?:\n+(?:<!-- printed with (?P<by>[^\n]*?) -->\n)?```text\n(?P<shown>.*?)```)?",
    re.DOTALL,
)
_PLACE = re.compile(r"\S*\.(?:py|md):\d+")


def run_page(page: str, names: dict[str, Any], offers: Collection[str] = ("a real model",)) -> int:
    """Run the page `page` of docs/ with `names` as its namespace; how many blocks ran.

    `offers` names what the namespace has beyond the least: a block that "needs" something else is left out, and output
    "printed with" something else is not compared. Raises AssertionError with the page's line where output differs, and
    whatever an example raises: its traceback shows the page's own lines.
    """
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    count = 0
    for block in _BLOCK.finditer(text):
        note, line = block["note"] or "", text[: block.start("code")].count("\n")
        if note.startswith("not run") or (note.startswith("needs ") and note.removeprefix("needs ") not in offers):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block["code"], str(path), "exec"), names)
        count += 1
        if block["shown"] is None or (block["by"] is not None and block["by"] not in offers):
            continue
        if note == "checked":
            assert printed.getvalue() == block["shown"], f"{page}:{line}"
        else:
            compare(block["shown"], printed.getvalue(), f"{page}:{line}")
    return count


def compare(shown: str, printed: str, where: str) -> None:
    """Assert that every line of `shown` begins a line of `printed`, in order; indentation and places do not count."""
    lines = iter([_PLACE.sub("PLACE", line.strip()) for line in printed.splitlines()])
    for line in shown.splitlines():
        wanted = _PLACE.sub("PLACE", line.strip())
        assert any(p.startswith(wanted) for p in lines), f"{where}: not printed there: {wanted!r}\n{printed}"
