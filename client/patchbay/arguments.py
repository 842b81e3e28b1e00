"""Checks of what users hand to functions of the client: a refusal says what was wanted, what was seen, and where."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from patchbay.errors import ArgumentError
from patchbay.ir.card import OPTIMISATIONS
from patchbay.ir.events import ExecuteOptions
from patchbay.places import here

#: Characters of a name that is sent.
MAX_NAME_CHARS = 1024
#: Three years; clocks of transports end somewhere above.
MAX_TIMEOUT_S = 100_000_000


def refused(message: str) -> ArgumentError:
    """The error for an argument, with the user's line; for use in the user's own thread."""
    return ArgumentError(message, location=here())


def seen(value: object, limit: int = 80) -> str:
    """What was given, in a few words: ``the str 'early_stop'``."""
    text = repr(value)
    if value is None:
        return text
    return f"the {type(value).__name__} {text if len(text) <= limit else text[: limit - 3] + '...'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'softmax'?``, or nothing where no name is near."""
    import difflib  # only for a mistake

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_function(what: str, fn: object, *takes: str) -> None:
    """
    Args:
        what: whose argument it is, and which: ``scan: fn``.
        fn: the function.
        takes: names of what it will be called with.

    Raises:
        ArgumentError: it is no function, or cannot be called with that many arguments.
    """
    call = f"({', '.join(takes)})"
    if not callable(fn):
        raise refused(f"{what} is a function of {call}, not {seen(fn)}")
    import inspect

    try:
        shown = inspect.signature(fn)
    except (TypeError, ValueError):  # of some built in C nothing is known
        return
    try:
        shown.bind(*takes)
    except TypeError as error:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise refused(f"{what} is called with {call}, and {name}{shown} cannot be: {error}") from None


def check_callback(what: str, fn: object) -> None:
    """
    Raises:
        ArgumentError: it is neither None nor a function.
    """
    if fn is not None and not callable(fn):
        raise refused(f"{what} is a function, not {seen(fn)}")


def integer(what: str, value: Any, *, least: int | None = None) -> int:
    """`value` as a Python integer; those of numpy are taken too.

    Raises:
        ArgumentError: it is no integer, or less than `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        wanted = "an integer" if least is None else f"an integer from {least} up"
        raise refused(f"{what} is {wanted}, not {seen(value)}")
    return number


def real(what: str, value: Any, *, least: float | None = None) -> float:
    """`value` as a Python float.

    Raises:
        ArgumentError: it is no number, not finite, or less than `least`.
    """
    try:
        number = None if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not math.isfinite(number) or (least is not None and number < least):
        wanted = "a number" if least is None else f"a number from {least:g} up"
        raise refused(f"{what} is {wanted}, not {seen(value)}")
    return number


def flag(what: str, value: Any) -> bool:
    """`value` as a Python bool.

    Raises:
        ArgumentError: it is neither True nor False.
    """
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise refused(f"{what} is True or False, not {seen(value)}")


def check_text(what: str, value: object) -> None:
    """
    Raises:
        ArgumentError: it is no text, or one that cannot be sent.
    """
    if not isinstance(value, str):
        raise refused(f"{what} is a text, not {seen(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused(f"{what} holds half a character (a lone surrogate): {seen(value)}") from None


def check_name(what: str, value: object) -> None:
    """
    Raises:
        ArgumentError: it is no text, an empty one, or a long one.
    """
    check_text(what, value)
    if not 0 < len(str(value)) <= MAX_NAME_CHARS:
        raise refused(f"{what} has 1 to {MAX_NAME_CHARS} characters, not {len(str(value))}")


def check_path(what: str, value: object) -> None:
    """
    Raises:
        ArgumentError: it is no path; a number would be taken for an open file.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise refused(f"{what} is a path, not {seen(value)}")


def check_names(what: str, given: Mapping[str, object], known: Collection[str]) -> None:
    """
    Raises:
        ArgumentError: an argument of a name that is not known.
    """
    for name in given:
        if name not in known:
            raise refused(f"{what} has no argument {name!r}{nearest(name, known) or '; it has: ' + ', '.join(known)}")


def options(deterministic: Any, disabled: Any, attributes: Mapping[str, str]) -> ExecuteOptions:
    """How to run a graph.

    Args:
        deterministic, disabled: as for `patchbay.Model.trace`.
        attributes: of the model's card, which may say what can be disabled.

    Raises:
        ArgumentError: `disabled` is no list of names, or names what the server does not know.
    """
    if isinstance(disabled, str) or not isinstance(disabled, Iterable):
        raise refused(f"disabled is a list of names of optimisations, not {seen(disabled)}")
    names = tuple(disabled)
    known = [name for name in attributes.get(OPTIMISATIONS, "").split(", ") if name]
    for name in names:
        check_text("each name in disabled", name)
        if known and name not in known:
            hint = nearest(name, known) or f" (there are: {', '.join(known)})"
            raise refused(f"disabled: no optimisation is called {name!r}{hint}")
    return ExecuteOptions(flag("deterministic", deterministic), names)


def check_timeout(timeout_s: Any) -> None:
    """
    Raises:
        ArgumentError: it is neither None nor a number of seconds.
    """
    if timeout_s is not None and not 0 < real("timeout_s", timeout_s, least=0) <= MAX_TIMEOUT_S:
        raise refused(f"timeout_s is a number of seconds above 0, at most {MAX_TIMEOUT_S:,}, not {seen(timeout_s)}")


def check_graph(graph: object) -> None:
    """
    Raises:
        ArgumentError: it is no graph.
    """
    from patchbay.ir.graph import Graph

    if not isinstance(graph, Graph):
        known = ", its graph: model.run(t.graph)" if hasattr(graph, "graph") else ""
        raise refused(f"run takes a graph, such as pb.load_graph gives{known}; not {seen(graph)}")
