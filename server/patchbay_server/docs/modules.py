"""One line per module, from its own docstring: the second half of docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import patchbay
import patchbay_server

#: Generated code and data have no line of their own.
_LEFT_OUT = frozenset({"v1"})


def module_list() -> str:
    """Both packages as nested tables: a heading per folder, a row per module."""
    parts = []
    for package in (patchbay, patchbay_server):
        root = Path(str(package.__file__)).parent
        for folder in sorted({p.parent for p in root.rglob("*.py")}):
            place = folder.relative_to(root)
            if set(place.parts) & _LEFT_OUT or "__pycache__" in place.parts:
                continue
            name = ".".join((package.__name__, *place.parts))
            about = _first_sentence(folder / "__init__.py")
            parts.append(f"### `{name}`\n\n{about}\n")
            rows = list(_rows(folder))
            if rows:
                parts.append("| module | what it is for |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _rows(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("__init__.py", "_version.py"):
            yield f"| `{path.stem}` | {_first_sentence(path)} |"


def _first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line, safe inside a table."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")
