"""Every reduction against numpy over the same activations, whatever the batches, their order, padding and lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbay import ops, reduce
from patchbay.datasets.selection import hashed_number
from tests.datasets.common import LABELS, Whole, data_set, fetched, local_model
from tests.tiny import D_MODEL

DATA = data_set()
ROWS = [row["text"] for row in DATA]
#: Looked up, not computed: the same bits in whatever batch a row is.
EXACT = "embed"
COMPUTED = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def exact() -> Whole:
    return fetched(local_model(), ROWS, EXACT)


@pytest.fixture(scope="module")
def computed() -> Whole:
    return fetched(local_model(), ROWS, COMPUTED)


def mapped(make: Callable[[Any], Any], **how: Any) -> Any:
    return local_model().map(DATA, lambda run: {"it": make(run)}, batch=how.pop("batch", 5), **how)["it"]


def groups_of(whole: Whole) -> np.ndarray:
    return whole.rows % 3


@pytest.mark.parametrize("site", [EXACT, COMPUTED])
def test_sums_means_and_variances_over_tokens(site: str) -> None:
    """They are numpy's over the tokens of all rows, in float64, padding left out."""
    whole = fetched(local_model(), ROWS, site)

    def look(run):
        h = run.site(site)
        return {
            "sum": reduce.sum(h), "mean": reduce.mean(h), "var": reduce.var(h), "var1": reduce.var(h, correction=1),
            "max": reduce.max(h), "min": reduce.min(h), "cov": reduce.covariance(h), "tokens": reduce.count(run.mask),
        }  # fmt: skip

    found = local_model().map(DATA, look, batch=5)
    x = whole.samples
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_allclose(found["sum"], x.sum(0), **close)
    np.testing.assert_allclose(found["mean"], x.mean(0), **close)
    np.testing.assert_allclose(found["var"], x.var(0), **close)
    np.testing.assert_allclose(found["var1"], x.var(0, ddof=1), **close)
    np.testing.assert_allclose(found["max"], x.max(0), **close)
    np.testing.assert_allclose(found["min"], x.min(0), **close)
    np.testing.assert_allclose(found["cov"].covariance, np.cov(x.T), **close)
    np.testing.assert_allclose(found["cov"].mean, x.mean(0), **close)
    assert found["cov"].samples == found["tokens"] == len(x)
    assert all(found[name].dtype == np.float64 for name in ("sum", "mean", "var", "max"))
    assert found.rows == len(DATA)


def test_values_of_whole_rows_are_samples_by_row(exact: Whole) -> None:
    """A value without a sequence axis is reduced over rows, one that has several axes behind them for each element."""
    last = exact.value[:, -1].astype(np.float64)
    np.testing.assert_allclose(mapped(lambda run: reduce.mean(run.embed[:, -1])), last.mean(0), rtol=1e-12)
    found = mapped(lambda run: reduce.sum(run.embed[:, -1].reshape(run.rows, 4, D_MODEL // 4)))
    np.testing.assert_allclose(found, last.sum(0).reshape(4, -1), rtol=1e-12)
    scalar = mapped(lambda run: reduce.mean(run.embed[:, -1].sum(axis=-1).astype("float64")))
    np.testing.assert_allclose(scalar, last.sum(1).mean(), rtol=1e-6)
    assert scalar.shape == ()


def test_axes_are_told_by_what_follows_the_batch_not_by_their_extent(exact: Whole) -> None:
    """Rows of 16 tokens over a width of 16: the second axis is the tokens' or the width, as the value has it."""
    rows = [[3 + (i + j) % 20 for j in range(D_MODEL)] for i in range(4)]
    whole = fetched(local_model(), rows, EXACT)

    def look(run):
        return {"last": reduce.mean(run.embed[:, -1]), "all": reduce.mean(run.embed), "norm": reduce.mean(run.ids)}

    found = local_model().map(rows, look, batch=2)
    np.testing.assert_allclose(found["last"], whole.value[:, -1].astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["all"], whole.samples.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["norm"], np.mean(rows), rtol=1e-12)


def test_masks_leave_samples_out(exact: Whole) -> None:
    """A mask of tokens and a mask of rows, beside padding."""
    x = exact.samples
    odd = exact.tokens % 2 == 1
    found = mapped(lambda run: reduce.mean(run.embed, mask=run.ids % 2 == 1))
    np.testing.assert_allclose(found, x[odd].mean(0), rtol=1e-12)
    heavy = exact.rows / 4 > 3
    found = mapped(lambda run: reduce.covariance(run.embed, mask=run.column("weight") > 3.0))
    np.testing.assert_allclose(found.covariance, np.cov(x[heavy].T), rtol=1e-9, atol=1e-12)
    assert found.samples == heavy.sum()


def test_groups_are_reduced_by_themselves(exact: Whole) -> None:
    """Sums, means, variances, covariances, extremes and counts by label; a group without samples has no mean."""
    x, g = exact.samples, groups_of(exact)

    def look(run):
        label = run.column("label", values=LABELS)
        by = {"by": label, "groups": 4}
        h = run.embed
        return {
            "mean": reduce.mean(h, **by), "sum": reduce.sum(h, **by), "var": reduce.var(h, **by),
            "max": reduce.max(h, **by), "count": reduce.count(h > 0, **by), "cov": reduce.covariance(h, **by),
            "last": reduce.mean(h[:, -1], **by), "by_token": reduce.mean(h, by=run.ids % 2, groups=2),
        }  # fmt: skip

    found = local_model().map(DATA, look, batch=5)
    for i in range(3):
        mine = x[g == i]
        np.testing.assert_allclose(found["mean"][i], mine.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["sum"][i], mine.sum(0), rtol=1e-12)
        np.testing.assert_allclose(found["var"][i], mine.var(0), rtol=1e-9)
        np.testing.assert_allclose(found["max"][i], mine.max(0))
        np.testing.assert_array_equal(found["count"][i], (mine > 0).sum(0))
        np.testing.assert_allclose(found["cov"].covariance[i], np.cov(mine.T), rtol=1e-9, atol=1e-12)
        last = exact.value[np.arange(len(DATA)) % 3 == i, -1].astype(np.float64)
        np.testing.assert_allclose(found["last"][i], last.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["by_token"][i % 2], x[exact.tokens % 2 == i % 2].mean(0), rtol=1e-12)
    assert np.isnan(found["mean"][3]).all()
    assert np.isnan(found["max"][3]).all()
    np.testing.assert_array_equal(found["sum"][3], 0)
    np.testing.assert_array_equal(found["cov"].samples, [(g == i).sum() for i in range(4)])


def test_histograms_count_as_numpy_does(exact: Whole) -> None:
    """Equal bins or given edges, for each element or for all; what lies outside is counted beside them."""
    x = exact.samples

    def look(run):
        value = ops.round(run.embed * 4) / 4  # many samples lie on edges
        return {
            "each": reduce.histogram(value, 8, (-0.5, 0.5)),
            "pooled": reduce.histogram(value, [-0.25, 0, 0.1, 0.25], pooled=True),
            "rows": reduce.histogram(value[:, -1, 0], 3, (0, 1)),
        }

    found = local_model().map(DATA, look, batch=5)
    x = np.round(exact.value[exact.mask] * 4).astype(np.float64) / 4
    for d in range(D_MODEL):
        counts, edges = np.histogram(x[:, d], 8, (-0.5, 0.5))
        np.testing.assert_array_equal(found["each"].counts[d], counts)
        np.testing.assert_array_equal(found["each"].edges, edges)
    np.testing.assert_array_equal(found["each"].below, (x < -0.5).sum(0))
    np.testing.assert_array_equal(found["each"].above, (x > 0.5).sum(0))
    np.testing.assert_array_equal(found["pooled"].counts, np.histogram(x, [-0.25, 0, 0.1, 0.25])[0])
    assert found["pooled"].counts.sum() + found["pooled"].below + found["pooled"].above == x.size
    last = np.round(exact.value[:, -1, 0] * 4) / 4
    np.testing.assert_array_equal(found["rows"].counts, np.histogram(last, 3, (0, 1))[0])


def expected_top(whole: Whole, k: int, sign: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """For each element, which samples and their values; equal ones in the data set's order."""
    x = sign * whole.samples.T
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    return order, sign * np.take_along_axis(x, order, axis=1)


@pytest.mark.parametrize("largest", [True, False])
def test_top_samples_are_those_of_a_stable_sort(exact: Whole, largest: bool) -> None:
    """Values, rows, positions, tokens, what was kept and what stands around; ties in the data set's order."""
    found = mapped(
        lambda run: reduce.topk(run.embed, 6, largest=largest, keep={"two": run.embed[..., :2]}, context=(1, 2))
    )
    order, values = expected_top(exact, 6, 1 if largest else -1)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.rows, exact.rows[order])
    np.testing.assert_array_equal(found.positions, exact.positions[order])
    np.testing.assert_array_equal(found.tokens, exact.tokens[order])
    np.testing.assert_array_equal(found.kept["two"], exact.samples[order][..., :2])
    assert found.kept["two"].dtype == np.float32
    assert found.context is not None
    for d in range(D_MODEL):
        for j in range(6):
            row, at = int(found.rows[d, j]), int(found.positions[d, j])
            ids = [ROWS[row][p] if 0 <= p < len(ROWS[row]) else -1 for p in range(at - 1, at + 3)]
            np.testing.assert_array_equal(found.context.ids[d, j], ids)
            assert found.context.values[d, j, found.context.center] == found.values[d, j]
            np.testing.assert_array_equal(np.isnan(found.context.values[d, j]), np.array(ids) == -1)


def test_top_samples_that_there_are_not(exact: Whole) -> None:
    """More asked for than there are: NaN and -1; NaN and masked samples are never among them."""
    found = mapped(lambda run: reduce.topk(run.embed[:, -1, 0], 50, mask=run.column("weight") >= 5.0))
    there = 17
    assert (found.rows[:there] >= 20).all()
    assert sorted(found.rows[:there]) == list(range(20, 37))
    np.testing.assert_array_equal(found.rows[there:], -1)
    assert np.isnan(found.values[there:]).all()
    assert found.positions is found.tokens is None
    nans = mapped(lambda run: reduce.topk(ops.where(run.ids == 5, float("nan"), run.ids * 0.0), 3))
    first = np.flatnonzero(exact.tokens != 5)[:3]
    np.testing.assert_array_equal(nans.rows, exact.rows[first])
    np.testing.assert_array_equal(nans.positions, exact.positions[first])


def test_a_reservoir_holds_the_samples_whose_numbers_hash_lowest(exact: Whole) -> None:
    """Which are drawn follows from the seed and the data set alone, and is worked out here in plain Python."""
    stride = local_model().card.n_ctx
    numbers = exact.rows * stride + exact.positions
    for seed in (0, 7):
        found = mapped(lambda run: reduce.reservoir(run.embed, 10, seed=seed))  # noqa: B023 - called at once
        keys = np.array([hashed_number(int(n), seed) for n in numbers])
        chosen = np.sort(np.argsort(keys, kind="stable")[:10])
        np.testing.assert_array_equal(found.rows, exact.rows[chosen])
        np.testing.assert_array_equal(found.positions, exact.positions[chosen])
        np.testing.assert_array_equal(found.tokens, exact.tokens[chosen])
        np.testing.assert_array_equal(found.values, exact.value[exact.mask][chosen])
        assert found.values.dtype == np.float32


def test_reservoirs_of_rows_and_of_fewer_samples_than_asked(exact: Whole) -> None:
    """All of them, in order, where there are fewer than k; rows alone where the value has no sequence axis."""
    found = mapped(lambda run: reduce.reservoir(run.embed[:, -1], 100, mask=run.column("weight") < 1.0))
    np.testing.assert_array_equal(found.rows, [0, 1, 2, 3])
    np.testing.assert_array_equal(found.values, exact.value[:4, -1])
    assert found.positions is None


def test_a_reservoir_draws_evenly() -> None:
    """Over many seeds, every row is drawn about equally often (chi-squared within six sigma)."""
    counts = np.zeros(40)
    for seed in range(400):
        keys = np.array([hashed_number(n, seed) for n in range(40)])
        counts[np.argsort(keys)[:10]] += 1
    expected = 400 * 10 / 40
    chi = ((counts - expected) ** 2 / (expected * (1 - 10 / 40))).sum()
    assert abs(chi - 39) < 6 * np.sqrt(2 * 39), chi


@settings(max_examples=12)
@given(
    batch=st.integers(1, 40),
    window=st.integers(1, 45),
    max_tokens=st.integers(1, 120),
    lanes=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_batches_order_padding_and_lanes_do_not_matter(
    batch: int, window: int, max_tokens: int, lanes: int, seed: int
) -> None:
    """However the rows are cut up, counts and choices are the same and sums differ by float64's rounding at most."""
    data = data_set(30, 8, seed)
    whole = fetched(local_model(), [row["text"] for row in data], EXACT)

    def look(run):
        h = run.embed
        return {
            "mean": reduce.mean(h), "cov": reduce.covariance(h), "top": reduce.topk(h[..., :2], 4),
            "drawn": reduce.reservoir(h[..., 0], 5, seed), "bins": reduce.histogram(h[..., 0], 4, (-1, 1)),
            "weights": reduce.sum(run.column("weight")), "vectors": reduce.sum(run.column("vector")), "h": h[..., 0],
        }  # fmt: skip

    found = local_model().map(data, look, batch=batch, window=window, max_tokens=max_tokens, lanes=lanes)
    x = whole.samples
    np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["cov"].covariance, np.cov(x.T), rtol=1e-9, atol=1e-13)
    order, values = expected_top(whole, 4)
    np.testing.assert_array_equal(found["top"].values, values[:2])
    np.testing.assert_array_equal(found["top"].rows, whole.rows[order[:2]])
    stride = local_model().card.n_ctx
    keys = np.array([hashed_number(int(n), seed) for n in whole.rows * stride + whole.positions])
    chosen = np.sort(np.argsort(keys, kind="stable")[:5])
    np.testing.assert_array_equal(found["drawn"].values, x[chosen, 0].astype(np.float32))
    np.testing.assert_array_equal(found["bins"].counts, np.histogram(x[:, 0], 4, (-1, 1))[0])
    assert found["weights"] == sum(row["weight"] for row in data)
    np.testing.assert_array_equal(found["vectors"], np.sum([row["vector"] for row in data], axis=0))
    for row, padded, mask in zip(found["h"], whole.value[..., 0], whole.mask, strict=True):
        np.testing.assert_array_equal(row, padded[mask])


def test_a_hundred_thousand_rows_lose_no_precision() -> None:
    """Mean, variance and covariance of samples with a mean 10,000 times their spread, against numpy in float64."""
    count = 100_000
    ids = np.random.default_rng(0).integers(3, 32, size=count)
    table = fetched(local_model(), [list(range(32))], EXACT).value[0]

    def look(run):
        # float32 as activations are, far from zero: the squares of such sums lose every digit of the variance
        x = run.embed[:, -1, :4] + 2500.0
        return {"mean": reduce.mean(x), "var": reduce.var(x), "cov": reduce.covariance(x)}

    found = local_model().map(([int(i)] for i in ids), look, batch=2_000, lanes=3)
    x = (table[:, :4] + np.float32(2500))[ids].astype(np.float64)
    assert found.rows == count
    np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["var"], x.var(0), rtol=1e-6)
    scale = np.sqrt(np.outer(x.var(0), x.var(0)))
    np.testing.assert_allclose(found["cov"].covariance / scale, np.cov(x.T) / scale, rtol=1e-6, atol=1e-8)
