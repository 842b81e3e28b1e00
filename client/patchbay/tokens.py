"""Tokens of one text: ids, the pieces as the tokenizer shows them, and where each stands in the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patchbay.arguments import check_text
from patchbay.errors import TraceError
from patchbay.ir.events import TokenizedRow


@dataclass(frozen=True)
class Tokens:
    """One tokenized row.

    Attributes:
        ids: token ids, special tokens included.
        strings: the text of each token; empty when the row was given as ids.
        offsets: half-open character span of each token in `text`; (0, 0) for tokens that stand for no text.
        special: True for tokens that the tokenizer added (BOS and the like).
        text: what was tokenized, or None when the row was given as ids.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()
    offsets: tuple[tuple[int, int], ...] = ()
    special: tuple[bool, ...] = ()
    text: str | None = None

    @classmethod
    def from_row(cls, text: str, row: TokenizedRow) -> Tokens:
        """The tokens that the service made of `text`."""
        return cls(row.ids, row.strings, row.offsets, row.special, text)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __getitem__(self, index: int) -> int:
        return self.ids[index]

    def __repr__(self) -> str:
        if not self.strings:
            return f"Tokens({list(self.ids)})"
        pieces = " ".join(
            f"{i}:{string!r}" + ("*" if special else "")
            for i, (string, special) in enumerate(zip(self.strings, self.special, strict=True))
        )
        return f"Tokens({len(self)}: {pieces})"

    def position(self, substring: str, *, occurrence: int | None = None) -> int:
        """Index of the last token that overlaps `substring`; see `positions`."""
        return self.positions(substring, occurrence=occurrence)[-1]

    def positions(self, substring: str, *, occurrence: int | None = None) -> list[int]:
        """Indices of the tokens that overlap `substring`.

        Args:
            substring: part of `text`.
            occurrence: which one when it stands there several times: 0 the first, -1 the last.

        Raises:
            TraceError: it is not there, is there several times, or this row was given as ids.
        """
        check_text("a part of the text", substring)
        if self.text is None:
            raise TraceError(f"the position of {substring!r} needs a text, and this row was given as token ids")
        if not substring:
            raise TraceError("the position of an empty text is not defined")
        starts = list(_occurrences(self.text, substring))
        if not starts:
            raise TraceError(f"{substring!r} does not stand in {self.text!r}; its tokens: {self}")
        if occurrence is None and len(starts) > 1:
            raise TraceError(
                f"{substring!r} stands {len(starts)} times in {self.text!r} (at characters {starts});"
                " choose with occurrence=0 for the first, occurrence=-1 for the last"
            )
        if occurrence is not None and not -len(starts) <= occurrence < len(starts):
            raise TraceError(f"{substring!r} stands {len(starts)} times in {self.text!r}; no occurrence {occurrence}")
        start = starts[occurrence or 0]
        end = start + len(substring)
        hits = [i for i, (a, b) in enumerate(self.offsets) if a < end and b > start]
        if not hits:
            raise TraceError(f"no token of {self.text!r} overlaps {substring!r}; its tokens: {self}")
        return hits


def _occurrences(text: str, substring: str) -> Iterator[int]:
    at = text.find(substring)
    while at >= 0:
        yield at
        at = text.find(substring, at + 1)


def label_of(rows: Sequence[Tokens], limit: int = 48) -> str:
    """What to call a run over `rows` when the user does not say."""
    text = rows[0].text
    shown = text if text is not None else "ids " + " ".join(map(str, rows[0].ids[:8]))
    shown = " ".join(shown.split())
    if len(shown) > limit:
        shown = shown[: limit - 3] + "..."
    return shown if len(rows) == 1 else f"{shown} (+{len(rows) - 1} rows)"
