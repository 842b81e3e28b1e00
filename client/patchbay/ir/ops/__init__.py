"""Every operation that a graph may hold, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from patchbay.errors import UnknownOpError
from patchbay.ir.ops.control import CONTROL
from patchbay.ir.ops.creation import CREATION
from patchbay.ir.ops.elementwise import ELEMENTWISE
from patchbay.ir.ops.indexing_ops import INDEXING
from patchbay.ir.ops.linalg import LINALG
from patchbay.ir.ops.nn import NN
from patchbay.ir.ops.reductions import REDUCTIONS
from patchbay.ir.ops.shape import SHAPE
from patchbay.ir.ops.spec import OpSpec
from patchbay.ir.ops.structural import STRUCTURAL

#: Pure functions of tensors: each has a shape rule, a cost, a reference and a kernel.
PURE: tuple[OpSpec, ...] = (*ELEMENTWISE, *REDUCTIONS, *SHAPE, *INDEXING, *LINALG, *NN, *CREATION)

OPS: Mapping[str, OpSpec] = MappingProxyType({op.name: op for op in (*PURE, *STRUCTURAL, *CONTROL)})


def spec(name: str) -> OpSpec:
    """The operation called `name`.

    Raises:
        UnknownOpError: there is none; the message names the nearest.
    """
    found = OPS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, OPS, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownOpError(f"no operation is called {name!r}{hint}")
    return found
