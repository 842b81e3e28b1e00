"""`patchbay.function`: a Python function over values of a trace as a named, versioned part of any graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from patchbay.arguments import check_text, refused, seen
from patchbay.errors import TraceError
from patchbay.results import map_tree
from patchbay.tracing.namespaces import ModuleSites, SiteNamespace
from patchbay.tracing.proxy import Proxy

if TYPE_CHECKING:
    from patchbay.tracing.trace import BaseTrace

P = ParamSpec("P")
R = TypeVar("R")


class Function(Generic[P, R]):
    """A function whose nodes are named after it: ``print(t.graph)`` shows each use as one line.

    It is called like the function itself, in any trace of any model; the nodes that it makes become part of the graph.

    Attributes:
        name: what it is called in printed graphs.
        version: shown behind the name.
    """

    def __init__(self, body: Callable[P, R], name: str, version: str) -> None:
        functools.update_wrapper(self, body)
        self.name = name
        self.version = version
        self._body = body

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        trace = trace_of((args, kwargs))
        inside = nullcontext() if trace is None else trace.builder.fragment(self.name, self.version)
        with inside:
            return self._body(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return Function(functools.partial(self._body, instance), self.name, self.version)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<patchbay function {self.name}{f'@{self.version}' if self.version else ''}>"


@overload
def function(body: Callable[P, R], /) -> Function[P, R]: ...


@overload
def function(*, name: str | None = None, version: str = "") -> Callable[[Callable[P, R]], Function[P, R]]: ...


def function(body: Any = None, /, *, name: str | None = None, version: str = "") -> Any:
    """Makes a function over values of a trace a named part of the graphs that it is used in.

        @pb.function(version="2")
        def probe(x, w, b):
            return pb.ops.sigmoid(x @ w + b)

    Args:
        body: the function: it takes and returns proxies, runs, arrays, or trees of them.
        name: what to call it; its own name by default.
        version: what tells it from earlier ones of that name.

    Raises:
        TraceError: a name or version that would not read as one in a printed graph.
        ArgumentError: no function, or a name or version that is no text.
    """
    if isinstance(body, str):
        raise refused(f"function takes its name by keyword: @pb.function(name={body!r})")
    for what, given in (("name", name), ("version", version)):
        if given is not None:
            check_text(f"function: {what}", given)

    def decorate(body: Callable[P, R]) -> Function[P, R]:
        if not callable(body):
            raise refused(f"function makes a part of graphs out of a function, not {seen(body)}")
        called = name if name is not None else getattr(body, "__name__", type(body).__name__)
        if not called.isprintable() or not called or set(called) & set(" ()%=@") or not version.isprintable():
            raise TraceError(
                f"{called!r} (version {version!r}) is no name for a function; use letters, digits, '_', '.'"
            )
        return Function(body, called, version)

    return decorate if body is None else decorate(body)


def trace_of(tree: object) -> BaseTrace | None:
    """The trace of the first proxy, run or site namespace in a tree; None where there is none."""
    found: list[BaseTrace] = []

    def look(leaf: object, path: tuple[str, ...]) -> None:
        del path
        if isinstance(leaf, (Proxy, SiteNamespace, ModuleSites)):
            found.append(leaf._trace)
        elif hasattr(leaf, "builder") and hasattr(leaf.builder, "fragment"):
            found.append(leaf)  # type: ignore[arg-type]

    map_tree(tree, look)
    return found[0] if found else None
