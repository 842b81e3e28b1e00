"""Random calls of every operation: valid arguments (numpy arrays and Python numbers) with valid attributes.

`op_examples(spec)` is what tests use. Values are multiples of a quarter, which every float holds exactly, so that
rounding, ties and comparisons mean the same in every dtype; now and then NaN and infinities are mixed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from patchbay.ir.ops.spec import OpSpec
from tests.op_examples import algebra, arrangement, elementwise
from tests.op_examples.drawing import BUILDERS, Drawing, Example, Operand

__all__ = ["Drawing", "Example", "Operand", "algebra", "arrangement", "elementwise", "has_examples", "op_examples"]


def op_examples(spec: OpSpec) -> st.SearchStrategy[Example]:
    """Valid calls of a pure operation: its arguments, and its attributes (defaults are often left out)."""

    @st.composite
    def example(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Example:
        return BUILDERS[spec.name](Drawing(draw))

    return example()


def has_examples(spec: OpSpec) -> bool:
    """Whether `op_examples` knows `spec`."""
    return spec.name in BUILDERS
