"""Queries, keys, values, scores, pattern and per-head outputs of one layer's attention.

Attention is found by its call of transformers' attention interface. In a model that does not use the interface it is
found by its softmax: square, with rows that sum to one, made from a product and multiplied into another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import as_heads, close, head_starts, is_linear
from patchbay_server.models.binding.flow import ancestors, reaches, strip
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.layouts import Axes, FlatRows, Heads, Layout
from patchbay_server.models.recording import Call, Op, Value
from patchbay_server.models.taps import AttentionInsideTap, FusedTap, InputTap, OpTap, OutputTap, ResultTap, Tap

#: Every canonical name below ``attn.``.
ATTENTION_SITES = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result", "out")

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
#: What may stand between a product and the softmax of the scores.
_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "where", "masked_fill", "to", "float", "type_as", "type", "view", "reshape"}
    | {
        "tanh",
        "max",
        "maximum",
        "clamp",
        "contiguous",
        "setitem",
        "unsqueeze",
        "squeeze",
        "dropout",
        "half",
        "bfloat16",
    }
)


@dataclass
class Attended:
    """One attention found in a layer.

    Attributes:
        path: the module that attends.
        tick: when.
        q, k, v, z: the values that the attention multiplies, and its result, with their histories.
        rot_q, rot_k, heads_v, heads_z: the same as ``[rows, seq, head, d_head]``.
        taps: the way to ``rot_q``, ``rot_k``, ``v``, ``attn_scores``, ``pattern``, ``z``, ``sinks``.
    """

    path: str
    tick: int
    q: Value
    k: Value
    v: Value
    z: Value
    rot_q: torch.Tensor
    rot_k: torch.Tensor
    heads_v: torch.Tensor
    heads_z: torch.Tensor
    taps: dict[str, Tap] = field(default_factory=dict)


def find_attention(block: Block) -> list[Attended]:
    """Every attention of the layer, in order."""
    found: list[Attended] = []
    for call in block.recording.attention:
        if not call.path.startswith(block.path + "."):
            continue
        parts = ["rot_q", "rot_k", "v", "attn_scores", "pattern", "z"] + ["sinks"] * ("s_aux" in call.extras)
        taps: dict[str, Tap] = {p: AttentionInsideTap(call.path, p) for p in parts}
        values = call.q_value, call.k_value, call.v_value, call.z_value
        heads = call.rot_q, call.rot_k, call.v, call.z
        found.append(Attended(call.path, call.tick, *values, *heads, taps))
    if not found:
        found = list(_attention_by_softmax(block))
    return found


# --- attention without the interface ------------------------------------------------------------------------------


def _attention_by_softmax(block: Block) -> Iterator[Attended]:
    rows, seq = block.given.shape[:2]
    ops = block.recording.ops_within(block.path)
    for op in ops:
        if op.name == "scaled_dot_product_attention":
            yield from _fused(op, rows, seq)
            continue
        if op.name != "softmax" or op.outputs[0].tensor is None:
            continue
        pattern = op.outputs[0].tensor
        if pattern.ndim not in (3, 4) or pattern.shape[-2:] != (seq, seq):
            continue
        product = _product_behind(op.inputs[0][1])
        use = next((o for o in ops if o.tick > op.tick and o.name in _PRODUCTS and _multiplies(o, op.outputs[0])), None)
        if product is None or use is None:
            continue
        n_heads = pattern.numel() // (rows * seq * seq)
        operands = [(w, v) for w, v in product.inputs if v.tensor is not None][-2:]
        value = next(((w, v) for w, v in use.inputs if not _same_content(v, op.outputs[0])), None)
        if len(operands) != 2 or value is None:
            continue
        layouts = [_layout(v, rows, seq, n_heads) for _, v in (*operands, value)]
        z_layout = _layout(use.outputs[0], rows, seq, n_heads)
        if z_layout is None or any(found is None for found in layouts):
            continue
        taps: dict[str, Tap] = {}
        parts: list[torch.Tensor] = []
        for name, (where, v), layout, by in zip(
            ("rot_q", "rot_k", "v"), (*operands, value), layouts, (product, product, use), strict=True
        ):
            assert layout is not None and v.tensor is not None
            taps[name] = OpTap(by.owner, by.place, where, layout)
            parts.append(layout.split(v.tensor))
        square: Layout | None = FlatRows(n_heads, (0, 1, 2, 3)) if pattern.ndim == 3 else None
        taps["attn_scores"] = OpTap(op.owner, op.place, op.inputs[0][0], square)
        taps["pattern"] = OpTap(op.owner, op.place, None, square)
        taps["z"] = OpTap(use.owner, use.place, None, z_layout)
        z = use.outputs[0]
        assert z.tensor is not None
        (_, q), (_, k), (_, v) = *operands, value
        rot_q, rot_k, heads_v = parts
        yield Attended(op.owner, use.tick, q, k, v, z, rot_q, rot_k, heads_v, z_layout.split(z.tensor), taps)


def _fused(op: Op, rows: int, seq: int) -> Iterator[Attended]:
    """Attention by torch's fused function, called by the model itself."""
    values = [v for _, v in op.inputs[:3]]
    z = op.outputs[0]
    if any(v.tensor is None or v.tensor.ndim != 4 for v in (*values, z)):
        return
    parts = [v.tensor.transpose(1, 2) for v in (*values, z) if v.tensor is not None]
    if parts[0].shape[:2] == (rows, seq):
        names = ("rot_q", "rot_k", "v", "attn_scores", "pattern", "z")
        taps: dict[str, Tap] = {name: FusedTap(op.owner, op.place, name) for name in names}
        q, k, v = values
        rot_q, rot_k, heads_v, heads_z = parts
        yield Attended(op.owner, op.tick, q, k, v, z, rot_q, rot_k, heads_v, heads_z, taps)


def _product_behind(value: Value) -> Op | None:
    """The product of two tensors that scores were computed from, through elementwise operations."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop(0)
        maker = current.maker
        if maker is None or id(maker) in seen:
            continue
        seen.add(id(maker))
        if maker.name in _PRODUCTS:
            return maker
        if maker.name in _ELEMENTWISE:
            waiting.extend(v for _, v in maker.inputs)
    return None


def _same_content(value: Value, other: Value) -> bool:
    a, b = strip(value).tensor, strip(other).tensor
    return a is not None and b is not None and a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _multiplies(op: Op, pattern: Value) -> bool:
    return any(_same_content(v, pattern) for _, v in op.inputs)


def _layout(value: Value, rows: int, seq: int, n_heads: int) -> Layout | None:
    """How ``[rows, seq, head, d_head]`` lies in a factor of an attention product."""
    shape = value.shape
    if len(shape) == 4 and shape[0] == rows:
        if shape[2] == seq:
            return Axes((0, 2, 1, 3))
        return Axes((0, 3, 1, 2)) if shape[3] == seq else None
    if len(shape) == 3 and shape[0] % rows == 0 and (shape[0] // rows) in (n_heads, 1):
        if shape[1] == seq:
            return FlatRows(shape[0] // rows, (0, 2, 1, 3))
        return FlatRows(shape[0] // rows, (0, 3, 1, 2)) if shape[2] == seq else None
    return None


# --- sites --------------------------------------------------------------------------------------------------------


def bind_attention(block: Block, attended: Attended, raw: Value) -> None:
    """Derive the sites below ``attn.``.

    Args:
        block: the layer.
        attended: its one attention.
        raw: the attention module's output.
    """
    n_heads, d_head = attended.rot_q.shape[2:]
    n_kv_heads, width = attended.rot_k.shape[2], attended.heads_v.shape[3]
    widths = block.binding.widths
    widths.n_heads, widths.n_kv_heads, widths.d_head = n_heads, n_kv_heads, d_head
    square = ("rows", n_heads, "query", "key")
    for name, doc in (
        ("attn_scores", "scaled, masked scores (-inf, or the dtype's lowest number, where masked)"),
        ("pattern", "attention pattern; rows sum to 1"),
    ):
        if name == "pattern" and "sinks" in attended.taps:
            doc = "attention pattern; rows sum to 1 less the sink's share"
        block.add(f"attn.{name}", attended.taps[name], square, doc)
    if "sinks" in attended.taps:
        doc = "the sink's score beside the scores of the keys"
        block.add("attn.sinks", attended.taps["sinks"], ("rows", n_heads, "query"), doc)
    for name, value, heads in (("q", attended.q, attended.rot_q), ("k", attended.k, attended.rot_k)):
        _bind_projected(block, attended, name, value, heads)
    _bind_values(block, attended)
    _bind_output(block, attended, raw, n_heads, width)


def _bind_projected(block: Block, attended: Attended, name: str, value: Value, rotated: torch.Tensor) -> None:
    """Queries or keys: as projected, after their norm, and as they are multiplied."""
    what = "queries" if name == "q" else "keys"
    linear, norms = _sources(block, attended, value)
    rot_tap = attended.taps[f"rot_{name}"]
    block.add(f"attn.rot_{name}", rot_tap, (*RESIDUAL, *rotated.shape[2:]), f"{what} as they are multiplied")
    target, before = rotated, ""
    if len(norms) == 1:
        assert norms[0].input is not None
        raw = as_heads(norms[0].input, rotated)
        if raw is not None:
            target, before = raw, ", before their norm"
        if raw is not None and block.map.once(norms[0]):
            _bind_normed(block, name, norms[0], rotated, what)
        elif raw is not None:
            block.absent("one module normalizes queries and keys, one after the other", f"attn.{name}_normed")
    elif norms:
        block.absent(f"the heads are normalized by {len(norms)} modules, one each", f"attn.{name}_normed")
    if len(linear) != 1:
        count = f"{len(linear)} projections" if linear else "no projection"
        block.absent(
            f"the {what} are put together from {count}: there is no one tensor of them before rot_{name}",
            f"attn.{name}",
        )
        return
    found = _find_heads(linear[0], target)
    if found is None:
        block.absent(f"no slices of the projection's output are the {what}", f"attn.{name}")
        return
    layout, rotary = found
    tap = OutputTap(linear[0].path, layout)
    doc = what + before + (", before the rotary embedding" if rotary else "")
    block.add(f"attn.{name}", tap, (*RESIDUAL, layout.heads, layout.width), doc)
    if not rotary and not before and layout.heads == rotated.shape[2]:
        block.drop(f"attn.rot_{name}", "nothing happens between projection and product: no rotary embedding")


def _bind_normed(block: Block, name: str, norm: Call, rotated: torch.Tensor, what: str) -> None:
    """The output of the norm on queries or keys, in whichever layout the model keeps it."""
    assert norm.output is not None
    site, doc = f"attn.{name}_normed", f"{what} after their norm"
    rows, seq, heads, width = rotated.shape
    if norm.output.shape == (rows, seq, heads, width):
        layout: Layout | None = None
    elif norm.output.shape == (rows, heads, seq, width):
        layout = Axes((0, 2, 1, 3))
    elif norm.output.shape == (rows, seq, heads * width):
        layout = Heads.side_by_side(0, heads, width)
    else:
        block.absent(f"the norm's output {tuple(norm.output.shape)} does not split into heads", site)
        return
    block.add(site, OutputTap(norm.path, layout), (*RESIDUAL, heads, width), doc)


def _sources(block: Block, attended: Attended, value: Value) -> tuple[list[Call], list[Call]]:
    """The projections that `value` comes from, and the norms between them and it."""
    linear = [c for c in block.map.calls if is_linear(c.module) and c.made is not None and c.end < attended.tick]
    stops = [c.made for c in linear if c.made is not None]
    reached: set[int] = {id(strip(value))}
    for op in ancestors(value, stops):
        reached.update(id(strip(v)) for _, v in op.inputs)
        reached.update(id(strip(v)) for v in op.outputs)
    inside = [c for c in block.map.calls if c.made is not None and id(strip(c.made)) in reached]
    sources = [c for c in linear if c in inside and block.map.once(c)]
    return sources, [c for c in inside if block.map.is_norm(c) and c.end < attended.tick]


def _find_heads(linear: Call, target: torch.Tensor) -> tuple[Heads, bool] | None:
    """Where in a projection's output the heads of `target` lie, and whether they agree only at position 0."""
    output = linear.output
    if output is None:
        return None
    rows, seq = target.shape[:2]
    if output.ndim == 2 and output.shape[0] == rows * seq:
        output = output.unflatten(0, (rows, seq))
    if output.ndim != 3 or output.shape[:2] != (rows, seq):
        return None
    for positions, rotary in ((seq, False), (1, True)):
        features = output[:, :positions].reshape(rows * positions, -1)
        heads = target[:, :positions].reshape(rows * positions, *target.shape[2:])
        starts = head_starts(features, heads)
        if starts is not None:
            unique = tuple(dict.fromkeys(starts))  # keys that the model repeats for each query head count once
            repeats = len(starts) // len(unique)
            if starts != tuple(s for s in unique for _ in range(repeats)):
                continue  # repeated in another order than one after the other
            return Heads(unique, target.shape[3]), rotary
    return None


def _bind_values(block: Block, attended: Attended) -> None:
    linear, _ = _sources(block, attended, attended.v)
    dims = (*RESIDUAL, *attended.heads_v.shape[2:])
    found = _find_heads(linear[0], attended.heads_v) if len(linear) == 1 else None
    if found is not None and not found[1]:
        layout = found[0]
        block.add("attn.v", OutputTap(linear[0].path, layout), (*RESIDUAL, layout.heads, layout.width), "values")
    else:
        block.add("attn.v", attended.taps["v"], dims, "values as they are weighted by the pattern")


def _bind_output(block: Block, attended: Attended, raw: Value, n_heads: int, width: int) -> None:
    dims = (*RESIDUAL, n_heads, width)
    after = [c for c in block.map.calls if c.start > attended.tick and is_linear(c.module) and c.given is not None]
    projection = next((c for c in after if reaches(c.given or raw, attended.z)), None)
    layout = Heads.side_by_side(0, n_heads, width)
    taken = None if projection is None else projection.input
    doc = "pattern times values, per head"
    if projection is None or taken is None or taken.shape[-1] != n_heads * width or not block.map.once(projection):
        block.add("attn.z", attended.taps["z"], dims, doc)
        block.absent("no projection takes all heads side by side", "attn.result")
        return
    if taken.ndim == 3 and close(layout.split(taken), attended.heads_z):
        block.add("attn.z", InputTap(projection.path, layout), dims, doc)
    else:
        block.add("attn.z", attended.taps["z"], dims, doc)
        if taken.ndim == 3:
            gated = "z as the output projection takes it, after a gate, norm or factor"
            block.add("attn.z_out", InputTap(projection.path, layout), dims, gated)
    if taken.ndim != 3 or not hasattr(projection.module, "weight"):
        block.absent("the output projection keeps rows and positions in one axis", "attn.result")
        return
    doc = "what each head writes: its slice of W_O applied, without the bias; computed only when asked for"
    block.add("attn.result", ResultTap(projection.path, layout), (*RESIDUAL, n_heads, block.d_model), doc)
