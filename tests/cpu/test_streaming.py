"""Tokens on their way while they are generated: to a function, or printed."""

from __future__ import annotations

import asyncio

import pytest

from patchbay.client import AsyncClient
from patchbay.errors import TraceError
from patchbay.transport.local import LocalTransport
from patchbay_server.models.loader import load
from patchbay_server.serving.local import local_servicer
from tests.cpu.test_generation import IDS, OTHER, SHORT, STEPS, demo, generated, ids_of, model_of


def test_tokens_stream_as_they_appear() -> None:
    """The callback gets every step's tokens in order, and they are those of the output."""
    heard: list[tuple[int, list[int]]] = []
    run, _ = generated("gpt2", [IDS, OTHER], stream=lambda step, tokens: heard.append((step, tokens)))
    assert [step for step, _ in heard] == list(range(STEPS))
    assert [list(row) for row in zip(*(tokens for _, tokens in heard), strict=True)] == ids_of(run)


def test_text_is_printed_as_it_appears(capsys: pytest.CaptureFixture[str]) -> None:
    """stream=True prints one row's text, of several rows a line for each step, and ids where there is no tokenizer."""
    prompt = "The capital of France is"
    with demo().generate(prompt, max_new_tokens=8, stream=True) as run:
        pass
    assert capsys.readouterr().out == f"{run.text}\n"
    with demo().generate([prompt, "Mary went home because"], max_new_tokens=4, stream=True):
        pass
    assert capsys.readouterr().out == "Paris\tshe\n.\twas\n<eos>\tlonely\n\t.\n"
    with model_of("gpt2").generate(IDS, max_new_tokens=3, eos=False, stream=True) as run:
        pass
    assert capsys.readouterr().out == f"{' '.join(map(str, run.output.ids))}\n"
    with pytest.raises(TraceError, match="stream is True"):
        model_of("gpt2").generate(IDS, max_new_tokens=3, stream="yes")  # type: ignore[arg-type]


def test_runs_of_one_trace_stream_each_to_its_own() -> None:
    """A generating run among others of a trace is heard too, and each listener hears its own run."""
    heard: dict[str, list[int]] = {"one": [], "two": []}
    with model_of("gpt2").trace() as t:
        one = t.generate(IDS, max_new_tokens=3, eos=False, stream=lambda step, ids: heard["one"].extend(ids))
        two = t.generate(SHORT, max_new_tokens=4, eos=False, stream=lambda step, ids: heard["two"].extend(ids))
        t.generate(OTHER, max_new_tokens=2, eos=False)
    assert heard == {"one": list(one.output.ids), "two": list(two.output.ids)}


def test_text_is_printed_in_order_where_waiting_is_awaited(capsys: pytest.CaptureFixture[str]) -> None:
    """An asynchronous client prints the same text, complete when the block is left."""
    text, hosted = "", load("demo")

    async def go() -> None:
        nonlocal text
        servicer = local_servicer(hosted.model, hosted.tokenizer, name="demo")
        async with AsyncClient(lambda: LocalTransport(servicer)) as client:
            model = await client.model("demo")
            async with model.generate("The capital of France is", max_new_tokens=8, stream=True) as run:
                pass
        text = run.text

    asyncio.run(go())
    assert text and capsys.readouterr().out == f"{text}\n"


def test_streaming_a_text_that_ends_early_warns_of_nothing() -> None:
    """Only what the user asked of steps that never came is warned of; the stream ends with the text."""
    seen: list[int] = []
    with demo().generate("The capital of France is", max_new_tokens=8, stream=lambda k, t: seen.append(t[0])) as run:
        pass
    assert [t for t in seen if t >= 0] == list(run.output.ids)
    assert len(run.output) < 8
