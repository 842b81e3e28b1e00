"""Routing and experts of one mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.flow import ancestors, op_tap, reaches
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.recording import Call, Value
from patchbay_server.models.taps import ExpertTap, FlatTap, InputTap, OutputTap, Tap

#: Every canonical name of a mixture of experts below ``mlp.``.
EXPERT_SITES = ("router_logits", "expert_weights", "expert_indices", "expert_out")


@dataclass(frozen=True)
class Experts:
    """The module that applies the chosen experts.

    Attributes:
        call: its call.
        indices, weights: which of its tensor inputs are the chosen experts and their weights, ``[tokens, slots]``.
        tokens: which is what the experts are applied to.
    """

    call: Call
    tokens: int
    indices: int
    weights: int


def find_experts(block: Block, raw: Value, before: Value) -> Experts | None:
    """The module that takes tokens, expert numbers and expert weights, if `raw` is computed by one."""
    for call in block.map.calls:
        if call.made is None or not block.map.once(call):
            continue
        numbers = [i for i, v in enumerate(call.takes) if v.tensor is not None and _counts(v)]
        for indices in numbers:
            wanted = call.takes[indices].shape
            weights = [
                i for i, v in enumerate(call.takes) if v.tensor is not None and v.tensor.is_floating_point()
                and v.shape == wanted
            ]  # fmt: skip
            tokens = next((i for i, v in enumerate(call.takes) if v.shape == call.made.shape), None)
            if len(weights) == 1 and tokens is not None and reaches(raw, call.made, (before,)):
                return Experts(call, tokens, indices, weights[0])
    return None


def _counts(value: Value) -> bool:
    return value.tensor is not None and not value.tensor.is_floating_point() and value.tensor.ndim == 2


def bind_experts(block: Block, experts: Experts, raw: Value, before: Value) -> None:
    """Derive the sites below ``mlp.`` that are about routing."""
    rows, seq = block.given.shape[:2]
    call = experts.call
    indices = call.takes[experts.indices]
    slots = indices.shape[-1]
    if indices.shape[0] != rows * seq or call.made is None or call.made.shape[0] != rows * seq:
        block.absent(f"{call.path} does not keep tokens in one axis", *(f"mlp.{n}" for n in EXPERT_SITES))
        return

    def flat(tap: Tap) -> Tap:
        return FlatTap(tap, shape_from=block.path)

    dims = (*RESIDUAL, slots)
    block.add(
        "mlp.expert_weights",
        flat(InputTap(call.path, part=experts.weights)),
        dims,
        "weights of the experts chosen for each token",
    )
    block.add(
        "mlp.expert_indices",
        flat(InputTap(call.path, part=experts.indices)),
        dims,
        "numbers of the experts chosen for each token",
        read_only="expert numbers are integers: write router_logits to route otherwise, or expert_weights",
    )
    tap = ExpertTap(call.path, experts.indices, experts.weights, slots)
    block.add(
        "mlp.expert_out",
        flat(tap),
        (*RESIDUAL, slots, block.d_model),
        "what each chosen expert adds, weighted; computed only when asked for",
    )
    logits = _router_logits(indices, before, rows * seq, _expert_count(call))
    if logits is None:
        block.absent("no product gives one score per expert", "mlp.router_logits")
        return
    maker = logits.maker
    assert maker is not None
    leaf = next((c for c in block.map.makers(logits) if c.path == maker.owner and c.made is logits), None)
    linear = leaf is not None and maker.name == "linear" and len(leaf.makes) == 1
    way: Tap = OutputTap(leaf.path) if linear and leaf is not None else op_tap(logits)
    if len(logits.shape) == 2:
        way = flat(way)
    block.add("mlp.router_logits", way, (*RESIDUAL, logits.shape[-1]), "router's score of every expert")


def _expert_count(call: Call) -> int:
    """The extent that the experts' stacked weights share, or 0."""
    sizes = {p.shape[0] for p in call.module.parameters(recurse=False) if p.ndim == 3}
    if len(sizes) == 1:
        return int(sizes.pop())
    return len(list(call.module.children())) if sizes == set() else 0


def _router_logits(indices: Value, before: Value, tokens: int, count: int) -> Value | None:
    for op in ancestors(indices, (before,)):
        if op.name in ("linear", "matmul", "addmm"):
            value = op.outputs[0]
            if value.tensor is not None and value.tensor.numel() == tokens * value.shape[-1]:
                return value if count in (0, value.shape[-1]) else None
    return None
