"""Five experiments inside a language model that runs somewhere else.

``make demo`` starts a service and runs this file against it. By hand, against any service that hosts the demo model::

    PATCHBAY_URL=localhost:9000 python examples/demo.py --report demo-report.html

Each experiment is one function, written to be read: it builds a graph with ordinary Python, sends it, and gets back
only the tensors that it asked for. What it states in the end is put together from those numbers and checked; the exit
status is 0 only when every check holds. Needs ``pip install 'patchbay[plots]'``: no torch, no weights and no GPU on
this side."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np

import patchbay as pb
from patchbay import methods, plots

PROMPT = "The capital of {} is"
SUBJECT, ANSWER = "France", "Paris"
OTHER_SUBJECT, OTHER_ANSWER = "Italy", "Rome"

#: Single words of the demo model's vocabulary, for random sequences.
WORDS = (
    "river mountain forest village bridge lake tower field island road store park school office library market station "
    "beach hospital church museum restaurant theatre garden bank hotel airport cinema harbour castle drink book ring "
    "letter bag ticket flower key cake map coin ball pen cup hat basket knife present necklace candle"
).split()

GLAD = "happy glad delighted pleased cheerful joyful thrilled proud".split()
SAD = "sad angry upset disappointed bored miserable annoyed unhappy".split()


# ----------------------------------------------------------------------------------------------------------------------
def logit_lens(model: pb.Model, book: plots.Logbook) -> None:
    """What would the model say if it stopped after each layer?"""
    prompt = PROMPT.format(SUBJECT)
    book.section(
        "Logit lens",
        f"What would the model say after {prompt!r} if it stopped after each layer? The residual stream after every "
        "layer is put through the model's own final norm and unembedding.",
    )
    answer = model.token_id(ANSWER)

    with model.trace(prompt) as run:
        lens = methods.logit_lens(run, target=answer)
        run.save(tokens=lens.tokens, probabilities=lens.probabilities, ranks=lens.ranks)

    tokens = run.results["tokens"][:, 0, :, 0]  # [depth, position]: the likeliest token
    probabilities = run.results["probabilities"][:, 0, :, 0]  # [depth, position]: its probability
    places = run.results["ranks"][:, 0, -1] + 1  # [depth]: the answer's place at the last position
    depths = methods.lens_labels(model.card.n_layers)
    words = [model.token_strings(row) for row in tokens]
    title = "The likeliest next token at every layer and position"
    book.show(plots.token_table(words, probabilities, run.tokens[0].strings, depths, title, highlight=[ANSWER]))
    book.table(["", *depths], [[f"place of {ANSWER}", *places]])
    book.details("The graph that was sent", str(run.graph))
    book.usage(run.trace)

    first = next((depth for depth in range(len(places)) if (places[depth:] == 1).all()), None)
    if first is None:
        book.finding(f"{ANSWER} ends in place {places[-1]} of {model.card.d_vocab}, not first.", passed=False)
    else:
        book.finding(
            f"{ANSWER} starts in place {places[0]} of {model.card.d_vocab}, is first from {depths[first]} on, and "
            f"ends with a probability of {probabilities[-1, -1]:.1%}."
        )


# ----------------------------------------------------------------------------------------------------------------------
def causal_tracing(model: pb.Model, book: plots.Logbook) -> None:
    """Where, and after which layer, does the model hold which country it was asked about?"""
    clean, corrupted = PROMPT.format(SUBJECT), PROMPT.format(OTHER_SUBJECT)
    book.section(
        "Causal tracing",
        f"The model reads {corrupted!r}, but after one layer and at one token its residual stream is replaced by that "
        f"of {clean!r}. Where does this alone make it answer {ANSWER}? One run for every layer and token, all in one "
        "trace: a plain Python double loop.",
    )
    answer, other = model.token_id(ANSWER), model.token_id(OTHER_ANSWER)
    depths = range(model.card.n_layers + 1)

    with model.trace() as t:
        source, base = t.run(clean), t.run(corrupted)
        positions = range(source.seq)
        differences = []
        for depth in depths:
            for position in positions:
                patched = t.run(corrupted)
                stream(patched, depth)[:, position] = stream(source, depth)[:, position]
                differences.append(methods.logit_difference(patched, answer, other))
        t.save(
            patched=pb.ops.stack(differences),
            source=methods.logit_difference(source, answer, other),
            base=methods.logit_difference(base, answer, other),
        )

    grid = t.results["patched"].reshape(len(depths), len(positions))
    recovered = methods.recovered_share(grid, t.results["base"], t.results["source"])
    labels = methods.lens_labels(model.card.n_layers)
    tokens = source.tokens[0].strings
    book.show(
        plots.heatmap(
            recovered,
            x_labels=tokens,
            y_labels=labels,
            title=f"How far one patch moves the answer from {OTHER_ANSWER} to {ANSWER}",
            x_title="patched token",
            scale_title="share of the logit difference",
            scale="sequential",
        )
    )
    book.text(
        f"{len(t.runs)} runs in one trace. Logit of {ANSWER} minus logit of {OTHER_ANSWER}: {t.results['source']:.1f} "
        f"for {SUBJECT}, {t.results['base']:.1f} for {OTHER_SUBJECT}."
    )
    book.usage(t)

    subject, last = source.position(SUBJECT), source.seq - 1
    strongest = recovered.argmax(axis=1)  # [depth]: the token where a patch does most
    early = [depth for depth in depths if strongest[depth] == subject]
    late = [depth for depth in depths if strongest[depth] == last]
    answered = t.results["source"] > 0 > t.results["base"]
    if answered and early and late and max(early) < min(late) and recovered[max(early), subject] > 0.5:
        a, b = max(early), min(late)
        book.finding(
            f"Up to {labels[a]} the answer hangs on the token {tokens[subject]!r} (a patch there goes "
            f"{recovered[a, subject]:.0%} of the way to {ANSWER}); from {labels[b]} on it hangs on the last token, "
            f"{tokens[last]!r} ({recovered[b, last]:.0%}). In between, attention has carried the fact across."
        )
    else:
        book.finding("The fact was not seen to move from the country's token to the last one.", passed=False)


def stream(run: pb.Run, depth: int) -> pb.Proxy:
    """The residual stream after `depth` layers: a site, so it can be read and, with an index, written."""
    return run.blocks[0].resid_pre if depth == 0 else run.blocks[depth - 1].resid_post


# ----------------------------------------------------------------------------------------------------------------------
def induction_heads(model: pb.Model, book: plots.Logbook) -> None:
    """Which heads copy what followed the same word before, and what is lost without them?"""
    rows, period = 16, 20
    book.section(
        "Induction heads",
        f"{rows} sequences of {period} random words, each said twice. An induction head looks from a word in the "
        "repeat to what followed the same word the first time, and so knows what comes next. Every head is scored by "
        "the attention that it pays there. Then heads are ablated (their output is set to zero), each choice in a run "
        "of its own: the best one, a random one and, where several score at least half of the best, all of those and "
        "as many random others.",
    )
    rng = random.Random(0)
    texts = [" ".join(rng.sample(WORDS, period) * 2) for _ in range(rows)]
    start = len(model.tokenize(texts[0])) - 2 * period  # tokens before the sequence, such as <bos>

    with model.trace(texts) as run:
        scores = methods.induction_scores(run, period, start=start).save()

    grid = scores.value  # [layer, head]
    book.show(plots.head_grid(grid, "Attention paid to what followed the same word the first time"))
    ranked = sorted(np.ndindex(*grid.shape), key=lambda head: grid[head], reverse=True)
    found = [head for head in ranked if grid[head] >= grid.max() / 2]
    others = ranked[len(found) :]
    choices = {
        "nothing": [],
        "the best": ranked[:1],
        "a random one": rng.sample(others, 1),
    }
    if len(found) > 1:  # heads that do the same work back each other up
        choices[f"all {len(found)} that score"] = found
        choices[f"{len(found)} random others"] = rng.sample(others, min(len(found), len(others)))

    with model.trace() as t:
        for name, heads in choices.items():
            ablated = t.run(texts)
            for layer, head in heads:
                methods.ablate_head(ablated, layer, head)
            accuracy = methods.copying_accuracy(ablated, period, start=start)
            probability = methods.copying_probability(ablated, period, start=start)
            t.save(**{name: (accuracy, probability)})

    copied, sure = ([float(t.results[name][i]) for name in choices] for i in (0, 1))
    shown = [", ".join(f"{layer}.{head}" for layer, head in heads) for heads in choices.values()]
    book.table(
        ["ablated", "layer.head", "words copied", "probability of the right word"],
        [[name, heads, f"{a:.1%}", f"{p:.1%}"] for name, heads, a, p in zip(choices, shown, copied, sure, strict=True)],
    )
    book.usage(run.trace, t)
    finding = (
        f"Layer {ranked[0][0]}, head {ranked[0][1]} pays {grid.max():.0%} of its attention to the right place. The "
        f"model copies {copied[0]:.0%} of the words; without this head {copied[1]:.0%} (and it is {sure[1]:.1%} sure "
        f"instead of {sure[0]:.1%}), without a random one {copied[2]:.0%}."
    )
    if len(found) > 1:
        finding += (
            f" Without all {len(found)} heads that score it copies {copied[3]:.0%}, without as many random others "
            f"{copied[4]:.0%}."
        )
    without, control = copied[-2:]  # all that score, whether one or several; as many others
    book.finding(finding, passed=copied[0] > 0.9 and sure[1] < sure[0] and without < 0.5 * copied[0] < control)


# ----------------------------------------------------------------------------------------------------------------------
def steering(model: pb.Model, book: plots.Logbook) -> None:
    """Does one direction in the residual stream decide whether a text goes on gladly or sadly?"""
    prompt = "I watched the film and it was terrible. I felt"
    example = "I read the story and it was {}. I felt"
    good = ["wonderful", "great", "excellent", "lovely", "amazing", "brilliant", "fantastic", "superb"]
    bad = ["terrible", "awful", "horrible", "bad", "dreadful", "boring", "dull", "nasty"]
    layer = 1
    book.section(
        "Steering",
        f"The mean residual stream after layer {layer} over {len(good)} kind judgements of a story, minus the mean "
        f"over {len(bad)} harsh ones, is a direction. It is added at the last token of {prompt!r}.",
    )
    with model.trace() as t:
        kind, harsh = (t.run([example.format(word) for word in words]) for words in (good, bad))
        streams = [run.blocks[layer].resid_post[:, -1] for run in (kind, harsh)]  # [word, d_model] each
        t.save(direction=methods.difference_in_means(*streams))
    direction = t.results["direction"]  # [d_model]
    traces = [t]

    end = len(model.tokenize(prompt)) - 1

    def steer(run: pb.Run, scale: float = 1.0) -> None:
        methods.add_direction(run, layer, direction, scale, positions=end)

    glad, sad = ([model.token_id(word) for word in words] for words in (GLAD, SAD))
    scales = [-1.0, 0.0, 0.5, 1.0]
    with model.trace() as t:
        rows = []
        for scale in scales:
            run = t.run(prompt)
            steer(run, scale)
            p = run.logits[0, -1].softmax(-1)
            rows.append(pb.ops.stack([p[glad].sum(), p[sad].sum()]))
        t.save(shares=pb.ops.stack(rows))
    shares = t.results["shares"]  # [scale, glad or sad]
    traces.append(t)
    book.table(
        ["times the direction", "P(a glad word)", "P(a sad word)"],
        [[f"{scale:g}", f"{a:.1%}", f"{b:.1%}"] for scale, (a, b) in zip(scales, shares, strict=True)],
    )

    with model.trace() as t:
        plain, steered = (t.generate(prompt, max_new_tokens=12, stop=".") for _ in range(2))
        steered.prefill.blocks[layer].resid_post[:, end] += direction
    traces.append(t)
    before, after = plain.text, steered.text
    book.table(["", f"{prompt} ..."], [["as it is", before], ["steered", after]])
    book.usage(*traces)
    by_scale = dict(zip(scales, shares, strict=True))
    book.finding(
        f"Left alone the model goes on {before!r}; steered it goes on {after!r}. The probability of a glad word rises "
        f"from {by_scale[0.0][0]:.1%} to {by_scale[1.0][0]:.1%}, that of a sad one falls from {by_scale[0.0][1]:.1%} "
        f"to {by_scale[1.0][1]:.1%}.",
        passed=plain.output.strings[0] in SAD and steered.output.strings[0] in GLAD,
    )


# ----------------------------------------------------------------------------------------------------------------------
def mistake(model: pb.Model, book: plots.Logbook) -> None:
    """What happens when shapes do not fit?"""
    width = model.card.d_model
    book.section(
        "A mistake, on purpose",
        f"{width + 1} numbers are written where the residual stream has {width}. Every shape is known on this side, so "
        "the mistake is reported at its own line, before anything is sent.",
    )
    model.tokenize(PROMPT.format(SUBJECT))  # known already, so that nothing is sent for the tokens either
    message, line = "nothing was raised", 0
    try:
        with model.trace(PROMPT.format(SUBJECT)) as run:
            run.blocks[1].resid_post[:, -1] = np.zeros(width + 1, dtype=np.float32)  # the mistake
            run.logits.save()
    except pb.errors.ShapeError as error:
        message = f"ShapeError: {error}"
        line = error.__traceback__.tb_lineno if error.__traceback__ else 0

    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    book.code(f"{Path(__file__).name}, line {line}\n    {source[line - 1].strip()}\n{message}")
    book.usage(run.trace)
    book.finding(
        f"Line {line} is named, the one with the mistake, and {run.trace.sent_bytes} bytes were sent.",
        passed="# the mistake" in source[line - 1] and run.trace.sent_bytes == 0,
    )


# ----------------------------------------------------------------------------------------------------------------------
def main() -> int:
    """Run the experiments; returns the exit status."""
    parser = argparse.ArgumentParser(description="Five experiments inside a model that runs somewhere else.")
    parser.add_argument("--url", help="address of the service (default: PATCHBAY_URL, else localhost:9000)")
    parser.add_argument("--model", default="demo", help="name of the model (default: %(default)s)")
    parser.add_argument("--report", default="demo-report.html", help="where the report goes (default: %(default)s)")
    args = parser.parse_args()

    start = time.perf_counter()
    with pb.connect(args.url) as client:
        model = client.model(args.model)
        card = model.card
        book = plots.Logbook(
            "Five experiments inside a model that runs somewhere else",
            f"{card.name!r} is a {card.family} of {card.n_params:,} parameters: {card.n_layers} layers of "
            f"{card.n_heads} heads, d_model {card.d_model}, {card.d_vocab} tokens. It ran in a service; the side that "
            "wrote this page held no weights and sent no code, only graphs.",
        )
        for experiment in (logit_lens, causal_tracing, induction_heads, steering, mistake):
            experiment(model, book)
    book.summary()
    book.write(
        args.report, f"Patchbay {pb.__version__}. All experiments together: {time.perf_counter() - start:.1f} s."
    )
    return 0 if book.all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
