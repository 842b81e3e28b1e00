"""Where in the user's program something happened: the nearest line that is not the client's own."""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Coroutine
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from patchbay.errors import GraphError, TraceError

if TYPE_CHECKING:
    from types import CodeType, FrameType

P = ParamSpec("P")
R = TypeVar("R")

#: Where the client's own code lies.
PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
#: Code object and instruction, made into text only when somebody asks: a frame's own line number is found by counting
#: from the beginning of its function, which in a long script takes longer than everything else about a node.
Place: TypeAlias = "tuple[CodeType, int] | None"


def users_place() -> Place:
    """Where the user's code is that called into the package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lasti)


def here() -> str | None:
    """``file:line`` of the user's code that called into the package."""
    return show_place(users_place())


def stack_level() -> int:
    """What ``warnings.warn`` of the caller takes as `stacklevel` to name the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


def located(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose errors about graphs and traces name the user's line; called in the user's own thread."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (GraphError, TraceError) as error:
            error.location = error.location or here()
            raise

    return call


def located_awaited(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """`located` for a coroutine function; the user's line is the one that awaits."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await function(*args, **kwargs)
        except (GraphError, TraceError) as error:
            error.location = error.location or here()
            raise

    return call


def show_place(place: Place) -> str | None:
    """A place as ``file:line``."""
    if place is None:
        return None
    code, instruction = place
    name = code.co_filename
    starts, lines = _lines(id(code), code)
    line = lines[max(0, bisect_right(starts, instruction) - 1)]
    return f"{name if name.startswith('<') else _relative(name)}:{line}"


@lru_cache(maxsize=64)
def _lines(identity: int, code: CodeType) -> tuple[list[int], list[int]]:
    """Where the instructions of each line begin, and the lines."""
    del identity  # codes that differ in nothing but their lines may be equal
    found = [(start, code.co_firstlineno if line is None else line) for start, _, line in code.co_lines()]
    return [start for start, _ in found], [line for _, line in found]


@lru_cache(maxsize=1024)
def _relative(path: str) -> str:
    """`path` from the working directory where that is shorter: what an editor's terminal makes clickable."""
    try:
        shorter = os.path.relpath(path)
    except (OSError, ValueError):
        return path
    return shorter if len(shorter) < len(path) else path
