"""The hidden activations of one layer's feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import is_linear
from patchbay_server.models.binding.experts import bind_experts, find_experts
from patchbay_server.models.binding.flow import reaches, strip
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.layouts import Features
from patchbay_server.models.recording import Call, Op, Value
from patchbay_server.models.taps import FlatTap, InputTap, OutputTap, Tap

#: Every canonical name below ``mlp.`` but ``out``.
MLP_SITES = ("pre", "pre_linear", "post")

#: Operations that leave a value linear in its input.
_AFFINE = frozenset({"add", "sub", "clamp", "to", "float", "view", "reshape", "getitem", "contiguous"})


@dataclass(frozen=True)
class Leaf:
    """A projection, or a slice of one, that the hidden activations are computed from.

    Attributes:
        linear: the projection.
        value: its output or the slice of it.
        slice: where the slice lies; None for the whole output.
    """

    linear: Call
    value: Value
    slice: Features | None


def bind_mlp(block: Block, raw: Value, before: Value) -> None:
    """Derive the sites below ``mlp.``.

    Args:
        block: the layer.
        raw: what the MLP gives.
        before: the stream that the MLP reads.
    """
    experts = find_experts(block, raw, before)
    if experts is not None:
        bind_experts(block, experts, raw, before)
        reason = "experts' hidden activations exist only for the tokens routed to each: see mlp.expert_out"
        block.absent(reason, *(f"mlp.{n}" for n in MLP_SITES))
        return
    down = next((c for c in block.map.makers(raw) if is_linear(c.module) and block.map.once(c)), None)
    if down is None or down.given is None or down.given.tensor is None:
        block.absent("the MLP's output is not one projection's", *(f"mlp.{n}" for n in MLP_SITES))
        return
    post = down.given
    width = post.shape[-1]
    block.binding.widths.d_mlp = width
    dims = (*RESIDUAL, width)
    block.add("mlp.post", _shown(block, InputTap(down.path), post), dims, "hidden activations, as projected down")
    leaves = _leaves(block, post, before)
    if not 1 <= len(leaves) <= 2 or any(leaf.value.shape[-1] != width for leaf in leaves):
        count = len(leaves)
        reason = f"hidden activations come from {count} projection{'s' * (count != 1)} of another form"
        block.absent(reason, "mlp.pre", "mlp.pre_linear")
        return
    if len(leaves) == 1:
        block.add("mlp.pre", _leaf_tap(block, leaves[0]), dims, "input of the nonlinearity")
        block.absent("the MLP is not gated", "mlp.pre_linear")
        return
    gate = _gate(post, leaves, before)
    if gate is None:
        block.absent("both projections pass through a nonlinearity, or neither does", "mlp.pre", "mlp.pre_linear")
        return
    other = leaves[1] if gate is leaves[0] else leaves[0]
    block.add("mlp.pre", _leaf_tap(block, gate), dims, "input of the nonlinearity")
    block.add("mlp.pre_linear", _leaf_tap(block, other), dims, "linear side of the gate")


def _shown(block: Block, tap: Tap, value: Value) -> Tap:
    return tap if len(value.shape) == 3 else FlatTap(tap, shape_from=block.path)


def _leaf_tap(block: Block, leaf: Leaf) -> Tap:
    made = leaf.linear.made
    assert made is not None
    return _shown(block, OutputTap(leaf.linear.path, leaf.slice), made)


def _leaves(block: Block, post: Value, before: Value) -> list[Leaf]:
    """The projections that `post` is computed from, nearest ones only."""
    linear = {id(strip(c.made)): c for c in block.map.calls if is_linear(c.module) and c.made is not None}
    found: list[Leaf] = []
    waiting, seen = [post], set()
    while waiting:
        value = strip(waiting.pop(0))
        if id(value) in seen or value is strip(before) or value.maker is None:
            continue
        seen.add(id(value))
        if id(value) in linear:
            found.append(Leaf(linear[id(value)], value, None))
            continue
        source = strip(value.maker.inputs[0][1]) if value.maker.inputs else None
        call = linear.get(id(source))
        where = None if call is None or source is None else _slice_of(value, source)
        if call is not None and where is not None:
            found.append(Leaf(call, value, where))
            continue
        waiting.extend(v for _, v in value.maker.inputs)
    return found if all(block.map.once(leaf.linear) for leaf in found) else []


def _slice_of(value: Value, source: Value) -> Features | None:
    """Which features of `source` `value` holds, when it holds some of them."""
    part, whole = value.tensor, source.tensor
    if part is None or whole is None or part.shape[:-1] != whole.shape[:-1] or part.shape[-1] >= whole.shape[-1]:
        return None
    width = part.shape[-1]
    for step in (1, 2):
        for start in range(whole.shape[-1] - (width - 1) * step):
            found = Features(start, width, step)
            if torch.equal(whole[..., start], part[..., 0]) and torch.equal(found.split(whole), part):
                return found
    return None


def _gate(post: Value, leaves: list[Leaf], before: Value) -> Leaf | None:
    """The one of two leaves that passes through the nonlinearity."""
    product = _product(post, leaves, before)
    if product is None:
        return None
    linear_sides: list[Leaf] = []
    for side in product.operands:
        inside = [leaf for leaf in leaves if reaches(side, leaf.value, (before,))]
        if len(inside) == 1 and _is_affine(side, inside[0].value):
            linear_sides.append(inside[0])
    if len(linear_sides) != 1:
        return None
    return leaves[1] if linear_sides[0] is leaves[0] else leaves[0]


def _product(post: Value, leaves: list[Leaf], before: Value) -> Op | None:
    """The multiplication in which the two leaves meet."""
    waiting, seen = [post], set()
    while waiting:
        value = strip(waiting.pop(0))
        maker = value.maker
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        sides = maker.operands
        if maker.name == "mul" and len(sides) == 2:
            touched = [[reaches(s, leaf.value, (before,)) for leaf in leaves] for s in sides]
            if sorted(touched) == [[False, True], [True, False]]:
                return maker
        waiting.extend(sides)
    return None


def _is_affine(value: Value, leaf: Value) -> bool:
    while strip(value) is not strip(leaf):
        maker = strip(value).maker
        if maker is None or maker.name not in _AFFINE:
            return False
        value = maker.inputs[0][1]
    return True
