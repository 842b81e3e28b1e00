"""Attention heads: what they attend to, and what is lost without them."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchbay import ops
from patchbay.tracing import Proxy, Run


def induction_scores(run: Run, period: int, *, start: int = 0) -> Proxy:
    """How much each head attends to what followed the last occurrence of the present token, [layers, heads].

    The rows of `run` repeat a random sequence of `period` tokens. From a token of the second copy, an induction head
    looks at the token after the same token in the first copy; the score is the attention it pays there, on average
    (Olsson et al. 2022, "In-context Learning and Induction Heads").

    Args:
        run: rows that are a sequence, twice.
        period: its length.
        start: tokens before the first copy (a beginning-of-text token, say).

    Raises:
        ValueError: the run has no second copy.
    """
    if run.seq <= start + period:
        raise ValueError(f"a run of {run.seq} tokens holds no second copy of {period} tokens after {start}")
    queries = np.arange(start + period, run.seq)
    return _mean_attention(run, queries, queries - period + 1)


def previous_token_scores(run: Run) -> Proxy:
    """How much each head attends to the token just before, on average over positions, [layers, heads]."""
    queries = np.arange(1, run.seq)
    return _mean_attention(run, queries, queries - 1)


def _mean_attention(run: Run, queries: Any, keys: Any) -> Proxy:
    """Attention from each query to its key, averaged over rows and queries, [layers, heads]."""
    scores = [block.attn.pattern[:, :, queries, keys].mean((0, 2)) for block in run.blocks]
    grid: Proxy = ops.stack(scores)
    return grid


def ablate_head(run: Run, layer: int, head: int, value: Any = 0.0) -> None:
    """Replace what a head writes (its ``z``, before the output matrix) everywhere in `run`.

    Args:
        run: the run to change.
        layer, head: which head.
        value: 0 for zero ablation; a mean over other runs, [d_head], for mean ablation; another run's
            ``blocks[layer].attn.z[:, :, head]`` for resample ablation.
    """
    run.blocks[layer].attn.z[:, :, head] = value


def copying_accuracy(run: Run, period: int, *, start: int = 0) -> Proxy:
    """The share of the second copy's tokens that the run finds likeliest, a scalar; the first of them is not counted.

    Args:
        run: rows that are a sequence of `period` tokens, twice.
        period: its length.
        start: tokens before the first copy.

    Raises:
        ValueError: the rows are not the same two copies all through.
    """
    queries, targets = _copies(run, period, start)
    share: Proxy = (run.logits[:, queries].argmax(axis=-1) == targets).astype("float32").mean()
    return share


def copying_probability(run: Run, period: int, *, start: int = 0) -> Proxy:
    """The probability that the run gives the second copy's tokens, on average, a scalar; see `copying_accuracy`."""
    queries, targets = _copies(run, period, start)
    probabilities = run.logits[:, queries].softmax(-1)
    mean: Proxy = probabilities.take_along_axis(targets[:, :, None], axis=-1).mean()
    return mean


def _copies(run: Run, period: int, start: int) -> tuple[Any, Any]:
    """Positions in the second copy, and the token that follows each, [rows, positions]."""
    ids = np.array([row.ids for row in run.tokens])
    queries = np.arange(start + period, run.seq - 1)
    if not len(queries) or (ids[:, queries] != ids[:, queries - period]).any():
        raise ValueError(f"the rows do not repeat {period} tokens after the first {start}")
    return queries, ids[:, queries + 1]
