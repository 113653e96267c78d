"""Fixtures for the tests of sinks."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sinks.http_server import Server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost; its key is in the file with the additional suffix `.key`."""
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    extensions = ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{file}.key", "-out", str(file)]
    subprocess.run([*command.split(), *extensions], check=True, capture_output=True, timeout=30)
    return file


@pytest.fixture
def tls_context(certificate: Path) -> ssl.SSLContext:
    """What a server with that certificate needs. Nobody has issued it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, f"{certificate}.key")
    return context


@pytest.fixture
def tls_server(tls_context: ssl.SSLContext) -> Iterator[Server]:
    """An HTTP server over TLS."""
    with Server(tls=tls_context) as running:
        yield running
