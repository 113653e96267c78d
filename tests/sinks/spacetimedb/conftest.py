"""The server and the modules, created once for all tests in this directory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sinks.spacetimedb.server import ROOT, SpacetimeDbServer


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with our modules, built from source, and `other-module`."""
    folder = Path(os.environ.get("PILLARBOX_TEST_MODULES") or tmp_path_factory.mktemp("modules"))
    build = ROOT / "modules/spacetimedb/build"
    if not (folder / "tracking_event_v1.wasm").exists():
        subprocess.run([build, folder], check=True)
    if not (folder / "module.wasm").exists():
        subprocess.run([build, folder, ROOT / "tests/data/other-module"], check=True)
    return folder


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory, modules: Path) -> Iterator[SpacetimeDbServer]:
    """A server that no test kills, with the databases `events` and `other`."""
    server = SpacetimeDbServer(tmp_path_factory.mktemp("spacetimedb"))
    try:
        server.publish("events", (modules / "tracking_event_v1.wasm").read_bytes())
        server.publish("other", (modules / "module.wasm").read_bytes())
        yield server
    finally:
        server.kill()


@pytest.fixture
def own_server(tmp_path: Path, modules: Path) -> Iterator[SpacetimeDbServer]:
    """A server that the test may kill."""
    server = SpacetimeDbServer(tmp_path / "server")
    try:
        server.publish("events", (modules / "tracking_event_v1.wasm").read_bytes())
        yield server
    finally:
        server.kill()
