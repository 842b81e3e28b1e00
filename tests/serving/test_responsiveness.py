"""The event loop answers while the engine is at work: neither starves the other."""

from __future__ import annotations

import statistics
import threading
import time

import numpy as np

import patchbay as pb
from tests.serving_fixtures import TINY, serve_plain


def test_small_calls_are_answered_while_a_long_request_runs() -> None:
    """Lists of models arrive within a tenth of a second, at the median, beside thousands of matrix products."""
    matrix = np.eye(192, dtype=np.float32)
    ended = threading.Event()
    with serve_plain() as served:
        model = pb.connect(served.target).model(TINY)

        def work() -> None:
            try:
                with model.trace() as t:
                    t.run([[1, 5, 9]])
                    end, _ = pb.scan(lambda m, _: (m @ m, None), t.constant(matrix), length=4_000)
                    t.save(trace=end[0, 0])
            finally:
                ended.set()

        worker = threading.Thread(target=work)
        worker.start()
        other = pb.connect(served.target)
        waits = []
        while not ended.is_set() and len(waits) < 200:
            began = time.perf_counter()
            assert [m.name for m in other.models()] == [TINY]
            waits.append(time.perf_counter() - began)
        worker.join(timeout=120)
        other.close()
    assert ended.is_set() and len(waits) >= 5
    assert statistics.median(waits) < 0.1
