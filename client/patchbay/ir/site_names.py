"""Every canonical site and what it is: the table behind docs/sites.md.

``{i}`` stands for a block. Extents are ``rows``, ``seq`` (``query`` and ``key`` in square values) and widths of the
model. With an encoder beside a decoder every name has the prefix ``encoder.`` or ``decoder.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_STREAM = "rows, seq, d_model"
_HEADS, _KV_HEADS = "rows, seq, head, d_head", "rows, seq, kv_head, d_head"
_SQUARE, _HIDDEN = "rows, head, query, key", "rows, seq, d_mlp"
_SCALE = "rows, seq, 1"

_NAMES: dict[str, tuple[str, str]] = {
    "embed": (_STREAM, "token embedding, as the embedding module gives it"),
    "pos_embed": (_STREAM, "learned (or fixed, added) positional embedding, one per row"),
    "token_type_embed": (_STREAM, "embedding of token types, where they are added"),
    "patch_embed": ("rows, patches, d_model", "embedded image patches, before class token and positions"),
    "embed_ln.scale": (_SCALE, "divisor of the norm between the embeddings and the first block"),
    "embed_ln.normalized": (_STREAM, "its normalized input, before gain and bias"),
    "blocks.{i}.resid_pre": (_STREAM, "residual stream before the block"),
    "blocks.{i}.ln1.scale": (_SCALE, "divisor of the norm that attention (or the mixer) reads"),
    "blocks.{i}.ln1.normalized": (_STREAM, "its normalized input, before gain and bias"),
    "blocks.{i}.attn_in": (_STREAM, "what the attention module takes"),
    "blocks.{i}.attn.q": (_HEADS, "queries as projected, before norm and rotary embedding"),
    "blocks.{i}.attn.k": (_KV_HEADS, "keys as projected, before norm and rotary embedding"),
    "blocks.{i}.attn.q_normed": (_HEADS, "queries after their own norm"),
    "blocks.{i}.attn.k_normed": (_KV_HEADS, "keys after their own norm"),
    "blocks.{i}.attn.v": (_KV_HEADS, "values"),
    "blocks.{i}.attn.rot_q": (_HEADS, "queries as they are multiplied, after the rotary embedding"),
    "blocks.{i}.attn.rot_k": (_KV_HEADS, "keys as they are multiplied, after the rotary embedding"),
    "blocks.{i}.attn.attn_scores": (_SQUARE, "scaled, capped, biased and masked scores"),
    "blocks.{i}.attn.sinks": ("rows, head, query", "score of a learned sink beside the scores of the keys"),
    "blocks.{i}.attn.pattern": (_SQUARE, "softmax of the scores (and the sink)"),
    "blocks.{i}.attn.z": (_HEADS, "pattern times values, per head"),
    "blocks.{i}.attn.z_out": (_HEADS, "z as the output projection takes it, where a gate or norm stands between"),
    "blocks.{i}.attn.result": ("rows, seq, head, d_model", "what each head writes; computed only when asked for"),
    "blocks.{i}.attn.out": (_STREAM, "raw output of the attention module"),
    "blocks.{i}.mixer_in": (_STREAM, "what a recurrence or convolution over positions takes"),
    "blocks.{i}.ssm.conv": ("rows, seq, channels", "output of a state-space layer's convolution"),
    "blocks.{i}.ssm.x": ("rows, seq, channels", "what enters its recurrence"),
    "blocks.{i}.ssm.dt": ("rows, seq, heads", "step sizes, after softplus (Mamba: one per channel)"),
    "blocks.{i}.ssm.B": ("rows, seq, state", "input matrices"),
    "blocks.{i}.ssm.C": ("rows, seq, state", "output matrices"),
    "blocks.{i}.ssm.state": ("rows, seq, channels, state", "state after each position; read only"),
    "blocks.{i}.ssm.y": ("rows, seq, channels", "readout of the states plus D times x, before the gate"),
    "blocks.{i}.mixer.out": (_STREAM, "raw output of the mixer's module"),
    "blocks.{i}.ln1_post.scale": (_SCALE, "divisor of the norm that follows attention (sandwich and post-norms)"),
    "blocks.{i}.ln1_post.normalized": (_STREAM, "its normalized input, before gain and bias"),
    "blocks.{i}.attn_out": (_STREAM, "what attention adds to the residual stream, after norms and factors"),
    "blocks.{i}.mixer_out": (_STREAM, "what the mixer adds to the residual stream"),
    "blocks.{i}.resid_mid": (_STREAM, "residual stream between attention (or mixer) and MLP"),
    "blocks.{i}.ln2.scale": (_SCALE, "divisor of the norm that the MLP reads"),
    "blocks.{i}.ln2.normalized": (_STREAM, "its normalized input, before gain and bias"),
    "blocks.{i}.mlp_in": (_STREAM, "what the MLP takes"),
    "blocks.{i}.mlp.pre": (_HIDDEN, "input of the nonlinearity"),
    "blocks.{i}.mlp.pre_linear": (_HIDDEN, "linear side of a gated MLP"),
    "blocks.{i}.mlp.post": (_HIDDEN, "hidden activations, as projected down"),
    "blocks.{i}.mlp.router_logits": ("rows, seq, experts", "router's score of every expert"),
    "blocks.{i}.mlp.expert_indices": ("rows, seq, slot", "numbers of the chosen experts; read only"),
    "blocks.{i}.mlp.expert_weights": ("rows, seq, slot", "their weights"),
    "blocks.{i}.mlp.expert_out": (
        "rows, seq, slot, d_model",
        "what each chosen expert adds, weighted; computed only when asked for",
    ),
    "blocks.{i}.mlp.out": (_STREAM, "raw output of the MLP"),
    "blocks.{i}.ln2_post.scale": (_SCALE, "divisor of the norm that follows the MLP"),
    "blocks.{i}.ln2_post.normalized": (_STREAM, "its normalized input, before gain and bias"),
    "blocks.{i}.mlp_out": (_STREAM, "what the MLP adds to the residual stream, after norms and factors"),
    "blocks.{i}.resid_post": (_STREAM, "residual stream after the block"),
    "ln_final.scale": (_SCALE, "divisor of the final norm"),
    "ln_final.normalized": (_STREAM, "its normalized input, before gain and bias"),
    "logits": ("rows, seq, d_vocab", "logits over the vocabulary, as the model returns them"),
}


def _with_cross(names: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """`names` and, behind resid_mid, those of a decoder's attention to an encoder: attention's, as ``cross_attn``."""
    crossed = {
        name.replace("}.attn", "}.cross_attn"): (dims, f"{meaning}; of the attention to the encoder")
        for name, (dims, meaning) in names.items()
        if "}.attn" in name
    }
    crossed["blocks.{i}.resid_mid_cross"] = (_STREAM, "residual stream between attention to the encoder and MLP")
    result: dict[str, tuple[str, str]] = {}
    for name, entry in names.items():
        result[name] = entry
        if name == "blocks.{i}.resid_mid":
            result.update(crossed)
    return result


#: Name -> (extents, meaning), in forward order.
MEANINGS: Mapping[str, tuple[str, str]] = MappingProxyType(_with_cross(_NAMES))
