"""Queries, keys, values, scores, pattern and per-head outputs of one attention module."""

from __future__ import annotations

import torch

from patchbay_server.models.binding.block import Block
from patchbay_server.models.binding.compare import as_heads, holds, is_linear, norm_form, slices_equal
from patchbay_server.models.binding.found import RESIDUAL
from patchbay_server.models.recording import AttentionCall, Call
from patchbay_server.models.taps import AttentionInsideTap, Heads, InputTap, OutputTap, ResultTap, Tap


def bind_attention(block: Block, attended: AttentionCall, module: Call) -> None:
    n_heads, d_head = attended.rot_q.shape[2:]
    n_kv_heads = attended.rot_k.shape[2]
    widths = block.binding.widths
    widths.n_heads, widths.n_kv_heads, widths.d_head = n_heads, n_kv_heads, d_head
    block.add("attn.out", OutputTap(module.path), (*RESIDUAL, block.d_model), "raw output of the attention module")
    square = ("rows", n_heads, "query", "key")
    inside = module.path
    block.add(
        "attn.attn_scores",
        AttentionInsideTap(inside, "attn_scores"),
        square,
        "scaled, masked scores (-inf where masked)",
    )
    block.add("attn.pattern", AttentionInsideTap(inside, "pattern"), square, "attention pattern; rows sum to 1")
    before = [c for c in block.recording.within(inside) if 0 <= c.end < attended.tick and c.output is not None]
    rotary = False
    for name, value, heads in (("q", attended.rot_q, n_heads), ("k", attended.rot_k, n_kv_heads)):
        found, rotated = _projection(before, value)
        rotary |= rotated
        what = "queries" if name == "q" else "keys"
        dims = (*RESIDUAL, heads, d_head)
        if found is None:
            block.absent(f"no module's output holds the {what}", f"attn.{name}")
        else:
            block.add(f"attn.{name}", found, dims, f"{what}" + (", before the rotary embedding" if rotated else ""))
        rot_doc = f"{what} after the rotary embedding"
        block.add(f"attn.rot_{name}", AttentionInsideTap(inside, f"rot_{name}"), dims, rot_doc)
    if not rotary:
        for name in ("rot_q", "rot_k"):
            if f"{block.prefix}.attn.{name[-1]}" in block.binding.sites:
                block.binding.sites.pop(f"{block.prefix}.attn.{name}")
                block.absent("the model has no rotary embedding", f"attn.{name}")
    value_tap, _ = _projection(before, attended.v)
    dims = (*RESIDUAL, attended.v.shape[2], attended.v.shape[3])
    block.add("attn.v", value_tap or AttentionInsideTap(inside, "v"), dims, "values")
    _bind_output_projection(block, attended, module, n_heads, attended.v.shape[3])


def _bind_output_projection(block: Block, attended: AttentionCall, module: Call, n_heads: int, width: int) -> None:
    after = [c for c in block.recording.within(module.path) if c.start > attended.tick and is_linear(c.module)]
    fitting = [c for c in after if c.input is not None and c.input.shape[-1] == n_heads * width]
    if len(fitting) != 1:
        block.absent("no single projection follows the attention function", "attn.z", "attn.result")
        return
    projection, heads = fitting[0], Heads(0, n_heads, width)
    block.add("attn.z", InputTap(projection.path, heads), (*RESIDUAL, n_heads, width), "pattern times values, per head")
    result_dims = (*RESIDUAL, n_heads, block.d_model)
    doc = "what each head writes: z times its slice of W_O, without the bias; computed only when asked for"
    block.add("attn.result", ResultTap(projection.path, heads), result_dims, doc)


def _projection(calls: list[Call], value: torch.Tensor) -> tuple[Tap | None, bool]:
    """The linear module's output that holds `value`, and whether a rotary embedding stands between them."""
    linear = [c for c in calls if is_linear(c.module)]
    for call, start in slices_equal(linear, value):
        return OutputTap(call.path, Heads(start, value.shape[2], value.shape[3])), False
    at_zero = value[:, :1]
    for call, start in slices_equal(linear, at_zero):
        return OutputTap(call.path, Heads(start, value.shape[2], value.shape[3])), True
    for norm in (c for c in calls if norm_form(c) is not None):
        assert norm.output is not None and norm.input is not None
        for target, rotated in ((value, False), (at_zero, True)):
            if holds(norm.output, target):
                raw = as_heads(norm.input, value)
                for call, start in slices_equal(linear, raw) if raw is not None else ():
                    return OutputTap(call.path, Heads(start, value.shape[2], value.shape[3])), rotated
    return None, False
