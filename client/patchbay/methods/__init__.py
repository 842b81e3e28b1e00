"""What the field does, as functions that build graphs.

Each takes runs and values of an open trace and returns values of that trace; nothing is sent before the trace ends, and
several methods may share one::

    with model.trace() as t:
        run = t.run("The capital of France is")
        lens = methods.logit_lens(run)
        t.save(tokens=lens.tokens, heads=methods.previous_token_scores(run))

    adapters.py  low-rank adapters (LoRA) as edits of a model
    lens.py      logit lens, the rank of a token, a difference of logits
    patching.py  activation patching, how much of an effect a patch recovers, attribution patching
    heads.py     scores of attention heads, ablation of heads
    fitting.py   gradient descent, logistic probes and k-means, in loops that the server runs
    features.py  an input that excites a channel, by climbing gradients
    steering.py  directions from differences of means, adding and removing them, greedy continuations

Those over a whole data set take the model and stream its rows (`Model.map`)::

    direction = methods.mean_difference(model, rows, "blocks.2.resid_post", last=True)

    corpus.py    activations harvested, means, differences of means, principal components, maximally activating examples
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbay.methods.adapters import lora
    from patchbay.methods.corpus import (
        Example,
        harvest,
        max_activating_examples,
        mean_activations,
        mean_difference,
        principal_components,
    )
    from patchbay.methods.features import Visualization, feature_visualization
    from patchbay.methods.fitting import Clusters, Probe, descend, k_means, logistic_probe
    from patchbay.methods.heads import (
        ablate_head,
        copying_accuracy,
        copying_probability,
        induction_scores,
        previous_token_scores,
    )
    from patchbay.methods.lens import LogitLens, lens_labels, logit_difference, logit_lens, residual_stream, token_rank
    from patchbay.methods.patching import activation_patching, attribution_patching, recovered_share
    from patchbay.methods.steering import add_direction, continue_greedily, difference_in_means, remove_direction

_HOME = {
    "Clusters": "fitting",
    "Example": "corpus",
    "LogitLens": "lens",
    "Probe": "fitting",
    "Visualization": "features",
    "ablate_head": "heads",
    "activation_patching": "patching",
    "add_direction": "steering",
    "attribution_patching": "patching",
    "continue_greedily": "steering",
    "copying_accuracy": "heads",
    "copying_probability": "heads",
    "descend": "fitting",
    "difference_in_means": "steering",
    "feature_visualization": "features",
    "harvest": "corpus",
    "induction_scores": "heads",
    "k_means": "fitting",
    "lens_labels": "lens",
    "logistic_probe": "fitting",
    "logit_difference": "lens",
    "logit_lens": "lens",
    "lora": "adapters",
    "max_activating_examples": "corpus",
    "mean_activations": "corpus",
    "mean_difference": "corpus",
    "previous_token_scores": "heads",
    "principal_components": "corpus",
    "recovered_share": "patching",
    "remove_direction": "steering",
    "residual_stream": "lens",
    "token_rank": "lens",
}

__all__ = [
    "Clusters",
    "Example",
    "LogitLens",
    "Probe",
    "Visualization",
    "ablate_head",
    "activation_patching",
    "add_direction",
    "attribution_patching",
    "continue_greedily",
    "copying_accuracy",
    "copying_probability",
    "descend",
    "difference_in_means",
    "feature_visualization",
    "harvest",
    "induction_scores",
    "k_means",
    "lens_labels",
    "logistic_probe",
    "logit_difference",
    "logit_lens",
    "lora",
    "max_activating_examples",
    "mean_activations",
    "mean_difference",
    "previous_token_scores",
    "principal_components",
    "recovered_share",
    "remove_direction",
    "residual_stream",
    "token_rank",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
