"""Steering: a direction in the residual stream that stands for a property, added, or taken away.

Difference in means: Marks & Tegmark 2023, "The Geometry of Truth"; Tigges et al. 2023, "Linear Representations of
Sentiment in Large Language Models". Adding it: Turner et al. 2023, "Activation Addition". Taking it away: Arditi et al.
2024, "Refusal in Language Models Is Mediated by a Single Direction".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.tracing import Run

if TYPE_CHECKING:
    from patchbay.model import Model
    from patchbay.tracing.sync_trace import Trace


def difference_in_means(positive: Any, negative: Any) -> Any:
    """The mean of `positive` minus the mean of `negative` over rows, [d] for values [rows, d].

    Takes values of a trace and numpy arrays alike, and returns the same kind.
    """
    return positive.mean(axis=0) - negative.mean(axis=0)


def add_direction(run: Run, layer: int, direction: Any, scale: float = 1.0, *, positions: Any = None) -> None:
    """Add ``scale * direction`` to the residual stream after block `layer`.

    Args:
        run: the run to change.
        layer: after which block.
        direction: [d_model], a value of the trace or an array.
        scale: how much of it.
        positions: at which positions (an index or a slice); all when left out.
    """
    block = run.blocks[layer]
    where = (slice(None), slice(None) if positions is None else positions)
    block.resid_post[where] += direction * scale


def remove_direction(run: Run, layer: int, direction: Any, *, positions: Any = None) -> None:
    """Take the part along `direction` out of the residual stream after block `layer` (directional ablation).

    Args:
        run: the run to change.
        layer: after which block.
        direction: [d_model], of any length but zero; a value of the trace or an array.
        positions: at which positions; all when left out.
    """
    block = run.blocks[layer]
    where = (slice(None), slice(None) if positions is None else positions)
    stream = block.resid_post[where]
    unit = direction / (direction * direction).sum() ** 0.5
    along = (stream * unit).sum(axis=-1, keepdims=True)
    block.resid_post[where] = stream - along * unit


def continue_greedily(
    model: Model,
    prompt: str | Sequence[int],
    count: int,
    change: Callable[[Run], None] | None = None,
    *,
    stop: int | None = None,
    on_trace: Callable[[Trace], None] | None = None,
) -> list[int]:
    """The tokens, at most `count`, that the model finds likeliest after `prompt`, one trace for each.

    `Model.generate` does it in one request. Here `change` is made in a new forward over the whole text for each token.

    Args:
        model: the model.
        prompt: what to continue, a text or token ids.
        count: how many tokens.
        change: an intervention, made in every run before its logits are read.
        stop: a token after which nothing more is added.
        on_trace: called with each trace when it has run.

    Returns:
        The new tokens' ids, `stop` included.
    """
    ids: Sequence[int] = model.tokenize(prompt).ids if isinstance(prompt, str) else list(prompt)
    start = len(ids)
    for _ in range(count):
        with model.trace() as t:
            run = t.run([list(ids)])
            if change is not None:
                change(run)
            t.save(token=run.logits[0, -1].argmax())
        ids = [*ids, int(t.results["token"])]
        if on_trace is not None:
            on_trace(t)
        if ids[-1] == stop:
            break
    return list(ids[start:])
