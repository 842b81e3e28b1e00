"""One Python function per OpSpec: `patchbay.ops` is made of them, and so are the proxies' methods.

Nothing is written by hand twice: names, parameters, defaults and documentation all come from the OpSpec.
"""

from __future__ import annotations

import inspect
import operator
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from patchbay.arguments import refused, seen
from patchbay.arrays import as_array, to_data
from patchbay.errors import DTypeError, GraphError, TraceError
from patchbay.ir.dtypes import DTYPES, DType
from patchbay.ir.graph import Attr
from patchbay.ir.ops import OPS
from patchbay.ir.ops.spec import KINDS, REQUIRED, AttrSpec, OpSpec
from patchbay.places import here
from patchbay.tracing.habits import ARGUMENTS
from patchbay.tracing.proxy import INDEX_OP, Created, Proxy, lift

if TYPE_CHECKING:
    from patchbay.tracing.trace import BaseTrace

_EMPTY = inspect.Parameter.empty
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_VARIABLE = inspect.Parameter.VAR_POSITIONAL
#: Operations that take an index are reached by brackets, not by name.
_BY_BRACKETS = frozenset({INDEX_OP})
_BY_HAND = frozenset({"set_index", "tensordot"})
#: First argument is not the thing acted on, so a method would read backwards.
_NOT_METHODS = frozenset({"where", "embedding", "einsum"})
_SHAPE_KINDS = frozenset({"shape", "ints", "axes"})


@cache
def functions() -> Mapping[str, Callable[..., Any]]:
    """Every pure operation as a function over proxies, by name."""
    made = {
        spec.name: _make(spec)
        for spec in OPS.values()
        if not spec.structural and spec.name not in _BY_BRACKETS and spec.name not in _BY_HAND
    }
    return {**made, "set_index": set_index, "tensordot": tensordot}


@cache
def methods() -> Mapping[str, Callable[..., Any]]:
    """The operations that are methods of proxies too: those that act on their first argument."""
    return {
        name: _make_method(OPS[name], function)
        for name, function in functions().items()
        if OPS[name].params
        and not (OPS[name].variadic and len(OPS[name].params) == 1)
        and name not in _NOT_METHODS
        and not hasattr(Proxy, name)
    }


@cache
def parts_type(spec: OpSpec) -> Callable[..., Any]:
    """The named tuple that an operation with several results returns."""
    return namedtuple(spec.name, spec.results)  # type: ignore[misc]


def apply(spec: OpSpec, tensors: Sequence[object], attrs: Mapping[str, Attr]) -> Any:
    """Appends the operation to the trace of the first proxy among `tensors`; without parameters it waits for one."""
    if not spec.params:
        return Created(spec, attrs)
    trace = _trace_of(spec, tensors)
    node = trace.builder.add(spec.name, tuple(lift(trace, t) for t in tensors), attrs)
    if not spec.results or not isinstance(trace.builder.specs[node], tuple):
        return Proxy(trace, node)
    parts = [Proxy(trace, trace.builder.add("item", (node,), {"index": i})) for i in range(len(spec.results))]
    return parts_type(spec)(*parts)


def attribute(spec: OpSpec, declared: AttrSpec, value: object) -> Attr:
    """`value` as the attribute's kind wants it: numpy integers, lists and dtype objects are understood.

    Raises:
        GraphError: it cannot be one.
    """
    if value is None:
        return None
    if isinstance(value, Proxy):
        many = f"; it takes its values in one list: pb.ops.{spec.name}([a, b])" if spec.variadic else ""
        many = f"; {declared.name} comes first" if _equation_first(spec) else many
        raise refused(f"{spec.name}: {declared.name} must be known before the run; it cannot be a proxy{many}")
    kind = declared.kind
    try:
        if kind in ("int", "axis"):
            return operator.index(value)  # type: ignore[arg-type]
        if kind in _SHAPE_KINDS:
            if hasattr(value, "__index__"):
                one = operator.index(value)
                return one if kind == "axes" else (one,)
            return tuple(operator.index(v) for v in value)  # type: ignore[attr-defined]
        if kind == "float":
            return float(value)  # type: ignore[arg-type]
        if kind == "bool":
            if type(value).__name__ in ("bool", "bool_") or value in (0, 1):
                return bool(value)
            raise TypeError
        if kind == "scalar":
            return value if type(value) in (bool, int, float) else value.item()  # type: ignore[attr-defined, return-value]
        if kind == "dtype":
            return as_dtype(value).name
        if kind == "tensor":
            return to_data(as_array(value))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, GraphError):
            error.location = error.location or here()
            raise
        wanted = KINDS.get(kind, kind)
        raise GraphError(f"{spec.name}: {declared.name} must be {wanted}, got {value!r}", location=here()) from None
    return value  # type: ignore[return-value]


def as_dtype(value: object) -> DType:
    """A dtype by object, name, numpy dtype or Python type.

    Raises:
        DTypeError: none of the dtypes of a graph.
    """
    if isinstance(value, DType):
        return value
    if value is float:
        return DTYPES["float32"]
    if isinstance(value, str):
        names: list[object] = [value]
    else:
        names = [getattr(value, "name", None), getattr(value, "__name__", None), str(value)]
    for name in names:
        if isinstance(name, str) and (found := DTYPES.get({"int": "int64"}.get(name, name.removeprefix("torch.")))):
            return found
    raise DTypeError(f"{value!r} is not one of the dtypes of a graph: {', '.join(DTYPES)}")


def signature(spec: OpSpec) -> inspect.Signature:
    """Parameters of the function made for `spec`: tensors first, then attributes, all by position or name."""
    parameters: list[inspect.Parameter] = []
    attrs = [
        inspect.Parameter(a.name, _POSITIONAL, default=_EMPTY if a.default is REQUIRED else a.default)
        for a in spec.attrs
    ]
    if _equation_first(spec):
        return inspect.Signature([attrs[0].replace(default=_EMPTY), inspect.Parameter(spec.params[-1], _VARIABLE)])
    for i, name in enumerate(spec.params):
        optional = i >= len(spec.params) - spec.optional
        parameters.append(inspect.Parameter(name, _POSITIONAL, default=None if optional else _EMPTY))
    if any(p.default is not _EMPTY for p in parameters) or any(a.default is not _EMPTY for a in attrs):
        attrs.sort(key=lambda p: p.default is not _EMPTY)
    if any(p.default is not _EMPTY for p in parameters):
        attrs = [a if a.default is not _EMPTY else a.replace(kind=inspect.Parameter.KEYWORD_ONLY) for a in attrs]
        attrs.sort(key=lambda p: p.kind)
    return inspect.Signature(parameters + attrs)


def _equation_first(spec: OpSpec) -> bool:
    """einsum: the string comes before any number of tensors."""
    return spec.variadic and bool(spec.attrs) and spec.attrs[0].kind == "str" and spec.attrs[0].default is REQUIRED


def _make(spec: OpSpec) -> Callable[..., Any]:
    shown = signature(spec)
    order = list(shown.parameters)
    n_params = len(spec.params)
    plain = not spec.variadic and all(a.default is not REQUIRED for a in spec.attrs)

    def function(*args: object, **kwargs: object) -> Any:
        if plain and len(args) == n_params and not kwargs:  # add(x, y), exp(x): the common call
            return apply(spec, _drop_missing(spec, args), {})
        if _equation_first(spec):
            bound = _bind(shown, spec, args, kwargs)
            name = spec.attrs[0].name
            return apply(spec, bound[spec.params[-1]], {name: attribute(spec, spec.attrs[0], bound[name])})
        given = _bind(shown, spec, args, kwargs)
        attrs = {
            name: attribute(spec, spec.attrs_by_name[name], given[name])
            for name in order
            if name in spec.attrs_by_name and name in given
        }
        if spec.variadic:
            fixed = [given[p] for p in spec.params[:-1]]
            many = given.get(spec.params[-1])
            if not isinstance(many, (list, tuple)):
                raise GraphError(
                    f"{spec.name} takes a list of tensors first, got {type(many).__name__}", location=here()
                )
            if not many:
                raise GraphError(f"{spec.name} takes at least one tensor, and the list is empty", location=here())
            return apply(spec, [*fixed, *many], attrs)
        return apply(spec, _drop_missing(spec, [given.get(p) for p in spec.params]), attrs)

    return _dress(function, spec, shown)


def _make_method(spec: OpSpec, function: Callable[..., Any]) -> Callable[..., Any]:
    # x.reshape(2, 3) and x.permute_dims(1, 0): several integers stand for the one tuple, as in numpy
    spread = len(spec.params) == 1 and len(spec.attrs) == 1 and spec.attrs[0].kind in ("shape", "ints")

    def method(self: Proxy, *args: object, **kwargs: object) -> Any:
        if spread and len(args) > 1 and all(hasattr(a, "__index__") for a in args):
            args = (args,)
        return function(self, *args, **kwargs)

    shown = signature(spec)
    first, *rest = shown.parameters.values()
    return _dress(method, spec, shown.replace(parameters=[first.replace(name="self", default=_EMPTY), *rest]))


def _dress(function: Callable[..., Any], spec: OpSpec, shown: inspect.Signature) -> Callable[..., Any]:
    function.__name__ = spec.name
    function.__qualname__ = spec.name
    function.__module__ = "patchbay.ops"
    function.__doc__ = document(spec)
    function.__signature__ = shown  # type: ignore[attr-defined]
    return function


def document(spec: OpSpec) -> str:
    """The docstring of the function made for `spec`."""
    lines = [spec.doc]
    described = [f"    {a.name}: {a.doc}" for a in spec.attrs if a.doc]
    if described:
        lines += ["", "Args:", *described]
    if spec.results:
        lines += ["", f"Returns: a named tuple ({', '.join(spec.results)})."]
    return "\n".join(lines)


def set_index(x: Proxy, index: object, value: object, mode: str = "set") -> Proxy:
    """A copy of x in which x[index] is replaced by value (mode "set"), or has it added ("add") or multiplied ("mul").

    Positions named twice are written once, as in numpy.
    """
    if not isinstance(x, Proxy):
        raise _none_of_a_trace("set_index")
    trace = x._trace
    items, arrays = x._parse(index)
    node = trace.builder.add("set_index", (x._node, lift(trace, value), *arrays), {"index": items, "mode": mode})
    return Proxy(trace, node)


def tensordot(x1: object, x2: object, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Proxy:
    """Sums of products over axes: the last of x1 with the first of x2, or a tuple (axes of x1, axes of x2)."""
    spec = OPS["tensordot"]
    if isinstance(axes, int):
        attrs: dict[str, Attr] = {"axes": axes}
    else:
        try:
            left, right = (tuple(map(operator.index, side)) for side in axes)
        except (TypeError, ValueError):
            raise refused(f"tensordot: axes is a number, or a pair of lists of axes, not {seen(axes)}") from None
        attrs = {"axes_x1": left, "axes_x2": right}
    result: Proxy = apply(spec, (x1, x2), attrs)
    return result


for _function in (set_index, tensordot):
    _function.__module__ = "patchbay.ops"


def _bind(
    shown: inspect.Signature, spec: OpSpec, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    try:
        return shown.bind(*args, **kwargs).arguments
    except TypeError as error:
        near = next((f"; {torch} is called {own} here" for torch, own in ARGUMENTS.items() if torch in kwargs), "")
        raise refused(f"{spec.name}{shown}: {error}{near}") from None


def _drop_missing(spec: OpSpec, tensors: Sequence[object]) -> Sequence[object]:
    """`tensors` without the optional ones left out at the end."""
    end = len(tensors)
    while end > spec.min_args and tensors[end - 1] is None:
        end -= 1
    if any(t is None for t in tensors[:end]):
        missing = spec.params[[t is None for t in tensors].index(True)]
        raise GraphError(f"{spec.name}: {missing} may be left out only together with what follows it")
    return tensors[:end]


def _trace_of(spec: OpSpec, tensors: Sequence[object]) -> BaseTrace:
    for t in tensors:
        if isinstance(t, Proxy):
            return t._trace
    for t in tensors:
        if isinstance(t, Created):
            raise t._alone()
    raise _none_of_a_trace(spec.name)


def _none_of_a_trace(name: str) -> TraceError:
    return TraceError(
        f"pb.ops.{name} works on values of a trace; none of its arguments is one (arrays: numpy)", location=here()
    )


def install() -> None:
    """Gives proxies their methods."""
    for name, method in methods().items():
        setattr(Proxy, name, method)


install()
