"""Admission, fair queue and positions, driven call by call; nothing here sleeps or needs a loop."""

from __future__ import annotations

import pytest

from patchbay.errors import ResourceExhaustedError
from patchbay_server.scheduling import AdmissionLimits, RoundRobinQueue, Scheduler, Ticket


class Desk:
    """A scheduler and a log of what its tickets were told."""

    def __init__(self, **limits: int) -> None:
        self.scheduler = Scheduler(AdmissionLimits(**limits))
        self.started: list[str] = []
        self.positions: list[tuple[str, int]] = []

    def ticket(self, name: str, account: str = "a") -> Ticket:
        return Ticket(
            account,
            on_start=lambda: self.started.append(name),
            on_position=lambda position: self.positions.append((name, position)),
        )

    def arrive(self, name: str, account: str = "a") -> Ticket:
        ticket = self.ticket(name, account)
        self.scheduler.enter(ticket)
        self.scheduler.submit(ticket)
        return ticket


def test_round_robin_takes_turns() -> None:
    """An account with many waiting requests does not delay another's single one by more than one turn."""
    queue: RoundRobinQueue[str] = RoundRobinQueue()
    for item in ("a1", "a2", "a3"):
        queue.push("a", item)
    queue.push("b", "b1")
    assert list(queue.order()) == ["a1", "b1", "a2", "a3"]
    assert [queue.pop() for _ in range(5)] == ["a1", "b1", "a2", "a3", None]


def test_round_robin_order_is_what_pop_does() -> None:
    """The order foretold equals the order served, whatever mix of accounts waits."""
    queue: RoundRobinQueue[str] = RoundRobinQueue()
    for account, item in [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("c", "5"), ("a", "6"), ("b", "7")]:
        queue.push(account, item)
    queue.pop()
    queue.remove("c", "4")
    foretold = list(queue.order())
    assert [queue.pop() for _ in foretold] == foretold
    assert len(queue) == 0


def test_removing_what_does_not_wait() -> None:
    """Taking out an item that is not there says so and changes nothing."""
    queue: RoundRobinQueue[str] = RoundRobinQueue()
    queue.push("a", "1")
    assert queue.remove("b", "1") is False
    assert queue.remove("a", "2") is False
    assert len(queue) == 1


def test_idle_engine_starts_at_once() -> None:
    """With a free slot a request starts without ever being told a position."""
    desk = Desk()
    desk.arrive("x")
    assert desk.started == ["x"]
    assert desk.positions == []


def test_positions_follow_every_change() -> None:
    """Each waiting request hears its position when it queues and whenever one before it starts or leaves."""
    desk = Desk()
    first = desk.arrive("x")
    second = desk.arrive("y")
    desk.arrive("z")
    assert desk.positions == [("y", 1), ("z", 2)]
    desk.positions.clear()
    desk.scheduler.leave(second)
    assert desk.positions == [("z", 1)]
    desk.scheduler.release(first)
    assert desk.started == ["x", "z"]


def test_another_account_moves_ahead() -> None:
    """A newcomer's first request goes before the second of one who already waits, and both are told."""
    desk = Desk()
    desk.arrive("a0", "a")
    desk.arrive("a1", "a")
    desk.arrive("a2", "a")
    desk.positions.clear()
    desk.arrive("b1", "b")
    assert desk.positions == [("b1", 2), ("a2", 3)]


def test_full_queue_is_refused_with_a_time() -> None:
    """One request too many gets RESOURCE_EXHAUSTED, the limit's name and when to retry, from the run times."""
    desk = Desk(max_queue_length=1)
    first = desk.arrive("x")
    desk.arrive("y")
    with pytest.raises(ResourceExhaustedError) as caught:
        desk.scheduler.enter(desk.ticket("z"))
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata == {"limit": "max_queue_length", "allowed": "1"}
    quick = caught.value.retry_after_s
    assert quick is not None
    assert quick > 0
    desk.scheduler.release(first, run_s=30.0)
    desk.arrive("w")
    with pytest.raises(ResourceExhaustedError) as caught:
        desk.scheduler.enter(desk.ticket("z"))
    assert caught.value.retry_after_s == pytest.approx(60.0)


def test_requests_being_prepared_count_towards_the_queue() -> None:
    """Requests admitted but not yet submitted hold a place, so a burst cannot overfill the queue."""
    desk = Desk(max_queue_length=1)
    desk.scheduler.enter(desk.ticket("x"))
    second = desk.ticket("y")
    desk.scheduler.enter(second)
    with pytest.raises(ResourceExhaustedError):
        desk.scheduler.enter(desk.ticket("z"))
    desk.scheduler.leave(second)
    desk.scheduler.enter(desk.ticket("z"))


def test_one_account_cannot_fill_the_queue() -> None:
    """The limit per account refuses the greedy one by name and leaves the others alone."""
    desk = Desk(max_concurrent_per_account=2)
    desk.arrive("a1", "a")
    desk.arrive("a2", "a")
    with pytest.raises(ResourceExhaustedError) as caught:
        desk.scheduler.enter(desk.ticket("a3", "a"))
    assert caught.value.metadata["limit"] == "max_concurrent_per_account"
    desk.arrive("b1", "b")
    assert desk.scheduler.waiting == 2


def test_leaving_gives_the_place_back_once() -> None:
    """A request that leaves twice is counted out once."""
    desk = Desk(max_concurrent_per_account=2)
    one = desk.arrive("a1")
    desk.arrive("a2")
    desk.scheduler.leave(one)
    desk.scheduler.leave(one)
    assert desk.scheduler.admitted("a") == 1


def test_results_that_nobody_reads_are_bounded() -> None:
    """An account is refused more results while too many of its own wait to be read; other accounts are not."""
    desk = Desk(max_unread_bytes_per_account=100)
    first, second, other = desk.arrive("x", "a"), desk.arrive("y", "a"), desk.arrive("z", "b")
    desk.scheduler.expect(first, 90)
    desk.scheduler.expect(other, 90)
    desk.scheduler.release(first, run_s=3.0)  # it ran, and nobody read what it gave
    with pytest.raises(ResourceExhaustedError, match="max_unread_bytes_per_account") as caught:
        desk.scheduler.expect(second, 11)
    assert caught.value.reason == "RESULTS_NOT_READ"
    assert caught.value.metadata == {"limit": "max_unread_bytes_per_account", "allowed": "100"}
    assert caught.value.retry_after_s is not None
    desk.scheduler.read(first, 1)
    desk.scheduler.expect(second, 11)
    assert desk.scheduler.unread("a") == 100
    desk.scheduler.leave(first)
    desk.scheduler.read(second, 50)  # more than it has
    desk.scheduler.leave(second)
    assert desk.scheduler.unread("a") == 0


def test_an_accounts_only_request_may_have_more_than_may_wait() -> None:
    """What `max_result_bytes` allows one request is not taken away by the bound on all of them."""
    desk = Desk(max_unread_bytes_per_account=100)
    alone = desk.arrive("x")
    desk.scheduler.expect(alone, 1_000)
    with pytest.raises(ResourceExhaustedError):
        desk.scheduler.expect(desk.arrive("y"), 1)


def test_slots_bound_what_runs() -> None:
    """With two slots two requests run; releasing one that never ran changes nothing."""
    desk = Desk(slots=2)
    tickets = [desk.arrive(name) for name in "xyz"]
    assert desk.started == ["x", "y"]
    desk.scheduler.release(tickets[2])
    assert desk.scheduler.running == 2
    desk.scheduler.release(tickets[0])
    assert desk.started == ["x", "y", "z"]
