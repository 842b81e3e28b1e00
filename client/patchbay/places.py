"""Where in the user's program something happened: the nearest line that is not the client's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypeVar

from patchbay.errors import GraphError, TraceError

if TYPE_CHECKING:
    from types import CodeType, FrameType

P = ParamSpec("P")
R = TypeVar("R")

#: Where the client's own code lies.
PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
#: Code object and line, made into text only when somebody asks.
Place: TypeAlias = "tuple[CodeType, int] | None"


def users_place() -> Place:
    """Where the user's code is that called into the package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return None if frame is None else (frame.f_code, frame.f_lineno)


def here() -> str | None:
    """``file:line`` of the user's code that called into the package."""
    return show_place(users_place())


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


def show_place(place: Place) -> str | None:
    """A place as ``file:line``."""
    if place is None:
        return None
    name = place[0].co_filename
    return f"{name if name.startswith('<') else _relative(name)}:{place[1]}"


@lru_cache(maxsize=1024)
def _relative(path: str) -> str:
    """`path` from the working directory where that is shorter: what an editor's terminal makes clickable."""
    try:
        shorter = os.path.relpath(path)
    except (OSError, ValueError):
        return path
    return shorter if len(shorter) < len(path) else path
