"""A body of a graph made ready to run many times: kernels found once, values in numbered places instead of a dict.

What is the same at every step (it follows from values taken along whole) is computed once before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

import torch

from patchbay.errors import GraphError, RequestCancelledError
from patchbay.ir.bodies import MAX_KEPT_BYTES, Body, BodyFacts
from patchbay.ir.graph import Node
from patchbay.ir.ops import spec as op_spec
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.ir.price import value_bytes
from patchbay_server.engine.direct import direct
from patchbay_server.engine.gradients import take_gradients
from patchbay_server.kernels import kernel

#: Off switches.
LOOP_INVARIANTS = "loop_invariants"
SIDE_BY_SIDE = "side_by_side"
DEAD_CODE, COMMON = "dead_code", "common_subexpressions"

#: Where the result goes, what makes it, its one argument or -1, its arguments otherwise, places to empty afterwards.
Instruction: TypeAlias = "tuple[int, Callable[..., Any], int, Callable[[list[Any]], tuple[Any, ...]], tuple[int, ...]]"


@dataclass(frozen=True)
class Surroundings:
    """What a body needs of the execution that it runs in.

    Attributes:
        device: where tensors are made.
        callables: modules of the model that values can be put through, by name.
        loop: runs a loop, choice or map inside a body: operation, attributes, values.
        disabled: optimisations that are switched off.
    """

    device: torch.device
    callables: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    loop: Callable[[str, Mapping[str, Any], Sequence[Any]], tuple[torch.Tensor, ...]]
    disabled: Sequence[str]


class Program:
    """A body, compiled.

    Args:
        number: of the body.
        body: the body.
        facts: what is known of it.
        whole: how many parameters, the last ones, are the same at every step.
        around: the execution.

    Attributes:
        kept: operations that are run once instead of at every step.
        ops: names of the operations that it runs.
        graded: whether it takes gradients itself.
    """

    def __init__(self, number: int, body: Body, facts: BodyFacts, whole: int, around: Surroundings) -> None:
        self.number, self._body, self._facts, self._around = number, body, facts, around
        self._first = len(body.params)
        self._varying = self._first - whole
        self._size = self._first + len(body.nodes)
        alias = self._merged()
        self._nodes = [Node(n.op, tuple(alias[a] for a in n.args), n.attrs) if n.args else n for n in body.nodes]
        self._results = [alias[r] for r in body.results]
        needed = self._needed()
        #: Values that a gradient is taken with respect to.
        self._wrt = {a for k in needed if (n := self._nodes[k]).op == "grad" for a in n.args[1:]}
        self.graded = any(self._nodes[k].op == "grad" for k in needed)
        self.ops = {self._nodes[k].op for k in needed}
        self._numbers = {
            self._first + k: self._nodes[k].attrs["scalar"] for k in needed if self._nodes[k].op == "const"
        }
        running = [k for k in needed if self._nodes[k].op != "const"]
        once = self._same_at_every_step(running)
        self.kept = len(once)
        last_grad = max((k for k in running if self._nodes[k].op == "grad"), default=-1)
        #: A gradient of something that gradients went into: the first must be recorded too.
        self._twice = self._gradients_of_gradients(running)
        self._recording = False
        self._last_grad = last_grad
        later = [k for k in running if k not in once]
        self._once = [self._instruction(k, ()) for k in sorted(once)]
        frees = self._frees(later, once)
        self._until = [self._instruction(k, frees[k]) for k in later if k <= last_grad]
        self._after = [self._instruction(k, frees[k]) for k in later if k > last_grad]
        #: What was made before the last gradient and is used after it.
        after = {a for k in later if k > last_grad for a in self._nodes[k].args} | set(self._results)
        self._crossing = sorted(a for a in after - set(self._numbers) if a - self._first <= last_grad)

    # --- compiling ------------------------------------------------------------------------------------------------

    def _merged(self) -> dict[int, int]:
        """For every value, the first one that is the same; what something is differentiated by is only itself."""
        alias = {i: i for i in range(self._size)}
        if COMMON in self._around.disabled:
            return alias
        known: dict[object, int] = {}
        own = {a for node in self._body.nodes if node.op == "grad" for a in node.args[1:]}
        for i, node in enumerate(self._body.nodes, start=self._first):
            if i in own:
                continue
            attrs = tuple((k, repr(v)) for k, v in sorted(node.attrs.items()))
            alias[i] = known.setdefault((node.op, tuple(alias[a] for a in node.args), attrs), i)
        return alias

    def _needed(self) -> list[int]:
        if DEAD_CODE in self._around.disabled:
            return list(range(len(self._nodes)))
        needed, pending = set[int](), list(self._results)
        while pending:
            k = pending.pop() - self._first
            if k >= 0 and k not in needed:
                needed.add(k)
                pending.extend(self._nodes[k].args)
        return sorted(needed)

    def _same_at_every_step(self, running: Sequence[int]) -> set[int]:
        """Nodes that follow from what is taken along whole; what a gradient must pass through is not among them."""
        if LOOP_INVARIANTS in self._around.disabled:
            return set()
        varying = {*range(self._varying), *self._wrt}
        same: set[int] = set()
        kept = 0
        for k in running:
            node, here = self._nodes[k], self._first + k
            size = value_bytes(self._facts.specs[here])
            if here in varying or any(a in varying for a in node.args) or kept + size > MAX_KEPT_BYTES:
                varying.add(here)
            else:
                same.add(k)
                kept += size
        return same

    def _gradients_of_gradients(self, running: Sequence[int]) -> bool:
        made_of: set[int] = set()
        for k in running:
            node = self._nodes[k]
            if node.op == "grad":
                if node.args[0] in made_of:
                    return True
                made_of.add(self._first + k)
            elif any(a in made_of for a in node.args):
                made_of.add(self._first + k)
        return False

    def _frees(self, later: Sequence[int], once: set[int]) -> dict[int, tuple[int, ...]]:
        """For every node, the values that it uses last; what is kept over all steps is not among them."""
        if "liveness" in self._around.disabled:
            return dict.fromkeys(later, ())
        last: dict[int, int] = {}
        for k in later:
            last[self._first + k] = k
            for a in self._nodes[k].args:
                last[a] = k
        stay = {*self._results, *self._numbers, *(self._first + k for k in once), *range(self._varying, self._first)}
        frees: dict[int, list[int]] = {k: [] for k in later}
        for value, k in last.items():
            if value not in stay:
                frees[k].append(value)
        return {k: tuple(values) for k, values in frees.items()}

    def _instruction(self, k: int, free: tuple[int, ...]) -> Instruction:
        node = self._nodes[k]
        args = node.args
        get: Callable[..., Any] = itemgetter(*args) if len(args) > 1 else tuple
        return (self._first + k, self._function(k, node), args[0] if len(args) == 1 else -1, get, free)

    def _function(self, k: int, node: Node) -> Callable[..., Any]:
        spec = op_spec(node.op)
        attrs = spec.fill(node.attrs)
        if node.op == "item":
            return itemgetter(attrs["index"])
        if node.op == "call":
            return self._around.callables[attrs["target"]]
        if node.op == "grad":
            last = k == self._last_grad
            return lambda metric, *wrt: self._gradients(metric, wrt, last)
        if node.op in BODY_ATTRS:
            loop, op = self._around.loop, node.op
            return lambda *values: loop(op, attrs, values)
        function = kernel(spec)
        if not node.args:
            device = self._around.device

            def make(*_: Any) -> Any:
                with device:  # operations without arguments make tensors on torch's default device
                    return function(**attrs)

            return make
        plain = direct(node.op, attrs, [self._facts.specs[a] for a in node.args], self._facts.specs[self._first + k])
        if plain is not None:
            return plain
        return partial(function, **attrs) if attrs else function

    # --- running --------------------------------------------------------------------------------------------------

    def prepare(self, whole: Sequence[torch.Tensor]) -> list[Any]:
        """The places of a step with everything in them that is the same at every step."""
        places: list[Any] = [None] * self._size
        places[self._varying : self._first] = whole
        for i, number in self._numbers.items():
            places[i] = number
        self._execute(places, self._once)
        return places

    def run(self, places: list[Any], recording: bool) -> list[Any]:
        """One run.

        Args:
            places: from `prepare`, a copy of its own, with the first parameters filled in.
            recording: whether somebody takes gradients through it.

        Raises:
            GraphError: what only running reveals as wrong; its field names body and node.
        """
        if not self.graded:
            self._execute(places, self._after)
            return [places[r] for r in self._results]
        self._recording = recording
        before = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(True)
            for i in self._wrt:
                if i < self._first:
                    places[i] = _leaf(places[i])
            self._execute_graded(places)
            if not recording:
                torch.set_grad_enabled(False)
                for i in self._crossing:  # the recorded operations, and what they hold, are let go
                    places[i] = detached(places[i])
            self._execute(places, self._after)
        finally:
            torch.set_grad_enabled(before)
        return [places[r] for r in self._results]

    def _execute(self, places: list[Any], code: Sequence[Instruction]) -> None:
        here = -1
        try:
            for here, function, one, several, free in code:
                places[here] = function(places[one]) if one >= 0 else function(*several(places))
                for i in free:
                    places[i] = None
        except Exception as error:
            named = self._named(error, here)
            if named is error:
                raise
            raise named from error

    def _execute_graded(self, places: list[Any]) -> None:
        here, wrt = -1, self._wrt
        try:
            for here, function, one, several, free in self._until:
                value = function(places[one]) if one >= 0 else function(*several(places))
                places[here] = _leaf(value) if here in wrt else value
                for i in free:
                    places[i] = None
        except Exception as error:
            named = self._named(error, here)
            if named is error:
                raise
            raise named from error

    def _gradients(self, metric: torch.Tensor, wrt: Sequence[torch.Tensor], last: bool) -> tuple[torch.Tensor, ...]:
        again = self._recording or self._twice
        return take_gradients(metric, wrt, keep=not last, twice=again)

    def _named(self, error: Exception, place: int) -> Exception:
        """`error` with body and node, where it is about the graph."""
        node = self._body.nodes[place - self._first]
        if isinstance(error, (RequestCancelledError, torch.OutOfMemoryError, torch.AcceleratorError)):
            return error
        if isinstance(error, RuntimeError):  # what a kernel can only find out from the data: a singular matrix, say
            error = GraphError(f"{node.op} failed: {str(error).partition(chr(10))[0]}")
        if isinstance(error, GraphError) and error.field is None:
            error.field = f"bodies[{self.number}].nodes[{place - self._first}]"
        return error


def _leaf(value: torch.Tensor) -> torch.Tensor:
    """`value` as something to differentiate by, apart from other uses of the same tensor; shares its memory."""
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def detached(value: Any) -> Any:
    """`value`, or each of its parts, without what was recorded of it."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(map(detached, value))
    return value
