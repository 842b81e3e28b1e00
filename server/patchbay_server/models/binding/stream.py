"""The residual stream of one layer: what is added to it, where, and what normalizes it."""

from __future__ import annotations

import torch

from patchbay_server.models.binding.attention import bind_attention
from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import close, norm_form, plus, same
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.binding.mlp import bind_mlp
from patchbay_server.models.binding.norms import bind_norm
from patchbay_server.models.recording import Call
from patchbay_server.models.taps import InputTap, OutputTap


def bind_block(block: Block) -> None:
    residual = (*RESIDUAL, block.d_model)
    block.add("resid_pre", InputTap(block.path), residual, "residual stream before the block")
    block.add("resid_post", OutputTap(block.path), residual, "residual stream after the block")
    inner = [c for c in block.recording.attention if c.path.startswith(block.path + ".")]
    attended = inner[0] if len(inner) == 1 else None
    module = block.recording.of(attended.path) if attended is not None else None
    _bind_stream(block, module)
    if attended is None or module is None:
        reason = "the layer does not call transformers' attention interface exactly once"
        names = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result", "out")
        block.absent(reason, *(f"attn.{n}" for n in names))
    else:
        block.binding.attention[block.index] = attended.path
        bind_attention(block, attended, module)


def _bind_stream(block: Block, attention: Call | None) -> None:
    """resid_mid, attn_out, mlp_out, ln1, ln2 and the MLP, from the sums that the block makes."""
    residual = (*RESIDUAL, block.d_model)
    like = [c for c in block.children if c.output is not None and c.output.shape == block.x.shape]
    first_add = _first_addition(block, like)
    before_mlp = block.x
    if first_add is not None:
        added, reader = first_add
        assert reader.input is not None
        before_mlp = reader.input
        block.add("attn_out", OutputTap(added.path), residual, "what attention adds to the residual stream")
        block.add("resid_mid", InputTap(reader.path), residual, "residual stream between attention and MLP")
        second = next(
            (c for c in reversed(like) if c.start >= reader.start and close(plus(before_mlp, c.output), block.y)),
            None,
        )
    else:
        second = None
        _bind_parallel(block, like, attention)
    if second is not None:
        block.add("mlp_out", OutputTap(second.path), residual, "what the MLP adds to the residual stream")
        bind_mlp(block, _maker_of(second, like))
    elif f"{block.prefix}.mlp_out" not in block.binding.sites:
        block.absent("no module's output is what is added after resid_mid", "mlp_out")
        bind_mlp(block, None)
    _bind_norms(block, before_mlp, attention)


def _first_addition(block: Block, like: list[Call]) -> tuple[Call, Call] | None:
    """The call whose output is added to the block's input, and the first call that reads the sum."""
    for reader in block.children:
        for added in like:
            if added.end < reader.start and added.output is not None and close(block.x + added.output, reader.input):
                return added, reader
    return None


def _bind_parallel(block: Block, like: list[Call], attention: Call | None) -> None:
    """Blocks that add attention and MLP at once."""
    residual = (*RESIDUAL, block.d_model)
    for a in like:
        for m in like:
            if a is m or attention is None or not (a is attention or same(a.input, attention.output)):
                continue
            assert a.output is not None and m.output is not None
            if close(block.x + a.output + m.output, block.y):
                block.add("attn_out", OutputTap(a.path), residual, "what attention adds to the residual stream")
                block.add("mlp_out", OutputTap(m.path), residual, "what the MLP adds to the residual stream")
                block.absent("attention and MLP are added at once: there is no stream between them", "resid_mid")
                bind_mlp(block, _maker_of(m, like))
                return
    block.absent("no sum of the block's parts gives its output", "resid_mid", "attn_out")


def _maker_of(call: Call, like: list[Call]) -> Call:
    """The MLP itself, when `call` is a norm that follows it."""
    if norm_form(call) is None:
        return call
    return next((c for c in like if c is not call and same(c.output, call.input)), call)


def _bind_norms(block: Block, before_mlp: torch.Tensor, attention: Call | None) -> None:
    norms = [c for c in block.children if norm_form(c) is not None]
    first = next((c for c in norms if same(c.input, block.x)), None)
    second = next((c for c in norms if c is not first and same(c.input, before_mlp)), None)
    for name, call in (("ln1", first), ("ln2", second)):
        if call is None:
            where = "the block's input" if name == "ln1" else "the stream before the MLP"
            block.absent(f"no norm of its own reads {where}", f"{name}.scale", f"{name}.normalized")
        else:
            bind_norm(block.binding, f"{block.prefix}.{name}", call, block.d_model)
