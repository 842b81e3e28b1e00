"""Conversations, system prompts, beginning-of-sequence tokens, and tokenizers without a pad token."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import patchbay as pb
from patchbay.errors import InvalidRequestError, TraceError
from tests.tiny import VOCAB, build

_WORDS = "<bos> <unk> <system> <user> <assistant> <end> be brief what is this a cat the dog".split()
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _tokenizer(*, adds_bos: bool = True, template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    words = [*_WORDS, *(f"word{i}" for i in range(VOCAB - len(_WORDS)))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>")
    if template is not None:
        made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model() -> pb.Model:
    """A model whose tokenizer begins texts with a token, has a chat template, and has no pad token."""
    return pb.local(build("llama"), _tokenizer())


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_WORDS.index(word) for word in text.split())


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is this"}]


def test_a_conversation_is_one_row(model: pb.Model) -> None:
    """Messages become the template's text, system prompt first, the assistant's turn opened, and no second <bos>."""
    with model.trace(CHAT) as run:
        logits = run.logits.save()
    (tokens,) = run.tokens
    assert tokens.ids == _ids("<bos> <system> be brief <end> <user> what is this <end> <assistant>")
    assert logits.value.shape == (1, len(tokens), VOCAB)
    assert run.position("brief") == 3


def test_an_answered_conversation_is_not_reopened(model: pb.Model) -> None:
    """A conversation that ends with the assistant ends there."""
    with model.trace([*CHAT, {"role": "assistant", "content": "a cat"}]) as run:
        run.logits[:, -1].save()
    assert run.tokens[0].ids[-4:] == _ids("<assistant> a cat <end>")


def test_many_conversations_are_rows(model: pb.Model) -> None:
    """A list of conversations gives a row each; each equals the same conversation alone, texts beside them too."""
    short = [{"role": "user", "content": "the dog"}]
    with model.trace() as t:
        together, alone, mixed = t.run([CHAT, short]), t.run(short), t.run([short, "the cat"])
        t.save(together=together.logits[1, -1], alone=alone.logits[0, -1])
    assert [len(tokens) for tokens in together.tokens] == [11, 6]
    np.testing.assert_allclose(t.results["together"], t.results["alone"], atol=1e-5)
    assert mixed.tokens[1].ids == _ids("<bos> the cat")


def test_the_same_conversation_is_rendered_once(model: pb.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over one conversation asks the server once."""
    asked: list[int] = []
    render = model.core._render

    async def counted(chats: set[object]) -> None:
        asked.append(len(chats))
        await render(chats)

    monkeypatch.setattr(model.core, "_render", counted)
    conversation = [{"role": "user", "content": "is this the cat"}]
    with model.trace() as t:
        for _ in range(3):
            t.run(conversation)
    assert asked == [1]


def test_templates_refuse_in_their_own_words(model: pb.Model) -> None:
    """What a template raises reaches the user."""
    with pytest.raises(InvalidRequestError, match="no tools here"), model.trace([{"role": "tool", "content": "x"}]):
        pass


def test_no_template_is_said() -> None:
    """A model without a chat template says so, and what to do."""
    plain = pb.local(build("llama"), _tokenizer(template=None))
    with pytest.raises(InvalidRequestError, match="has no chat template; give a text"), plain.trace(CHAT):
        pass
    bare = pb.local(build("llama"))
    with pytest.raises(InvalidRequestError, match="has no chat template"), bare.trace(CHAT):
        pass


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": ["x"]}, {"text": "x"}])
def test_other_messages_are_refused(model: pb.Model, message: dict[str, object]) -> None:
    """A message is a role and a content, both texts."""
    with pytest.raises(TraceError, match="a message of a conversation is"), model.trace([message]):
        pass


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prepend_bos(adds_bos: bool) -> None:
    """The switch gives a row one first token or none, whatever the tokenizer does; None leaves it as it is."""
    served = pb.local(build("llama"), _tokenizer(adds_bos=adds_bos))
    seen = {flag: served.tokenize("the cat", prepend_bos=flag) for flag in (None, True, False)}
    assert seen[True].ids == _ids("<bos> the cat") and seen[True].special == (True, False, False)
    assert seen[False].ids == _ids("the cat") and not any(seen[False].special)
    assert seen[None].ids == seen[adds_bos].ids
    with served.trace("the cat", prepend_bos=True) as run:
        run.logits.save()
    assert run.tokens[0] == seen[True] and "0:'<bos>'*" in repr(run.tokens[0])
    with served.trace() as t:
        assert t.run(["the dog", "a cat is"], prepend_bos=False).tokens[1].ids == _ids("a cat is")
    for flag in (None, True, False):
        with served.generate("the cat", max_new_tokens=1, prepend_bos=flag) as generating:
            assert generating.tokens[0].ids == seen[flag].ids
        with served.trace() as t:
            assert t.generate("the cat", max_new_tokens=1, prepend_bos=flag).tokens[0].ids == seen[flag].ids


def test_prepend_bos_needs_a_text_and_a_token(model: pb.Model) -> None:
    """The switch is refused for ids, and by tokenizers that know no such token."""
    with pytest.raises(TraceError, match="prepend_bos concerns texts"), model.trace([[1, 2]], prepend_bos=True):
        pass
    nameless = _tokenizer(adds_bos=False)
    nameless.bos_token = None
    with pytest.raises(InvalidRequestError, match="knows no beginning-of-sequence token"):
        pb.local(build("llama"), nameless).tokenize("the cat", prepend_bos=True)


def test_rows_without_a_pad_token(model: pb.Model) -> None:
    """Ragged rows need no pad token: each gives what it gives alone."""
    assert _tokenizer().pad_token_id is None
    with model.trace() as t:
        both, one = t.run(["what is this", "the cat"]), t.run("the cat")
        t.save(both=both.logits[1, -1], one=one.logits[0, -1])
    np.testing.assert_allclose(t.results["both"], t.results["one"], atol=1e-5)
