"""Measures the embedded model on held-out prompts: ``python -m patchbay_server.models.demo.evaluate``.

The prompts come from `corpus.held_out`, which yields nothing that the training corpus may hold. The same function fills
the card after training and checks the shipped weights in the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from patchbay_server.models.demo import corpus, demo_path, tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

COUNT = 500
SEED = 0
MEANING: dict[str, str] = {
    "capitals": "share of prompts whose likeliest next token is the capital; templates never trained on",
    "indirect_objects": "share whose likeliest next token is the receiver; pairs of names never trained on",
    "new_names": "the same between names that no such sentence of the training corpus holds",
    "induction": "share of a repeat's tokens, from the second on, that are the likeliest; random, 6 to 31 words",
    "greater_than": "mean probability of a year after the start; starting years (with their century) never trained on",
    "pronouns": "share whose likeliest next token is the right pronoun; names with actions never trained on",
    "sentiment": "share whose likeliest next token is a feeling of the right sign; things with adjectives never met",
}
REQUIRED: dict[str, float] = {
    "capitals": 0.99,
    "indirect_objects": 0.98,
    "induction": 0.97,
    "greater_than": 0.93,
    "pronouns": 0.98,
    "sentiment": 0.98,
}


def load_folder(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model in float32 and eval mode with its tokenizer, from a local folder and never from a network."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tok = cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return model.eval(), tok


@torch.no_grad()
def last_logits(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, prompts: Sequence[str]) -> torch.Tensor:
    """The logits after each prompt, [prompts, vocabulary]. Prompts of one length share a forward: no padding."""
    encoded = tok(list(prompts))["input_ids"]
    result = torch.empty(len(prompts), len(tok))
    for length in sorted({len(ids) for ids in encoded}):
        rows = [row for row, ids in enumerate(encoded) if len(ids) == length]
        result[rows] = model(torch.tensor([encoded[row] for row in rows])).logits[:, -1].float()
    return result


@torch.no_grad()
def copying(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, examples: Sequence[corpus.Example]) -> float:
    """The share of the repeats' tokens, from the second on, that the model has likeliest."""
    right = total = 0
    for example in examples:
        ids = torch.tensor([tok(example.text)["input_ids"]])
        half = len(example.answers)
        guesses = model(ids).logits[0, half + 1 : -1].argmax(-1)
        right += int((guesses == ids[0, half + 2 :]).sum())
        total += half - 1
    return right / total


def accuracies(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, count: int = COUNT) -> dict[str, float]:
    """Every task's held-out accuracy over `count` prompts; what each number means is in `MEANING`."""
    alphabet = tokenizer.alphabet(tokenizer.tokens_of(tok))
    found: dict[str, float] = {}
    for task in MEANING:
        # Each induction example asks for many tokens, so fewer of them say as much.
        examples = corpus.held_out(task, count if task != "induction" else count // 4, SEED, alphabet)
        if task == "induction":
            found[task] = round(copying(model, tok, examples), 4)
            continue
        logits = last_logits(model, tok, [example.prompt for example in examples])
        scores = []
        for row, example in zip(logits, examples, strict=True):
            answers = tokenizer.ids_of(tok, example.answers)
            if task == "greater_than":
                scores.append(row.softmax(-1)[answers].sum().item())
            else:
                scores.append(float(row.argmax().item() in answers))
        found[task] = round(sum(scores) / len(scores), 4)
    return found


def line(found: dict[str, float]) -> str:
    """Accuracies on one line."""
    return "  ".join(f"{task} {value:.3f}" for task, value in found.items())


def main() -> None:
    """Prints the shipped model's accuracies as JSON."""
    print(json.dumps(accuracies(*load_folder(demo_path())), indent=2))


if __name__ == "__main__":
    main()
