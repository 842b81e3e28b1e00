"""Generating runs in a map: transformers' tokens, reductions over steps, sampling that no batch changes, resuming."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay import ops, reduce
from patchbay.errors import GraphError, TraceError
from patchbay.model import Model
from tests.datasets.common import local_model, token_rows
from tests.datasets.test_resume import assert_equal
from tests.e2e.served import tokenizer
from tests.tiny import D_MODEL, build

ROWS = [{"prompt": row, "bias": i % 4} for i, row in enumerate(token_rows(19, 8))]
NEW = 6
#: Tokens that end a row; the model says the first in the middle of most.
STOPS = (21, 30)


@cache
def text_model() -> Model:
    return pb.local(build("llama"), tokenizer())


def by_transformers(rows: list[dict[str, Any]], count: int = NEW) -> np.ndarray:
    """Greedy tokens of each prompt, [rows, count]; -1 behind a stop."""
    model = build("llama")
    found = np.full((len(rows), count), -1)
    for i, row in enumerate(rows):
        ids = torch.tensor([row["prompt"]])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[2, *STOPS],
        )
        new = made[0, ids.shape[1] :].tolist()
        found[i, : len(new)] = new
    return found


def greedy(t: Any, rows: Any) -> dict[str, Any]:
    run = t.generate(rows["prompt"], max_new_tokens=NEW, stop=STOPS)
    h = run.all_steps.blocks[1].resid_post.swapaxes(0, 1)  # [rows, steps, d_model]
    return {
        "ids": run.generated,
        "h": h,
        "mean": reduce.mean(h, over="steps"),
        "count": reduce.count(run.generated >= 0, over="steps"),
        "top": reduce.topk(h[..., :3], 4, over="steps", context=1),
        "drawn": reduce.reservoir(h, 5, over="steps"),
        "zeros": reduce.mean(h, over="rows"),
    }


@pytest.mark.parametrize("how", [{"batch": 4, "window": 9}, {"batch": 19}, {"batch": 1, "lanes": 2}])
def test_greedy_tokens_are_those_of_transformers(how: dict[str, Any]) -> None:
    """Rows of unequal length, whatever the batches; values of their steps, and reductions over those that came."""
    found = local_model().map(ROWS, greedy, **how)
    expected = by_transformers(ROWS)
    np.testing.assert_array_equal(found["ids"], expected)
    came = expected >= 0
    assert came.any(axis=1).all() and not came.all(), "some rows end early, or this shows nothing"
    assert found["h"].shape == (len(ROWS), NEW, D_MODEL)
    assert found["count"] == came.sum()
    every = found["h"].astype(np.float64)
    np.testing.assert_allclose(found["mean"], every[came].mean(axis=0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["zeros"], every.mean(axis=0), rtol=1e-6, atol=1e-9)
    assert not found["h"][~came].any()
    top = found["top"]
    for element in range(3):
        np.testing.assert_allclose(top.values[element], np.sort(every[came][:, element])[::-1][:4], rtol=1e-6)
        for k in range(4):
            row, step = top.rows[element, k], top.positions[element, k]
            np.testing.assert_allclose(every[row, step, element], top.values[element, k])
            around = [-1, *expected[row], -1][step : step + 3]
            assert top.context.ids[element, k].tolist() == around
            inside = np.isfinite(top.context.values[element, k])
            assert inside.tolist() == [i >= 0 for i in around]
    drawn = found["drawn"]
    assert came[drawn.rows, drawn.positions].all()
    np.testing.assert_array_equal(expected[drawn.rows, drawn.positions], drawn.tokens)
    np.testing.assert_array_equal(found["h"][drawn.rows, drawn.positions], drawn.values)


def test_activations_of_steps_are_those_of_a_trace_of_each_row() -> None:
    """What a site has at each step, and what an intervention does there, row by row."""

    def steered(t: Any, rows: Any) -> dict[str, Any]:
        run = t.generate(rows["prompt"], max_new_tokens=NEW)
        run.blocks[0].resid_post[:, -1] += 0.5
        run.logits[..., 2] = -1e9
        return {"ids": run.generated, "h": run.steps[1].blocks[1].resid_post[:, 0]}

    model = local_model()
    found = model.map(ROWS, steered, batch=5)
    for i, row in enumerate(ROWS):
        with model.generate(row["prompt"], max_new_tokens=NEW) as run:
            run.blocks[0].resid_post[:, -1] += 0.5
            run.logits[..., 2] = -1e9
            run.steps[1].blocks[1].resid_post[:, 0].save("h")
        assert found["ids"][i].tolist() == list(run.output.ids)
        np.testing.assert_allclose(found["h"][i], run.results["h"][0], atol=1e-5)


def drawing(seed: int, temperature: float = 1.3) -> Any:
    def draw(t: Any, rows: Any) -> dict[str, Any]:
        run = t.generate(rows["prompt"], max_new_tokens=NEW, temperature=temperature, top_k=12, seed=seed, stop=30)
        return {"ids": run.generated, "made": reduce.count(run.generated >= 0, over="steps")}

    return draw


def test_drawn_tokens_do_not_depend_on_the_batches() -> None:
    """Row i draws with the seed and its number: the same alone, in any batch, and as `model.generate` gives it."""
    model = local_model()
    found = model.map(ROWS, drawing(7), batch=19)["ids"]
    for how in ({"batch": 1}, {"batch": 4, "window": 6, "lanes": 2}, {"batch": 7, "max_tokens": 30}):
        np.testing.assert_array_equal(model.map(ROWS, drawing(7), **how)["ids"], found)
    assert (model.map(ROWS, drawing(8))["ids"] != found).any()
    for i in (0, 3, 18):
        with model.generate(
            ROWS[i]["prompt"], max_new_tokens=NEW, temperature=1.3, top_k=12, seed=7 + i, stop=30
        ) as run:
            pass
        assert [int(j) for j in found[i] if j >= 0] == list(run.output.ids)
    with model.generate(
        [r["prompt"] for r in ROWS], max_new_tokens=NEW, temperature=1.3, top_k=12, seed=7, stop=30
    ) as run:
        pass
    assert [list(row.ids) for row in run.output] == [[int(j) for j in row if j >= 0] for row in found]


def test_drawing_without_a_seed_is_refused() -> None:
    """Tokens that nobody could draw again are not drawn."""

    def draw(t: Any, rows: Any) -> dict[str, Any]:
        return {"ids": t.generate(rows["prompt"], max_new_tokens=3, temperature=0.8).generated}

    with pytest.raises(TraceError, match="has no seed: give seed="):
        local_model().map(ROWS, draw)


class BrokenOffError(Exception):
    """What stands for the end of the process."""


@pytest.mark.parametrize("make", [greedy, drawing(3)])
def test_a_generating_map_that_broke_off_goes_on_bit_for_bit(tmp_path: Path, make: Any) -> None:
    """Values of steps and reductions over them: those of an uninterrupted map."""
    model = local_model()
    how: dict[str, Any] = {"batch": 3, "window": 6, "lanes": 2}
    whole = model.map(ROWS, make, **how)

    def breaks(progress: Any) -> None:
        if progress.rows >= 10:
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        model.map(ROWS, make, resume=tmp_path / "state.json", progress=breaks, **how)
    seen: list[int] = []
    found = model.map(ROWS, make, resume=tmp_path / "state.json", progress=lambda p: seen.append(p.rows), **how)
    assert min(seen) >= 6
    assert_equal(dict(found), dict(whole))


def test_another_seed_or_length_is_another_map(tmp_path: Path) -> None:
    """How tokens are generated is part of what a state file belongs to; so is the column of the prompt."""
    model, state = local_model(), tmp_path / "state.json"
    rows = [{**row, "other": row["prompt"]} for row in ROWS]
    model.map(rows, drawing(3), resume=state)

    def other(t: Any, rows: Any) -> dict[str, Any]:
        run = t.generate(rows["other"], max_new_tokens=NEW, temperature=1.3, top_k=12, seed=3, stop=30)
        return {"ids": run.generated, "made": reduce.count(run.generated >= 0, over="steps")}

    for make in (drawing(4), drawing(3, 1.0), other):
        with pytest.raises(TraceError, match="the function, or a constant in it"):
            model.map(rows, make, resume=state)


def test_texts_come_back_as_texts(tmp_path: Path) -> None:
    """`run.text` returned from the function is one text for each row, in memory and when taken up again."""
    model = text_model()
    texts = ["the cat sat", "paris is a city", "rome", "the dog is on the mat in"]

    def say(t: Any, rows: Any) -> dict[str, Any]:
        run = t.generate(rows["text"], max_new_tokens=4, stop=["paris", [5]])
        return {"text": run.text, "ids": run.generated}

    found = model.map(texts, say, batch=2)
    with model.generate(texts, max_new_tokens=4, stop=["paris", [5]]) as run:
        pass
    assert found["text"] == run.text
    state = tmp_path / "state.json"
    assert model.map(texts, say, batch=2, resume=state)["text"] == run.text
    assert model.map(texts, say, batch=2, resume=state)["text"] == run.text
    shards = model.map(texts, say, batch=2, to=tmp_path / "rows")["text"]
    np.testing.assert_array_equal(shards.value("text"), found["ids"])
    with pytest.raises(TraceError, match="no tensors to stay on the server"):
        model.map(texts, say, keep=True)


def test_generated_values_pass_between_runs_of_a_batch() -> None:
    """A clean run's activation in a generating one, with each row's own strength."""

    def patched(t: Any, rows: Any) -> dict[str, Any]:
        clean = t.run(rows["prompt"])
        run = t.generate(rows["prompt"], max_new_tokens=3, eos=False)
        strength = rows["bias"].astype("float32")[:, None]
        run.prefill.blocks[1].resid_post[:, -1] += clean.blocks[0].resid_post[:, -1] * strength
        return {"ids": run.generated}

    model = local_model()
    found = model.map(ROWS, patched, batch=6)["ids"]
    for i, row in enumerate(ROWS):
        with model.trace() as t:
            clean, run = t.run(row["prompt"]), t.generate(row["prompt"], max_new_tokens=3, eos=False)
            run.prefill.blocks[1].resid_post[:, -1] += clean.blocks[0].resid_post[:, -1] * float(row["bias"])
        assert found[i].tolist() == list(run.output.ids)


def test_values_of_steps_stay_on_the_server_and_in_shards(tmp_path: Path) -> None:
    """The other places for values of rows take those of steps as well."""

    def look(t: Any, rows: Any) -> dict[str, Any]:
        run = t.generate(rows["prompt"], max_new_tokens=3)
        return {"h": run.all_steps.blocks[1].resid_post.swapaxes(0, 1), "seen": t.run(rows["prompt"]).embed}

    model = local_model()
    here = model.map(ROWS, look, batch=4)
    shards = model.map(ROWS, look, batch=4, to=tmp_path / "rows")["h"]
    np.testing.assert_array_equal(shards.value("h"), here["h"])
    for a, b in zip(shards.value("seen"), here["seen"], strict=True):
        np.testing.assert_array_equal(a, b)
    for kept in model.map(ROWS, look, batch=4, keep=True)["h"]:
        np.testing.assert_array_equal(kept.value.get(), here["h"][list(kept.rows)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda run: {"a": reduce.mean(run.all_steps.embed.swapaxes(0, 1))}, "over='steps'.*over='rows'"),
        (lambda run: {"a": run.all_steps.embed}, "steps stand before them.*swapaxes"),
        (lambda run: {"a": reduce.mean(run.prefill.embed[:, -1], over="steps")}, "no axis of steps"),
        (lambda run: {"a": reduce.mean(run.all_steps.embed.swapaxes(0, 1), over="tokens")}, "no sequence axis"),
        (lambda run: {"a": run.output}, "return run.text or run.generated"),
        (lambda run: {"a": run.logprob("x")}, "make a run of the prompt"),
        (lambda run: {"a": run.generated[:, 1:]}, "depends on the batch, but is not its 8 tokens or its steps"),
    ],
)
def test_what_cannot_be_made_of_steps_is_said(make: Any, said: str) -> None:
    """Typed errors that name the value and say what to do, before anything is generated."""
    with pytest.raises((TraceError, GraphError), match=said):
        local_model().map([{"prompt": [3] * 8}], lambda t, rows: make(t.generate(rows["prompt"], max_new_tokens=5)))


def test_prompts_that_leave_no_room_are_named() -> None:
    """A row that is too long for what is to follow it is an error with its number."""
    rows = [*ROWS, {"prompt": [3] * 30, "bias": 0}]
    with pytest.raises(TraceError, match="row 19 of the data set has 30 tokens in 'prompt', and 5 more"):
        local_model().map(rows, greedy)
    full = [{"prompt": [3] * 27, "bias": 0}, *ROWS]
    found = local_model().map(full, greedy, batch=5)
    np.testing.assert_array_equal(found["ids"], by_transformers(full))


def test_metrics_of_generation_are_reduced_by_group() -> None:
    """How often each group of rows said a token: by= on rows, conditions on the tokens."""

    def said(t: Any, rows: Any) -> dict[str, Any]:
        run = t.generate(rows["prompt"], max_new_tokens=NEW, stop=STOPS)
        ever = (run.generated == 28).astype("int64").sum(axis=1) > 0
        probability = run.stacked(ops.softmax(run.logits[:, -1], axis=-1).max(axis=-1)).swapaxes(0, 1)
        return {
            "ever": reduce.mean(ever, by=rows["bias"], groups=4),
            "by_step": reduce.mean(run.generated == 28, over="steps", by=rows["bias"], groups=4),
            "p": reduce.mean(probability, over="steps"),
        }

    found = local_model().map(ROWS, said, batch=4)
    ids, group = by_transformers(ROWS), np.array([row["bias"] for row in ROWS])
    ever = (ids == 28).any(axis=1)
    np.testing.assert_allclose(found["ever"], [ever[group == g].mean() for g in range(4)])
    by_step = [(ids[group == g] == 28).sum() / (ids[group == g] >= 0).sum() for g in range(4)]
    np.testing.assert_allclose(found["by_step"], by_step)
    assert 0 < found["p"] <= 1
