"""From token ids to text: what a logit lens is read with."""

from __future__ import annotations

import numpy as np
import pytest

import patchbay as pb
from patchbay.errors import InvalidRequestError, RequestRangeError
from patchbay.testing import fake_client
from tests import tiny


@pytest.fixture(scope="module")
def model() -> pb.Model:
    from patchbay_server.models.demo import tokenizer

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{chr(97 + i)}" for i in range(tiny.VOCAB - 4))]
    return pb.local(tiny.build("llama"), tokenizer.build(words))


def test_ids_become_the_tokens_text(model: pb.Model) -> None:
    """Ids in any order, repeated, as a list or an array, give the tokenizer's text of each."""
    tokens = model.tokenize("wb wa")
    assert model.token_strings(tokens.ids) == list(tokens.strings) == ["<bos>", "wb", "wa"]
    assert model.token_strings(np.array([5, 4, 5])) == ["wb", "wa", "wb"]
    assert model.token_strings([]) == []


def test_ids_outside_the_vocabulary_are_refused(model: pb.Model) -> None:
    """An id that the model does not have is an error that names the vocabulary's extent."""
    with pytest.raises(RequestRangeError, match=f"0 to {tiny.VOCAB - 1}"):
        model.token_strings([tiny.VOCAB])


def test_a_model_without_tokenizer_has_no_strings() -> None:
    """Hosted without a tokenizer, a model says that its ids have no text."""
    with pytest.raises(InvalidRequestError, match="without a tokenizer"):
        pb.local(tiny.build("llama")).token_strings([1])


def test_the_fake_server_names_ids_too() -> None:
    """Code under test against the fake server gets a name for every id."""
    with fake_client() as client:
        assert client.model("fake").token_strings([0, 3]) == ["<bos>", "word3"]
