"""The plain gRPC server: calls, health, reflection, keys, TLS, and a port that is taken."""

from __future__ import annotations

import datetime as dt
import socket
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from patchbay.errors import FailedPreconditionError, NotFoundError, UnauthenticatedError
from patchbay.ir.events import Done, ExecuteOptions, TensorValue
from patchbay.ir.graph import Graph, Node, Output, Run
from patchbay.transport.grpc import GrpcTransport
from patchbay_server.config import Config, ConfigError, TlsConfig
from patchbay_server.serving.local import LocalCatalog
from patchbay_server.serving.plain import serve_grpc
from patchbay_server.serving.replica import servicer_of
from patchbay_server.store.keys import KeyStore
from tests.serving_fixtures import D_MODEL, TINY, serve_plain, tiny_config, tiny_model


def empty(config: Config) -> object:
    """A servicer without models."""
    return servicer_of(config, LocalCatalog({}))


async def test_calls_over_a_real_port() -> None:
    """List, card, tokens and an execution work against a server in another thread."""
    with serve_plain() as served:
        transport = GrpcTransport(served.target)
        assert [m.name for m in await transport.list_models()] == [TINY]
        assert (await transport.get_model(TINY)).d_model == D_MODEL
        (row,) = await transport.tokenize(TINY, ["the capital"])
        graph = Graph((Run((row.ids,)),), (Node("site.read", (), {"site": "embed"}, 0),), (Output("x", 0),))
        events = [e async for e in transport.execute(TINY, graph, ExecuteOptions())]
        with pytest.raises(NotFoundError, match="did you mean 'tiny'"):
            await transport.get_model("tinny")
        await transport.close()
    (value,) = [e.value for e in events if isinstance(e, TensorValue)]
    wanted = tiny_model().get_input_embeddings().weight.detach().numpy()[list(row.ids)]
    assert np.array_equal(np.frombuffer(value.data, "<f4").reshape(value.shape)[0], wanted)
    assert isinstance(events[-1], Done)


async def test_health_and_reflection() -> None:
    """grpc.health.v1 and reflection answer without a key."""
    config = Config(host="127.0.0.1", port=0)
    server = await serve_grpc(empty(config), config)  # type: ignore[arg-type]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "patchbay.v1.PatchbayService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol="patchbay.v1.PatchbayService")])
        async for reply in stub.ServerReflectionInfo(requests):
            assert reply.file_descriptor_response.file_descriptor_proto
    await server.stop(0)


async def test_keys_are_required_by_default(tmp_path: Path) -> None:
    """Unless the configuration says insecure, only a key of the store opens the server."""
    config = Config.load(env={}, overrides={"host": "127.0.0.1", "port": 0, "keys": {"file": str(tmp_path / "k.json")}})
    key = KeyStore(config.keys.file).create("ada")
    server = await serve_grpc(empty(config), config)  # type: ignore[arg-type]
    with_key = GrpcTransport(f"127.0.0.1:{server.port}", api_key=key)
    without = GrpcTransport(f"127.0.0.1:{server.port}")
    assert await with_key.list_models() == ()
    with pytest.raises(UnauthenticatedError):
        await without.list_models()
    await with_key.close()
    await without.close()
    await server.stop(0)


async def test_a_taken_port_is_an_error() -> None:
    """Two servers never share a port silently."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        config = Config(host="127.0.0.1", port=holder.getsockname()[1])
        with pytest.raises(ConfigError, match="the port is taken"):
            await serve_grpc(empty(config), config)  # type: ignore[arg-type]


async def test_missing_tls_files_are_named(tmp_path: Path) -> None:
    """A certificate that is not there is named by its key."""
    tls = TlsConfig(certificate_file=tmp_path / "cert.pem", private_key_file=tmp_path / "key.pem")
    config = Config(host="127.0.0.1", port=0, tls=tls)
    with pytest.raises(ConfigError, match=r"tls\.private_key_file: cannot read"):
        await serve_grpc(empty(config), config)  # type: ignore[arg-type]


async def test_tls(tmp_path: Path) -> None:
    """With a certificate the server speaks TLS, and a client that trusts it is served."""
    x509 = pytest.importorskip("cryptography.x509", reason="makes a certificate for the test")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "cert.pem").write_bytes(pem)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    tls = TlsConfig(certificate_file=tmp_path / "cert.pem", private_key_file=tmp_path / "key.pem")
    config = Config(host="127.0.0.1", port=0, insecure=True, tls=tls)
    server = await serve_grpc(empty(config), config)  # type: ignore[arg-type]
    transport = GrpcTransport(f"https://localhost:{server.port}", tls_roots=pem)
    assert await transport.list_models() == ()
    await transport.close()
    await server.stop(0)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """A folder without a model is refused in words, before any port opens."""
    config = tiny_config(models=[{"name": "none", "source": str(tmp_path)}])
    with pytest.raises(FailedPreconditionError, match="could not be loaded"), serve_plain(config):
        pass
