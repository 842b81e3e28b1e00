"""Functions over values of a trace: the array API's names, and torch.nn.functional's where the field uses them.

Every function takes proxies, and beside them numpy arrays, lists and numbers. `dir(patchbay.ops)` lists them,
``help(patchbay.ops.softmax)`` explains one; most are methods of proxies too.
"""

from __future__ import annotations

import difflib as _difflib
import math as _math
from typing import Any

from patchbay.ir.dtypes import DTYPES as _DTYPES
from patchbay.tracing.functions import functions as _functions


def __getattr__(name: str) -> Any:
    near = _difflib.get_close_matches(name, __all__, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "dir(patchbay.ops) lists what there is"
    raise AttributeError(f"patchbay.ops has no {name!r}; {hint}")


#: The array API's constants.
e = _math.e
inf = _math.inf
nan = _math.nan
newaxis = None
pi = _math.pi

globals().update(_functions())
globals().update({("bool" if name == "bool_" else name): dtype for name, dtype in _DTYPES.items()})

__all__ = sorted([*_functions(), *_DTYPES, "e", "inf", "nan", "newaxis", "pi"])


def __dir__() -> list[str]:
    return list(__all__)
