"""What the embedded model offers to look into, found with plain PyTorch hooks.

Run it as ``python -m patchbay_server.models.demo.experiments``.

Three experiments, each the plain-hooks twin of one that the demo does through intervention graphs: causal tracing of a
fact, induction heads and their ablation, and steering a sentiment. The tests hold the shipped weights to them, so that
the demo has something real to show, and `docs/demo-model.md` quotes what this module prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from patchbay_server.models.demo import corpus, demo_path, evaluate, tokenizer
from patchbay_server.models.demo import words as w

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Edit = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def editing_residual(model: LlamaForCausalLM, layer: int, edit: Edit) -> Iterator[None]:
    """Within it, the output of a decoder layer, [rows, seq, d_model], is what `edit` makes of it."""
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: edit(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_head(model: LlamaForCausalLM, layer: int, head: int) -> Iterator[None]:
    """Within it, one attention head contributes nothing: its z is zero."""
    attention = model.model.layers[layer].self_attn
    width = attention.head_dim

    def silence(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        z = args[0].clone()  # [rows, seq, heads * d_head]
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handle = attention.o_proj.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def residuals(model: LlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """resid_post of every layer, each [rows, seq, d_model]."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output.detach().clone()))
        for layer in model.model.layers
    ]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def sweep(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, source: str, target: str, wanted: str, replaced: str
) -> torch.Tensor:
    """Causal tracing: resid_post of `source` patched into `target`, one layer and position at a time.

    Returns [layers, seq]: how much of the logit difference between `wanted` and `replaced` each patch brings over, 0
    for the target's own and 1 for the source's. After Meng et al. 2022, "Locating and Editing Factual Associations".
    """
    source_ids, target_ids = (torch.tensor([tok(text)["input_ids"]]) for text in (source, target))
    good, bad = tokenizer.ids_of(tok, (wanted, replaced))

    def difference(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids).logits[0, -1]
        return logits[good] - logits[bad]

    high, low = difference(source_ids), difference(target_ids)
    cached = residuals(model, source_ids)
    result = torch.empty(len(cached), target_ids.shape[1])
    for layer, values in enumerate(cached):
        for position in range(target_ids.shape[1]):

            def patch(hidden: torch.Tensor, position: int = position, values: torch.Tensor = values) -> torch.Tensor:
                hidden = hidden.clone()
                hidden[:, position] = values[:, position]
                return hidden

            with editing_residual(model, layer, patch):
                result[layer, position] = (difference(target_ids) - low) / (high - low)
    return result


def repeated_rows(tok: PreTrainedTokenizerFast, rows: int, half: int, seed: int = 0) -> torch.Tensor:
    """Random held-out sequences of `half` words, each twice after <bos>: [rows, 1 + 2 * half]."""
    alphabet = tokenizer.alphabet(tokenizer.tokens_of(tok))
    examples = (e for e in corpus.held_out("induction", 60 * rows, seed, alphabet) if len(e.answers) == half)
    return torch.tensor([tok(next(examples).text)["input_ids"] for _ in range(rows)])


@torch.no_grad()
def copying(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """The share of the second halves' tokens, from the second on, that are the likeliest."""
    half = (ids.shape[1] - 1) // 2
    return (model(ids).logits[:, half + 1 : -1].argmax(-1) == ids[:, half + 2 :]).float().mean().item()


@torch.no_grad()
def attention_scores(model: LlamaForCausalLM, ids: torch.Tensor, offset: int) -> torch.Tensor:
    """Mean attention of every head, [layers, heads], from each token of the second half to the one `offset` before."""
    half = (ids.shape[1] - 1) // 2
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        patterns = model(ids, output_attentions=True).attentions  # layers x [rows, heads, seq, seq]
    finally:
        model.set_attn_implementation(before)
    rows = torch.arange(half + 1, ids.shape[1])
    return torch.stack([pattern[:, :, rows, rows - offset].mean((0, 2)) for pattern in patterns])


def ablations(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Copying accuracy without each head in turn, [layers, heads]."""
    shape = (model.config.num_hidden_layers, model.config.num_attention_heads)
    result = torch.empty(shape)
    for layer, head in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        with without_head(model, layer, head):
            result[layer, head] = copying(model, ids)
    return result


@torch.no_grad()
def sentiment_direction(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, layer: int, count: int = 100
) -> torch.Tensor:
    """The difference in means of resid_post at the last token, glad prompts minus sad ones: [d_model]."""
    means = {}
    for sign in (w.GLAD, w.SAD):
        prompts = [e.prompt for e in corpus.held_out("sentiment", 4 * count, 1) if e.answers == sign][:count]
        rows = [residuals(model, torch.tensor([tok(prompt)["input_ids"]]))[layer][0, -1] for prompt in prompts]
        means[sign] = torch.stack(rows).mean(0)
    return means[w.GLAD] - means[w.SAD]


@torch.no_grad()
def gladness(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, prompts: list[str]) -> torch.Tensor:
    """The probability of a glad feeling next, less that of a sad one: [prompts], from -1 to 1."""
    probabilities = evaluate.last_logits(model, tok, prompts).softmax(-1)
    glad, sad = (probabilities[:, tokenizer.ids_of(tok, words)].sum(-1) for words in (w.GLAD, w.SAD))
    return glad - sad


def steered(model: LlamaForCausalLM, layer: int, vector: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which `vector` is added to a layer's output at the prompt's last token, and at no generated one."""

    def add(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] == 1:  # a decoding step
            return hidden
        hidden = hidden.clone()
        hidden[:, -1] += vector
        return hidden

    return editing_residual(model, layer, add)


@torch.no_grad()
def continuation(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, prompt: str, new_tokens: int = 24) -> str:
    """The greedy continuation, without the prompt, up to the end of the text."""
    ids = torch.tensor([tok(prompt)["input_ids"]])
    output: torch.Tensor = cast(Any, model).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return tokenizer.text_of(tok, output[0, ids.shape[1] :].tolist())


def _table(values: torch.Tensor, columns: list[str]) -> str:
    widths = [max(6, len(column)) for column in columns]
    head = "layer  " + "  ".join(column.rjust(width) for column, width in zip(columns, widths, strict=True))
    rows = [
        f"{layer:>5}  " + "  ".join(f"{value:{width}.2f}" for value, width in zip(row, widths, strict=True))
        for layer, row in enumerate(values.tolist())
    ]
    return "\n".join([head, *rows])


def main() -> None:
    """Prints the three experiments on the shipped weights."""
    model, tok = evaluate.load_folder(demo_path())
    for source, target in (
        ("The capital of France is", "The capital of Italy is"),
        ("We learned that the capital city of France is", "We learned that the capital city of Italy is"),
        ("My teacher said that France has a capital called", "My teacher said that Italy has a capital called"),
    ):
        print(f"\nresid_post patched from {source!r} into {target!r}: share of Paris minus Rome")
        print(_table(sweep(model, tok, source, target, "Paris", "Rome"), tok.tokenize("<bos> " + target)))

    ids = repeated_rows(tok, rows=20, half=20)
    heads = [f"head {head}" for head in range(model.config.num_attention_heads)]
    print(f"\ncopying accuracy on 20 held-out sequences of 20 words, repeated: {copying(model, ids):.3f}")
    print("attention of the repeat to the token after the earlier occurrence (induction score)")
    print(_table(attention_scores(model, ids, 19), heads))
    print("attention to the previous token\n" + _table(attention_scores(model, ids, 1), heads))
    print("copying accuracy without each head\n" + _table(ablations(model, ids), heads))

    sad = [e.prompt for e in corpus.held_out("sentiment", 200, 2) if e.answers == w.SAD]
    print(f"\nsteering {len(sad)} held-out sad prompts: share whose next feeling is glad, by layer and scale")
    scales = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    shares = torch.empty(model.config.num_hidden_layers, len(scales))
    for layer in range(model.config.num_hidden_layers):
        direction = sentiment_direction(model, tok, layer)
        for column, scale in enumerate(scales):
            with steered(model, layer, scale * direction):
                shares[layer, column] = (gladness(model, tok, sad) > 0).float().mean()
    print(_table(shares, [f"x {scale}" for scale in scales]))
    for prompt in ("I watched the film and it was terrible. I felt", "I read the story on Monday. I felt"):
        print(f"\n{prompt}\n   unsteered: {continuation(model, tok, prompt)}")
        for layer in range(model.config.num_hidden_layers):
            for scale in (1.0, 1.5, -1.5):
                with steered(model, layer, scale * sentiment_direction(model, tok, layer)):
                    print(f"   layer {layer}, x {scale}: {continuation(model, tok, prompt)}")
    for prompt in ("The capital of", "When Mary and John went to the", "Mary", "The war lasted", "What is the capital"):
        print(f"\n{prompt} ... {continuation(model, tok, prompt, 40)}")


if __name__ == "__main__":
    main()
