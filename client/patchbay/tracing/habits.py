"""What numpy and torch call things: the same functions under their names, and hints where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from patchbay.errors import ArgumentError, MissingAttributeError, ProxyBoolError
from patchbay.places import here
from patchbay.results import map_tree

if TYPE_CHECKING:
    from patchbay.tracing.proxy import Proxy

#: Operations by the names that numpy and torch give them, where those differ from the array API's.
OPERATIONS: Mapping[str, str] = MappingProxyType(
    {
        "absolute": "abs",
        "amax": "max",
        "amin": "min",
        "arccos": "acos",
        "arccosh": "acosh",
        "arcsin": "asin",
        "arcsinh": "asinh",
        "arctan": "atan",
        "arctan2": "atan2",
        "arctanh": "atanh",
        "bitwise_not": "bitwise_invert",
        "cat": "concat",
        "clamp": "clip",
        "concatenate": "concat",
        "cumprod": "cumulative_prod",
        "cumsum": "cumulative_sum",
        "div": "divide",
        "expand": "broadcast_to",
        "gather": "take_along_axis",
        "ge": "greater_equal",
        "gt": "greater",
        "index_select": "take",
        "invert": "bitwise_invert",
        "le": "less_equal",
        "left_shift": "bitwise_left_shift",
        "lt": "less",
        "mm": "matmul",
        "bmm": "matmul",
        "dot": "matmul",
        "mod": "remainder",
        "movedim": "moveaxis",
        "mul": "multiply",
        "ne": "not_equal",
        "neg": "negative",
        "norm": "vector_norm",
        "permute": "permute_dims",
        "power": "pow",
        "right_shift": "bitwise_right_shift",
        "rint": "round",
        "sub": "subtract",
        "swapdims": "swapaxes",
        "transpose": "swapaxes",
        "true_divide": "divide",
        "unsqueeze": "expand_dims",
        "view": "reshape",
        "flatten": "reshape",
    }
)
#: Arguments of operations by torch's names.
ARGUMENTS: Mapping[str, str] = MappingProxyType({"dim": "axis", "dims": "axis", "keepdim": "keepdims", "input": "x"})

_VALUE = "the number is known after the trace has run: save this, and use its .value below the with block"
_CAST = "cast with .astype('float32')"
_SAME = "values never change, so none needs a copy: use it as it is"
_THERE = "values are where the model is; what is saved comes back as numpy arrays"
_GRADIENT = "gradients are values of the trace: pb.grad(metric, wrt=value)"
_HINTS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("item", "numpy", "tolist"), _VALUE)
    | dict.fromkeys(("bfloat16", "bool", "double", "float", "half", "int", "long", "type"), _CAST)
    | dict.fromkeys(("clone", "contiguous", "copy"), _SAME)
    | dict.fromkeys(("cpu", "cuda", "device", "to"), _THERE)
    | dict.fromkeys(("backward", "grad", "requires_grad", "requires_grad_", "retain_grad"), _GRADIENT)
    | {
        "detach": "pb.ops.stop_gradient keeps gradients from going through",
        "dim": "it has .ndim",
        "numel": "it has .size",
        "nelement": "it has .size",
        "skip": "blocks, attention and MLPs are skipped, not values: run.blocks[3].attn.skip()",
    }
)


def missing(proxy: Proxy, name: str) -> MissingAttributeError:
    """The error for an attribute that no value has, with what to use instead."""
    if name.startswith("_"):  # numpy and notebooks ask for dozens
        return MissingAttributeError(f"a value of a trace has no attribute {name!r}")
    from patchbay.arguments import nearest
    from patchbay.tracing.functions import functions, methods

    known = OPERATIONS.get(name)
    if name in _HINTS:
        hint = f"; {_HINTS[name]}"
    elif known is not None:
        hint = f"; it is called {known!r} here"
    elif name in functions():
        hint = f"; it is the function pb.ops.{name}"
    else:
        hint = nearest(name, [*methods(), "save", "value", "shape", "dtype", "ndim", "size"])
        hint = hint or "; functions: dir(patchbay.ops), and most of them as methods"
    if proxy._trace.has_run:
        hint = "; the trace has run, and the numbers of what was saved are in .value, a numpy array"
    return MissingAttributeError(f"a value of a trace has no attribute {name!r}{hint}", location=here())


def numpy_ufunc(ufunc: Any, method: str, inputs: Sequence[object], kwargs: Mapping[str, object]) -> Any:
    """``np.exp(x)``, ``array * x``: the operation of that name; of values that are known, what numpy makes of them."""
    values = _known(inputs)
    if values is not None:
        return getattr(ufunc, method)(*values, **kwargs)
    if "out" in kwargs:
        raise ArgumentError(
            "a value of a trace cannot be put into an array: write total = total + value, which makes a new value",
            location=here(),
        )
    operation = _operation(ufunc.__name__)
    if operation is None or method != "__call__" or kwargs:
        shown = ufunc.__name__ + ("" if method == "__call__" else f".{method}")
        raise _unknown(f"numpy.{shown}", ufunc.__name__)
    return operation(*inputs)


def numpy_function(function: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
    """``np.mean(x)``: what numpy makes of values that are known.

    Raises:
        ProxyBoolError: they are known only after the trace has run.
    """
    values = _known((args, kwargs))
    if values is None:
        raise _unknown(f"numpy.{function.__name__}", function.__name__)
    return function(*values[0], **values[1])


def torch_function(function: Any, args: object) -> ProxyBoolError:
    """The error for ``torch.softmax(x, -1)``. Beside operators torch then asks the value itself."""
    name = getattr(function, "__name__", "?")
    if _known(args) is not None:
        return ProxyBoolError(f"torch.{name} takes tensors: torch.from_numpy(value.value)", location=here())
    return _unknown(f"torch.{name}", name)


def _known(tree: Any) -> Any:
    """`tree` with saved values as arrays; None where a value is of a trace that has not run."""
    from patchbay.tracing.proxy import Proxy

    waits: list[Proxy] = []

    def number(leaf: object, path: tuple[str, ...]) -> object:
        del path
        if isinstance(leaf, Proxy):
            if leaf._trace.has_run:
                return leaf.value
            waits.append(leaf)
        return leaf

    values = map_tree(tree, number)
    return None if waits else values


def _operation(name: str) -> Callable[..., Any] | None:
    from patchbay.tracing.functions import functions

    return functions().get(OPERATIONS.get(name, name))


def _unknown(what: str, name: str) -> ProxyBoolError:
    renamed = OPERATIONS.get(name, name)
    hint = f"pb.ops.{renamed}" if _operation(name) is not None else "a function of pb.ops (dir(pb.ops) lists them)"
    return ProxyBoolError(
        f"{what} needs the numbers, which are known only after the trace has run; inside the trace use {hint}",
        location=here(),
    )
