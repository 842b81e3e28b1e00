"""What an operation is: one object that the proxies, the verifier, the reference and the kernels hang off.

Shape rules take and return `TensorSpec`s and raise `ShapeError` or `DTypeError`; they never see values. Reference
functions (numpy) and kernels (torch) are attached elsewhere, to the `OpSpec` object itself, so that this module stays
within the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from patchbay.errors import DTypeError, GraphError, ShapeError
from patchbay.ir.dtypes import DTYPES, DType, Kind, promote, promote_scalar
from patchbay.ir.graph import Attr, TensorData
from patchbay.ir.limits import MAX_DIMS, MAX_TENSOR_SPAN


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a value without computing it.

    Attributes:
        shape: extents, all known.
        dtype: element type.
        scalar: the kind of a Python scalar (weak in promotion), or None for a tensor.
    """

    shape: tuple[int, ...]
    dtype: DType
    scalar: Kind | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


#: The spec of a node's value: one tensor, or several for operations such as topk (picked apart by ``item``).
ValueSpec: TypeAlias = "TensorSpec | tuple[TensorSpec, ...]"

AttrKind = Literal["int", "float", "bool", "str", "dtype", "axis", "axes", "shape", "ints", "scalar", "index", "tensor"]
REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class AttrSpec:
    """A static parameter.

    Kinds: ``int float bool str`` as in Python; ``dtype`` a dtype's name; ``axis`` an int; ``axes`` None, an int or a
    tuple of ints; ``shape`` and ``ints`` tuples of ints; ``scalar`` a Python bool, int or float; ``index`` a tuple of
    index items (see `patchbay.ir.indexing`); ``tensor`` a `TensorData`. None is allowed where it is the default.
    """

    name: str
    kind: AttrKind
    default: Attr = REQUIRED
    doc: str = ""
    choices: tuple[str, ...] = ()


ShapeRule: TypeAlias = Callable[[Sequence[TensorSpec], Mapping[str, Any]], ValueSpec]
FlopsRule: TypeAlias = Callable[[Sequence[TensorSpec], ValueSpec, Mapping[str, Any]], int]


def output_size_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """One operation per output element: right for elementwise work."""
    del args, attrs
    return out.size if isinstance(out, TensorSpec) else sum(o.size for o in out)


def input_size_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """One operation per input element: right for reductions."""
    del out, attrs
    return sum(a.size for a in args)


def no_flops(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """No arithmetic: views, reads, selections."""
    del args, out, attrs
    return 0


def no_workspace(args: Sequence[TensorSpec], out: ValueSpec, attrs: Mapping[str, Any]) -> int:
    """No temporary of note beside the arguments and the result."""
    del args, out, attrs
    return 0


@dataclass(frozen=True, eq=False)
class OpSpec:
    """One operation; compared and hashed by identity.

    Attributes:
        name: array API or torch.nn.functional name; operations at sites carry a dot.
        params: names of the tensor arguments, in order.
        variadic: the last param takes any number of arguments, at least one (``concat``, ``stack``, ``einsum``).
        optional: how many trailing params may be left out.
        attrs: static parameters.
        rule: the shape rule; None for structural operations, whose shape needs the model (see `verify`).
        flops: the cost rule, in floating-point operations.
        workspace: bytes of temporaries while it runs, where they can outgrow arguments and result (broadcast products,
            einsum's intermediates, attention scores).
        scalars: whether Python scalars may stand in for tensor arguments (elementwise operations).
        category: heading it is documented under.
        doc: one sentence, with its source where it is not the array API.
        results: names of the parts of a tuple-valued operation, such as ``("values", "indices")``.
    """

    name: str
    params: tuple[str, ...]
    rule: ShapeRule | None
    doc: str
    category: str
    attrs: tuple[AttrSpec, ...] = ()
    flops: FlopsRule = output_size_flops
    workspace: FlopsRule = no_workspace
    variadic: bool = False
    optional: int = 0
    scalars: bool = False
    results: tuple[str, ...] = ()
    attrs_by_name: Mapping[str, AttrSpec] = field(init=False, repr=False)
    defaults: Mapping[str, Attr] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs_by_name", {a.name: a for a in self.attrs})
        object.__setattr__(self, "defaults", {a.name: a.default for a in self.attrs if a.default is not REQUIRED})

    @property
    def structural(self) -> bool:
        """True for operations that involve a run or the model; False for pure functions of tensors."""
        return self.rule is None

    @property
    def min_args(self) -> int:
        return len(self.params) - self.optional

    @property
    def max_args(self) -> int | None:
        return None if self.variadic else len(self.params)

    def _takes(self, count: int) -> bool:
        return count >= self.min_args and (self.variadic or count <= len(self.params))

    def fill(self, attrs: Mapping[str, Attr]) -> dict[str, Any]:
        """`attrs` with defaults filled in, each checked against its declared kind.

        Raises:
            GraphError: an attribute is unknown, missing, or not of its kind.
        """
        if not attrs and not self.attrs:
            return {}
        for name in attrs:
            if name not in self.attrs_by_name:
                known = ", ".join(self.attrs_by_name) or "none"
                raise GraphError(f"{self.name} has no attribute {name!r} (it has: {known})")
        filled: dict[str, Any] = {}
        for spec in self.attrs:
            value = attrs.get(spec.name, spec.default)
            if value is REQUIRED:
                raise GraphError(f"{self.name} needs the attribute {spec.name!r}")
            if not (value is None and spec.default is None):
                check_attr(self.name, spec, value)
            filled[spec.name] = value
        return filled

    def filled(self, attrs: Mapping[str, Attr]) -> Mapping[str, Any]:
        """`attrs`, which have passed `fill` before, with defaults filled in."""
        return {**self.defaults, **attrs}

    def infer(self, args: Sequence[TensorSpec], attrs: Mapping[str, Attr]) -> ValueSpec:
        """The spec of the result, from the specs of the arguments.

        Raises:
            GraphError: wrong number of arguments, a scalar where a tensor is needed, or what the shape rule raises.
        """
        assert self.rule is not None, "structural operations are inferred by verify"
        if len(args) != len(self.params) and not self._takes(len(args)):
            upper = self.max_args
            wanted = f"{self.min_args}" if upper == self.min_args else f"{self.min_args} to {upper or 'any number'}"
            raise GraphError(f"{self.name} takes {wanted} tensor arguments ({', '.join(self.params)}), got {len(args)}")
        if not self.scalars:
            for a in args:
                if a.scalar:
                    raise DTypeError(f"{self.name} takes tensors, got a Python scalar")
        result = self.rule(args, self.fill(attrs))
        for part in result if isinstance(result, tuple) else (result,):
            check_extents(self.name, part)
        return result


def check_extents(op: str, spec: TensorSpec) -> None:
    """Raise ShapeError when `spec` has more axes or larger extents than any library can address.

    An extent of 0 does not excuse the others: [0, 10**30] holds nothing, and is refused.
    """
    if spec.ndim > MAX_DIMS:
        raise ShapeError(f"{op}: {spec.ndim} dimensions, of at most {MAX_DIMS}")
    if math.prod(max(1, extent) for extent in spec.shape) * spec.dtype.itemsize >= MAX_TENSOR_SPAN:
        raise ShapeError(f"{op}: {spec} is larger than any machine can hold")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_ints(value: object) -> bool:
    return isinstance(value, tuple) and all(_is_int(v) for v in value)


_HOLDS: Mapping[AttrKind, Callable[[object], bool]] = {
    "int": _is_int,
    "axis": _is_int,
    "float": lambda value: isinstance(value, float) or _is_int(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "axes": lambda value: value is None or _is_int(value) or _is_ints(value),
    "shape": _is_ints,
    "ints": _is_ints,
    "scalar": lambda value: isinstance(value, (bool, float)) or _is_int(value),
    "index": lambda value: isinstance(value, tuple),
    "tensor": lambda value: isinstance(value, TensorData),
}


#: What an attribute of a kind is, in words.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "int": "an integer of 64 bits",
        "float": "a number",
        "bool": "True or False",
        "str": "a text",
        "axis": "an axis, an integer",
        "axes": "an axis or a tuple of axes",
        "shape": "a shape, a tuple of integers",
        "ints": "a tuple of integers",
        "scalar": "a bool, a float, or an integer of 64 bits",
    }
)


def check_attr(op: str, spec: AttrSpec, value: object) -> None:
    """Raise GraphError unless `value` is of the kind that `spec` declares; integers must fit into 64 bits."""
    ok = _HOLDS[spec.kind](value)
    if ok and spec.choices:
        ok = value in spec.choices
    if not ok:
        wanted = f"one of {', '.join(spec.choices)}" if spec.choices else KINDS.get(spec.kind, spec.kind)
        raise GraphError(f"{op}: attribute {spec.name!r} must be {wanted}, got {value!r}")


# --- shared pieces of shape rules ---------------------------------------------------------------------------------


def broadcast_shapes(op: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """numpy broadcasting.

    Raises:
        ShapeError: two extents differ and neither is 1.
    """
    if shapes and shapes.count(shapes[0]) == len(shapes):
        return shapes[0]
    ndim = max(map(len, shapes), default=0)
    out: list[int] = []
    for axis in range(1, ndim + 1):
        extents = {s[-axis] for s in shapes if len(s) >= axis} - {1}
        if len(extents) > 1:
            shown = " and ".join(str(list(s)) for s in shapes)
            raise ShapeError(f"{op}: shapes {shown} do not broadcast (axis -{axis}: {sorted(extents)})")
        out.append(extents.pop() if extents else 1)
    return tuple(reversed(out))


def promote_specs(op: str, args: Sequence[TensorSpec]) -> DType:
    """The dtype that tensors and Python scalars promote to together.

    Raises:
        DTypeError: no promotion is defined.
    """
    tensors = [a for a in args if a.scalar is None]
    if not tensors:
        raise DTypeError(f"{op} needs at least one tensor")
    result = tensors[0].dtype
    try:
        for a in tensors[1:]:
            result = promote(result, a.dtype)
    except ValueError as error:
        raise DTypeError(f"{op}: {error}") from None
    for a in args:
        if a.scalar is not None:
            result = promote_scalar(result, a.scalar)
    return result


def normalize_axis(op: str, axis: int, ndim: int) -> int:
    """`axis` as a non-negative int.

    Raises:
        ShapeError: outside ``[-ndim, ndim)``.
    """
    if not -ndim <= axis < ndim:
        raise ShapeError(f"{op}: axis {axis} is out of range for a tensor of {ndim} dimensions")
    return axis % ndim


def normalize_axes(op: str, axes: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """`axes` as sorted distinct non-negative ints; None means all."""
    if axes is None:
        return tuple(range(ndim))
    given = (axes,) if isinstance(axes, int) else axes
    normal = [normalize_axis(op, a, ndim) for a in given]
    if len(set(normal)) != len(normal):
        raise ShapeError(f"{op}: axes {list(given)} repeat")
    return tuple(sorted(normal))
