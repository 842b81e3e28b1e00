"""Writes ``patchbay/ops.pyi`` from the operations: editors complete and type checkers check what is made at run time.

    python -m patchbay.tracing.stubs > client/patchbay/ops.pyi

A test compares the committed file with what this makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from patchbay import ops
from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay.ir.ops.spec import AttrKind, OpSpec
from patchbay.tracing.functions import functions

_TYPES: Mapping[AttrKind, str] = {
    "int": "int",
    "float": "float",
    "bool": "_bool",
    "str": "str",
    "dtype": "_DTypeLike",
    "axis": "int",
    "axes": "int | Sequence[int]",
    "shape": "int | Sequence[int]",
    "ints": "Sequence[int]",
    "scalar": "float",
    "index": "Any",
    "tensor": "Any",
}
_BY_HAND = {
    "set_index": "(x: Proxy, index: Any, value: _Tensor, mode: str = 'set') -> Proxy",
    "tensordot": "(x1: _Tensor, x2: _Tensor, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Proxy",
}
_HEAD = '''"""Functions over values of a trace. Written by `python -m patchbay.tracing.stubs`; not to be edited."""

# ruff: noqa: A001, E501, N801
from builtins import bool as _bool
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from patchbay.ir.dtypes import DType
from patchbay.tracing.proxy import Created, Proxy

#: A proxy, an array, a nested list or a number.
_Tensor: TypeAlias = Any
#: A `DType`, its name, or a dtype of numpy's.
_DTypeLike: TypeAlias = Any

__all__: list[str]

e: float
inf: float
nan: float
newaxis: None
pi: float
'''


def stub() -> str:
    """The text of ``ops.pyi``."""
    dtypes = [f"{'bool' if name == 'bool_' else name}: DType" for name in DTYPES]
    return "\n".join([_HEAD, *dtypes, "", *(_function(OPS[name]) for name in sorted(functions()))])


def _function(spec: OpSpec) -> str:
    result = "Proxy" if spec.params else "Created"
    before = ""
    if spec.results:
        result = f"_{spec.name}"
        before = "\n".join([f"class {result}(NamedTuple):", *(f"    {part}: Proxy" for part in spec.results), "", ""])
    heading = _BY_HAND.get(spec.name) or f"({_parameters(spec)}) -> {result}"
    doc = inspect.getdoc(getattr(ops, spec.name)) or ""
    return f'{before}def {spec.name}{heading}:\n    """{doc.splitlines()[0]}"""\n'


def _parameters(spec: OpSpec) -> str:
    shown: list[str] = []
    for name, parameter in inspect.signature(getattr(ops, spec.name)).parameters.items():
        declared = spec.attrs_by_name.get(name)
        if declared is not None:
            kind = _TYPES[declared.kind]
        else:
            kind = "Sequence[_Tensor]" if spec.variadic else "_Tensor"
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            shown.append(f"*{name}: _Tensor")
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = "" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}"
        shown.append(f"{name}: {kind}{' | None' if default == ' = None' and kind != '_Tensor' else ''}{default}")
    return ", ".join(shown)


if __name__ == "__main__":
    print(stub(), end="")
