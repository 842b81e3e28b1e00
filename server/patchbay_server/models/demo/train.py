"""Trains the embedded model from a fixed seed and rewrites the packaged data.

Run it as ``python -m patchbay_server.models.demo.train``, or as ``make demo-model``.

Three phases. First only random sequences, each repeated once, with the loss on the repeats: induction heads form within
a few hundred steps, which they do not within thousands when the repeats are merely mixed in. Then the synthetic
English, with some repeats kept in so that the heads stay. Last the same mixture with one induction head (`settle`).
Documents are packed into rows and see only themselves.

The same seed gives the same corpus everywhere. The weights are the same bit for bit only with the same torch build,
processor and number of threads; elsewhere rounding differs, and the accuracies in the card are measured anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from patchbay_server.models.demo import corpus, demo_path, evaluate, settle, tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, apart from the code."""

    seed: int = 2026
    steps_repeats: int = 350
    steps_mixed: int = 3300
    steps_settling: int = 500
    rows: int = 64
    row_tokens: int = 64
    learning_rate: float = 3e-3
    settling_rows: int = 48
    settling_rate: float = 2e-3
    # What the English rows pay for the attention of the induction head's layer, while settling.
    attention_cost: float = 0.05
    weight_decay: float = 0.1
    # Share of the rows of the mixed phase that hold repeated sequences.
    repeat_share: float = 0.16
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 384
    tied: bool = True
    init: float = 0.02
    threads: int = 2


@dataclass(frozen=True)
class Packed:
    """Rows of documents: ids, next-token targets, the document of each position; all [rows, row_tokens]."""

    ids: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Who sees whom: earlier positions of the same document. Boolean, [rows, 1, row_tokens, row_tokens]."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & torch.ones(self.ids.shape[1], self.ids.shape[1], dtype=torch.bool).tril())[:, None]


class Encoded:
    """An endless stream of encoded documents with their targets, encoded in chunks because single calls are slow."""

    def __init__(self, texts: Iterator[str], tok: PreTrainedTokenizerFast, repeats: bool) -> None:
        self._texts, self._tok, self._repeats = texts, tok, repeats
        self._ready: list[list[int]] = []

    def next(self) -> tuple[list[int], list[int]]:
        """The ids of one document and its targets, of one length."""
        if not self._ready:
            self._ready = self._tok(list(itertools.islice(self._texts, 4096)))["input_ids"]
        ids = self._ready.pop()
        if self._repeats:
            # The first half is noise; only what the first half tells about the second can be learnt.
            half = (len(ids) - 1) // 2
            return ids, [IGNORED] * (half + 1) + ids[half + 2 :] + [IGNORED]
        return ids, [*ids[1:], self._tok.eos_token_id]


def pack(source: Encoded, rows: int, row_tokens: int, pad: int) -> Packed:
    """Fills rows with whole documents; what is left of a row is padding that nothing learns from."""
    ids = torch.full((rows, row_tokens), pad)
    targets = torch.full((rows, row_tokens), IGNORED)
    segments = torch.zeros(rows, row_tokens, dtype=torch.long)
    positions = torch.zeros(rows, row_tokens, dtype=torch.long)
    for row in range(rows):
        start = segment = 0
        while True:
            document, target = source.next()
            end = start + len(document)
            if end > row_tokens:
                if start:
                    break
                continue
            segment += 1
            ids[row, start:end] = torch.tensor(document)
            targets[row, start:end] = torch.tensor(target)
            segments[row, start:end] = segment
            positions[row, start:end] = torch.arange(len(document))
            start = end
    return Packed(ids, targets, segments, positions)


def join(parts: list[Packed]) -> Packed:
    """Several packs of rows as one batch."""
    return Packed(*(torch.cat(tensors) for tensors in zip(*(astuple(part) for part in parts), strict=True)))


def config(recipe: Recipe, tok: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: a small Llama, as many key and value heads as query heads."""
    return LlamaConfig(
        vocab_size=len(tok),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=128,
        initializer_range=recipe.init,
        tie_word_embeddings=recipe.tied,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def schedule(step: int, total: int, warm: int = 100) -> float:
    """The learning rate's factor: a linear start, then a cosine down to zero."""
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def optimizer_of(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms' gains do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )


class Batches:
    """Rows of repeats followed by rows of English, without end."""

    def __init__(self, recipe: Recipe, tok: PreTrainedTokenizerFast, rows: int, seed: int) -> None:
        alphabet = tokenizer.alphabet(tokenizer.tokens_of(tok))
        self._english = Encoded(corpus.documents(random.Random(seed)), tok, repeats=False)
        self._repeats = Encoded(corpus.repeats(random.Random(seed + 1), alphabet), tok, repeats=True)
        self._pad = tokenizer.ids_of(tok, [tokenizer.PAD])[0]
        self._rows, self._row_tokens = rows, recipe.row_tokens

    def next(self, repeat_rows: int) -> Packed:
        """One batch, its first `repeat_rows` rows of repeats."""
        parts = [pack(self._repeats, repeat_rows, self._row_tokens, self._pad)]
        if repeat_rows < self._rows:
            parts.append(pack(self._english, self._rows - repeat_rows, self._row_tokens, self._pad))
        return join(parts)


def update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """One step down the gradient of a loss, at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def loss_of(model: LlamaForCausalLM, batch: Packed) -> torch.Tensor:
    """The mean cross-entropy of a batch's targets."""
    output = model(input_ids=batch.ids, attention_mask=batch.mask(), position_ids=batch.positions, use_cache=False)
    return functional.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


class Progress:
    """Prints the loss and the pace, and now and then the accuracies on a few held-out examples."""

    def __init__(self, phase: str, total: int, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast) -> None:
        self._phase, self._total, self._model, self._tok = phase, total, model, tok
        self._started = time.perf_counter()

    def step(self, number: int, loss: torch.Tensor) -> None:
        """Told of every step, from 1 on."""
        if number % 50 == 0:
            pace = (time.perf_counter() - self._started) / number
            print(f"{self._phase} {number}/{self._total}  loss {loss.item():.3f}  {pace:.3f} s/step", flush=True)
        if number % 250 == 0:
            self._model.eval()
            print("  " + evaluate.line(evaluate.accuracies(self._model, self._tok, count=100)), flush=True)
            self._model.train()


def learn(recipe: Recipe, tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The first two phases, from scratch."""
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config(recipe, tok)).train()
    batches, optimizer = Batches(recipe, tok, recipe.rows, recipe.seed), optimizer_of(model, recipe)
    total = recipe.steps_repeats + recipe.steps_mixed
    progress = Progress("learning", total, model, tok)
    for step in range(total):
        repeat_rows = recipe.rows if step < recipe.steps_repeats else round(recipe.rows * recipe.repeat_share)
        loss = loss_of(model, batches.next(repeat_rows))
        update(model, optimizer, loss, recipe.learning_rate * schedule(step, total))
        progress.step(step + 1, loss)
    return model.eval()


def settle_down(model: LlamaForCausalLM, recipe: Recipe, tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The last phase, on a model of the first two; the same model, changed."""
    torch.manual_seed(recipe.seed + 1)
    layer, kept = settle.best_alone(model, tok)
    print(f"layer {layer} keeps head {kept}", flush=True)
    settle.start_anew(model, layer, kept, recipe.init)
    model.train()
    batches, optimizer = Batches(recipe, tok, recipe.settling_rows, recipe.seed + 2), optimizer_of(model, recipe)
    repeat_rows = round(recipe.settling_rows * recipe.repeat_share)
    cost, progress = settle.AttentionCost(model, layer), Progress("settling", recipe.steps_settling, model, tok)
    with cost.watching():
        for step in range(recipe.steps_settling):
            loss = loss_of(model, batches.next(repeat_rows))
            paid = loss + recipe.attention_cost * cost.of(slice(repeat_rows, None))
            update(model, optimizer, paid, recipe.settling_rate * schedule(step, recipe.steps_settling, warm=20))
            progress.step(step + 1, loss)
    return model.eval()


def save(folder: Path, model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, recipe: Recipe, seconds: float) -> None:
    """Writes weights, tokenizer and card; the accuracies in the card are measured on what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    model, tok = evaluate.load_folder(folder)
    card = {
        "name": "patchbay-demo",
        "description": "A small Llama trained on synthetic English, for demonstrations and tests.",
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tok),
        "recipe": asdict(recipe),
        "training_seconds": round(seconds),
        "machine": f"{platform.machine()}, {recipe.threads} threads, torch {torch.__version__}",
        "held_out_per_task": evaluate.COUNT,
        "held_out": evaluate.accuracies(model, tok),
        "held_out_meaning": evaluate.MEANING,
        "corpus": (corpus.__doc__ or "").strip(),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    """Trains with the packaged recipe and replaces the packaged data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo_path(), help="folder to write (default: the packaged data)")
    parser.add_argument("--keep", type=Path, help="folder to keep the model in as it is before the last phase")
    parser.add_argument("--learnt", type=Path, help="such a folder, to do the last phase alone")
    defaults = asdict(Recipe())
    for name, value in defaults.items():
        kind = int if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    arguments = vars(parser.parse_args())
    recipe = Recipe(**{name: type(defaults[name])(arguments[name]) for name in defaults})
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    if arguments["learnt"]:
        model, tok = evaluate.load_folder(arguments["learnt"])
    else:
        tok = tokenizer.build(tokenizer.vocabulary())
        model = learn(recipe, tok)
        if arguments["keep"]:
            model.save_pretrained(arguments["keep"])
            tok.save_pretrained(arguments["keep"])
    model = settle_down(model, recipe, tok)
    save(arguments["out"], model, tok, recipe, time.perf_counter() - started)
    print((arguments["out"] / "card.json").read_text())


if __name__ == "__main__":
    main()
