"""Whether rows of different requests may share a forward: checked on the model at load, not assumed.

Three things are checked, on every layer's output and on the logits: a row that is padded on the right, without a mask,
is what it is alone; it stays so in a batch of many equal rows (which overflows experts of limited capacity); and
numbers that are not finite stay in their row. Whether generating rows may share steps is tried out as such.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchbay_server.models.inputs import DECODER_TOKENS, MASK, TOKENS, forward
from patchbay_server.models.row_cache import PromptCache, RowCache, Seat
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
        (
            "what is not finite in one row reaches others",
            [(i[1:], h) for i, h in zip(infected, healthy, strict=True)],
        ),
    )
    for reason, pairs in checks:
        if not all(_close(value[:, : expected.shape[1]], expected) for value, expected in pairs):
            return Independence(False, reason)
    return Independence(
        True,
        f"every layer's output of a row is the same alone, padded on the right, among {_MANY} like it, and beside a "
        "row of NaN",
    )


def shared_decoding(model: torch.nn.Module, probe: Mapping[str, torch.Tensor]) -> Independence:
    """Whether rows may generate in one batch that others join and leave, each as it does alone.

    Three made-up rows of different lengths are continued in one `RowCache`; one joins late, one leaves early, and every
    step's logits are compared with a plain forward over the whole row.

    Args:
        model: in eval mode, its rows independent.
        probe: made-up inputs of at least two rows and six positions.
    """
    arguments = inspect.signature(model.forward).parameters
    missing = {"past_key_values", "use_cache", "position_ids", MASK} - set(arguments)
    if missing:
        return Independence(False, f"its forward takes no {sorted(missing)[0]}")
    first, second = probe[TOKENS][0], probe[TOKENS][1]
    rows = [first, second[:-3], second[:-1]]
    more = torch.stack([first.flip(0), second.flip(0), first.roll(2)])
    try:
        with torch.no_grad():
            return _decoded_together(model, rows, more)
    except Exception as error:  # noqa: BLE001 - models raise what they like about caches that they do not know
        log.info("generating runs do not share forwards: %s", error)
        return Independence(False, f"a batch with rows that come and go failed: {type(error).__name__}")


def _decoded_together(model: torch.nn.Module, rows: list[torch.Tensor], more: torch.Tensor) -> Independence:
    """Rows 0 and 1 begin, row 2 joins after one step, row 0 leaves after two; row i goes on with ``more[i]``."""
    cache = RowCache()
    seats: dict[int, Seat] = {}
    so_far = dict(enumerate(rows))

    def join(*joining: int) -> bool:
        seats.update({i: cache.admit([len(rows[i])]) for i in joining})
        longest = max(len(rows[i]) for i in joining)
        tokens = torch.stack([_padded(rows[i], longest) for i in joining])
        takers = [(place, cache, seats[i]) for place, i in enumerate(joining)]
        output = first_tensor(model(input_ids=tokens, past_key_values=PromptCache(takers), use_cache=True))
        assert output is not None
        return all(_same(model, so_far[i], output[place, len(rows[i]) - 1]) for place, i in enumerate(joining))

    def step(number: int) -> bool:
        there = sorted(seats)
        starts, positions, seen = cache.begin([seats[i] for i in there])
        tokens = torch.zeros_like(positions)
        for i, start in zip(there, starts, strict=True):
            so_far[i] = torch.cat([so_far[i], more[i, number : number + 1]])
            tokens[start, 0] = so_far[i][-1]
        device = rows[0].device
        mask = {} if seen is None else {MASK: seen.to(device)}
        inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device), **mask}
        output = first_tensor(model(**inputs, past_key_values=cache, use_cache=True))
        assert output is not None
        same = all(_same(model, so_far[i], output[start, -1]) for i, start in zip(there, starts, strict=True))
        cache.end([seats[i] for i in there])
        return same

    held = join(0, 1) and step(0) and join(2) and step(1)
    if held:
        cache.leave(seats.pop(0))
        held = step(2) and step(3)
    if not held:
        return Independence(False, "a row that others join or leave goes on as it does not alone")
    return Independence(True, "rows of different lengths that join and leave one batch go on as each does alone")


def _padded(row: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([row, row.new_zeros(length - len(row))])


def _same(model: torch.nn.Module, row: torch.Tensor, newest: torch.Tensor) -> bool:
    """Whether these are the logits of the row's last position in a plain forward."""
    return _close(newest, forward(model, {TOKENS: row.unsqueeze(0)})[0, -1])


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
