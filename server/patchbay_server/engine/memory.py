"""What a plan holds at its peak, in the order in which it will run.

The verifier's price follows the order of the program. The engine computes a value as soon as it can, so values that the
program makes one after the other may wait side by side for a later site; that is what must fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patchbay.errors import LimitExceededError
from patchbay.ir.bodies import recorded_bytes
from patchbay.ir.limits import Limits
from patchbay_server.engine.plan import Plan
from patchbay_server.engine.steps import Compute, Forward, Generated, Pass, Read, Step


def held_to(plan: Plan, limits: Limits) -> Plan:
    """`plan`, its cost's ``peak_bytes`` as it will run: every value at its full size, results until the end.

    Raises:
        LimitExceededError: more than the limit allows.
    """
    plan = with_peak(plan)
    peak = plan.cost.peak_bytes
    if peak > limits.max_peak_bytes:
        raise LimitExceededError(
            f"the graph needs {peak:,} bytes at its peak, because values that are made early wait for sites that come"
            f" later; max_peak_bytes of this server is {limits.max_peak_bytes:,}. Take fewer at once, or reduce them"
            " before they wait",
            limit="max_peak_bytes",
            allowed=limits.max_peak_bytes,
            requested=peak,
        )
    return plan


def with_peak(plan: Plan) -> Plan:
    """`plan`, its cost's ``peak_bytes`` as it will run."""
    return replace(plan, cost=replace(plan.cost, peak_bytes=_peak_bytes(plan)))


def _peak_bytes(plan: Plan) -> int:
    facts = plan.facts
    kept = {output.node for output in plan.graph.outputs}
    held = [0] * len(facts)  # bytes of each value that is there
    live = peak = 0
    for step in _steps(plan):
        if isinstance(step, (Compute, Read, Generated)):
            node = step.node
            known = facts[node]
            live += known.nbytes - held[node]
            held[node] = known.nbytes
            if not isinstance(step, Compute):
                peak = max(peak, live)
                continue
            if live + known.workspace > peak:
                peak = live + known.workspace
        for freed in step.free:
            if freed not in kept:
                live -= held[freed]
                held[freed] = 0
    return peak + plan.trunk_bytes + recorded_bytes(plan.graph, plan.specs)


def _steps(plan: Plan) -> Iterator[Step]:
    for each in plan.passes:
        parts: tuple[Pass | Forward, ...] = (each, *each.steps)
        for part in parts:
            for moment in (part.before, *part.sites.values()):
                yield from moment.steps
    yield from plan.after.steps
