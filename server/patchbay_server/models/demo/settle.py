"""The last phase of training: one induction head instead of four that double each other.

After the first two phases every head of one layer copies repeated sequences, so that no single ablation shows anything.
Here the head that copies best by itself is kept and the others of its layer start anew; what the kept one does already,
they have nothing to gain from learning again. In the English rows every head of that layer pays a little for what it
adds to the residual stream, which keeps the new heads quiet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from patchbay_server.models.demo import experiments

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def best_alone(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The layer with the strongest induction head, and the head of it that copies best with the others silent."""
    ids = experiments.repeated_rows(tok, rows=10, half=20)
    scores = experiments.attention_scores(model, ids, 19)
    layer, heads = int(scores.max(1).values.argmax()), scores.shape[1]

    def alone(kept: int) -> float:
        with contextlib.ExitStack() as stack:
            for head in set(range(heads)) - {kept}:
                stack.enter_context(experiments.without_head(model, layer, head))
            return experiments.copying(model, ids)

    return layer, max(range(heads), key=alone)


@torch.no_grad()
def start_anew(model: LlamaForCausalLM, layer: int, kept: int, std: float) -> None:
    """Gives every head of a layer but one fresh weights, and nothing to say at first (its columns of W_O are zero)."""
    attention = model.model.layers[layer].self_attn
    width = attention.head_dim
    for head in set(range(model.config.num_attention_heads)) - {kept}:
        rows = slice(head * width, (head + 1) * width)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows].normal_(0.0, std)
        attention.o_proj.weight[:, rows].zero_()


class AttentionCost:
    """What the heads of one layer add to the residual stream, relative to its size; summed over heads.

    The sum of norms, rather than of squares, leaves a head either useful or silent, as in a group lasso.
    """

    def __init__(self, model: LlamaForCausalLM, layer: int) -> None:
        self._attention = model.model.layers[layer].self_attn
        self._heads = model.config.num_attention_heads
        self._z = self._residual = torch.empty(0)
        self._block = model.model.layers[layer]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, every forward is recorded for `of`."""

        def keep_z(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._z = args[0]  # [rows, seq, heads * d_head]

        def keep_residual(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self._residual = args[0]  # [rows, seq, d_model]

        handles = [
            self._attention.o_proj.register_forward_pre_hook(keep_z),
            self._block.register_forward_pre_hook(keep_residual),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, rows: slice) -> torch.Tensor:
        """The cost of some rows of the last forward, a scalar."""
        z = self._z[rows].flatten(0, 1).unflatten(-1, (self._heads, -1))  # [tokens, heads, d_head]
        w_o = self._attention.o_proj.weight.unflatten(-1, (self._heads, -1))  # [d_model, heads, d_head]
        # The mean of |W_O z|^2 from second moments: nothing of size [tokens, heads, d_model] is made.
        moments = torch.einsum("thi,thj->hij", z, z) / z.shape[0]
        added = (moments * torch.einsum("dhi,dhj->hij", w_o, w_o)).sum((1, 2))  # [heads]
        there = self._residual[rows].square().sum(-1).mean().detach()
        return (added / there + 1e-8).sqrt().sum()
