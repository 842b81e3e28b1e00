"""The pages of docs/ whose examples run: each prints what it says it prints.

A new page is one line of `PAGES`; one that needs more than a small model gets its own function beside the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, compare, run_page

pytest.importorskip("patchbay_server.serving.local", reason="needs the server extra")

import patchbay as pb
from patchbay.testing import fake_client
from patchbay_server.models.loader import load
from tests.tiny import build


def llama() -> dict[str, Any]:
    """A tiny Llama of random weights, without a tokenizer."""
    return {"pb": pb, "model": pb.local(build("llama"))}


def remembering() -> dict[str, Any]:
    """The tiny Llama with a service's memory of recent prompts."""
    return {"pb": pb, "model": pb.local(build("llama"), prefix_cache_bytes=2**20)}


def demo() -> dict[str, Any]:
    """The embedded model, which speaks."""
    hosted = load("demo")
    return {"pb": pb, "model": pb.local(hosted.model, hosted.tokenizer)}


def worded() -> dict[str, Any]:
    """A tiny Llama of random weights whose tokenizer knows the words of the guide."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "The", "capital", "of", "France", "Italy", "is"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    return {"pb": pb, "model": pb.local(build("llama"), tokenizer)}


def fake() -> dict[str, Any]:
    """The fake server's model: no weights, the same answers every time."""
    return {"pb": pb, "model": fake_client().model("fake")}


@dataclass(frozen=True)
class Page:
    """A page, the namespace that it begins with, what that offers (see `pages`), and how many blocks must run."""

    name: str
    given: Callable[[], dict[str, Any]] = llama
    offers: tuple[str, ...] = ("a real model",)
    blocks: int = 1

    def __str__(self) -> str:
        return f"{self.name} ({self.given.__name__})"


PAGES = [
    Page("control.md", blocks=6),
    Page("datasets.md", demo, blocks=9),
    Page("artifacts.md", blocks=6),
    Page("generation.md", demo, blocks=7),
    Page("gradients.md", blocks=8),
    Page("methods.md", demo, blocks=18),
    Page("modules.md", blocks=3),
    Page("sharing.md", remembering, blocks=3),
    Page("weights.md", blocks=2),
    Page("language.md", blocks=4),
    Page("tracing.md", worded, blocks=10),
    Page("tracing.md", fake, offers=("a fake model",), blocks=9),
]
#: Pages with python blocks that other tests run, or that nothing can run.
ELSEWHERE = {"models.md", "demo.md", "demo-model.md"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_pages_examples_print_what_it_shows(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder, with their assertions."""
    monkeypatch.chdir(tmp_path)
    assert run_page(page.name, page.given(), page.offers) >= page.blocks


def test_no_page_is_forgotten() -> None:
    """Every page with a python block is in the list, or known to be run by another test."""
    with_code = {p.name for p in DOCS.glob("*.md") if "```python" in p.read_text(encoding="utf-8")}
    assert with_code == {page.name for page in PAGES} | ELSEWHERE


def test_output_is_compared() -> None:
    """Lines may be left out and cut short, places differ; another line, or another order, is an error."""
    printed = "  one\ntwo at somewhere.py:12\nthree\n"
    compare("one\nthr\n", printed, "page.md:1")
    compare("two at experiment.py:3\n", printed, "page.md:1")
    for wrong in ("four\n", "three\none\n"):
        with pytest.raises(AssertionError, match=re.escape("page.md:1")):
            compare(wrong, printed, "page.md:1")
