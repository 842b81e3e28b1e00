"""The public names of the package are frozen, and importing it loads none of what is heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import patchbay as pb

PUBLIC = [
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


def test_public_names_are_frozen() -> None:
    """Adding or removing one is a decision: it changes this list."""
    assert pb.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(pb))


def test_every_public_name_loads_and_is_documented() -> None:
    """Each is there, under its own name, with a docstring."""
    for name in PUBLIC:
        value = getattr(pb, name)
        assert value is not None
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), name


def test_unknown_names_are_attribute_errors() -> None:
    """As for any module; a near miss names the right one."""
    assert not hasattr(pb, "no_such_name")
    with pytest.raises(AttributeError, match="did you mean 'connect'"):
        getattr(pb, "connekt")  # noqa: B009
    with pytest.raises(AttributeError, match="did you mean 'softmax'"):
        getattr(pb.ops, "sofmax")  # noqa: B009
    assert not hasattr(pb.ops, "no_such_operation")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_importing_loads_nothing_heavy() -> None:
    """Neither numpy nor gRPC come with `import patchbay`, nor with a client that has not called yet."""
    heavy = "{'numpy', 'grpc', 'google.protobuf', 'ml_dtypes', 'msgpack', 'asyncio', 'torch', 'ray', 'transformers'}"
    assert run_python(f"import sys, patchbay; print(sorted({heavy} & set(sys.modules)))") == "[]"
    later = "{'numpy', 'grpc', 'torch', 'ray', 'transformers'}"
    use = "pb.connect('localhost:1'); pb.ops; pb.Trace"
    assert run_python(f"import sys, patchbay as pb; {use}; print(sorted({later} & set(sys.modules)))") == "[]"
