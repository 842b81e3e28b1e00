"""Sites as attributes: reads in program order, writes in every form, and names that do not exist."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import patchbay as pb
from patchbay.client import Client
from patchbay.errors import GraphError, ShapeError, SiteNotWritableError, TraceError, UnknownSiteError
from patchbay.ir.card import CallableSpec, ModelCard, SiteSpec
from patchbay.ir.dtypes import float32
from patchbay.ir.graph import Node
from patchbay.model import Model
from patchbay.testing import FakeTransport
from patchbay.tracing import Run
from tests.tracing.conftest import FRANCE, ITALY, CountingTransport


@pytest.fixture
def run(model: Model) -> Run:
    """A run whose trace is never sent."""
    return model.trace().run(FRANCE)


class RichTransport(FakeTransport):
    """A card with module sites, a site that is absent, and one that cannot be written."""

    async def get_model(self, name: str) -> ModelCard:
        card = await super().get_model(name)
        more = (
            SiteSpec("blocks.0.attn.rot_q", (), float32, 0, absent="no rotary embedding"),
            SiteSpec("ln_final.scale", ("rows", "seq", 1), float32, 90, writable=False, doc="a by-product"),
            SiteSpec("module:model.layers.0.mlp.output", ("rows", "seq", 8), float32, 5),
            SiteSpec("module:model.layers.0.mlp.input", ("rows", "seq", 8), float32, 4),
        )
        return replace(card, sites=card.sites + more)


@pytest.fixture
def rich() -> Iterator[Run]:
    """A run of a model with module sites."""
    with Client(RichTransport()) as client:
        yield client.model("fake").trace().run(FRANCE)


def writes(run: Run) -> list[Node]:
    """The writes of the graph as it would be sent."""
    return [n for n in run.graph.nodes if n.op == "site.write"]


def test_every_site_of_the_card_is_reached_by_attribute(run: Run) -> None:
    """What the card lists, tab completion offers, and reading it has the card's shape."""
    for site in run.trace.builder.card.sites:
        here: Any = run
        *path, leaf = site.name.split(".")
        for part in path:
            here = here[int(part)] if part.isdigit() else getattr(here, part)
        assert leaf in dir(here)
        assert getattr(here, leaf).shape == site.shape({"rows": run.rows, "seq": run.seq})


def test_a_read_sees_earlier_writes_and_no_later_ones(model: Model) -> None:
    """Program order at a site: a value read before a write keeps what was there."""
    with model.trace(FRANCE) as run:
        before = run.blocks[0].resid_post
        run.blocks[0].resid_post[:, 0] = 1.0
        between = run.blocks[0].resid_post
        run.blocks[0].resid_post = 2.0
        after = run.blocks[0].resid_post
        run.save(before=before, between=between, after=after)
    r = run.results
    assert (r["between"][:, 0] == 1).all()
    assert (r["between"][:, 1:] == r["before"][:, 1:]).all()
    assert not (r["before"][:, 0] == 1).any()
    assert (r["after"] == 2).all()


def test_negative_blocks_count_from_the_end(run: Run) -> None:
    """As in any sequence."""
    last = run.blocks[-1].resid_post
    assert run.trace.builder.nodes[last._node].attrs["site"] == "blocks.1.resid_post"
    assert len(run.blocks) == 2
    assert len([b.mlp_out for b in run.blocks]) == 2
    for wrong in (2, -3):
        with pytest.raises(UnknownSiteError, match="there are 2"):
            run.blocks[wrong]


def test_slices_of_blocks_are_refused_with_advice(run: Run) -> None:
    """There is no tensor of several blocks; a loop makes one."""
    with pytest.raises(TraceError, match="write a loop"):
        run.blocks[0:2]
    with pytest.raises(TypeError, match="integer"):
        run.blocks["0"]
    with pytest.raises(TraceError, match="before the run"):
        run.blocks[run.embed.argmax()]


def test_unknown_names_suggest_near_ones(run: Run) -> None:
    """At the user's line, as an attribute error too, so that hasattr answers."""
    with pytest.raises(UnknownSiteError, match=r"blocks\.1\.resid_post") as caught:
        _ = run.blocks[1].resid_pots
    assert "blocks.1.resid_post" in caught.value.suggestions
    assert isinstance(caught.value, AttributeError)
    assert not hasattr(run.blocks[1], "resid_pots")
    assert hasattr(run.blocks[1], "resid_post")
    with pytest.raises(UnknownSiteError):
        run.blocks[1].resid_pots = 0.0
    with pytest.raises(UnknownSiteError):
        run.logitz = 0.0
    with pytest.raises(UnknownSiteError, match="logits"):
        run.site("logitz")


def test_python_protocols_find_nothing(run: Run) -> None:
    """copy and pickle look for special names; they get Python's own answer."""
    assert copy.copy(run) is copy.deepcopy(run) is run
    for name in ("__array__", "_repr_html_", "_ipython_canary_method_should_not_exist_"):
        assert not hasattr(run, name)
        assert not hasattr(run.blocks[0], name)
    with pytest.raises(Exception, match=r"pickle|cannot"):
        pickle.dumps(run.embed)


def test_groups_and_own_names_cannot_be_assigned(run: Run) -> None:
    """Only sites are written to."""
    with pytest.raises(TraceError, match="group of sites"):
        run.blocks = 0.0
    with pytest.raises(TraceError, match="group of sites"):
        run.blocks[0].attn = 0.0
    with pytest.raises(AttributeError, match="tokens of a run cannot be assigned"):
        run.tokens = ()


def test_other_tools_spellings(run: Run) -> None:
    """TransformerLens's and interp-engine's names, and cache keys, lead to the same sites."""
    names = [
        "blocks.1.attn.hook_z",
        "blocks.1.attn.z",
        "z.1",
        "attn.z.1",
        ("z", 1),
        ("z", -1, "attn"),
        "blocks[-1].attn.z",
    ]
    read = {run.trace.builder.nodes[run.site(n)._node].attrs["site"] for n in names}  # type: ignore[arg-type]
    assert read == {"blocks.1.attn.z"}
    assert run.blocks[1].hook_resid_post.shape == run.blocks[1].resid_post.shape
    run.blocks[1].hook_resid_post = 0.0
    assert writes(run)[0].attrs["site"] == "blocks.1.resid_post"


def test_modules_by_path(rich: Run) -> None:
    """Both sides can be read and written; a wrong path or side is named."""
    module = rich.module("model.layers.0.mlp")
    assert module.output.shape == (1, 6, 8)
    module.output[:, -1] = 0.0
    module.input = 1.0
    assert [n.attrs["site"] for n in writes(rich)] == [
        "module:model.layers.0.mlp.output",
        "module:model.layers.0.mlp.input",
    ]
    assert dir(module) == ["input", "output"]
    assert "module('model.layers.0.mlp').output[:, -1] = " in str(rich.graph)
    with pytest.raises(UnknownSiteError, match=r"did you mean 'model\.layers\.0\.mlp'"):
        rich.module("model.layer.0.mlp")
    with pytest.raises(UnknownSiteError, match="'output' and 'input'"):
        _ = module.gradient


def test_absent_sites_say_why(rich: Run) -> None:
    """A canonical site that the architecture cannot offer gives its reason, and is not offered."""
    with pytest.raises(UnknownSiteError, match="no rotary embedding"):
        _ = rich.blocks[0].attn.rot_q
    assert "rot_q" not in dir(rich.blocks[0].attn)


def test_sites_that_cannot_be_written_say_why(rich: Run) -> None:
    """Reading is fine, writing gives the card's reason at once."""
    assert rich.ln_final.scale.shape == (1, 6, 1)
    with pytest.raises(SiteNotWritableError, match="by-product"):
        rich.ln_final.scale = 0.0
    with pytest.raises(SiteNotWritableError):
        rich.ln_final.scale[:, 0] *= 2.0


# --- writes -------------------------------------------------------------------------------------------------------


def test_augmented_assignment_adds_and_scales_at_the_site(run: Run) -> None:
    """+=, -=, *= and exact /= become one write each, with no read in the graph."""
    v = np.ones(8, dtype=np.float32)
    run.blocks[0].resid_post += v
    run.blocks[0].resid_post -= 2.0
    run.blocks[0].resid_post *= 3.0
    run.blocks[0].resid_post /= 4.0
    run.blocks[0].resid_post[:, -1] += v
    run.blocks[0].resid_post[:, -1] -= v
    run.blocks[0].resid_post[:, [0, 1]] *= 0.5
    run.site("blocks.0.resid_post")[...] += 1.0
    nodes = run.graph.nodes
    assert [n.attrs["mode"] for n in writes(run)] == ["add", "add", "mul", "mul", "add", "add", "mul", "add"]
    assert {n.op for n in nodes} == {"const", "site.write"}
    scalars = [nodes[n.args[0]].attrs.get("scalar") for n in writes(run)]
    assert scalars == [None, -2.0, 3.0, 0.25, None, None, 0.5, 1.0]


def test_augmented_assignment_gives_numpys_values(model: Model) -> None:
    """Whatever form the write takes, the values are those of the same statement on an array."""
    v = np.linspace(-1, 1, 8).astype(np.float32)
    with model.trace(FRANCE) as run:
        before = run.blocks[0].resid_post
        run.blocks[0].resid_post += v
        run.blocks[0].resid_post -= before * 0.5
        run.blocks[0].resid_post[:, -1] *= v
        run.blocks[0].resid_post[:, -2] -= v
        run.blocks[0].resid_post[:, 0] /= 2.0
        run.blocks[0].resid_post[:, 1] /= 3.0
        run.blocks[0].resid_post[:, [2, 3]] **= 2.0
        run.save(before=before, after=run.blocks[0].resid_post)
    x = run.results["before"].copy()
    y = x.copy()
    y += v
    y -= x * np.float32(0.5)
    y[:, -1] *= v
    y[:, -2] -= v
    y[:, 0] /= 2.0
    y[:, 1] /= 3.0
    y[:, [2, 3]] **= 2.0
    np.testing.assert_array_equal(run.results["after"], y)


def test_inexact_division_and_other_operators_replace(run: Run) -> None:
    """Where scaling would round differently the computed value is set instead."""
    run.blocks[0].resid_post /= 3.0
    run.blocks[0].resid_post //= 2.0
    run.blocks[0].resid_post **= 2.0
    assert [n.attrs["mode"] for n in writes(run)] == ["set", "set", "set"]


def test_adding_elsewhere_than_read_replaces(run: Run) -> None:
    """`x += v` assigned to another place, index, run or site is no addition there."""
    h = run.blocks[0].resid_post[:, -1]
    h += 1.0
    run.blocks[0].resid_post[:, -2] = h
    run.blocks[1].resid_post[:, -1] = h
    other = run.trace.run(ITALY)
    other.blocks[0].resid_post[:, -1] = h
    assert [n.attrs["mode"] for n in writes(run)] == ["set", "set", "set"]
    run.blocks[0].resid_post[:, -1] = h
    assert writes(run)[-1].attrs["mode"] == "set"  # the site was written since h was read


def test_an_old_value_added_to_is_not_the_sites_present_one(model: Model) -> None:
    """Adding to a value read before another write sets what Python computed."""
    with model.trace(FRANCE) as run:
        h = run.embed
        run.embed = 0.0
        before = h
        h += 1.0
        run.embed = h
        run.save(before=before, after=run.embed)
    np.testing.assert_array_equal(run.results["after"], run.results["before"] + 1)


def test_values_of_a_site_read_can_be_assigned_into(model: Model) -> None:
    """`h[...] = v` writes at the site; `h` itself keeps the value it had."""
    with model.trace(FRANCE) as run:
        h = run.embed
        h[:, 0] = 0.0
        run.save(h=h, site=run.embed)
    assert run.results["h"][:, 0].all()
    assert not run.results["site"][:, 0].any()


def test_computed_values_cannot_be_assigned_into(run: Run) -> None:
    """Values do not change; the error says what to write instead."""
    h = run.embed * 2
    with pytest.raises(TraceError, match=r"values do not change.*embed \* 2"):
        h[0] = 1.0
    with pytest.raises(TraceError, match="one index"):
        run.embed[0][1] = 1.0


def test_a_write_that_does_not_fit_names_both_shapes(run: Run) -> None:
    """The site's part, the value's shape, and the value's origin."""
    with pytest.raises(ShapeError, match=r"\[7\].*\[1, 8\]") as caught:
        run.blocks[0].resid_post[:, -1] = np.zeros(7)
    assert caught.value.location is not None
    with pytest.raises(ShapeError, match=r"logits of run 'The capital of France is'"):
        run.blocks[0].resid_post = run.logits
    with pytest.raises(GraphError, match="holds float32"):
        run.embed = run.embed > 0


def test_arrays_take_the_sites_dtype(run: Run) -> None:
    """Integers, masks and doubles are converted before they travel."""
    run.embed[:, 0] = np.arange(8)
    run.embed[:, 1] = np.arange(8) > 3
    run.embed[:, 2] = np.linspace(0, 1, 8)
    run.embed[:, 3] += np.linspace(0, 1, 8)
    run.embed[:, 4] = [1, 2, 3, 4, 5, 6, 7, 8]
    run.embed[:, 5] = np.float16([1] * 8)
    nodes = run.graph.nodes
    dtypes = [nodes[w.args[0]].attrs["value"].dtype.name for w in writes(run)]  # type: ignore[union-attr]
    assert dtypes == ["float32"] * 5 + ["float16"]


def test_values_of_other_runs_flow_in_by_position(model: Model) -> None:
    """A double loop of patches, as a sweep is written."""
    with model.trace() as t:
        a = t.run(FRANCE)
        cells = []
        for layer in range(2):
            for position in range(a.seq):
                b = t.run(ITALY)
                b.blocks[layer].resid_post[:, position] = a.blocks[layer].resid_post[:, position]
                cells.append(b.blocks[layer].resid_post[0, position] - a.blocks[layer].resid_post[0, position])
        t.save(differences=pb.ops.stack(cells))
    assert t.results["differences"].shape == (12, 8)
    assert not t.results["differences"].any()


def test_callables_of_the_model(model: Model) -> None:
    """The final norm and the unembedding take any value of the right width."""
    with model.trace(FRANCE) as run:
        lens = run.unembed(run.ln_final(run.blocks[0].resid_post))
        same = run.apply("unembed", run.trace.apply("ln_final", run.blocks[0].resid_post))
        run.save(lens=lens, same=same)
        assert "unembed(%" in str(run.graph)
        assert repr(run.unembed) == "<unembed: 8 -> 16>"
        assert "unembed" in dir(run)
        with pytest.raises(ShapeError, match="extent 8"):
            run.unembed(run.logits)
        with pytest.raises(UnknownSiteError, match="has no callable 'nothing'"):
            run.apply("nothing", run.embed)
        with pytest.raises(UnknownSiteError, match="callable"):
            run.blocks[0](run.embed)
    assert (run.results["lens"] == run.results["same"]).all()
    assert lens.shape == (1, 6, 16)


def test_namespaces_print(run: Run) -> None:
    """A repr says where one is and what is there."""
    assert "attn" in repr(run.blocks[0])
    assert "France" in repr(run.blocks[0].attn)
    assert repr(run) == "<run 0 'The capital of France is': 1 row x 6 tokens, of 'fake'>"


def test_the_sweeps_writes_are_counted(model: Model, transport: CountingTransport) -> None:
    """Two hundred runs over two texts tokenize twice."""
    with model.trace() as t:
        for i in range(200):
            t.run(FRANCE if i % 2 else ITALY)
        t.runs[0].embed.save()
    assert transport.tokenized == [[ITALY], [FRANCE]]
    assert isinstance(model.card.callables[0], CallableSpec)


def test_an_update_of_a_variable_alone_is_warned_of(model: Model) -> None:
    """`x *= 0` on a variable changes nothing in the run: whoever forgets to assign it is told, with the line."""
    t = model.trace()
    run = t.run(FRANCE)
    lost = run.blocks[0].resid_post
    lost *= 0
    run.logits.save()
    with pytest.warns(UserWarning, match=r"blocks\.0\.resid_post \* 0.*test_sites\.py:.* is not used") as caught:
        t.execute()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.trace(FRANCE) as run:
            run.blocks[0].resid_post *= 0.5
            run.blocks[0].mlp_out[:, -1] += 1.0
            x = run.blocks[1].resid_pre
            x += 1.0
            run.blocks[1].resid_pre = x
            total = run.blocks[1].resid_post
            total += run.embed
            total -= 1.0
            run.save(total=total)
        with model.trace(FRANCE) as run:
            unused = run.embed * 2  # no update: nothing was to change
            run.logits.save()
    assert unused.shape == (1, 6, 8)
