"""Results on their way to the host: handed on when they have arrived, in the order in which they were sent."""

from __future__ import annotations

import numpy as np
import torch

from patchbay.arrays import view_of
from patchbay.ir.events import Event, TensorValue
from patchbay_server.engine.copies import Arrival, HostCopies


class _Scripted(HostCopies):
    """Copies that arrive when the test says so."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.arrived: list[bool] = []
        super().__init__(self.events.append)

    def travels(self, value: torch.Tensor) -> bool:
        return True

    def begin(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Arrival]:
        number, arrived = len(self.arrived), self.arrived
        arrived.append(False)

        class _Arrival:
            def query(self) -> bool:
                return arrived[number]

            def synchronize(self) -> None:
                arrived[number] = True

        return value.clone(), torch.isfinite(value.sum()), _Arrival()

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events if isinstance(event, TensorValue)]


def test_what_travels_is_handed_on_when_it_has_arrived_and_in_order() -> None:
    """A result that arrived early waits for those sent before it; the end waits for all."""
    copies = _Scripted()
    for name in ("a", "b", "c"):
        copies.send(torch.ones(2), [name])
    copies.arrived[1] = True
    copies.deliver(wait=False)
    assert copies.names == []
    copies.arrived[0] = True
    copies.send(torch.ones(2), ["d", "e"])
    assert copies.names == ["a", "b"]
    copies.deliver(wait=True)
    assert copies.names == ["a", "b", "c", "d", "e"]


def test_a_sum_that_overflows_is_not_taken_for_an_infinity() -> None:
    """Values whose sum is infinite are looked at one by one on the host; a NaN and an infinity are found."""
    copies = _Scripted()
    for name, value in (("large", 3e38), ("nan", float("nan")), ("inf", float("inf")), ("small", 1.0)):
        copies.send(torch.full((4,), value), [name])
    copies.deliver(wait=True)
    finite = {event.name: event.finite for event in copies.events if isinstance(event, TensorValue)}
    assert finite == {"large": True, "nan": False, "inf": False, "small": True}


def test_a_value_of_the_host_is_sent_as_the_memory_that_it_is() -> None:
    """On a CPU nothing is copied between a tensor and what is sent of it."""
    events: list[Event] = []
    value = torch.arange(12.0).reshape(3, 4)
    HostCopies(events.append).send(value, ["x"])
    (event,) = events
    assert isinstance(event, TensorValue)
    assert event.finite
    assert np.shares_memory(view_of(event.value), value.numpy())
