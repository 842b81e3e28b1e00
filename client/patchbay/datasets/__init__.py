"""Runs over a data set: rows streamed through one graph in batches, reduced on the server or written to shards.

`patchbay.model.Model.map` is the way in; `patchbay.reduce` has the reductions.

    plan.py         what `Model.map` was told
    reading.py      windows of rows, their tokens
    batching.py     rows by column; batches of alike lengths
    batch_trace.py  what the user's function sees: runs over columns, generating ones too
    columns.py      the columns of a batch's rows, as prompts and as values
    cells.py        what of the rows stands in a graph as constants
    template.py     the function traced once for each shape of batch
    axes.py         which axes of a value follow rows, tokens and steps
    reducers.py     sums, means, covariances, histograms as parts of graphs
    selection.py    top-k and reservoirs, likewise
    mapping.py      batches sent, several at a time; failures outlived; progress
    ledger.py       what is done, written down, and deleted from the server
    state.py        the file that makes a map resumable
    locking.py      one map at a time for a file or a folder
    shards.py       values of rows as safetensors files, and reading them
    finishing.py    states merged, values put where the function had them
    results.py      what comes back
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbay.datasets.batch_trace import BatchGeneratingRun, BatchRun, BatchTrace
    from patchbay.datasets.columns import BatchRows, Column
    from patchbay.datasets.progress import MapProgress
    from patchbay.datasets.results import MapResults, RowArrays
    from patchbay.datasets.shards import Shards

_HOME = {
    "BatchGeneratingRun": "batch_trace",
    "BatchRows": "columns",
    "BatchRun": "batch_trace",
    "BatchTrace": "batch_trace",
    "Column": "columns",
    "MapProgress": "progress",
    "MapResults": "results",
    "RowArrays": "results",
    "Shards": "shards",
}

__all__ = [
    "BatchGeneratingRun",
    "BatchRows",
    "BatchRun",
    "BatchTrace",
    "Column",
    "MapProgress",
    "MapResults",
    "RowArrays",
    "Shards",
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
