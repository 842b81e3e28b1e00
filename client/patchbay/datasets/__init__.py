"""Runs over a data set: rows streamed through one graph in batches, reduced on the server or written to shards.

`patchbay.model.Model.map` is the way in; `patchbay.reduce` has the reductions.

    batching.py   rows, windows of rows, batches of alike lengths
    template.py   the user's function traced once for each shape of batch
    reducers.py   sums, means, covariances, histograms as parts of graphs
    selection.py  top-k and reservoirs, likewise
    mapping.py    batches sent, several at a time; failures outlived; progress
    state.py      the file that makes a map resumable
    shards.py     values of rows as safetensors files, and reading them
    results.py    what comes back
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbay.datasets.progress import MapProgress
    from patchbay.datasets.results import MapResults, RowArrays
    from patchbay.datasets.shards import Shards
    from patchbay.datasets.template import BatchRun

_HOME = {
    "BatchRun": "template",
    "MapProgress": "progress",
    "MapResults": "results",
    "RowArrays": "results",
    "Shards": "shards",
}

__all__ = ["BatchRun", "MapProgress", "MapResults", "RowArrays", "Shards"]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
