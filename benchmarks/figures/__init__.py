"""The workloads: one module per row of the table, each with a `FIGURE`, its plan and the classes of its contenders."""

from __future__ import annotations

import importlib

from benchmarks.figure import Figure

#: In the order of the table.
NAMES = (
    "client_size",
    "one_site_read",
    "read_at_layer",
    "sweep_all_positions",
    "sweep_last_positions",
    "repeat_experiment",
    "many_clients",
    "steered_generation",
    "large_result",
    "peak_memory",
    "pure_nodes",
    "fairness",
    "ablation",
)


def load(name: str) -> Figure:
    """The figure called `name`."""
    figure: Figure = importlib.import_module(f"benchmarks.figures.{name}").FIGURE
    return figure
