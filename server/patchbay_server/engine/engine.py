"""The engine of one hosted model: plans graphs and runs plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from patchbay.errors import GraphError
from patchbay.ir.events import Event, ExecuteOptions, Usage
from patchbay.ir.graph import Graph
from patchbay.ir.limits import Limits
from patchbay_server.engine.constants import ConstantCache
from patchbay_server.engine.decoding import DecodeBatches
from patchbay_server.engine.executor import Execution
from patchbay_server.engine.forwards import ForwardCall, run_forward
from patchbay_server.engine.generate import check_generates, check_sites
from patchbay_server.engine.memory import held_to, with_peak
from patchbay_server.engine.plan import OPTIMISATIONS, PREFIX_CACHE, Means, Plan, make_plan
from patchbay_server.engine.prefix import LAYER_COST_CPU, LAYER_COST_GPU, WORTHWHILE
from patchbay_server.engine.prompts import Prompts, within
from patchbay_server.engine.recurring import Questions, RecurringPlans
from patchbay_server.engine.running import (
    Depths,
    Running,
    Wanted,
    activation_bytes,
    advance,
    emit_once,
    out_of_memory,
)
from patchbay_server.engine.trunks import TrunkCache, trunk_bytes
from patchbay_server.models.continuation import Trunk
from patchbay_server.models.hosted import HostedModel

#: Token positions that one forward carries at most, unless configured.
MAX_PASS_TOKENS = 16_384


class Engine:
    """Plans and runs graphs on one model. `prepare` may be called from any thread; `run` from one at a time.

    Args:
        hosted: the model.
        limits: what graphs are held to; the card's when None.
        max_pass_tokens: token positions that one forward carries at most.
        layer_cost, worthwhile: when runs go on from others (`patchbay_server.engine.prefix`); None for what was
            measured.
        trunks: where what runs leave is kept for an account's later requests; None keeps nothing.
    """

    def __init__(
        self,
        hosted: HostedModel,
        limits: Limits | None = None,
        *,
        max_pass_tokens: int = MAX_PASS_TOKENS,
        layer_cost: int | None = None,
        worthwhile: float = WORTHWHILE,
        trunks: TrunkCache | None = None,
        constants: ConstantCache | None = None,
    ) -> None:
        self.hosted = hosted
        self.limits = hosted.card.limits if limits is None else limits
        self._max_pass_tokens = max_pass_tokens
        on_cpu = hosted.device.type == "cpu"
        self._means = Means(
            hosted.continuation,
            hosted.unembedding,
            layer_cost if layer_cost is not None else LAYER_COST_CPU if on_cpu else LAYER_COST_GPU,
            worthwhile,
        )
        self._trunks = trunks
        self._constants = constants
        self._plans = RecurringPlans()
        self._depths = Depths(hosted.card)
        self._batches = DecodeBatches(hosted)

    def prepare(self, graph: Graph, options: ExecuteOptions | None = None, *, account: str | None = None) -> Plan:
        """Verify, optimise and price `graph`; touches no tensor.

        Args:
            graph: the graph.
            options: how to run it.
            account: whose it is; its earlier requests may have left something to go on from. None: nobody's.

        Raises:
            GraphError: the most specific subclass, naming the node.
        """
        options = ExecuteOptions() if options is None else options
        means = self._means_of(account)
        known = self._plans.get(graph, options, account, means)
        if known is not None:
            return known
        for index, run in enumerate(graph.runs):
            if run.generation is not None:
                try:
                    check_generates(self.hosted, run.ragged)
                except GraphError as error:
                    error.field = f"runs[{index}].generation"
                    raise
                check_sites(self.hosted, graph)
        for name in options.disabled:
            if name not in OPTIMISATIONS:
                raise GraphError(f"no optimisation is called {name!r} (there are: {', '.join(OPTIMISATIONS)})")
        asked = Questions(means)
        plan = make_plan(
            graph,
            self.hosted.card,
            self.limits,
            options,
            max_pass_tokens=self._max_pass_tokens,
            means=asked.recorded(),
        )
        plan = held_to(replace(plan, account=account), self.limits)
        if self._trunks is not None and account is not None:
            plan = within(plan, self.hosted.card, self.limits)
        self._plans.put(graph, options, account, plan, asked)
        return plan

    def _means_of(self, account: str | None) -> Means:
        trunks, card = self._trunks, self.hosted.card
        if trunks is None or account is None:
            return self._means
        return replace(
            self._means,
            trunk_of=lambda run: trunks.get(account, run.tokens),
            wanted=lambda run: trunks.wants(account, run.tokens, trunk_bytes(card, run)),
        )

    def start(
        self, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool] = lambda: False
    ) -> Execution:
        """An execution of `plan`, for who runs several at a time; nothing has happened yet."""
        trunks, account = self._trunks, plan.account
        if trunks is None or account is None or PREFIX_CACHE in plan.options.disabled:
            return Execution(self.hosted, plan, emit, cancelled, constants=self._constants)

        def left(run: int, trunk: Trunk) -> None:
            trunks.put(account, plan.graph.runs[run].tokens, trunk)

        prompts = Prompts(trunks, account, self.hosted.card, max(1, self._means.layer_cost))
        return Execution(self.hosted, plan, emit, cancelled, left, self._constants, prompts)

    def run(self, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool] = lambda: False) -> Usage:
        """Run `plan` to its end, handing Progress and TensorValue events to `emit` as they happen. Blocks.

        Runs out of memory once: the plan is made anew with one run per forward; twice: the request is refused.

        Raises:
            GraphError: data that only running reveals as wrong.
            RequestCancelledError: `cancelled` turned true between layers.
            ResourceExhaustedError: the device has too little memory even for one run at a time.
        """
        once = emit_once(emit)
        try:
            return self._to_the_end(self.start(plan, once, cancelled))
        except torch.OutOfMemoryError:
            pass
        # Outside the except block, so that the traceback no longer holds the tensors that did not fit.
        self.make_room()
        try:
            return self._to_the_end(self.start(self.one_by_one(plan), once, cancelled))
        except torch.OutOfMemoryError:
            raise out_of_memory() from None

    def _to_the_end(self, execution: Execution) -> Usage:
        with torch.no_grad():
            forwards = execution.forwards()
            while True:
                try:
                    call = next(forwards)
                except StopIteration as end:
                    usage: Usage = end.value
                    return usage
                self.forward([call])

    # --- several at a time

    def open(self, plan: Plan, emit: Callable[[Event], None], cancelled: Callable[[], bool] = lambda: False) -> Running:
        """`plan` as one of several that run side by side; nothing has happened yet."""
        return Running(self, plan, emit, cancelled)

    def advance(self, group: Sequence[Running]) -> None:
        """Run the forward that all of `group` want, and let each go on to its next. Blocks.

        What goes wrong for one of them is its `error`.

        Args:
            group: with equal `wanted.together`, or one alone.

        Raises:
            BaseException: the device failed.
        """
        advance(self, group)

    def forward(self, calls: Sequence[ForwardCall]) -> None:
        """One forward of the model for all of `calls`."""
        run_forward(self.hosted, calls, self._batches)

    def wanted_by(self, call: ForwardCall) -> Wanted:
        """What a scheduler needs to know of `call`."""
        card = self.hosted.card
        together: Hashable | None = None
        if call.decodes and call.decoding is not None and call.decoding.seat is not None:
            together = ("step", id(call.decoding.seat[0]))
        elif call.decoding is not None and call.decoding.known is not None:
            known = call.decoding.known
            together = ("prompts", id(known.trunk), known.row, known.length) if self.hosted.row_independent else None
        elif not call.alone and not call.inputs and self.hosted.row_independent:
            together = "tokens"
        return Wanted(
            rows=call.rows,
            seq=call.seq,
            depth=self._depths.of(call.stop_at),
            together=together,
            bound=call.decodes,
            nbytes=activation_bytes(card, call.rows, call.seq, to_the_end=call.stop_at is None),
        )

    def make_room(self) -> None:
        """Give memory that nothing uses back to the device."""
        if self._constants is not None:
            self._constants.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def one_by_one(self, plan: Plan) -> Plan:
        """`plan` with one run per forward."""
        alone = make_plan(
            plan.source, self.hosted.card, self.limits, replace(plan.options, deterministic=True), max_pass_tokens=0
        )
        origin = [plan.source_origin[o] for o in alone.origin]
        return with_peak(replace(alone, origin=origin, received=plan.received))
