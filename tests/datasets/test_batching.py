"""Rows of a data set into batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay.datasets.batching import Row, Source, batches_of, item_of
from patchbay.errors import TraceError
from patchbay.tokens import Tokens


def rows_of(lengths: list[int], first: int = 0) -> list[Row]:
    return [Row(first + i, Tokens((5,) * n), {}) for i, n in enumerate(lengths)]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 12), st.integers(1, 100), st.integers(0, 9)
)
def test_batches_hold_every_row_once_within_the_bounds(
    lengths: list[int], batch: int, max_tokens: int, first: int
) -> None:
    """Each row is in one batch; none has too many rows or, unless it is one row, positions; rows keep their order."""
    rows = rows_of(lengths, first=100)
    made = batches_of(rows, first, 3, batch, max_tokens)
    assert sorted(row.number for b in made for row in b.rows) == [row.number for row in rows]
    assert [b.number for b in made] == list(range(first, first + len(made)))
    for b in made:
        assert b.window == 3
        assert len(b.rows) <= batch
        assert len(b.rows) == 1 or b.shape[0] * b.shape[1] <= max_tokens
        assert [row.number for row in b.rows] == sorted(row.number for row in b.rows)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 12))
def test_alike_lengths_are_put_together(lengths: list[int], batch: int) -> None:
    """No row of one batch is longer than a row of the next: padding is as little as sorting allows."""
    made = batches_of(rows_of(lengths), 0, 0, batch, 10**6)
    for a, b in pairwise(made):
        assert max(len(row.tokens) for row in a.rows) <= min(len(row.tokens) for row in b.rows)


def test_rows_may_be_texts_ids_chats_and_dicts() -> None:
    """Every form that a run takes for one row, and dicts with one of them under "text"."""
    assert item_of(0, "hello").prompt.text == "hello"
    assert item_of(1, [3, 4]).prompt == item_of(1, np.array([3, 4])).prompt == Tokens((3, 4))
    chat = [{"role": "user", "content": "hi"}]
    assert item_of(2, chat).prompt.chat == item_of(2, {"text": chat, "label": 1}).prompt.chat
    assert item_of(2, {"text": "a", "label": 1}).fields == {"label": 1}
    assert item_of(3, "a", prepend_bos=True).prompt.prepend_bos is True
    for wrong, said in [({"label": 1}, "no 'text'"), (["a", "b"], "several prompts"), (3.5, "row 9")]:
        with pytest.raises(TraceError, match=said):
            item_of(9, wrong)


def test_the_digest_is_of_every_row_in_order() -> None:
    """Rows read in other portions give the same digest; other texts, ids, fields or order another one."""
    data = [{"text": "a", "label": 0}, {"text": [3, 4], "label": 1}, "b", {"text": "c", "x": np.ones(2)}]

    def digest(rows: list, cut: int = 2) -> str:
        source = Source(None)
        source.take(rows[:cut])
        source.take(rows[cut:])
        assert source.read == len(rows)
        return source.digest

    same = digest(data)
    assert digest(data, 1) == same
    others = [
        data[::-1],
        data[:3],
        [{"text": "a", "label": 1}, *data[1:]],
        [*data[:1], {"text": [4, 3], "label": 1}, *data[2:]],
        [*data[:3], {"text": "c", "x": np.zeros(2)}],
    ]
    assert len({same, *map(digest, others)}) == 1 + len(others)
