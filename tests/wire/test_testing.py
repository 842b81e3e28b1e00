"""The fake server that users test their own code with."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from patchbay.arrays import view_of
from patchbay.errors import NotFoundError, ShapeError, UnavailableError, UnknownSiteError
from patchbay.ir.events import Done, ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.testing import FakeTransport, fake_card, fake_client

OPTIONS = ExecuteOptions()


def test_it_behaves_as_its_documentation_says() -> None:
    """The example of the module's docstring works, and shapes are those of the card."""
    with fake_client() as client:
        model = client.model("fake")
        with model.trace("the cat sat") as run:
            h = run.blocks[0].resid_post[:, -1].save()
        assert h.value.shape == (1, 8)
        assert h.value.dtype == np.float32


def test_values_depend_on_site_and_tokens_only() -> None:
    """The same site of the same tokens holds the same numbers in every client, and others elsewhere."""

    def read(text: str, layer: int) -> np.ndarray:
        with fake_client() as client, client.model("fake").trace(text) as run:
            value = run.blocks[layer].mlp_out.save()
        return value.value

    np.testing.assert_array_equal(read("the cat", 0), read("the cat", 0))
    assert not np.array_equal(read("the cat", 0), read("the cat", 1))
    assert not np.array_equal(read("the cat", 0), read("the dog", 0))


def test_writes_show_at_their_own_site_in_program_order() -> None:
    """Reads before a write keep the old value, reads after it have the new one, in every mode and kind of index."""
    with fake_client() as client:
        model = client.model("fake")
        with model.trace() as t:
            a, b = t.run("the cat sat"), t.run("the dog sat")
            before = b.blocks[0].resid_post
            t.save(before=before)
            b.blocks[0].resid_post[:, -1] = a.blocks[0].resid_post[:, -1]
            b.blocks[0].mlp_out *= 0.0
            b.blocks[1].mlp_out += 1.0
            t.save(
                source=a.blocks[0].resid_post,
                set=b.blocks[0].resid_post,
                mul=b.blocks[0].mlp_out,
                add=b.blocks[1].mlp_out,
                plain=a.blocks[1].mlp_out,
            )
        r = t.results
        np.testing.assert_array_equal(r["set"][:, -1], r["source"][:, -1])
        np.testing.assert_array_equal(r["set"][:, :-1], r["before"][:, :-1])
        assert not np.array_equal(r["before"][:, -1], r["set"][:, -1])
        assert not r["mul"].any()
        assert r["add"].shape == r["plain"].shape


def test_patterns_are_patterns() -> None:
    """Attention patterns are causal and their rows sum to one, so code that relies on it can be tested."""
    with fake_client() as client, client.model("fake").trace("the cat sat") as run:
        pattern = run.blocks[1].attn.pattern.save()
    np.testing.assert_allclose(pattern.value.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.triu(pattern.value, 1), 0)


def test_callables_and_operations() -> None:
    """The final norm, the unembedding and every pure operation are evaluated."""
    with fake_client() as client:
        model = client.model("fake")
        with model.trace("the cat sat") as run:
            h = run.blocks[1].resid_post[:, -1]
            top = run.unembed(run.ln_final(h)).softmax(-1).topk(3)
            values, indices = top.values.save(), top.indices.save()
        assert values.value.shape == (1, 3)
        assert (np.diff(values.value) <= 0).all()
        assert ((indices.value >= 0) & (indices.value < 16)).all()


def test_mistakes_are_refused_as_a_server_would() -> None:
    """Shapes and sites are checked by the same verifier."""
    with fake_client() as client:
        model = client.model("fake")
        with pytest.raises(ShapeError), model.trace("the cat") as run:
            run.blocks[0].resid_post @ run.blocks[0].resid_post
        with pytest.raises(UnknownSiteError), model.trace("the cat") as run:
            run.site("blocks.9.resid_post").save()
        with pytest.raises(NotFoundError, match="it hosts: fake"):
            client.model("other")


async def test_transport() -> None:
    """The transport alone answers like any other: events in order, counters, and nothing after close."""
    transport = FakeTransport("mine")
    assert [summary.name for summary in await transport.list_models()] == ["mine"]
    assert await transport.get_model("mine") == fake_card("mine")
    (row,) = await transport.tokenize("mine", ["the  cat"])
    assert (row.strings, row.offsets, row.special) == (
        ("<bos>", "the", "cat"),
        ((0, 0), (0, 3), (5, 8)),
        (True, False, False),
    )
    graph = Graph((Run((row.ids,)),), (Node("site.read", attrs={"site": "logits"}, run=0),), (Output("x", 0),))
    events = [e async for e in transport.execute("mine", graph, OPTIONS)]
    (value,) = (e for e in events if isinstance(e, TensorValue))
    assert view_of(value.value).shape == (1, 3, 16)
    assert isinstance(events[-1], Done)
    assert transport.bytes_received == value.value.nbytes == events[-1].usage.bytes_out
    dry = [e async for e in transport.execute("mine", graph, ExecuteOptions(dry_run=True))]
    assert [type(e) for e in dry] == [Done]
    await transport.close()
    with pytest.raises(UnavailableError):
        await transport.list_models()


def test_values_are_the_same_in_every_process() -> None:
    """Nothing depends on hash randomisation: another process sees the same numbers."""
    code = """
from patchbay.testing import fake_client
with fake_client() as client, client.model("fake").trace("the cat") as run:
    h = run.blocks[0].resid_mid[0, -1, 0].save()
print(float(h.value))
"""
    command = [sys.executable, "-c", code]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    seen = {subprocess.run(command, capture_output=True, text=True, check=True, env=e).stdout for e in environments}
    assert len(seen) == 1
