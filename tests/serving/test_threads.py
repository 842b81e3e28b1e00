"""The choice of torch threads: candidates from the machine, trials on a scripted clock and on a real model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from patchbay_server.config import LimitsConfig
from patchbay_server.models.loader import host
from patchbay_server.serving.local import LocalBackend
from patchbay_server.serving.threads import BUDGET_S, calibrate, made_up_layer, settle_threads, thread_candidates
from tests.tiny import build


class Machine:
    """A clock that a probe moves on by what its number of threads takes, quiet and busy."""

    def __init__(self, quiet: dict[int, float], busy: dict[int, float]) -> None:
        self.quiet, self.busy = quiet, busy
        self.now, self.threads, self.loaded = 0.0, 0, False
        self.used: list[int] = []

    def use(self, count: int) -> None:
        self.threads = count
        self.used.append(count)

    def probe(self) -> None:
        self.now += (self.busy if self.loaded else self.quiet)[self.threads]

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        self.loaded = True
        yield
        self.loaded = False

    def best(self, *candidates: int) -> int:
        found = calibrate(self.probe, candidates, self.use, busy=self.load, clock=lambda: self.now)
        assert self.used[-1] == found.threads
        return found.threads


def test_candidates() -> None:
    """All cores but one, all, and one, shared by the machine's replicas; what is configured is not tried."""
    assert thread_candidates(None, 8) == (7, 8, 1)
    assert thread_candidates(None, 2) == (1, 2)
    assert thread_candidates(None, 1) == (1,)
    assert thread_candidates(None, 8, sharing=4) == (1, 2)
    assert thread_candidates(3, 8) == (3,)


def test_the_fastest_wins_quiet_and_busy_together() -> None:
    """Two threads that are faster alone lose where they stall beside others; where they do not, they win."""
    assert Machine({1: 0.002, 2: 0.0011}, {1: 0.002, 2: 0.5}).best(1, 2) == 1
    assert Machine({1: 0.002, 2: 0.0011}, {1: 0.002, 2: 0.0015}).best(1, 2) == 2
    assert Machine({7: 0.004, 8: 0.0039, 1: 0.001}, {7: 0.004, 8: 0.02, 1: 0.001}).best(7, 8, 1) == 1


def test_next_to_nothing_is_no_reason() -> None:
    """A candidate that is faster by less than a twentieth does not replace the one that is expected to be best."""
    assert Machine({1: 0.0020, 2: 0.00195}, {1: 0.0020, 2: 0.00195}).best(1, 2) == 1


def test_trying_is_short() -> None:
    """Large models are not tried for long: what is expected to be best is taken, and the start is hardly delayed."""
    machine = Machine({1: 0.2, 2: 0.1}, {1: 0.2, 2: 0.1})
    assert machine.best(1, 2) == 1
    assert machine.now <= BUDGET_S
    machine = Machine({1: 0.02, 2: 0.1}, {1: 0.02, 2: 0.1})
    assert machine.best(1, 2) == 1
    assert machine.now <= BUDGET_S


def test_a_model_is_tried_by_its_first_layer() -> None:
    """Trying leaves no hook, sets the threads of the calling thread, and says what it found."""
    hosted = host(build("llama"))
    before = torch.get_num_threads()
    entered: list[int] = []
    watch = hosted.model.model.layers[1].register_forward_pre_hook(lambda module, args: entered.append(1))
    try:
        found = settle_threads(hosted, (1, 2))
        assert torch.get_num_threads() == found.threads
    finally:
        torch.set_num_threads(before)
        watch.remove()
    assert found.threads in (1, 2)
    assert 1 in found.seconds
    assert "ms" in str(found)
    assert entered == []
    assert not hosted.model.model.layers[0]._forward_hooks


def test_one_candidate_is_not_tried() -> None:
    """A configured number is used as it is."""
    before = torch.get_num_threads()
    try:
        assert settle_threads(host(build("gpt2")), (1,)).seconds == {}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_backend_settles_its_engine_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine thread tries the candidates before it serves; other threads keep theirs."""
    settled = threading.Event()
    where: list[str] = []

    def settle(hosted: object, candidates: tuple[int, ...]) -> None:
        where.append(threading.current_thread().name)
        assert candidates == (1, 2)
        settled.set()

    monkeypatch.setattr("patchbay_server.serving.local.settle_threads", settle)
    backend = LocalBackend(host(build("gpt2"), name="m"), LimitsConfig(), torch_threads=(1, 2))
    assert settled.wait(30)
    backend.close()
    assert where == ["patchbay-engine-m"]


def test_the_doctor_tries_a_made_up_layer() -> None:
    """What `patchbay doctor` shows is tried too, and changes nothing."""
    before = torch.get_num_threads()
    assert made_up_layer().threads >= 1
    assert torch.get_num_threads() == before
