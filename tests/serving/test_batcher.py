"""Virtual token counters, the queue by them, and the choice of forwards: pure logic, over generated loads."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbay_server.scheduling import (
    AdmissionLimits,
    Batcher,
    Budget,
    Scheduler,
    Ticket,
    VirtualTokenQueue,
    VirtualTokens,
    Waiting,
)

COSTS = st.integers(1, 50)
ACCOUNTS = st.sampled_from("abcd")
#: Arrivals (account, cost) and, as None, pops.
LOADS = st.lists(st.one_of(st.none(), st.tuples(ACCOUNTS, COSTS)), max_size=60)


# --- the queue


@given(LOADS)
def test_the_queue_conserves_work_and_order(load: list[tuple[str, int] | None]) -> None:
    """While anything waits, a pop returns something; everything comes out once, each account's in its own order."""
    queue: VirtualTokenQueue[tuple[str, int]] = VirtualTokenQueue()
    waiting, out = 0, []
    for number, what in enumerate(load):
        if what is None:
            item = queue.pop()
            assert (item is None) == (waiting == 0)
            waiting -= item is not None
            out += [item] if item else []
        else:
            queue.push(what[0], (what[0], number), what[1])
            waiting += 1
        assert len(queue) == waiting
    while (item := queue.pop()) is not None:
        out.append(item)
    assert len(out) == sum(what is not None for what in load) == len(set(out))
    for account in "abcd":
        numbers = [number for name, number in out if name == account]
        assert numbers == sorted(numbers)


@given(LOADS, st.lists(st.tuples(ACCOUNTS, COSTS), max_size=20))
def test_the_order_foretold_is_the_order_served(
    load: list[tuple[str, int] | None], rest: list[tuple[str, int]]
) -> None:
    """`order` says what `pop` will do, whatever came before."""
    queue: VirtualTokenQueue[int] = VirtualTokenQueue()
    for number, what in enumerate([*load, *rest]):
        if what is None:
            queue.pop()
        else:
            queue.push(what[0], number, what[1])
    foretold = list(queue.order())
    assert [queue.pop() for _ in foretold] == foretold
    assert queue.pop() is None


@given(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=60))
def test_accounts_that_always_wait_get_the_same(costs: list[tuple[int, int]]) -> None:
    """Of two accounts that both wait all the time, neither is ever ahead by more than the dearest request."""
    queue: VirtualTokenQueue[tuple[str, int]] = VirtualTokenQueue()
    for a, b in costs:
        queue.push("a", ("a", a), a)
        queue.push("b", ("b", b), b)
    had = {"a": 0, "b": 0}
    left = {"a": len(costs), "b": len(costs)}
    while all(left.values()):
        item = queue.pop()
        assert item is not None
        had[item[0]] += item[1]
        left[item[0]] -= 1
        assert abs(had["a"] - had["b"]) <= max(max(pair) for pair in costs)


@given(st.lists(COSTS, min_size=1, max_size=40), COSTS)
def test_a_newcomer_waits_for_little(costs: list[int], mine: int) -> None:
    """However much one account has waiting, another's first request is served after one of it at most."""
    queue: VirtualTokenQueue[str] = VirtualTokenQueue()
    for cost in costs:
        queue.push("flood", "flood", cost)
    queue.pop()
    queue.push("me", "me", mine)
    assert "me" in [queue.pop(), queue.pop()]


def test_an_account_that_was_idle_has_no_credit_and_no_debt() -> None:
    """Who comes back starts at the lowest busy counter: it neither catches up on its pause, nor pays for the past."""
    tokens = VirtualTokens()
    tokens.enter("busy")
    tokens.charge("busy", 1_000)
    tokens.enter("new")
    assert tokens.of("new") == 1_000
    tokens.leave("new")
    tokens.leave("busy")
    tokens.enter("later")
    assert tokens.of("later") == 1_000


def test_weights_share_in_proportion() -> None:
    """An account of weight 3 is served three times for each time of another."""
    queue: VirtualTokenQueue[str] = VirtualTokenQueue({"big": 3.0})
    for _ in range(40):
        queue.push("big", "big", 6)
        queue.push("small", "small", 6)
    served = [queue.pop() for _ in range(40)]
    assert served.count("big") == pytest.approx(30, abs=1)


def test_removing_and_correcting() -> None:
    """A request that leaves is not charged; one that turned out cheaper is charged less."""
    queue: VirtualTokenQueue[str] = VirtualTokenQueue()
    for item in ("a1", "a2"):
        queue.push("a", item, 10)
    queue.push("b", "b1", 10)
    queue.push("b", "b2", 10)
    assert queue.remove("a", "a3") is False
    assert queue.remove("c", "a1") is False
    assert queue.pop() == "a1"
    queue.charge("a", -9)  # it stopped early
    assert queue.remove("b", "b1") is True
    assert [queue.pop(), queue.pop(), queue.pop()] == ["b2", "a2", None]


# --- slots


def test_an_account_without_a_slot_need_not_wait_for_one() -> None:
    """When one account holds every slot, another's request is opened beside them, but not its second."""
    started: list[str] = []
    scheduler = Scheduler(AdmissionLimits(slots=2), VirtualTokenQueue[Ticket]())

    def arrive(name: str, account: str) -> Ticket:
        ticket = Ticket(account, on_start=lambda: started.append(name))
        scheduler.enter(ticket)
        scheduler.submit(ticket)
        return ticket

    first = arrive("a1", "a")
    for name, account in (("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")):
        arrive(name, account)
    assert started == ["a1", "a2", "b1"]
    scheduler.release(first)
    assert started == ["a1", "a2", "b1"]  # still as many as there are slots
    arrive("c1", "c")
    assert started[-1] == "c1"


# --- the forward


def call(account: str = "a", **what: Any) -> Waiting:
    return Waiting(account, **{"rows": 1, "seq": 32, "depth": 12, "together": "tokens", **what})


CALLS = st.lists(
    st.builds(
        Waiting,
        account=ACCOUNTS,
        rows=st.integers(1, 4),
        seq=st.integers(1, 64),
        depth=st.integers(1, 12),
        together=st.sampled_from([None, "tokens", "other"]),
        nbytes=st.integers(0, 100),
        since=st.floats(0, 1),
    ),
    min_size=1,
    max_size=30,
)


@given(CALLS, st.integers(1, 300), st.integers(1, 200))
def test_a_shared_forward_keeps_to_its_budget(calls: list[Waiting], tokens: int, nbytes: int) -> None:
    """What is picked is of one kind, within tokens, memory, padding and depth, or one call alone."""
    budget = Budget(tokens=tokens, nbytes=nbytes)
    chosen = [calls[i] for i in Batcher(budget).pick(calls)]
    assert len(chosen) >= 1
    if len(chosen) > 1:
        rows, seq = sum(c.rows for c in chosen), max(c.seq for c in chosen)
        assert len({c.together for c in chosen}) == 1
        assert chosen[0].together is not None
        assert rows * seq <= tokens
        assert sum(c.nbytes for c in chosen) <= nbytes
        assert sum(c.rows * c.seq for c in chosen) >= budget.filled * rows * seq
        assert min(c.depth for c in chosen) >= budget.level * max(c.depth for c in chosen)


@given(CALLS)
def test_nothing_waits_for_ever(calls: list[Waiting]) -> None:
    """Picking again and again serves every call once."""
    batcher = Batcher(Budget(tokens=100))
    for each in calls:
        batcher.enter(each.account)
    left = list(calls)
    while left:
        chosen = batcher.pick(left)
        assert len(chosen) == len(set(chosen)) >= 1
        for i in chosen:
            batcher.leave(left[i].account)
        left = [each for i, each in enumerate(left) if i not in chosen]
    assert not left


def test_the_load_of_many_equal_requests_goes_together() -> None:
    """Thirty-two one-row reads are one forward, whether of one account or of thirty-two."""
    for accounts in (["a"] * 32, [f"a{i}" for i in range(32)]):
        assert sorted(Batcher(Budget(tokens=1024)).pick([call(a) for a in accounts])) == list(range(32))


def test_a_flood_does_not_fill_anothers_forward() -> None:
    """The forward of an account whose turn it is carries none of a flood's rows, and few of a peer's."""
    for waiting, free, carried in ((20, 0, 0), (20, 64, 2), (2, 0, 2)):
        batcher = Batcher(Budget(tokens=1024, free_tokens=free))
        batcher.enter("other")
        batcher.enter("me")
        batcher.tokens.charge("other", 1.0)
        calls = [call("other", since=0.0) for _ in range(waiting)] + [call("me", since=1.0)]
        chosen = [calls[i].account for i in batcher.pick(calls)]
        assert sorted(chosen) == ["me", *["other"] * carried]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=5, max_size=40))
def test_backlogged_accounts_are_put_through_alike(sizes: list[tuple[int, int]]) -> None:
    """Two accounts that always have calls waiting differ by no more than two full forwards of work."""
    budget = Budget(tokens=8, filled=0.0, free_tokens=0)
    batcher = Batcher(budget)
    left: dict[str, list[Waiting]] = {
        "a": [call("a", rows=a, seq=1, depth=1, since=i) for i, (a, _) in enumerate(sizes)],
        "b": [call("b", rows=b, seq=1, depth=1, since=i) for i, (_, b) in enumerate(sizes)],
    }
    for account in left:
        batcher.enter(account)
    had: dict[str, float] = defaultdict(float)
    while all(left.values()):
        calls = [*left["a"], *left["b"]]
        for i in batcher.pick(calls):
            had[calls[i].account] += calls[i].work
            left[calls[i].account] = [c for c in left[calls[i].account] if c is not calls[i]]
        assert abs(had["a"] - had["b"]) <= 2 * budget.tokens


@given(
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=20, max_size=40),
    st.sampled_from([8, 64, 512]),
)
def test_backlogged_accounts_are_put_through_by_weight(
    weight: float, sizes: list[tuple[int, int]], tokens: int
) -> None:
    """Of two accounts that always wait, what each had by its weight differs by no more than two full forwards."""
    batcher = Batcher(Budget(tokens=tokens, filled=0.0, free_tokens=0), weights={"a": weight})
    for account in "ab":
        batcher.enter(account)
    had: dict[str, float] = defaultdict(float)
    for _ in range(20):
        calls = [call("a", rows=16 * a, seq=1, depth=1, since=i) for i, (a, _) in enumerate(sizes)]
        calls += [call("b", rows=16 * b, seq=1, depth=1, since=i) for i, (_, b) in enumerate(sizes)]
        for i in batcher.pick(calls):
            had[calls[i].account] += calls[i].work
        assert abs(had["a"] / weight - had["b"]) <= 2 * max(tokens, 48) / min(weight, 1.0)


def test_a_shared_forward_is_divided_by_weight() -> None:
    """Of two floods, the account of weight 3 gets three quarters of a forward, whoever's turn it is."""
    for first in ("big", "small"):
        batcher = Batcher(Budget(tokens=512), weights={"big": 3.0})
        for account in ("big", "small"):
            batcher.enter(account)
        batcher.tokens.charge("small" if first == "big" else "big", 1.0)
        calls = [call(account, rows=1, seq=32) for account in ("big", "small") for _ in range(32)]
        chosen = [calls[i].account for i in batcher.pick(calls)]
        assert (chosen[0], chosen.count("big"), chosen.count("small")) == (first, 12, 4)


def test_shallow_rows_do_not_run_deep() -> None:
    """Calls that stop early share a forward of their own; so do the deep ones."""
    batcher = Batcher()
    calls = [call(depth=2), call(depth=12), call(depth=2), call(depth=11)]
    assert sorted(batcher.pick(calls)) == [0, 2]
    assert sorted(batcher.pick([calls[1], calls[3]])) == [0, 1]


def test_rows_that_generate_together_go_all_at_once() -> None:
    """A batch that generates steps as a whole, beyond every budget, and nothing else goes with it."""
    batcher = Batcher(Budget(tokens=2))
    steps = [call(f"a{i}", seq=1, together=("step", 1), bound=True, since=0.0) for i in range(9)]
    chosen = batcher.pick([call("z", since=1.0), *steps, call("y", seq=1, together=("step", 2), bound=True, since=1.0)])
    assert sorted(chosen) == list(range(1, 10))


def test_first_come_first_served_where_fairness_is_off() -> None:
    """Without counters whoever has waited longest goes first, and an account may fill the forward."""
    batcher = Batcher(Budget(tokens=1024), fair=False)
    calls = [call("flood", since=0.0) for _ in range(20)] + [call("me", since=1.0)]
    for _ in range(3):
        assert len(batcher.pick(calls)) == 21
