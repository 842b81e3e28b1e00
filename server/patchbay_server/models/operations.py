"""Torch functions called inside a module, named by their place in the module's own source, and taps on them.

What a module computes between its submodules has no hook in torch. While a tap is attached, the module's forward runs
under a torch function mode that looks for one call: a named function, called from one instruction of the source, the
n-th time that instruction runs. Places are found in a recording of the same process, so nothing here names a model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

Handler: TypeAlias = "Callable[[torch.Tensor], torch.Tensor | None]"
#: Takes the place of a call: the function, its arguments and keywords.
Replacement: TypeAlias = "Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]"
_Entry: TypeAlias = "tuple[OpPlace, int | str | None, Handler | None, Replacement | None]"

_TORCH = os.path.dirname(torch.__file__) + os.sep

#: Attribute of a module that holds its interceptor while taps are attached.
_INTERCEPTOR = "_patchbay_interceptor"

#: As an occurrence: each time.
EVERY = -1

#: Python's spellings of operators -> the function's name.
_OPERATORS = {"truediv": "div", "rtruediv": "div", "itruediv": "div", "pow": "pow", "ipow": "pow"}


@dataclass(frozen=True)
class OpPlace:
    """One call of a torch function in the source of the model.

    Attributes:
        name: the function's name without decoration (``add`` for ``+``, ``+=`` and ``torch.add``).
        file: the source file that calls it.
        function: name of the calling Python function.
        offset: the instruction in it.
        occurrence: how often the instruction had run before in the same call of the module.
    """

    name: str
    file: str
    function: str
    offset: int
    occurrence: int

    @property
    def at(self) -> tuple[str, str, str, int]:
        """The place without the occurrence."""
        return self.name, self.file, self.function, self.offset

    def __str__(self) -> str:
        again = f", call {self.occurrence + 1}" if self.occurrence else ""
        return f"{self.name} in {self.function} of {os.path.basename(self.file)}{again}"


def op_name(function: Callable[..., Any]) -> str:
    """The plain name of a torch function: ``add`` for ``Tensor.__radd__``, ``T`` for the property of that name."""
    name: str = getattr(function, "__name__", "") or type(function).__name__
    if name == "__get__":
        return str(getattr(getattr(function, "__self__", None), "__name__", "get"))
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name in _OPERATORS:
            return _OPERATORS[name]
        if name[:1] in "ri" and name[1:] in ("add", "sub", "mul", "matmul", "pow"):
            return name[1:]
        return name
    return name.removesuffix("_") or name


def calling_frame() -> tuple[str, str, int]:
    """File, function and instruction of the innermost caller outside torch and outside the function modes."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_code.co_name, frame.f_lasti


class _Interceptor(TorchFunctionMode):
    """Active during one module's forward; hands the wanted calls to their handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[_Entry] = []
        self._counts: dict[tuple[str, str, str, int], int] = {}
        self._names: frozenset[str] = frozenset()
        self.active = False

    def enter(self) -> None:
        self._counts = {}
        self._names = frozenset(place.name for place, *_ in self.entries)
        self.active = True
        self.__enter__()

    def leave(self) -> None:
        if self.active:
            self.active = False
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = op_name(func)
        if name not in self._names:
            return func(*args, **named)
        key = (name, *calling_frame())
        occurrence = self._counts.get(key, 0)
        self._counts[key] = occurrence + 1
        here = [e for e in self.entries if e[0].at == key and e[0].occurrence in (occurrence, EVERY)]
        if not here:
            return func(*args, **named)
        for _, argument, handler, _ in here:
            if argument is None or handler is None:
                continue
            if isinstance(argument, int):
                new = handler(args[argument])
                if new is not None:
                    args = (*args[:argument], new, *args[argument + 1 :])
            elif (new := handler(named[argument])) is not None:
                named = {**named, argument: new}
        instead = next((e[3] for e in here if e[3] is not None), None)
        output = func(*args, **named) if instead is None else instead(func, args, named)
        for _, argument, handler, _ in here:
            if argument is None and handler is not None and (new := handler(output)) is not None:
                output = new
        return output


class _OpHandle:
    """Removes one operation tap; the last one of a module takes the mode's hooks along."""

    def __init__(self, module: torch.nn.Module, entry: _Entry) -> None:
        self._module, self._entry = module, entry

    def remove(self) -> None:
        held = self._module.__dict__.get(_INTERCEPTOR)
        if held is None:
            return
        interceptor, hooks = held
        interceptor.entries = [e for e in interceptor.entries if e is not self._entry]
        if not interceptor.entries:
            interceptor.leave()
            for hook in hooks:
                hook.remove()
            del self._module.__dict__[_INTERCEPTOR]


def intercept(module: torch.nn.Module, place: OpPlace, argument: int | str | None, handler: Handler) -> _OpHandle:
    """Call `handler` with an operation's output, or with one of its arguments, until the handle is removed.

    Args:
        module: the module whose call runs the operation.
        place: which operation.
        argument: position or keyword of the argument that is meant; None for the output.
        handler: called with the tensor; returns its replacement or None.
    """
    return _enter(module, (place, argument, handler, None))


def replace_call(module: torch.nn.Module, place: OpPlace, replacement: Replacement) -> _OpHandle:
    """Let `replacement` take the place of an operation until the handle is removed.

    Args:
        module: the module whose call runs the operation.
        place: which operation; of several replacements of one, the first acts.
        replacement: called with the function, its arguments and its keywords; returns what the function would.
    """
    return _enter(module, (place, None, None, replacement))


def intercepted(model: torch.nn.Module, path: str) -> bool:
    """Whether operations inside the module `path`, or around it, have taps attached."""
    around = path
    while True:
        if _INTERCEPTOR in model.get_submodule(around).__dict__:
            return True
        if not around:
            return False
        around = around.rpartition(".")[0]


def _enter(module: torch.nn.Module, entry: _Entry) -> _OpHandle:
    held = module.__dict__.get(_INTERCEPTOR)
    if held is None:
        interceptor = _Interceptor()

        def before(module: torch.nn.Module, args: Any) -> None:
            del module, args
            interceptor.enter()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args, output
            interceptor.leave()

        hooks = (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after, always_call=True, prepend=True),
        )
        held = module.__dict__[_INTERCEPTOR] = (interceptor, hooks)
    held[0].entries.append(entry)
    return _OpHandle(module, entry)
