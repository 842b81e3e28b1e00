"""The guide's examples run: against the fake server, and against a real model in this process where there is one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import patchbay as pb
from patchbay.model import Model
from patchbay.testing import fake_client

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "tracing.md"
_BLOCK = re.compile(r"(?P<note><!-- (?:not run|needs a real model)[^\n]*-->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def examples(kind: str) -> Iterator[str]:
    """The guide's blocks, padded so that lines in tracebacks are those of the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        note = match["note"] or ""
        if "not run" not in note and ("real model" not in note or kind == "real"):
            yield "\n" * text[: match.start("code")].count("\n") + match["code"]


def real_model() -> Model:
    """A tiny Llama with a tokenizer of the guide's words, without any download."""
    pytest.importorskip("patchbay_server.serving.local", reason="needs the server extra")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import build

    words = ["<unk>", "The", "capital", "of", "France", "Italy", "is"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return pb.local(build("llama"), PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_the_guides_examples_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In order, in one namespace, with their assertions."""
    names: dict[str, Any] = {"pb": pb, "model": fake_client().model("fake") if kind == "fake" else real_model()}
    count = 0
    for code in examples(kind):
        exec(compile(code, str(GUIDE), "exec"), names)
        count += 1
    assert count >= 9
    printed = capsys.readouterr().out
    assert "return p = %" in printed
    assert re.search(r"add: shapes \[1, \d+\] and \[1, \d+, \d+\] do not broadcast", printed)
    assert f"{GUIDE.name}:" in printed


def test_the_guide_shows_the_message_that_is_raised() -> None:
    """The error text in the guide is the fake model's, but for the place."""
    text = GUIDE.read_text(encoding="utf-8")
    (shown,) = re.findall(r"```text\n(add: .*?)```", text, re.DOTALL)
    model = fake_client().model("fake")
    with pytest.raises(pb.errors.ShapeError) as caught, model.trace("The capital of France is") as run:
        run.blocks[1].resid_post[:, -1] + run.logits
    assert re.sub(r"at \S+:\d+", "at experiment.py:3", str(caught.value)) == shown.strip()
