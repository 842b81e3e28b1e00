"""Prompts of generating runs that begin as an earlier prompt of the same account did, whose keys and values are there.

A causal model's keys and values at a position follow from the tokens up to it, so two prompts that begin alike share
them, whatever comes after. The prompt's forward then computes only what comes after the longest beginning that is
known, as long as nothing in the graph looks at or changes a position before that: seen from static indices alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patchbay.ir.card import LOGITS, ModelCard
from patchbay.ir.graph import Graph, Run
from patchbay.ir.limits import Limits
from patchbay.ir.ops.spec import ValueSpec
from patchbay_server.engine.generate import Decoding
from patchbay_server.engine.prefix import first_written
from patchbay_server.engine.steps import Pass
from patchbay_server.engine.trunks import TrunkCache, trunk_bytes
from patchbay_server.engine.windows import Window, used_positions
from patchbay_server.models.continuation import Continuation, Trunk

if TYPE_CHECKING:
    from patchbay_server.engine.plan import Plan

#: What `usage.saved` calls positions of prompts that were known.
KNOWN_PROMPTS = "known_prompts"
#: A prompt is kept if at least one in so many of its positions was not known.
_NEW = 4


def with_beginnings(
    passes: Sequence[Pass], graph: Graph, card: ModelCard, specs: Sequence[ValueSpec], how: Continuation
) -> tuple[Pass, ...]:
    """`passes`, those that generate with what of their prompts may be known, and whether they may leave theirs.

    Args:
        passes: of a plan.
        graph, specs: the plan's.
        card: the model's.
        how: how the model goes on from earlier forwards.
    """
    if not any(each.generation for each in passes) or LOGITS not in how.reaches:
        return tuple(passes)
    used = used_positions(graph, card, specs)
    found = []
    for each in passes:
        if each.generation is not None and not each.inputs:
            (slot,) = each.slots
            untouched, written = _beginning(graph, card, how, used, slot.run)
            each = replace(each, untouched=untouched, leaves=not written)
        found.append(each)
    return tuple(found)


def _beginning(
    graph: Graph, card: ModelCard, how: Continuation, used: dict[int, Window | None], index: int
) -> tuple[int, bool]:
    """First positions of each prompt of a run that nothing needs, and whether anything is written in them at all."""
    run = graph.runs[index]
    first, written = run.seq, False
    for i, node in enumerate(graph.nodes):
        if node.run != index or node.op not in ("site.read", "site.write") or node.attrs.get("step") != 0:
            continue
        site = str(node.attrs["site"])
        if site == LOGITS:  # the newest position's alone
            continue
        written |= node.op == "site.write"
        if site not in how.reaches:
            first = 0
        elif node.op == "site.write":
            first = min(first, first_written(graph, card, i, run))
        else:
            window = used.get(i)
            first = 0 if window is None else min(first, window[0])
    shortest = min(run.lengths, default=0)
    # Users see rows padded on the left: a position is an earlier token of a shorter row.
    return max(0, min(first - (run.seq - shortest), shortest - 1)), written


def within(plan: Plan, card: ModelCard, limits: Limits) -> Plan:
    """`plan`, its peak with what prompts leave; they leave nothing where that would be more than is allowed."""
    left = max((trunk_bytes(card, _first_row(each)) for each in plan.passes if each.leaves), default=0)
    peak = plan.cost.peak_bytes + left
    if not left:
        return plan
    if peak <= limits.max_peak_bytes:
        return replace(plan, cost=replace(plan.cost, peak_bytes=peak))
    return replace(plan, passes=tuple(replace(each, leaves=False) for each in plan.passes))


def _first_row(each: Pass) -> Run:
    return Run(each.tokens[:1])


@dataclass(frozen=True)
class Prompts:
    """What prompts of one account know of earlier ones, and leave for later ones.

    Attributes:
        trunks: where it is kept.
        account: whose it is.
        card: the model's.
        least: positions that must be known, or new, to be worth a forward of its own.
    """

    trunks: TrunkCache
    account: str
    card: ModelCard
    least: int

    def begin(self, decoding: Decoding, each: Pass) -> None:
        """Look up how the prompts of `decoding` begin, and decide whether the first of them is kept."""
        same = _alike(each.tokens)[: each.untouched]
        decoding.known = self.trunks.longest(self.account, same, self.least, self._has_every_layer)
        whole = len(each.tokens[0])
        new = whole - decoding.first
        nbytes = trunk_bytes(self.card, _first_row(each))
        if each.leaves and new >= self.least and _NEW * new >= whole and self.trunks.fits(nbytes):
            decoding.leaving = Trunk()

    def end(self, decoding: Decoding, each: Pass) -> None:
        """The prompts went through the model: keep what is to be kept."""
        if decoding.leaving is not None:
            self.trunks.put(self.account, each.tokens[:1], decoding.leaving)
        decoding.known = decoding.leaving = None

    def _has_every_layer(self, trunk: Trunk) -> bool:
        return set(range(self.card.n_layers)) <= set(trunk.keys)


def _alike(rows: Sequence[Sequence[int]]) -> Sequence[int]:
    """How all rows begin."""
    shortest = min(rows, key=len)
    for at, token in enumerate(shortest):
        if any(row[at] != token for row in rows):
            return shortest[:at]
    return shortest
