"""Generation under intervention against transformers' own `generate` and against a plain loop with plain hooks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.client import AsyncClient
from patchbay.errors import (
    CausalityError,
    GraphError,
    IndexOutOfRangeError,
    LimitExceededError,
    RequestCancelledError,
    ShapeError,
    TraceError,
)
from patchbay.ir.generation import unroll
from patchbay.ir.graph import Generation, Graph, Node, Output
from patchbay.ir.graph import Run as GraphRun
from patchbay.model import Model
from patchbay.testing import fake_client
from patchbay.tracing.generation import GeneratingRun
from patchbay.transport.local import LocalTransport
from patchbay_server.engine import Engine
from patchbay_server.models.loader import host, load
from patchbay_server.serving.local import local_servicer
from tests.tiny import D_MODEL, VOCAB, build, places

FAMILIES = ("gpt2", "llama")
IDS, SHORT, OTHER = [1, 5, 9, 3, 7], [4, 6, 6], [2, 2, 8, 30, 11]
STEPS = 8
#: Changes a site's tensor in place: ``edit(part, step, tokens so far)``.
Edit = Callable[[torch.Tensor, int, list[int]], None]
VECTOR = np.linspace(-1, 1, D_MODEL, dtype=np.float32)


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family))


def by_hand(
    family: str,
    ids: Sequence[int],
    edits: Sequence[tuple[str, Edit]] = (),
    reads: Sequence[str] = (),
    choose: Callable[[torch.Tensor], int] = lambda logits: int(logits.argmax()),
    steps: int = STEPS,
) -> tuple[list[int], dict[str, list[torch.Tensor]]]:
    """One row with a cache and plain hooks; edits apply before the reads at the same site."""
    model, where = build(family), places(family)
    made: list[int] = []
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in reads}
    now = 0

    def act(site: str, whole: torch.Tensor) -> torch.Tensor:
        whole = whole.clone()
        part = where[site].view(whole)
        for at, edit in edits:
            if at == site:
                edit(part, now, made)
        if site in seen:
            seen[site].append(part[0].clone())
        return whole

    def hook(site: str) -> Any:
        place = where[site]
        if place.side == "out":

            def after(module: Any, args: Any, output: Any) -> Any:
                return (act(site, output[0]), *output[1:]) if isinstance(output, tuple) else act(site, output)

            return model.get_submodule(place.path).register_forward_hook(after)

        def before(module: Any, args: Any) -> Any:
            return (act(site, args[0]), *args[1:])

        return model.get_submodule(place.path).register_forward_pre_hook(before)

    for site in {*reads, *(site for site, _ in edits)}:
        hook(site)
    cache_, given = None, torch.tensor([list(ids)])
    with torch.no_grad():
        for step in range(steps):
            now = step
            output = model(input_ids=given, past_key_values=cache_, use_cache=True)
            cache_ = output.past_key_values
            made.append(choose(output.logits[0, -1]))
            given = torch.tensor([[made[-1]]])
    return made, seen


def generated(
    family: str, inputs: Any, build_graph: Callable[[GeneratingRun], Any] = lambda run: None, **how: Any
) -> tuple[GeneratingRun, Any]:
    """The run once it has run, and what `build_graph` returned."""
    how = {"max_new_tokens": STEPS, "eos": False, **how}
    with model_of(family).generate(inputs, **how) as run:
        found = build_graph(run)
    return run, found


def ids_of(run: GeneratingRun) -> list[list[int]]:
    output = run.output if isinstance(run.output, list) else [run.output]
    return [list(row.ids) for row in output]


# --- as transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ids", [IDS, SHORT, OTHER])
def test_greedy_is_transformers_generate(family: str, ids: list[int]) -> None:
    """Greedy tokens, end-of-text included, are those of transformers, token for token."""
    run, _ = generated(family, ids, eos=True, max_new_tokens=20)
    theirs = build(family).generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert ids_of(run) == [theirs.tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_are_each_row_alone(family: str) -> None:
    """Rows of different lengths generate, and show, what each does alone."""

    def look(run: GeneratingRun) -> Any:
        run.blocks[1].resid_post += VECTOR
        run.steps[2].blocks[0].attn.pattern[:, :, :, -1] = 0.0
        return (
            run.all_steps.blocks[2].resid_post.save(),
            run.all_steps.logits.save(),
            run.steps[3].blocks[1].attn.pattern.save(),
            run.prefill.blocks[1].mlp_out.save(),
        )

    run, together = generated(family, [IDS, SHORT], look)
    for row, ids in enumerate((IDS, SHORT)):
        one, alone = generated(family, [ids], look)
        assert ids_of(run)[row] == ids_of(one)[0]
        for many, few in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_allclose(many.value[:, row], few.value[:, 0], atol=1e-5)
        pad = len(IDS) - len(ids)
        pattern, own = together[2].value[row], alone[2].value[0]
        np.testing.assert_allclose(pattern[..., pad:], own, atol=1e-6)
        assert not pattern[..., :pad].any()
        np.testing.assert_allclose(together[3].value[row, pad:], alone[3].value[0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(family: str) -> None:
    """Samples are those of a sampler by hand with the same seed; row i draws with seed + i."""
    how = {"temperature": 0.7, "top_k": 12, "top_p": 0.9}

    def sampler(seed: int) -> Callable[[torch.Tensor], int]:
        generator = torch.Generator().manual_seed(seed)

        def choose(logits: torch.Tensor) -> int:
            from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

            scores = logits[None].float()
            for warp in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.9)):
                scores = warp(None, scores)
            return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))

        return choose

    run, _ = generated(family, [IDS, IDS], seed=3, **how)
    again, _ = generated(family, [IDS, IDS], seed=3, **how)
    other, _ = generated(family, [IDS, IDS], seed=77, **how)
    assert ids_of(run) == [by_hand(family, IDS, choose=sampler(seed))[0] for seed in (3, 4)]
    assert ids_of(run) == ids_of(again) != ids_of(other)


def test_seed_is_made_up_and_kept() -> None:
    """Without a seed one is made up, and running with it again gives the same tokens."""
    run, _ = generated("gpt2", IDS, temperature=1.0)
    again, _ = generated("gpt2", IDS, temperature=1.0, seed=run.generation.seed)
    assert ids_of(run) == ids_of(again)


# --- interventions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["blocks.1.resid_post", "blocks.0.mlp_out", "blocks.1.attn_out", "embed"])
@pytest.mark.parametrize("when", ["every", "prefill", "step"])
def test_steering(family: str, site: str, when: str) -> None:
    """Adding at every step, at the prompt alone or at one step equals a hook that does so."""
    chosen = {"every": None, "prefill": 0, "step": 3}[when]

    def steer(run: GeneratingRun) -> Any:
        place = {"every": run, "prefill": run.prefill, "step": run.steps[3]}[when]
        place.site(site)[...] = place.site(site) + VECTOR * 2
        return run.all_steps.site(site).save(), run.all_steps.logits.save()

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        if chosen in (None, step):
            part += torch.tensor(VECTOR * 2)

    run, (seen, logits) = generated(family, IDS, steer)
    made, theirs = by_hand(family, IDS, [(site, edit)], [site, "logits"])
    assert ids_of(run) == [made]
    np.testing.assert_allclose(seen.value[:, 0], torch.stack([t[-1] for t in theirs[site]]), atol=1e-5)
    np.testing.assert_allclose(logits.value[:, 0], torch.stack([t[-1] for t in theirs["logits"]]), atol=1e-5)
    assert not np.allclose(logits.value[:, 0], by_hand(family, IDS, reads=["logits"])[1]["logits"][3][-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_condition_on_the_tokens_so_far(family: str) -> None:
    """`where` on the tokens so far steers exactly in the steps at which a hook with the same condition does."""
    plain = by_hand(family, IDS)[0]
    token = plain[2]

    def steer(run: GeneratingRun) -> Any:
        said = (run.so_far == token).any(axis=-1)[:, None, None]
        run.blocks[1].resid_post = pb.ops.where(said, -run.blocks[1].resid_post, run.blocks[1].resid_post)
        return run.stacked(said[:, 0, 0]).save()

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        if token in made:
            part *= -1

    run, said = generated(family, IDS, steer)
    made, _ = by_hand(family, IDS, [("blocks.1.resid_post", edit)])
    assert ids_of(run) == [made]
    assert said.value[:, 0].tolist() == [token in made[:step] for step in range(STEPS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_constrain_decoding(family: str) -> None:
    """What is written at the logits decides the next token: no token twice, as by hand."""

    def constrain(run: GeneratingRun) -> None:
        said = (run.so_far[:, :, None] == pb.ops.arange(VOCAB)).any(axis=1)
        run.logits = pb.ops.where(said[:, None], -1e9, run.logits)

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        part[:, -1, made] = -1e9

    run, _ = generated(family, [IDS, SHORT], constrain)
    assert ids_of(run) == [by_hand(family, ids, [("logits", edit)])[0] for ids in (IDS, SHORT)]
    assert all(len(set(row)) == STEPS for row in ids_of(run))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_inside_attention(family: str) -> None:
    """Ablating a head at every step equals the hook before the output projection."""

    def ablate(run: GeneratingRun) -> None:
        run.blocks[1].attn.z[:, :, 2] = 0.0

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        part[:, :, 2] = 0.0

    run, _ = generated(family, IDS, ablate)
    assert ids_of(run) == [by_hand(family, IDS, [("blocks.1.attn.z", edit)])[0]]


# --- across runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_value_of_another_run(family: str) -> None:
    """A value of an ordinary run is patched into one step of a generating run."""
    with model_of(family).trace() as t:
        source = t.run(OTHER)
        run = t.generate(IDS, max_new_tokens=STEPS, eos=False)
        run.steps[2].blocks[1].resid_post[:, -1] = source.blocks[1].resid_post[:, -1]
    with torch.no_grad():
        taken = build(family)(torch.tensor([OTHER]), output_hidden_states=True).hidden_states[2][0, -1]

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        if step == 2:
            part[:, -1] = taken

    assert ids_of(run) == [by_hand(family, IDS, [("blocks.1.resid_post", edit)])[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_value_of_a_step_in_another_run(family: str) -> None:
    """What one run has at step 4 is written in an ordinary run and in the first step of another generating run."""
    with model_of(family).trace() as t:
        first = t.generate(IDS, max_new_tokens=STEPS, eos=False)
        value = first.steps[4].blocks[1].resid_post[:, -1]
        plain = t.run(OTHER)
        plain.blocks[1].resid_post[:, -1] = value
        logits = plain.logits[0, -1].save()
        second = t.generate(OTHER, max_new_tokens=STEPS, eos=False)
        second.prefill.blocks[1].resid_post[:, -1] = value
    taken = by_hand(family, IDS, reads=["blocks.1.resid_post"])[1]["blocks.1.resid_post"][4][-1]

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        if step == 0:
            part[:, -1] = taken

    made, seen = by_hand(family, OTHER, [("blocks.1.resid_post", edit)], ["logits"])
    np.testing.assert_allclose(logits.value, seen["logits"][0][-1], atol=1e-5)
    assert ids_of(second) == [made]


def test_a_later_step_feeds_another_run_that_feeds_back() -> None:
    """A value may go from step 1 through another run into step 5 of the same run, which is generated anew for it."""
    with model_of("llama").trace() as t:
        run = t.generate(IDS, max_new_tokens=STEPS, eos=False)
        middle = t.run(OTHER)
        middle.blocks[0].resid_post[:, -1] = run.steps[1].blocks[0].resid_post[:, -1]
        run.steps[5].blocks[1].resid_post[:, -1] = middle.blocks[1].resid_post[:, -1]
    plain = by_hand("llama", IDS)[0]
    assert ids_of(run)[0][:5] == plain[:5]
    assert len(ids_of(run)[0]) == STEPS


# --- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_stops_are_per_row(family: str) -> None:
    """A row ends with the stop that it ran into; other rows go on, and show what they do alone."""
    alone = [by_hand(family, ids)[0] for ids in (IDS, OTHER)]
    stop = alone[0][1:3]
    run, states = generated(family, [IDS, OTHER], lambda run: run.all_steps.blocks[0].resid_post.save(), stop=[stop])
    expected = [next((row[: i + 2] for i in range(STEPS - 1) if row[i : i + 2] == stop), row) for row in alone]
    assert ids_of(run) == expected
    made = len(expected[0])
    assert made < STEPS
    assert states.value[:made, 0].any(axis=-1).all() and not states.value[made:, 0].any()
    if len(expected[1]) == STEPS:
        assert states.value[:, 1].any(axis=-1).all()


def test_past_the_last_step_warns_and_keeps_values() -> None:
    """A loop over steps that never happened warns; their values are zero, all others are what they were."""
    plain = by_hand("llama", IDS)[0]
    trace = model_of("llama").generate(IDS, max_new_tokens=STEPS, eos=False, stop=[plain[:3]])
    run = trace.__enter__()
    saved = [step.blocks[1].resid_post[:, -1].save(f"s{k}") for k, step in enumerate(run.steps)]
    run.steps[6].blocks[1].resid_post += 1.0
    with pytest.warns(UserWarning, match="stopped after 3 tokens: steps 3, 4, 5, 6, 7 never happened"):
        trace.execute()
    seen = by_hand("llama", IDS, reads=["blocks.1.resid_post"])[1]["blocks.1.resid_post"]
    assert ids_of(run) == [plain[:3]]
    for k, value in enumerate(saved):
        np.testing.assert_allclose(value.value[0], seen[k][-1] if k < 3 else np.zeros(D_MODEL), atol=1e-5)
    assert run.usage.passes == 3


# --- mistakes, and what is left behind ----------------------------------------------------------------------------


def test_a_value_of_every_step_is_not_saved_as_one() -> None:
    """Saving what differs at every step is an error at the line that made it, which says what to do."""
    with (
        pytest.raises(GraphError, match=r"run\.stacked\(value\)") as caught,
        model_of("gpt2").generate(IDS, max_new_tokens=4) as run,
    ):
        (run.blocks[0].resid_post * 2).save()
    assert "test_generation.py" in str(caught.value.location)


def test_shapes_that_differ_between_steps() -> None:
    """An index that only the prompt's forward has fails before anything is sent, naming the step and the line."""
    with (
        pytest.raises(IndexOutOfRangeError, match=r"step 1|index 4") as caught,
        model_of("gpt2").generate(IDS, max_new_tokens=4) as run,
    ):
        run.blocks[0].resid_post[:, 4] = 0.0
    assert "test_generation.py" in str(caught.value.location)


def test_steps_that_cannot_be() -> None:
    """Steps beyond max_new_tokens, writes of later values, and runs too long for the model are refused at once."""
    model = model_of("gpt2")
    with pytest.raises(IndexOutOfRangeError, match="0 to 3"), model.generate(IDS, max_new_tokens=4) as run:
        _ = run.steps[4]
    with pytest.raises(CausalityError, match="of step 1"), model.generate(IDS, max_new_tokens=4) as run:
        run.steps[1].blocks[0].resid_post = run.steps[2].blocks[0].resid_post
    with pytest.raises(GraphError, match="at most 32.*from 1 to 28"), model.generate(IDS, max_new_tokens=29):
        pass
    with pytest.raises(ShapeError, match=r"newest position, \[:, -1\]"), model.generate(IDS, max_new_tokens=4) as run:
        run.stacked(run.blocks[0].resid_post).save("h")
    with pytest.raises(TraceError, match="run itself"), model.generate(IDS, max_new_tokens=4) as run:
        run.all_steps.blocks[0].resid_post = 0.0
    llama = model_of("llama")
    with pytest.raises(GraphError, match="written .* cache"), llama.generate(IDS, max_new_tokens=4) as run:
        run.blocks[0].attn.rot_k = 0.0
    with pytest.raises(GraphError, match="differentiated by .* cache"), llama.generate(IDS, max_new_tokens=4) as run:
        pb.grad(run.steps[2].logits.sum(), wrt=run.steps[1].blocks[0].attn.rot_k).save()
    with pytest.raises(LimitExceededError, match="max_nodes"), model.trace() as t:
        run = t.generate([[1]], max_new_tokens=32)
        for _ in range(2000):
            run.blocks[0].resid_post += 0.0


def test_no_hooks_stay() -> None:
    """After generation, and after one that failed while it ran, the model carries no hook."""
    hosted = build("gpt2")
    model = pb.local(hosted)
    with model.generate(IDS, max_new_tokens=4) as run:
        run.blocks[0].resid_post += VECTOR
    with pytest.raises(IndexOutOfRangeError), model.generate(IDS, max_new_tokens=4) as run:
        rows = (run.so_far[:, 0] + 1) * 0 + 40
        run.steps[2].blocks[0].resid_post[rows] = 0.0
    for module in hosted.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_without_further_values() -> None:
    """A block that asks for nothing still generates; the graph prints its steps; the price counts every token."""
    with model_of("llama").generate(IDS, max_new_tokens=4, eos=False) as run:
        run.steps[1].blocks[0].mlp_out *= 2.0
        assert run.estimate().tokens == len(IDS) + 3
        assert "run0.steps[1].blocks[0].mlp_out *= " in str(run.graph)
        assert "generates up to 4 tokens" in str(run.graph)
    assert len(run.output) == 4
    assert run.generated.value.tolist() == [list(run.output.ids)]
    assert (run.usage.passes, run.usage.tokens) == (4, len(IDS) + 3)


def test_async() -> None:
    """The awaited twin generates the same tokens, alone and among other runs."""

    async def main() -> list[list[int]]:
        client = AsyncClient(LocalTransport(local_servicer(build("gpt2"), None, "local")))
        served = await client.model("local")
        async with served.generate(IDS, max_new_tokens=STEPS, eos=False) as run:
            pass
        async with served.trace() as t:
            other = await t.generate(IDS, max_new_tokens=STEPS, eos=False)
        await client.close()
        return ids_of(run) + ids_of(other)

    assert asyncio.run(main()) == [by_hand("gpt2", IDS)[0]] * 2


# --- text, files, other ways of serving -----------------------------------------------------------------------------


@cache
def demo() -> Model:
    hosted = load("demo")
    return pb.local(hosted.model, hosted.tokenizer)


def test_text_is_decoded_as_a_whole() -> None:
    """The text of several tokens has the tokenizer's own spaces; special tokens are left out of it."""
    with demo().generate("I watched the film and it was terrible. I felt", max_new_tokens=12) as run:
        pass
    assert " " in run.text.strip()
    assert "<eos>" not in run.text
    assert len(run.output.strings) == len(run.output.ids)


def test_a_saved_graph_generates_the_same(tmp_path: Path) -> None:
    """A graph with generating runs, saved, loaded and run, gives the same values."""
    with model_of("llama").generate([IDS, SHORT], max_new_tokens=6, temperature=0.9, stop=[3, [4, 5]]) as run:
        run.steps[2].blocks[1].resid_post += VECTOR
        run.all_steps.logits.save("logits")
        pb.save_graph(run.graph, tmp_path / "g.pb")
    loaded = pb.load_graph(tmp_path / "g.pb")
    assert loaded.runs == run.graph.runs
    again = model_of("llama").run(loaded)
    np.testing.assert_array_equal(again["logits"], run.results.logits)
    np.testing.assert_array_equal(again["run0.generated"], run.generated.value)


def test_writing_out_twice_changes_nothing() -> None:
    """A graph whose steps are written out stays as it is, so that it can be planned once more."""
    with model_of("gpt2").generate(IDS, max_new_tokens=4) as run:
        run.blocks[0].resid_post += VECTOR
        run.all_steps.logits.save("logits")
        once = unroll(run.graph).graph
    assert len(once.nodes) > len(run.graph.nodes)
    assert unroll(once).graph == once


def test_over_grpc(tmp_path: Path) -> None:
    """Over a socket: the same tokens, text, streamed steps and errors at the user's line."""
    from tests.e2e.served import MODEL_NAME, SERVED, twin

    heard: list[int] = []
    with SERVED["grpc.aio"](tmp_path) as served:
        model = served.client.model(MODEL_NAME)
        ids = model.tokenize("the capital of france is").ids
        prompt, stream = "the capital of france is", lambda step, tokens: heard.extend(tokens)
        with model.generate(prompt, max_new_tokens=6, stream=stream) as run:
            pass
        with pytest.raises(GraphError) as caught, model.generate(prompt, max_new_tokens=6) as bad:
            bad.blocks[0].resid_post.save()
    theirs = twin().generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert list(run.output.ids) == heard == theirs
    assert run.text.split() == [s for s in run.output.strings if not s.startswith("<pad>")]
    assert "test_generation.py" in str(caught.value.location)


def test_cancelled_between_steps() -> None:
    """A cancelled request stops inside generation, at a layer."""
    hosted = host(build("gpt2"))
    engine, layers = Engine(hosted), 0
    run = GraphRun((tuple(IDS),), generation=Generation(STEPS, eos=False))
    plan = engine.prepare(Graph((run,), (Node("run.tokens", (), {"step": STEPS}, 0),), (Output("t", 0),)))

    def cancelled() -> bool:
        nonlocal layers
        layers += 1
        return layers > 12

    with pytest.raises(RequestCancelledError):
        engine.run(plan, lambda event: None, cancelled)
    assert layers == 13
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hosted.model.modules())


def test_log_probability_of_a_continuation() -> None:
    """`run.logprob` sums the log-probabilities of the tokens of a continuation, for rows of any length."""
    texts = ["The capital of France is Paris.", "My teacher said that France has a capital called Paris."]
    with demo().trace() as t:
        many, one = t.run(texts), t.run(texts[0])
        t.save(many=many.logprob("Paris."), one=one.logprob("France is Paris"))
        with pytest.raises(TraceError, match="nothing stands before"):
            t.run(demo().tokenize("Paris is", add_special_tokens=False)).logprob("Paris")
    hosted = load("demo")

    def by_plain_forward(text: str, part: str) -> float:
        tokens = demo().tokenize(text)
        with torch.no_grad():
            shares = hosted.model(torch.tensor([tokens.ids])).logits[0].log_softmax(-1)
        return sum(float(shares[i - 1, tokens.ids[i]]) for i in tokens.positions(part))

    np.testing.assert_allclose(t.results.many, [by_plain_forward(text, "Paris.") for text in texts], atol=1e-4)
    np.testing.assert_allclose(t.results.one, by_plain_forward(texts[0], "France is Paris"), atol=1e-4)


def test_the_fake_server_says_that_it_generates_nothing() -> None:
    """Without a model behind it, generation is refused in words."""
    with (
        pytest.raises(GraphError, match="generates no tokens"),
        fake_client().model("fake").generate("a b", max_new_tokens=2),
    ):
        pass


def test_an_edited_model_generates_with_its_edit() -> None:
    """An edit of a model happens at every step of what it generates."""

    def steer(run: Any) -> None:
        run.blocks[1].resid_post += VECTOR

    def edit(part: torch.Tensor, step: int, made: list[int]) -> None:
        part += torch.tensor(VECTOR)

    with model_of("llama").edited(steer).generate(IDS, max_new_tokens=STEPS, eos=False) as run:
        pass
    assert ids_of(run) == [by_hand("llama", IDS, [("blocks.1.resid_post", edit)])[0]]
