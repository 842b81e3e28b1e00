"""Executions that are under way beside others: each says which forward it wants next, and goes on once that was run."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from patchbay.errors import ResourceExhaustedError
from patchbay.ir.card import ModelCard
from patchbay.ir.events import Event, TensorValue, Usage
from patchbay_server.engine.forwards import DEVICE_ERRORS, ForwardCall
from patchbay_server.engine.plan import Plan
from patchbay_server.engine.switches import COBATCH, CONTINUOUS_BATCHING

if TYPE_CHECKING:
    from patchbay_server.engine.engine import Engine

#: A call's values up to so many bytes are kept for the length of a shared forward, in case it must be run again.
_REMEMBERED_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Wanted:
    """The forward that an execution waits for, as far as a scheduler needs to know it.

    Attributes:
        rows, seq: extents of its batch.
        depth: layers that it needs.
        together: those with equal ones may share a forward; None shares with nobody.
        bound: those with an equal `together` go all at once.
        nbytes: memory that it needs while it runs.
    """

    rows: int
    seq: int
    depth: int
    together: Hashable | None
    bound: bool
    nbytes: int


class Running:
    """One plan under way; used by one thread.

    Attributes:
        wanted: the forward that it waits for; None before `begin` and after the end.
        usage: what was used, once it has ended well.
        error: what ended it, once it has not.
        run_s: seconds that it ran, forwards that it shared counted in full.
    """

    def __init__(
        self, engine: Engine, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool]
    ) -> None:
        self._engine, self._plan, self._cancelled = engine, plan, cancelled
        self._emit = emit_once(emit)
        self._forwards: Generator[ForwardCall, None, Usage] | None = None
        self._shared = {COBATCH: 0, CONTINUOUS_BATCHING: 0}
        self._retried = False
        self.call: ForwardCall | None = None
        self.wanted: Wanted | None = None
        self.usage: Usage | None = None
        self.error: BaseException | None = None
        self.run_s = 0.0

    @property
    def exclusive(self) -> bool:
        """Whether nothing else may run between its forwards."""
        return self._plan.differentiates

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.usage is not None or self.error is not None

    def begin(self) -> None:
        """Do what comes before the first forward."""
        started = time.perf_counter()
        if self.exclusive:
            tokens = max(1, self._plan.cost.tokens)
            self.wanted = Wanted(1, tokens, max(1, self._engine.hosted.card.n_layers), None, False, 0)
        else:
            self._start(self._plan)
        self.run_s += time.perf_counter() - started

    def close(self) -> None:
        """Let go of everything; nothing more is said."""
        if self._forwards is not None:
            self._forwards.close()
        self._forwards = self.call = self.wanted = None

    def run_to_the_end(self) -> None:
        """Run every forward, each alone."""
        try:
            self.usage = self._engine.run(self._plan, self._emit, self._cancelled)
        except BaseException as error:  # noqa: BLE001 - whoever drives it decides
            self.error = error
        self.wanted = None

    def shared(self, name: str) -> None:
        """Note that a forward of another served it too."""
        self._shared[name] += 1

    def go_on(self) -> None:
        """Do what comes after the forward that was wanted, up to the next one or the end."""
        assert self._forwards is not None
        self.call = self.wanted = None
        try:
            with torch.no_grad():
                self.call = next(self._forwards)
        except StopIteration as end:
            usage: Usage = end.value
            shared = {name: count for name, count in self._shared.items() if count}
            self.usage = replace(usage, saved={**usage.saved, **shared})
        except torch.OutOfMemoryError as error:
            memory: BaseException | None = error.with_traceback(None)
        except BaseException as error:  # noqa: BLE001 - whoever drives it decides
            self.error = error
        else:
            self.wanted = self._engine.wanted_by(self.call)
            return
        self._forwards = None
        if self.usage is None and self.error is None:
            self._out_of_memory(memory)

    def _start(self, plan: Plan) -> None:
        self._forwards = self._engine.start(plan, self._emit, self._cancelled).forwards()
        self.go_on()

    def _out_of_memory(self, error: BaseException | None) -> None:
        """Once more from the start with one run per forward; then give up."""
        del error
        self._engine.make_room()
        if self._retried:
            self.error = out_of_memory()
            return
        self._retried = True
        self._start(self._engine.one_by_one(self._plan))


def emit_once(emit: Callable[[Event], None]) -> Callable[[Event], None]:
    """`emit`, for an execution that may have to start again: each output is sent once."""
    sent: set[str] = set()

    def emitted(event: Event) -> None:
        if isinstance(event, TensorValue):
            if event.name in sent:
                return
            sent.add(event.name)
        emit(event)

    return emitted


def out_of_memory() -> ResourceExhaustedError:
    """Not even one run at a time fits."""
    return ResourceExhaustedError(
        "the device ran out of memory, with one run per forward too; use fewer rows or shorter texts, or save less",
        reason="DEVICE_MEMORY",
    )


class Depths:
    """How many layers a forward needs that may stop at a site.

    Args:
        card: the model's.
    """

    def __init__(self, card: ModelCard) -> None:
        self._layers = max(1, card.n_layers)
        first: dict[int, int] = {}
        self._order: dict[str, int] = {}
        for site in card.sites:
            if site.absent is not None:
                continue
            self._order[site.name] = site.order
            parts = site.name.split(".")
            if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit():
                first[int(parts[1])] = min(first.get(int(parts[1]), site.order), site.order)
        self._begins = sorted(first.values())

    def of(self, stop_at: str | None) -> int:
        """Layers that run before the site's value is there; all of them for None or a model without known layers."""
        if stop_at is None or not self._begins:
            return self._layers
        return max(1, bisect_right(self._begins, self._order.get(stop_at, self._begins[-1])))


def activation_bytes(card: ModelCard, rows: int, seq: int, *, to_the_end: bool) -> int:
    """A forward's own tensors at its widest: the stream, one layer's inside, and the logits where it gets there."""
    width = 6 * card.d_model + 2 * card.d_mlp + 3 * card.n_heads * card.d_head
    if to_the_end:
        width = max(width, 2 * card.d_vocab)
    return rows * seq * width * card.dtype.itemsize


def advance(engine: Engine, group: Sequence[Running]) -> None:
    """Run the forward that all of `group` want, and let each go on.

    Raises:
        BaseException: the device failed; nothing is said to anybody.
    """
    started = time.perf_counter()
    if group[0].exclusive:
        group[0].run_to_the_end()
    else:
        calls = [each.call for each in group if each.call is not None]
        name = CONTINUOUS_BATCHING if calls[0].decodes else COBATCH
        if _forward(engine, calls):
            for each in group[1:]:
                each.shared(name)
        middle = time.perf_counter()
        for each in group:
            each.run_s += middle - started
            began = time.perf_counter()
            each.go_on()
            each.run_s += time.perf_counter() - began
        return
    group[0].run_s += time.perf_counter() - started


def _forward(engine: Engine, calls: Sequence[ForwardCall]) -> bool:
    """One forward for all; where it fails for want of memory, or for a reason that is nobody's, one for each.

    Returns:
        whether it was one.
    """
    before = [_remembered(call) for call in calls] if len(calls) > 1 else []
    try:
        with torch.no_grad():  # what differentiates runs alone, in `run_to_the_end`
            engine.forward(calls)
    except Exception as error:
        if isinstance(error, DEVICE_ERRORS) and not isinstance(error, torch.OutOfMemoryError):
            raise
        if len(calls) == 1:
            calls[0].error = error.with_traceback(None)
            return True
    else:
        return True
    # Outside the except block, so that the traceback no longer holds the tensors that did not fit.
    engine.make_room()
    for call, values in zip(calls, before, strict=True):
        if call.error is not None:
            continue
        if values is None:  # it begins anew, as after running out of memory alone
            call.error = torch.OutOfMemoryError("a shared forward failed")
            continue
        call.values.clear()
        call.values.update(values)
        call.reached.clear()
        call.layers_run = call.layers_bypassed = call.fused = 0
        _forward(engine, [call])
    return False


def _remembered(call: ForwardCall) -> dict[int, Any] | None:
    """What to put back before the call is run again; None where holding on to it would cost too much memory."""
    held = sum(v.numel() * v.element_size() for v in call.values.values() if isinstance(v, torch.Tensor))
    return dict(call.values) if held <= _REMEMBERED_BYTES else None
