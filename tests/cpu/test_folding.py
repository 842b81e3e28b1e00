"""Constant folding: what depends on constants alone is known before anything runs, and is the same to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import patchbay as pb
from tests.tiny import D_MODEL, build

IDS = [[1, 5, 9, 3, 7]]


@pytest.fixture(scope="module")
def model() -> pb.Model:
    """A tiny Llama in this process."""
    return pb.local(build("llama"))


def test_a_direction_made_of_constants_is_one_constant(model: pb.Model) -> None:
    """Normalised and scaled on the server, it is folded; the logits are those of the unfolded graph, to the bit."""
    direction = np.random.default_rng(0).standard_normal(D_MODEL).astype(np.float32)

    def steered(disabled: Sequence[str]) -> tuple[np.ndarray, pb.Usage]:
        with model.trace(disabled=["prefix_cache", *disabled]) as t:
            run, d = t.run(IDS), t.constant(direction)
            run.blocks[1].resid_post += 4.0 * d / (d * d).sum() ** 0.5
            t.save(logits=run.logits)
        return t.results["logits"], t.usage

    folded, usage = steered(())
    plain, plain_usage = steered(("fold_constants",))
    np.testing.assert_array_equal(folded, plain)
    assert usage.saved["fold_constants"] == 5
    assert usage.nodes_run == plain_usage.nodes_run - 7
    assert "fold_constants" not in plain_usage.saved or not plain_usage.saved["fold_constants"]


def test_what_a_gradient_is_taken_by_is_no_constant(model: pb.Model) -> None:
    """The derivative by a value made of constants is the one that autograd gives without folding."""
    slopes = []
    for disabled in ([], ["fold_constants"]):
        with model.trace(disabled=disabled) as t:
            run, scale = t.run(IDS), t.constant(np.float32(0.5)) * 2.0
            run.blocks[1].resid_post *= scale
            t.save(slope=pb.grad(run.logits[:, -1].sum(), wrt=[scale])[0])
        slopes.append(t.results["slope"])
    assert slopes[0] != 0
    np.testing.assert_allclose(*slopes, rtol=1e-5)


def test_what_is_large_or_fails_is_left_to_the_run(model: pb.Model) -> None:
    """An outer product of small vectors is too large to fold; an index out of range is refused at its own line."""
    with model.trace() as t:
        long = t.constant(np.ones(4_096, np.float32))
        t.save(total=(long[:, None] * long[None, :]).sum() + 0.0 * t.run(IDS).embed.sum())
    assert t.usage.saved["fold_constants"] == 2  # the two views of the vector
    assert t.results["total"] == 2**24
    with pytest.raises(pb.GraphError) as refused, model.trace() as t:
        t.save(wrong=t.constant(np.arange(3))[t.constant(np.array([7]))] + t.run(IDS).embed.sum())
    assert "7" in str(refused.value)


@hypothesis.given(
    numbers=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=6),
    operations=st.lists(
        st.sampled_from(["tanh", "exp", "negative", "square", "sigmoid", "cumulative_sum", "softmax"]), max_size=6
    ),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_chain_gives_the_same_bits(model: pb.Model, numbers: list[float], operations: list[str]) -> None:
    """Folded or not, a chain of operations on constants has the same value."""
    values = []
    for disabled in ([], ["fold_constants"]):
        with model.trace(disabled=disabled) as t:
            value = t.constant(np.array(numbers, np.float32))
            for name in operations:
                value = getattr(pb.ops, name)(value, axis=-1) if name == "softmax" else getattr(pb.ops, name)(value)
            t.save(value=value * 2.0, seen=t.run(IDS).embed[0, 0, 0])
        values.append(t.results["value"])
    np.testing.assert_array_equal(*values)


def test_what_is_folded_of_one_graph_is_bounded(model: pb.Model) -> None:
    """A plan keeps the constants that were folded: of hundreds of large ones the last are left to the run."""

    def summed(disabled: Sequence[str]) -> tuple[np.ndarray, pb.Usage]:
        with model.trace(disabled=disabled) as t:
            value = t.constant(np.linspace(0, 1, 4_096, dtype=np.float32))
            for _ in range(300):
                value = value * 0.5 + 1.0
            t.save(value=value + 0.0 * t.run(IDS).embed.sum())
        return t.results["value"], t.usage

    folded, usage = summed(())
    plain, _ = summed(("fold_constants",))
    np.testing.assert_array_equal(folded, plain)
    assert usage.saved["fold_constants"] == 1_000_000 // 4_096
