"""Forms that a run's rows may have beside texts and ids: conversations, and texts with or without a first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
