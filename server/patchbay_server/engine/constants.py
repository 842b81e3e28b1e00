"""Constants that stay on the device between requests, so that an autoencoder's weights are copied there once.

Only tensors whose content has a name (`KeyedTensor`) are kept; the name says whose they are. One thread uses a cache.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch

from patchbay.ir.artifacts import KeyedTensor
from patchbay_server.kernels import to_tensor

log = logging.getLogger("patchbay.engine")

#: Its off switch, and the name under which `Usage.saved` tells the bytes that were not copied.
ARTIFACT_CACHE = "artifact_cache"


class ConstantCache:
    """Tensors by name, the ones used last, within a number of bytes.

    Args:
        max_bytes: of all of them; a larger tensor is never kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        #: A tensor, and its version: torch counts changes in place.
        self._kept: OrderedDict[str, tuple[torch.Tensor, int]] = OrderedDict()

    def take(self, value: KeyedTensor, device: torch.device) -> tuple[torch.Tensor, int]:
        """`value` on the device, and how many bytes were not copied. Nobody may change the tensor."""
        found = self._kept.get(value.key)
        if found is not None:
            tensor, version = found
            if tensor._version == version:
                self._kept.move_to_end(value.key)
                return tensor, value.nbytes
            log.error("a constant was changed in place (%s %s); it is read again", value.dtype, list(value.shape))
            self._drop(value.key)
        tensor = to_tensor(value, device)
        if value.nbytes <= self.max_bytes:
            self._kept[value.key] = (tensor, tensor._version)
            self.nbytes += value.nbytes
            while self.nbytes > self.max_bytes:
                self._drop(next(iter(self._kept)))
        return tensor, 0

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self.nbytes = 0

    def _drop(self, key: str) -> None:
        tensor, _ = self._kept.pop(key)
        self.nbytes -= tensor.numel() * tensor.element_size()
