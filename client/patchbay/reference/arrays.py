"""Names for the arrays of the reference implementations, and their dtypes to and from the graph's."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from patchbay.arrays import numpy_dtype, to_data, view_of
from patchbay.errors import DTypeError
from patchbay.ir.dtypes import DTYPES, DType

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
#: What numpy's functions return: an array, or a numpy scalar where it would have no dimensions.
Value: TypeAlias = Any

to_numpy_dtype = numpy_dtype
to_array = view_of


def from_numpy_dtype(dtype: np.dtype[Any]) -> DType:
    """The graph's dtype of the same name.

    Raises:
        DTypeError: graphs have no such dtype.
    """
    found = DTYPES.get(dtype.name)
    if found is None:
        raise DTypeError(f"{dtype} has no counterpart in a graph")
    return found


__all__ = ["Array", "Value", "from_numpy_dtype", "to_array", "to_data", "to_numpy_dtype"]
