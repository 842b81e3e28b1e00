"""Tiny random models that are not decoders of text alone, and what transformers itself says happens inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

D_MODEL, HEADS, D_HEAD, D_MLP, LAYERS, VOCAB, PATCHES = 32, 4, 8, 48, 2, 50, 16

_SIZES: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": D_MLP,
}
_IMAGE = {"image_size": 16, "patch_size": 4}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PAIR: dict[str, Any] = {
    "d_model": D_MODEL,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": D_MLP,
    "decoder_ffn_dim": D_MLP,
}

#: Makes the model of each family, by transformers' model type.
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=VOCAB, **_SIZES)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=34, **_SIZES)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(vocab_size=VOCAB, cls_token_id=1, sep_token_id=2, **_IDS, **_SIZES)
    ),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(vocab_size=VOCAB, dim=D_MODEL, n_layers=LAYERS, n_heads=HEADS, hidden_dim=D_MLP)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCAB, d_model=D_MODEL, d_kv=D_HEAD, d_ff=D_MLP, num_layers=LAYERS, num_heads=HEADS)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=VOCAB, max_position_embeddings=64, **_PAIR)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE, **_SIZES)),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(mlp_ratio=2, **_IMAGE, **_without(_SIZES, "intermediate_size"))),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config={"vocab_size": VOCAB, "max_position_embeddings": 32, "projection_dim": 16, **_IDS, **_SIZES},
            vision_config={"projection_dim": 16, **_IMAGE, **_SIZES},
            projection_dim=16,
        )
    ),
    "siglip": lambda: tf.SiglipModel(
        tf.SiglipConfig(
            text_config={"vocab_size": VOCAB, "max_position_embeddings": 32, **_IDS, **_SIZES},
            vision_config={**_IMAGE, **_SIZES},
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=VOCAB,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=20,
            decoder_start_token_id=1,
            **_IDS,
            **_PAIR,
        )
    ),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **_SIZES),
            vision_config=tf.CLIPVisionConfig(**_IMAGE, **_SIZES),
            image_token_index=VOCAB - 1,
        )
    ),
}


def _without(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in sizes.items() if k != name}


def build(family: str, *, attention: str | None = None) -> Any:
    """A random model of `family` in eval mode; the same weights every time."""
    model = FAMILIES[family]().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            parameter.copy_(noise if parameter.ndim > 1 else noise + 0.5)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def inputs_of(family: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """What the family is run on: named as transformers names it."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, VOCAB - 2, (rows, length), generator=generator)

    inputs: dict[str, torch.Tensor] = {}
    if family not in ("vit", "dinov2", "whisper"):
        inputs["input_ids"] = ids(6)
    if family == "llava":
        image = torch.full((rows, PATCHES), VOCAB - 1)
        inputs["input_ids"] = torch.cat([ids(2), image, ids(4)], dim=1)
    if family in ("vit", "dinov2", "clip", "siglip", "llava"):
        inputs["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
    if family == "whisper":
        inputs["input_features"] = torch.randn(rows, 8, 20, generator=generator)
    if family in ("t5", "bart", "whisper"):
        inputs["decoder_input_ids"] = ids(5)
    return inputs


def given(inputs: dict[str, torch.Tensor]) -> Any:
    """The same as a run of Patchbay takes it."""
    rest = {k: v.numpy() for k, v in inputs.items() if k != "input_ids"}
    if "input_ids" not in inputs:
        return rest
    return {"text": inputs["input_ids"].numpy(), **rest} if rest else inputs["input_ids"].numpy()


def reference(family: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Site -> value, from ``output_hidden_states`` and ``output_attentions`` of an eager twin.

    Hidden state 0 enters the first layer; the last one is left out where transformers gives it after the final norm.
    """
    model = build(family, attention="eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    expected: dict[str, torch.Tensor] = {}

    def take(prefix: str, hidden: Any, patterns: Any, name: str = "attn") -> None:
        for i, value in enumerate(hidden[:-1] if hidden is not None else ()):
            expected[f"{prefix}blocks.{i}.resid_pre"] = value
        for i, value in enumerate(patterns or ()):
            expected[f"{prefix}blocks.{i}.{name}.pattern"] = value

    with torch.no_grad():
        if family in ("clip", "siglip"):
            text = model.text_model(inputs["input_ids"], **more)
            vision = model.vision_model(inputs["pixel_values"], **more)
            take("text.", text.hidden_states, text.attentions)
            take("vision.", vision.hidden_states, vision.attentions)
            return expected
        if family == "llava":
            vision = model.model.vision_tower(inputs["pixel_values"], **more)
            take("vision.", vision.hidden_states, vision.attentions)
        out = model(**inputs, **more, **({"use_cache": False} if "decoder_input_ids" in inputs else {}))
    if "decoder_input_ids" in inputs:
        take("encoder.", out.encoder_hidden_states, out.encoder_attentions)
        take("decoder.", out.decoder_hidden_states, out.decoder_attentions)
        take("decoder.", None, out.cross_attentions, "cross_attn")
    else:
        take("", out.hidden_states, out.attentions)
    if getattr(out, "logits", None) is not None and out.logits.ndim == 3:
        expected["logits"] = out.logits
    return expected
