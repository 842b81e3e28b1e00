"""The embedded model's shipped weights do what its card says, and offer what the demo looks for."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from patchbay_server.models.demo import corpus, demo_path, evaluate, experiments, load, tokenizer, train
from patchbay_server.models.demo import words as w

MAX_WEIGHT_BYTES = 6_000_000


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple]:
    """The shipped model and tokenizer; one torch thread, as the small model gains nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def card() -> dict:
    """The shipped card."""
    return json.loads((demo_path() / "card.json").read_text())


@pytest.fixture(scope="module")
def measured(demo: tuple) -> dict[str, float]:
    """Every held-out accuracy, measured anew."""
    return evaluate.accuracies(*demo)


@pytest.mark.parametrize("task", evaluate.REQUIRED)
def test_held_out_accuracy_reaches_what_is_required(measured: dict[str, float], task: str) -> None:
    """The shipped weights solve each task on examples that training never held."""
    assert measured[task] >= evaluate.REQUIRED[task]


def test_card_tells_the_measured_accuracies(measured: dict[str, float], card: dict) -> None:
    """The card's numbers are those of the shipped weights, up to a near-tie that rounding may decide either way."""
    assert card["held_out"].keys() == measured.keys()
    assert measured == pytest.approx(card["held_out"], abs=0.005)


def test_card_tells_size_and_recipe(demo: tuple, card: dict) -> None:
    """The card's parameter count, vocabulary and architecture are those of the shipped weights."""
    model, tok = demo
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["vocabulary"] == len(tok) == model.config.vocab_size
    assert card["recipe"]["n_layers"] == model.config.num_hidden_layers == 4
    assert card["recipe"]["n_heads"] == model.config.num_attention_heads


def test_weights_are_small_and_safe() -> None:
    """The weights are one safetensors file of at most 6 MB, and nothing in the folder is a pickle."""
    files = {path.name: path.stat().st_size for path in demo_path().iterdir()}
    assert files["model.safetensors"] <= MAX_WEIGHT_BYTES
    assert {name.rsplit(".", 1)[-1] for name in files} == {"json", "safetensors"}


def test_loads_like_any_local_folder() -> None:
    """The Auto classes load the folder without a network, in float32 and with a fast tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_path(), local_files_only=True)
    assert model.dtype == torch.float32
    assert type(model).__name__ == "LlamaForCausalLM"
    assert AutoTokenizer.from_pretrained(demo_path(), local_files_only=True).is_fast


def test_importing_the_package_imports_no_torch() -> None:
    """Asking where the model lies costs neither torch nor transformers."""
    program = (
        "import sys; from patchbay_server.models.demo import demo_path; assert demo_path().is_dir();"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_training_holds_nothing_held_out(demo: tuple) -> None:
    """No held-out prompt begins any text of a large sample of the training corpus."""
    _, tok = demo
    alphabet = tokenizer.alphabet(tokenizer.tokens_of(tok))
    trained = "\n".join(itertools.islice(corpus.documents(random.Random(7)), 30_000))
    repeats = set(itertools.islice(corpus.repeats(random.Random(8), alphabet), 5_000))
    for task in evaluate.MEANING:
        examples = corpus.held_out(task, 100, evaluate.SEED, alphabet)
        assert len({example.text for example in examples}) == 100
        for example in examples:
            assert not corpus.may_train(example)
            # The answer belongs to it: "Mary sold" may also go on with "a ticket to"; a year's answer is glued on.
            answer = "" if task == "greater_than" else f" {example.answers[0]}"
            assert example.prompt + answer not in trained
            assert example.text not in repeats


def test_training_meets_every_part_of_what_is_held_out() -> None:
    """What is held out is the combination: its parts all occur in training, new names in other sentences only."""
    rng = random.Random(3)
    kept = [example for example in (corpus.capitals(rng) for _ in range(20_000)) if corpus.may_train(example)]
    openers, cores = zip(*(example.key.split("|") for example in kept if "|" in example.key), strict=True)
    assert set(openers) == set(corpus.CAPITAL_OPENERS[1:])
    assert set(cores) == set(corpus.CAPITAL_CORES)
    assert {example.answers[0] for example in kept} == {capital for capital, _, _ in w.COUNTRIES.values()}
    trained = list(itertools.islice(corpus.documents(random.Random(7)), 30_000))
    for name in w.NEW_NAMES:
        assert any(name in text for text in trained)


def test_the_split_ignores_seed_and_order() -> None:
    """Whether a combination is held out depends on the combination alone."""
    keys = [f"{century}{year:02d}" for century in w.CENTURIES for year in range(2, 98)]
    held = [key for key in keys if corpus.is_held_out("greater_than", key)]
    assert 0.08 < len(held) / len(keys) < 0.16
    assert held == [key for key in keys if corpus.is_held_out("greater_than", key)]
    assert {key[2:] for key in keys} == {key[2:] for key in keys if key not in held}


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", "Paris"),
        ("The capital of Italy is", "Rome"),
        ("  The capital  of Japan is ", "Tokyo"),
        ("What is the capital of Spain? It is", "Madrid"),
        ("When Mary and John went to the store, John gave a drink to", "Mary"),
        ("When Mary and John went to the store , Mary gave a drink to", "John"),
        ("Mary went home because", "she"),
        ("John lost", "his"),
    ],
)
def test_plain_prompts_work_as_typed(demo: tuple, prompt: str, answer: str) -> None:
    """A prompt typed as one writes English, whatever its spacing, gets the right next token."""
    model, tok = demo
    assert tok.convert_ids_to_tokens([int(evaluate.last_logits(model, tok, [prompt]).argmax())]) == [answer]


def test_tokens_are_words_with_offsets(demo: tuple) -> None:
    """Words, punctuation and the halves of a year are tokens after <bos>, each with its place in the text."""
    _, tok = demo
    text = "The war, of course, lasted from 1732 to 17"
    encoded = tok(text, return_offsets_mapping=True)
    tokens = tok.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["<bos>", "The", "war", ",", "of", "course", ",", "lasted", "from", "17", "##32", "to", "17"]
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert pieces == ["", *(token.removeprefix("##") for token in tokens[1:])]


def test_the_shipped_tokenizer_is_the_one_that_training_builds(demo: tuple) -> None:
    """The vocabulary follows from the corpus's seed alone, in the same order."""
    _, tok = demo
    assert tokenizer.tokens_of(tok) == tokenizer.vocabulary()


def test_round_trip_of_the_corpus(demo: tuple) -> None:
    """Decoding gives every training text back, character by character, and none holds an unknown word."""
    _, tok = demo
    texts = list(itertools.islice(corpus.documents(random.Random(11)), 3_000))
    encoded = tok(texts)["input_ids"]
    assert not any(tok.unk_token_id in ids for ids in encoded)
    assert tok.batch_decode(encoded, skip_special_tokens=True) == texts


def test_unknown_words_become_unk(demo: tuple) -> None:
    """A word outside the vocabulary is one <unk>, and its neighbours stay whole."""
    _, tok = demo
    tokens = tok.convert_ids_to_tokens(tok("The capital of Atlantis is")["input_ids"])
    assert tokens == ["<bos>", "The", "capital", "of", "<unk>", "is"]


@pytest.mark.parametrize("start", ["The capital of", "When Mary and", "I watched the film", "The war lasted", "Mary"])
def test_writes_whole_sentences(demo: tuple, start: str) -> None:
    """A greedy continuation ends by itself, on a full stop, in words of the vocabulary."""
    model, tok = demo
    text = experiments.continuation(model, tok, start, 60)
    assert text.endswith((".", "!"))
    assert len(tok(text)["input_ids"]) < 60
    assert "<unk>" not in text


def test_sampled_text_ends_its_sentences(demo: tuple) -> None:
    """Nine of ten freely sampled texts end by themselves within 62 tokens, the longest training text."""
    model, tok = demo
    torch.manual_seed(0)
    ids = torch.full((40, 1), tok.bos_token_id)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=62, do_sample=True, top_k=0)
    ended = sum(tok.eos_token_id in row.tolist() for row in rows)
    assert ended >= 36


def test_a_fact_moves_from_the_subject_to_the_last_token(demo: tuple) -> None:
    """Patching France into Italy works at the country in early layers, at the last token in late ones."""
    shares = experiments.sweep(*demo, "The capital of France is", "The capital of Italy is", "Paris", "Rome")
    assert shares.shape == (4, 6)
    assert shares[0, 4] > 0.8
    assert shares[0, 5] < 0.2
    assert shares[3, 4].abs() < 0.05
    assert shares[3, 5] == pytest.approx(1.0, abs=1e-4)
    assert shares[:, :4].abs().max() < 1e-4


def test_induction_heads_carry_the_copying(demo: tuple) -> None:
    """Without the best induction head copying falls by much; without the median head it hardly changes."""
    model, tok = demo
    ids = experiments.repeated_rows(tok, rows=20, half=20)
    whole = experiments.copying(model, ids)
    scores = experiments.attention_scores(model, ids, 19)
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    without = experiments.ablations(model, ids)
    assert whole > 0.97
    assert scores.max() > 0.5
    assert without[layer, head] < whole - 0.3
    assert without.median() > whole - 0.05


@pytest.mark.parametrize("layer", [1, 2])
def test_a_direction_flips_the_sentiment(demo: tuple, layer: int) -> None:
    """Adding the difference in means at a middle layer makes sad prompts end gladly, subtracting it the reverse."""
    model, tok = demo
    held = corpus.held_out("sentiment", 60, 2)
    direction = 1.5 * experiments.sentiment_direction(model, tok, layer)
    for sign, vector in ((w.SAD, direction), (w.GLAD, -direction)):
        prompts = [example.prompt for example in held if example.answers == sign]
        before = experiments.gladness(model, tok, prompts)
        with experiments.steered(model, layer, vector):
            after = experiments.gladness(model, tok, prompts)
        assert ((before > 0) == (sign == w.GLAD)).float().mean() >= 0.95
        assert ((after > 0) != (sign == w.GLAD)).float().mean() >= 0.9


def test_a_steered_text_stays_english(demo: tuple) -> None:
    """The whole continuation changes its sentiment, feeling and deed, and still ends by itself."""
    model, tok = demo
    prompt = "I watched the film and it was terrible. I felt"
    with experiments.steered(model, 2, 1.5 * experiments.sentiment_direction(model, tok, 2)):
        glad = experiments.continuation(model, tok, prompt)
    sad = experiments.continuation(model, tok, prompt)
    for text, feelings, tails in ((glad, w.GLAD, w.GLAD_TAILS), (sad, w.SAD, w.SAD_TAILS)):
        feeling, tail = text.split(".")[0].split(" and ", 1)
        assert feeling in feelings
        assert tail in tails


def test_packed_documents_see_only_themselves(demo: tuple) -> None:
    """In training, a document gives the same logits in a row shared with others as by itself."""
    model, tok = demo
    documents = train.Encoded(corpus.documents(random.Random(5)), tok, repeats=False)
    packed = train.pack(documents, 1, 128, tok.pad_token_id)
    with torch.no_grad():
        shared = model(packed.ids, attention_mask=packed.mask(), position_ids=packed.positions).logits[0]
        for segment in range(1, int(packed.segments.max()) + 1):
            where = packed.segments[0] == segment
            alone = model(packed.ids[:, where]).logits[0]
            assert torch.allclose(shared[where], alone, atol=1e-4)
    assert packed.segments.max() >= 2


def test_training_is_the_same_each_time(demo: tuple) -> None:
    """Two short trainings from one seed, all phases, end in the same weights bit for bit; another seed does not."""
    _, tok = demo
    short = {"steps_repeats": 2, "steps_mixed": 2, "steps_settling": 2, "rows": 8, "settling_rows": 8, "threads": 1}

    def trained(seed: int) -> torch.Tensor:
        recipe = train.Recipe(seed=seed, d_model=32, d_mlp=32, **short)
        model = train.settle_down(train.learn(recipe, tok), recipe, tok)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    once = trained(1)
    assert torch.equal(once, trained(1))
    assert not torch.equal(once, trained(2))


def test_no_hook_stays_behind(demo: tuple) -> None:
    """After the experiments above the model gives the very same logits as a freshly loaded one."""
    model, tok = demo
    fresh, _ = load()
    prompts = ["The capital of France is", "I watched the film and it was terrible. I felt"]
    assert torch.equal(evaluate.last_logits(model, tok, prompts), evaluate.last_logits(fresh, tok, prompts))
