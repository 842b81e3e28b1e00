"""Results on their way from the device to the host: the engine goes on with the next forward while they travel.

On a GPU every output would otherwise stop the engine twice, for its bytes and for the question whether they are finite.
Here both are copied into pinned memory on a stream of their own, and a result is handed on once an event says that it
is there. On a CPU there is nothing to wait for: the result is the tensor's own memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from patchbay.ir.events import Event, TensorValue
from patchbay_server.kernels import to_data

#: Results beyond this are copied without pinned memory, which no other program can have while we hold it.
MAX_PINNED_BYTES = 2**30


class Arrival(Protocol):
    """What tells when a copy is complete: the part of `torch.cuda.Event` that is used."""

    def query(self) -> bool:
        """Whether it is."""

    def synchronize(self) -> None:
        """Wait until it is."""


@dataclass(frozen=True, slots=True)
class _Copy:
    names: tuple[str, ...]
    host: torch.Tensor
    finite: torch.Tensor
    arrival: Arrival


class HostCopies:
    """Hands out the results of one execution, in the order in which they were given.

    Args:
        emit: what takes them.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._under_way: deque[_Copy] = deque()
        self._stream: torch.cuda.Stream | None = None

    def send(self, value: torch.Tensor, names: Sequence[str]) -> None:
        """Send `value`, which nobody writes to any more, under each of the names."""
        if not self.travels(value):
            self._hand_on(names, value, all_finite(value))
            return
        self.deliver(wait=False)
        host, finite, arrival = self.begin(value.contiguous())
        self._under_way.append(_Copy(tuple(names), host, finite, arrival))

    def travels(self, value: torch.Tensor) -> bool:
        """Whether the value's memory is not the host's own."""
        return value.device.type == "cuda"

    def begin(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        """Begin to copy a value of a GPU and whether its sum is finite, beside what the GPU does otherwise."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(value.device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(stream):
            finite = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite.copy_(_sum_is_finite(value), non_blocking=True)
            pinned = value.numel() * value.element_size() <= MAX_PINNED_BYTES
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
            host.copy_(value, non_blocking=pinned)
            value.record_stream(stream)  # its memory is not given to others before the copy is made
            return host, finite, stream.record_event()

    def deliver(self, *, wait: bool) -> None:
        """Hand on what has arrived; all that is under way, if `wait`."""
        while self._under_way and (wait or self._under_way[0].arrival.query()):
            copy = self._under_way.popleft()
            copy.arrival.synchronize()
            self._hand_on(copy.names, copy.host, bool(copy.finite) or all_finite(copy.host))

    def _hand_on(self, names: Sequence[str], host: torch.Tensor, finite: bool) -> None:
        data = to_data(host)
        for name in names:
            self._emit(TensorValue(name, data, finite))


def _sum_is_finite(value: torch.Tensor) -> torch.Tensor:
    """A finite sum proves finite terms in one cheap sweep; an infinite one may still be an overflow."""
    if not value.is_floating_point() or value.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=value.device)
    return torch.isfinite((value.float() if value.element_size() == 1 else value).sum())


def all_finite(value: torch.Tensor) -> bool:
    """Whether no element is a NaN or an infinity."""
    if bool(_sum_is_finite(value)):
        return True
    return bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all())
