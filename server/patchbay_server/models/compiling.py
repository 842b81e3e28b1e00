"""Decoder layers compiled by torch, for forwards that look at nothing inside them.

A layer is compiled as a region of its own, and sites at its border (the residual stream, whole layers' inputs and
outputs) are visited between regions by the same hooks as ever. A layer with anything attached inside it runs as
written: compiled code would not come past a hook that was not there when it was compiled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger(__name__)

#: Attributes with this beginning, on a module, hold what is attached to it.
_ATTACHED = "_patchbay"


class CompiledLayers:
    """The compiled forms of a model's layers.

    Args:
        model: the model.
        paths: its layers.
        backend: torch's name of what compiles (``"inductor"``; ``"eager"`` traces and compiles nothing).
    """

    def __init__(self, model: torch.nn.Module, paths: Sequence[str], *, backend: str = "inductor") -> None:
        self._layers = {path: model.get_submodule(path) for path in paths}
        around = {path.rpartition(".")[0] for path in paths}
        while longer := {path.rpartition(".")[0] for path in around} - around:
            around |= longer
        #: Modules whose own forward the layers run in; what listens to operations there would listen in layers too.
        self._around = [model.get_submodule(path) for path in sorted(around)]
        self._compiled: Mapping[str, Callable[..., Any]] = {
            # Sizes change from request to request, and must not each compile anew.
            path: torch.compile(layer.forward, dynamic=True, backend=backend)
            for path, layer in self._layers.items()
        }

    def warm(self, forward: Callable[[int, int], object]) -> None:
        """Compile now what requests would have to wait for.

        Args:
            forward: runs the model on made-up rows, given how many and how long.
        """
        started = time.perf_counter()
        with torch.no_grad(), self.in_use():
            for rows, seq in ((2, 8), (3, 13), (1, 8)):  # torch compiles a single row apart
                forward(rows, seq)
        log.info("compiled %d layers in %.1f s", len(self._layers), time.perf_counter() - started)

    @contextmanager
    def in_use(self) -> Iterator[int]:
        """Layers with nothing attached inside run compiled while the body does; yields how many those are."""
        listening = any(name.startswith(_ATTACHED) for module in self._around for name in module.__dict__)
        used = [path for path, layer in self._layers.items() if not (listening or _tapped_inside(layer))]
        before = {path: self._layers[path].__dict__.get("forward") for path in used}
        for path in used:
            self._layers[path].__dict__["forward"] = self._compiled[path]
        try:
            yield len(used)
        finally:
            for path, found in before.items():
                if found is None:
                    del self._layers[path].__dict__["forward"]
                else:
                    self._layers[path].__dict__["forward"] = found


def _tapped_inside(layer: torch.nn.Module) -> bool:
    """Whether a hook, an interception or an attention tap hangs inside the layer, or something replaces its forward."""
    if "forward" in layer.__dict__:
        return True
    for module in layer.modules():
        if any(name.startswith(_ATTACHED) for name in module.__dict__):
            return True
        if module is not layer and (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__):
            return True
    return False
