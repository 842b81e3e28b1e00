"""Runs the loops, choices and maps of a graph: `patchbay.ir.bodies`, compiled by `patchbay_server.engine.bodies`.

Without a gradient through it, a loop of any length holds one step's values at a time, what it carries and what its
steps gave. Whether the request was cancelled is asked before every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch

from patchbay.errors import GraphError, RequestCancelledError
from patchbay.ir.bodies import side_by_side
from patchbay.ir.graph import Graph
from patchbay.ir.ops.spec import TensorSpec
from patchbay_server.engine.bodies import LOOP_INVARIANTS, SIDE_BY_SIDE, Program, Surroundings, detached
from patchbay_server.kernels import to_torch_dtype

#: Slices that are taken of a value at a time.
_SLICES = 1024
#: What torch cannot run over slices side by side, or only by a slow loop of its own.
ONE_BY_ONE = frozenset(
    {"grad", "call", "cond", "scan", "map", "masked_fill", "kl_div", "scaled_dot_product_attention", "searchsorted"}
)


class Loops:
    """The loops of one execution; used by one thread.

    Args:
        graph: a verified graph, whose bodies' facts are known.
        device: where tensors are made.
        callables: modules of the model that values can be put through.
        check: raises when the request was cancelled.
        disabled: optimisations that are switched off.

    Attributes:
        saved: by optimisation, operations that were not run (`loop_invariants`), and slices that were not run by
            themselves (`side_by_side`).
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        callables: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
        check: Callable[[], None],
        disabled: Sequence[str],
    ) -> None:
        self._graph, self._check = graph, check
        self._around = Surroundings(device, callables, self.run, disabled)
        self._programs: dict[tuple[int, int], Program] = {}
        self._refused: set[int] = set()
        self.saved = {LOOP_INVARIANTS: 0, SIDE_BY_SIDE: 0}

    def run(self, op: str, attrs: Mapping[str, Any], values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The parts of a ``scan``, ``cond`` or ``map``.

        Raises:
            GraphError: what only running reveals as wrong; its field names body and node.
            RequestCancelledError: the request was cancelled.
        """
        recording = torch.is_grad_enabled() and any(v.requires_grad for v in values)
        if not recording:
            values = [detached(v) for v in values]
        if op == "scan":
            return self._scan(attrs, values, recording)
        if op == "map":
            return self._map(attrs, values, recording)
        body = attrs["then"] if bool(values[0]) else attrs["otherwise"]
        program = self._program(body, 0)
        places = program.prepare(())
        places[: len(values) - 1] = values[1:]
        return tuple(program.run(places, recording))

    def _program(self, number: int, whole: int) -> Program:
        found = self._programs.get((number, whole))
        if found is None:
            body, facts = self._graph.bodies[number], self._graph.body_facts[number]
            found = self._programs[number, whole] = Program(number, body, facts, whole, self._around)
        return found

    # --- loops ----------------------------------------------------------------------------------------------------

    def _scan(self, attrs: Mapping[str, Any], values: Sequence[torch.Tensor], recording: bool) -> Any:
        carried, sliced, length = attrs["carry"], attrs["xs"], attrs["length"]
        xs, whole = values[carried : carried + sliced], values[carried + sliced :]
        body = self._graph.bodies[attrs["body"]]
        carry: Sequence[torch.Tensor] = values[:carried]
        stacks = [self._stack(spec, length, recording) for spec in body.returns[carried:]]
        if length:
            program, check = self._program(attrs["body"], len(whole)), self._check
            ready = program.prepare(whole)
            self.saved[LOOP_INVARIANTS] += (length - 1) * program.kept
            varying = carried + sliced
            for number, slices in zip(range(length), _slices(xs, length), strict=False):
                check()
                places = ready.copy()
                places[:carried] = carry
                places[carried:varying] = slices
                gave = program.run(places, recording)
                carry = gave[:carried]
                for stack, y in zip(stacks, gave[carried:], strict=True):
                    stack.put(number, y)
        end = carry if recording else map(_own, carry)
        return (*end, *(stack.done() for stack in stacks))

    def _map(self, attrs: Mapping[str, Any], values: Sequence[torch.Tensor], recording: bool) -> Any:
        number, mapped = attrs["body"], attrs["mapped"]
        xs, whole = values[:mapped], values[mapped:]
        length = xs[0].shape[0]
        body = self._graph.bodies[number]
        program = self._program(number, len(whole))
        if not length:
            return tuple(self._stack(spec, 0, recording).done() for spec in body.returns)
        ready = program.prepare(whole)
        self.saved[LOOP_INVARIANTS] += (length - 1) * program.kept
        found = self._side_by_side(program, ready, xs, recording) if length > 1 else None
        if found is not None:
            return found
        stacks = [self._stack(spec, length, recording) for spec in body.returns]
        for i, slices in zip(range(length), _slices(xs, length), strict=False):
            self._check()
            places = ready.copy()
            places[:mapped] = slices
            for stack, y in zip(stacks, program.run(places, recording), strict=True):
                stack.put(i, y)
        return tuple(stack.done() for stack in stacks)

    def _side_by_side(
        self, program: Program, ready: list[Any], xs: Sequence[torch.Tensor], recording: bool
    ) -> tuple[torch.Tensor, ...] | None:
        """All slices of a map at once, or as many as memory is set aside for; None where that is not possible."""
        number = program.number
        if SIDE_BY_SIDE in self._around.disabled or program.ops & ONE_BY_ONE or number in self._refused:
            return None
        mapped, length = len(xs), xs[0].shape[0]
        width = side_by_side(self._graph.body_facts[number], length)
        if width == 1:
            return None

        def one(*slices: torch.Tensor) -> tuple[torch.Tensor, ...]:
            places = ready.copy()
            places[:mapped] = slices
            return tuple(program.run(places, recording))

        every = torch.func.vmap(one)
        pieces = []
        try:
            for start in range(0, length, width):
                self._check()
                pieces.append(every(*(x[start : start + width] for x in xs)))
        except (RequestCancelledError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (GraphError, RuntimeError, ValueError, TypeError):
            # A kernel looked at the numbers, or is none that torch can run so. One by one, what is wrong will show.
            self._refused.add(number)
            return None
        self.saved[SIDE_BY_SIDE] += length - len(pieces)
        if len(pieces) == 1:
            return tuple(pieces[0])
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _stack(self, spec: TensorSpec, length: int, recording: bool) -> _Stack:
        return _Stack(spec, length, self._around.device, recording)


class _Stack:
    """What the steps of a loop gave, along a new first axis.

    Written into one tensor as it comes: thousands of small tensors, kept while large ones come and go around them,
    would leave the allocator with memory in pieces that it cannot use. Only a gradient through the loop needs them
    apart.
    """

    def __init__(self, spec: TensorSpec, length: int, device: torch.device, recording: bool) -> None:
        self._list: list[torch.Tensor] | None = [] if recording and length else None
        shape = (0 if recording else length, *spec.shape)
        self._whole = torch.empty(shape, dtype=to_torch_dtype(spec.dtype), device=device)

    def put(self, i: int, value: torch.Tensor) -> None:
        if self._list is None:
            self._whole[i] = value
        else:
            self._list.append(value)

    def done(self) -> torch.Tensor:
        return self._whole if self._list is None else torch.stack(self._list)


def _slices(xs: Sequence[torch.Tensor], length: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The slices of every value along its first axis, step by step; unbound in bulk, which costs less each."""
    if not xs:
        yield from repeat((), length)
        return
    for start in range(0, length, _SLICES):
        yield from zip(*(x[start : start + _SLICES].unbind(0) for x in xs), strict=True)


def _own(value: torch.Tensor) -> torch.Tensor:
    """`value`, copied where it is a part of something larger, which would be kept for its sake."""
    if value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone(memory_format=torch.contiguous_format)
    return value
