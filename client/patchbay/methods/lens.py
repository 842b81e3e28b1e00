"""The logit lens: what the model would say if it stopped after each layer (nostalgebraist, 2020).

The residual stream after every layer goes through the model's own final norm and unembedding.
"""

from __future__ import annotations

from typing import NamedTuple

from patchbay import ops
from patchbay.tracing import Proxy, Run


class LogitLens(NamedTuple):
    """What each depth predicts; values of the trace, to be saved or used further.

    Attributes:
        tokens: [depth, rows, positions, k] int64, the likeliest tokens, the likeliest first.
        probabilities: [depth, rows, positions, k], theirs.
        ranks: [depth, rows, positions] int64, how many tokens are likelier than the target; None without a target.
    """

    tokens: Proxy
    probabilities: Proxy
    ranks: Proxy | None


def residual_stream(run: Run, depth: int) -> Proxy:
    """The residual stream after `depth` blocks, [rows, seq, d_model]; depth 0 is what enters the first block."""
    value: Proxy = run.blocks[0].resid_pre if depth == 0 else run.blocks[depth - 1].resid_post
    return value


def lens_labels(n_layers: int) -> list[str]:
    """Names of the depths from 0 to `n_layers`: what the residual stream has been through."""
    return ["embedding", *(f"layer {i}" for i in range(n_layers))]


def logit_lens(
    run: Run, *, k: int = 1, target: int | None = None, positions: slice | list[int] | None = None
) -> LogitLens:
    """The `k` likeliest next tokens at every depth, read through the final norm and the unembedding.

    Each depth's logits are dropped as soon as they are ranked, so that only the short lists are ever held together.

    Args:
        run: the run to look into.
        k: how many tokens.
        target: a token whose rank is wanted too.
        positions: which positions; all when left out.
    """
    tokens, probabilities, ranks = [], [], []
    for depth in range(len(run.blocks) + 1):
        stream = residual_stream(run, depth)
        if positions is not None:
            stream = stream[:, positions]
        logits = run.unembed(run.ln_final(stream))
        top = logits.softmax(-1).topk(k)
        tokens.append(top.indices)
        probabilities.append(top.values)
        if target is not None:
            ranks.append(token_rank(logits, target))
    return LogitLens(ops.stack(tokens), ops.stack(probabilities), ops.stack(ranks) if ranks else None)


def token_rank(logits: Proxy, token: int) -> Proxy:
    """How many tokens have a higher logit than `token`: [...] int64 for logits [..., vocabulary]; 0 is first place."""
    rank: Proxy = (logits > logits[..., token : token + 1]).count_nonzero(axis=-1)
    return rank


def logit_difference(run: Run, token: int, other: int, *, position: int = -1) -> Proxy:
    """How much likelier `token` is than `other`, in logits, averaged over the rows; a scalar."""
    logits = run.logits[:, position]
    difference: Proxy = (logits[:, token] - logits[:, other]).mean()
    return difference
