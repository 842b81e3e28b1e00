"""What researchers do with loops on activations that stay on the server, against the same by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay import ops
from patchbay.errors import LimitExceededError, RequestCancelledError
from patchbay.model import Model
from patchbay_server.engine.engine import Engine
from patchbay_server.models.loader import host
from tests.tiny import VOCAB, build

ROWS = np.random.default_rng(0).integers(0, VOCAB, (12, 6)).tolist()
LABELS = np.array([1.0, 0.0] * 6, "float32")


@cache
def model() -> Model:
    return pb.local(build("llama"))


def activations() -> np.ndarray:
    """resid_post of layer 1 at the last token, [12, 16]."""
    with model().trace(ROWS) as run:
        x = run.blocks[1].resid_post[:, -1].save("x")
    return np.asarray(x.value)


def test_k_means() -> None:
    """Lloyd's algorithm on activations, with empty clusters left where they are, equals numpy's."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]

        def step(centres: Any, _: Any) -> Any:
            far = ((x[:, None] - centres[None]) ** 2).sum(axis=-1)
            mine = ops.one_hot(far.argmin(axis=-1), 3).astype("float32")
            count = mine.sum(axis=0)[:, None]
            return ops.where(count > 0, (mine.mT @ x) / ops.maximum(count, 1.0), centres), far.min(axis=-1).sum()

        centres, spread = pb.scan(step, x[:3], length=10)
        t.save(centres=centres, spread=spread)
    data = activations()
    expected = data[:3]
    for _ in range(10):
        nearest = ((data[:, None] - expected[None]) ** 2).sum(-1).argmin(-1)
        expected = np.stack([data[nearest == k].mean(0) if (nearest == k).any() else expected[k] for k in range(3)])
    np.testing.assert_allclose(t.results["centres"], expected, rtol=1e-4, atol=1e-5)
    assert (np.diff(t.results["spread"]) <= 1e-4).all()


def test_power_iteration() -> None:
    """The first principal component by power iteration equals the one of a singular value decomposition."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]
        centred = x - x.mean(axis=0)
        gram = centred.mT @ centred

        def step(v: Any, _: Any) -> Any:
            new = gram @ v
            return new / (new * new).sum() ** 0.5, None

        v, nothing = pb.scan(step, np.ones(16, "float32") / 4, length=300)
        t.save(v=v)
    assert nothing is None
    data = activations()
    first = np.linalg.svd(data - data.mean(0))[2][0]
    np.testing.assert_allclose(np.abs(t.results["v"] @ first), 1, atol=1e-4)


def plain_probe(make: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A logistic probe by torch.optim."""
    data, labels = torch.tensor(activations()), torch.tensor(LABELS)
    w, b = torch.zeros(16, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = make([w, b])
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(data @ w + b, labels).backward()
        optimizer.step()
    return w.detach().numpy(), b.detach().numpy()


def cross_entropy(x: Any, p: Any) -> Any:
    """Of a logistic probe, from its logits."""
    logits = x @ p["w"] + p["b"]
    return (ops.maximum(logits, 0.0) - logits * LABELS + ops.log1p(ops.exp(-abs(logits)))).mean()


def test_a_probe_trained_by_sgd() -> None:
    """A logistic probe trained by gradient descent in a loop equals torch.optim.SGD's."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]

        def step(p: Any, _: Any) -> Any:
            loss = cross_entropy(x, p)
            g = pb.grad(loss, wrt=[p["w"], p["b"]])
            return {"w": p["w"] - 0.5 * g[0], "b": p["b"] - 0.5 * g[1]}, loss

        probe, losses = pb.scan(step, {"w": np.zeros(16, "float32"), "b": 0.0}, length=100)
        t.save(probe=probe, losses=losses)
    w, b = plain_probe(lambda params: torch.optim.SGD(params, lr=0.5), 100)
    np.testing.assert_allclose(t.results["probe"]["w"], w, atol=1e-5)
    np.testing.assert_allclose(t.results["probe"]["b"], b, atol=1e-5)
    assert t.results["losses"].shape == (100,) and t.results["losses"][-1] < t.results["losses"][0]


def test_a_probe_trained_by_adam() -> None:
    """The same by Adam, whose moments are carried, equals torch.optim.Adam's."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]

        def step(state: Any, corrections: Any) -> Any:
            p, m, v = state
            first, second = corrections
            loss = cross_entropy(x, p)
            g = dict(zip(p, pb.grad(loss, wrt=list(p.values())), strict=True))
            m = {k: 0.9 * m[k] + 0.1 * g[k] for k in p}
            v = {k: 0.999 * v[k] + 0.001 * g[k] ** 2 for k in p}
            p = {k: p[k] - 0.05 * (m[k] / first) / ((v[k] / second) ** 0.5 + 1e-8) for k in p}
            return (p, m, v), loss

        zero = {"w": np.zeros(16, "float32"), "b": 0.0}
        steps = np.arange(1, 101)
        corrections = tuple((1 - beta**steps).astype("float32") for beta in (0.9, 0.999))
        (probe, _, _), losses = pb.scan(step, (zero, zero, zero), corrections)
        t.save(probe=probe, losses=losses)
    w, b = plain_probe(lambda params: torch.optim.Adam(params, lr=0.05), 100)
    np.testing.assert_allclose(t.results["probe"]["w"], w, atol=1e-5)
    np.testing.assert_allclose(t.results["probe"]["b"], b, atol=1e-5)


def test_descent_on_a_steering_vector_through_the_unembedding() -> None:
    """A vector optimised so that the model's own unembedding prefers a token, then added in another run."""
    with model().trace() as t:
        base = t.run(ROWS[:2])
        h = base.blocks[2].resid_post[:, -1]

        def step(v: Any, _: Any) -> Any:
            logits = t.apply("unembed", t.apply("ln_final", h + v))
            loss = -ops.log_softmax(logits, axis=-1)[:, 7].mean()
            return v - 0.5 * pb.grad(loss, wrt=v), loss

        v, losses = pb.scan(step, np.zeros(16, "float32"), length=60)
        steered = t.run(ROWS[:2])
        steered.blocks[2].resid_post[:, -1] += v
        t.save(v=v, losses=losses, before=base.logits[:, -1], after=steered.logits[:, -1], h=h)
    plain, start = build("llama").requires_grad_(False), torch.tensor(t.results["h"])
    expected = torch.zeros(16)
    for _ in range(60):
        leaf = expected.clone().requires_grad_()
        loss = -plain.lm_head(plain.model.norm(start + leaf)).log_softmax(-1)[:, 7].mean()
        expected = expected - 0.5 * torch.autograd.grad(loss, leaf)[0]
    np.testing.assert_allclose(t.results["v"], expected.numpy(), rtol=1e-3, atol=1e-4)
    assert (t.results["after"].argmax(-1) == 7).all() and not (t.results["before"].argmax(-1) == 7).all()


def test_a_rate_that_decays_on_a_condition() -> None:
    """cond inside scan: the rate is halved in every step whose loss did not fall enough; only one side runs."""
    with model().trace() as t:
        x = t.run(ROWS).blocks[1].resid_post[:, -1]

        def step(state: Any, _: Any) -> Any:
            w, rate, last = state
            loss = ((x @ w - LABELS) ** 2).mean()
            rate = pb.cond(loss < 0.99 * last, lambda r: r, lambda r: r * 0.5, rate)
            return (w - rate * pb.grad(loss, wrt=w), rate, loss), (loss, rate)

        _, (losses, rates) = pb.scan(step, (np.zeros(16, "float32"), 0.4, np.float32(1e9)), length=30)
        t.save(losses=losses, rates=rates)
    data = torch.tensor(activations())
    w, rate, last = torch.zeros(16), 0.4, 1e9
    for i in range(30):
        leaf = w.clone().requires_grad_()
        loss = ((data @ leaf - torch.tensor(LABELS)) ** 2).mean()
        now = float(loss.detach())
        rate = rate if now < 0.99 * last else rate * 0.5
        w, last = w - rate * torch.autograd.grad(loss, leaf)[0], now
        if i < 5:
            np.testing.assert_allclose(t.results["losses"][i], now, rtol=1e-3)
            np.testing.assert_allclose(t.results["rates"][i], rate, rtol=1e-6)
    assert t.results["rates"][-1] < 0.4


@pytest.mark.parametrize("disabled", [(), ("loop_invariants",), ("side_by_side",)])
def test_a_gradient_through_a_loop(disabled: tuple[str, ...]) -> None:
    """A metric of a scan and a map of an activation, differentiated by what was read before it, as autograd does."""
    with model().trace([ROWS[0]], disabled=disabled) as run:
        early = run.blocks[0].resid_post
        h = run.blocks[2].resid_post[0]

        def step(c: Any, row: Any) -> Any:
            return ops.tanh(c + row), (c * row).sum()

        end, each = pb.scan(step, np.zeros(16, "float32"), h)
        norms = pb.vmap(lambda row: (row * row).sum())(h)
        g = pb.grad(end.sum() + each.mean() + norms.mean(), wrt=early).save("g")
    plain = build("llama").requires_grad_(False)
    leaf: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        leaf.append(output.detach().clone().requires_grad_())
        return leaf[0]

    last: list[torch.Tensor] = []
    plain.model.layers[0].register_forward_hook(keep)
    plain.model.layers[2].register_forward_hook(lambda module, args, output: last.append(output))
    plain(input_ids=torch.tensor([ROWS[0]]), use_cache=False)
    h2 = last[0][0]
    c, each2 = torch.zeros(16), []
    for row in h2:
        each2.append((c * row).sum())
        c = torch.tanh(c + row)
    total = c.sum() + torch.stack(each2).mean() + (h2 * h2).sum(-1).mean()
    (expected,) = torch.autograd.grad(total, leaf[0])
    np.testing.assert_allclose(g.value, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert np.abs(g.value).max() > 1e-4


def test_a_gradient_through_training() -> None:
    """The loss after three steps of descent, differentiated by the activation that was trained on: second order."""
    with model().trace([ROWS[0]]) as run:
        x = run.blocks[1].resid_post

        def step(w: Any, _: Any) -> Any:
            loss = ((x[0] @ w - 1.0) ** 2).mean()
            return w - 0.1 * pb.grad(loss, wrt=w), None

        w, _ = pb.scan(step, np.full(16, 0.1, "float32"), length=3)
        run.save(x=x, g=pb.grad(((x[0] @ w - 1.0) ** 2).mean(), wrt=x))
    leaf = torch.tensor(run.results["x"]).requires_grad_()
    v = torch.full((16,), 0.1, requires_grad=True)
    for _ in range(3):
        loss = ((leaf[0] @ v - 1.0) ** 2).mean()
        v = v - 0.1 * torch.autograd.grad(loss, v, create_graph=True)[0]
    (expected,) = torch.autograd.grad(((leaf[0] @ v - 1.0) ** 2).mean(), leaf)
    np.testing.assert_allclose(run.results["g"], expected.numpy(), rtol=1e-3, atol=1e-6)


def test_second_order_inside_a_body() -> None:
    """A gradient of a gradient inside a body: Newton's method finds the root of a polynomial's derivative."""
    with model().trace() as t:
        t.run([1])

        def step(x: Any, _: Any) -> Any:
            first = pb.grad(x**4 - 3 * x**2, wrt=x)
            return x - first / pb.grad(first, wrt=x), None

        root, _ = pb.scan(step, t.constant(2.0), length=8)
        t.save(root=root)
    np.testing.assert_allclose(t.results["root"], np.sqrt(1.5), rtol=1e-6)


def test_values_given_twice_have_gradients_of_their_own() -> None:
    """The same tensor as two parameters of a body: each gradient is by its own use alone."""
    with model().trace() as t:
        t.run([1])
        same = t.constant([2.0, 3.0])

        def step(state: Any, _: Any) -> Any:
            a, b = state
            return (a, b), pb.grad((a * b * b).sum(), wrt=[a, b])

        _, (by_a, by_b) = pb.scan(step, (same, same), length=1)
        t.save(by_a=by_a, by_b=by_b)
    np.testing.assert_allclose(t.results["by_a"], [[4.0, 9.0]])
    np.testing.assert_allclose(t.results["by_b"], [[8.0, 18.0]])


def test_a_graph_with_loops_comes_back_from_a_file_as_it_was(tmp_path: Path) -> None:
    """Saved, loaded and run, it gives the same bytes; printing needs nothing else."""
    t = model().trace()
    x = t.run(ROWS).blocks[1].resid_post[:, -1]
    centred = pb.vmap(lambda row: pb.cond(row.sum() > 0, lambda r: r - r.mean(), lambda r: r, row))(x)
    end, _ = pb.scan(lambda c, row: (c + row, None), np.zeros(16, "float32"), centred)
    t.save(end=end)
    pb.save_graph(t, tmp_path / "g.pb")
    t.execute()
    loaded = pb.load_graph(tmp_path / "g.pb")
    assert loaded.bodies == t.graph.bodies and loaded == t.graph
    assert model().run(loaded)["end"].tobytes() == t.results["end"].tobytes()
    assert "scan" in str(loaded)


def test_equal_loops_run_once() -> None:
    """The same loop written twice becomes one body and one node; one that differs in a number stays."""
    with model().trace(ROWS[:1]) as run:
        x = run.blocks[1].resid_post[0]
        ends = [pb.scan(lambda c, r, k=k: (c * k + r, None), np.zeros(16, "float32"), x)[0] for k in (2.0, 2.0, 3.0)]
        run.save(ends=ends)
    assert len(run.trace.graph.bodies) == 2
    np.testing.assert_array_equal(run.results["ends"][0], run.results["ends"][1])
    assert run.usage.saved["common_subexpressions"] >= 2


def test_what_is_the_same_at_every_step_runs_once() -> None:
    """An expensive product inside a loop that no step changes is computed once; usage says what that saved."""
    with model().trace(ROWS[:1]) as run:
        x = run.blocks[1].resid_post[0]
        end, _ = pb.scan(lambda c, _: (c + (x.mT @ x).sum(), None), run.trace.constant(0.0), length=50)
        run.save(end=end, one=(x.mT @ x).sum())
    np.testing.assert_allclose(run.results["end"], 50 * run.results["one"], rtol=1e-4)
    assert run.usage.saved["loop_invariants"] == 49 * 3


def test_a_long_loop_holds_one_step() -> None:
    """10,000 steps that carry a matrix leave no more tensors behind than ten do."""
    import gc

    engine = Engine(host(build("llama"), name="m"))

    def most(steps: int) -> int:
        t = model().trace()
        t.run([1])
        end, _ = pb.scan(lambda c, _: (c * 0.999 + 0.001, None), t.constant(np.ones((64, 64), "float32")), length=steps)
        t.save(end=end)
        seen: list[int] = []

        def cancelled() -> bool:
            if len(seen) < 5 or len(seen) % 2500 == 0:
                seen.append(sum(issubclass(type(o), torch.Tensor) and o.shape == (64, 64) for o in gc.get_objects()))
            else:
                seen.append(0)
            return False

        engine.run(engine.prepare(t.graph), lambda event: None, cancelled)
        return max(seen)

    assert most(10_000) <= most(10) + 1


def test_a_loop_is_cancelled_between_steps() -> None:
    """A loop of a million steps stops at the step at which the request was cancelled."""
    engine = Engine(host(build("llama"), name="m"))
    t = model().trace()
    t.run([1])
    end, _ = pb.scan(lambda c, _: (c + 1.0, None), t.constant(0.0), length=1_000_000)
    t.save(end=end)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 100

    with pytest.raises(RequestCancelledError):
        engine.run(engine.prepare(t.graph), lambda event: None, cancelled)
    assert asked == 101


def test_a_loop_beyond_the_limit_is_refused_before_it_runs() -> None:
    """Steps times operations are held to max_loop_steps, on the client, with the limit named."""
    with pytest.raises(LimitExceededError, match="max_loop_steps") as refused, model().trace() as t:
        t.run([1])
        inner = lambda c: pb.scan(lambda d, _: (d + 1.0, None), c, length=10_000)[0]  # noqa: E731
        end, _ = pb.scan(lambda c, _: (inner(c), None), t.constant(0.0), length=10_000)
        t.save(end=end)
    assert refused.value.requested > 10**8


def test_an_error_inside_a_loop_names_the_users_line() -> None:
    """An index that only running shows as out of range is reported at the line inside the function."""
    with pytest.raises(pb.errors.IndexOutOfRangeError, match="out of range") as wrong, model().trace() as t:
        t.run([1])
        table = t.constant([1.0, 2.0, 3.0])

        def step(i: Any, _: Any) -> Any:
            return i + 1, table[i[None]]  # HERE

        _, found = pb.scan(step, t.constant(0), length=5)
        t.save(found=found)
    assert wrong.value.location is not None
    file, _, line = wrong.value.location.rpartition(":")
    assert Path(file).name == Path(__file__).name
    assert "# HERE" in Path(__file__).read_text().splitlines()[int(line) - 1]


def test_lengths_of_nothing() -> None:
    """No step at all: what is carried comes out as it went in, and nothing is stacked."""
    with model().trace() as t:
        t.run([1])
        end, ys = pb.scan(lambda c, _: (c + 1.0, c), t.constant(3.0), length=0)
        none = pb.vmap(lambda x: x * 2)(t.constant(np.zeros((0, 3), "float32")))
        t.save(end=end, ys=ys, none=none)
    assert t.results["end"] == 3.0 and t.results["ys"].shape == (0,) and t.results["none"].shape == (0, 3)


def test_mapping_over_other_axes_and_whole_arguments() -> None:
    """in_axes per argument: another axis, or None for a value that every slice takes whole; trees in and out."""
    a, b = np.arange(6, dtype="float32").reshape(2, 3), np.ones(2, "float32")
    with model().trace() as t:
        t.run([1])
        found = pb.vmap(lambda p, w: {"sum": p["x"] @ w, "w": w}, in_axes=(1, None))({"x": t.constant(a)}, b)
        both = pb.vmap(lambda x, y: (x * y).sum())(t.constant(a), a + 1)
        t.save(found=found, both=both)
    np.testing.assert_allclose(t.results["found"]["sum"], a.sum(0))
    np.testing.assert_allclose(t.results["found"]["w"], np.ones((3, 2)))
    np.testing.assert_allclose(t.results["both"], (a * (a + 1)).sum(1))


def test_side_by_side_where_memory_allows() -> None:
    """A map runs its slices at once and usage says so; switched off or deterministic, one by one, to equal results."""
    found = {}
    for name, how in {"on": {}, "off": {"disabled": ("side_by_side",)}, "same": {"deterministic": True}}.items():
        with model().trace(ROWS, **how) as run:  # type: ignore[arg-type]
            x = run.blocks[1].resid_post[:, -1]
            y = pb.vmap(lambda row: ops.softmax(row * 2.0, axis=-1) @ ops.outer(row, row))(x)
            y.save("y")
        found[name] = run.results["y"], run.usage.saved["side_by_side"]
    assert found["on"][1] == 11 and found["off"][1] == found["same"][1] == 0
    np.testing.assert_allclose(found["on"][0], found["off"][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["off"][0], found["same"][0])
