"""Fixtures for the tests of sinks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost; its key is in the file with the additional suffix `.key`."""
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    extensions = ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{file}.key", "-out", str(file)]
    subprocess.run([*command.split(), *extensions], check=True, capture_output=True, timeout=30)
    return file
