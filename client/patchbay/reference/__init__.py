"""The operations in numpy, as simple as they can be said: their living definition, and the oracle of the tests."""

from __future__ import annotations

from patchbay.reference import creation, elementwise, indexing, linalg, nn, reductions, shape
from patchbay.reference.arrays import from_numpy_dtype, to_array, to_data, to_numpy_dtype
from patchbay.reference.control import evaluate_control, run_body
from patchbay.reference.registry import evaluate, has_reference, implements, spec_of

__all__ = [
    "creation",
    "elementwise",
    "evaluate",
    "evaluate_control",
    "from_numpy_dtype",
    "has_reference",
    "implements",
    "indexing",
    "linalg",
    "nn",
    "reductions",
    "run_body",
    "shape",
    "spec_of",
    "to_array",
    "to_data",
    "to_numpy_dtype",
]
