"""Gradients as torch takes them, for graphs and for the bodies of loops alike; `differentiation` plans them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def take_gradients(
    metric: torch.Tensor, wrt: Sequence[torch.Tensor], *, keep: bool, twice: bool
) -> tuple[torch.Tensor, ...]:
    """The derivatives of `metric`'s sum, each of its variable's shape.

    Args:
        metric: what is differentiated.
        wrt: by what.
        keep: whether what was recorded is used again.
        twice: whether the gradients are to be differentiated themselves.
    """
    if not metric.requires_grad:
        return tuple(map(torch.zeros_like, wrt))
    total = metric if metric.ndim == 0 else metric.sum()
    found = torch.autograd.grad(total, wrt, retain_graph=keep or twice, create_graph=twice, allow_unused=True)
    # Where only operations without a derivative (argmax, comparisons) lie between, the gradient is zero.
    return tuple(torch.zeros_like(w) if g is None else g for g, w in zip(found, wrt, strict=True))


@contextmanager
def frozen_parameters(model: torch.nn.Module, needed: bool) -> Iterator[None]:
    """Parameters collect no gradients, and nothing is recorded for their sake, while the body runs."""
    thawed = [p for p in model.parameters() if p.requires_grad] if needed else []
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
