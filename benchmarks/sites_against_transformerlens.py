"""Every hook name that Patchbay and TransformerLens share, on the same random weights: how far apart are the values?

Runs in an environment of its own, which `make compare-transformerlens` makes: TransformerLens brings packages that
nothing else here needs. Prints a table of families with the number of shared names and the largest difference, and
writes JSON.

    python benchmarks/sites_against_transformerlens.py [--json comparison.json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge

from patchbay.errors import UnknownSiteError
from patchbay.ir.events import TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.ir.sites import canonical
from patchbay_server.engine import Engine
from patchbay_server.kernels import to_tensor
from patchbay_server.models.loader import host

VOCAB = 50
IDS = ((1, 5, 9, 3, 7), (4, 4, 30, 2, 11))
_SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "gpt2": transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, n_inner=48, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": transformers.LlamaConfig(**_SIZES, num_key_value_heads=2),
    "gpt_neox": transformers.GPTNeoXConfig(**_SIZES),
    "gemma2": transformers.Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8),
    "qwen2": transformers.Qwen2Config(**_SIZES, num_key_value_heads=2),
}


def save(config: transformers.PretrainedConfig, folder: Path) -> None:
    """A random model and a tokenizer, in the layout that both load."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


def theirs(folder: Path) -> dict[str, torch.Tensor]:
    """Every hooked value of TransformerLens's bridge, by hook name."""
    bridge = TransformerBridge.boot_transformers(str(folder))
    _, cache = bridge.run_with_cache(torch.tensor(IDS))
    return {name: value for name, value in cache.items() if isinstance(value, torch.Tensor)}


def ours(folder: Path, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Values of Patchbay's sites by the hook names that lead to them, and why the others do not."""
    engine = Engine(host(transformers.AutoModelForCausalLM.from_pretrained(folder)))
    card = engine.hosted.card
    sites: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            sites[name] = card.site(canonical(name, card.n_layers)).name
        except UnknownSiteError as error:
            refused[name] = error.message
    nodes = tuple(Node("site.read", (), {"site": site}, 0) for site in sites.values())
    outputs = tuple(Output(name, i) for i, name in enumerate(sites))
    found: dict[str, torch.Tensor] = {}

    def take(event: object) -> None:
        if isinstance(event, TensorValue):
            found[event.name] = to_tensor(event.value)

    engine.run(engine.prepare(Graph((Run(IDS),), nodes, outputs)), take)
    return found, refused


def compare(family: str) -> dict[str, Any]:
    """One family: names on both sides, the largest difference and where, and names only they have."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / family
        save(CONFIGS[family], folder)
        their_values = theirs(folder)
        our_values, refused = ours(folder, sorted(their_values))
    differences: dict[str, float] = {}
    shapes: dict[str, str] = {}
    for name, value in our_values.items():
        other = their_values[name]
        if value.shape != other.shape:
            shapes[name] = f"{list(value.shape)} here, {list(other.shape)} there"
            continue
        both = torch.isfinite(value) & torch.isfinite(other) & (other > torch.finfo(other.dtype).min / 2)
        differences[name] = float((value - other)[both].abs().max()) if bool(both.any()) else 0.0
    worst = max(differences, key=lambda n: differences[n])
    return {
        "family": family,
        "compared": len(differences),
        "largest_difference": differences[worst],
        "at": worst,
        "over_1e-4": {n: d for n, d in differences.items() if d > 1e-4},
        "other_shapes": shapes,
        "hook_names_without_a_site": sorted(refused),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the whole comparison")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = [compare(family) for family in CONFIGS]
    print(f"{'family':<10} {'names compared':>14} {'largest difference':>18}  at")
    for r in results:
        print(f"{r['family']:<10} {r['compared']:>14} {r['largest_difference']:>18.1e}  {r['at']}")
        for name, difference in r["over_1e-4"].items():
            print(f"{'':<10} differs: {name} by {difference:.1e}")
        for name, shapes in r["other_shapes"].items():
            print(f"{'':<10} other shape: {name}: {shapes}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
