"""One layer under derivation: what it was given, what it gave, and which modules it called."""

from __future__ import annotations

from patchbay_server.models.binding.found import Binding
from patchbay_server.models.recording import Recording
from patchbay_server.models.taps import Tap


class Block:
    """What the rooms that derive one layer's sites share.

    Attributes:
        index: the layer's number.
        path: the layer's name in the model.
        prefix: what the names of its sites begin with.
        x, y: its input and output, ``[rows, seq, d_model]``.
        children: the calls that it makes itself, in order.
    """

    def __init__(self, recording: Recording, binding: Binding, index: int, path: str, prefix: str = "") -> None:
        self.recording, self.binding, self.path, self.index = recording, binding, path, index
        self.prefix = f"{prefix}blocks.{index}"
        call = recording.of(path)
        assert call is not None and call.input is not None and call.output is not None
        self.x, self.y = call.input, call.output  # [rows, seq, d_model], before and after the block
        self.children = recording.children(path)
        self.d_model = self.x.shape[-1]

    def add(self, name: str, tap: Tap, dims: tuple[int | str, ...], doc: str) -> None:
        self.binding.add(f"{self.prefix}.{name}", tap, dims, doc)

    def absent(self, reason: str, *names: str) -> None:
        for name in names:
            self.binding.absent[f"{self.prefix}.{name}"] = reason
