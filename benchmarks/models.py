"""The models and prompts of the workloads: random weights of a fixed seed, saved once, loaded by every environment.

Nothing is downloaded. Weights are random because every figure here is about time, memory or bytes, which do not depend
on what a model learnt; only the one-site read uses the embedded demo model, because it is what a new user meets.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Raised when what is saved below changes.
VERSION = 2
FOLDER_VARIABLE = "PATCHBAY_BENCH_MODELS"
_SEED = 7


@dataclass(frozen=True)
class Spec:
    """The shape of a model."""

    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    dtype: str = "float32"


MODELS = {
    # The shape of GPT-2 small, vocabulary included: the logits are a good part of its forward.
    "gpt2-12x768": Spec("gpt2", 12, 768, 12, 50257, 1024),
    "llama-12x768": Spec("llama", 12, 768, 12, 32000, 1024),
    "gpt2-4x256": Spec("gpt2", 4, 256, 8, 5000, 1024),
    "llama-4x256": Spec("llama", 4, 256, 8, 5000, 1024),
    "gpt2-2x32": Spec("gpt2", 2, 32, 4, 100, 256),
    "llama-2x32": Spec("llama", 2, 32, 4, 100, 256),
    "gpt2-24x1024": Spec("gpt2", 24, 1024, 16, 50257, 1024, "bfloat16"),
    "llama-32x4096": Spec("llama", 32, 4096, 32, 128256, 4096, "bfloat16"),
}


def config(spec: Spec) -> Any:
    """transformers' configuration of a shape. No token ends a generation, so that every row has the same length."""
    import transformers

    # Wider than usual: attention then depends on the tokens, and what is patched early is seen at the end.
    shared: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.05}
    if spec.family == "gpt2":
        return transformers.GPT2Config(
            n_layer=spec.layers,
            n_embd=spec.width,
            n_head=spec.heads,
            vocab_size=spec.vocabulary,
            n_positions=spec.positions,
            **shared,
        )
    return transformers.LlamaConfig(
        num_hidden_layers=spec.layers,
        hidden_size=spec.width,
        intermediate_size=spec.width * 8 // 3 // 32 * 32,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        vocab_size=spec.vocabulary,
        max_position_embeddings=spec.positions,
        **shared,
    )


def folder(name: str) -> Path:
    """Where the model lies (or will lie)."""
    return Path(os.environ[FOLDER_VARIABLE]) / f"{name}-v{VERSION}"


def save(name: str) -> Path:
    """Make the model and a word-level tokenizer, unless they are there; returns their folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    target = folder(name)
    if target.exists():
        return target
    spec = MODELS[name]
    torch.manual_seed(_SEED)
    model = transformers.AutoModelForCausalLM.from_config(config(spec)).eval()
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    model.to(getattr(torch, spec.dtype)).save_pretrained(partial)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(spec.vocabulary)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load(name: str, device: str = "cpu") -> Any:
    """The model as transformers loads it, in eval mode, in the dtype that it was saved in."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder(name), dtype=getattr(torch, MODELS[name].dtype), local_files_only=True
    )
    model.generation_config.eos_token_id = None
    return model.eval().to(device)


def local_model(name: str, device: str) -> Any:
    """The model as Patchbay hosts it in this process, with a service's memory of recent prompts."""
    import patchbay as pb

    return pb.local(load(name, device), prefix_cache_bytes=512 * 2**20)


@functools.cache
def shared_model(name: str, device: str) -> Any:
    """The same, one for all contenders of this process."""
    return local_model(name, device)


def tokenizer(name: str) -> Any:
    """Its tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder(name), local_files_only=True)


def prompts(vocabulary: int, rows: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, `rows` rows of `length`; the same for the same seed, in every environment."""
    import random

    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(rows)]


def wait(device: str) -> None:
    """Until the device has done what it was told: a clock read before would not have counted it."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
