"""Every method against the same thing by hand in plain PyTorch, on tiny random models of both families."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

import patchbay as pb
from patchbay import methods
from tests import tiny

FAMILIES = ["gpt2", "llama"]
CLEAN = [3, 9, 4, 17, 5, 8]
OTHER = [3, 9, 4, 21, 5, 8]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Lab:
    """A model behind Patchbay, and its untouched twin."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model = pb.local(tiny.build(family))
        self.plain = tiny.build(family, attention="eager")
        self.places = tiny.places(family)

    @torch.no_grad()
    def logits(self, ids: list[list[int]], edits: list[tuple[str, tiny.Edit]] | None = None) -> np.ndarray:
        return tiny.run_hooked(self.plain, self.places, torch.tensor(ids), edits or [], "logits").numpy()

    @torch.no_grad()
    def read(self, site: str, ids: list[list[int]]) -> torch.Tensor:
        return tiny.run_hooked(self.plain, self.places, torch.tensor(ids), [], site)

    @torch.no_grad()
    def attentions(self, ids: list[list[int]]) -> np.ndarray:
        """[layers, rows, heads, query, key]."""
        return torch.stack(self.plain(torch.tensor(ids), output_attentions=True).attentions).numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def lab(request: pytest.FixtureRequest) -> Lab:
    return Lab(request.param)


def test_logit_lens_reads_every_depth_through_norm_and_unembedding(lab: Lab) -> None:
    """Tokens, probabilities and ranks equal the final norm and unembedding applied by hand to each hidden state."""
    with lab.model.trace([CLEAN, OTHER]) as run:
        lens = methods.logit_lens(run, k=3, target=7)
        run.save(tokens=lens.tokens, probabilities=lens.probabilities, ranks=lens.ranks)
    core = lab.plain.get_submodule("transformer" if lab.family == "gpt2" else "model")
    norm = core.get_submodule("ln_f" if lab.family == "gpt2" else "norm")
    streams = [lab.read("blocks.0.resid_pre", [CLEAN, OTHER])]
    streams += [lab.read(f"blocks.{i}.resid_post", [CLEAN, OTHER]) for i in range(tiny.N_LAYERS)]
    with torch.no_grad():
        logits = torch.stack([lab.plain.lm_head(norm(s)) for s in streams])  # [depth, row, position, word]
    top = logits.softmax(-1).topk(3)
    assert run.results["tokens"].shape == (tiny.N_LAYERS + 1, 2, 6, 3)
    np.testing.assert_array_equal(run.results["tokens"], top.indices.numpy())
    np.testing.assert_allclose(run.results["probabilities"], top.values.numpy(), **CLOSE)
    by_hand = (logits > logits[..., 7:8]).sum(-1).numpy()
    np.testing.assert_array_equal(run.results["ranks"], by_hand)


def test_logit_lens_of_some_positions(lab: Lab) -> None:
    """With positions given, only these are read, and without a target there are no ranks."""
    with lab.model.trace([CLEAN]) as run:
        whole = methods.logit_lens(run)
        part = methods.logit_lens(run, positions=[1, -1])
        run.save(whole=whole.tokens, part=part.tokens)
    assert part.ranks is None
    np.testing.assert_array_equal(run.results["part"], run.results["whole"][:, :, [1, -1]])
    assert methods.lens_labels(2) == ["embedding", "layer 0", "layer 1"]


def test_logit_difference_is_of_the_last_position_and_averaged(lab: Lab) -> None:
    """The difference of two tokens' logits at the last position, averaged over rows."""
    with lab.model.trace([CLEAN, OTHER]) as run:
        difference = methods.logit_difference(run, 5, 11).save()
    logits = lab.logits([CLEAN, OTHER])[:, -1]
    np.testing.assert_allclose(difference.value, (logits[:, 5] - logits[:, 11]).mean(), **CLOSE)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "attn_out", "attn.z"])
def test_activation_patching_equals_hooks(lab: Lab, site: str) -> None:
    """Each cell is the metric of a forward in which a hook puts the source's value at that layer and position."""
    layers, positions = [0, 2], [1, 3, 5]
    with lab.model.trace() as t:
        source = t.run([CLEAN])
        grid = methods.activation_patching(
            t,
            source,
            [OTHER],
            lambda run: methods.logit_difference(run, 5, 11),
            site=site,
            layers=layers,
            positions=positions,
        )
        t.save(grid=grid)
    by_hand = np.empty((len(layers), len(positions)))
    for i, layer in enumerate(layers):
        name = f"blocks.{layer}.{site}"
        value = lab.read(name, [CLEAN])
        for j, position in enumerate(positions):

            def put(at: torch.Tensor, position: int = position, value: torch.Tensor = value) -> None:
                at[:, position] = value[:, position]

            logits = lab.logits([OTHER], [(name, put)])[0, -1]
            by_hand[i, j] = logits[5] - logits[11]
    np.testing.assert_allclose(t.results["grid"], by_hand, **CLOSE)


@pytest.mark.parametrize("site", ["resid_post", "attn.z"])
def test_attribution_patching_is_the_first_order_of_patching(lab: Lab, site: str) -> None:
    """The metric moves as much as it says, for a small step of plain hooks towards the source at each position."""
    layers, step = [0, 2], 0.01
    with lab.model.trace() as t:
        source, base = t.run([CLEAN]), t.run([OTHER])
        guess = methods.attribution_patching(
            source, base, methods.logit_difference(base, 5, 11), site=site, layers=layers
        )
        t.save(guess=guess)
    assert t.results["guess"].shape == (2, len(CLEAN))
    name = f"blocks.2.{site}"
    theirs, mine = lab.read(name, [CLEAN]), lab.read(name, [OTHER])
    for position in range(len(CLEAN)):
        moved = []
        for sign in (-1, 1):

            def towards(at: torch.Tensor, position: int = position, sign: int = sign) -> None:
                at[:, position] += sign * step * (theirs - mine)[:, position]

            logits = lab.logits([OTHER], [(name, towards)])[0, -1].astype("float64")
            moved.append(logits[5] - logits[11])
        slope = (moved[1] - moved[0]) / (2 * step)
        np.testing.assert_allclose(t.results["guess"][1, position], slope, rtol=1e-2, atol=1e-4)


def test_activation_patching_covers_every_layer_and_position_by_default(lab: Lab) -> None:
    """Without layers and positions the grid has all; the last layer's last position carries everything over."""
    with lab.model.trace() as t:
        source, base = t.run([CLEAN]), t.run([OTHER])

        def metric(run: pb.Run) -> pb.Proxy:
            return methods.logit_difference(run, 5, 11)

        grid = methods.activation_patching(t, source, [OTHER], metric)
        t.save(share=methods.recovered_share(grid, metric(base), metric(source)))
    share = t.results["share"]
    assert share.shape == (tiny.N_LAYERS, len(CLEAN))
    np.testing.assert_allclose(share[-1, -1], 1.0, rtol=1e-3)
    np.testing.assert_allclose(share[-1, :-1], 0.0, atol=1e-3)
    np.testing.assert_allclose(share[:, :3], 0.0, atol=1e-3)  # the same tokens so far, so the same values


def test_induction_scores_equal_attention_by_hand(lab: Lab) -> None:
    """The mean attention from each token of the second copy to the token after its first occurrence."""
    rng = np.random.default_rng(0)
    period, rows = 7, [[1, *s, *s] for s in rng.permuted(np.tile(np.arange(2, 30), (3, 1)), axis=1)[:, :7].tolist()]
    with lab.model.trace(rows) as run:
        scores = methods.induction_scores(run, period, start=1).save()
    patterns = lab.attentions(rows)
    by_hand = np.mean([patterns[..., q, q - period + 1] for q in range(1 + period, 1 + 2 * period)], axis=0).mean(1)
    assert scores.value.shape == (tiny.N_LAYERS, tiny.N_HEADS)
    np.testing.assert_allclose(scores.value, by_hand, **CLOSE)


def test_previous_token_scores_equal_attention_by_hand(lab: Lab) -> None:
    """The mean attention from each token to the one before it."""
    with lab.model.trace([CLEAN, OTHER]) as run:
        scores = methods.previous_token_scores(run).save()
    patterns = lab.attentions([CLEAN, OTHER])
    by_hand = np.mean([patterns[..., q, q - 1] for q in range(1, 6)], axis=0).mean(1)
    np.testing.assert_allclose(scores.value, by_hand, **CLOSE)


def test_induction_scores_need_a_second_copy(lab: Lab) -> None:
    """A run too short for two copies is refused before anything is built."""
    with pytest.raises(ValueError, match="no second copy"), lab.model.trace([CLEAN]) as run:
        methods.induction_scores(run, 6)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_ablate_head_equals_a_hook(lab: Lab, kind: str) -> None:
    """The head's z is replaced by zero, by a given vector, or by another run's z; nothing else changes."""
    layer, head = 1, 2
    name = f"blocks.{layer}.attn.z"
    mean = np.linspace(-1, 1, tiny.D_HEAD, dtype=np.float32)
    with lab.model.trace() as t:
        run, other = t.run([CLEAN]), t.run([OTHER])
        values = {"zero": 0.0, "mean": mean, "resample": other.blocks[layer].attn.z[:, :, head]}
        methods.ablate_head(run, layer, head, values[kind])
        t.save(logits=run.logits)
    by_hand = {"zero": 0.0, "mean": torch.from_numpy(mean), "resample": lab.read(name, [OTHER])[:, :, head]}

    def put(z: torch.Tensor) -> None:
        z[:, :, head] = by_hand[kind]

    np.testing.assert_allclose(t.results["logits"], lab.logits([CLEAN], [(name, put)]), **CLOSE)


def test_copying_accuracy_counts_right_guesses_of_the_second_copy(lab: Lab) -> None:
    """The share of positions in the second copy whose likeliest next token is the one that comes."""
    rows = [[1, 4, 9, 6, 4, 9, 6], [1, 8, 2, 3, 8, 2, 3]]
    with lab.model.trace(rows) as run:
        share = methods.copying_accuracy(run, 3, start=1).save()
    guesses = lab.logits(rows).argmax(-1)[:, 4:6]
    np.testing.assert_allclose(share.value, (guesses == np.array(rows)[:, 5:7]).mean(), **CLOSE)


def test_copying_probability_is_that_of_the_right_tokens(lab: Lab) -> None:
    """The mean probability, over the second copy, of the token that comes."""
    rows = [[1, 4, 9, 6, 4, 9, 6], [1, 8, 2, 3, 8, 2, 3]]
    with lab.model.trace(rows) as run:
        mean = methods.copying_probability(run, 3, start=1).save()
    probabilities = torch.from_numpy(lab.logits(rows)).softmax(-1)[:, 4:6]
    by_hand = probabilities.gather(-1, torch.tensor(rows)[:, 5:7, None]).mean()
    np.testing.assert_allclose(mean.value, by_hand, **CLOSE)


def test_copying_accuracy_refuses_rows_that_do_not_repeat(lab: Lab) -> None:
    """Rows that are not two copies are a mistake of the caller, and said to be one."""
    with pytest.raises(ValueError, match="do not repeat"), lab.model.trace([CLEAN]) as run:
        methods.copying_accuracy(run, 3)


def test_difference_in_means_takes_values_and_arrays(lab: Lab) -> None:
    """The same numbers whether the means are taken inside the trace or of saved arrays."""
    with lab.model.trace() as t:
        a, b = (t.run(rows).blocks[1].resid_post[:, -1] for rows in ([CLEAN, OTHER], [CLEAN[::-1]]))
        t.save(a=a, b=b, direction=methods.difference_in_means(a, b))
    by_hand = methods.difference_in_means(t.results["a"], t.results["b"])
    assert by_hand.shape == (tiny.D_MODEL,)
    np.testing.assert_allclose(t.results["direction"], by_hand, **CLOSE)


DIRECTION = np.linspace(-1, 1, tiny.D_MODEL, dtype=np.float32)


def _add(at: torch.Tensor) -> None:
    at[:, 2:] += torch.from_numpy(DIRECTION) * -2.5


def _remove(at: torch.Tensor) -> None:
    unit = torch.from_numpy(DIRECTION) / torch.from_numpy(DIRECTION).norm()
    at[:] -= (at @ unit)[..., None] * unit


@pytest.mark.parametrize(
    ("change", "hook"),
    [
        (lambda run: methods.add_direction(run, 1, DIRECTION, -2.5, positions=slice(2, None)), _add),
        (lambda run: methods.remove_direction(run, 1, DIRECTION), _remove),
    ],
    ids=["add", "remove"],
)
def test_directions_equal_hooks(lab: Lab, change: Callable[[pb.Run], None], hook: tiny.Edit) -> None:
    """Adding a direction, and taking it out, give the logits of a forward with a hook that does so."""
    with lab.model.trace([CLEAN, OTHER]) as run:
        change(run)
        logits = run.logits.save()
        stream = run.blocks[1].resid_post.save()
    np.testing.assert_allclose(logits.value, lab.logits([CLEAN, OTHER], [("blocks.1.resid_post", hook)]), **CLOSE)
    if hook is _remove:
        np.testing.assert_allclose(stream.value @ DIRECTION, 0.0, atol=1e-5)


def test_greedy_continuation_equals_generate(lab: Lab) -> None:
    """Without a change the tokens are those of transformers' greedy generation; every trace is reported."""
    seen: list[object] = []
    ids = methods.continue_greedily(lab.model, CLEAN, 6, on_trace=seen.append)
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    config.eos_token_id = None
    whole = lab.plain.generate(torch.tensor([CLEAN]), generation_config=config)
    assert ids == whole[0, len(CLEAN) :].tolist()
    assert len(seen) == 6


def test_greedy_continuation_under_a_change(lab: Lab) -> None:
    """The change is made in every run: forcing the logits forces the tokens."""

    def force(run: pb.Run) -> None:
        run.logits[:, -1, 13] = 1e9

    assert methods.continue_greedily(lab.model, CLEAN, 3, force) == [13, 13, 13]
    assert methods.continue_greedily(lab.model, CLEAN, 3, force, stop=13) == [13]


def test_methods_are_thin_and_load_lazily() -> None:
    """Importing patchbay.methods brings neither torch nor numpy; all its names resolve."""
    code = (
        "import sys, patchbay.methods as m; "
        "early = sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)); "
        "[getattr(m, n) for n in m.__all__]; "
        "print(early, sorted({'torch', 'transformers', 'ray'} & set(sys.modules)), dir(m) == sorted(m.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] [] True"


def test_unknown_method_is_an_attribute_error() -> None:
    """A name that no module has is reported as Python does."""
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        methods.magic  # noqa: B018
