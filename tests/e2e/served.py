"""The same tiny model served in each of the three ways, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import patchbay as pb
from patchbay.client import AsyncClient, Client
from patchbay.ir.events import Event, ExecuteOptions
from patchbay.ir.graph import Graph
from tests.tiny import VOCAB, build

MODEL_NAME = "tiny"
_WORDS = "<pad> <bos> <eos> <unk> the capital of france italy is paris rome a cat dog sat on mat".split()


def tokens_of(text: str) -> list[int]:
    """Ids of a text, by hand."""
    return [_WORDS.index(word) for word in text.split()]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, as many as the model's vocabulary."""
    words = [*_WORDS, *(f"word{i}" for i in range(VOCAB - len(_WORDS)))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


@cache
def twin() -> transformers.PreTrainedModel:
    """A model of the same weights that Patchbay never touches."""
    return build("llama")


def save_model(folder: Path) -> Path:
    """The model as a folder that `patchbay serve --model` takes."""
    build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Served:
    """A running service.

    Attributes:
        client: a blocking client of it.
        connect_async: makes an async client of it.
        transport: makes a transport to it, inside a running loop.
    """

    client: Client
    connect_async: Callable[[], AsyncClient]
    transport: Callable[[], Any]

    def execute(self, graph: Graph) -> list[Event]:
        """Send a graph as it is, past the client's own checks."""
        return asyncio.run(self._events(graph, None))

    def abandon_after(self, graph: Graph, *, events: int) -> int:
        """Send a graph and walk away after some events; returns how many were seen."""
        return len(asyncio.run(self._events(graph, events)))

    async def _events(self, graph: Graph, most: int | None) -> list[Event]:
        transport, seen = self.transport(), []
        try:
            stream = transport.execute(MODEL_NAME, graph, ExecuteOptions(), timeout_s=60.0)
            async with contextlib.aclosing(stream) as events:
                async for event in events:
                    seen.append(event)
                    if most is not None and len(seen) >= most:
                        break
        finally:
            await transport.close()
        return seen


@contextlib.contextmanager
def _in_process(folder: Path) -> Iterator[Served]:
    from patchbay.transport.local import LocalTransport
    from patchbay_server.serving.local import local_servicer

    del folder
    servicer = local_servicer(build("llama"), tokenizer(), name=MODEL_NAME)

    def transport() -> LocalTransport:
        return LocalTransport(servicer)

    with Client(transport, name="in-process") as client:
        yield Served(client, lambda: AsyncClient(transport, name="in-process"), transport)


def _over_grpc(target: str, api_key: str | None) -> AbstractContextManager[Served]:
    from patchbay.transport.grpc import GrpcTransport

    @contextlib.contextmanager
    def served() -> Iterator[Served]:
        with pb.connect(target, api_key=api_key) as client:
            yield Served(
                client,
                lambda: pb.connect_async(target, api_key=api_key),
                lambda: GrpcTransport(target, api_key=api_key),
            )

    return served()


@contextlib.contextmanager
def _plain_grpc(folder: Path) -> Iterator[Served]:
    from patchbay_server.serving.local import local_servicer
    from patchbay_server.serving.plain import serve_grpc

    del folder
    started: threading.Event = threading.Event()
    state: dict[str, Any] = {}

    def serve() -> None:
        async def main() -> None:
            state["stop"], state["loop"] = asyncio.Event(), asyncio.get_running_loop()
            server = await serve_grpc(local_servicer(build("llama"), tokenizer(), name=MODEL_NAME))
            state["port"] = server.port
            started.set()
            await state["stop"].wait()
            await server.stop(grace_s=0)

        asyncio.run(main())

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(60)
    try:
        with _over_grpc(f"127.0.0.1:{state['port']}", None) as served:
            yield served
    finally:
        state["loop"].call_soon_threadsafe(state["stop"].set)
        thread.join()


@contextlib.contextmanager
def _ray_serve(folder: Path) -> Iterator[Served]:
    from tests.serving_fixtures import patchbay_serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    model = save_model(folder / MODEL_NAME)
    with (
        # Two replicas, so that whatever one of them keeps must be found by the other.
        patchbay_serve(
            model,
            name=MODEL_NAME,
            home=folder,
            models=[{"name": MODEL_NAME, "source": str(model), "replicas": 2}],
            artifacts={"path": str(folder / "artifacts")},
        ) as running,
        _over_grpc(running.target, running.api_key) as served,
    ):
        yield served


SERVED: dict[str, Callable[[Path], AbstractContextManager[Served]]] = {
    "in-process": _in_process,
    "grpc.aio": _plain_grpc,
    "ray": _ray_serve,
}
