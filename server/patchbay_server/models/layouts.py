"""How a site's value lies in a tensor of the model, when it is not the tensor itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Layout(Protocol):
    """The way from a tensor of the model to the canonical value and back. Neither changes what it is given."""

    def split(self, value: torch.Tensor) -> torch.Tensor:
        """The canonical value that lies in `value`."""
        ...

    def merge(self, value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`value` with the part that is the site replaced by `new`."""
        ...


@dataclass(frozen=True)
class Heads:
    """Slices of a feature axis seen as heads: ``[rows, seq, features]`` <-> ``[rows, seq, heads, width]``.

    Attributes:
        starts: first feature of each head.
        width: features of one head.
    """

    starts: tuple[int, ...]
    width: int

    @classmethod
    def side_by_side(cls, start: int, heads: int, width: int) -> Heads:
        """Heads that follow one another from feature `start` on."""
        return cls(tuple(range(start, start + heads * width, width)), width)

    @property
    def heads(self) -> int:
        return len(self.starts)

    @property
    def adjoining(self) -> bool:
        """Whether the heads follow one another without gaps."""
        return self.starts == tuple(range(self.starts[0], self.starts[0] + self.heads * self.width, self.width))

    def split(self, value: torch.Tensor) -> torch.Tensor:
        if self.adjoining:
            part = value[..., self.starts[0] : self.starts[0] + self.heads * self.width]
            return part.unflatten(-1, (self.heads, self.width))
        return value.index_select(-1, self._features(value.device)).unflatten(-1, (self.heads, self.width))

    def merge(self, value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        flat = new.flatten(-2)
        if not self.adjoining:
            return value.index_copy(-1, self._features(value.device), flat)
        if flat.shape[-1] == value.shape[-1]:
            return flat
        start = self.starts[0]
        return torch.cat([value[..., :start], flat, value[..., start + flat.shape[-1] :]], dim=-1)

    def _features(self, device: torch.device) -> torch.Tensor:
        starts = torch.tensor(self.starts, device=device)
        return (starts.unsqueeze(1) + torch.arange(self.width, device=device)).flatten()


@dataclass(frozen=True)
class Features:
    """A contiguous slice of the feature axis: ``[rows, seq, features]`` <-> ``[rows, seq, width]``.

    Attributes:
        start, step: first feature, and the distance between two.
        width: number of features.
    """

    start: int
    width: int
    step: int = 1

    def split(self, value: torch.Tensor) -> torch.Tensor:
        return value[..., self._slice()]

    def merge(self, value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        whole = value.clone()
        whole[..., self._slice()] = new
        return whole

    def _slice(self) -> slice:
        return slice(self.start, self.start + (self.width - 1) * self.step + 1, self.step)


@dataclass(frozen=True)
class Axes:
    """The whole tensor with its axes in another order.

    Attributes:
        order: for each canonical axis, the tensor's axis.
    """

    order: tuple[int, ...]

    def split(self, value: torch.Tensor) -> torch.Tensor:
        return value.permute(self.order)

    def merge(self, value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        del value
        return new.permute(tuple(self.order.index(i) for i in range(len(self.order))))


@dataclass(frozen=True)
class FlatRows:
    """Rows and another extent in one axis: ``[rows * inner, ...]`` <-> ``[rows, inner, ...]``, then axes reordered.

    Attributes:
        inner: the extent that shares the first axis with the rows (heads), when it is a width of the model.
        order: for each canonical axis, the axis after the first has been split.
    """

    inner: int
    order: tuple[int, ...]

    def split(self, value: torch.Tensor) -> torch.Tensor:
        return value.unflatten(0, (-1, self.inner)).permute(self.order)

    def merge(self, value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        back = new.permute(tuple(self.order.index(i) for i in range(len(self.order))))
        return back.reshape(value.shape)
