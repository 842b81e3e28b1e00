"""What a Ray Serve replica does, without Ray: the RPCs as methods of a deployment, and the health service beside them.

Serve calls a deployment's method by the RPC's name and hands over the call's context as `grpc_context`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped,unused-ignore]

from patchbay.errors import ServiceError
from patchbay_server.config import Config
from patchbay_server.serving.artifacts import store_of
from patchbay_server.serving.backend import Catalog
from patchbay_server.store.keys import KeyStore
from patchbay_server.transport.auth import AllowAll, Authenticator, KeyAuthenticator
from patchbay_server.transport.servicer import Servicer

#: Services that the health service knows; "" is the server as a whole.
HEALTH_SERVICES = ("", "patchbay.v1.PatchbayService")
#: How often a watched health is looked at.
WATCH_S = 5.0
#: Watches at a time: each holds one of the replica's calls for as long as it likes, and nobody is asked for a key.
MAX_WATCHES = 16


def authenticator_of(config: Config) -> Authenticator:
    """Whoever reaches the port where the configuration says `insecure`; else the holders of its keys."""
    if config.insecure:
        return AllowAll()
    return KeyAuthenticator(KeyStore(config.keys.file, secrets_dir=config.keys.secrets_dir))


def servicer_of(config: Config, catalog: Catalog) -> Servicer:
    """The servicer for a catalog, with the configuration's keys and limits."""
    return Servicer(catalog, authenticator_of(config), config.limits, artifacts=store_of(config.artifacts))


def set_up_logging(config: Config) -> None:
    """Log what the configuration asks for, to stderr."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    core = logging.getLogger("grpc._cython.cygrpc")
    core.setLevel(max(logging.INFO, logging.getLogger().level))  # below, it tells of its own event loop
    core.addFilter(_no_story_of_a_client_that_left)


def _no_story_of_a_client_that_left(record: logging.LogRecord) -> bool:
    """gRPC writes a traceback for every call that is cancelled while it is answered, an ordinary end."""
    return record.exc_info is None or getattr(record.exc_info[0], "__name__", "") != "ExecuteBatchError"


class GrpcMethods:
    """The methods that Serve calls; a deployment inherits them and sets `_servicer` and `_check`."""

    _servicer: Servicer
    #: Raises ServiceError when this replica cannot serve.
    _check: Callable[[], None]
    _watches = 0

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:
        """See `Servicer.ListModels`."""
        return await self._servicer.ListModels(request, grpc_context)

    async def GetModel(self, request: Any, grpc_context: Any) -> Any:
        """See `Servicer.GetModel`."""
        return await self._servicer.GetModel(request, grpc_context)

    async def Tokenize(self, request: Any, grpc_context: Any) -> Any:
        """See `Servicer.Tokenize`."""
        return await self._servicer.Tokenize(request, grpc_context)

    async def Execute(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """See `Servicer.Execute`."""
        async with aclosing(cast(Any, self._servicer.Execute(request, grpc_context))) as responses:
            async for response in responses:
                yield response

    async def StatArtifacts(self, request: Any, grpc_context: Any) -> Any:
        """See `Servicer.StatArtifacts`."""
        return await self._servicer.StatArtifacts(request, grpc_context)

    async def ListArtifacts(self, request: Any, grpc_context: Any) -> Any:
        """See `Servicer.ListArtifacts`."""
        return await self._servicer.ListArtifacts(request, grpc_context)

    async def DeleteArtifact(self, request: Any, grpc_context: Any) -> Any:
        """See `Servicer.DeleteArtifact`."""
        return await self._servicer.DeleteArtifact(request, grpc_context)

    async def PutArtifact(self, request_stream: Any, grpc_context: Any) -> Any:
        """See `Servicer.PutArtifact`."""
        return await self._servicer.PutArtifact(request_stream, grpc_context)

    async def GetArtifact(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """See `Servicer.GetArtifact`."""
        async with aclosing(cast(Any, self._servicer.GetArtifact(request, grpc_context))) as responses:
            async for response in responses:
                yield response

    async def Check(self, request: Any, grpc_context: Any) -> Any:
        """grpc.health.v1: whether this replica serves."""
        if request.service not in HEALTH_SERVICES:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details("no such service here")
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=self._health())

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """grpc.health.v1: the same, whenever it changes; for `MAX_WATCHES` callers at a time."""
        if self._watches >= MAX_WATCHES:
            grpc_context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            grpc_context.set_details(f"{MAX_WATCHES} callers watch already; ask with Check")
            return
        self._watches += 1
        try:
            told: int | None = None
            while True:
                known = request.service in HEALTH_SERVICES
                status = self._health() if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                if status != told:
                    told = status
                    yield health_pb2.HealthCheckResponse(status=status)
                await asyncio.sleep(WATCH_S)
        finally:
            self._watches -= 1

    def _health(self) -> int:
        try:
            self._check()
        except ServiceError:
            return int(health_pb2.HealthCheckResponse.NOT_SERVING)
        return int(health_pb2.HealthCheckResponse.SERVING)

    async def check_health(self) -> None:
        """Ray Serve's own health check: raising has the replica replaced."""
        self._check()
