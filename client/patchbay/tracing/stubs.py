"""Writes what editors complete and type checkers check of all that is made at run time.

    python -m patchbay.tracing.stubs client/patchbay

``ops.pyi`` has the functions of `patchbay.ops`, ``tracing/typed.pyi`` the same as methods of values, and every
canonical site as an attribute of runs (which of them a model has, only its card says). A test compares the committed
files with what this makes. Without a folder, ``ops.pyi`` is printed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from patchbay import ops
from patchbay.ir.dtypes import DTYPES
from patchbay.ir.ops import OPS
from patchbay.ir.ops.spec import AttrKind, OpSpec
from patchbay.ir.site_names import MEANINGS
from patchbay.tracing.functions import functions, methods

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


# --- methods of values, and sites -----------------------------------------------------------------------------------

_TYPED_HEAD = '''"""Methods of values, sites of runs. Made by `python -m patchbay.tracing.stubs`; not to be edited."""

# ruff: noqa: E501
from builtins import bool as _bool
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, overload

{results}
from patchbay.tracing.namespaces import NumberedNamespace, SiteNamespace
from patchbay.tracing.proxy import Proxy

#: A proxy, an array, a nested list or a number.
_Tensor: TypeAlias = Any
#: A `DType`, its name, or a dtype of numpy's.
_DTypeLike: TypeAlias = Any

class Site:
    """A site: to read it gives its value, to assign to it writes there."""

    @overload
    def __get__(self, instance: None, owner: Any) -> Site: ...
    @overload
    def __get__(self, instance: object, owner: Any) -> Proxy: ...
    def __set__(self, instance: object, value: Any) -> None: ...
'''
#: The sites of one level: a site's extents and meaning, or the level below.
_Level: TypeAlias = "dict[str, tuple[str, str] | _Level]"


def typed() -> str:
    """The text of ``tracing/typed.pyi``."""
    named = sorted(methods())
    results = [f"from patchbay.ops import _{name} as _{name}" for name in named if OPS[name].results]
    root: _Level = {}
    for name, meaning in MEANINGS.items():
        *path, leaf = name.split(".")
        level = root
        for part in path:
            below = level.setdefault(part, {})
            assert isinstance(below, dict)
            level = below
        level[leaf] = meaning
    lines = [
        _TYPED_HEAD.format(results="\n".join(results)),
        "class Methods:",
        '    """The operations of values."""',
        "",
    ]
    for name in named:
        lines += [f"    {line}" if line else "" for line in _method(OPS[name]).splitlines()] + [""]
    return "\n".join([*lines, *_group(root, "", "what a run has"), ""])


def _method(spec: OpSpec) -> str:
    """One operation, its first tensor as the value that it is called on."""
    _, _, rest = _parameters(spec).partition(", ")
    given = _BY_HAND.get(spec.name)
    if given is not None:
        rest = given.partition(", ")[2].rpartition(")")[0]
    attrs = [a for a in spec.attrs if len(spec.params) == 1 and len(spec.attrs) == 1 and a.kind in ("shape", "ints")]
    if attrs:  # x.reshape(2, 3)
        rest = f"*{attrs[0].name}: int | Sequence[int]"
    result = f"_{spec.name}" if spec.results else "Proxy"
    doc = (inspect.getdoc(getattr(ops, spec.name)) or "").splitlines()[0]
    return f'def {spec.name}(self{", " + rest if rest else ""}) -> {result}:\n    """{doc}"""'


def _group(level: _Level, path: str, doc: str) -> Iterator[str]:
    """A class for one level of names, those of the levels below before it."""
    for name, below in level.items():
        if isinstance(below, dict) and name != "{i}":
            yield from _group(below, f"{path}.{name}", name)
    inner = level.get("{i}")
    if isinstance(inner, dict):
        yield from _group(inner, f"{path}.one", "one block")
        yield f"class {_class(path)}(NumberedNamespace):"
        yield '    """The blocks, by number; negative ones count from the end."""'
        yield ""
        yield f"    def __getitem__(self, index: object) -> {_class(path + '.one')}: ..."
        yield f"    def __iter__(self) -> Iterator[{_class(path + '.one')}]: ..."
        yield ""
        return
    yield f"class {_class(path)}(SiteNamespace):"
    yield f'    """Sites: {doc}."""'
    yield ""
    for name, below in level.items():
        if isinstance(below, dict):
            yield f"    {name}: {_class(f'{path}.{name}')}"
        else:
            yield f"    {name}: Site"
            yield f'    """[{below[0]}]: {below[1]}."""'
    if not path:
        yield f"    encoder: {_class('')}"
        yield f"    decoder: {_class('')}"
    yield ""


def _class(path: str) -> str:
    return "".join(part.title().replace("_", "") for part in path.split(".")) + "Sites" if path else "RunSites"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1], "ops.pyi").write_text(stub(), encoding="utf-8")
        Path(sys.argv[1], "tracing", "typed.pyi").write_text(typed(), encoding="utf-8")
    else:
        print(stub(), end="")
