"""Behaviours that other tools got wrong, each pinned by name, in this process and over plain gRPC.

The list comes from the test suites and the issues of nnsight and NDIF; what a test is called is what must hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchbay as pb
from patchbay.errors import CausalityError, GraphError, ShapeError, TraceError, ValueNotReadyError
from patchbay.model import Model
from tests.e2e.served import MODEL_NAME, SERVED, Served, tokens_of, twin
from tests.tiny import D_MODEL, N_LAYERS, build, places, run_hooked

FRANCE, ITALY, CAT = "the capital of france is", "the capital of italy is", "a cat sat on the mat"
VECTOR = np.linspace(-1, 1, D_MODEL, dtype=np.float32)


@pytest.fixture(scope="module", params=["in-process", "grpc.aio"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with SERVED[request.param](tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def model(served: Served) -> Model:
    return served.client.model(MODEL_NAME)


def hooked(ids: list[int], read: str = "logits", edits: Any = ()) -> np.ndarray:
    return np.asarray(run_hooked(twin(), places("llama"), torch.tensor([ids]), list(edits), read).numpy())


# --- batches and runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[FRANCE, ITALY], [FRANCE, "a cat", CAT]], ids=["equal", "padded"])
def test_batched_logits_match_solo(model: Model, texts: list[str]) -> None:
    """Rows of a batch, padded or not, are what each text gives alone; so are positions counted from the end."""
    with model.trace(texts) as run:
        run.save(logits=run.logits, h=run.blocks[1].resid_post[:, -2])
    for row, text in enumerate(texts):
        ids = tokens_of(text)
        np.testing.assert_allclose(run.results["logits"][row, -len(ids) :], hooked(ids)[0], rtol=1e-4, atol=1e-5)
        alone = hooked(ids, "blocks.1.resid_post")[0, -2]
        np.testing.assert_allclose(run.results["h"][row], alone, rtol=1e-4, atol=1e-5)


def test_an_edit_in_one_run_leaves_the_others_untouched(model: Model) -> None:
    """Other runs of the trace, and other rows of the run, are bit for bit what they are without the edit."""
    with model.trace() as t:
        a, b = t.run([FRANCE, ITALY]), t.run(FRANCE)
        a.blocks[0].resid_post[0] += 3.0
        t.save(a=a.logits, b=b.logits)
    with model.trace() as plain:
        a, b = plain.run([FRANCE, ITALY]), plain.run(FRANCE)
        plain.save(a=a.logits, b=b.logits)
    np.testing.assert_array_equal(t.results["a"][1], plain.results["a"][1])
    np.testing.assert_array_equal(t.results["b"], plain.results["b"])
    assert np.abs(t.results["a"][0] - plain.results["a"][0]).max() > 1e-2


def test_part_of_a_batch_is_skipped(model: Model) -> None:
    """Rows that skip a layer do; the others run it."""
    with model.trace([FRANCE, ITALY]) as run:
        run.blocks[1].skip(rows=[1])
        run.save(before=run.blocks[1].resid_pre, after=run.blocks[1].resid_post)
    before, after = run.results["before"], run.results["after"]
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[0] - before[0]).max() > 1e-3


def test_skip_really_avoids_compute(model: Model) -> None:
    """A skipped layer is not among those that ran."""
    with model.trace(FRANCE, disabled=["prefix_cache"]) as run:
        run.blocks[1].skip()
        run.logits.save()
    assert (run.usage.layers_run, run.usage.saved["skip_layers"]) == (N_LAYERS - 1, 1)


def test_early_stop_inside_a_multi_run_graph(model: Model) -> None:
    """Forwards end after the last site that is needed, the site's own writes and reads included, in every run."""
    with model.trace() as t:
        a, b = t.run(FRANCE), t.run(ITALY)
        b.blocks[0].resid_post[:, -1] = a.blocks[0].resid_post[:, -1]
        b.blocks[1].resid_post += 1.0
        t.save(last=b.blocks[1].resid_post, first=a.blocks[0].resid_post)
    assert t.usage.layers_run <= 2 * t.usage.passes < N_LAYERS * t.usage.passes

    source = hooked(tokens_of(FRANCE), "blocks.0.resid_post")

    def patch(x: torch.Tensor) -> None:
        x[:, -1] = torch.from_numpy(source[:, -1])

    def add(x: torch.Tensor) -> None:
        x += 1.0

    edits = [("blocks.0.resid_post", patch), ("blocks.1.resid_post", add)]
    np.testing.assert_allclose(
        t.results["last"], hooked(tokens_of(ITALY), "blocks.1.resid_post", edits), rtol=1e-4, atol=1e-5
    )


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_with_two_and_more_runs(model: Model) -> None:
    """Gradients of several runs of one trace, together or mixed into one metric, are those of each alone."""
    texts = [FRANCE, ITALY, CAT]
    with model.trace() as t:
        runs = [t.run(text) for text in texts]
        values = [run.blocks[0].resid_post for run in runs]
        metrics = [run.logits[0, -1, 3] for run in runs]
        t.save(each=[pb.grad(m, wrt=v) for m, v in zip(metrics, values, strict=True)])
        t.save(joint=pb.grad(metrics[0] * 2.0 + metrics[1] + metrics[2], wrt=values))
    for i, (text, factor) in enumerate(zip(texts, (2.0, 1.0, 1.0), strict=True)):
        with model.trace(text) as alone:
            g = pb.grad(alone.logits[0, -1, 3], wrt=alone.blocks[0].resid_post).save()
        np.testing.assert_allclose(t.results["each"][i], g.value, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(t.results["joint"][i], factor * g.value, rtol=1e-4, atol=1e-6)


def test_a_gradient_edit_propagates(model: Model) -> None:
    """A gradient that is doubled on its way arrives doubled further down."""
    with model.trace(FRANCE) as run:
        early, late = run.blocks[0].resid_post, run.blocks[1].resid_post
        metric = run.logits[0, -1, 3]
        edited = pb.ops.stop_gradient(pb.grad(metric, wrt=late) * 2.0)
        run.save(plain=pb.grad(metric, wrt=early), edited=pb.grad((late * edited).sum(), wrt=early))
    np.testing.assert_allclose(run.results["edited"], 2 * run.results["plain"], rtol=1e-4, atol=1e-6)
    assert np.abs(run.results["plain"]).max() > 1e-4


# --- generation -------------------------------------------------------------------------------------------------------


def test_a_loop_past_the_last_generated_step_warns_and_keeps_values(model: Model) -> None:
    """Steps that never happened read as zero, with a warning; all others keep what they had."""
    with model.generate(FRANCE, max_new_tokens=1, eos=False) as first:
        pass
    t = model.trace()
    run = t.generate(FRANCE, max_new_tokens=5, eos=False, stop=[first.output.ids[0]])
    t.save(h=[run.steps[k].blocks[0].resid_post[:, -1] for k in range(5)])
    with pytest.warns(UserWarning, match=r"stopped after 1 tokens: steps 1, 2, 3, 4 never happened"):
        t.execute()
    kept, *never = t.results["h"]
    np.testing.assert_allclose(kept, hooked(tokens_of(FRANCE), "blocks.0.resid_post")[:, -1], rtol=1e-4, atol=1e-5)
    assert not any(h.any() for h in never)


def test_an_intervention_on_one_step_hits_only_that_step(model: Model) -> None:
    """What is added at step 2 is seen there, and neither before nor after at that site."""
    with model.generate(FRANCE, max_new_tokens=4, eos=False) as run:
        before = [step.blocks[0].mlp_out for step in run.steps]
        run.steps[2].blocks[0].mlp_out += VECTOR
        run.save(before=before, after=[step.blocks[0].mlp_out for step in run.steps])
    moved = [np.abs(a - b).max() for a, b in zip(run.results["after"], run.results["before"], strict=True)]
    assert [m > 0.5 for m in moved] == [False, False, True, False]


def test_steering_is_applied_at_every_decoded_token(model: Model) -> None:
    """A write without a step is at the prompt and at each token: generating equals growing the text by hand."""
    with model.generate(FRANCE, max_new_tokens=4, eos=False) as run:
        run.blocks[1].resid_post += VECTOR * 4

    def steer(x: torch.Tensor) -> None:
        x += torch.from_numpy(VECTOR * 4)

    ids = tokens_of(FRANCE)
    for _ in range(4):
        ids.append(int(hooked(ids, "logits", [("blocks.1.resid_post", steer)])[0, -1].argmax()))
    assert list(run.output.ids) == ids[-4:]


# --- what is shipped and what comes back ------------------------------------------------------------------------------


def test_a_variable_rebound_in_a_notebook_cell_is_not_uploaded_again(model: Model) -> None:
    """Results of an earlier cell that are merely bound, or were used before, do not travel; sizes stay."""
    sizes = []
    cached: Any = None
    for _ in range(4):
        with model.trace(FRANCE) as run:  # every cell rebinds the names of the one before
            h = run.blocks[1].resid_post
            cached = run.logits.save("logits")
            run.save(h=h)
        big = np.concatenate([run.results["h"]] * 200)  # noqa: F841 - bound, as a notebook's globals are
        sizes.append(run.trace.sent_bytes)
    assert cached.value.shape[-1] == model.card.d_vocab
    assert len(set(sizes)) == 1
    assert sizes[0] < 2_000


def test_unsaved_values_never_return(model: Model) -> None:
    """What was not asked for has no value, and nothing of it was received."""
    with model.trace(FRANCE) as run:
        h = run.blocks[1].resid_post
        run.save(top=run.logits[0, -1].argmax())
    with pytest.raises(ValueNotReadyError, match="not saved"):
        _ = h.value
    assert list(run.results) == ["top"]
    assert run.trace.received_bytes < 500


def test_saved_values_never_alias_changed_buffers(model: Model) -> None:
    """Values read before, between and after writes at one site are three values; no array shares another's memory."""
    with model.trace(FRANCE) as run:
        first = run.blocks[1].resid_post
        run.blocks[1].resid_post[:, -1] = 0.0
        second = run.blocks[1].resid_post
        run.blocks[1].resid_post *= 2.0
        run.save(first=first, again=first, second=second, third=run.blocks[1].resid_post, part=first[:, 0])
    r = run.results
    np.testing.assert_allclose(r["first"], hooked(tokens_of(FRANCE), "blocks.1.resid_post"), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(r["second"][:, :-1], r["first"][:, :-1])
    np.testing.assert_array_equal(r["third"], 2 * r["second"])
    kept = {name: value.copy() for name, value in r.items()}
    r["first"][...] = 7.0
    for name in ("again", "second", "third", "part"):
        np.testing.assert_array_equal(r[name], kept[name])


def test_a_cache_captures_values_after_interventions_and_skipped_modules(model: Model) -> None:
    """Reading every block's output below the edits sees the edits, a skipped block's stream included."""
    with model.trace(FRANCE) as run:
        run.blocks[0].resid_post += 1.0
        run.blocks[1].skip()
        run.save(cache=[block.resid_post for block in run.blocks])

    def add(x: torch.Tensor) -> None:
        x += 1.0

    cache = run.results["cache"]
    expected = hooked(tokens_of(FRANCE), "blocks.0.resid_post", [("blocks.0.resid_post", add)])
    np.testing.assert_allclose(cache[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cache[1], cache[0])
    assert np.abs(cache[2] - cache[1]).max() > 1e-3


# --- order, mistakes, traces beside each other ------------------------------------------------------------------------


def test_out_of_order_access_points_at_the_line(model: Model) -> None:
    """A write that needs a later site is refused with both lines, before anything is sent."""
    with pytest.raises(CausalityError) as caught, model.trace(FRANCE) as run:
        late = run.blocks[2].resid_post
        run.blocks[0].resid_post = late
        run.logits.save()
    assert len(re.findall(rf"{Path(__file__).name}:\d+", str(caught.value))) >= 2
    assert run.trace.sent_bytes == 0


def test_sites_may_be_named_in_any_order(model: Model) -> None:
    """Reading late before early is no mistake: the program's order matters at one site only."""
    with model.trace(FRANCE) as run:
        late = run.blocks[2].resid_post
        early = run.blocks[0].resid_post
        run.save(late=late, early=early)
    np.testing.assert_array_equal(run.results["late"], hooked(tokens_of(FRANCE), "blocks.2.resid_post"))
    np.testing.assert_array_equal(run.results["early"], hooked(tokens_of(FRANCE), "blocks.0.resid_post"))


def test_saving_outside_a_trace_raises(model: Model) -> None:
    """Once the block is left nothing more can be asked for, read or computed."""
    with model.trace(FRANCE) as run:
        h = run.blocks[0].resid_post.save()
    for late in (lambda: h.save("again"), lambda: run.blocks[1].resid_post, lambda: h * 2, lambda: run.save(x=h)):
        with pytest.raises(TraceError, match="has run"):
            late()


def test_a_raising_block_leaks_nothing(served: Served, model: Model) -> None:
    """After blocks that raised, on the client or on the server, the next trace is as if they had not been."""
    with model.trace(FRANCE) as run:
        before = run.logits.save()
    for _ in range(20):
        with contextlib.suppress(RuntimeError), model.trace(FRANCE) as run:
            run.blocks[0].resid_post += 100.0
            raise RuntimeError("a mistake in the user's own code")
        with pytest.raises(ShapeError), model.trace(FRANCE) as run:
            run.blocks[0].resid_post += np.ones(7, np.float32)
        with pytest.raises(GraphError), model.trace(FRANCE) as run:
            run.blocks[0].resid_post += 100.0
            run.save(x=run.logits[0, run.logits.argmax(-1).max() + 1000])
    with model.trace(FRANCE) as run:
        after = run.logits.save()
    np.testing.assert_array_equal(before.value, after.value)
    np.testing.assert_array_equal(after.value, hooked(tokens_of(FRANCE)))


def test_concurrent_traces_keep_separate_saves(model: Model) -> None:
    """Traces open at the same time, and run by many threads under the same names, get their own values."""
    with model.trace() as a, model.trace() as b:
        x, y = a.run(FRANCE), b.run(ITALY)
        a.save(out=x.logits)
        b.save(out=y.logits)
    np.testing.assert_array_equal(a.results["out"], hooked(tokens_of(FRANCE)))
    np.testing.assert_array_equal(b.results["out"], hooked(tokens_of(ITALY)))

    def work(i: int) -> float:
        with model.trace(FRANCE) as run:
            run.blocks[0].resid_post[:, -1] = float(i)
            run.save(out=run.blocks[0].resid_post[0, -1, 0])
        return float(run.results["out"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(64))) == [float(i) for i in range(64)]


def test_a_foreign_tenant_in_the_same_batch_changes_nothing(model: Model) -> None:
    """While others send edits of every size, one client's values stay as they are."""
    expected = hooked(tokens_of(FRANCE))
    stop = threading.Event()

    def neighbour() -> None:
        while not stop.is_set():
            with model.trace([ITALY, CAT]) as run:
                run.blocks[0].resid_post *= float("nan")
                run.save(out=run.logits[:, -1])

    threads = [threading.Thread(target=neighbour) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with model.trace(FRANCE) as run:
                out = run.logits.save()
            np.testing.assert_allclose(out.value, expected, rtol=1e-5, atol=1e-6)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_the_same_names_in_two_clients_are_two_things(served: Served, model: Model) -> None:
    """Two clients and two models of one client, with the same names for their values, do not meet."""
    other = served.client.model(MODEL_NAME)
    edited = model.edited(lambda run: run.blocks[0].skip())
    with model.trace(FRANCE) as one, other.trace(ITALY) as two, edited.trace(FRANCE) as three:
        for run in (one, two, three):
            run.save(h=run.blocks[0].resid_post)
    np.testing.assert_array_equal(one.results["h"], hooked(tokens_of(FRANCE), "blocks.0.resid_post"))
    np.testing.assert_array_equal(two.results["h"], hooked(tokens_of(ITALY), "blocks.0.resid_post"))
    np.testing.assert_array_equal(three.results["h"], hooked(tokens_of(FRANCE), "blocks.0.resid_pre"))


def test_an_aborted_stream_frees_its_worker(served: Served, model: Model) -> None:
    """A client that walks away in the middle holds nobody up."""
    t = model.trace()
    for _ in range(8):
        run = t.run(FRANCE)
        t.save(**{f"out{run.index}": run.logits})
    for _ in range(5):
        assert served.abandon_after(t.graph, events=1) == 1
    with model.trace(FRANCE, timeout_s=30.0) as run:
        out = run.logits.save()
    np.testing.assert_array_equal(out.value, hooked(tokens_of(FRANCE)))


# --- models and edits -------------------------------------------------------------------------------------------------


def test_edits_stack_survive_saving_and_leave_the_original_alone(model: Model, tmp_path: Path) -> None:
    """Two edits act in order; a saved trace of the edited model runs as it did; the plain model is plain."""

    def double(run: Any) -> None:
        run.blocks[0].resid_post *= 2.0

    def shift(run: Any) -> None:
        run.blocks[0].resid_post += 1.0

    both = model.edited(double).edited(shift)
    with both.trace(FRANCE) as run:
        run.save(h=run.blocks[0].resid_post, logits=run.logits)
        pb.save_graph(run, tmp_path / "edited.pb")
    plain = hooked(tokens_of(FRANCE), "blocks.0.resid_post")
    np.testing.assert_allclose(run.results["h"], 2 * plain + 1, rtol=1e-5, atol=1e-6)
    again = model.run(pb.load_graph(tmp_path / "edited.pb"))
    assert again["logits"].tobytes() == run.results["logits"].tobytes()
    with model.trace(FRANCE) as after:
        after.save(logits=after.logits)
    np.testing.assert_array_equal(after.results["logits"], hooked(tokens_of(FRANCE)))


def test_two_wrappers_on_one_model_are_independent() -> None:
    """Two clients over one module in this process: what one does the other does not see."""
    module = build("llama")
    one, two = pb.local(module), pb.local(module)
    ids = tokens_of(FRANCE)
    with one.trace(ids) as a:
        a.blocks[0].resid_post *= 3.0
        a.save(out=a.logits)
        with two.trace(ids) as b:
            b.save(out=b.logits)
    np.testing.assert_array_equal(b.results["out"], hooked(ids))
    assert np.abs(a.results["out"] - b.results["out"]).max() > 1e-2


def test_plain_inference_is_unchanged_after_instrumentation() -> None:
    """A model that was hosted, traced, differentiated and generated from computes the bits that it did before."""
    module = build("llama")
    ids = torch.tensor([tokens_of(FRANCE)])
    with torch.no_grad():
        before = module(ids).logits
    model = pb.local(module)
    with model.trace(ids.tolist()) as run:
        run.blocks[1].attn.pattern = run.blocks[1].attn.pattern
        run.save(g=pb.grad(run.logits[0, -1, 3], wrt=run.blocks[0].resid_post))
    with model.generate(ids.tolist(), max_new_tokens=2):
        pass
    with torch.no_grad():
        after = module(ids).logits
    assert torch.equal(before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_mib() -> float:
    """Resident memory of this process, once what nobody needs was let go."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def many_traces(model: Model, count: int) -> None:
    """Traces of two runs that patch, steer and now and then differentiate; prompts and constants differ."""
    rng = np.random.default_rng(0)
    for i in range(count):
        ids = [(i * 7 + k * 3) % 30 + 1 for k in range(6)]
        with model.trace() as t:
            a, b = t.run(ids), t.run([ids, ids[::-1]])
            steered = a.blocks[1].resid_post[:, -1] + rng.standard_normal(D_MODEL).astype(np.float32)
            b.blocks[1].resid_post[:, -1] = steered
            t.save(logits=b.logits[:, -1])
            t.save(g=a.embed if i % 4 else pb.grad(a.logits[0, -1, 3], wrt=a.blocks[0].resid_post))
        assert t.results["logits"].shape == (2, model.card.d_vocab)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_many_traces_leave_memory_flat(model: Model) -> None:
    """After a warm-up, 500 traces in one process add less than 5 MB (10,000 in the slow test)."""
    many_traces(model, 100)
    before = resident_mib()
    many_traces(model, 500)
    assert resident_mib() - before < 5.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_ten_thousand_traces_leave_memory_flat(model: Model) -> None:
    """After a warm-up, 10,000 traces in one process add less than 20 MB."""
    many_traces(model, 1_000)
    before = resident_mib()
    many_traces(model, 10_000)
    assert resident_mib() - before < 20.0
