"""numpy arrays to and from the graph's dtypes and bytes; ml_dtypes supplies the floats that numpy lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from patchbay.errors import DTypeError, ProtocolError
from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.graph import TensorData

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
#: What numpy's functions return: an array, or a numpy scalar where it would have no dimensions.
Value: TypeAlias = Any

_TO_NUMPY: Mapping[DType, np.dtype[Any]] = MappingProxyType(
    {d: np.dtype(getattr(ml_dtypes, d.name, None) or d.name) for d in DTYPES.values()}
)
_FROM_NUMPY: Mapping[np.dtype[Any], DType] = MappingProxyType({n: d for d, n in _TO_NUMPY.items()})


def to_numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy dtype of the same name."""
    return _TO_NUMPY[dtype]


def from_numpy_dtype(dtype: np.dtype[Any]) -> DType:
    """The graph's dtype of the same name.

    Raises:
        DTypeError: graphs have no such dtype.
    """
    found = _FROM_NUMPY.get(dtype)
    if found is None:
        raise DTypeError(f"{dtype} has no counterpart in a graph")
    return found


def to_array(data: TensorData) -> Array:
    """`data` as a read-only array over the same bytes.

    Raises:
        ProtocolError: it holds more or fewer bytes than its shape and dtype need.
    """
    needed = math.prod(data.shape) * data.dtype.itemsize
    if min(data.shape, default=0) < 0 or data.nbytes != needed:
        raise ProtocolError(f"{data.dtype}{list(data.shape)} needs {needed} bytes, got {data.nbytes}")
    return np.frombuffer(data.data, dtype=_TO_NUMPY[data.dtype]).reshape(data.shape)


def to_data(array: Array) -> TensorData:
    """`array` as little-endian bytes of their own."""
    return TensorData(from_numpy_dtype(array.dtype), tuple(array.shape), array.tobytes())
