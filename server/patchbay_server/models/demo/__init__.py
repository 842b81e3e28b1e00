"""The embedded model: a four-layer Llama of about a million parameters that really learnt six small tasks.

It is what the demo and the tests look into, so that they show real induction heads, a real fact being recalled and real
steering, without a download. Importing this package imports neither torch nor transformers; `load` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["demo_path", "load"]


def demo_path() -> Path:
    """The packaged folder with weights, tokenizer and card, in the layout that transformers loads."""
    return Path(__file__).parent / "data"


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model on the CPU in float32 and eval mode, and its tokenizer; works without a network."""
    from patchbay_server.models.demo.evaluate import load_folder

    return load_folder(demo_path())
