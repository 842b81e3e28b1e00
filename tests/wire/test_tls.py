"""TLS between the client and a plain gRPC server."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from patchbay.errors import UnavailableError, UnsupportedError
from patchbay.ir.artifacts import ArtifactInfo, digest_of
from patchbay.ir.dtypes import float32
from patchbay.ir.graph import TensorData
from patchbay.transport.grpc import GrpcTransport
from patchbay_server.transport.registration import add_servicer_to_server
from patchbay_server.transport.servicer import Servicer
from tests.wire.conftest import KEY
from tests.wire.fakes import FakeBackend

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A private key and a self-signed certificate for localhost."""
    folder: Path = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command = ["openssl", "req", "-x509", *curve, "-nodes", "-days", "2", *subject, "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return key.read_bytes(), cert.read_bytes()


@pytest.fixture
async def tls_port(certificate: tuple[bytes, bytes], servicer: Servicer) -> AsyncIterator[int]:
    """Port of a server that speaks TLS only."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_servicer_to_server(servicer, server)
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([certificate]))
    await server.start()
    yield port
    await server.stop(0)


async def test_a_trusted_certificate(tls_port: int, certificate: tuple[bytes, bytes], backend: FakeBackend) -> None:
    """With its certificate trusted, a server behind grpcs:// answers, key included."""
    transport = GrpcTransport(f"grpcs://localhost:{tls_port}", api_key=KEY, tls_roots=certificate[1])
    assert await transport.list_models() == (backend.summary,)
    tensor = TensorData(float32, (3,), bytes(12))
    with pytest.raises(UnsupportedError, match="keeps no artifacts"):  # uploads have a connection of their own
        await transport.put_artifact(ArtifactInfo(digest_of(tensor), float32, (3,), 12), tensor)
    await transport.close()


@pytest.mark.parametrize("scheme", ["grpcs://", "grpc://"])
async def test_an_untrusted_certificate_or_no_tls(tls_port: int, scheme: str) -> None:
    """A certificate that nobody vouches for, or plain text to a TLS port, is an UnavailableError with what gRPC saw."""
    transport = GrpcTransport(f"{scheme}localhost:{tls_port}", api_key=KEY)
    with pytest.raises(UnavailableError, match="gRPC says"):
        await transport.list_models()
    await transport.close()


async def test_tls_to_a_plain_port() -> None:
    """grpcs:// to a server without TLS says that this is the matter, not that nobody answers."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("localhost:0")
    await server.start()
    transport = GrpcTransport(f"grpcs://localhost:{port}")
    with pytest.raises(UnavailableError, match="does the server speak TLS"):
        await transport.list_models()
    await transport.close()
    await server.stop(0)
