"""The generated pages, and what writes each. Pages that people write too keep a generated part between markers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from patchbay.ir.ops import document
from patchbay_server.docs.modules import module_list
from patchbay_server.docs.sites import sites_page

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def between_markers(page: str, generated: str) -> str:
    """`page` with what stands between its markers replaced.

    Raises:
        ValueError: the page has no pair of markers.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs {BEGIN} and {END} around its generated part")
    return f"{head}{BEGIN}\n{generated.strip()}\n{END}{tail}"


#: Path in the repository -> function from the page as it is to the page as it should be.
PAGES: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "docs/sites.md": lambda _: sites_page(),
        "docs/ops.md": lambda _: document.page(),
        "docs/architecture.md": lambda page: between_markers(page, module_list()),
    }
)
