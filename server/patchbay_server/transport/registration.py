"""Puts a servicer on a gRPC server, in the place of the generated ``add_PatchbayServiceServicer_to_server``.

The generated function parses every request before the servicer sees it: for callers without a key too, and answering
garbage with gRPC's own INTERNAL. This one hands the bytes over unparsed. Ray Serve takes the import path of such a
function in ``grpc_servicer_functions``: ``patchbay_server.transport.registration.add_servicer_to_server``.
"""

from __future__ import annotations

from typing import Any

import grpc

from patchbay.transport.calls import SERVICE
from patchbay.wire.parse import serialize


def add_servicer_to_server(servicer: Any, server: Any) -> None:
    """Serve `servicer` (a `Servicer`, or a stand-in with methods of the same names) on a `grpc.aio` server."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name), response_serializer=serialize)
        for name in ("ListModels", "GetModel", "Tokenize")
    }
    handlers["Execute"] = grpc.unary_stream_rpc_method_handler(servicer.Execute, response_serializer=serialize)
    if hasattr(servicer, "PutArtifact"):
        for name in ("StatArtifacts", "ListArtifacts", "DeleteArtifact"):
            method = getattr(servicer, name)
            handlers[name] = grpc.unary_unary_rpc_method_handler(method, response_serializer=serialize)
        handlers["PutArtifact"] = grpc.stream_unary_rpc_method_handler(
            servicer.PutArtifact, response_serializer=serialize
        )
        handlers["GetArtifact"] = grpc.unary_stream_rpc_method_handler(
            servicer.GetArtifact, response_serializer=serialize
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    # grpcio finds registered methods faster than generic ones; releases before 1.66 lack this.
    register = getattr(server, "add_registered_method_handlers", None)
    if register is not None:
        register(SERVICE, handlers)
