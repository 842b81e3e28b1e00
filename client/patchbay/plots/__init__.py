"""Pictures of what a trace brought back: in a terminal, in a notebook, as PNG, and in one self-contained HTML page.

Every function here takes plain numbers and strings (a result's ``.value``, never a proxy) and returns a `Plot`, which
can be printed, turned into a matplotlib figure or PNG bytes, embedded in a `Report`, or shown by a notebook::

    from patchbay import plots

    picture = plots.heatmap(recovered, x_labels=tokens, y_labels=layers, title="Where the country is")
    picture.print()                     # colour blocks in a terminal, shades and numbers elsewhere
    picture.png("patching.png")

Needs the extra ``plots`` (matplotlib and rich). Both are imported only when something is drawn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbay.plots.base import Plot
    from patchbay.plots.grids import Heatmap, attention, head_grid, heatmap
    from patchbay.plots.logbook import Logbook
    from patchbay.plots.page import Report, Section
    from patchbay.plots.token_views import TokenStrip, TokenTable, token_strip, token_table

#: No module here bears the name of a public function: importing it would bind the module over the function.
_HOME = {
    "Heatmap": "grids",
    "Logbook": "logbook",
    "Plot": "base",
    "Report": "page",
    "Section": "page",
    "TokenStrip": "token_views",
    "TokenTable": "token_views",
    "attention": "grids",
    "head_grid": "grids",
    "heatmap": "grids",
    "token_strip": "token_views",
    "token_table": "token_views",
}

__all__ = [
    "Heatmap",
    "Logbook",
    "Plot",
    "Report",
    "Section",
    "TokenStrip",
    "TokenTable",
    "attention",
    "head_grid",
    "heatmap",
    "token_strip",
    "token_table",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
