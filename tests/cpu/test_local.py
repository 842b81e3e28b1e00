"""`pb.local`: what stays of a model when nobody uses it any more."""

from __future__ import annotations

import gc
import threading
import weakref

import patchbay as pb
from tests.tiny import build


def engines() -> set[threading.Thread]:
    """The engine threads of local models, those of other tests among them."""
    return {thread for thread in threading.enumerate() if thread.name == "patchbay-engine-local"}


def test_a_local_model_is_let_go() -> None:
    """With the last reference to it the engine's thread ends, and the weights are freed."""
    gc.collect()
    before = engines()
    hf = build("llama")
    freed = weakref.ref(hf)
    model = pb.local(hf)
    with model.trace([1, 2, 3]) as run:
        run.logits.save()
    (mine,) = engines() - before
    del model, run, hf
    gc.collect()
    mine.join(timeout=60)
    assert not mine.is_alive()
    gc.collect()
    assert freed() is None
