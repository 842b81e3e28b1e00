"""What a researcher touches: traces, runs and proxies that write an intervention graph down while ordinary Python runs.

builder.py     appends nodes, each checked and located at once; joins the user's lines to errors
indexing.py    ``x[...]`` as data
proxy.py       the value that stands for one still to be computed
gradients.py   `patchbay.grad`
scopes.py      functions under trace, cut out as bodies of the graph
trees.py       tuples, lists and dicts of values, taken apart and put together
control.py     `patchbay.scan`, `cond`, `vmap`, `where`
fragments.py   `patchbay.function`
params.py      ``t.params[name]``: weights
artifacts.py   tensors that stay on the server, as constants
functions.py   one Python function per OpSpec: what `patchbay.ops` and the proxies' methods are made of
namespaces.py  ``run.blocks[3].attn.pattern``: sites as attributes
runs.py        one forward: its tokens, positions and sites
trace.py       the `with` block: collects saves, verifies, sends, hands results out
"""

from __future__ import annotations

from patchbay.tracing import functions  # gives proxies their methods
from patchbay.tracing.artifacts import Artifact
from patchbay.tracing.async_trace import AsyncTrace
from patchbay.tracing.control import cond, scan, vmap, where
from patchbay.tracing.fragments import Function, function
from patchbay.tracing.gradients import grad
from patchbay.tracing.proxy import Proxy
from patchbay.tracing.runs import Run
from patchbay.tracing.sync_trace import Trace

__all__ = [
    "Artifact",
    "AsyncTrace",
    "Function",
    "Proxy",
    "Run",
    "Trace",
    "cond",
    "function",
    "functions",
    "grad",
    "scan",
    "vmap",
    "where",
]
