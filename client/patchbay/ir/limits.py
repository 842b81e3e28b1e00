"""The limits that a graph is held to, all known from static shapes before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

#: Axes of a tensor; numpy and torch stop at 64.
MAX_DIMS = 32
#: All extents of a tensor (zeros counted as one) times its element size stay below this, so that no stride overflows.
MAX_TENSOR_SPAN = 2**62


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds on one graph; each is named in the error that it raises.

    Attributes:
        max_nodes: nodes.
        max_runs: runs.
        max_rows: rows, over all runs.
        max_tokens: token positions, padding included, over all runs.
        max_const_bytes: bytes of inline constants.
        max_result_bytes: bytes of all outputs.
        max_peak_bytes: highest sum of the graph's live values.
        max_flops: floating-point operations of the graph's own nodes (the model's forwards are bounded by max_tokens).
        max_loop_steps: operations that the graph's loops run, those of every step counted.
    """

    max_nodes: int = 50_000
    max_runs: int = 4_096
    max_rows: int = 4_096
    max_tokens: int = 262_144
    max_const_bytes: int = 64 * 2**20
    max_result_bytes: int = 1 * 2**30
    max_peak_bytes: int = 4 * 2**30
    max_flops: int = 10**14
    max_loop_steps: int = 10_000_000
