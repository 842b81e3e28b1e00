"""How many threads a forward on the CPU gets: candidates from the machine, tried on the model itself when it starts.

A forward is not alone on the machine: the event loop and the proxy want a core too, and with as many torch threads as
cores every parallel region then waits until all of them are scheduled (a 2 ms forward took 500 ms with two threads on
two cores that something else was using). So each candidate is timed twice, with the machine as it is and with one core
kept busy, and the smallest sum wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("patchbay.serving")

#: What trying may add to the start.
BUDGET_S = 0.3
#: Forwards of each kind whose median counts, and rows and positions of each.
_TRIALS, _ROWS, _SEQ = 3, 4, 16
#: Another than the most promising must be so much faster.
_GAIN = 0.95


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        threads: the number that was chosen.
        seconds: what each candidate took, quiet and busy medians added; those that there was no time for are not in it.
    """

    threads: int
    seconds: dict[int, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{n}: {s * 1e3:.1f} ms" for n, s in self.seconds.items())
        return f"{self.threads} (tried {tried})" if tried else str(self.threads)


def choose_torch_threads(configured: int | None, cores: int | None = None, *, sharing: int = 1) -> int:
    """Threads for a forward on the CPU, before anything was tried: as configured, else all cores but one.

    Args:
        configured: what the operator says.
        cores: how many there are; None: as many as this process may use.
        sharing: replicas of this machine that share them.
    """
    return thread_candidates(configured, cores, sharing=sharing)[0]


def thread_candidates(configured: int | None, cores: int | None = None, *, sharing: int = 1) -> tuple[int, ...]:
    """Numbers of threads that are worth trying, the most promising first; one alone where it is configured."""
    if configured is not None:
        return (configured,)
    there = usable_cores() if cores is None else cores
    most = max(1, there // sharing)
    return tuple(dict.fromkeys((max(1, (there - 1) // sharing), most, 1)))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its control group (a container's limit)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def set_torch_threads(count: int) -> None:
    """Let the calling thread's torch operations use `count` threads."""
    import torch

    torch.set_num_threads(count)


def settle_threads(hosted: Any, candidates: Sequence[int]) -> Calibration:
    """Choose among `candidates` for forwards of the calling thread, by trying them on the model's first layer."""
    probe = _first_layer(hosted) if len(candidates) > 1 else None
    found = Calibration(candidates[0], {})
    if probe is not None:
        found = calibrate(probe, candidates, set_torch_threads, busy=_busy_core)
    set_torch_threads(found.threads)
    log.info("torch threads of %s: %s", hosted.card.name, found)
    return found


def calibrate(
    probe: Callable[[], None],
    candidates: Sequence[int],
    use: Callable[[int], None],
    *,
    busy: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Time `probe` with each number of threads.

    Args:
        probe: what is timed.
        candidates: the most promising first; it is chosen where there is no time to try another.
        use: sets the number of threads.
        busy: a context in which the machine has something else to do.
        budget_s: after which no further candidate is begun.
        clock: seconds.
    """
    until = clock() + budget_s / 2  # the last trial may still take as long as everything before it
    seconds: dict[int, float] = {}
    for count in candidates:
        use(count)
        probe()  # the first time is not like the others
        quiet = _median(probe, clock, until)
        with busy():
            took = _median(probe, clock, until) if quiet is not None else None
        if quiet is None or took is None:
            break  # no time is left; or this one stalls
        seconds[count] = quiet + took
    chosen = candidates[0]
    if seconds:
        best = min(seconds, key=seconds.__getitem__)
        chosen = best if seconds[best] < _GAIN * seconds[chosen] else chosen
    use(chosen)
    return Calibration(chosen, seconds)


def made_up_layer() -> Calibration:
    """The candidates of this machine, tried on two matrices of a middling model; for whoever wants to see."""
    import torch

    rows, wide, narrow = torch.ones(_ROWS * _SEQ, 768), torch.ones(768, 3072), torch.ones(3072, 768)
    before = torch.get_num_threads()

    def multiply() -> None:
        torch.matmul(rows @ wide, narrow)

    try:
        return calibrate(multiply, thread_candidates(None), set_torch_threads, busy=_busy_core)
    finally:
        set_torch_threads(before)


def _median(probe: Callable[[], None], clock: Callable[[], float], until: float) -> float | None:
    times = []
    for _ in range(_TRIALS):
        started = clock()
        if started >= until:
            return None
        probe()
        times.append(clock() - started)
    return statistics.median(times)


@contextlib.contextmanager
def _busy_core() -> Iterator[None]:
    """One core has work while the body runs, as it has when requests come in. Does not hold the interpreter."""
    stop = threading.Event()
    block = bytes(1 << 20)

    def work() -> None:
        while not stop.is_set():
            hashlib.sha256(block).digest()

    thread = threading.Thread(target=work, name="patchbay-busy-core", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _first_layer(hosted: Any) -> Callable[[], None] | None:
    """A forward that ends after the model's first layer; None where it takes more than tokens, or runs on no CPU."""
    import torch

    from patchbay_server.models.inputs import forward

    if hosted.device.type != "cpu" or hosted.card.inputs or not hosted.layers or not hosted.card.d_vocab:
        return None

    class Ended(Exception):  # noqa: N818 - a signal, not an error
        pass

    def end(module: Any, args: Any, output: Any) -> None:
        del module, args, output
        raise Ended

    tokens = torch.zeros(_ROWS, min(_SEQ, hosted.card.n_ctx or _SEQ), dtype=torch.long)
    layer = hosted.model.get_submodule(hosted.layers[0])

    def probe() -> None:
        handle = layer.register_forward_hook(end)
        try:
            with torch.no_grad(), contextlib.suppress(Ended):
                forward(hosted.model, {"input_ids": tokens})
        finally:
            handle.remove()

    try:
        probe()
    except Exception as error:  # noqa: BLE001 - models raise what they like; then nothing is tried
        log.info("threads are not tried on %s: %s", hosted.card.name, error)
        return None
    return probe
