"""The embedded model's word-level tokenizer, built from the corpus's own words.

One token per word and per punctuation mark, whatever the spacing; words that the corpus does not know become
``<unk>``. The one exception is a year: ``1732`` is ``17`` and ``##32``, two tokens, because the greater-than task needs
the century apart from the year. ``<bos>`` is put in front by the tokenizer itself, as the model never saw a text
without it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from patchbay_server.models.demo import words as w
from patchbay_server.models.demo.corpus import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL: tuple[str, ...] = (PAD, BOS, EOS, UNK)
_WORD = re.compile(r"\w+|[^\w\s]")
_YEAR = re.compile(r"\d{4}")


def vocabulary(seed: int = 0, sample: int = 60_000) -> list[str]:
    """Every token of the corpus: special ones, centuries and years, then the words of a large sample in order."""
    seen = {word for text in itertools.islice(documents(random.Random(seed)), sample) for word in _WORD.findall(text)}
    # Names and facts are open-ended lists: they are in whether or not the sample met them.
    seen.update(w.WOMEN, w.MEN, w.COUNTRIES)
    natural = sorted(word for word in seen if not word.isdigit())
    return [*SPECIAL, *map(str, w.CENTURIES), *(f"##{year:02d}" for year in range(100)), *natural]


def alphabet(tokens: list[str]) -> tuple[str, ...]:
    """The tokens that random sequences are made of: whole words only."""
    return tuple(token for token in tokens if token.isalpha())


def tokens_of(tok: PreTrainedTokenizerFast) -> list[str]:
    """Every token of a tokenizer, in the order of the ids."""
    return [str(token) for token in tok.convert_ids_to_tokens(list(range(len(tok))))]


def ids_of(tok: PreTrainedTokenizerFast, tokens: Iterable[str]) -> list[int]:
    """The ids of tokens; one that the tokenizer does not have is an error rather than ``<unk>``."""
    vocab = tok.get_vocab()
    return [vocab[token] for token in tokens]


def text_of(tok: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of a sequence of ids, without special tokens."""
    return str(tok.decode(ids, skip_special_tokens=True))


def build(tokens: list[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer over the given tokens, ids in their order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(tokens)}
    # WordPiece is used for its longest-match rule alone: the only pieces are the two digits of a year.
    raw = Tokenizer(models.WordPiece(vocab, unk_token=UNK, continuing_subword_prefix="##"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
