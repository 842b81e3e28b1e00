"""One layer under derivation: what it was given, what it gave, and which modules it called."""

from __future__ import annotations

from patchbay_server.models.binding.flow import Map
from patchbay_server.models.binding.found import Binding
from patchbay_server.models.recording import Call, Recording, Value
from patchbay_server.models.taps import Tap


class Block:
    """What the rooms that derive one layer's sites share.

    Attributes:
        index: the layer's number.
        path: the layer's name in the model.
        prefix: what the names of its sites begin with.
        given, made: its input and output, ``[rows, seq, d_model]``.
        d_model: width of both.
        map: which of its modules gave or took which values.
        start: a norm that the stream goes through before anything is added to it, once it is known.
    """

    def __init__(self, recording: Recording, binding: Binding, index: int, path: str, prefix: str = "") -> None:
        self.recording, self.binding, self.path, self.index = recording, binding, path, index
        self.prefix = f"{prefix}blocks.{index}"
        call = recording.of(path)
        assert call is not None and call.given is not None and call.made is not None
        self.call = call
        self.given: Value = call.given
        self.made: Value = call.made
        self.map = Map(recording, path)
        self.start: Call | None = None
        self.d_model = self.given.shape[-1]

    def add(self, name: str, tap: Tap, dims: tuple[int | str, ...], doc: str, read_only: str = "") -> None:
        self.binding.absent.pop(f"{self.prefix}.{name}", None)
        self.binding.add(f"{self.prefix}.{name}", tap, dims, doc, read_only)

    def drop(self, name: str, reason: str) -> None:
        """Take a site away again."""
        self.binding.sites.pop(f"{self.prefix}.{name}", None)
        self.binding.absent[f"{self.prefix}.{name}"] = reason

    def absent(self, reason: str, *names: str) -> None:
        for name in names:
            if f"{self.prefix}.{name}" not in self.binding.sites:
                self.binding.absent[f"{self.prefix}.{name}"] = reason
