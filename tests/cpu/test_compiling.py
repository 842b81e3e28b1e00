"""Compiled layers: used where nothing is looked at inside a layer, and never seen in a value."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from patchbay.ir.events import Event, ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay_server.engine import Engine
from patchbay_server.kernels import to_tensor
from patchbay_server.models.compiling import CompiledLayers
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.loader import host
from tests.tiny import N_LAYERS, build

RUN = Run(((1, 5, 9, 3, 7), (2, 2, 8, 30, 11)))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def hosted(request: pytest.FixtureRequest) -> HostedModel:
    """A model whose layers torch has traced; nothing is generated from the trace, so that no compiler is needed."""
    return host(build(request.param)).with_compiled_layers(backend="eager")


def run(hosted: HostedModel, *nodes: Node, **options: Any) -> tuple[torch.Tensor, Usage]:
    engine = Engine(hosted)
    events: list[Event] = []
    graph = Graph((RUN,), nodes, (Output("out", len(nodes) - 1),))
    usage = engine.run(engine.prepare(graph, ExecuteOptions(**options)), events.append)
    (value,) = [to_tensor(e.value) for e in events if isinstance(e, TensorValue)]
    return value, usage


def read(site: str) -> Node:
    return Node("site.read", (), {"site": site}, 0)


def doubled(site: str) -> tuple[Node, ...]:
    two = Node("const", (), {"scalar": 2.0})
    return two, Node("site.write", (0,), {"site": site, "mode": "mul"}, 0), read("logits")


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ((read("logits"),), N_LAYERS),
        ((read("blocks.1.resid_post"),), N_LAYERS),
        (doubled("blocks.1.resid_post"), N_LAYERS),
        (doubled("blocks.1.mlp_out"), N_LAYERS - 1),
        (doubled("blocks.1.attn.pattern"), N_LAYERS - 1),
        (doubled("blocks.0.attn.q"), N_LAYERS - 1),
        (doubled("blocks.2.ln1.scale"), N_LAYERS - 1),
    ],
    ids=["logits", "border", "written border", "mlp", "pattern", "heads", "norm"],
)
def test_layers_run_compiled_unless_something_is_attached_inside(
    hosted: HostedModel, nodes: tuple[Node, ...], count: int
) -> None:
    """The values are those of the plain path, and usage counts the layers that were there compiled."""
    value, usage = run(hosted, *nodes)
    plain, plain_usage = run(hosted, *nodes, disabled=("compile",))
    torch.testing.assert_close(value, plain, rtol=1e-5, atol=1e-5)
    assert usage.saved["compile"] == count
    assert "compile" not in plain_usage.saved


def test_an_exact_request_never_takes_compiled_layers(hosted: HostedModel) -> None:
    """`deterministic` promises the forward that one would make by hand."""
    value, usage = run(hosted, read("logits"), deterministic=True)
    with torch.no_grad():
        by_hand = hosted.model(input_ids=torch.tensor(RUN.tokens), use_cache=False).logits
    assert torch.equal(value, by_hand)
    assert "compile" not in usage.saved


def test_nothing_stays_on_the_model(hosted: HostedModel) -> None:
    """After a request the layers' own forwards are back, also after one that stopped early."""
    run(hosted, read("blocks.0.resid_post"))
    assert not [path for path in hosted.layers if "forward" in hosted.model.get_submodule(path).__dict__]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for CPUs needs g++")
def test_generated_code_computes_the_same() -> None:
    """With torch's real compiler, logits under an edit equal the plain path's."""
    plain_model = host(build("llama"))
    hosted = replace(plain_model, compiled=CompiledLayers(plain_model.model, plain_model.layers[1:2]))  # one takes 10 s
    value, usage = run(hosted, *doubled("blocks.1.resid_post"))
    plain, _ = run(hosted, *doubled("blocks.1.resid_post"), disabled=("compile",))
    torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-5)
    assert usage.saved["compile"] == 1
