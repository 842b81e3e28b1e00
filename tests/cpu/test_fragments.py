"""Named functions over values and edited models, against plain hooks and models changed by hand."""

from __future__ import annotations

import asyncio
import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import ShapeError, TraceError
from patchbay.model import AsyncModel, Model
from tests.tiny import D_MLP, D_MODEL, build, places, run_hooked

IDS, OTHER = [1, 5, 9, 3, 7], [2, 2, 8, 30]
N_FEATURES = 40
RNG = np.random.default_rng(0)
W_ENC = RNG.standard_normal((D_MODEL, N_FEATURES)).astype(np.float32) / 4
W_DEC = RNG.standard_normal((N_FEATURES, D_MODEL)).astype(np.float32) / 4
B_ENC = RNG.standard_normal(N_FEATURES).astype(np.float32) / 4
LORA_A = RNG.standard_normal((D_MLP, 2)).astype(np.float32) / 4
LORA_B = RNG.standard_normal((2, D_MODEL)).astype(np.float32) / 4


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


@pb.function(version="1")
def encode(x: Any) -> Any:
    """Features of an SAE."""
    return pb.ops.relu(x @ W_ENC + B_ENC)


@pb.function
def decode(features: Any) -> Any:
    """What the features stand for."""
    return features @ W_DEC


def splice(run: Any) -> Any:
    """An SAE in the stream with feature 3 off; what it does not explain is put back."""
    x = run.blocks[1].resid_post
    features = encode(x)
    error = x - decode(features)
    edited = pb.ops.set_index(features, (..., 3), 0.0)
    run.blocks[1].resid_post = decode(edited) + error
    return features


def lora(run: Any) -> None:
    """Two ranks more on a down projection, by the module's path."""
    down = run.module("model.layers.1.mlp.down_proj")
    down.output = down.output + (down.input @ LORA_A) @ LORA_B * 0.5


def last_logits(model: Model, ids: list[int] = IDS) -> np.ndarray:
    with model.trace(ids) as run:
        run.save(out=run.logits)
    return np.asarray(run.results["out"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_sae_with_its_error_term(family: str) -> None:
    """Spliced in by functions, it does what the same arithmetic in a plain hook does."""
    with model_of(family).trace([IDS, OTHER + [4]]) as run:
        run.save(features=splice(run), logits=run.logits)

    def by_hand(x: torch.Tensor) -> None:
        features = torch.relu(x @ torch.from_numpy(W_ENC) + torch.from_numpy(B_ENC))
        error = x - features @ torch.from_numpy(W_DEC)
        features[..., 3] = 0.0
        x.copy_(features @ torch.from_numpy(W_DEC) + error)

    ids = torch.tensor([IDS, OTHER + [4]])
    expected = run_hooked(build(family), places(family), ids, [("blocks.1.resid_post", by_hand)], "logits")
    np.testing.assert_allclose(run.results["logits"], expected.numpy(), rtol=1e-4, atol=1e-5)
    assert (run.results["features"][..., 3] > 0).any()


def test_a_function_is_one_line_of_the_printed_graph() -> None:
    """Its name and version, what it takes and gives (not its constants, whoever shares them); expanded, every node."""
    with model_of("llama").trace(IDS) as run:
        x = run.blocks[0].resid_post
        run.save(f=encode(x), back=decode(encode(run.blocks[1].resid_post)))
        graph = run.graph
    text = str(graph)
    assert "3 named parts" in text
    assert text.count("= encode@1(%") == 2 and text.count("= decode(%") == 1
    assert "relu" not in text and "float32[1, 5, 40]" in text
    results = [line.partition(" = ")[0].strip() for line in text.splitlines() if " = encode@1(" in line]
    assert results == [f"%{i}" for i, node in enumerate(graph.nodes) if node.op == "relu"]
    full = graph.text(expand=True)
    assert full.count("relu(") == 2 and "encode" not in full
    assert {n.op for n in graph.nodes} == {"site.read", "const", "matmul", "add", "relu"}


def test_functions_nest_and_say_what_they_write() -> None:
    """A function that uses others is one line, with its writes below."""
    named = pb.function(name="sae.splice", version="2")(splice)
    with model_of("llama").trace(IDS) as run:
        named(run)
        run.save(out=run.logits)
        text = str(run.graph)
    assert "sae.splice@2(" in text and "encode@1(" not in text
    assert "in sae.splice@2: run0.blocks[1].resid_post = %" in text


def test_a_function_is_still_the_function() -> None:
    """Name, docstring, arguments, methods; without values of a trace it just runs."""

    class Probe:
        weight = W_ENC[:, 0]

        @pb.function(version="3")
        def score(self, x: Any, *, bias: float = 0.0) -> Any:
            return pb.ops.sigmoid(x @ self.weight + bias)

    assert encode.__name__ == "encode" and encode.__doc__ == "Features of an SAE."
    assert repr(encode) == "<patchbay function encode@1>" and repr(decode) == "<patchbay function decode>"

    @pb.function
    def double(x: Any) -> Any:
        return x * 2

    assert double(21) == 42
    with model_of("llama").trace(IDS) as run:
        x = run.blocks[0].resid_post
        run.save(p=Probe().score(x, bias=1.0), x=x)
        assert "score@3(%" in str(run.graph)
    expected = 1 / (1 + np.exp(-(run.results["x"] @ W_ENC[:, 0] + 1.0)))
    np.testing.assert_allclose(run.results["p"], expected, rtol=1e-5)
    with pytest.raises(TraceError, match="no name"):
        pb.function(name="a b")(lambda x: x)


def test_an_error_inside_a_function_leaves_the_trace_usable() -> None:
    """It points at the line, and what is made afterwards does not belong to the function."""
    with model_of("llama").trace(IDS) as run:
        with pytest.raises(ShapeError):
            encode(run.logits)
        run.save(out=run.blocks[0].resid_post * 2.0)
        assert "named part" not in str(run.graph)


def test_an_edited_model_is_a_lora() -> None:
    """Every trace carries the edit: the model computes what one with merged weights computes; the original does not."""
    model = model_of("llama")
    merged = copy.deepcopy(build("llama"))
    with torch.no_grad():
        weight = merged.get_submodule("model.layers.1.mlp.down_proj").weight
        weight += 0.5 * (torch.from_numpy(LORA_A) @ torch.from_numpy(LORA_B)).T
        expected = merged(torch.tensor([IDS])).logits.numpy()
        plain = build("llama")(torch.tensor([IDS])).logits.numpy()
    tuned = model.edited(lora)
    np.testing.assert_allclose(last_logits(tuned), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last_logits(model), plain, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - plain).max() > 1e-2
    assert "edited by: lora" in repr(tuned) and "edited by" not in repr(model)


def test_edits_stack_in_order_and_stay_apart() -> None:
    """The second sees what the first wrote; several runs each get them; the models they came from have fewer."""
    model = model_of("llama")

    def double(run: Any) -> None:
        run.blocks[0].resid_post *= 2.0

    def shift(run: Any) -> None:
        run.blocks[0].resid_post += 1.0

    def stream(m: Model) -> list[np.ndarray]:
        with m.trace() as t:
            t.save(x=[t.run(ids).blocks[0].resid_post for ids in (IDS, OTHER)])
        return list(t.results["x"])

    once = model.edited(double)
    both, other = once.edited(shift), once.edited(double)
    for x, d, s, q in zip(stream(model), stream(once), stream(both), stream(other), strict=True):
        np.testing.assert_allclose(d, 2 * x, rtol=1e-6)
        np.testing.assert_allclose(s, 2 * x + 1, rtol=1e-6)
        np.testing.assert_allclose(q, 4 * x, rtol=1e-6)
    assert [len(m.edits) for m in (model, once, both, other)] == [0, 1, 2, 2]
    with pytest.raises(TraceError, match="an edit is a function"):
        model.edited(3)  # type: ignore[arg-type]


def test_an_edit_prints_as_one_line_and_is_saved_with_the_graph(tmp_path: Any) -> None:
    """The trace's own nodes stand below it; the saved graph holds the edit and runs on the plain model."""
    model = model_of("llama")
    with model.edited(lora).trace(IDS) as run:
        run.save(out=run.logits)
        text = str(run.graph)
    assert "lora(" in text and "in lora: run0.module('model.layers.1.mlp.down_proj').output = %" in text
    pb.save_graph(run, tmp_path / "tuned.pb")
    found = model.run(pb.load_graph(tmp_path / "tuned.pb"))
    assert found["out"].tobytes() == run.results["out"].tobytes()


def test_async_models_are_edited_too() -> None:
    """The same edits, awaited."""
    plain = last_logits(model_of("llama").edited(lora))

    async def work() -> np.ndarray:
        from patchbay.client import AsyncClient
        from patchbay.transport.local import LocalTransport
        from patchbay_server.serving.local import local_servicer

        async with AsyncClient(LocalTransport(local_servicer(build("llama")))) as client:
            model = (await client.model("local")).edited(lora)
            assert isinstance(model, AsyncModel)
            async with model.trace(IDS) as run:
                run.save(out=run.logits)
            return np.asarray(run.results["out"])

    np.testing.assert_allclose(asyncio.run(work()), plain, rtol=1e-5, atol=1e-6)
