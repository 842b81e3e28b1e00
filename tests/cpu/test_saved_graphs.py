"""Graphs as files: saved, loaded and run they give the same bytes; anything else is refused by a typed error."""

from __future__ import annotations

import contextlib
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import patchbay as pb
from patchbay.errors import GraphError, PatchbayError, ProtocolError, TraceError
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.model import Model
from patchbay.saving import SavedGraph, save_results
from patchbay.wire.files import MAGIC, SCHEMA, decode_file, encode_file
from tests import families
from tests.strategies import graphs
from tests.tiny import build, places

SITES = [s for s in places("llama") if s != "logits"]


@cache
def model_of(family: str) -> Model:
    return pb.local(build(family) if family in ("gpt2", "llama") else families.build(family))


def small_file() -> bytes:
    with model_of("llama").trace([1, 5, 9]) as run:
        (run.blocks[0].resid_post * 2.0).save("x")
        graph = run.graph
    return encode_file(graph, model="local", revision="r")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "gpt_neox", "mamba"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_saved_loaded_and_run_gives_the_same_bytes(
    family: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For any graph: the loaded one equals it, its file is the same again, and so is every byte that it computes.

    Bytes are promised by ``deterministic=True``; without it values agree to rounding, whatever shares their forwards.
    """
    model = model_of(family)
    sites = [s for s in SITES if s in model.card and model.card.site(s).writable]
    graph = data.draw(graphs(model.card, sites, ragged=model.card.ragged))
    path = tmp_path_factory.mktemp("graphs") / "graph.pb"
    pb.save_graph(graph, path)
    loaded = pb.load_graph(path)
    assert loaded == graph
    before = path.read_bytes()
    pb.save_graph(loaded, path)
    assert path.read_bytes() == before
    try:
        expected = model.run(graph, deterministic=True)
    except GraphError as error:  # causality is left to chance
        with pytest.raises(type(error)):
            model.run(loaded, deterministic=True)
        return
    found = model.run(loaded, deterministic=True)  # else the second goes on from what the first left
    shared = model.run(loaded)
    assert list(found) == list(expected) == list(shared)
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].tobytes() == expected[name].tobytes()
        np.testing.assert_allclose(shared[name], found[name], rtol=2e-3, atol=2e-4)


def everything(t: Any) -> None:
    """Gradients of two orders, weights, applied modules, skips, continuations, and generation under intervention."""
    a, b = t.run([1, 5, 9, 3]), t.run([[2, 8], [4, 4, 7]])
    h = a.blocks[0].resid_post
    first = pb.grad(a.logits[0, -1, 3], wrt=h)
    b.blocks[1].mlp.skip(rows=[1])
    b.blocks[0].resid_post[:, -1] += first[0, -1] * 0.5
    u = t.params["unembed.W_U"]
    t.save(
        first=first,
        second=pb.grad((first**2).sum(), wrt=h),
        lens=t.apply("ln_final", b.blocks[0].resid_post) @ u,
        mlp=t.apply("blocks.1.mlp", h),
        after=b.logits,
        p=a.logprob([6, 2]),
    )
    run = t.generate([1, 5, 9], max_new_tokens=3, temperature=0.8, seed=3, eos=False)
    run.blocks[0].resid_post += first[0, -1]
    run.logits[..., 4] = -1e9
    t.save(stream=run.all_steps.blocks[1].resid_post)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "gpt_neox"])
def test_all_of_the_language_is_saved(family: str, tmp_path: Path) -> None:
    """A graph that uses every kind of node gives the same bytes from its file, alone and once more."""
    model = model_of(family)
    with model.trace(deterministic=True) as t:
        everything(t)
        pb.save_graph(t, tmp_path / "all.pb")
    loaded = pb.load_graph(tmp_path / "all.pb")
    for _ in range(2):
        found = model.run(loaded, deterministic=True)
        for name in ("first", "second", "lens", "mlp", "after", "p", "stream"):
            assert found[name].tobytes() == np.asarray(t.results[name]).tobytes(), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_trace_is_saved_with_its_model(family: str, tmp_path: Path) -> None:
    """Inside or below the block, by its run or by itself; what the trace gave is what the file gives."""
    model = model_of(family)
    with model.trace() as t:
        a, b = t.run([1, 5, 9]), t.run([2, 4, 6, 8])
        source = a.blocks[0].resid_post
        b.blocks[1].resid_pre[:, -1] = source[:, -1] + np.ones(16, np.float32)
        metric = b.logits[:, -1, 3].sum()
        t.save(both=[metric, pb.grad(metric, wrt=source)], logits=b.logits)
        pb.save_graph(b, tmp_path / "inside.pb")
    pb.save_graph(t, tmp_path / "below.pb")
    assert (tmp_path / "inside.pb").read_bytes() == (tmp_path / "below.pb").read_bytes()
    loaded = pb.load_graph(tmp_path / "below.pb")
    assert (loaded.model, loaded.revision, loaded.schema) == ("local", model.card.revision, SCHEMA)
    assert "run1.blocks[1].resid_pre[:, -1] = " in str(loaded)
    results = model.run(loaded)
    assert results["logits"].tobytes() == t.results["logits"].tobytes()
    assert results["both.1"].tobytes() == t.results["both"][1].tobytes()
    assert results.usage.passes == t.usage.passes


def test_a_value_has_all_its_names_in_a_file(tmp_path: Path) -> None:
    """What was saved under several names is sent once, and a file gives it under each; trees come back flat."""
    model = model_of("gpt2")
    with model.trace() as t:
        run = t.generate([1, 5, 9], max_new_tokens=3, eos=False)
        last = run.steps[2].logits
        t.save(tokens=run.generated, tree={"a": [last, last]}, again=last)
    assert len(t.graph.outputs) == 2
    pb.save_graph(t, tmp_path / "graph.pb")
    found = model.run(pb.load_graph(tmp_path / "graph.pb"))
    assert set(found) == {"run0.generated", "tokens", "tree.a.0", "tree.a.1", "again"}
    np.testing.assert_array_equal(found["tokens"], t.results["tokens"])
    np.testing.assert_allclose(found["again"], t.results["tree"]["a"][1], atol=1e-5)


def test_another_revision_is_said(tmp_path: Path) -> None:
    """A graph runs on other weights where its sites exist, with a warning; where they do not, it is refused."""
    with model_of("llama").trace([1, 5]) as run:
        run.blocks[1].mlp.pre_linear.save("x")
    pb.save_graph(run, tmp_path / "g.pb")
    loaded = pb.load_graph(tmp_path / "g.pb")
    other = pb.local(build("llama", seed=1))
    with pytest.warns(UserWarning, match="revision"):
        assert other.run(loaded)["x"].shape == (1, 2, 24)
    with warnings.catch_warnings(), pytest.raises(GraphError, match="not gated"):
        warnings.simplefilter("ignore")
        model_of("gpt2").run(loaded)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    """Something that is no graph, and a graph without outputs; neither leaves a file behind."""
    with pytest.raises(TraceError, match="not list"):
        pb.save_graph([], tmp_path / "g.pb")  # type: ignore[arg-type]
    with model_of("llama").trace([1]) as run, pytest.raises(TraceError, match="asks for no value"):
        pb.save_graph(run, tmp_path / "g.pb")
    with pytest.raises(GraphError):
        pb.save_graph(
            Graph((Run(((1,),)),), (Node("const", (), {"scalar": 2**70}),), (Output("x", 0),)), tmp_path / "g"
        )
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused(data: st.DataObject) -> None:
    """Any byte changed, any end cut off or added, is a ProtocolError."""
    good = small_file()
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "noise"]))
    if kind == "flip":
        at = data.draw(st.integers(0, len(good) - 1))
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    elif kind == "cut":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "more":
        bad = good + data.draw(st.binary(min_size=1, max_size=64))
    else:
        bad = data.draw(st.sampled_from([b"", MAGIC])) + data.draw(st.binary(max_size=200))
    with pytest.raises(ProtocolError):
        decode_file(bad)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_forged_file_is_a_graph_or_a_typed_error(data: st.DataObject) -> None:
    """With a checksum that fits, changed contents still end in nothing worse than a PatchbayError."""
    good = small_file()[:-4]
    at = data.draw(st.integers(8, len(good) - 1))
    body = good[:at] + data.draw(st.binary(min_size=1, max_size=8)) + good[at + 1 :]
    with contextlib.suppress(PatchbayError):
        assert isinstance(decode_file(body + struct.pack("<I", crc32(body))).graph, Graph)


def test_other_versions_and_unknown_fields_are_refused() -> None:
    """A later schema, or a field of a later version, is said so: it is not read as if it were not there."""
    good = small_file()[:-4]

    def sealed(data: bytes) -> bytes:
        return data + struct.pack("<I", crc32(data))

    with pytest.raises(ProtocolError, match="schema 2"):
        decode_file(sealed(good[:8] + struct.pack("<H", 2) + good[10:]))
    header_size, body_size = struct.unpack_from("<IQ", good, 10)
    extra = b"\xf8\x07\x01"  # field 127, a number
    longer = good[:10] + struct.pack("<IQ", header_size, body_size + 3) + good[22:] + extra
    with pytest.raises(ProtocolError, match="does not know"):
        decode_file(sealed(longer))


def test_results_as_files(tmp_path: Path) -> None:
    """safetensors keeps every dtype to the bit, npz widens what it has no name for; both hold what ran."""
    import ml_dtypes
    from safetensors.numpy import load_file

    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([True, False]),
        "c": np.array(3, np.int64),
        "none": np.zeros((0, 4), np.float16),
        "half": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    }
    save_results(arrays, tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as found:
        assert set(found) == set(arrays)
        assert found["half"].dtype == np.float32 and found["half"].tolist() == [1.5, -2.0]
        np.testing.assert_array_equal(found["a"], arrays["a"])
    save_results(arrays, tmp_path / "r.safetensors")
    back = load_file(tmp_path / "r.safetensors")
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    with pytest.raises(ProtocolError, match="npz"):
        save_results(arrays, tmp_path / "r.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.npz", "r.safetensors"]


def test_saved_graphs_print_and_compare() -> None:
    """As the graphs that they were."""
    graph = decode_file(small_file()).graph
    saved = SavedGraph(graph, model="m", revision="r", schema=1, writer="0")
    assert saved == graph and graph == saved
    assert "return x = %" in repr(saved)
