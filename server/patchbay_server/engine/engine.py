"""The engine of one hosted model: plans graphs and runs plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from patchbay.errors import GraphError, ResourceExhaustedError
from patchbay.ir.events import Event, ExecuteOptions, TensorValue, Usage
from patchbay.ir.graph import Graph
from patchbay.ir.limits import Limits
from patchbay_server.engine.executor import Execution
from patchbay_server.engine.forwards import run_forward
from patchbay_server.engine.generate import check_generates
from patchbay_server.engine.memory import held_to
from patchbay_server.engine.plan import OPTIMISATIONS, Plan, make_plan
from patchbay_server.models.hosted import HostedModel

#: Token positions that one forward carries at most, unless configured.
MAX_PASS_TOKENS = 16_384


class Engine:
    """Plans and runs graphs on one model. `prepare` may be called from any thread; `run` from one at a time."""

    def __init__(
        self, hosted: HostedModel, limits: Limits | None = None, *, max_pass_tokens: int = MAX_PASS_TOKENS
    ) -> None:
        self.hosted = hosted
        self.limits = hosted.card.limits if limits is None else limits
        self._max_pass_tokens = max_pass_tokens

    def prepare(self, graph: Graph, options: ExecuteOptions | None = None) -> Plan:
        """Verify, optimise and price `graph`; touches no tensor.

        Raises:
            GraphError: the most specific subclass, naming the node.
        """
        options = ExecuteOptions() if options is None else options
        for index, run in enumerate(graph.runs):
            if run.generation is not None:
                try:
                    check_generates(self.hosted, run.ragged)
                except GraphError as error:
                    error.field = f"runs[{index}].generation"
                    raise
        for name in options.disabled:
            if name not in OPTIMISATIONS:
                raise GraphError(f"no optimisation is called {name!r} (there are: {', '.join(OPTIMISATIONS)})")
        plan = make_plan(graph, self.hosted.card, self.limits, options, max_pass_tokens=self._max_pass_tokens)
        return held_to(plan, self.limits)

    def start(
        self, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool] = lambda: False
    ) -> Execution:
        """An execution of `plan`, for who runs several at a time; nothing has happened yet."""
        return Execution(self.hosted, plan, emit, cancelled)

    def run(self, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool] = lambda: False) -> Usage:
        """Run `plan` to its end, handing Progress and TensorValue events to `emit` as they happen. Blocks.

        Runs out of memory once: the plan is made anew with one run per forward; twice: the request is refused.

        Raises:
            GraphError: data that only running reveals as wrong.
            RequestCancelledError: `cancelled` turned true between layers.
            ResourceExhaustedError: the device has too little memory even for one run at a time.
        """
        sent: set[str] = set()

        def emit_once(event: Event) -> None:
            if isinstance(event, TensorValue):
                if event.name in sent:
                    return
                sent.add(event.name)
            emit(event)

        try:
            return self._to_the_end(self.start(plan, emit_once, cancelled))
        except torch.OutOfMemoryError:
            pass
        # Outside the except block, so that the traceback no longer holds the tensors that did not fit.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        alone = make_plan(
            plan.graph, self.hosted.card, self.limits, replace(plan.options, deterministic=True), max_pass_tokens=0
        )
        alone = replace(alone, origin=tuple(plan.origin[o] for o in alone.origin), received=plan.received)
        try:
            return self._to_the_end(self.start(alone, emit_once, cancelled))
        except torch.OutOfMemoryError:
            raise ResourceExhaustedError(
                "the device ran out of memory, with one run per forward too; use fewer rows or shorter texts, or save "
                "less",
                reason="DEVICE_MEMORY",
            ) from None

    def _to_the_end(self, execution: Execution) -> Usage:
        with torch.no_grad():
            forwards = execution.forwards()
            while True:
                try:
                    call = next(forwards)
                except StopIteration as end:
                    usage: Usage = end.value
                    return usage
                run_forward(self.hosted, [call])
