"""numpy arrays and the graph's tensors: what users hand in as constants and inputs, and what comes back.

numpy, and ml_dtypes for bfloat16 and the 8-bit floats, load on first use: `import patchbay` must not pay for them.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from patchbay.errors import DTypeError, ProtocolError
from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.graph import TensorData

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ML_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})


@cache
def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The little-endian numpy dtype of `dtype`; bfloat16 and the 8-bit floats come from ml_dtypes."""
    import numpy as np

    if dtype.name in _ML_DTYPES:
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype.name))
        return extended
    plain: np.dtype[Any] = np.dtype(dtype.name).newbyteorder("<")
    return plain


def dtype_of(array: NDArray[Any]) -> DType:
    """The `DType` of a numpy array.

    Raises:
        DTypeError: complex numbers, strings, objects, dates and the unsigned types beyond uint8 have none.
    """
    found = DTYPES.get(array.dtype.name)
    if found is None:
        raise DTypeError(
            f"arrays of dtype {array.dtype} cannot be part of a graph; convert with .astype to one of: "
            + ", ".join(DTYPES)
        )
    return found


def as_array(value: object, dtype: DType | None = None) -> NDArray[Any]:
    """`value` (array, nested list, range, number, CPU tensor of another library) as a little-endian C-ordered array.

    Lists of Python floats become float32, the dtype that models compute in; lists of integers become int64. Arrays keep
    their dtype, unless `dtype` says otherwise.

    Raises:
        DTypeError: no dtype of a graph holds it.
    """
    import numpy as np

    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"{type(value).__name__} {_short(value)} is not an array of numbers: {error}") from None
    if array.dtype.kind not in "biuf" and array.dtype.name not in _ML_DTYPES:
        raise DTypeError(f"{type(value).__name__} {_short(value)} is no array of real numbers (dtype {array.dtype})")
    if dtype is None and array.dtype == np.float64 and isinstance(value, (list, tuple)):
        array = array.astype(np.float32)
    if dtype is not None:
        array = array.astype(numpy_dtype(dtype), copy=False)
    array = little_endian(array)
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes 0-d arrays 1-d


def little_endian(array: NDArray[Any]) -> NDArray[Any]:
    """`array` with the byte order in which tensors travel; itself where it has that already."""
    swapped = array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big")
    return array.astype(array.dtype.newbyteorder("<")) if swapped else array


def to_data(array: NDArray[Any]) -> TensorData:
    """A snapshot of `array` as bytes: what the user does to it later changes nothing."""
    return TensorData(dtype_of(array), tuple(array.shape), little_endian(array).tobytes())


def shared_data(array: NDArray[Any]) -> TensorData:
    """`array` as a tensor over the same memory, or a copy where its layout or byte order must change."""
    import numpy as np

    flat = np.ascontiguousarray(little_endian(array)).reshape(-1).view(np.uint8)
    return TensorData(dtype_of(array), tuple(array.shape), flat.data)


def view_of(data: TensorData) -> NDArray[Any]:
    """`data` as an array over the same memory, read-only where that is.

    Raises:
        ProtocolError: the bytes do not fill the shape.
    """
    import numpy as np

    dtype, size = numpy_dtype(data.dtype), math.prod(data.shape)
    if min(data.shape, default=0) < 0 or size * dtype.itemsize != data.nbytes:
        raise ProtocolError(f"{data.nbytes} bytes do not hold a {data.dtype}{list(data.shape)}")
    return np.frombuffer(data.data, dtype=dtype).reshape(data.shape) if size else np.empty(data.shape, dtype)


def to_array(data: TensorData) -> NDArray[Any]:
    """`data` as an array that can be written to; without a copy where its buffer can be.

    Raises:
        ProtocolError: the bytes do not fill the shape.
    """
    array = view_of(data)
    return array if array.flags.writeable else array.copy()


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
