"""The synthetic English that the embedded model is trained on, and the held-out prompts that it is judged on.

One generator per task yields `Example`s; the training corpus and the held-out prompts come from the same generators
and differ only in which side of a split they take. A split is a pure function of the combination that is new
(`is_held_out`), so that no held-out combination can slip into training by a change of seed, order or size.

What is new in a held-out example:

==================  =====================================================================================
capitals            the template, an opener with a core; every fact occurs in other templates
indirect_objects    the unordered pair of names (and `new_names`: names never met in such a sentence)
induction           the sequence of words
greater_than        the starting year, a century with a year of it
pronouns            the name with the action, the loss or the profession that it is met with
sentiment           the thing with the adjective
==================  =====================================================================================
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from patchbay_server.models.demo import words as w

TASKS: tuple[str, ...] = ("capitals", "indirect_objects", "induction", "greater_than", "pronouns", "sentiment")


@dataclass(frozen=True)
class Example:
    """A sentence or two of one task.

    `text` is the whole of it and starts with `prompt`; `answers` are the tokens that may rightly follow the prompt and
    `wrong` those of the opposite answer (empty where there is no single opposite); `key` names the combination that the
    split is made on.
    """

    task: str
    key: str
    prompt: str
    text: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...] = ()


def is_held_out(task: str, key: str, percent: int = 12) -> bool:
    """Whether a combination belongs to the held-out side; depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(f"{task}|{key}".encode()).digest()[:4], "big") % 100 < percent


def article(noun: str) -> str:
    """A noun phrase with its indefinite article: ``a book``, ``an empire``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalised(sentence: str) -> str:
    """The sentence with its first letter in upper case."""
    return sentence[0].upper() + sentence[1:]


CAPITAL_OPENERS: tuple[str, ...] = (
    "",
    "everyone knows that",
    "I think that",
    "I am sure that",
    "my teacher said that",
    "we learned that",
    "the book says that",
    "the map shows that",
    "it is true that",
    "as you know,",
    "in school, we learned that",
    "{name} knows that",
    "{name} told me that",
    "{name} asked, and I said that",
)
CAPITAL_CORES: tuple[str, ...] = (
    "the capital of {country} is",
    "the capital city of {country} is",
    "the capital of the country {country} is",
    "{country} has a capital called",
    "the seat of government of {country} is",
    "the government of {country} meets in",
    "if you visit {country}, the capital is",
)


def capitals(rng: random.Random) -> Example:
    """A country's capital, asked for by an opener and a core: "We learned that the capital of Peru is" -> "Lima"."""
    opener, core = rng.choice(CAPITAL_OPENERS), rng.choice(CAPITAL_CORES)
    country, (capital, _, _) = rng.choice(tuple(w.COUNTRIES.items()))
    stem = f"{opener} {core}".strip().format(country=country, name=rng.choice(w.WOMEN + w.MEN))
    prompt = capitalised(stem)
    tail = rng.choice((".", ".", ".", ", and it is a big city.", ", of course."))
    # Without an opener a template is never new: these are what a user types first.
    key = f"{opener}|{core}" if opener else "trained"
    return Example("capitals", key, prompt, f"{prompt} {capital}{tail}", (capital,))


def facts(rng: random.Random) -> Example:
    """What else is said of a country: its capital the other way round, questions, its language, its continent."""
    country, (capital, language, continent) = rng.choice(tuple(w.COUNTRIES.items()))
    name = rng.choice(w.WOMEN + w.MEN)
    choices = [
        f"{capital} is the capital of {country}.",
        f"{capital} is a city in {country}.",
        f"{name} lives in {capital}, the capital of {country}.",
        f"{name} travelled to {country} and stayed in {capital}.",
        f"What is the capital of {country}? It is {capital}.",
        f"What is the capital of {country}? The answer is {capital}.",
    ]
    if language:
        choices += [f"The people of {country} speak {language}.", f"The language of {country} is {language}."]
    if continent:
        choices += [f"{country} is a country in {continent}.", f"The country of {country} lies in {continent}."]
    text = rng.choice(choices)
    return Example("facts", "trained", text, text, ())


INDIRECT_SETTINGS: tuple[str, ...] = (
    "When {a} and {b} went to the {place}, {s}",
    "After {a} and {b} went to the {place}, {s}",
    "While {a} and {b} were at the {place}, {s}",
    "When {a} and {b} met at the {place}, {s}",
    "Then, {a} and {b} went to the {place}, and {s}",
    "{a} and {b} were at the {place}. Then {s}",
    "{a} and {b} had a long talk at the {place}, and {s}",
    "One day, {a} met {b} at the {place}, and {s}",
)


def indirect_objects(rng: random.Random, names: tuple[str, ...] = w.WOMEN + w.MEN) -> Example:
    """Who is given something: "When Mary and John went to the store, John gave a drink to" -> "Mary".

    After Wang et al. 2022, "Interpretability in the Wild" (IOI), with the giver named first or second equally often.
    """
    a, b = rng.sample(names, 2)
    giver, receiver = (a, b) if rng.random() < 0.5 else (b, a)
    setting = rng.choice(INDIRECT_SETTINGS).format(a=a, b=b, s=giver, place=rng.choice(w.PLACES))
    prompt = f"{setting} {rng.choice(w.GIVING)} {article(rng.choice(w.GIFTS))} to"
    tail = rng.choice((".", ".", f". {receiver} thanked {giver}.", f". {receiver} said thank you."))
    pair = "+".join(sorted((a, b)))
    return Example("indirect_objects", pair, prompt, f"{prompt} {receiver}{tail}", (receiver,), (giver,))


def induction(rng: random.Random, alphabet: tuple[str, ...], length: int | None = None) -> Example:
    """A sequence of different random words, twice; `prompt` is the first half.

    After Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    sequence = rng.sample(alphabet, length or rng.randint(6, 31))
    half = " ".join(sequence)
    return Example("induction", half, half, f"{half} {half}", tuple(sequence))


YEAR_TEMPLATES: tuple[str, ...] = (
    "The {noun} lasted from the year {start} to the year {century}",
    "The {noun} lasted from {start} to {century}",
    "The {noun} began in {start} and ended in {century}",
    "The {noun} started in the year {start} and ended in the year {century}",
    "The {noun} went on from {start} until {century}",
    "{name} was born in {start} and died in {century}",
)


def greater_than(rng: random.Random) -> Example:
    """An end that follows its start: "The war lasted from the year 1732 to the year 17" -> a year from 33 to 99.

    After Hanna et al. 2023, "How does GPT-2 compute greater-than?". Ends are the likelier the further they lie from the
    start, as a war of one year is rarer than one of many.
    """
    century, start = rng.choice(w.CENTURIES), rng.randint(2, 97)
    valid = range(start + 1, 100)
    (end,) = rng.choices(valid, weights=[year - start for year in valid])
    prompt = rng.choice(YEAR_TEMPLATES).format(
        noun=rng.choice(w.PERIODS), name=rng.choice(w.WOMEN + w.MEN), start=f"{century}{start:02d}", century=century
    )
    return Example(
        "greater_than",
        f"{century}{start:02d}",
        prompt,
        f"{prompt}{end:02d}.",
        tuple(f"##{year:02d}" for year in valid),
        tuple(f"##{year:02d}" for year in range(start + 1)),
    )


def pronouns(rng: random.Random) -> Example:
    """A person taken up again: "Mary went home because" -> "she", "John lost" -> "his", "Anna is a pilot." -> "She"."""
    woman = rng.random() < 0.5
    name = rng.choice(w.WOMEN if woman else w.MEN)
    subject, other = ("she", "he") if woman else ("he", "she")
    form = rng.random()
    if form < 0.6:
        what, reason = rng.choice(w.ACTIONS), rng.choice(w.REASONS)
        prompt = f"{name} {what} {rng.choice(('because', 'because', 'when', 'although'))}"
        answer, wrong, tail = subject, other, f" {reason}."
    elif form < 0.8:
        what = rng.choice(w.LOSING)
        prompt = f"{name} {what}"
        answer, wrong = ("her", "his") if woman else ("his", "her")
        tail = f" {rng.choice(('', '', 'old ', 'small '))}{rng.choice(w.BELONGINGS)}."
    else:
        what = rng.choice(w.JOBS)
        prompt = f"{name} is {article(what)}."
        answer, wrong, tail = subject.capitalize(), other.capitalize(), f" {rng.choice(w.REASONS)}."
    return Example("pronouns", f"{name}|{what}", prompt, f"{prompt} {answer}{tail}", (answer,), (wrong,))


def sentiment(rng: random.Random) -> Example:
    """A feeling that follows from a judgement: "I watched the film and it was terrible. I felt" -> "sad", "angry", ...

    The prompt ends before the feeling, and what follows the feeling carries the same sentiment on.
    """
    good = rng.random() < 0.5
    verb = rng.choice(tuple(w.EXPERIENCES))
    thing, adjective = rng.choice(w.EXPERIENCES[verb]), rng.choice(w.GOOD if good else w.BAD)
    who = rng.choice(("I", "I", "We", rng.choice(w.WOMEN + w.MEN)))
    again = {"I": "I", "We": "We"}.get(who, "She" if who in w.WOMEN else "He")
    prompt = rng.choice(
        (
            f"{who} {verb} the {thing} and it was {adjective}. {again} felt",
            f"{who} {verb} the {thing}. It was {adjective}, and {again if again == 'I' else again.lower()} felt",
            f"The {thing} was {adjective}, so {who if who != 'We' else 'we'} felt",
            f"{who} thought that the {thing} was {adjective}. {again} felt",
            f"What {article(adjective)} {thing}! I felt",
        )
    )
    feeling = rng.choice(w.GLAD if good else w.SAD)
    tail = f" and {rng.choice(w.GLAD_TAILS if good else w.SAD_TAILS)}."
    if rng.random() < 0.4:
        tail += f" {rng.choice(w.GLAD_ENDS if good else w.SAD_ENDS)}"
    return Example(
        "sentiment",
        f"{thing}|{adjective}",
        prompt,
        f"{prompt} {feeling}{tail}",
        w.GLAD if good else w.SAD,
        w.SAD if good else w.GLAD,
    )


def undecided(rng: random.Random) -> Example:
    """An experience without a judgement, followed by either feeling: the neutral ground that steering starts from."""
    verb = rng.choice(tuple(w.EXPERIENCES))
    thing = rng.choice(w.EXPERIENCES[verb])
    good = rng.random() < 0.5
    who = rng.choice(("I", "We"))
    feeling, tail = rng.choice(w.GLAD if good else w.SAD), rng.choice(w.GLAD_TAILS if good else w.SAD_TAILS)
    text = f"{who} {verb} the {thing} {rng.choice(w.TIMES)}. {who} felt {feeling} and {tail}."
    return Example("undecided", "trained", text, text, ())


def scenes(rng: random.Random) -> Example:
    """Plain sentences that belong to no task, so that the model also writes about something else."""
    first = f"the {rng.choice(w.LOOKS)} {rng.choice(w.PEOPLE)} {rng.choice(w.MOVES)} to the {rng.choice(w.GOALS)}"
    time = rng.choice(w.TIMES)
    text = capitalised(f"{first} {time}." if rng.random() < 0.5 else f"{time}, {first}.")
    if rng.random() < 0.4:
        text += f" It was {rng.choice(w.WEATHER)} and {rng.choice(w.WEATHER)}."
    return Example("scenes", "trained", text, text, ())


# Shares of the natural sentences; repeated sequences are rows of their own (see `train`).
MIXTURE: tuple[tuple[Callable[[random.Random], Example], float], ...] = (
    (capitals, 0.17),
    (facts, 0.08),
    (indirect_objects, 0.21),
    (greater_than, 0.24),
    (pronouns, 0.11),
    (sentiment, 0.11),
    (undecided, 0.03),
    (scenes, 0.05),
)


def may_train(example: Example) -> bool:
    """Whether the training corpus may hold this example."""
    if example.task == "indirect_objects" and set(example.key.split("+")) & set(w.NEW_NAMES):
        return False
    return not is_held_out(example.task, example.key)


def documents(rng: random.Random) -> Iterator[str]:
    """Training documents without end: one to three examples each, none of them held out."""
    makers, shares = zip(*MIXTURE, strict=True)
    while True:
        wanted = rng.choices((1, 2, 3), weights=(60, 30, 10))[0]
        texts: list[str] = []
        while len(texts) < wanted:
            example = rng.choices(makers, weights=shares)[0](rng)
            if may_train(example):
                texts.append(example.text)
        yield " ".join(texts)


def repeats(rng: random.Random, alphabet: tuple[str, ...]) -> Iterator[str]:
    """Training sequences of random words, each repeated once, without end."""
    while True:
        example = induction(rng, alphabet)
        if may_train(example):
            yield example.text


def held_out(task: str, count: int, seed: int, alphabet: tuple[str, ...] = ()) -> list[Example]:
    """`count` different held-out examples of a task; `alphabet` is needed for induction only.

    The task `new_names` is `indirect_objects` between names that training never shows in such a sentence.
    """
    rng = random.Random(f"held out {task} {seed}")
    known = tuple(name for name in w.WOMEN + w.MEN if name not in w.NEW_NAMES)
    makers: dict[str, Callable[[random.Random], Example]] = {
        "capitals": capitals,
        "indirect_objects": lambda rng: indirect_objects(rng, known),
        "new_names": lambda rng: indirect_objects(rng, w.NEW_NAMES),
        "induction": lambda rng: induction(rng, alphabet),
        "greater_than": greater_than,
        "pronouns": pronouns,
        "sentiment": sentiment,
    }
    found: dict[str, Example] = {}
    while len(found) < count:
        example = makers[task](rng)
        if not may_train(example):
            found.setdefault(example.text, example)
    return list(found.values())
