"""A plain gRPC server with a tiny random model, for the full environment's Python; it stops when its stdin closes."""

from __future__ import annotations

import asyncio
import sys

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<unk>", "the", "cat", "dog", "sat", "on", "a", "mat"]


def tiny_model() -> LlamaForCausalLM:
    """Two random layers, always the same ones."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


async def main() -> None:
    from patchbay_server.serving.local import local_servicer
    from patchbay_server.serving.plain import serve_grpc

    server = await serve_grpc(local_servicer(tiny_model(), tiny_tokenizer(), name="tiny"))
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(grace_s=0)


if __name__ == "__main__":
    asyncio.run(main())
