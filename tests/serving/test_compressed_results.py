"""Large results of a servicer, compressed or not: the same values, declared in the header, switched off by name."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, cast

import numpy as np
import pytest

from patchbay.arrays import view_of
from patchbay.ir.events import COMPRESSION, Done, ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph, Node, Output
from patchbay.transport import calls
from patchbay.transport.local import LocalContext
from patchbay.v1 import tensor_pb2
from patchbay.wire.events import EventDecoder
from patchbay.wire.parse import serialize
from patchbay_server.serving.local import local_servicer
from patchbay_server.transport import compressing
from patchbay_server.transport.servicer import Servicer
from tests.tiny import build

GRAPH = Graph(
    nodes=(Node("arange", (), {"start": 0, "stop": 2**20, "step": 1, "dtype": "float32"}),), outputs=(Output("x", 0),)
)


@pytest.fixture(scope="module")
def servicer() -> Any:
    """A servicer of a tiny model."""
    found = local_servicer(build("llama"), name="tiny")
    yield found
    found.close()


def _results(servicer: Servicer, *disabled: str, compress: bool) -> tuple[int, np.ndarray, int, int]:
    """The header's compression, the value, the bytes that were sent, and what the usage says was saved."""

    async def run() -> tuple[int, np.ndarray, int, int]:
        request = calls.execute_request("tiny", GRAPH, ExecuteOptions(disabled=disabled), compress=compress)
        decoder, context, sent, declared = EventDecoder(), LocalContext(), 0, -1
        value, saved = np.empty(0), 0
        async with aclosing(cast(Any, servicer.Execute(serialize(request), context))) as responses:
            async for response in responses:
                data = response.SerializeToString(deterministic=True)
                sent += len(data)
                if getattr(response, "HasField", None) and response.HasField("tensor"):
                    declared = response.tensor.header.compression
                event = decoder.feed_bytes(data)
                if isinstance(event, TensorValue):
                    value = view_of(event.value)
                elif isinstance(event, Done):
                    saved = event.usage.saved.get(COMPRESSION, 0)
        return declared, value, sent, saved

    return asyncio.run(run())


def test_compressed_results_are_the_same_and_smaller(servicer: Servicer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it pays, fewer bytes are sent than the value has; the value does not change by a bit."""
    _, plain, plain_bytes, _ = _results(servicer, compress=False)
    monkeypatch.setattr(compressing.Chooser, "should_compress", lambda self: True)
    declared, value, sent, saved = _results(servicer, compress=True)
    assert declared == tensor_pb2.COMPRESSION_SHUFFLE_ZSTD
    np.testing.assert_array_equal(value, plain)
    assert sent < plain_bytes // 2
    assert saved == pytest.approx(plain_bytes - sent, rel=0.01)


def test_a_client_that_does_not_accept_it_or_switches_it_off_gets_plain_chunks(
    servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the client's word, and with the switch off, the header names no compression and nothing is compressed."""
    monkeypatch.setattr(compressing.Chooser, "should_compress", lambda self: True)
    for disabled, compress in (((), False), ((COMPRESSION,), True)):
        declared, value, sent, saved = _results(servicer, *disabled, compress=compress)
        assert declared == tensor_pb2.COMPRESSION_UNSPECIFIED
        assert sent > value.nbytes
        assert saved == 0
