"""`run.logprob` of continuations that the run does not hold, against scoring the whole text with plain transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import TraceError
from patchbay.model import Model
from patchbay_server.models.loader import load
from tests.tiny import N_LAYERS, build, places, run_hooked

PROMPTS = ["The capital of France is", "My teacher said that Italy has a capital called"]


@cache
def demo() -> Model:
    hosted = load("demo")
    return pb.local(hosted.model, hosted.tokenizer)


@cache
def tiny() -> Model:
    return pb.local(build("llama"))


def plain(ids: list[int], count: int, edits: Any = ()) -> float:
    """Summed log-probability of the last `count` of `ids` in a plain forward under plain hooks."""
    logits = run_hooked(build("llama"), places("llama"), torch.tensor([ids]), list(edits), "logits")
    shares = logits[0].log_softmax(-1)
    return sum(float(shares[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))


def test_texts() -> None:
    """Total log-probability per row, for a text of several tokens, of rows of any length."""
    with demo().trace() as t:
        many, one = t.run(PROMPTS), t.run(PROMPTS[0])
        t.save(many=many.logprob(" Paris."), one=one.logprob(" Paris."), each=many.logprob([" Rome", " Paris."]))
    hosted = load("demo")

    def score(prompt: str, more: str) -> float:
        ids = list(hosted.tokenizer(prompt).input_ids)
        tail = list(hosted.tokenizer(more, add_special_tokens=False).input_ids)
        with torch.no_grad():
            shares = hosted.model(torch.tensor([ids + tail])).logits[0].log_softmax(-1)
        return sum(float(shares[len(ids) - 1 + i, token]) for i, token in enumerate(tail))

    np.testing.assert_allclose(t.results.many, [score(p, " Paris.") for p in PROMPTS], atol=1e-4)
    np.testing.assert_allclose(t.results.one, score(PROMPTS[0], " Paris."), atol=1e-4)
    np.testing.assert_allclose(t.results.each, [score(PROMPTS[0], " Rome"), score(PROMPTS[1], " Paris.")], atol=1e-4)
    assert t.results.one > t.results.many[1]


def test_where_it_stands_or_behind() -> None:
    """A text that stands in the run is scored there; `append` says otherwise."""
    with demo().trace() as t:
        run = t.run("The capital of France is Paris.")
        t.save(there=run.logprob("Paris"), behind=run.logprob("Paris", append=True))
    assert len(t.runs) == 2
    assert t.results.there > -2.0 > t.results.behind


def test_what_was_written_holds() -> None:
    """A steered position and a silenced head act on the continuation through the prompt's positions alone."""
    ids, tail = [1, 5, 9, 3, 7], [8, 30, 4]
    vector = np.linspace(-1, 1, 16, dtype=np.float32)
    with tiny().trace(ids) as run:
        run.blocks[0].resid_post[:, -1] += vector
        run.blocks[1].attn.z[:, :, 2] = 0.0
        run.save(p=run.logprob(tail), again=run.logprob(tail[:1]))

    def steer(x: torch.Tensor) -> None:
        x[:, 4] += torch.from_numpy(vector)

    def silence(z: torch.Tensor) -> None:
        z[:, :5, 2] = 0.0

    edits = [("blocks.0.resid_post", steer), ("blocks.1.attn.z", silence)]
    np.testing.assert_allclose(run.results.p, plain(ids + tail, 3, edits), atol=1e-4)
    np.testing.assert_allclose(run.results.again, plain(ids + tail[:1], 1, edits), atol=1e-4)
    assert abs(run.results.p - plain(ids + tail, 3)) > 1e-2


@pytest.mark.parametrize("site", ["blocks.1.attn.pattern", "blocks.1.attn.attn_scores", "blocks.1.ln1.scale"])
def test_every_kind_of_site_is_carried_over(site: str) -> None:
    """Reading a site and writing it back changes nothing, also where rows and continuations differ in length."""
    rows, tails = [[1, 5, 9, 3, 7], [2, 8]], [[4], [6, 11, 3]]
    with tiny().trace(rows) as run:
        run.site(site)[...] = run.site(site)
        run.save(p=run.logprob(tails), same=run.logprob([5, 6]))
    for found, count in (("p", None), ("same", 2)):
        more = tails if count is None else [[5, 6]] * 2
        expected = [plain(row + tail, len(tail)) for row, tail in zip(rows, more, strict=True)]
        np.testing.assert_allclose(run.results[found], expected, atol=1e-4)


def test_edits_of_the_model_act_on_the_continuation_too() -> None:
    """An edited model is another model: its edit is at every position of the longer run."""
    ids, tail = [1, 5, 9], [8, 30]

    def edit(run: Any) -> None:
        run.blocks[N_LAYERS - 1].mlp_out *= 2.0

    with tiny().edited(edit).trace(ids) as run:
        p = run.logprob(tail).save()

    def double(x: torch.Tensor) -> None:
        x *= 2.0

    expected = plain(ids + tail, 2, [(f"blocks.{N_LAYERS - 1}.mlp_out", double)])
    np.testing.assert_allclose(p.value, expected, atol=1e-4)


def test_many_continuations_share_a_forward() -> None:
    """Choices of a question are scored together."""
    with tiny().trace([1, 5, 9, 3]) as run:
        run.save(scores=[run.logprob(choice) for choice in ([4], [5, 6], [7, 8, 9])])
    assert run.usage.passes == 1
    expected = [plain([1, 5, 9, 3, *c], len(c)) for c in ([4], [5, 6], [7, 8, 9])]
    np.testing.assert_allclose(run.results.scores, expected, atol=1e-4)


def test_mistakes() -> None:
    """Another number of continuations than rows, none at all, too long, text without a tokenizer."""
    with tiny().trace() as t:
        run = t.run([[1, 2], [3, 4]])
        for given, message in (
            ([[1], [2], [3]], "3 continuations for 2 rows"),
            ([[], [1]], "no tokens"),
            (list(range(31)), "takes 32"),
            ([[1.5], [2]], "text, token ids or Tokens"),
        ):
            with pytest.raises(TraceError, match=message):
                run.logprob(given)
        t.save(x=run.embed)


async def test_awaited() -> None:
    """In an asynchronous trace the text's tokens are asked for before; ids need nothing."""
    from patchbay.client import AsyncClient
    from patchbay.transport.local import LocalTransport
    from patchbay_server.serving.local import local_servicer

    hosted = load("demo")
    async with AsyncClient(LocalTransport(local_servicer(hosted.model, hosted.tokenizer))) as client:
        model = await client.model("local")
        async with model.trace(PROMPTS[0]) as run:
            with pytest.raises(TraceError, match="await model.tokenize"):
                run.logprob(" Paris.")
            tokens = await model.tokenize(" Paris.", add_special_tokens=False)
            run.save(text=run.logprob(" Paris."), ids=run.logprob(tokens))
    with demo().trace(PROMPTS[0]) as other:
        p = other.logprob(" Paris.").save()
    np.testing.assert_allclose([run.results.text, run.results.ids], [p.value] * 2, atol=1e-5)
