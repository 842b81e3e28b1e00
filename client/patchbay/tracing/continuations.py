"""The log-probability of a continuation that a run does not hold: the same rows once more, with it appended.

What was written in the run holds at the run's own positions; the continuation's tokens are read by the model as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from patchbay.arguments import refused, seen
from patchbay.core import RunInputs
from patchbay.errors import TraceError
from patchbay.ir.card import SEQUENCE_DIMS
from patchbay.tokens import Tokens
from patchbay.tracing.namespaces import read_site

if TYPE_CHECKING:
    from patchbay.tracing.proxy import Proxy
    from patchbay.tracing.runs import Run


def is_ids(value: object) -> bool:
    """Whether it is a continuation by token ids: an id, `Tokens`, or a sequence of ids."""
    if isinstance(value, Tokens) or hasattr(value, "__index__"):
        return True
    return not isinstance(value, str) and isinstance(value, Sequence) and all(hasattr(i, "__index__") for i in value)


def continuations_of(run: Run, given: Any) -> list[tuple[int, ...]]:
    """The token ids to append to each row.

    Args:
        run: the run.
        given: a text, token ids or `Tokens` for all rows, or a list of such, one for each row.

    Raises:
        TraceError: another number of them than there are rows; one without tokens.
    """
    if not isinstance(given, (str, Iterable)) and not is_ids(given):
        raise refused(f"a continuation is a text, token ids, Tokens, or a list of such, not {seen(given)}")
    each = [given] * run.rows if isinstance(given, str) or is_ids(given) else list(given)
    if len(each) != run.rows:
        raise TraceError(f"{len(each)} continuations for {run.rows} rows; give one, or one for each row")
    found = [_ids(run, one) for one in each]
    if not all(found):
        raise TraceError("a continuation of no tokens has no probability")
    return found


def _ids(run: Run, one: Any) -> tuple[int, ...]:
    if isinstance(one, str):
        return run.trace.tokens_of(one).ids
    if not is_ids(one):
        raise TraceError(f"a continuation is a text, token ids or Tokens, not {one!r}")
    return (operator.index(one),) if hasattr(one, "__index__") else tuple(operator.index(i) for i in one)


def predicted(run: Run, rows: Sequence[int], places: Sequence[int], ids: Sequence[int], single: bool) -> Proxy:
    """Log-probabilities summed for each row: of `ids[i]` by the logits of row `rows[i]` at `places[i]`."""
    from patchbay import ops

    chosen = ops.log_softmax(run.logits[list(rows), list(places)], axis=-1)[list(range(len(ids))), list(ids)]
    numbers = list(rows)
    sums = [chosen[numbers.index(row) : numbers.index(row) + numbers.count(row)].sum() for row in range(run.rows)]
    return sums[0] if single else ops.stack(sums)


def appended(run: Run, continuations: Sequence[tuple[int, ...]], single: bool) -> Proxy:
    """The log-probabilities of continuations after the rows of `run`, a number or [rows].

    Raises:
        TraceError: the model is not causal, or a row becomes too long for it.
    """
    trace, card = run.trace, run.trace.builder.card
    if not card.causal:
        raise TraceError(f"{card.name!r} is not causal: what is appended would change what stands before it")
    data = trace.builder.runs[run.index]
    texts = [Tokens((*row.ids, *more)) for row, more in zip(run.tokens, continuations, strict=True)]
    longest = max(map(len, texts))
    if longest > card.n_ctx:
        raise TraceError(f"with its continuation a row has {longest} tokens; {card.name!r} takes {card.n_ctx}")
    longer = trace._add_run(RunInputs(texts, single, data.inputs), f"{run.label} ...")
    _carry_over(run, longer, [len(more) for more in continuations])
    rows: list[int] = []
    places: list[int] = []
    ids: list[int] = []
    for row, more in enumerate(continuations):
        rows += [row] * len(more)
        places += [longer.seq - len(more) - 1 + i for i in range(len(more))]
        ids += more
    return predicted(longer, rows, places, ids, single)


def _carry_over(run: Run, longer: Run, counts: Sequence[int]) -> None:
    """At every site that was written in `run`, its value takes its place at the same tokens of `longer`."""
    trace = run.trace
    builder = trace.builder
    written = dict.fromkeys(str(n.attrs["site"]) for n in builder.nodes if n.op == "site.write" and n.run == run.index)
    for name in sorted(written, key=lambda name: builder.card.site(name).order):
        dims = builder.card.site(name).dims
        value = read_site(trace, run.index, name)
        there = read_site(trace, longer.index, name)
        if not SEQUENCE_DIMS & set(dims):
            there[...] = value
        elif len(set(counts)) == 1:  # rows are shown padded on the left, so all prompts end at the same place
            there[tuple(slice(0, run.seq) if d in SEQUENCE_DIMS else slice(None) for d in dims)] = value
        else:
            for row, count in enumerate(counts):
                length, end = len(run.tokens[row]), longer.seq - count
                here, own = slice(end - length, end), slice(run.seq - length, run.seq)
                new = (row, *[here if d in SEQUENCE_DIMS else slice(None) for d in dims[1:]])
                old = (row, *[own if d in SEQUENCE_DIMS else slice(None) for d in dims[1:]])
                there[new] = value[old]
                there = read_site(trace, longer.index, name)
