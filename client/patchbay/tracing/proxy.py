"""The stand-in for a value that the server will compute: shape and dtype are known, the numbers are not.

A proxy never changes. ``run.blocks[2].resid_post[:, -1] = v`` writes at a site; whoever read the site before keeps the
value that was there, whoever reads it afterwards sees the new one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from patchbay.arrays import as_array, to_data
from patchbay.errors import (
    ArgumentError,
    DTypeError,
    GraphError,
    ProxyBoolError,
    TraceError,
    ValueNotReadyError,
    WrongTraceError,
)
from patchbay.ir.dtypes import DType
from patchbay.ir.ops.spec import TensorSpec
from patchbay.places import here
from patchbay.tracing import habits
from patchbay.tracing.indexing import parse_index

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from patchbay.ir.graph import Attr
    from patchbay.ir.indexing import IndexItem
    from patchbay.ir.ops.spec import OpSpec
    from patchbay.tracing.trace import BaseTrace
    from patchbay.tracing.typed import Methods
else:
    Methods = object

#: The pure operation behind ``x[...]``.
INDEX_OP = "getitem"
#: Numbers of a known value that its repr shows, at most.
_SHOWN_NUMBERS = 4
#: ``x /= v`` equals ``x *= 1 / v`` exactly for these: their reciprocals are powers of two that every float type holds.
_EXACT_DIVISORS = frozenset(float(2**k) for k in range(-8, 9))


class _Update(NamedTuple):
    """What ``target += operand`` was, in case it is now assigned back to where `target` was read."""

    target: int
    mode: str
    operand: int


class Proxy(Methods):
    """A value of a trace. Operators, numpy's indexing and the functions of `patchbay.ops` as methods build others."""

    __slots__ = ("__weakref__", "_node", "_trace", "_update")

    __array_priority__ = 1000

    def __init__(self, trace: BaseTrace, node: int, update: _Update | None = None) -> None:
        self._trace = trace
        self._node = node
        self._update = update

    # --- what is known at once ------------------------------------------------------------------------------------

    @property
    def _spec(self) -> TensorSpec:
        spec = self._trace.builder.specs[self._node]
        assert isinstance(spec, TensorSpec), "several-valued nodes are picked apart as they are made"
        return spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first."""
        return self._spec.shape

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self._spec.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._spec.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._spec.size

    @property
    def T(self) -> Proxy:
        """The axes in reverse order."""
        return self._transposed(tuple(reversed(range(self.ndim))))

    @property
    def mT(self) -> Proxy:
        """The last two axes swapped."""
        if self.ndim < 2:
            raise GraphError(f"mT swaps the last two axes; {self._trace.builder.describe(self._node)} has {self.ndim}")
        axes = tuple(range(self.ndim))
        return self._transposed((*axes[:-2], axes[-1], axes[-2]))

    def _transposed(self, axes: tuple[int, ...]) -> Proxy:
        return Proxy(self._trace, self._trace.builder.add("permute_dims", (self._node,), {"axes": axes}))

    def __repr__(self) -> str:
        builder = self._trace.builder
        place = builder.location(self._node)
        shown = f"{self._spec} {builder.describe(self._node)}" + (f", made at {place}" if place else "")
        if self._trace.has_run and self._trace.holds(self):
            shown += f", {self.value.tolist()}" if self.size <= _SHOWN_NUMBERS else ", its numbers in .value"
        return f"<{shown}>"

    # --- saving and the value -------------------------------------------------------------------------------------

    def save(self, name: str | None = None) -> Proxy:
        """Asks for this value; it is in `value` and in the trace's results once the trace has run.

        Args:
            name: its name in the results; left out, the site's name, or ``value_3`` for a computed value.

        Raises:
            TraceError: the name is taken, or the trace is over.
        """
        self._trace.save_proxy(self, name)
        return self

    @property
    def value(self) -> NDArray[Any]:
        """The value as a numpy array of its own, once the trace has run and if it was saved.

        Raises:
            ValueNotReadyError: the trace has not run, or the value was not saved.
        """
        return self._trace.value_of(self)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.value
        return array if dtype is None else array.astype(dtype)  # type: ignore[call-overload, no-any-return]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **kwargs: object) -> Any:
        return habits.numpy_ufunc(ufunc, method, inputs, kwargs)

    def __array_function__(self, function: Any, types: object, args: Any, kwargs: Any) -> Any:
        return habits.numpy_function(function, args, kwargs)

    @classmethod
    def __torch_function__(cls, function: Any, types: object, args: object = (), kwargs: object = None) -> Any:
        raise habits.torch_function(function, args)

    def __array_namespace__(self, *, api_version: str | None = None) -> ModuleType:
        import patchbay.ops

        return patchbay.ops

    # --- indexing -------------------------------------------------------------------------------------------------

    def __getitem__(self, index: object) -> Proxy:
        items, arrays = self._parse(index)
        return Proxy(self._trace, self._trace.builder.add(INDEX_OP, (self._node, *arrays), {"index": items}))

    def __setitem__(self, index: object, value: object) -> None:
        builder = self._trace.builder
        node = builder.nodes[self._node]
        if node.op != "site.read":
            raise TraceError(
                f"values do not change: cannot assign into {builder.describe(self._node)}. Assign at a site, with one"
                " index (run.blocks[2].resid_post[0, -1] = v), or build a new value with pb.ops.where"
            )
        assert node.run is not None
        items, arrays = self._parse(index)
        step = node.attrs.get("step")
        write_site(self._trace, node.run, str(node.attrs["site"]), items, arrays, value, step)  # type: ignore[arg-type]

    def _parse(self, index: object) -> tuple[tuple[IndexItem, ...], tuple[int, ...]]:
        trace = self._trace

        def node_of(item: object) -> int | None:
            return lift(trace, item) if isinstance(item, Proxy) else None

        try:
            return parse_index(
                index, self.shape, node_of=node_of, constant=lambda array: trace.builder.constant(to_data(array))
            )
        except GraphError as error:
            error.message += f"\n  {self._spec}: {trace.builder.describe(self._node)}"
            error.location = error.location or here()
            raise

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self._trace.builder.describe(self._node)} has no axes, so no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Proxy]:
        if not self.shape:
            raise TypeError(f"{self._trace.builder.describe(self._node)} has no axes to iterate over")
        return (self[i] for i in range(self.shape[0]))

    # --- where Python needs the number itself: there once the trace has run, if it was saved ----------------------

    def _number(self, what: str) -> Any:
        if self._trace.has_run:
            return self.value[()]
        raise ProxyBoolError(
            f"{what} needs the value of {self._trace.builder.describe(self._node)}, which is known only after the trace"
            " has run: use pb.ops.where (or &, |, ~) inside the trace, or save it and use .value afterwards",
            location=here(),
        )

    def __bool__(self) -> bool:
        return bool(self._number("a Python condition (if, while, and, or, not, in)"))

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __float__(self) -> float:
        return float(self._number("float()"))

    def __complex__(self) -> complex:
        return complex(self._number("complex()"))

    def __index__(self) -> int:
        return operator.index(self._number("a Python index or range()"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number("round()"), digits)

    def __format__(self, how: str) -> str:
        return format(self._number(f"a text in the form {how!r}"), how) if how else str(self)

    def __contains__(self, item: object) -> bool:
        return item in self._number("in")

    def __copy__(self) -> Proxy:
        return self

    def __deepcopy__(self, memo: object) -> Proxy:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a proxy belongs to its trace and cannot be pickled; save it and keep its .value")

    __hash__ = object.__hash__

    # --- operators ------------------------------------------------------------------------------------------------

    def _binary(self, op: str, other: object, swapped: bool = False) -> Proxy:
        trace = self._trace
        node = other._node if type(other) is Proxy and other._trace is trace else lift(trace, other)
        return Proxy(trace, trace.builder.add(op, (node, self._node) if swapped else (self._node, node)))

    def _unary(self, op: str) -> Proxy:
        return Proxy(self._trace, self._trace.builder.add(op, (self._node,)))

    def __add__(self, other: object) -> Proxy:
        return self._binary("add", other)

    def __radd__(self, other: object) -> Proxy:
        return self._binary("add", other, True)

    def __sub__(self, other: object) -> Proxy:
        return self._binary("subtract", other)

    def __rsub__(self, other: object) -> Proxy:
        return self._binary("subtract", other, True)

    def __mul__(self, other: object) -> Proxy:
        return self._binary("multiply", other)

    def __rmul__(self, other: object) -> Proxy:
        return self._binary("multiply", other, True)

    def __truediv__(self, other: object) -> Proxy:
        return self._binary("divide", other)

    def __rtruediv__(self, other: object) -> Proxy:
        return self._binary("divide", other, True)

    def __floordiv__(self, other: object) -> Proxy:
        return self._binary("floor_divide", other)

    def __rfloordiv__(self, other: object) -> Proxy:
        return self._binary("floor_divide", other, True)

    def __mod__(self, other: object) -> Proxy:
        return self._binary("remainder", other)

    def __rmod__(self, other: object) -> Proxy:
        return self._binary("remainder", other, True)

    def __pow__(self, other: object) -> Proxy:
        return self._binary("pow", other)

    def __rpow__(self, other: object) -> Proxy:
        return self._binary("pow", other, True)

    def __matmul__(self, other: object) -> Proxy:
        return self._binary("matmul", other)

    def __rmatmul__(self, other: object) -> Proxy:
        return self._binary("matmul", other, True)

    def __and__(self, other: object) -> Proxy:
        return self._binary("bitwise_and", other)

    def __rand__(self, other: object) -> Proxy:
        return self._binary("bitwise_and", other, True)

    def __or__(self, other: object) -> Proxy:
        return self._binary("bitwise_or", other)

    def __ror__(self, other: object) -> Proxy:
        return self._binary("bitwise_or", other, True)

    def __xor__(self, other: object) -> Proxy:
        return self._binary("bitwise_xor", other)

    def __rxor__(self, other: object) -> Proxy:
        return self._binary("bitwise_xor", other, True)

    def __lshift__(self, other: object) -> Proxy:
        return self._binary("bitwise_left_shift", other)

    def __rlshift__(self, other: object) -> Proxy:
        return self._binary("bitwise_left_shift", other, True)

    def __rshift__(self, other: object) -> Proxy:
        return self._binary("bitwise_right_shift", other)

    def __rrshift__(self, other: object) -> Proxy:
        return self._binary("bitwise_right_shift", other, True)

    def __eq__(self, other: object) -> Proxy:  # type: ignore[override]
        if other is None or isinstance(other, str):
            return NotImplemented
        return self._binary("equal", other)

    def __ne__(self, other: object) -> Proxy:  # type: ignore[override]
        if other is None or isinstance(other, str):
            return NotImplemented
        return self._binary("not_equal", other)

    def __lt__(self, other: object) -> Proxy:
        return self._binary("less", other)

    def __le__(self, other: object) -> Proxy:
        return self._binary("less_equal", other)

    def __gt__(self, other: object) -> Proxy:
        return self._binary("greater", other)

    def __ge__(self, other: object) -> Proxy:
        return self._binary("greater_equal", other)

    def __neg__(self) -> Proxy:
        return self._unary("negative")

    def __pos__(self) -> Proxy:
        return self

    def __abs__(self) -> Proxy:
        return self._unary("abs")

    def __invert__(self) -> Proxy:
        return self._unary("bitwise_invert")

    # --- += and its kin: a new value, which remembers how it came to be -------------------------------------------
    # `site += v` becomes site.write(mode="add") when the result is assigned back to the place it was read from, so that
    # nothing has to be read and sent round. On a plain variable it makes a new value, as for any immutable object.

    def _augmented(self, op: str, other: object, mode: str, operand: object) -> Proxy:
        trace = self._trace
        place = _place_of(trace, self._node)
        if place is not None and not isinstance(operand, (bool, int, float, Proxy, Created)):
            changed = _lift_for_site(trace, place[1], operand)
            other = Proxy(trace, changed if other is operand else _lift_for_site(trace, place[1], other))
        else:
            changed = lift(trace, operand)
        result = self._binary(op, other)
        result._update = _Update(self._node, mode, changed)
        if place is not None:
            trace.updated.add(result._node)
        return result

    def __iadd__(self, other: object) -> Proxy:
        return self._augmented("add", other, "add", other)

    def __imul__(self, other: object) -> Proxy:
        return self._augmented("multiply", other, "mul", other)

    def __isub__(self, other: object) -> Proxy:
        if isinstance(other, (int, float)):
            return self._augmented("subtract", other, "add", -other)
        if isinstance(other, Created):
            return self._binary("subtract", other)
        if not isinstance(other, Proxy):
            other = as_array(other)
        if (other.dtype.kind if isinstance(other, Proxy) else "int") not in ("int", "float"):
            return self._binary("subtract", other)
        return self._augmented("subtract", other, "add", -other)

    def __itruediv__(self, other: object) -> Proxy:
        if isinstance(other, (int, float)) and not isinstance(other, bool) and abs(other) in _EXACT_DIVISORS:
            return self._augmented("divide", other, "mul", 1.0 / other)
        return self._binary("divide", other)  # x * (1 / v) may round differently: assigned back, it replaces

    if not TYPE_CHECKING:  # a checker is to find misspelt names itself

        def __getattr__(self, name: str) -> Any:
            raise habits.missing(self, name)


class Created:
    """Zeros, a range, an identity: an operation of no tensor, which joins the first trace whose value it meets."""

    __slots__ = ("_attrs", "_op", "_spec")
    __array_ufunc__ = None

    def __init__(self, op: OpSpec, attrs: Mapping[str, Attr]) -> None:
        spec = op.infer((), attrs)
        assert isinstance(spec, TensorSpec)
        self._op, self._attrs, self._spec = op, attrs, spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first."""
        return self._spec.shape

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self._spec.dtype

    def add_to(self, trace: BaseTrace) -> int:
        """The node of this value in `trace`."""
        return trace.builder.add(self._op.name, (), self._attrs)

    def _alone(self) -> TraceError:
        """What to say where this would have to be computed with outside any trace."""
        return TraceError(
            f"{self!r} belongs to no trace by itself, so nothing is computed from it alone: begin with {self._joined}"
        )

    @property
    def _joined(self) -> str:
        """How to write it as a value of a trace."""
        return "t.constant(...) of it, a value of the trace t"

    def __getitem__(self, index: object) -> Any:
        raise self._alone()

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[Any]:
        raise self._alone()

    def __getattr__(self, name: str) -> Any:
        shown = "" if name.startswith("_") else f" {self._alone()}"
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.{shown}")

    def __repr__(self) -> str:
        return f"<{self._spec} {self._op.name}, not in a trace yet>"


def _not_alone(name: str) -> Callable[..., Any]:
    def operator_of_created(self: Created, *others: object) -> Any:
        if any(isinstance(other, Proxy) for other in others):
            return NotImplemented  # the proxy knows the trace
        raise self._alone()

    operator_of_created.__name__ = name
    return operator_of_created


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _full in (f"__{_name}__", f"__r{_name}__"):
        setattr(Created, _full, _not_alone(_full))
for _full in ("__lt__", "__le__", "__gt__", "__ge__", "__neg__", "__abs__"):
    setattr(Created, _full, _not_alone(_full))


def lift(trace: BaseTrace, value: object) -> int:
    """The node of anything that may stand beside a proxy: a proxy of the same trace, a number, an array, a list.

    Raises:
        WrongTraceError: a proxy of another trace.
        DTypeError: not numbers.
    """
    if isinstance(value, Proxy):
        if value._trace is not trace:
            raise _wrong_trace(trace, value)
        return value._node
    if isinstance(value, (bool, int, float)):
        # numpy's float64 is a Python float by inheritance and is as weak as one
        return trace.builder.scalar(value if type(value) in (bool, int, float) else float(value))
    if isinstance(value, Created):
        return value.add_to(trace)
    return trace.builder.constant(to_data(numbers_of(value)))


def numbers_of(value: object, dtype: DType | None = None, what: str = "") -> NDArray[Any]:
    """`as_array`, whose refusals name the user's line and what the array is for."""
    try:
        return as_array(value, dtype)
    except DTypeError as error:
        error.message = what + error.message
        error.location = here()
        raise
    except TraceError:
        raise ArgumentError(
            f"{what}a {type(value).__name__} of values of a trace is no array; join them with pb.ops.stack([...])",
            location=here(),
        ) from None


def _wrong_trace(trace: BaseTrace, value: Proxy) -> WrongTraceError:
    other = value._trace
    what = other.builder.describe(value._node)
    if other.has_run:
        how = "use its .value here" if other.holds(value) else "save it there and use its .value here"
        return WrongTraceError(f"{what} belongs to a trace that has already run: {how}", location=here())
    return WrongTraceError(
        f"{what} belongs to another trace: make both runs in one trace (t.run(...) twice)", location=here()
    )


def write_site(
    trace: BaseTrace,
    run: int,
    site: str,
    items: tuple[IndexItem, ...],
    arrays: tuple[int, ...],
    value: object,
    step: int | None = None,
) -> None:
    """Appends the write that ``site[items] = value`` means; ``+=`` and ``*=`` of the same place add and scale there.

    Raises:
        GraphError: the value does not fit, or the site cannot be written.
    """
    builder = trace.builder
    mode = "set"
    if isinstance(value, Proxy):
        node = lift(trace, value)
        update = value._update
        if update is not None and _place_of(trace, update.target) == (run, site, items, arrays, step):
            read = builder.nodes[update.target]
            first = update.target if read.op == "site.read" else read.args[0]
            if not builder.written_since(run, site, first):
                mode, node = update.mode, update.operand
                trace.updated.discard(value._node)
    elif isinstance(value, (bool, int, float, Created)):
        node = lift(trace, value)
    else:
        node = _lift_for_site(trace, site, value)
    attrs: dict[str, Attr] = {"site": site, "mode": mode, "index": items}
    builder.add("site.write", (node, *arrays), attrs if step is None else {**attrs, "step": step}, run)


def _place_of(trace: BaseTrace, node: int) -> tuple[int | None, str, Any, tuple[int, ...], Attr] | None:
    """Run, site, index and step of a value read at a site, whole or indexed once; None for any other value."""
    nodes = trace.builder.nodes
    made = nodes[node]
    if made.op == "site.read":
        return made.run, str(made.attrs["site"]), (), (), made.attrs.get("step")
    if made.op == INDEX_OP and nodes[made.args[0]].op == "site.read":
        read = nodes[made.args[0]]
        return read.run, str(read.attrs["site"]), made.attrs["index"], made.args[1:], read.attrs.get("step")
    return None


def _lift_for_site(trace: BaseTrace, site: str, value: object) -> int:
    """An array written at a site: integers and masks take the site's dtype, doubles are narrowed to it."""
    array = numbers_of(value, what=f"write at {site}: ")
    held = trace.builder.card.site(site).dtype
    if held.is_floating and (array.dtype.kind in "biu" or (array.dtype.itemsize == 8 and held.itemsize < 8)):
        array = as_array(array, held)
    return trace.builder.constant(to_data(array))


def not_saved(proxy: Proxy) -> ValueNotReadyError:
    """The error for a value that its trace did not ask for."""
    return ValueNotReadyError(
        f"{proxy._trace.builder.describe(proxy._node)} was not saved: call .save() on it inside the trace"
    )
