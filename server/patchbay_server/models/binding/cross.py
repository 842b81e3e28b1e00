"""Attention to the output of an encoder: the same sites as attention's own, under ``cross_attn``."""

from __future__ import annotations

from patchbay_server.models.binding.attention import Attended
from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.flow import reaches
from patchbay_server.models.taps import Tap


def is_cross(block: Block, attended: Attended) -> bool:
    """Whether the keys come from somewhere else than the layer's own stream."""
    return not reaches(attended.k, block.given)


class CrossView(Block):
    """A layer whose attention sites are named ``cross_attn``; everything else is the layer's."""

    def __init__(self, block: Block) -> None:
        self.__dict__.update(block.__dict__)

    def add(self, name: str, tap: Tap, dims: tuple[int | str, ...], doc: str, read_only: str = "") -> None:
        super().add(_cross(name), tap, dims, doc, read_only)

    def drop(self, name: str, reason: str) -> None:
        super().drop(_cross(name), reason)

    def absent(self, reason: str, *names: str) -> None:
        super().absent(reason, *map(_cross, names))


def _cross(name: str) -> str:
    return f"cross_{name}" if name.startswith("attn") else name
