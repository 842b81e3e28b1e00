"""One torch function per operation, attached to its OpSpec: the plain call that a researcher would write by hand."""

from __future__ import annotations

from patchbay_server.kernels import creation, elementwise, indexing, linalg, nn, reductions, shape
from patchbay_server.kernels.registry import Kernel, implements, kernel
from patchbay_server.kernels.selection import index_get, index_put
from patchbay_server.kernels.tensors import from_torch_dtype, to_data, to_tensor, to_torch_dtype

__all__ = [
    "Kernel",
    "creation",
    "elementwise",
    "from_torch_dtype",
    "implements",
    "index_get",
    "index_put",
    "indexing",
    "kernel",
    "linalg",
    "nn",
    "reductions",
    "shape",
    "to_data",
    "to_tensor",
    "to_torch_dtype",
]
