"""Descent, probes and clusters on activations that stay on the server, against torch and numpy on the same data."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay import methods
from patchbay.errors import TraceError
from patchbay.model import Model
from tests.tiny import VOCAB, build

ROWS = np.random.default_rng(3).integers(0, VOCAB, (10, 5)).tolist()
LABELS = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0])


@cache
def model() -> Model:
    return pb.local(build("gpt2"))


@cache
def data() -> np.ndarray:
    with model().trace(ROWS) as run:
        x = run.blocks[1].resid_post[:, -1].save("x")
    return np.asarray(x.value)


OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({"optimizer": "sgd", "rate": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        {"optimizer": "sgd", "rate": 0.05, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ),
    "adam": ({"rate": 0.05}, lambda p: torch.optim.Adam(p, lr=0.05)),
    "adam's own": (
        {"rate": 0.05, "betas": (0.8, 0.9), "eps": 1e-3},
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9), eps=1e-3),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descent(name: str) -> None:
    """Every optimizer ends where torch.optim's does, with the same losses on the way."""
    how, make = OPTIMIZERS[name]
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]
        params, losses = methods.descend(
            lambda p: ((pb.ops.tanh(x @ p["w"]) * p["scale"] - LABELS.astype("float32")) ** 2).mean(),
            {"w": np.full(16, 0.01, "float32"), "scale": 1.0},
            60,
            **how,
        )
        t.save(params=params, losses=losses)
    w, scale = torch.full((16,), 0.01, requires_grad=True), torch.ones((), requires_grad=True)
    optimizer, seen = make([w, scale]), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ((torch.tanh(torch.tensor(data()) @ w) * scale - torch.tensor(LABELS, dtype=torch.float32)) ** 2).mean()
        loss.backward()
        seen.append(float(loss.detach()))
        optimizer.step()
    np.testing.assert_allclose(t.results["losses"], seen, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(t.results["params"]["w"], w.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(t.results["params"]["scale"], scale.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_descent_through_runs_of_the_model(name: str) -> None:
    """Unrolled, the loss may make runs: a rotation for distributed alignment search goes torch.optim's way."""
    how, make = OPTIMIZERS[name]
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 3)).astype("float32"))[0]
    sources = ROWS[1:] + ROWS[:1]
    with model().trace() as t:
        theirs = t.run(sources).blocks[0].resid_post[:, 2]

        def loss(rotation: Any) -> Any:
            q, _ = pb.ops.qr(rotation)
            run = t.run(ROWS)
            mine = run.blocks[0].resid_post[:, 2]
            run.blocks[0].resid_post[:, 2] = mine + (theirs - mine) @ q @ q.mT
            return pb.ops.cross_entropy(run.logits[:, -1], LABELS)

        rotation, losses = methods.descend(loss, t.constant(start), 8, unroll=True, **how)
        t.save(rotation=rotation, losses=losses)

    hf, cell = build("gpt2"), torch.tensor(start, requires_grad=True)
    block, ids, seen = hf.transformer.h[0], torch.tensor(ROWS), list[float]()
    kept: list[torch.Tensor] = []
    hook = block.register_forward_hook(lambda *call: kept.append(call[2].detach()))
    hf(torch.tensor(sources))
    hook.remove()

    def swap(_module: Any, _args: Any, x: torch.Tensor) -> torch.Tensor:
        q = torch.linalg.qr(cell)[0]
        return torch.cat([x[:, :2], (x[:, 2] + (kept[0][:, 2] - x[:, 2]) @ q @ q.T)[:, None], x[:, 3:]], 1)

    hook = block.register_forward_hook(swap)
    optimizer = make([cell])
    for _ in range(8):
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(hf(ids).logits[:, -1], torch.tensor(LABELS))
        value.backward()
        seen.append(float(value.detach()))
        optimizer.step()
    hook.remove()
    assert seen[-1] < seen[0]
    np.testing.assert_allclose(t.results["losses"], seen, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t.results["rotation"], cell.detach().numpy(), atol=1e-4)


def test_descent_goes_on_from_what_was_kept() -> None:
    """Handles of an earlier trace's parameters begin another descent, which goes on where that one ended."""
    target = LABELS.astype("float32")

    def go(t: Any, params: Any, steps: int) -> tuple[Any, Any]:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]
        return methods.descend(lambda p: ((x @ p["w"] - target) ** 2).mean(), params, steps, optimizer="sgd", rate=0.05)

    start = {"w": np.full(16, 0.01, "float32")}
    with model().trace() as t:
        kept = t.keep("probe", go(t, start, 10)[0])
    with model().trace() as t:
        t.save(losses=go(t, kept, 10)[1])
    with model().trace() as whole:
        whole.save(losses=go(whole, start, 20)[1])
    np.testing.assert_allclose(t.results["losses"], whole.results["losses"][10:], rtol=1e-4)


def test_unrolled_descent_begins_in_a_trace() -> None:
    """An array belongs to no trace, so nothing could be differentiated by it: the error says what to write."""
    with pytest.raises(TraceError, match=r"t\.constant"):
        methods.descend(lambda p: p, np.ones(2, "float32"), 3, unroll=True)


def test_an_optimizer_that_does_not_exist() -> None:
    """It is refused, with those that do."""
    with pytest.raises(TraceError, match="adam or sgd"):
        methods.descend(lambda p: p, np.zeros(1), 1, optimizer="lbfgs")  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_a_logistic_probe(penalty: float) -> None:
    """Its direction, bias and losses are those of the same training in torch; it tells the rows apart."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]
        probe = methods.logistic_probe(x, LABELS, steps=150, rate=0.05, penalty=penalty)
        t.save(probe=probe, logits=probe.logits(x))
    w, b = torch.zeros(16, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        logits = torch.tensor(data()) @ w + b
        target = torch.tensor(LABELS, dtype=torch.float32)
        (torch.nn.functional.binary_cross_entropy_with_logits(logits, target) + penalty * (w * w).sum()).backward()
        optimizer.step()
    found = t.results["probe"]
    np.testing.assert_allclose(found.direction, w.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(found.bias, b.detach().numpy(), atol=1e-4)
    assert found.losses[-1] < found.losses[0]
    assert ((t.results["logits"] > 0) == LABELS).mean() > 0.8


def test_clusters() -> None:
    """k-means ends where numpy's does from the same start; labels are the nearest centres."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]
        t.save(found=methods.k_means(x, 3, steps=8))
    centres = data()[:3]
    for _ in range(8):
        nearest = ((data()[:, None] - centres[None]) ** 2).sum(-1).argmin(-1)
        centres = np.stack([data()[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(3)])
    found = t.results["found"]
    np.testing.assert_allclose(found.centres, centres, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.labels, ((data()[:, None] - centres[None]) ** 2).sum(-1).argmin(-1))
    assert (np.diff(found.spread) <= 1e-3).all()
    with pytest.raises(TraceError, match="clusters"), model().trace() as t:
        methods.k_means(t.run(ROWS[:2]).blocks[1].resid_post[:, -1], 3)
