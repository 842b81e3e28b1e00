"""References hang off OpSpec objects: `implements` attaches one, `evaluate` runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from patchbay.errors import UnknownOpError
from patchbay.ir.dtypes import scalar_kind
from patchbay.ir.graph import Attr
from patchbay.ir.ops.creation import natural_dtype
from patchbay.ir.ops.spec import OpSpec, TensorSpec
from patchbay.reference.arrays import Array, from_numpy_dtype, to_numpy_dtype

#: A value as references see it: an array, or a Python number that is weak in promotion.
Operand: TypeAlias = "Array | bool | int | float"
#: Called as ``fn(*args, **spec.fill(attrs))`` with every float as float64; what it returns is cast to the rule's dtype.
Reference: TypeAlias = Callable[..., Any]

_REFERENCES: dict[OpSpec, Reference] = {}
_IN_OWN_DTYPE: set[OpSpec] = set()


def implements(spec: OpSpec, *, in_own_dtype: bool = False) -> Callable[[Reference], Reference]:
    """Attach the decorated function to `spec`; a second reference for one operation is a mistake.

    `in_own_dtype`: floats reach it as they are, for functions whose meaning depends on the dtype.
    """

    def attach(function: Reference) -> Reference:
        assert spec not in _REFERENCES, f"{spec.name} has a reference already"
        _REFERENCES[spec] = function
        if in_own_dtype:
            _IN_OWN_DTYPE.add(spec)
        return function

    return attach


def has_reference(spec: OpSpec) -> bool:
    """Whether `evaluate` can evaluate `spec`."""
    return spec in _REFERENCES


def spec_of(value: Operand) -> TensorSpec:
    """What the shape rules see of a value."""
    if isinstance(value, (bool, int, float)):
        return TensorSpec((), natural_dtype(value), scalar_kind(value))
    return TensorSpec(tuple(value.shape), from_numpy_dtype(value.dtype))


def _widened(value: Operand) -> Operand:
    """Floats as float64, in which references compute; everything else as it is."""
    if isinstance(value, (bool, int, float)) or not from_numpy_dtype(value.dtype).is_floating:
        return value
    return value.astype(np.float64)


def _narrowed(op: str, value: Any, spec: TensorSpec) -> Array:
    """`value` in the dtype that the rule says, once it is known to have the rule's shape."""
    array = np.asarray(value)
    assert array.shape == spec.shape, f"{op}: the rule says {spec}, the reference made {list(array.shape)}"
    with np.errstate(all="ignore"):
        result: Array = array.astype(to_numpy_dtype(spec.dtype))
    return result


def evaluate(spec: OpSpec, args: Sequence[Operand], attrs: Mapping[str, Attr]) -> Array | tuple[Array, ...]:
    """The value of a pure operation, computed slowly and obviously; the oracle of the tests.

    Args:
        spec: the operation.
        args: arrays, or Python numbers where the operation takes them.
        attrs: its attributes; defaults may be left out.

    Returns:
        An array of the shape and dtype that ``spec.infer`` says, or a tuple of them where the spec names `results`.

    Raises:
        UnknownOpError: structural operations have no reference.
        GraphError: what ``spec.infer`` raises, and what only values show (an index out of range, a singular matrix).
    """
    function = _REFERENCES.get(spec)
    if function is None:
        raise UnknownOpError(f"{spec.name} has no reference")
    result = spec.infer([spec_of(a) for a in args], attrs)
    operands = args if spec in _IN_OWN_DTYPE else [_widened(a) for a in args]
    with np.errstate(all="ignore"):
        value = function(*operands, **spec.fill(attrs))
    if isinstance(result, TensorSpec):
        return _narrowed(spec.name, value, result)
    return tuple(_narrowed(spec.name, v, s) for v, s in zip(value, result, strict=True))
