"""A tap on what has one row for all rows (learned positions), shown and written with a row for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from patchbay_server.models.taps import Handle, Handler, Tap


@dataclass(frozen=True)
class SharedTap:
    """A value ``[seq, ...]`` or ``[1, seq, ...]`` that is added to one of every row, shown as ``[rows, seq, ...]``.

    The number of rows is that of the model's first tensor input.

    Attributes:
        inner: the way to the value.
    """

    inner: Tap

    def attach(self, model: torch.nn.Module, handler: Handler, *, writes: bool) -> Handle:
        rows: list[int] = [1]

        def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            rows[0] = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0]

        def handle(value: torch.Tensor) -> torch.Tensor | None:
            whole = value if value.ndim == 3 else value.unsqueeze(0)
            return handler(whole.expand(rows[0], *whole.shape[1:]))

        counter = model.register_forward_pre_hook(count, with_kwargs=True)
        return _Both(counter, self.inner.attach(model, handle, writes=writes))


@dataclass(frozen=True)
class _Both:
    first: Handle
    second: Handle

    def remove(self) -> None:
        self.first.remove()
        self.second.remove()
