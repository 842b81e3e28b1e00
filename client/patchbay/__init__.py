"""Patchbay: causal experiments inside a large model that runs somewhere else.

    import patchbay as pb

    model = pb.connect("localhost:9000").model("demo")
    with model.trace("The capital of France is") as run:
        h = run.blocks[2].resid_post[:, -1].save()
    h.value

Every public name loads on first use: importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from patchbay._version import __version__

if TYPE_CHECKING:
    from patchbay import errors, ops
    from patchbay.client import AsyncClient, Client, connect, connect_async, local
    from patchbay.errors import GraphError, PatchbayError, ServiceError, TraceError
    from patchbay.ir.card import ModelCard, SiteSpec
    from patchbay.ir.graph import Graph
    from patchbay.model import AsyncModel, Model
    from patchbay.results import Results
    from patchbay.saving import load_graph, save_graph
    from patchbay.tokens import Tokens
    from patchbay.tracing import (
        Artifact,
        AsyncTrace,
        Proxy,
        Run,
        Trace,
        cond,
        function,
        grad,
        scan,
        vmap,
        where,
    )

__all__ = [
    "Artifact",
    "AsyncClient",
    "AsyncModel",
    "AsyncTrace",
    "Client",
    "Graph",
    "GraphError",
    "Model",
    "ModelCard",
    "PatchbayError",
    "Proxy",
    "Results",
    "Run",
    "ServiceError",
    "SiteSpec",
    "Tokens",
    "Trace",
    "TraceError",
    "__version__",
    "cond",
    "connect",
    "connect_async",
    "errors",
    "function",
    "grad",
    "load_graph",
    "local",
    "ops",
    "save_graph",
    "scan",
    "vmap",
    "where",
]

_HOMES = {
    "Artifact": "tracing",
    "AsyncClient": "client",
    "AsyncModel": "model",
    "AsyncTrace": "tracing",
    "Client": "client",
    "Graph": "ir.graph",
    "GraphError": "errors",
    "Model": "model",
    "ModelCard": "ir.card",
    "PatchbayError": "errors",
    "Proxy": "tracing",
    "Results": "results",
    "Run": "tracing",
    "ServiceError": "errors",
    "SiteSpec": "ir.card",
    "Tokens": "tokens",
    "Trace": "tracing",
    "TraceError": "errors",
    "cond": "tracing",
    "connect": "client",
    "connect_async": "client",
    "function": "tracing",
    "grad": "tracing",
    "load_graph": "saving",
    "local": "client",
    "save_graph": "saving",
    "scan": "tracing",
    "vmap": "tracing",
    "where": "tracing",
}
_MODULES = frozenset({"datasets", "errors", "methods", "ops", "plots", "reduce", "testing"})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"patchbay.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"patchbay.{name}")
    else:
        import difflib  # only for a mistake

        near = difflib.get_close_matches(name, __dir__(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'patchbay' has no attribute {name!r}{hint}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
