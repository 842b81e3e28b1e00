"""What a run takes, the tokens it shows, and where words stand in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from patchbay.errors import TraceError
from patchbay.ir.events import TokenizedRow
from patchbay.model import Model
from patchbay.tokens import Tokens
from tests.tracing.conftest import FRANCE, ITALY, CountingTransport


@pytest.mark.parametrize(
    ("inputs", "rows", "seq"),
    [
        (FRANCE, 1, 6),
        ([FRANCE], 1, 6),
        ([FRANCE, "one two"], 2, 6),
        ([1, 2, 3], 1, 3),
        ((1, 2, 3), 1, 3),
        (range(4), 1, 4),
        ([[1, 2], [3, 4, 5]], 2, 3),
        (np.array([1, 2, 3]), 1, 3),
        (np.array([[1, 2], [3, 4]]), 2, 2),
        ([np.array([1, 2]), np.array([3])], 2, 2),
        ([np.int64(1), 2], 1, 2),
        (Tokens((1, 2)), 1, 2),
        ([FRANCE, [1, 2], Tokens((3,))], 3, 6),
    ],
    ids=repr,
)
def test_inputs_of_every_form(model: Model, inputs: Any, rows: int, seq: int) -> None:
    """Texts, ids, arrays and tokens, one row or several."""
    with model.trace(inputs) as run:
        e = run.embed.save()
    assert (run.rows, run.seq) == (rows, seq)
    assert e.value.shape == (rows, seq, 8)
    assert len(run.tokens) == rows


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "at least one row"),
        ([[]], "a run takes"),
        ([1.5], "a run takes"),
        (3, "a run takes"),
        ({"a": 1}, "under 'text'; this dict has 'a'"),
        ({"text": [1, 2], "pixel_values": 1}, "has no input 'pixel_values'"),
        (b"bytes", "a run takes"),
        (np.array([[[1]]]), "1 or 2 axes"),
        (np.array([1.0]), "1 or 2 axes"),
        ([16], "token id 16"),
        ([-1], "token id -1"),
        ([[1], [99]], "row 1 holds the token id 99"),
        ([1] * 65, "65 tokens"),
        ([True], "a run takes"),
    ],
    ids=repr,
)
def test_what_is_no_input_is_refused(model: Model, inputs: Any, message: str) -> None:
    """Before anything is sent, and saying what was seen."""
    with pytest.raises(TraceError, match=message), model.trace(inputs):
        raise AssertionError


def test_tokens_that_only_the_run_will_know_are_refused(model: Model) -> None:
    """A value of the trace cannot be what another run of it reads: the error says to make another trace."""
    t = model.trace()
    run = t.run(FRANCE)
    with pytest.raises(TraceError, match="make another trace with them"):
        t.run(run.logits[:, -1].argmax(-1))


def test_a_text_without_tokens_is_refused(model: Model, transport: CountingTransport) -> None:
    """A tokenizer may make nothing of a text; a run needs something."""
    transport.model.tokenize = lambda texts, special=True: (TokenizedRow((), (), (), ()),)  # type: ignore[method-assign]
    with pytest.raises(TraceError, match="has no tokens"):
        model.trace().run("")


def test_tokens_show_pieces_and_offsets(model: Model) -> None:
    """ids, strings, offsets and which the tokenizer added."""
    tokens = model.tokenize(FRANCE)
    assert tokens.strings == ("<bos>", "The", "capital", "of", "France", "is")
    assert tokens.special[0]
    assert tokens.offsets[4] == (15, 21)
    assert len(tokens) == 6
    assert list(tokens) == list(tokens.ids)
    assert tokens[0] == 0
    assert "4:'France'" in repr(tokens)
    assert "<bos>'*" in repr(tokens)
    assert repr(Tokens((1, 2))) == "Tokens([1, 2])"
    assert [t.text for t in model.tokenize([FRANCE, ITALY])] == [FRANCE, ITALY]
    assert model.tokenize("of", add_special_tokens=False).strings == ("of",)


def test_texts_are_tokenized_once(model: Model, transport: CountingTransport) -> None:
    """New texts of one call travel together, known ones not at all."""
    model.tokenize([FRANCE, ITALY, FRANCE])
    model.tokenize(FRANCE)
    with model.trace([ITALY, "new one"]):
        pass
    assert transport.tokenized == [[FRANCE, ITALY], ["new one"]]


def test_the_cache_of_texts_is_bounded(
    model: Model, transport: CountingTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts used longest ago are forgotten first."""
    monkeypatch.setattr("patchbay.core._CACHED_TEXTS", 2)
    for text in ("a", "b", "a", "c", "a", "b"):
        model.tokenize(text)
    assert transport.tokenized == [["a"], ["b"], ["c"], ["b"]]


def test_single_tokens(model: Model) -> None:
    """A word's id; several words are refused with their pieces."""
    assert model.to_single_token("France") == model.tokenize("France").ids[-1]
    assert model.token_id("France") == model.to_single_token("France")
    with pytest.raises(TraceError, match=r"2 tokens \('New', 'York'\)"):
        model.to_single_token("New York")
    with pytest.raises(TraceError, match="0 tokens"):
        model.to_single_token("")


def test_token_strings(model: Model) -> None:
    """Ids of results, arrays included, become texts again; each id is asked for once."""
    assert model.token_strings(np.array([0, 3, 0])) == ["<bos>", "word3", "<bos>"]
    assert model.token_strings([]) == []


def test_positions_of_words(model: Model) -> None:
    """The last token that overlaps the text; one text gives a number, a list gives one for each row."""
    t = model.trace()
    run = t.run(FRANCE)
    assert run.position("France") == 4
    assert run.position("capital of Fra") == 4
    assert run.position("The") == 1
    rows = t.run([FRANCE, "is France big", "x France"])
    np.testing.assert_array_equal(rows.position("France"), [4, 4, 5])
    assert rows.embed[range(rows.rows), rows.position("France")].shape == (3, 8)
    np.testing.assert_array_equal(t.run([FRANCE]).position("France"), [4])


def test_positions_that_are_not_there_or_not_clear(model: Model) -> None:
    """The error says what was seen; an occurrence chooses."""
    t = model.trace()
    run = t.run("to be or not to be")
    with pytest.raises(TraceError, match="stands 2 times"):
        run.position("to")
    assert run.position("to", occurrence=0) == 1
    assert run.position("to", occurrence=-1) == 5
    with pytest.raises(TraceError, match="no occurrence 2"):
        run.position("to", occurrence=2)
    with pytest.raises(TraceError, match=r"'Rome' does not stand in 'to be or not to be'.*5:'to'"):
        run.position("Rome")
    with pytest.raises(TraceError, match="empty"):
        run.position("")
    with pytest.raises(TraceError, match="given as token ids"):
        t.run([1, 2]).position("a")
    with pytest.raises(TraceError, match="no token"):
        Tokens((1,), ("a",), ((0, 1),), (False,), "a b").position("b")


def test_the_mask_shows_the_padding_on_the_left(model: Model) -> None:
    """True at tokens; the last position is a token of every row."""
    run = model.trace().run([[1, 2, 3], [4]])
    np.testing.assert_array_equal(run.mask, [[True, True, True], [False, False, True]])
    assert (run.embed * run.mask[..., None]).shape == (2, 3, 8)


def test_labels(model: Model) -> None:
    """A run is called by its text, cut short, or by what the user says."""
    t = model.trace()
    assert t.run(FRANCE).label == FRANCE
    assert t.run("word " * 40).label.endswith("...")
    assert t.run([FRANCE, ITALY]).label == f"{FRANCE} (+1 rows)"
    assert t.run([1, 2]).label == "ids 1 2"
    assert t.run(FRANCE, label="clean").label == "clean"
    with pytest.raises(AttributeError):
        t.run(FRANCE).label = "x"


def test_a_model_prints_its_shape_and_sites(model: Model) -> None:
    """Layers, widths, dtype and a compact tree of sites."""
    text = repr(model)
    assert "2 layers, d_model 8" in text
    assert "blocks[i].attn: q, k, v" in text
    assert "float32" in text
    assert "ln_final: normalized" in text
