"""Tiny random models of transformers' decoder-only families, made from their own configurations and never downloaded.

One dictionary of sizes fits nearly all: of each family's configuration, those that it knows are set. What only one
family needs stands under its name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from patchbay.ir.card import ModelCard

D_MODEL, N_LAYERS, VOCAB = 16, 2, 40

#: Size by every name that configurations use for it; a configuration takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embed_dim"), D_MODEL),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "shared_expert_intermediate_size", "ffn_hidden_size"), 24
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), 64),
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rotary_dim": 2,
    # multi-head latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # state spaces and recurrences
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 2,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "time_step_rank": 2,
    "lru_width": 16,
    "sliding_window": 4,
    "attention_window_size": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}

#: What a family needs beyond its sizes.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "num_kv_heads": 1},
    "opt": {"word_embed_proj_dim": D_MODEL},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1},
    "mamba": {"expand": 2},
    "rwkv": {"attention_hidden_size": D_MODEL, "rescale_every": 6, "context_length": 64},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.3, "embedding_multiplier": 1.5,
                "logits_scaling": 2.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5},
    "bamba": {"attn_layer_indices": [1]},
    "stablelm": {"partial_rotary_factor": 0.5},
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
}  # fmt: skip


def config_of(family: str, **more: Any) -> transformers.PretrainedConfig:
    """A tiny configuration of `family` (transformers' model type)."""
    kind = transformers.CONFIG_MAPPING[family]
    known = kind().to_dict() if family not in SPECIAL else {**kind().to_dict(), **SPECIAL[family]}
    aliases = set(getattr(kind, "attribute_map", {}))
    chosen = {k: v for k, v in SIZES.items() if k in known and k not in aliases}
    if "kv_lora_rank" in chosen:  # latent attention: every head has keys of its own
        chosen |= {k: 4 for k in ("num_key_value_heads",) if k in known} | {k: 2 for k in ("head_dim",) if k in known}
    chosen |= SPECIAL.get(family, {})
    chosen |= more
    if known.get("layer_types") and "layer_types" not in chosen:
        layers = chosen.get("num_hidden_layers", N_LAYERS)
        chosen["layer_types"] = list(dict.fromkeys(known["layer_types"]))[:layers] or None
        short = layers - len(chosen["layer_types"])
        chosen["layer_types"] += chosen["layer_types"][-1:] * short
    return kind(**chosen)


def build(family: str, *, seed: int = 0, attention: str | None = None, **more: Any) -> torch.nn.Module:
    """A random model of `family` in eval mode; the same weights for the same seed."""
    config = config_of(family, **more)
    torch.manual_seed(seed)
    extra = {"attn_implementation": attention} if attention else {}
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, **extra).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * 0.25
                parameter.copy_(noise if parameter.ndim > 1 else noise + 0.5)
    return model


#: The decoder-only families that CI builds, derives and proves.
FAMILIES = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "falcon", "mixtral", "qwen2_moe", "qwen3_moe", "olmo2", "stablelm", "cohere",
    "granite", "deepseek_v3", "gpt_oss", "mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba",
    # beyond the list that the binding was written for
    "bamba", "codegen", "glm4", "lfm2", "minicpm3", "mpt", "olmo", "qwen3_next", "smollm3", "starcoder2",
)  # fmt: skip


def facts(card: ModelCard) -> dict[str, Any]:
    """What a card says of canonical sites, layers told apart only where they differ.

    Returns:
        ``proved`` and ``read_only`` (lists of names, the block left open, with the layers that have it where not all
        do) and ``absent`` (reason by name).
    """
    layers: dict[str, list[int]] = {}
    absent: dict[str, str] = {}
    read_only: set[str] = set()
    for site in card.sites:
        if site.name.startswith("module:"):
            continue
        block = re.match(r"blocks\.(\d+)\.(.*)", site.name)
        kind = f"blocks.*.{block[2]}" if block else site.name
        if site.absent is not None:
            absent[kind] = site.absent
            continue
        layers.setdefault(kind, []).append(int(block[1]) if block else -1)
        if not site.writable:
            read_only.add(kind)
    whole = list(range(card.n_layers))
    proved = [k if n in (whole, [-1]) else f"{k} ({', '.join(map(str, n))})" for k, n in layers.items()]
    missing = {k: r for k, r in absent.items() if k not in layers}
    return {"proved": sorted(proved), "read_only": sorted(read_only), "absent": dict(sorted(missing.items()))}


#: Where the facts of every family are kept: what a regression is seen by, and what docs/sites.md is made from.
TABLE = Path(__file__).parent / "vectors" / "families.json"


def main() -> None:
    """Write the facts of every family anew."""
    from patchbay_server.models.loader import host

    table = {family: facts(host(build(family), name=family).card) for family in FAMILIES}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {TABLE.name}: {len(table)} families")


if __name__ == "__main__":
    main()
