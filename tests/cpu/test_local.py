"""`pb.local`: what stays of a model when nobody uses it any more."""

from __future__ import annotations

import gc
import threading
import weakref

import patchbay as pb
from tests.tiny import build


def engines() -> int:
    """How many engine threads of local models there are."""
    return sum(thread.name == "patchbay-engine-local" for thread in threading.enumerate())


def test_a_local_model_is_let_go() -> None:
    """With the last reference to it the engine's thread ends, and the weights are freed."""
    before = engines()
    hf = build("llama")
    freed = weakref.ref(hf)
    model = pb.local(hf)
    with model.trace([1, 2, 3]) as run:
        run.logits.save()
    assert engines() == before + 1
    del model, run, hf
    gc.collect()
    assert engines() == before
    gc.collect()
    assert freed() is None
