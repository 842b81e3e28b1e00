"""Rows of a data set into batches."""

from __future__ import annotations

from collections import namedtuple
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay.datasets.batching import Bounds, Row, Source, Span, batches_of, columns_of, piece_of, prompt_of
from patchbay.errors import TraceError
from patchbay.tokens import Tokens


def rows_of(lengths: list[int], first: int = 0) -> list[Row]:
    return [Row(first + i, {}, {"text": Tokens((5,) * n)}) for i, n in enumerate(lengths)]


def bounds(batch: int, max_tokens: int, **other) -> Bounds:
    return Bounds(batch, max_tokens, 10**9, (Span("text"),), **other)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 12), st.integers(1, 100), st.integers(0, 9)
)
def test_batches_hold_every_row_once_within_the_bounds(
    lengths: list[int], batch: int, max_tokens: int, first: int
) -> None:
    """Each row is in one batch; none has too many rows or, unless it is one row, positions; rows keep their order."""
    rows = rows_of(lengths, first=100)
    made = batches_of(rows, first, 3, bounds(batch, max_tokens))
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
    made = batches_of(rows_of(lengths), 0, 0, bounds(batch, 10**6))
    for a, b in pairwise(made):
        assert max(len(row.tokens) for row in a.rows) <= min(len(row.tokens) for row in b.rows)


def test_rows_may_be_texts_ids_chats_dicts_and_tuples() -> None:
    """Every form that a run takes for one row, and rows of several columns: dicts, named tuples, tuples."""

    def prompt(given: object, key: str | int = "text", bos: bool | None = None) -> Any:
        return prompt_of(Row(9, columns_of(9, given)), key, bos)

    assert prompt("hello").text == "hello"
    assert prompt([3, 4]) == prompt(np.array([3, 4])) == prompt((3, 4)) == Tokens((3, 4))
    chat = [{"role": "user", "content": "hi"}]
    assert prompt(chat).chat == prompt(tuple(chat)).chat == prompt({"text": chat, "label": 1}).chat is not None
    assert columns_of(2, {"text": "a", "label": 1}) == {"text": "a", "label": 1}
    assert prompt("a", bos=True).prepend_bos is True
    pair = namedtuple("pair", ("clean", "corrupt"))
    assert prompt(pair("a", "b"), "corrupt").text == prompt(("a", "b"), 1).text == "b"
    assert prompt(([3, 4], [5, 6]), 1) == Tokens((5, 6))
    for wrong, key, said in [
        ({"label": 1}, "text", r"row 9 of the data set has no 'text' \(it has: 'label'\)"),
        (("a", "b"), "text", r"no 'text' \(it has: 0, 1\)"),
        (["a", "b"], "text", "several prompts"),
        ({"text": "a", "corrupt": None}, "corrupt", "row 9 of the data set, 'corrupt'"),
        (3.5, "text", "row 9"),
        ({}, "text", "holds nothing"),
    ]:
        with pytest.raises(TraceError, match=said):
            prompt(wrong, key)
    assert piece_of(Row(9, {"answer": 5}), "answer") == piece_of(Row(9, {"answer": np.array([5])}), "answer")
    for wrong in (None, 1.5, [], True, ["a"]):
        with pytest.raises(TraceError, match="not a text or token ids"):
            piece_of(Row(9, {"answer": wrong}), "answer")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=40), st.integers(4, 60))
def test_several_runs_over_the_rows_share_the_servers_limit(lengths: list[tuple[int, int]], total: int) -> None:
    """All runs of a batch together stay within it, what they generate included; order is kept where it must be."""
    rows = [Row(i, {}, {"a": Tokens((5,) * n), "b": Tokens((5,) * m)}) for i, (n, m) in enumerate(lengths)]
    spans = (Span("a"), Span("a", 3), Span("b"))
    for ordered in (False, True):
        made = batches_of(rows, 0, 0, Bounds(8, 10**6, total, spans, ordered))
        for batch in made:
            size = sum(len(batch.rows) * (batch.seq_of(s.key) + s.extra) for s in spans)
            assert len(batch.rows) == 1 or size <= total
        numbers = [row.number for batch in made for row in batch.rows]
        assert sorted(numbers) == list(range(len(rows)))
        assert not ordered or numbers == sorted(numbers)


def test_the_digest_is_of_every_row_in_order() -> None:
    """Rows read in other portions give the same digest; other texts, ids, fields or order another one."""
    data = [{"text": "a", "label": 0}, {"text": [3, 4], "label": 1}, "b", {"text": "c", "x": np.ones(2)}]

    def digest(rows: list, cut: int = 2) -> str:
        source = Source()
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
