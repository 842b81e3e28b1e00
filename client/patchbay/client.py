"""The way in: `connect` to a service, or `local` for a model in this process; both give the same models.

A client holds one connection. `Client` blocks and keeps its event loop in a background thread; `AsyncClient` is for
programs that have a loop of their own. What they do is written once, in `Connection` and `patchbay.core.ModelCore`.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from patchbay.arguments import check_text, check_timeout
from patchbay.artifacts import Artifacts, StoredArtifacts
from patchbay.core import ModelCore
from patchbay.credentials import find_api_key, find_target
from patchbay.errors import MissingExtraError, TraceError
from patchbay.ir.events import ModelSummary
from patchbay.model import AsyncModel, Model
from patchbay.portal import Portal

if TYPE_CHECKING:
    from typing_extensions import Self

    from patchbay.transport.base import Transport

DEFAULT_TIMEOUT_S = 600.0


class Connection:
    """A transport that is made when it is first needed, in the loop that needs it, and its models' cards.

    Args:
        transport: the transport, or a function that makes it; called inside the running loop.
        timeout_s: default for executions.
        name: what to call the other side in a repr.
    """

    def __init__(self, transport: Transport | Callable[[], Transport], *, timeout_s: float | None, name: str) -> None:
        self.timeout_s = timeout_s
        self.name = name
        self.artifacts = StoredArtifacts(self)
        self._make_transport = transport if callable(transport) else lambda: transport
        self._transport: Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._cores: dict[str, ModelCore] = {}
        self._closed = False

    async def transport(self) -> Transport:
        """The transport of this loop and process.

        Raises:
            TraceError: the client was closed, or is used in another event loop or process than it began in.
        """
        if self._closed:
            raise TraceError("this client is closed; connect again")
        loop = asyncio.get_running_loop()
        if self._transport is not None and self._pid != os.getpid():
            raise TraceError(
                "this client was used before the process forked, and gRPC does not outlive a fork (calls would hang):"
                " start workers with multiprocessing's 'spawn' method and connect in them"
            )
        if self._transport is None:
            self._transport, self._loop, self._pid = self._make_transport(), loop, os.getpid()
        elif self._loop is not loop:
            raise TraceError(
                "an async client belongs to the event loop it was first used in; connect again in this one"
            )
        return self._transport

    async def models(self) -> tuple[ModelSummary, ...]:
        """What the other side hosts."""
        return await (await self.transport()).list_models()

    async def core(self, name: str) -> ModelCore:
        """The model called `name`; its card is fetched once."""
        if name not in self._cores:
            card = await (await self.transport()).get_model(name)
            self._cores[name] = ModelCore(self, card)
        return self._cores[name]

    async def close(self) -> None:
        """Lets go of the transport."""
        self._closed = True
        transport, self._transport = self._transport, None
        if transport is not None and self._pid == os.getpid():
            await transport.close()


class Client:
    """A connection whose calls block. Use it as a context manager, or `close` it, or leave it to the garbage collector.

    Args:
        transport: the way to the server, or a function that makes it inside the client's event loop.
        timeout_s: seconds that an execution may take unless its trace says otherwise; None waits for ever.
        name: what to call the other side in a repr.
    """

    def __init__(
        self,
        transport: Transport | Callable[[], Transport],
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        name: str = "a transport",
    ) -> None:
        check_timeout(timeout_s)
        self._connection = connection = Connection(transport, timeout_s=timeout_s, name=name)
        self._portal = Portal()
        connection.artifacts.wait = self._portal.run
        self._finalizer = weakref.finalize(self, _close_client, self._portal, connection)

    def models(self) -> tuple[ModelSummary, ...]:
        """One line for each model that is served."""
        return self._portal.run(self._connection.models())

    def model(self, name: str) -> Model:
        """The model called `name`.

        Raises:
            NotFoundError: the server has none of that name.
        """
        check_text("the name of a model", name)
        core = self._portal.run(self._connection.core(name))
        return Model(core, self._portal, self)

    @property
    def artifacts(self) -> Artifacts:
        """Tensors of yours that stay on the server."""
        return Artifacts(self._connection.artifacts)

    def close(self) -> None:
        """Closes the connection and ends the background thread; a second time does nothing."""
        self._finalizer()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a client belongs to its process and cannot be pickled; connect again where it is needed")

    def __repr__(self) -> str:
        return f"<patchbay client of {self._connection.name}>"


def _close_client(portal: Portal, connection: Connection) -> None:
    portal.close(connection.close())


class AsyncClient:
    """A connection whose calls are awaited: ``async with pb.connect_async(...) as client``.

    Arguments as for `Client`.
    """

    def __init__(
        self,
        transport: Transport | Callable[[], Transport],
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        name: str = "a transport",
    ) -> None:
        check_timeout(timeout_s)
        self._connection = Connection(transport, timeout_s=timeout_s, name=name)

    async def models(self) -> tuple[ModelSummary, ...]:
        """One line for each model that is served."""
        return await self._connection.models()

    async def model(self, name: str) -> AsyncModel:
        """The model called `name`; see `Client.model`."""
        check_text("the name of a model", name)
        return AsyncModel(await self._connection.core(name))

    @property
    def artifacts(self) -> Artifacts:
        """Tensors of yours that stay on the server; every call is awaited."""
        return Artifacts(self._connection.artifacts)

    async def close(self) -> None:
        """Closes the connection; a second time does nothing."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a client belongs to its process and cannot be pickled; connect again where it is needed")

    def __repr__(self) -> str:
        return f"<patchbay async client of {self._connection.name}>"


def connect(
    target: str | None = None,
    *,
    api_key: str | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    **transport_options: Any,
) -> Client:
    """A client of the service at `target`. Nothing is sent until the first call.

    Args:
        target: ``host:port``; ``grpcs://`` before it for TLS. Left out: ``PATCHBAY_URL``, else port 9000 here.
        api_key: left out: ``PATCHBAY_API_KEY``, else, on this machine, the key that ``patchbay serve`` left.
        timeout_s: seconds that an execution may take unless its trace says otherwise; None waits for ever.
        transport_options: of `patchbay.transport.grpc.GrpcTransport`, such as ``tls_roots``.

    Raises:
        InvalidRequestError: the address or the key is malformed.
    """
    address, make = _grpc(target, api_key, transport_options)
    return Client(make, timeout_s=timeout_s, name=address)


def connect_async(
    target: str | None = None,
    *,
    api_key: str | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    **transport_options: Any,
) -> AsyncClient:
    """An asynchronous client; see `connect`. It belongs to the event loop that it is first used in."""
    address, make = _grpc(target, api_key, transport_options)
    return AsyncClient(make, timeout_s=timeout_s, name=address)


def _grpc(
    target: str | None, api_key: str | None, transport_options: dict[str, Any]
) -> tuple[str, Callable[[], Transport]]:
    from patchbay.transport.grpc import GrpcTransport

    if target is not None:
        check_text("the server's address", target)
    address = find_target(target)
    key = find_api_key(address, api_key)

    def make() -> Transport:
        return GrpcTransport(address, api_key=key, **transport_options)

    make()  # opens nothing; a wrong address or option is an error here, at the user's line
    return address, make


def local(
    hf_model: Any, tokenizer: Any = None, *, example: Mapping[str, Any] | None = None, prefix_cache_bytes: int = 0
) -> Model:
    """A Hugging Face model of this process as a `Model`: the same traces, no network.

    Args:
        hf_model: a ``transformers`` model, or any torch module together with `example`.
        tokenizer: its tokenizer; without one, runs are made from token ids.
        example: one input by argument name, tensors with rows first, for modules that do not say what they take. Their
            runs are made from a dict of arrays by the same names.
        prefix_cache_bytes: how much to keep of what recent prompts computed, for later traces to go on from. None by
            default: the model is yours, and what was kept is out of date once you change its weights or hook it.

    Raises:
        MissingExtraError: the ``server`` extra is not installed.
    """
    try:
        serving = importlib.import_module("patchbay_server.serving.local")
    except ImportError as error:
        raise MissingExtraError(
            f"running a model in this process needs the server's packages ({error}): pip install 'patchbay[server]'"
        ) from error
    name = "local"
    servicer = serving.local_servicer(
        hf_model, tokenizer, name=name, example=example, prefix_cache_bytes=prefix_cache_bytes
    )

    def make() -> Transport:
        from patchbay.transport.local import LocalTransport

        return LocalTransport(servicer)

    client = Client(make, timeout_s=None, name="this process")
    weakref.finalize(client, servicer.close)  # the engine's thread holds the model for as long as it runs
    return client.model(name)
