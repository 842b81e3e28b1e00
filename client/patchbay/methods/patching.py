"""Activation patching: put a value of one run into another and see how much of the difference comes with it.

Also called causal tracing or interchange intervention (Vig et al. 2020; Meng et al. 2022, "Locating and Editing Factual
Associations in GPT"; Geiger et al. 2021). Heimersheim & Nanda 2024, "How to use and interpret activation patching",
says how to read the numbers. Attribution patching estimates all of them from one gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from patchbay import ops
from patchbay.tracing import Proxy, Run
from patchbay.tracing.gradients import grad

if TYPE_CHECKING:
    from patchbay.tracing import Trace


def activation_patching(
    trace: Trace,
    source: Run,
    base: Any,
    metric: Callable[[Run], Proxy],
    *,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
) -> Proxy:
    """`metric` of a new run over `base` for every layer and position at which `source` is patched in.

    Args:
        trace: the open trace that `source` belongs to.
        source: the run whose values are put in.
        base: what the patched runs read: a text or token ids, as many tokens as `source`.
        metric: makes a scalar of a run (a difference of logits, say).
        site: a site of a block with a position axis after the rows, such as ``"resid_pre"`` or ``"mlp_out"``.
        layers: which blocks; all when left out.
        positions: which token positions; all when left out.

    Returns:
        [layers, positions], the metric of each patched run.
    """
    rows = []
    columns = list(range(source.seq) if positions is None else positions)
    for layer in range(len(source.blocks)) if layers is None else layers:
        cells = []
        for position in columns:
            patched = trace.run(base)
            value = getattr(source.blocks[layer], site)[:, position]
            getattr(patched.blocks[layer], site)[:, position] = value
            cells.append(metric(patched))
        rows.append(ops.stack(cells))
    grid: Proxy = ops.stack(rows)
    return grid


def attribution_patching(
    source: Run,
    base: Run,
    metric: Proxy,
    *,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
) -> Proxy:
    """What `activation_patching` would change, to first order: (source - base) times the gradient at `base`.

    One forward of each run and one backward, however many cells; good where the metric is nearly linear in what is
    patched (Nanda 2023, "Attribution Patching"; Kramar et al. 2024, "AtP*", on where it is not).

    Args:
        source: the run whose values would be put in.
        base: the run that they would be put into, as many tokens; of the same trace.
        metric: a scalar of `base`.
        site: a site of a block with a position axis after the rows, such as ``"resid_pre"`` or ``"attn.z"``.
        layers: which blocks; all when left out.

    Returns:
        [layers, positions], the estimated change of the metric; rows, heads and widths are added up.
    """
    chosen = list(range(len(base.blocks)) if layers is None else layers)
    name = operator.attrgetter(site)
    values = [name(base.blocks[layer]) for layer in chosen]
    rows = []
    for layer, value, slope in zip(chosen, values, grad(metric, wrt=values), strict=True):
        change = (name(source.blocks[layer]) - value) * slope
        rows.append(change.sum(axis=tuple(axis for axis in range(len(change.shape)) if axis != 1)))
    grid: Proxy = ops.stack(rows)
    return grid


def recovered_share(patched: Any, base: Any, source: Any) -> Any:
    """How far a patch moves the metric from `base` (0) to `source` (1); values of a trace or numpy arrays."""
    return (patched - base) / (source - base)
