"""The with block, as the guide shows it: what is sent, what comes back, and when."""

from __future__ import annotations

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import CausalityError, LimitExceededError, TraceError, ValueNotReadyError
from patchbay.ir.events import Done, Started
from patchbay.model import Model
from tests.tracing.conftest import FRANCE, ITALY, CountingTransport


def test_one_run_gives_the_saved_value(model: Model) -> None:
    """The first example of the documentation: one run, one site, one saved value."""
    with model.trace(FRANCE) as run:
        h = run.blocks[1].resid_post[:, -1].save()
    assert h.value.shape == (1, model.card.d_model)
    assert h.value.dtype == np.float32


def test_many_runs_patch_and_save_trees(model: Model) -> None:
    """The second example: values flow between runs, and saves are trees with names."""
    with model.trace() as t:
        a, b = t.run(FRANCE), t.run(ITALY)
        b.blocks[0].resid_post[:, -1] = a.blocks[0].resid_post[:, -1]
        b.blocks[1].mlp_out *= 0.0
        p = b.logits[:, -1].softmax(-1)
        t.save(p=p, top=p.topk(5), patched=b.blocks[0].resid_post[:, -1], original=a.blocks[0].resid_post[:, -1])
    assert t.results["p"].sum() == pytest.approx(1.0, abs=1e-5)
    assert t.results.top.values.shape == (1, 5)
    assert (t.results.top.values[0] == np.sort(t.results.p[0])[::-1][:5]).all()
    assert (t.results["patched"] == t.results["original"]).all()
    assert t.usage.passes == 2
    assert "run1.blocks[1].mlp_out *= %" in str(t.graph)


def test_trees_keep_their_form_and_their_plain_leaves(model: Model) -> None:
    """Dicts, lists, tuples, strings and numbers come back as they went in."""
    with model.trace(FRANCE) as run:
        e = run.embed
        run.save(tree={"a": [e, 3], "b": (e[0], "text", None)})
    tree = run.results["tree"]
    assert tree["a"][1] == 3
    assert tree["b"][1:] == ("text", None)
    assert (tree["a"][0][0] == tree["b"][0]).all()


def test_an_exception_in_the_block_sends_nothing(model: Model, transport: CountingTransport) -> None:
    """The graph dies with the block, and its values say so."""
    kept = []
    with pytest.raises(ZeroDivisionError), model.trace(FRANCE) as run:
        kept.append(run.embed.save()) or 1 / 0
    (h,) = kept
    assert transport.executed == []
    with pytest.raises(ValueNotReadyError, match="left by an exception"):
        _ = h.value
    with pytest.raises(TraceError, match="left by an exception"):
        _ = h + 1


def test_a_trace_that_saves_nothing_sends_nothing(model: Model, transport: CountingTransport) -> None:
    """Looking at shapes needs no server; an unsaved value says that it was not saved."""
    with model.trace(FRANCE) as run:
        h = run.embed
    assert transport.executed == []
    assert len(run.results) == 0
    assert run.usage.passes == 0
    with pytest.raises(ValueNotReadyError, match="not saved"):
        _ = h.value


def test_a_value_before_the_run_is_an_error(model: Model) -> None:
    """Inside the block there is no value yet."""
    with model.trace(FRANCE) as run:
        h = run.embed.save()
        with pytest.raises(ValueNotReadyError, match="below the with block"):
            _ = h.value
        with pytest.raises(ValueNotReadyError):
            _ = run.results
        with pytest.raises(ValueNotReadyError):
            _ = run.usage
    assert h.value.shape == h.shape


def test_unsaved_values_are_never_sent(model: Model, transport: CountingTransport) -> None:
    """Only outputs come back, whatever else the graph computes."""
    with model.trace(FRANCE) as run:
        kept, dropped = run.embed.save(), run.logits
    assert [o.node for o in transport.executed[0][0].outputs] == [0]
    with pytest.raises(ValueNotReadyError, match=r"logits of run 'The capital of France is' was not saved"):
        _ = dropped.value
    assert kept.value.shape == kept.shape


def test_saved_values_never_alias(model: Model) -> None:
    """The same value under two names is sent once and handed out twice."""
    with model.trace(FRANCE) as run:
        e = run.embed
        run.save(x=e, y=e, z=[e])
    x, y, (z,) = run.results["x"], run.results["y"], run.results["z"]
    assert len(run.graph.outputs) == 1
    assert not np.shares_memory(x, y)
    assert not np.shares_memory(y, z)
    x[...] = 0
    assert (y == z).all()
    assert y.any()


def test_saving_twice_under_one_name_is_an_error(model: Model) -> None:
    """A second value does not replace the first in silence."""
    with model.trace(FRANCE) as run:
        run.save(x=run.embed)
        with pytest.raises(TraceError, match="already saved as 'x'"):
            run.save(x=run.logits)
        with pytest.raises(TraceError, match="already saved as 'x'"):
            run.logits.save("x")


def test_saves_without_a_name_are_called_after_their_site(model: Model) -> None:
    """Sites give their names, computed values are counted."""
    with model.trace() as t:
        a, b = t.run(FRANCE), t.run(ITALY)
        a.embed.save()
        b.embed[:, 0].save()
        (a.embed + 1).save()
        (a.embed + 2).save()
        again = a.logits.save()
        again.save()
    assert list(t.results) == ["embed", "embed_2", "value_1", "value_2", "logits"]


def test_a_trace_cannot_grow_after_it_ran(model: Model) -> None:
    """Values of a finished trace make no further nodes."""
    with model.trace(FRANCE) as run:
        h = run.embed.save()
    for late in (lambda: h + 1, lambda: run.logits, lambda: h.save("later"), lambda: run.trace.run(ITALY)):
        with pytest.raises(TraceError, match="has run"):
            late()


def test_causality_is_refused_before_sending_with_both_lines(model: Model, transport: CountingTransport) -> None:
    """A write that needs a later site of its own run names the write's line and the read's."""
    with pytest.raises(CausalityError) as caught, model.trace(FRANCE) as run:
        late = run.blocks[1].resid_post
        run.blocks[0].resid_post = late * 2.0
        run.logits.save()
    text = str(caught.value)
    first = test_causality_is_refused_before_sending_with_both_lines.__code__.co_firstlineno
    assert f"read: run0.blocks[1].resid_post at {_here()}:{first + 3}" in text
    assert f"write: run0.blocks[0].resid_post at {_here()}:{first + 4}" in text
    assert transport.executed == []
    with pytest.raises(ValueNotReadyError, match="CausalityError"):
        _ = run.results


def _here() -> str:
    import os

    shorter = os.path.relpath(__file__)
    return shorter if len(shorter) < len(__file__) else __file__


def test_limits_of_the_card_hold_before_sending(model: Model, transport: CountingTransport) -> None:
    """A graph that the server would refuse never leaves."""
    with pytest.raises(LimitExceededError) as caught, model.trace(FRANCE) as run:
        run.save(big=pb.ops.broadcast_to(run.embed[0, 0, 0], (2**31,)))
    assert caught.value.limit in ("max_result_bytes", "max_peak_bytes")
    assert transport.executed == []


def test_validate_and_estimate_do_not_run(model: Model, transport: CountingTransport) -> None:
    """Checking and pricing work inside the block; the local and the server's price are both there."""
    with model.trace(FRANCE) as run:
        run.logits[:, -1].softmax(-1).save("p")
        run.validate()
        local = run.estimate()
        remote = run.trace.estimate(remote=True)
        assert transport.executed[0][1].dry_run
        assert local.result_bytes == remote.result_bytes == 4 * model.card.d_vocab
        assert local.flops > 0
        assert "FLOPs" in repr(local)
    assert len(transport.executed) == 2
    assert not transport.executed[1][1].dry_run


def test_validate_raises_what_running_would(model: Model) -> None:
    """`validate` is the same check, made early."""
    with pytest.raises(KeyError), model.trace(FRANCE) as run:
        run.blocks[0].resid_post = run.blocks[1].resid_post
        with pytest.raises(CausalityError, match="write: run0"):
            run.validate()
        raise KeyError


def test_a_trace_without_with_is_run_by_execute(model: Model) -> None:
    """The block is a convenience: building and `execute` are enough."""
    t = model.trace()
    h = t.run(FRANCE).embed.save()
    t.execute()
    assert h.value.shape == h.shape
    with pytest.raises(TraceError, match="has run"):
        t.execute()


def test_execute_inside_the_block_is_not_repeated(model: Model, transport: CountingTransport) -> None:
    """Leaving the block after `execute` sends nothing more."""
    with model.trace() as t:
        h = t.run(FRANCE).embed.save()
        t.execute()
        assert h.value.shape == h.shape
    assert len(transport.executed) == 1


def test_options_reach_the_server(model: Model, transport: CountingTransport) -> None:
    """Determinism, off switches and the deadline are the trace's to say; events come back in this thread."""
    import threading

    seen: list[tuple[object, str]] = []

    def watch(event: object) -> None:
        seen.append((event, threading.current_thread().name))

    with model.trace(FRANCE, deterministic=True, disabled=("early_stop",), timeout_s=7.0, progress=watch) as run:
        run.embed.save()
    _, options, timeout_s = transport.executed[0]
    assert options.deterministic
    assert options.disabled == ("early_stop",)
    assert timeout_s == 7.0
    assert isinstance(seen[0][0], Started)
    assert isinstance(seen[-1][0], Done)
    assert {name for _, name in seen} == {threading.current_thread().name}


def test_an_exception_in_the_progress_callback_ends_the_trace(model: Model) -> None:
    """It is raised as itself, and the trace has no values."""

    def watch(event: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), model.trace(FRANCE, progress=watch) as run:
        h = run.embed.save()
    with pytest.raises(ValueNotReadyError, match="failed"):
        _ = h.value


def test_bytes_are_counted_on_this_side_too(model: Model) -> None:
    """What crossed the transport is known without asking the server."""
    with model.trace(FRANCE) as run:
        h = run.embed.save()
    assert run.trace.received_bytes == h.value.nbytes


def test_values_that_nothing_uses_are_not_sent(model: Model, transport: CountingTransport) -> None:
    """Python reads the target of an assignment; the graph that travels does not."""
    with model.trace(FRANCE) as run:
        run.blocks[0].resid_post[:, -1] += 1.0
        run.blocks[1].mlp_out = 0.0
        _ = run.embed * 2
        run.logits.save()
    graph = transport.executed[0][0]
    assert [n.op for n in graph.nodes] == ["const", "site.write", "const", "site.write", "site.read"]


def test_a_wide_graph_of_ten_thousand_nodes_is_built_and_run(model: Model) -> None:
    """Long chains neither recurse nor crawl."""
    with model.trace(FRANCE) as run:
        x = run.embed[0, 0, 0]
        for _ in range(5_000):
            x = x * 1.0 + 0.0
        run.save(x=x, first=run.embed[0, 0, 0])
        assert len(run.trace.builder.nodes) > 10_000
        repr(x)
        run.validate()
    assert run.results["x"] == run.results["first"]


def test_the_graph_prints(model: Model) -> None:
    """`print(t.graph)` is a readable program, before and after the run."""
    with model.trace(FRANCE) as run:
        run.logits[:, -1].save("last")
        before = str(run.graph)
    assert before == str(run.graph)
    assert "%0 = run0.logits" in before
    assert "%1 = %0[:, -1]" in before
    assert "return last = %1" in before
    assert "test_trace.py:" in before


def test_results_say_what_they_hold(model: Model) -> None:
    """Names, dtypes, shapes; unknown names list the known ones."""
    with model.trace(FRANCE) as run:
        run.save(e=run.embed, parts={"n": 1})
    assert "float32[1, 6, 8]" in repr(run.results)
    assert "parts" in dir(run.results)
    with pytest.raises(KeyError, match="saved: e, parts"):
        _ = run.results["f"]
    with pytest.raises(AttributeError, match="saved: e, parts"):
        _ = run.results.f


def test_values_that_are_not_finite_are_named(model: Model) -> None:
    """A NaN or an infinity in a result is pointed out."""
    with model.trace(FRANCE) as run:
        run.save(ok=run.embed, bad=run.embed / 0.0)
    assert run.results.nonfinite == ("bad",)
    assert "not finite" in repr(run.results)
