"""The residual stream of one layer: what is added to it, where, and what normalizes it.

The layer's output is followed back, sum by sum, to the layer's input. What is added on the way is attention's share
when it was computed from a softmax over positions, a mixer's when it was computed from other positions in another
way, and the MLP's when it depends on its own position only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from patchbay_server.models.binding.attention import ATTENTION_SITES, Attended, bind_attention, find_attention
from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import close, is_linear
from patchbay_server.models.binding.cross import CrossView, is_cross
from patchbay_server.models.binding.flow import behind_scaling, reaches, strip
from patchbay_server.models.binding.found import RESIDUAL, BlockShape
from patchbay_server.models.binding.mlp import MLP_SITES, bind_mlp
from patchbay_server.models.binding.norms import bind_norm
from patchbay_server.models.binding.state import bind_mixer
from patchbay_server.models.recording import Call, Value
from patchbay_server.models.taps import InputTap, OutputTap, ReadOrWrite


@dataclass
class Addition:
    """Something that is added to the stream.

    Attributes:
        value: what is added.
        before: the stream that it is added to.
        after: the sum.
        kind: ``"attn"``, ``"mixer"`` or ``"mlp"``.
        attended: the attention behind it, for ``"attn"``.
        norm: the norm that the sum then goes through (post-norm), or None.
    """

    value: Value
    before: Value
    after: Value
    kind: str = ""
    attended: Attended | None = None
    norm: Call | None = None


@dataclass
class Raw:
    """What an addition was before norms and factors.

    Attributes:
        value: the raw output.
        norms: norms between it and the stream, outermost first.
        scaled: whether a factor stands between.
    """

    value: Value
    norms: list[Call] = field(default_factory=list)
    scaled: bool = False


#: Most sums and norms followed back through one layer.
_TOO_DEEP = 32


def bind_block(block: Block) -> None:
    """Derive every site of one layer."""
    residual = (*RESIDUAL, block.d_model)
    block.add("resid_pre", InputTap(block.path), residual, "residual stream before the block")
    block.add("resid_post", OutputTap(block.path), residual, "residual stream after the block")
    attended = find_attention(block)
    found = _follow(block, block.made, _TOO_DEEP)
    additions = [] if found is None else _split(block, found, attended)
    if not additions:
        block.start = None
    if not additions:
        block.absent("the block's output is not its input plus something", "resid_mid", "attn_out", "mlp_out")
    for addition in additions:
        _classify(block, addition, attended)
    _bind_additions(block, additions)
    _bind_norms(block, additions)
    _bind_insides(block, additions, attended)
    # Where one hook shows several of these, what is computed later comes later.
    kinds = ("attn", "cross_attn", "mlp", "mixer")
    for name in (*(f"{k}.out" for k in kinds), *(f"{k}_out" for k in kinds)):
        added = block.binding.sites.pop(f"{block.prefix}.{name}", None)
        if added is not None:
            block.binding.sites[added.name] = added


def _follow(block: Block, value: Value, depth: int) -> list[Addition] | None:
    """The additions between the block's input and `value`, or None when the input is no summand of it."""
    if strip(value) is strip(block.given):
        return []
    if depth == 0:
        return None
    norm = block.map.norm_behind(value)
    if norm is not None and norm.given is not None:
        found = _follow(block, norm.given, depth - 1)
        if found:
            found[-1].norm = norm
        elif found is not None:
            block.start = norm  # the layer normalizes the stream before it adds anything to it
        return found
    core = strip(value)
    maker = core.maker
    if maker is None or maker.name != "add" or len(maker.operands) != 2 or maker.tick < block.call.start:
        return None
    sides = maker.operands
    for stream, added in (sides, sides[::-1]):
        if stream.tensor is None or added.tensor is None or stream.tensor.numel() != added.tensor.numel():
            continue
        found = _follow(block, stream, depth - 1)
        if found is not None:
            return [*found, Addition(added, stream, core)]
    return None


def _split(block: Block, additions: list[Addition], attended: list[Attended]) -> list[Addition]:
    """Sums of attention and MLP that are added to the stream as one, taken apart."""
    result: list[Addition] = []
    for addition in additions:
        maker = strip(addition.value).maker
        parts = maker.operands if maker is not None and maker.name == "add" else ()
        whole = strip(addition.value)
        if maker is not None and len(parts) == 2 and all(p.shape == whole.shape for p in parts):
            touched = [any(_uses(p, a, addition.before) for a in attended) for p in parts]
            starts = (addition.before, block.given)
            depend = all(any(reaches(p, s) for s in starts) for p in parts)  # a bias does not
            if sum(touched) == 1 and depend:
                result += [Addition(p, addition.before, addition.after) for p in parts]
                continue
        result.append(addition)
    return result


def _uses(value: Value, attended: Attended, *stop: Value) -> bool:
    return reaches(value, attended.z, stop)


def _classify(block: Block, addition: Addition, attended: list[Attended]) -> None:
    own = [a for a in attended if _uses(addition.value, a, addition.before, block.given)]
    if own:
        addition.kind, addition.attended = "attn", own[0] if len(own) == 1 else None
        if addition.attended is not None and is_cross(block, addition.attended):
            addition.kind = "cross"
        return
    addition.kind = "mlp"
    raw = _raw(block, addition.value)
    makers = [c for c in block.map.makers(raw.value) if block.map.once(c)]
    if makers and _mixes_positions(makers[-1]):
        addition.kind = "mixer"


def _mixes_positions(call: Call) -> bool:
    """Whether a module's output at a position changes when the first position is taken away."""
    if call.input is None or call.output is None or call.input.ndim != 3 or call.input.shape[1] < 3:
        return False
    try:
        with torch.no_grad():
            output = call.module(call.input[:, 1:].contiguous())
    except Exception:  # noqa: BLE001 - whatever a model's module raises
        return True  # it needs to know more than its input: an MLP does not
    if isinstance(output, (tuple, list)):
        output = output[0]
    rows, seq = call.input.shape[:2]
    if not isinstance(output, torch.Tensor) or output.numel() != call.output.numel() // seq * (seq - 1):
        return True
    return not close(output.reshape(rows, seq - 1, -1), call.output.reshape(rows, seq, -1)[:, 1:])


def _raw(block: Block, value: Value) -> Raw:
    """`value` before the norms and factors that follow its module."""
    raw = Raw(value)
    while True:
        norm = block.map.norm_behind(raw.value)
        if norm is not None and norm.given is not None:
            raw.norms.append(norm)
            raw.value = norm.given
            continue
        scaled = behind_scaling(raw.value)
        if scaled is None or not _in_between(block, scaled[1].owner):
            return raw
        raw.scaled = True
        raw.value = scaled[0]


def _in_between(block: Block, owner: str) -> bool:
    """Whether a factor is applied by the layer itself, or by a module for nothing else (LayerScale)."""
    if owner == block.path:
        return True
    inside = block.map.recording.ops_within(owner)
    return not any(c.path.startswith(owner + ".") for c in block.map.calls) and len(inside) <= 2


_WHAT = {
    "attn": ("attn_out", "what attention adds to the residual stream"),
    "mixer": ("mixer_out", "what the sequence mixer (a recurrence or convolution) adds to the residual stream"),
    "cross": ("cross_attn_out", "what attention to the encoder's output adds to the residual stream"),
    "mlp": ("mlp_out", "what the MLP adds to the residual stream"),
}


def _bind_additions(block: Block, additions: list[Addition]) -> None:
    residual, shape = (*RESIDUAL, block.d_model), block.given.shape
    names: list[str] = []
    mids: list[str] = []
    for addition in additions:
        if addition.kind == "mixer" and "mixer_out" in names and addition is additions[-1]:
            addition.kind = "mlp"  # a channel mixer that also sees the position before (RWKV's token shift)
        name, doc = _WHAT[addition.kind]
        if name in names:
            block.absent(f"more than one share of this kind is added: {doc}", name)
            continue
        tap = block.map.tap(addition.value, shape)
        if tap is None:
            block.absent("no module and no operation gives it in one piece", name)
            continue
        names.append(name)
        block.add(name, tap, residual, doc)
    together = len(additions) > 1 and not any(
        reaches(later.value, earlier.after, (earlier.before, block.given)) for earlier, later in pairwise(additions)
    )
    if together:
        block.absent("attention and MLP are added at once: there is no stream between them", "resid_mid")
    elif len(additions) == 2 or [a.kind for a in additions] == ["attn", "cross", "mlp"]:
        mids = [*_MIDS[: len(additions) - 1]]
        for name, addition, following in zip(mids, additions, additions[1:], strict=False):
            _bind_mid(block, name, addition, following)
    elif additions:
        block.absent(f"{len(additions)} addition{'s' * (len(additions) > 1)} to the stream, not two", "resid_mid")
    kinds = {a.kind for a in additions}
    if additions:
        for kind in ("attn", "mlp"):
            if kind not in kinds:
                what = "attention" if kind == "attn" else "MLP"
                block.absent(f"this layer adds no {what} output to the stream", _WHAT[kind][0])
    norms = any(a.norm is not None for a in additions)
    after = tuple(None if a.norm is None else (_norm_name(additions, a), a.norm.path) for a in additions)
    mids = [m for m in mids if f"{block.prefix}.{m}" in block.binding.sites]
    start = "" if block.start is None else block.start.path
    shaped = BlockShape(block.prefix, block.path, tuple(names), together, norms, start, tuple(mids), after)
    block.binding.blocks.append(shaped)


#: The stream after the first addition and, where there is attention to an encoder, after the second.
_MIDS = ("resid_mid", "resid_mid_cross")


def _bind_mid(block: Block, name: str, addition: Addition, following: Addition) -> None:
    shape = block.given.shape
    tap = block.map.tap(addition.after, shape)
    if tap is None:
        block.absent("no operation gives it in one piece", name)
        return
    # A norm that reads the stream shows it for nothing; to change it, the sum itself must be replaced.
    readers = [c for c in block.map.readers(addition.after) if c.made is not None and block.map.once(c)]
    shown = next((t for c in readers if (t := block.map.input_tap(c, addition.after, shape)) is not None), None)
    said = {"attn": "attention", "mixer": "the mixer", "cross": "attention to the encoder", "mlp": "MLP"}
    where = f"residual stream between {said[addition.kind]} and {said[following.kind]}"
    where += ", before its norm" if addition.norm else ""
    block.add(name, tap if shown is None else ReadOrWrite(shown, tap), (*RESIDUAL, block.d_model), where)


def _norm_name(additions: list[Addition], addition: Addition) -> str:
    """``ln1`` of attention, ``ln2`` of the MLP; with attention to an encoder between them, ``ln2`` and ``ln3``."""
    if addition.kind == "cross":
        return "ln2"
    if addition.kind == "mlp" and len(additions) > 1:
        return "ln3" if any(a.kind == "cross" for a in additions) else "ln2"
    return "ln1"


def _bind_norms(block: Block, additions: list[Addition]) -> None:
    """ln1 reads (or, post-norm, follows) what attention or the mixer starts from, ln2 the MLP; *_post follow them."""
    chosen: dict[str, Call] = {}
    for addition in sorted(additions, key=lambda a: a.kind == "mlp"):
        name = _norm_name(additions, addition)
        if addition.norm is not None:
            chosen.setdefault(name, addition.norm)
        for norm in _raw(block, addition.value).norms[:1]:
            chosen.setdefault(f"{name}_post", norm)
        stream = addition.before if name != "ln1" or block.start is not None else block.given
        starts = [stream] if reaches(addition.value, stream, (block.given,)) else [block.given]
        for call in [c for start in starts for c in block.map.readers(start)]:
            if call.made is None or call in chosen.values() or not block.map.is_norm(call):
                continue
            if reaches(addition.value, call.made, starts):
                chosen.setdefault(name, call)
                break
    names = ["ln1", "ln2"] + ["ln3"] * any(a.kind == "cross" for a in additions)
    for name in (*names, *(f"{n}_post" for n in names)):
        if name in chosen:
            bind_norm(block.binding, f"{block.prefix}.{name}", chosen[name], block.d_model, block.path)
        elif not name.endswith("_post"):
            where = "the block's input" if name == "ln1" else "the stream before the MLP"
            first = chosen["ln1"].made if "ln1" in chosen else None
            shared = first is not None and any(
                a.kind == "mlp" and reaches(a.value, first, (a.before,)) for a in additions
            )
            reason = "the MLP reads the same norm as attention" if shared else f"no norm of its own reads {where}"
            if name == "ln2" and len(additions) == 1:
                reason = "the layer has one part, and so one norm"
            after = " (it follows the module: see " + f"{name}_post)" if f"{name}_post" in chosen else ""
            block.absent(reason + after, f"{name}.scale", f"{name}.normalized")


def _bind_insides(block: Block, additions: list[Addition], attended: list[Attended]) -> None:
    attention = next((a for a in additions if a.kind == "attn"), None)
    mlp = next((a for a in additions if a.kind == "mlp"), None)
    mixer = next((a for a in additions if a.kind == "mixer"), None)
    for addition in additions:
        if addition.kind == "cross" and addition.attended is not None:
            view = CrossView(block)
            raw = _raw(block, addition.value)
            _bind_raw(view, "attn", raw.value, addition.before, "raw output of the module that attends to the encoder")
            bind_attention(view, addition.attended, raw.value)
    if attention is not None and attention.attended is not None:
        raw = _raw(block, attention.value)
        _bind_raw(block, "attn", raw.value, attention.before, "raw output of the attention module")
        block.binding.attention[block.index] = attention.attended.path
        bind_attention(block, attention.attended, raw.value)
    else:
        if attention is not None:
            reason = "the layer attends more than once"
        elif len(attended) == 1 and (call := block.recording.of(attended[0].path)) is not None and call.made:
            _bind_raw(block, "attn", call.made, block.given, "raw output of the attention module")
            block.binding.attention[block.index] = attended[0].path
            bind_attention(block, attended[0], call.made)
            reason = ""
        elif attended:
            reason = "what attention gives was not found in the residual stream"
        else:
            reason = "this layer has no attention (no softmax over positions was seen)"
        if reason:
            block.absent(reason, *(f"attn.{n}" for n in ATTENTION_SITES))
    if mixer is not None:
        raw = _raw(block, mixer.value)
        _bind_raw(block, "mixer", raw.value, mixer.before, "raw output of the sequence mixer's module")
        bind_mixer(block, raw.value)
    if mlp is None:
        reason = "this layer has no MLP" if additions else "the MLP was not found in the residual stream"
        block.absent(reason, "mlp.out", "mlp_in", *(f"mlp.{n}" for n in MLP_SITES))
        return
    raw = _raw(block, mlp.value)
    _bind_raw(block, "mlp", raw.value, mlp.before, "raw output of the MLP")
    bind_mlp(block, raw.value, mlp.before)


def _bind_raw(block: Block, kind: str, value: Value, before: Value, doc: str) -> None:
    """``KIND.out`` and ``KIND_in`` of the module that gives `value`."""
    shape, residual = block.given.shape, (*RESIDUAL, block.d_model)
    tap = block.map.tap(value, shape)
    if tap is None:
        block.absent("no module and no operation gives it in one piece", f"{kind}.out")
    else:
        block.add(f"{kind}.out", tap, residual, doc)
    what = {"attn": "attention module", "mlp": "MLP", "mixer": "mixer"}[kind]
    taken = _taken_by(block, value, before)
    if taken is None:
        block.absent(f"what the {what} takes is not one tensor of the stream's shape", f"{kind}_in")
        return
    call, given = taken
    tap = block.map.input_tap(call, given, shape)
    normed = block.map.tap(given, shape) if block.map.norm_behind(given) is not None else None
    if normed is not None and block.map.taken_twice(given, value):
        tap = normed
    if tap is None:
        block.absent(f"what the {what} takes is not one tensor of the stream's shape", f"{kind}_in")
    else:
        block.add(f"{kind}_in", tap, residual, f"what the {what} takes, after the norm where there is one")


def _taken_by(block: Block, value: Value, before: Value) -> tuple[Call, Value] | None:
    """The module that gives `value` and which of its inputs is as wide as the stream.

    Where no module does it all, the one value that all the linear modules which start it read.
    """
    size = 0 if block.given.tensor is None else block.given.tensor.numel()

    def wide(call: Call) -> Value | None:
        return next((v for v in call.takes if v.tensor is not None and v.tensor.numel() == size), None)

    for call in reversed(block.map.makers(value)):
        given = wide(call)
        if given is not None and block.map.once(call) and next(call.module.children(), None) is not None:
            return call, given
    linear = [c for c in block.map.calls if is_linear(c.module) and c.made is not None and c.given is not None]
    used = [(c, c.given, c.made) for c in linear if c.made is not None and c.given is not None]
    used = [(c, given, made) for c, given, made in used if reaches(value, made, (before,))]
    first = [
        c for c, given, _ in used if not any(o is not c and reaches(given, made, (before,)) for o, _, made in used)
    ]
    if first and len({id(strip(c.given)) for c in first if c.given is not None}) == 1 and (g := wide(first[0])):
        return _around(block, first, g), g
    return None


def _around(block: Block, calls: list[Call], given: Value) -> Call:
    """The innermost call through which all of `calls` are given `given`."""
    fitting = [
        c
        for c in block.map.calls
        if any(strip(v) is strip(given) for v in c.takes) and all(c.start <= o.start and o.end <= c.end for o in calls)
    ]
    return max(fitting, key=lambda c: c.start) if fitting else calls[0]


__all__ = ["bind_block"]
