"""Layers that need not run: what they would add to the stream is written over, and nothing looks inside.

``run.blocks[3].skip()`` writes the stream before a layer in the place of the one behind it; a patch of the whole stream
does the same to everything before it. Only models whose layers were seen to hand on nothing but the stream
(`patchbay_server.models.continuation`) leave layers out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from patchbay_server.engine.steps import Pass, Read, Resume, Write
from patchbay_server.models.hosted import HostedModel
from patchbay_server.models.taps import InputTap, OutputTap


def unseen_layers(hosted: HostedModel, each: Pass) -> frozenset[int]:
    """The layers of a forward that need not run.

    A layer whose output is replaced in all rows before anybody reads it, with no site visited inside, need not run;
    nor need the layers before it as far as nothing was visited since they began.
    """
    if hosted.continuation is None or each.keeps or each.generation is not None:
        return frozenset()
    order = {name: hosted.card.site(name).order for name in each.sites}
    begins = -1 if each.goes_on is None else each.goes_on.skipped - 1
    found: set[int] = set()
    for layer in reversed(range(begins + 1, len(hosted.layers))):
        before, after = f"blocks.{layer}.resid_pre", f"blocks.{layer}.resid_post"
        if before not in hosted.card or after not in hosted.card:
            continue
        path = hosted.layers[layer]
        if hosted.taps[before] != InputTap(path) or hosted.taps[after] != OutputTap(path):
            continue
        start, end = hosted.card.site(before).order, hosted.card.site(after).order
        replaced = after in order and _replaced(each, after)
        # The next layer need not run either, and nothing asks for what lies between.
        passed_on = layer + 1 in found and not any(end <= at <= _start_of(hosted, layer + 1) for at in order.values())
        inside = any(start < at < end for at in order.values())
        if (replaced or passed_on) and not inside:
            found.add(layer)
    return frozenset(found)


def _start_of(hosted: HostedModel, layer: int) -> int:
    return hosted.card.site(f"blocks.{layer}.resid_pre").order


def _replaced(each: Pass, site: str) -> bool:
    """Whether every run's rows are written as a whole before anybody reads them there."""
    waiting = {slot.run for slot in each.slots}
    for step in each.sites[site].steps:
        if isinstance(step, Write):
            if step.slot.run in waiting and not (step.mode == "set" and step.index == ()):
                return False
            waiting.discard(step.slot.run)
        elif isinstance(step, (Read, Resume)) and step.slot.run in waiting:
            return False
    return not waiting


@contextmanager
def bypassing(hosted: HostedModel, layers: Sequence[int]) -> Iterator[None]:
    """While the body runs, `layers` hand on what they are given."""
    if not layers:
        yield
        return
    assert hosted.continuation is not None

    def instead(outputs: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            return (stream, *([None] * (outputs - 1))) if outputs else stream

        return forward

    changed: list[tuple[torch.nn.Module, Any]] = []
    try:
        for number in layers:
            layer = hosted.model.get_submodule(hosted.layers[number])
            changed.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = instead(hosted.continuation.outputs[number])
        yield
    finally:
        for layer, before in reversed(changed):
            del layer.__dict__["forward"]
            if before is not None:
                layer.__dict__["forward"] = before
