"""One suite, three ways of serving: in this process, over plain gRPC, and through Ray Serve behind its ingress.

Whatever a client may observe must be the same: values (against plain PyTorch hooks on a twin of the model), errors,
usage.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import patchbay as pb
from patchbay.client import Client
from patchbay.errors import (
    CausalityError,
    GraphError,
    IndexOutOfRangeError,
    InvalidRequestError,
    LimitExceededError,
    NotFoundError,
    ProtocolError,
    RequestCancelledError,
    ShapeError,
    UnknownSiteError,
)
from patchbay.model import Model
from tests.e2e.served import MODEL_NAME, SERVED, Served, tokens_of, twin
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, Place, places, run_hooked

FRANCE, ITALY = "the capital of france is", "the capital of italy is"


@pytest.fixture(scope="module", params=[pytest.param(k, marks=pytest.mark.ray if k == "ray" else ()) for k in SERVED])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A running service of each kind with the same model, and a client of it."""
    with SERVED[request.param](tmp_path_factory.mktemp(request.param.replace(".", "-"))) as running:
        yield running


@pytest.fixture
def model(served: Served) -> Model:
    return served.client.model(MODEL_NAME)


def hooked(text: str, read: str, edits: list | None = None) -> np.ndarray:
    return run_hooked(twin(), places("llama"), torch.tensor([tokens_of(text)]), edits or [], read).numpy()


def test_the_models_and_the_card_are_told(served: Served, model: Model) -> None:
    """ListModels and GetModel tell the model, its widths and its sites."""
    assert MODEL_NAME in [m.name for m in served.client.models()]
    assert (model.card.n_layers, model.card.d_model, model.card.d_vocab) == (N_LAYERS, D_MODEL, VOCAB)
    assert "blocks.2.attn.pattern" in model.card
    assert f"{N_LAYERS} layers" in repr(model)


def test_text_is_tokenized_by_the_server(model: Model) -> None:
    """Ids, strings and offsets come from the model's own tokenizer."""
    tokens = model.tokenize(FRANCE)
    assert list(tokens.ids) == tokens_of(FRANCE)
    assert [FRANCE[a:b] for a, b in tokens.offsets] == FRANCE.split()
    assert model.to_single_token("france") == tokens_of("france")[0]


def test_a_read_equals_a_plain_hook(model: Model) -> None:
    """One site of one run, bit for bit."""
    with model.trace(FRANCE) as run:
        h = run.blocks[2].resid_post[:, -1].save()
    np.testing.assert_array_equal(h.value, hooked(FRANCE, "blocks.2.resid_post")[:, -1])


def test_the_readme_example(model: Model) -> None:
    """Patching between runs, scaling a site, softmax and topk, a tree of results."""
    with model.trace(disabled=["prefix_cache"]) as t:  # others of these tests have run the same texts
        a, b = t.run(FRANCE), t.run(ITALY)
        b.blocks[1].resid_post[:, -1] = a.blocks[1].resid_post[:, -1]
        b.blocks[2].mlp_out *= 0.0
        p = b.logits[:, -1].softmax(-1)
        t.save(p=p, top=p.topk(5))
    source = torch.from_numpy(hooked(FRANCE, "blocks.1.resid_post"))
    edits = [
        ("blocks.1.resid_post", lambda h: h[:, -1].copy_(source[:, -1])),
        ("blocks.2.mlp_out", lambda h: h.mul_(0.0)),
    ]
    expected = torch.from_numpy(hooked(ITALY, "logits", edits))[:, -1].softmax(-1)
    np.testing.assert_allclose(t.results["p"], expected, rtol=1e-5, atol=1e-6)
    values, indices = expected.topk(5)
    np.testing.assert_allclose(t.results["top"].values, values, rtol=1e-5)
    np.testing.assert_array_equal(t.results["top"].indices, indices)
    assert t.usage.passes == 1
    assert t.usage.layers_run == N_LAYERS
    assert t.usage.bytes_out == t.results["p"].nbytes + values.numel() * 4 + indices.numel() * 8


def test_every_hookable_site_reads_and_writes_as_by_hand(model: Model) -> None:
    """For each canonical site: its value, and the logits after adding to its last position."""
    where: dict[str, Place] = places("llama")
    with model.trace(deterministic=True) as t:
        read_all = t.run(FRANCE)
        t.save(read={site: read_all.site(site) for site in where})
        edited = {}
        for site in where:
            run = t.run(FRANCE)
            run.site(site)[:, -1] += 0.5
            edited[site] = run.logits
        t.save(edited=edited)
    for site in where:
        np.testing.assert_array_equal(t.results["read"][site], hooked(FRANCE, site), err_msg=site)
        by_hand = hooked(FRANCE, "logits", [(site, lambda h: h[:, -1].add_(0.5))])
        np.testing.assert_array_equal(t.results["edited"][site], by_hand, err_msg=site)


def test_rows_of_unequal_length(model: Model) -> None:
    """[:, -1] is the last token of every row, whatever its length."""
    with model.trace(["the cat", FRANCE]) as run:
        h = run.blocks[1].resid_post[:, -1].save()
        mask = run.mask
    np.testing.assert_allclose(h.value[0], hooked("the cat", "blocks.1.resid_post")[0, -1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h.value[1], hooked(FRANCE, "blocks.1.resid_post")[0, -1], rtol=1e-5, atol=1e-5)
    assert mask.sum(1).tolist() == [2, 5]


def test_work_that_is_not_needed_is_left_out_and_told(model: Model) -> None:
    """Reading layer 0 of three runs one of them."""
    with model.trace(FRANCE, disabled=["prefix_cache"]) as run:
        run.blocks[0].resid_post.save("h")
    assert (run.usage.layers_run, run.usage.layers_skipped) == (1, N_LAYERS - 1)
    assert run.usage.run_ms > 0


def test_large_values_arrive_whole(model: Model) -> None:
    """Tens of megabytes in chunks, both ways: a large constant out and its product back, to the bit."""
    weight = np.random.default_rng(0).standard_normal((VOCAB, 200_000)).astype(np.float32)
    with model.trace(FRANCE) as run:
        big = (run.logits * 0.0 + 1.0)[0, :1] @ weight[:, :100_000]
        tall = run.blocks[0].resid_pre[0, 0, 0] + weight
        run.save(big=big, tall=tall)
    assert run.results["tall"].nbytes == weight.nbytes
    first = hooked(FRANCE, "blocks.0.resid_pre")[0, 0, 0]
    np.testing.assert_array_equal(run.results["tall"], first + weight)
    np.testing.assert_allclose(run.results["big"][0], weight[:, :100_000].sum(0), rtol=1e-3, atol=1e-3)


def test_a_mistake_in_shapes_is_raised_at_its_line_and_sends_nothing(model: Model) -> None:
    """ShapeError at once, naming this file; the trace has sent no byte."""
    with pytest.raises(ShapeError) as error, model.trace(FRANCE) as run:
        run.blocks[1].resid_post = run.blocks[0].resid_post[:, :, :3]
    assert error.value.location is not None
    assert "test_conformance.py" in error.value.location


def test_a_circle_names_both_lines(model: Model) -> None:
    """CausalityError with the line of the write and of the read."""
    with pytest.raises(CausalityError) as error, model.trace(FRANCE) as run:
        run.blocks[0].resid_post = run.blocks[2].resid_post
        run.save(x=run.logits)
    assert str(error.value).count("test_conformance.py") >= 2


def test_an_error_that_only_the_server_can_see_comes_back_to_the_line(model: Model) -> None:
    """An index out of range in data is the server's verdict and the user's line."""
    with pytest.raises(IndexOutOfRangeError, match="99") as error, model.trace(FRANCE) as run:
        largest = run.logits.argmax(-1) * 0 + 99
        run.save(x=run.blocks[0].resid_post[0, largest[0]])
    assert error.value.location is not None
    assert "test_conformance.py" in error.value.location


def test_the_server_verifies_for_itself(served: Served, model: Model) -> None:
    """A graph sent around the client's own checks is refused with the same class, node and field."""
    from patchbay.ir.graph import Graph, Node, Output, Run

    bad = Graph((Run(((1, 2),)),), (Node("site.read", (), {"site": "blocks.0.resid_pst"}, 0),), (Output("x", 0),))
    with pytest.raises(UnknownSiteError, match="resid_post") as error:
        served.execute(bad)
    assert error.value.node == 0
    nodes = (Node("const", (), {"scalar": 1.0}), Node("full", (), {"shape": (10**6, 10**6), "fill_value": 1.0}))
    with pytest.raises(LimitExceededError) as limited:
        served.execute(Graph((), nodes, (Output("x", 1),)))
    assert limited.value.limit == "max_result_bytes"
    with model.trace(FRANCE) as run:  # and the next good request succeeds
        h = run.embed.save()
    np.testing.assert_array_equal(h.value, hooked(FRANCE, "embed"))


def test_an_unknown_model_is_not_found(served: Served) -> None:
    """Asking for a model that is not served says so."""
    with pytest.raises(NotFoundError):
        served.client.model("no-such-model")


def test_estimates_agree_with_what_is_then_spent(model: Model) -> None:
    """The remote estimate runs nothing, and its tokens and passes are those of the execution."""
    with model.trace() as t:
        a, b = t.run(FRANCE), t.run(ITALY)
        b.blocks[0].resid_post = a.blocks[1].resid_post
        t.save(x=b.logits)
        price = t.estimate(remote=True)
    assert (price.passes, price.tokens) == (t.usage.passes, t.usage.tokens) == (2, 10)


def test_many_clients_at_once_do_not_meet(model: Model) -> None:
    """Sixteen threads with different experiments each get their own values."""
    found: dict[int, np.ndarray] = {}

    def experiment(i: int) -> None:
        with model.trace([i % VOCAB, 3, 4]) as run:
            run.blocks[0].resid_post[:, 0] += float(i)
            h = run.blocks[2].resid_post.save()
        found[i] = h.value

    threads = [threading.Thread(target=experiment, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(16):
        ids = torch.tensor([[i % VOCAB, 3, 4]])
        edits = [("blocks.0.resid_post", lambda h, i=i: h[:, 0].add_(float(i)))]
        expected = run_hooked(twin(), places("llama"), ids, edits, "blocks.2.resid_post")
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


async def test_the_async_twin(served: Served) -> None:
    """The same experiment with await gives the same bits."""
    async with served.connect_async() as client:
        model = await client.model(MODEL_NAME)
        async with model.trace(FRANCE) as run:
            h = run.blocks[2].resid_post.save()
        async with model.trace() as t:
            other = await t.run(ITALY)
            t.save(x=other.embed)
    np.testing.assert_array_equal(h.value, hooked(FRANCE, "blocks.2.resid_post"))
    np.testing.assert_array_equal(t.results["x"], hooked(ITALY, "embed"))


def test_leaving_by_an_exception_sends_nothing(served: Served, model: Model) -> None:
    """The user's own error passes through and no request is made."""
    model.tokenize(FRANCE)
    with pytest.raises(ZeroDivisionError), model.trace(FRANCE) as run:
        h = run.embed.save()
        _ = 1 / 0
    with pytest.raises(pb.errors.TraceError):
        _ = h.value


def test_a_cancelled_call_frees_the_server(served: Served, model: Model) -> None:
    """Abandoning a stream of many forwards cancels it; the next request is answered with the right value."""
    from patchbay.ir.graph import Graph, Node, Output, Run

    runs, nodes = [], []
    for i in range(400):
        runs.append(Run(tuple((1, 2, 3, 4) for _ in range(4))))
        nodes.append(Node("site.read", (), {"site": "logits"}, i))
    graph = Graph(tuple(runs), tuple(nodes), tuple(Output(str(i), i) for i in range(400)))
    seen = served.abandon_after(graph, events=3)
    assert 0 < seen < 400
    with model.trace(FRANCE) as run:
        h = run.embed.save()
    np.testing.assert_array_equal(h.value, hooked(FRANCE, "embed"))


def test_a_timeout_is_told_as_one(model: Model) -> None:
    """A deadline too short for the work raises a deadline or cancellation error, never a transport library's."""
    with pytest.raises((pb.errors.DeadlineExceededError, RequestCancelledError)), model.trace(timeout_s=1e-4) as t:
        for i in range(50):
            t.save(**{f"x{i}": t.run([1, 2, 3]).logits})


def test_graph_errors_are_graph_errors_everywhere() -> None:
    """The classes asserted above are all GraphErrors, so that one except clause catches them."""
    classes = (CausalityError, IndexOutOfRangeError, LimitExceededError, ShapeError)
    assert all(issubclass(c, GraphError) for c in classes)


def test_text_is_generated_under_intervention(model: Model) -> None:
    """Greedy tokens are transformers' own; a ban on one of them holds; tokens stream step by step."""
    ids, heard = torch.tensor([tokens_of(FRANCE)]), []
    with model.generate(FRANCE, max_new_tokens=6, stream=lambda step, tokens: heard.append(tokens[0])) as run:
        pass
    theirs = twin().generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(run.output.ids) == heard == theirs
    with model.generate(FRANCE, max_new_tokens=6) as banned:
        banned.logits[..., theirs[0]] = -1e9
        states = banned.all_steps.blocks[1].resid_post.save()
    assert theirs[0] not in banned.output.ids
    assert states.value.shape == (6, 1, D_MODEL)


# --- artifacts ------------------------------------------------------------------------------------------------------


def dictionary(seed: int = 0) -> np.ndarray:
    """The encoder of a sparse autoencoder: 2 MiB."""
    return np.random.default_rng(seed).standard_normal((D_MODEL, 32_768)).astype(np.float32)


def features(model: Model, encoder: np.ndarray) -> tuple[np.ndarray, int]:
    """Each feature's strongest activation on a text, and the bytes that the trace sent."""
    with model.trace(FRANCE) as t:
        h = (t.blocks[1].resid_post @ encoder).max(axis=(0, 1)).save()
    return h.value, t.trace.sent_bytes


def test_a_large_constant_crosses_the_wire_once(served: Served, model: Model) -> None:
    """Ten traces in which a notebook cell makes the same array anew send its bytes once, and a second client none."""
    sent, expected = [], (hooked(FRANCE, "blocks.1.resid_post") @ dictionary()).max((0, 1))
    for _ in range(10):
        values, cost = features(model, dictionary())
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
        sent.append(cost)
    size = dictionary().nbytes
    assert size < sent[0] < size + 16_384
    assert sum(sent[1:]) < 9 * 2_048
    with Client(served.transport, name="another") as other:
        values, cost = features(other.model(MODEL_NAME), dictionary())
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    assert cost < 4_096


def test_a_constant_that_went_meanwhile_is_sent_again(served: Served, model: Model) -> None:
    """Another client deletes what this one believes to be there: one upload, one retry, the right value."""
    encoder = dictionary(1)
    before, first = features(model, encoder)
    with Client(served.transport, name="another") as other:
        for artifact in other.artifacts.list():
            other.artifacts.delete(artifact)
    after, again = features(model, encoder)
    np.testing.assert_array_equal(after, before)
    assert min(first, again) > encoder.nbytes
    assert features(model, encoder)[1] < 4_096


def test_a_kept_value_never_comes_here_unless_asked(served: Served, model: Model) -> None:
    """Activations that a trace keeps are a constant of later traces; a get brings them, to the bit."""
    with model.trace([FRANCE] * 64) as run:
        handle = run.keep("acts", run.blocks[1].resid_post)
        mean = run.keep("means", {"all": run.blocks[1].resid_post.mean((0, 1))})
    assert run.trace.received_bytes < 2_048
    assert (handle.shape, handle.name) == ((64, 5, D_MODEL), "acts")
    assert run.results["means"]["all"] is mean["all"]
    with model.trace([FRANCE] * 64) as run:
        run.blocks[1].resid_post -= handle
        left = run.blocks[1].resid_post.save()
        centred = pb.ops.subtract(run.blocks[0].resid_post, mean["all"]).save()
    assert run.trace.sent_bytes < 8_192
    np.testing.assert_array_equal(left.value, np.zeros((64, 5, D_MODEL), np.float32))
    expected = hooked(FRANCE, "blocks.1.resid_post")
    np.testing.assert_allclose(handle.get()[7], expected[0], rtol=1e-5, atol=1e-5)
    assert centred.value.shape == (64, 5, D_MODEL)
    handle.delete()
    with pytest.raises(NotFoundError, match="test_conformance.py"), model.trace(FRANCE) as run:
        run.save(x=pb.ops.add(run.blocks[0].resid_post, handle))


def test_artifacts_go_in_and_out_as_safetensors(served: Served, model: Model, tmp_path: Path) -> None:
    """Every tensor of a file becomes an artifact; one comes back as a file that safetensors reads."""
    tensors = {"w": torch.randn(3, 4), "b": torch.randn(7).to(torch.bfloat16), "n": torch.arange(5)}
    safetensors.torch.save_file(tensors, tmp_path / "in.safetensors")
    put = served.client.artifacts.put(tmp_path / "in.safetensors", name="sae/")
    assert {name: (handle.name, handle.dtype.name) for name, handle in put.items()} == {
        "w": ("sae/w", "float32"),
        "b": ("sae/b", "bfloat16"),
        "n": ("sae/n", "int64"),
    }
    for name, handle in put.items():
        served.client.artifacts.get(handle, tmp_path / "out.safetensors")
        (back,) = safetensors.torch.load_file(tmp_path / "out.safetensors").values()
        assert torch.equal(back, tensors[name])
    assert served.client.artifacts.handle("sae/b").digest == put["b"].digest
    listed = served.client.artifacts.list()
    assert [a.digest for a in listed] == sorted(a.digest for a in listed)


async def test_hostile_uploads_leave_nothing(served: Served) -> None:
    """A wrong digest, too few or too many bytes, another form than the digest's: each is refused, and none is kept."""
    from patchbay.ir.artifacts import ArtifactInfo, digest_of
    from patchbay.ir.dtypes import float32
    from patchbay.ir.graph import TensorData

    good = TensorData(float32, (300_000,), np.arange(300_000, dtype=np.float32).tobytes())
    other = TensorData(float32, (300_000,), bytes(good.nbytes))
    digest = digest_of(good)
    transport = served.transport()
    try:
        hostile = [
            (ArtifactInfo(digest, float32, (300_000,), good.nbytes), other),
            (ArtifactInfo(digest, float32, (300, 1000), good.nbytes), TensorData(float32, (300, 1000), good.data)),
        ]
        for info, tensor in hostile:
            with pytest.raises(InvalidRequestError, match="sha256"):
                await transport.put_artifact(info, tensor)
        short = TensorData(float32, (300_000,), good.data[:-4])
        with pytest.raises((InvalidRequestError, ProtocolError)):
            await transport.put_artifact(ArtifactInfo(digest, float32, (300_000,), good.nbytes), short)
        assert not await transport.stat_artifacts([digest])
        with pytest.raises(NotFoundError):
            await transport.get_artifact(digest)
        with pytest.raises(NotFoundError):
            await transport.delete_artifact(digest)
        stored = await transport.put_artifact(ArtifactInfo(digest, float32, (300_000,), good.nbytes, "good"), good)
        assert (await transport.get_artifact(digest))[1].data == good.data
        assert stored.name == "good"
        for _ in range(50):  # it is there: the server says so while the elements are on their way
            assert (await transport.put_artifact(stored, good)).created_at == stored.created_at
    finally:
        await transport.close()


# --- data sets ------------------------------------------------------------------------------------------------------


def test_a_map_over_a_data_set_is_reduced_where_the_model_is(served: Served, model: Model, tmp_path: Path) -> None:
    """Reductions equal numpy's over the same activations fetched whole, bytes stay there, and a map goes on."""
    words = "the capital of france italy is paris rome a cat dog sat on mat".split()
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(words, size=rng.integers(1, 9))), "label": i % 2} for i in range(60)]

    def look(run):
        h = run.blocks[1].resid_post
        return {
            "mean": pb.reduce.mean(h),
            "by": pb.reduce.mean(h[:, -1], by=run.column("label"), groups=2),
            "cov": pb.reduce.covariance(h),
            "top": pb.reduce.topk(h[..., :3], 4),
        }

    class StopError(Exception):
        pass

    def stop(progress):
        if progress.rows >= 30:
            raise StopError

    how = {"batch": 5, "window": 10, "lanes": 2}
    found = model.map(rows, look, **how)
    with pytest.raises(StopError):
        model.map(rows, look, resume=tmp_path / "state.json", progress=stop, **how)
    resumed = model.map(rows, look, resume=tmp_path / "state.json", **how)
    whole = model.map(rows, lambda run: {"h": run.blocks[1].resid_post}, **how)["h"]
    x = np.concatenate(list(whole)).astype(np.float64)
    last = np.array([h[-1] for h in whole], dtype=np.float64)
    np.testing.assert_allclose(found["mean"], x.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["by"], [last[0::2].mean(0), last[1::2].mean(0)], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["cov"].covariance, np.cov(x.T), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["top"].values, np.sort(x[:, :3].T, axis=1)[:, ::-1][:, :4], rtol=1e-4, atol=1e-6)
    for name in ("mean", "by"):
        np.testing.assert_array_equal(resumed[name], found[name])
    np.testing.assert_array_equal(resumed["cov"].covariance, found["cov"].covariance)
    np.testing.assert_array_equal(resumed["top"].rows, found["top"].rows)


def test_pairs_and_generation_in_a_map(model: Model, tmp_path: Path) -> None:
    """Rows of two prompts and an answer, patched and generated from: a loop of traces' numbers; broken off, resumed."""
    pairs = [("the cat", "a dog", "mat"), ("paris is a", "rome is a", "city"), ("the dog sat", "the cat is", "the")]
    rows = [{"clean": a, "corrupt": b, "answer": c} for a, b, c in pairs] * 5

    def look(t, rows):
        clean, corrupt = t.run(rows["clean"]), t.run(rows["corrupt"])
        said = t.generate(rows["corrupt"], max_new_tokens=3, temperature=1.5, seed=11)
        for run in (corrupt, said.prefill):
            run.blocks[1].resid_post[:, -1] = clean.blocks[1].resid_post[:, -1]
        answer = rows["answer"].to_single_token()[:, None]
        logit = pb.ops.take_along_axis(corrupt.logits[:, -1], answer, axis=-1)[:, 0]
        steps = said.all_steps.blocks[2].resid_post.swapaxes(0, 1)
        return {
            "logit": logit,
            "mean": pb.reduce.mean(logit),
            "ids": said.generated,
            "text": said.text,
            "steps": pb.reduce.mean(steps, over="steps"),
        }

    class StopError(Exception):
        pass

    def stop(progress):
        if progress.rows >= 8:
            raise StopError

    how = {"batch": 2, "window": 4, "lanes": 2}
    found = model.map(rows, look, **how)
    with pytest.raises(StopError):
        model.map(rows, look, resume=tmp_path / "state.json", progress=stop, **how)
    resumed = model.map(rows, look, resume=tmp_path / "state.json", **how)
    for name in found:
        np.testing.assert_array_equal(resumed[name], found[name], err_msg=name)
    for i in (0, 4, 14):
        with model.trace() as t:
            clean, corrupt = t.run(rows[i]["clean"]), t.run(rows[i]["corrupt"])
            said = t.generate(rows[i]["corrupt"], max_new_tokens=3, temperature=1.5, seed=11 + i)
            for run in (corrupt, said.prefill):
                run.blocks[1].resid_post[:, -1] = clean.blocks[1].resid_post[:, -1]
            t.save(logit=corrupt.logits[0, -1, model.to_single_token(rows[i]["answer"])])
        np.testing.assert_allclose(found["logit"][i], t.results["logit"], atol=1e-4)
        assert [int(j) for j in found["ids"][i] if j >= 0] == list(said.output.ids)
        assert found["text"][i] == said.text
    np.testing.assert_allclose(found["mean"], found["logit"].astype(np.float64).mean(), rtol=1e-6)


def test_loops_run_where_the_model_is(model: Model) -> None:
    """Descent on activations, a choice and a map are the same over every transport; what goes wrong names the line."""
    with model.trace(FRANCE) as run:
        x = run.blocks[1].resid_post[0]

        def step(w, _):
            loss = ((x @ w - 1.0) ** 2).mean()
            return w - 0.1 * pb.grad(loss, wrt=w), loss

        w, losses = pb.scan(step, np.zeros(D_MODEL, "float32"), length=20)
        better = pb.cond(losses[-1] < losses[0], lambda: w, lambda: w * 0.0)
        run.save(better=better, losses=losses, sums=pb.vmap(lambda row: row.sum())(x))
    plain = torch.tensor(hooked(FRANCE, "blocks.1.resid_post")[0])
    w, losses = torch.zeros(D_MODEL), []
    for _ in range(20):
        leaf = w.clone().requires_grad_()
        loss = ((plain @ leaf - 1) ** 2).mean()
        w = w - 0.1 * torch.autograd.grad(loss, leaf)[0]
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(run.results["better"], w.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(run.results["losses"], losses, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(run.results["sums"], plain.sum(-1).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexOutOfRangeError) as wrong, model.trace(FRANCE) as run:
        row = run.blocks[1].resid_post[0, 0]
        _, ys = pb.scan(lambda i, _: (i + 7, row[i[None]]), run.trace.constant(0), length=9)  # too far
        run.save(ys=ys)
    file, _, line = str(wrong.value.location).rpartition(":")
    assert "# too far" in Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_the_language_is_the_same_everywhere(model: Model) -> None:
    """Applied modules, skips, folded weights, continuations, gradients of two orders and through generated steps."""
    with model.trace() as t:
        a, b = t.run(FRANCE), t.run([FRANCE, ITALY])
        h = a.blocks[0].resid_post
        first = pb.grad(a.logits[0, -1, 3], wrt=h)
        b.blocks[1].skip()
        folded = b.ln_final.normalized @ t.params.folded("unembed.W_U")
        run = t.generate(FRANCE, max_new_tokens=3, eos=False)
        through = pb.grad(run.steps[2].logits[0, -1, 3], wrt=run.prefill.blocks[0].resid_post)
        t.save(
            second=pb.grad((first**2).sum(), wrt=h),
            lens=t.apply("unembed", t.apply("ln_final", h)),
            skipped=b.logits,
            folded=folded,
            p=a.logprob("paris"),
            through=through,
        )
    r, plain = t.results, twin()
    with torch.no_grad():
        logits = plain(torch.tensor([[*tokens_of(FRANCE), *tokens_of("paris")]])).logits.log_softmax(-1)
        lens = plain.lm_head(plain.model.norm(torch.from_numpy(hooked(FRANCE, "blocks.0.resid_post"))))
    np.testing.assert_allclose(r["p"], logits[0, -2, tokens_of("paris")[0]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(r["lens"], lens, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(r["skipped"], r["folded"], rtol=1e-4, atol=1e-5)
    assert np.abs(r["second"]).max() > 1e-4
    assert np.abs(r["through"]).max() > 1e-5
    with pytest.raises(GraphError, match="needs more than one tensor"), model.trace(FRANCE) as other:
        other.apply("blocks.0.attn", other.embed)
