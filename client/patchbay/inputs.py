"""Forms that a run's rows may have beside texts and ids: conversations, and texts with or without a first token."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from patchbay.arguments import flag, refused, seen
from patchbay.errors import TraceError
from patchbay.ir.events import ChatMessage

#: A conversation, as the wire and the cache see it.
Chat: TypeAlias = "tuple[ChatMessage, ...]"


@dataclass(frozen=True)
class WithBos:
    """Inputs whose texts are to begin with the beginning-of-sequence token, or not to.

    Attributes:
        inputs: anything that a run takes.
        prepend: whether they do.
    """

    inputs: Any
    prepend: bool


def with_bos(inputs: Any, prepend_bos: bool | None) -> Any:
    """`inputs`, whose texts begin as `prepend_bos` says; None leaves that to the tokenizer.

    Raises:
        ArgumentError: a flag that is none.
    """
    return inputs if prepend_bos is None else WithBos(inputs, flag("prepend_bos", prepend_bos))


@dataclass(frozen=True)
class Text:
    """A text and how it becomes tokens.

    Attributes:
        text: the text; "" for a conversation that is not rendered yet.
        special: whether the tokenizer adds what it adds by itself.
        prepend_bos: whether the row begins with the beginning-of-sequence token; None: as the tokenizer does.
        chat: the conversation that the text is to be made of, or None.
    """

    text: str
    special: bool = True
    prepend_bos: bool | None = None
    chat: Chat | None = None


def chat_of(item: object) -> Chat | None:
    """The conversation that `item` is, if it is one: a sequence of dicts with ``role`` and ``content``.

    Raises:
        TraceError: a sequence of dicts of another form.
    """
    if not isinstance(item, Sequence) or isinstance(item, (str, bytes)) or not item:
        return None
    if not all(isinstance(message, Mapping) for message in item):
        return None
    messages = []
    for message in item:
        role, content = message.get("role"), message.get("content")
        if set(message) != {"role", "content"} or not isinstance(role, str) or not isinstance(content, str):
            raise TraceError(
                "a message of a conversation is {'role': 'user', 'content': 'a text'} with nothing else in it, not "
                f"{dict(message)!r:.120}"
            )
        messages.append(ChatMessage(role, content))
    return tuple(messages)


def texts_of(text: object, add_special_tokens: bool, prepend_bos: bool | None) -> list[Text]:
    """What to tokenize, and how.

    Raises:
        ArgumentError: neither a text nor a list of texts; a flag that is none.
    """
    flag("add_special_tokens", add_special_tokens)
    if prepend_bos is not None:
        flag("prepend_bos", prepend_bos)
    given = [text] if isinstance(text, str) else text
    if not isinstance(given, (list, tuple)) or not all(isinstance(t, str) for t in given):
        raise refused(f"tokenize takes a text or a list of texts, not {seen(text)}")
    return [Text(t, add_special_tokens, prepend_bos) for t in given]


def ids_of(ids: Any) -> list[int]:
    """Token ids of anything that holds some.

    Raises:
        ArgumentError: no sequence of integers.
    """
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        shown = f"an array of {ids.ndim} axes" if getattr(ids, "ndim", 1) != 1 else seen(ids)
        raise refused(f"token_strings takes a list of token ids or an integer array of one axis, not {shown}") from None
