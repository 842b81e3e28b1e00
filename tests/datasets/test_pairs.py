"""Rows of several columns: pairs of prompts, answers as numbers and as tokens, against traces and plain torch."""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay import ops, reduce
from patchbay.errors import GraphError, TraceError
from patchbay.model import AsyncModel, Model
from tests.datasets.common import local_model, token_rows
from tests.e2e.served import tokenizer
from tests.tiny import D_MODEL, N_LAYERS, build


@cache
def text_model() -> Model:
    return pb.local(build("llama"), tokenizer())


def pairs(count: int = 23, longest: int = 7) -> list[dict[str, Any]]:
    """Rows whose two prompts are equally long, with two answers and a number."""
    clean, corrupt = token_rows(count, longest), token_rows(count, longest, seed=1)
    rng = np.random.default_rng(2)
    rows = []
    for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)):
        b = [b[k % len(b)] for k in range(len(a))]
        right, wrong = rng.integers(3, 32, size=2).tolist()
        rows.append({"clean": a, "corrupt": b, "right": right, "wrong": wrong, "weight": i / 4})
    return rows


def effects(t: Any, rows: Any) -> dict[str, Any]:
    """What each layer's last position carries from the clean run into the corrupt one."""
    clean, corrupt = t.run(rows["clean"]), t.run(rows["corrupt"])

    def metric(run: Any) -> Any:
        last = run.logits[:, -1]
        right = ops.take_along_axis(last, rows["right"][:, None], axis=-1)[:, 0]
        return right - ops.take_along_axis(last, rows["wrong"][:, None], axis=-1)[:, 0]

    change = []
    for layer in range(N_LAYERS):
        patched = t.run(rows["corrupt"])
        patched.blocks[layer].resid_post[:, -1] = clean.blocks[layer].resid_post[:, -1]
        change.append(metric(patched) - metric(corrupt))
    effect = ops.stack(change, axis=1)  # [rows, layers]
    return {"effect": effect, "mean": reduce.mean(effect), "var": reduce.var(effect), "top": reduce.topk(effect, 2)}


def by_hand(data: list[dict[str, Any]]) -> np.ndarray:
    """The same with hooks on the same model, a pair at a time, float64 [rows, layers]."""
    model = build("llama")
    found = np.zeros((len(data), N_LAYERS))
    with torch.no_grad():
        for i, row in enumerate(data):
            clean, corrupt = torch.tensor([row["clean"]]), torch.tensor([row["corrupt"]])
            states = model.model(clean, output_hidden_states=True).hidden_states
            before = model(corrupt).logits[0, -1]
            for layer in range(N_LAYERS):
                kept: dict[str, torch.Tensor] = {}
                hook = model.model.layers[layer].register_forward_hook(
                    lambda module, args, out, kept=kept: kept.setdefault("h", out if torch.is_tensor(out) else out[0])
                )
                model(clean)
                hook.remove()
                value = kept["h"][:, -1]
                if layer + 1 < N_LAYERS:
                    assert torch.equal(states[layer + 1][:, -1], value)

                def put(module: Any, args: Any, out: Any, value: torch.Tensor = value) -> Any:
                    hidden = (out if torch.is_tensor(out) else out[0]).clone()
                    hidden[:, -1] = value
                    return hidden if torch.is_tensor(out) else (hidden, *out[1:])

                hook = model.model.layers[layer].register_forward_hook(put)
                after = model(corrupt).logits[0, -1]
                hook.remove()
                found[i, layer] = (after - before)[row["right"]] - (after - before)[row["wrong"]]
    return found


@pytest.mark.parametrize("how", [{"batch": 4, "window": 9}, {"batch": 23}, {"batch": 5, "max_tokens": 12, "lanes": 1}])
def test_patching_over_pairs_is_what_hooks_give(how: dict[str, Any]) -> None:
    """Clean activations put into corrupt runs, rows of unequal length, whatever the batches; and their mean."""
    data = pairs()
    found = local_model().map(data, effects, **how)
    expected = by_hand(data)
    np.testing.assert_allclose(found["effect"], expected, atol=1e-4)
    np.testing.assert_allclose(found["mean"], expected.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found["var"], expected.var(axis=0), rtol=1e-3, atol=1e-4)
    order = np.argsort(-expected, axis=0)[:2].T
    np.testing.assert_array_equal(found["top"].rows, order)


def test_patching_over_pairs_is_what_a_loop_of_traces_gives() -> None:
    """The body of the function is that of a trace: the same numbers, pair by pair."""
    data = pairs(9)
    found = local_model().map(data, effects, batch=4)
    for i, row in enumerate(data):
        with local_model().trace() as t:
            one = {key: [value] if key in ("clean", "corrupt") else np.array([value]) for key, value in row.items()}
            one |= {key: t.constant(one[key]) for key in ("right", "wrong")}
            t.save(effect=effects(t, one)["effect"])
        np.testing.assert_allclose(found["effect"][i], t.results["effect"][0], atol=1e-5)


def test_rows_may_be_dicts_tuples_and_named_tuples_from_anything() -> None:
    """Lists, generators, a data set with a length and items; the same numbers from each."""
    data = pairs(9)
    pair = namedtuple("pair", tuple(data[0]))

    class Items:
        """What Hugging Face's data sets are to a map."""

        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return data[range(len(data))[index]]

    def numbered(t: Any, rows: Any) -> dict[str, Any]:
        return effects(t, {name: rows[i] for i, name in enumerate(data[0])})

    model = local_model()
    found = model.map(data, effects, batch=4)["effect"]
    for rows, function in [
        ((row for row in data), effects),
        ([pair(**row) for row in data], effects),
        (Items(), effects),
        ([tuple(row.values()) for row in data], numbered),
    ]:
        np.testing.assert_array_equal(model.map(rows, function, batch=4)["effect"], found)


def test_prompts_of_unequal_length_in_a_row() -> None:
    """Values follow the tokens of their own prompt, in memory and in reductions; the other's length does not matter."""
    clean, other = token_rows(17, 5), token_rows(17, 9, seed=3)
    data = [{"a": a, "b": b} for a, b in zip(clean, other, strict=True)]

    def look(t: Any, rows: Any) -> dict[str, Any]:
        a, b = t.run(rows["a"]), t.run(rows["b"])
        h = b.blocks[1].resid_post
        cross = ops.einsum("rid,rjd->rij", a.embed, b.embed)
        return {
            "a": a.embed,
            "b": h,
            "cross": cross,
            "mean": [reduce.mean(a.embed), reduce.mean(h)],
            "count": [reduce.count(a.mask), reduce.count(b.mask)],
            "top": reduce.topk(h[..., :2], 3, context=1),
        }

    model = local_model()
    found = model.map(data, look, batch=4, window=8)
    alone = model.map(other, lambda run: {"h": run.blocks[1].resid_post, "m": reduce.mean(run.blocks[1].resid_post),
        "top": reduce.topk(run.blocks[1].resid_post[..., :2], 3, context=1)}, batch=4, window=8)  # fmt: skip
    for i in range(17):
        assert found["a"][i].shape == (len(clean[i]), D_MODEL)
        assert found["cross"][i].shape == (len(clean[i]), len(other[i]))
        np.testing.assert_allclose(found["b"][i], alone["h"][i], atol=1e-5)
    assert found["count"] == [sum(map(len, clean)), sum(map(len, other))]
    np.testing.assert_allclose(found["mean"][1], alone["m"], rtol=1e-5, atol=1e-6)
    top = found["top"]
    np.testing.assert_allclose(top.values, alone["top"].values, atol=1e-5)
    for element in range(2):
        for k in range(3):
            row, position = top.rows[element, k], top.positions[element, k]
            np.testing.assert_allclose(alone["h"][row][position, element], top.values[element, k], atol=1e-5)
            around = [-1, *other[row], -1][position : position + 3]
            assert top.context.ids[element, k].tolist() == around
            assert top.tokens[element, k] == around[1]


def test_shards_of_several_prompts_keep_each_ones_lengths(tmp_path: Any) -> None:
    """A folder of shards gives back what memory does, whichever prompt a value follows."""
    data = [{"a": a, "b": b} for a, b in zip(token_rows(13, 4), token_rows(13, 9, seed=3), strict=True)]

    def look(t: Any, rows: Any) -> dict[str, Any]:
        a, b = t.run(rows["a"]), t.run(rows["b"])
        return {
            "a": a.embed,
            "b": b.embed,
            "cross": ops.einsum("rid,rjd->rij", a.embed, b.embed),
            "heads": b.blocks[0].attn.pattern,  # as many heads as some rows have tokens
        }

    here = local_model().map(data, look, batch=3, window=5)
    shards = local_model().map(data, look, batch=3, window=5, to=tmp_path / "rows")["a"]
    for name in ("a", "b", "cross", "heads"):
        for x, y in zip(shards.value(name), here[name], strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
    first = shards[0]
    assert [row.tolist() for row in first.row_tokens("b")] == [row["b"] for row in data[:5]]
    assert [row.tolist() for row in first.row_tokens()] == [row["a"] for row in data[:5]]
    assert first.lengths_of("b").tolist() == [len(row["b"]) for row in data[:5]]
    assert first.lengths_of("a").tolist() == first.lengths.tolist()
    with pytest.raises(KeyError, match="no run was made over 'c'; there are: 'a', 'b'"):
        first.row_tokens("c")
    for kept in local_model().map(data, look, batch=3, keep=True)["b"]:
        assert kept.lengths == tuple(len(data[row]["b"]) for row in kept.rows)


def test_a_function_that_pairs_positions_takes_rows_of_equal_length_alone() -> None:
    """Patching position by position over prompts of unequal length is refused, and the row is named."""

    def patch(t: Any, rows: Any) -> dict[str, Any]:
        clean, corrupt = t.run(rows["clean"]), t.run(rows["corrupt"])
        corrupt.blocks[0].resid_post[...] = clean.blocks[0].resid_post
        h = corrupt.blocks[1].resid_post
        return {"h": h, "mean": reduce.mean(h)}

    def by_position(t: Any, rows: Any) -> dict[str, Any]:
        clean, corrupt = t.run(rows["clean"]), t.run(rows["corrupt"])
        runs = []
        for position in range(clean.seq):
            run = t.run(rows["corrupt"])
            run.blocks[0].resid_post[:, position] = clean.blocks[0].resid_post[:, position]
            runs.append(run.logits[:, -1, 3] - corrupt.logits[:, -1, 3])
        return {"effect": ops.stack(runs, axis=1)}

    model, data = local_model(), pairs(11)
    found = model.map(data, patch, batch=4)
    for i, row in enumerate(data):
        with model.trace(row["clean"]) as run:
            run.save(h=run.blocks[1].resid_post)
        np.testing.assert_allclose(found["h"][i], run.results["h"][0], atol=1e-5)
    every = np.concatenate(list(found["h"])).astype(np.float64)
    np.testing.assert_allclose(found["mean"], every.mean(axis=0), rtol=1e-6, atol=1e-7)
    assert [len(e) for e in model.map(data, by_position, batch=4)["effect"]] == [len(row["clean"]) for row in data]
    uneven = [*data[:6], {**data[6], "corrupt": [*data[6]["corrupt"], 5]}, *data[7:]]
    for function in (patch, by_position):
        with pytest.raises(TraceError, match="row 6 of the data set has . tokens in 'clean' and . in 'corrupt'.*pairs"):
            model.map(uneven, function, batch=4)
    first = [{**data[0], "corrupt": [*data[0]["corrupt"], 5]}, *data[1:]]
    with pytest.raises(TraceError, match="row 0 of the data set has 6 tokens in 'clean' and 7 in 'corrupt'.*pairs"):
        model.map(first, patch, batch=4)


def test_answers_are_numbers_labels_tokens_and_texts() -> None:
    """Each row's own answer: as a token id, as a place among labels, as a continuation of several tokens."""
    model = text_model()
    texts = ["the capital of france is", "the cat sat on the", "rome is a city"]
    answers = ["paris", "mat", "paris is"]
    data = [{"text": x, "answer": y, "length": len(x)} for x, y in zip(texts, answers, strict=True)] * 3

    def score(t: Any, rows: Any) -> dict[str, Any]:
        run = t.run(rows["text"])
        return {
            "logprob": run.logprob(rows["answer"]),
            "label": rows.column("answer", values=answers),
            "length": rows["length"] * 2,
            "row": rows.numbers,
        }

    found = model.map(data, score, batch=2)
    with model.trace() as t:
        t.save(p=[t.run(x).logprob(y, append=True) for x, y in zip(texts, answers, strict=True)])
    np.testing.assert_allclose(found["logprob"], t.results["p"] * 3, atol=1e-5)
    assert found["label"].tolist() == [0, 1, 2] * 3
    assert found["length"].tolist() == [2 * len(x) for x in texts] * 3
    assert found["row"].tolist() == list(range(9))

    def single(run: Any) -> dict[str, Any]:
        return {"id": run.column("answer").to_single_token()}

    ids = model.map(data[:2], single, batch=1)["id"]
    assert ids.tolist() == [model.to_single_token("paris"), model.to_single_token("mat")]
    assert model.map([{"text": "rome", "answer": 7}], single)["id"].tolist() == [7]
    with pytest.raises(TraceError, match=r"row 2 of the data set has 'paris is' as 'answer', which is 2 tokens"):
        model.map(data, single)


def test_each_rows_own_word_is_found() -> None:
    """Where a column's text stands in a prompt: the subject of each fact."""
    model = text_model()
    data = [
        {"text": "the capital of france is paris", "subject": "france"},
        {"text": "a cat sat on the mat", "subject": "cat"},
        {"text": "the dog is in rome", "subject": "dog"},
    ]

    def look(t: Any, rows: Any) -> dict[str, Any]:
        run = t.run(rows["text"])
        return {"ids": run.ids[range(run.rows), run.position(rows["subject"])]}

    found = model.map(data, look, batch=2)
    assert found["ids"].tolist() == [model.to_single_token(row["subject"]) for row in data]
    with pytest.raises(TraceError, match="row 1 of the data set: 'dog' does not stand"):
        model.map([data[0], {**data[1], "subject": "dog"}], look)
    with pytest.raises(TraceError, match="row 0 of the data set has 3 as 'subject', which is no text"):
        model.map([{**data[0], "subject": 3}], look)


def test_a_run_that_is_the_same_for_every_batch() -> None:
    """A text, or token ids, of one row beside the rows: to patch from one prompt into all."""
    model = text_model()
    texts = ["the cat sat", "paris is a city in france", "rome"]

    def patch(t: Any, rows: Any) -> dict[str, Any]:
        source, run = t.run("the capital of france is"), t.run(rows["text"])
        run.blocks[1].resid_post[:, -1] = source.blocks[1].resid_post[:, -1]
        return {"logits": run.logits[:, -1]}

    found = model.map(texts * 2, patch, batch=2)
    with model.trace() as t:
        source, runs = t.run("the capital of france is"), [t.run(text) for text in texts]
        for run in runs:
            run.blocks[1].resid_post[:, -1] = source.blocks[1].resid_post[:, -1]
        t.save(logits=[run.logits[0, -1] for run in runs])
    np.testing.assert_allclose(found["logits"], t.results["logits"] * 2, atol=1e-4)


ROWS = pairs(12)


@pytest.mark.parametrize(
    ("change", "make", "said"),
    [
        ({}, lambda t, rows: {"a": rows["nope"]}, r"row 0 of the data set has no 'nope' \(it has: 'clean', 'corrupt'"),
        ({5: {"clean": [3]}}, lambda t, rows: {"a": t.run(rows["corrupt"]).embed}, "row 5 .* has no 'corrupt'"),
        ({5: {"clean": [3]}}, lambda t, rows: {"a": rows["right"]}, "row 5 of the data set has no 'right'"),
        ({5: {"right": "paris"}}, lambda t, rows: {"a": rows["right"]}, "row 5 .* 'paris' .*to_single_token"),
        ({5: {"right": None}}, lambda t, rows: {"a": rows["right"] + 1}, "row 5 .* None .* no number"),
        ({5: {"right": 0.5}}, lambda t, rows: {"a": rows["right"]}, "row 5 .* 0.5 .*floats in every row"),
        ({5: {"right": [1, 2]}}, lambda t, rows: {"a": rows["right"]}, r"row 5 .* \[2\] .* row 0 has \[\]"),
        ({5: {"right": [[1], [2, 3]]}}, lambda t, rows: {"a": rows["right"]}, "row 5 .* no number"),
        ({}, lambda t, rows: {"a": t.run(rows["weight"]).embed}, "row 0 of the data set, 'weight'"),
        ({}, lambda t, rows: {"a": t.run(rows["right"] * 2).embed}, "a column of the rows"),
        ({5: {"clean": [3] * 99}}, lambda t, rows: {"a": t.run(rows["clean"]).embed}, "row 5 .* 99 tokens"),
        ({}, lambda t, rows: {"a": t.run(rows["clean"]).embed.save()}, "in a map return"),
        ({}, lambda t, rows: t.save(a=t.run(rows["clean"]).embed), "in a map return .*'a'"),
        ({}, lambda t, rows: t.keep("a", t.run(rows["clean"]).embed), "keep=True"),
        ({}, lambda t, rows, more: {}, "the function takes a run, or a trace and its rows"),
        ({}, lambda run: {"a": run.embed}, "row 0 of the data set has no 'text'"),
    ],
)
def test_mistakes_are_named_with_their_row(change: dict[int, Any], make: Any, said: str) -> None:
    """Missing columns, texts where numbers belong, kinds and shapes that change, prompts that are none."""
    rows = [*ROWS]
    for i, columns in change.items():
        rows[i] = columns if set(columns) == {"clean"} and i == 5 and len(columns["clean"]) == 1 else rows[i] | columns
    with pytest.raises((TraceError, GraphError), match=said) as error:
        local_model().map(rows, make, batch=3, window=3)
    assert "test_pairs.py:" in str(error.value)


def test_tables_by_column_are_refused_with_the_way_out() -> None:
    """A dict of columns and a data frame would be read as their columns' names."""
    table = {"clean": [[3, 4]], "corrupt": [[5, 6]]}
    with pytest.raises(TraceError, match="this is a dict.*zip"):
        local_model().map(table, effects)

    class Frame(dict):  # type: ignore[type-arg]
        def iterrows(self) -> None: ...

        def to_dict(self) -> None: ...

    with pytest.raises(TraceError, match="to_dict\\('records'\\)"):
        local_model().map(Frame(table), effects)


def test_integers_among_floats_are_floats_whatever_the_batches() -> None:
    """The kind of a column is that of the first row, so that no batch has another."""
    rows = [{"text": [3], "x": 0.5}, *({"text": [3], "x": i} for i in range(7))]
    for batch in (1, 3, 8):
        found = local_model().map(rows, lambda run: {"x": run.column("x")}, batch=batch)
        assert found["x"].dtype == np.float32
        assert found["x"].tolist() == [0.5, 0, 1, 2, 3, 4, 5, 6]


def test_a_sweep_of_many_runs_is_cut_to_what_the_server_takes() -> None:
    """Rows of a batch times the runs over them stay within the server's limits without anybody counting."""
    from dataclasses import replace

    model = local_model()
    card = model.core.card
    data = pairs(20)
    found = model.map(data, effects, batch=20)
    assert found.batches == 1
    model.core.card = replace(card, limits=replace(card.limits, max_rows=5 * 4, max_tokens=5 * 18))
    try:
        cut = model.map(data, effects, batch=20)
    finally:
        model.core.card = card
    assert cut.batches > 5
    np.testing.assert_allclose(cut["effect"], found["effect"], atol=1e-5)


async def test_an_asynchronous_model_takes_the_same_function() -> None:
    """Texts that the function names are asked for without the user awaiting them before."""
    from patchbay.client import AsyncClient
    from patchbay.transport.local import LocalTransport
    from patchbay_server.serving.local import local_servicer

    servicer = local_servicer(build("llama"), tokenizer(), name="here")

    def look(t: Any, rows: Any) -> dict[str, Any]:
        run = t.run(rows["text"])
        return {"p": run.logprob(" paris is"), "a": rows["answer"].to_single_token(), "q": t.run("rome").logits[:, -1]
                + run.logits[:, -1]}  # fmt: skip

    data = [{"text": "the cat", "answer": "mat"}, {"text": "rome is", "answer": "paris"}]
    try:
        async with AsyncClient(lambda: LocalTransport(servicer)) as client:
            model: AsyncModel = await client.model("here")
            found = await model.map(data, look, batch=1)
    finally:
        servicer.close()
    expected = text_model().map(data, look, batch=1)
    for name in ("p", "a", "q"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_pairs_of_images_and_rows_of_several_inputs() -> None:
    """Models with other inputs: runs over a column of arrays, or over a dict of columns by the inputs' names."""
    from tests.modalities import build as build_modality

    vit = pb.local(build_modality("vit"))
    images = np.random.default_rng(0).standard_normal((2, 7, 3, 16, 16)).astype(np.float32)
    pairs = [{"clean": a, "corrupt": b} for a, b in zip(*images, strict=True)]

    def patch(t: Any, rows: Any) -> dict[str, Any]:
        clean, corrupt = t.run(rows["clean"]), t.run({"pixel_values": rows["corrupt"]})
        corrupt.blocks[0].resid_post[:, 0] = clean.blocks[0].resid_post[:, 0]
        h = corrupt.blocks[1].resid_post[:, 0]
        return {"h": h, "mean": reduce.mean(h)}

    found = vit.map(pairs, patch, batch=3)
    with vit.trace() as t:
        clean, corrupt = (t.run({"pixel_values": some}) for some in images)
        corrupt.blocks[0].resid_post[:, 0] = clean.blocks[0].resid_post[:, 0]
        t.save(h=corrupt.blocks[1].resid_post[:, 0])
    np.testing.assert_allclose(found["h"], t.results["h"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["mean"], t.results["h"].astype(np.float64).mean(0), rtol=1e-4, atol=1e-5)

    t5 = pb.local(build_modality("t5"))
    data = [{"question": row, "start": [0, 3 + i]} for i, row in enumerate(token_rows(7, 5))]

    def answer(t: Any, rows: Any) -> dict[str, Any]:
        run = t.run({"text": rows["question"], "decoder_input_ids": rows["start"]})
        return {"logits": run.logits[:, -1], "length": run.lengths}

    found = t5.map(data, answer, batch=3)
    assert found["length"].tolist() == [len(row["question"]) for row in data]
    for i, row in enumerate(data):
        with t5.trace({"text": [row["question"]], "decoder_input_ids": [row["start"]]}) as run:
            run.logits[0, -1].save("logits")
        np.testing.assert_allclose(found["logits"][i], run.results["logits"], rtol=1e-3, atol=1e-4)
    with pytest.raises(TraceError, match="needs decoder_input_ids beside tokens: make its runs over a dict"):
        t5.map(data, lambda t, rows: {"a": t.run(rows["question"]).logits[:, -1]})


def test_a_mask_in_a_loop_is_not_taken_for_the_one_outside() -> None:
    """`run.mask` used first inside the body of a loop, then by a reduction."""

    def look(run: Any) -> dict[str, Any]:
        step = lambda carry, _: (ops.where(run.mask[:, :, None], carry * 0.5, 0.0), None)  # noqa: E731
        halved, _ = pb.scan(step, run.embed, length=1)
        return {"half": reduce.mean(halved), "whole": reduce.mean(run.embed), "n": reduce.count(run.mask)}

    rows = token_rows(9, 5)
    found = local_model().map(rows, look, batch=4)
    np.testing.assert_allclose(found["half"] * 2, found["whole"], rtol=1e-6, atol=1e-9)
    assert found["n"] == sum(map(len, rows))


def test_a_short_answer_fits_behind_a_long_prompt() -> None:
    """Room for continuations is that of each row's own, not of the first row's."""
    data = [{"text": [3, 4], "answer": [5] * 6}, {"text": [7] * 31, "answer": [6]}]
    found = local_model().map(data, lambda run: {"p": run.logprob(run.column("answer"))}, batch=2)
    for i, row in enumerate(data):
        with local_model().trace([row["text"]]) as run:
            run.logprob([row["answer"]]).save("p")
        np.testing.assert_allclose(found["p"][i], run.results["p"][0], atol=1e-4)
