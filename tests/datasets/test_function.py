"""The user's function: how often it is called, what it may look at, and what is said when it is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay import ops, reduce
from patchbay.errors import ArgumentError, GraphError, LimitExceededError, TraceError
from patchbay.model import AsyncModel
from tests.datasets.common import data_set, fetched, local_model, token_rows
from tests.e2e.served import tokenizer
from tests.tiny import D_MODEL, build

ROWS = token_rows(30, 6)


def test_the_function_is_traced_once_for_each_shape_of_batch() -> None:
    """A thousand batches of three lengths call it a handful of times."""
    calls = 0

    def look(run):
        nonlocal calls
        calls += 1
        return {"mean": reduce.mean(run.embed), "top": reduce.topk(run.embed, 2)}

    rows = [[3] * (2 + i % 3) for i in range(600)]
    found = local_model().map(rows, look, batch=2, window=60, lanes=2)
    assert found.batches == 300
    # One for each length, one for a lane's first batch of it where there is no state yet, and one to compare.
    assert calls <= 3 + 2 + 1


def test_a_function_that_looks_at_the_tokens_is_traced_for_each_batch() -> None:
    """What Python does with the tokens themselves holds for the batch it was done for."""
    calls = 0

    def look(run):
        nonlocal calls
        calls += 1
        firsts = [row.ids[0] for row in run.tokens]
        return {"first": ops.take(run.row_numbers * 0, np.arange(run.rows)) + np.array(firsts)}

    found = local_model().map(ROWS, look, batch=5)
    np.testing.assert_array_equal(found["first"], [row[0] for row in ROWS])
    assert calls >= found.batches


def test_words_are_found_in_every_row() -> None:
    """`run.position` is worked out for each batch without tracing anew; log-probabilities are those of a trace."""
    model = pb.local(build("llama"), tokenizer())
    texts = ["the capital of france is paris", "paris is a capital", "a cat sat on paris", "the paris mat"]
    calls = 0

    def look(run):
        nonlocal calls
        calls += 1
        return {"ids": run.ids[range(run.rows), run.position("paris")], "mask": run.mask}

    found = model.map(texts * 5, look, batch=2, window=4)
    assert set(found["ids"].tolist()) == {model.to_single_token("paris")}
    assert calls < found.batches
    with model.trace() as t:
        t.save(there=t.run(texts[0]).logprob("paris"), behind=[t.run(text).logprob("rome") for text in texts])
    found = model.map([texts[0]] * 3, lambda run: {"p": run.logprob("paris")}, batch=2)
    np.testing.assert_allclose(found["p"], [t.results["there"]] * 3, atol=1e-5)
    found = model.map(texts, lambda run: {"p": run.logprob("rome")}, batch=2)
    np.testing.assert_allclose(found["p"], t.results["behind"], atol=1e-5)
    with pytest.raises(TraceError, match="row 1 of the data set.*'cat' does not stand"):
        model.map(["a cat sat", "a dog sat"], lambda run: {"x": run.embed[range(run.rows), run.position("cat")]})


def test_texts_chats_and_first_tokens_are_tokenized_by_the_server() -> None:
    """Texts become the tokens that a trace makes of them."""
    model = pb.local(build("llama"), tokenizer())
    texts = ["the cat sat", "paris is a dog on the mat", "rome"]
    found = model.map(texts, lambda run: {"ids": run.ids}, batch=2)
    assert [row.tolist() for row in found["ids"]] == [list(t.ids) for t in model.tokenize(texts)]


def test_interventions_and_further_runs_of_the_same_rows() -> None:
    """A function may write at sites, and compare with another run of the batch."""

    def look(run):
        clean = run.again()
        run.blocks[0].mlp_out[...] = 0.0
        change = run.blocks[2].resid_post - clean.blocks[2].resid_post
        return {"norm": reduce.mean((change * change).sum(axis=-1)), "clean": reduce.mean(clean.blocks[2].resid_post)}

    model = local_model()
    found = model.map(ROWS, look, batch=7)
    with model.trace() as t:
        a, b = t.run(ROWS), t.run(ROWS)
        a.blocks[0].mlp_out[...] = 0.0
        t.save(a=a.blocks[2].resid_post, b=b.blocks[2].resid_post)
    mask = np.asarray(b.mask)
    change = (t.results["a"] - t.results["b"])[mask].astype(np.float64)
    np.testing.assert_allclose(found["norm"], (change**2).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(found["clean"], t.results["b"][mask].mean(0), rtol=1e-4, atol=1e-5)


def test_edits_of_the_model_hold_for_every_batch() -> None:
    """A model that was edited is mapped with its edits."""

    def edit(run):
        run.blocks[0].resid_post[...] = 1.0

    found = local_model().edited(edit).map(ROWS, lambda run: {"m": reduce.mean(run.blocks[0].resid_post)}, batch=7)
    np.testing.assert_array_equal(found["m"], np.ones(D_MODEL))


async def test_an_asynchronous_model_maps_asynchronous_rows() -> None:
    """`await model.map(...)` over an asynchronous generator gives what the blocking model gives over a list."""
    model = AsyncModel(local_model().core)
    whole = fetched(local_model(), ROWS, "embed")
    # The transport of a local model belongs to its own loop; another client of the same servicer is made here.
    from patchbay.client import AsyncClient
    from patchbay.transport.local import LocalTransport
    from patchbay_server.serving.local import local_servicer

    del model
    servicer = local_servicer(build("llama"), name="here")
    try:
        async with AsyncClient(lambda: LocalTransport(servicer)) as client:

            async def rows():
                for row in ROWS:
                    yield row

            model = await client.model("here")
            found = await model.map(rows(), lambda run: {"mean": reduce.mean(run.embed)}, batch=4)
            again = await model.map(ROWS, lambda run: {"mean": reduce.mean(run.embed)}, batch=4)
    finally:
        servicer.close()
    np.testing.assert_allclose(found["mean"], whole.samples.mean(0), rtol=1e-12)
    np.testing.assert_array_equal(found["mean"], again["mean"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda run: run.embed, "returns a dict"),
        (lambda run: {"a": 3}, "no value of the run"),
        (lambda run: {"a": run.embed.mean()}, "no entry for each of the"),
        (lambda run: {"a": reduce.mean(run.embed.sum(axis=0))}, "no entry for each of the"),
        (lambda run: {"a": reduce.mean(run.blocks[0].attn.pattern)}, "would depend on the batch"),
        (lambda run: {"a": reduce.mean(run.embed, over="rows")}, "would depend on the batch"),
        (lambda run: {"a": reduce.mean(run.embed[:, -1], over="tokens")}, "no sequence axis"),
        (lambda run: {"a": reduce.mean(run.embed[:, 1:])}, "is not its"),
        (lambda run: {"a": reduce.mean([1, 2])}, "takes a value of the run"),
        (lambda run: {"a": reduce.mean(run.embed, over="samples")}, "'rows', 'tokens' or 'steps'"),
        (lambda run: {"a": reduce.mean(run.embed, by=run.ids)}, "go together"),
        (lambda run: {"a": reduce.topk(run.embed, 0)}, "at least 1"),
        (lambda run: {"a": reduce.topk(run.embed[:, -1], 2, context=3)}, "whole rows"),
        (lambda run: {"a": reduce.reservoir(run.embed, 0)}, "at least 1"),
        (lambda run: {"a": reduce.histogram(run.embed, 5)}, "range=\\(low, high\\)"),
        (lambda run: {"a": reduce.histogram(run.embed, [1, 1])}, "ascending"),
        (lambda run: {"a": run.column("nope")}, "has no 'nope'"),
        (lambda run: {"a": run.column("label")}, "no number: say which"),
        (lambda run: {"a": run.column("label", values=["yes"])}, "not one of"),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is_sent(make: Any, said: str) -> None:
    """Typed errors that name the value and say what to do."""
    model = local_model()
    before = model.wait(model.core.traffic())
    with pytest.raises((TraceError, GraphError), match=said):
        model.map(data_set(), make)
    assert model.wait(model.core.traffic()) == before


def test_a_mistake_in_the_graph_names_the_users_line() -> None:
    """As in a trace: the file and line that made the node."""
    with pytest.raises(GraphError, match=r"test_function.py:\d+"):
        local_model().map(ROWS, lambda run: {"a": run.embed @ np.ones((3, 3), np.float32)})
    with pytest.raises(GraphError, match="pb.reduce.covariance|one vector per sample"):
        local_model().map(ROWS, lambda run: {"a": reduce.covariance(run.blocks[0].attn.z)})
    with pytest.raises(LimitExceededError, match="max_result_bytes|max_peak_bytes"):
        local_model().map(
            ROWS, lambda run: {"a": ops.broadcast_to(run.embed[:, -1, :, None, None], (run.rows, 16, 4096, 8192))}
        )


def test_data_sets_that_are_none() -> None:
    """A text, a number, nothing at all, a row that is no prompt, one too long, and bounds below 1."""
    model, look = local_model(), lambda run: {"a": reduce.mean(run.embed)}
    for wrong, said in [
        ("a text", "many rows"),
        (3, "many rows"),
        ([], "empty"),
        ([[3], 4.5], "row 1 of the data set"),
        ([[3], [3] * 99], "row 1 of the data set has 99 tokens"),
        ([[3], [99]], "row 1 of the data set holds the token id 99"),
    ]:
        with pytest.raises(TraceError, match=said):
            model.map(wrong, look)
    how: list[tuple[dict[str, Any], str]] = [
        ({"batch": 0}, "batch is an integer from 1 up"),
        ({"max_tokens": "many"}, "max_tokens is an integer from 1 up"),
        ({"lanes": 1.5}, "lanes is an integer"),
        ({"batches": 3}, "did you mean 'batch'"),
        ({"patience_s": "long"}, "patience_s is a number"),
        ({"timeout_s": -1}, "timeout_s is a number"),
        ({"keep": "yes"}, "keep is True or False"),
        ({"to": 3}, "to is a path"),
        ({"progress": 3}, "progress is a function"),
        ({"disabled": "cobatch"}, "disabled is a list of names"),
    ]
    for given, said in how:
        with pytest.raises(ArgumentError, match=said) as caught:
            model.map(ROWS, look, **given)
        assert "test_function.py:" in str(caught.value)
    with pytest.raises(ArgumentError, match="not the int 3 as the function"):
        model.map(ROWS, 3)


def test_an_exception_of_the_users_code_ends_the_map() -> None:
    """From the data set, the function or the callback: raised as it is, in the caller."""

    class OwnError(Exception):
        pass

    def rows():
        yield from ROWS
        raise OwnError("rows")

    def bad(*_: object) -> Any:
        raise OwnError("call")

    model, look = local_model(), lambda run: {"a": reduce.mean(run.embed)}
    with pytest.raises(OwnError, match="rows"):
        model.map(rows(), look, batch=4, window=4)
    with pytest.raises(OwnError, match="call"):
        model.map(ROWS, bad)
    with pytest.raises(OwnError, match="call"):
        model.map(ROWS, look, progress=bad)
    assert model.map(ROWS, look).rows == len(ROWS)


def test_one_length_only_needs_to_be_told_what_the_samples_are() -> None:
    """A function made for three tokens cannot be compared with four: over= says what its axes are."""
    rows = [[3, 4, 5], [6, 7, 8]]
    weights = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    with pytest.raises(TraceError, match="say pb.reduce.mean"):
        local_model().map(rows, lambda run: {"a": reduce.mean(run.embed * weights)})
    found = local_model().map(rows, lambda run: {"a": reduce.mean(run.embed * weights, over="tokens")})
    whole = fetched(local_model(), rows, "embed").value.astype(np.float64) * weights
    np.testing.assert_allclose(found["a"], whole.reshape(-1, D_MODEL).mean(0), rtol=1e-6)


def test_gradients_and_loops_work_in_every_batch() -> None:
    """Attribution of every row's own tokens, and a body of the graph: as in a trace, whatever the batches."""

    def look(run):
        h = run.blocks[1].resid_post
        metric = (run.logits[:, -1, 5] - run.logits[:, -1, 6]).sum()  # of all rows: each row's gradient is its own
        powers, _ = pb.scan(lambda carry, _: (carry * 0.5, None), h[:, -1], length=3)
        return {"attribution": (pb.grad(metric, h) * h).sum(axis=-1), "eighth": reduce.mean(powers)}

    model = local_model()
    found = model.map(ROWS, look, batch=7)
    whole = fetched(model, ROWS, "blocks.1.resid_post")
    np.testing.assert_allclose(found["eighth"], whole.value[:, -1].astype(np.float64).mean(0) / 8, rtol=1e-4, atol=1e-6)
    for i in (0, 5, 11):
        with model.trace([ROWS[i]]) as run:
            h = run.blocks[1].resid_post
            metric = (run.logits[:, -1, 5] - run.logits[:, -1, 6]).sum()
            alone = (pb.grad(metric, h) * h).sum(axis=-1).save()
        np.testing.assert_allclose(found["attribution"][i], alone.value[0], rtol=1e-3, atol=1e-4)


def test_rows_that_are_done_are_forgotten() -> None:
    """However long the data set, only the rows of a few windows are held at a time."""
    import gc

    from patchbay.datasets.batching import Row

    held = []

    def rows():
        rng = np.random.default_rng(0)
        for _ in range(2_000):
            yield rng.integers(3, 32, size=4).tolist()

    def note(progress: pb.datasets.MapProgress) -> None:
        if progress.batches % 10 == 0:
            gc.collect()  # what is held, and not what waits to be collected
            held.append(sum(type(thing) is Row for thing in gc.get_objects()))

    found = local_model().map(rows(), lambda run: {"m": reduce.mean(run.embed)}, batch=50, window=100, progress=note)
    assert found.rows == 2_000
    # Windows that are open or being read, batches that templates hold, the row that the function was tried on.
    assert 0 < max(held) <= 5 * 100 + 2 * 51 + 10, held


def test_models_of_images_are_mapped_by_their_inputs() -> None:
    """Rows are arrays, or dicts of arrays and fields; what is reduced is reduced over rows."""
    from tests.modalities import build as build_modality

    model = pb.local(build_modality("vit"))
    images = np.random.default_rng(0).standard_normal((11, 3, 16, 16)).astype(np.float32)
    rows = [{"pixel_values": image, "label": i % 2} for i, image in enumerate(images)]

    def look(run):
        first = run.blocks[1].resid_post[:, 0]
        by = reduce.mean(first, by=run.column("label"), groups=2)
        return {"by": by, "first": first, "top": reduce.topk(first, 2)}

    found = model.map(rows, look, batch=4)
    with model.trace({"pixel_values": images}) as run:
        whole = run.blocks[1].resid_post[:, 0].save()
    np.testing.assert_allclose(found["first"], whole.value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["by"][1], whole.value[1::2].astype(np.float64).mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["top"].rows[0], np.argsort(-whole.value[:, 0])[:2])
    alone = model.map(images, lambda run: {"first": run.blocks[1].resid_post[:, 0]}, batch=4)
    np.testing.assert_array_equal(alone["first"], found["first"])
    with pytest.raises(TraceError, match="takes no tokens"):
        model.map(rows, lambda run: {"a": reduce.count(run.mask)})
    with pytest.raises(TraceError, match="row 1 of the data set has no 'pixel_values'"):
        model.map([rows[0], {"label": 1}], look)
