"""Logits at some positions alone: the unembedding is given those, and nothing else changes. Proved at load."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from patchbay.ir.card import LOGITS, ModelCard
from patchbay_server.models.binding import close
from patchbay_server.models.inputs import forward
from patchbay_server.models.taps import Tap, first_tensor, replace_first_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unembedding:
    """The module that makes logits of the residual stream.

    Attributes:
        path: its name.
        order: the first site that lies at it or after it; from there on, positions are those that were asked for.
        columns: whether logits of some tokens can be made alone.
    """

    path: str
    order: int
    columns: bool = False


@contextmanager
def narrowed(
    model: torch.nn.Module,
    where: Unembedding,
    rows: torch.Tensor,
    at: torch.Tensor,
    columns: Sequence[int] | None = None,
) -> Iterator[None]:
    """While the body runs, logits are computed for some rows and positions alone: ``[1, all of them, d_vocab]``.

    Args:
        model: the model.
        where: its unembedding.
        rows, at: row and position of each, ``[all of them]``.
        columns: the tokens whose logits are computed; None for all.
    """
    module = model.get_submodule(where.path)

    def choose(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        if args:
            return replace_first_tensor(args, args[0][rows, at].unsqueeze(0)), kwargs
        place, value = next((k, v) for k, v in kwargs.items() if isinstance(v, torch.Tensor))
        return args, {**kwargs, place: value[rows, at].unsqueeze(0)}

    def few(value: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, torch.nn.Linear)
        chosen = torch.tensor(columns, device=value.device)
        bias = None if module.bias is None else module.bias[chosen]
        return torch.nn.functional.linear(value, module.weight[chosen], bias)

    handle = module.register_forward_pre_hook(choose, with_kwargs=True)
    if columns is not None:
        module.__dict__["forward"] = few
    try:
        yield
    finally:
        handle.remove()
        if columns is not None:
            del module.__dict__["forward"]


def output_embeddings(model: torch.nn.Module) -> str | None:
    """The name of the module that the model itself calls its output embeddings, whose result it may still scale."""
    get = getattr(model, "get_output_embeddings", None)
    module = None if get is None else get()
    return next((name for name, each in model.named_modules() if each is module and name), None)


def find_unembedding(
    model: torch.nn.Module,
    path: str | None,
    taps: Mapping[str, Tap],
    card: ModelCard,
    probe: Mapping[str, torch.Tensor],
) -> Unembedding | None:
    """The unembedding, if logits at some positions alone come out as they do at all; None otherwise."""
    if path is None or LOGITS not in card or card.site(LOGITS).dims != ("rows", "seq", card.d_vocab):
        return None
    orders = [card.site(s).order for s in (f"module:{path}.input", f"module:{path}.output", LOGITS) if s in card]
    where = Unembedding(path, min(orders))
    try:
        seen: list[torch.Tensor] = []
        handle = taps[LOGITS].attach(model, seen.append, writes=False)
        try:
            with torch.no_grad():
                forward(model, probe)
                rows, seq = seen[0].shape[:2]
                chosen = torch.arange(rows, device=seen[0].device), torch.arange(rows, device=seen[0].device) % seq
                with narrowed(model, where, *chosen):
                    output = first_tensor(forward(model, probe))
                expected = seen[0][chosen].unsqueeze(0)
                if output is None or not close(seen[1], expected) or not close(output, expected):
                    return None
                return replace(where, columns=_columns_alone(model, where, chosen, seen, probe))
        finally:
            handle.remove()
    except Exception as error:  # noqa: BLE001 - models raise what they like about shapes that they do not expect
        log.info("%s computes the logits of all positions: %s", card.name, error)
        return None


def _columns_alone(
    model: torch.nn.Module,
    where: Unembedding,
    chosen: tuple[torch.Tensor, torch.Tensor],
    seen: list[torch.Tensor],
    probe: Mapping[str, torch.Tensor],
) -> bool:
    """Whether the logits of some tokens come out alone as they do among all; `seen` is what the site showed so far."""
    module = model.get_submodule(where.path)
    if not isinstance(module, torch.nn.Linear) or "forward" in module.__dict__:
        return False
    some = [1, seen[0].shape[-1] - 1]
    try:
        with narrowed(model, where, *chosen, some):
            forward(model, probe)
    except Exception as error:  # noqa: BLE001 - as above
        log.info("the logits of all tokens are computed: %s", error)
        return False
    return close(seen[-1], seen[0][chosen].unsqueeze(0)[..., some])


def positions(spans: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and position of each of some spans (row, first position, number of positions)."""
    rows = [row for row, _, count in spans for _ in range(count)]
    at = [start + i for _, start, count in spans for i in range(count)]
    return torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(at, dtype=torch.long, device=device)
