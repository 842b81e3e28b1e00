"""Whether rows of different requests may share a forward: checked on the model at load, not assumed.

Three things are checked, on every layer's output and on the logits: a row that is padded on the right, without a mask, is
what it is alone; it stays so in a batch of many equal rows (which overflows experts of limited capacity); and numbers that
are not finite stay in their row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchbay_server.models.inputs import DECODER_TOKENS, TOKENS, forward
from patchbay_server.models.taps import first_tensor, replace_first_tensor

log = logging.getLogger(__name__)

#: Rounding errors of the largest element that two ways of batching may differ by, summed over the layers.
_ROUNDINGS = 256
#: Equal rows in one batch; experts that hold a fair share of the tokens each would overflow.
_MANY = 12


@dataclass(frozen=True)
class Independence:
    """What was found.

    Attributes:
        holds: whether rows of different requests may share a forward.
        reason: what was checked, or why not.
    """

    holds: bool
    reason: str


def row_independence(
    model: torch.nn.Module, layers: Sequence[str], probe: Mapping[str, torch.Tensor], *, causal: bool
) -> Independence:
    """Check a model.

    Args:
        model: in eval mode.
        layers: paths of its layers, in order.
        probe: made-up inputs of at least two rows and four positions.
        causal: whether no position depends on a later one.
    """
    if set(probe) != {TOKENS} or DECODER_TOKENS in probe:
        return Independence(False, "it takes more than token ids")
    if not causal:
        return Independence(False, "padding would be seen: it is not causal")
    if not layers:
        return Independence(False, "no layers are known")
    long, other = probe[TOKENS][0], probe[TOKENS][1]
    short = other[: len(other) - 2]
    padded = torch.cat([short, torch.zeros_like(other[len(short) :])])
    try:
        alone = [_values(model, layers, row.unsqueeze(0)) for row in (long, short)]
        together = _values(model, layers, torch.stack([long, padded]))
        many = _values(model, layers, long.expand(_MANY, -1).clone())
        infected = _values(model, layers, torch.stack([long, other]), spoiled=0)
        healthy = _values(model, layers, other.unsqueeze(0))
    except Exception as error:  # noqa: BLE001 - models raise what they like about batches that they do not take
        log.info("rows are not batched: %s", error)
        return Independence(False, f"a batch of made-up rows failed: {type(error).__name__}")
    checks = (
        ("rows change one another", [(t[:1], a) for t, a in zip(together, alone[0], strict=True)]),
        ("padding on the right changes a row", [(t[1:], a) for t, a in zip(together, alone[1], strict=True)]),
        ("a row depends on how many are like it", [(m[-1:], a) for m, a in zip(many, alone[0], strict=True)]),
        ("what is not finite in one row reaches others", [(i[1:], h) for i, h in zip(infected, healthy, strict=True)]),
    )
    for reason, pairs in checks:
        if not all(_close(value[:, : expected.shape[1]], expected) for value, expected in pairs):
            return Independence(False, reason)
    return Independence(
        True,
        f"every layer's output of a row is the same alone, padded on the right, among {_MANY} like it, and beside a row "
        "of NaN",
    )


def _close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    if value.shape != expected.shape:
        return False
    tolerance = _ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.float().abs().max())
    return bool(((value.float() - expected.float()).abs() <= tolerance).all())


def _values(
    model: torch.nn.Module, layers: Sequence[str], tokens: torch.Tensor, *, spoiled: int | None = None
) -> list[torch.Tensor]:
    """Every layer's output and the forward's, ``[rows, seq, ...]``; row `spoiled` is NaN after the first layer."""
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> Any:
        del module, args
        value = first_tensor(output)
        assert value is not None
        new = None
        if spoiled is not None and not seen:
            value = value.clone()
            value[spoiled] = float("nan")
            new = replace_first_tensor(output, value)
        seen.append(value)
        return new

    handles = [model.get_submodule(path).register_forward_hook(keep) for path in layers]
    try:
        with torch.no_grad():
            output = forward(model, {TOKENS: tokens})
            return [*seen, output]
    finally:
        for handle in handles:
            handle.remove()
