"""The shipped module: the source builds it, and `publish` uploads it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import wasmtime

from pillarbox import TrackingEvent
from pillarbox.sinks.spacetimedb import publish
from tests.conftest import event
from tests.sinks.spacetimedb.server import SpacetimeDbServer, deliver_batches, make_batch, run_check

SHIPPED = Path(publish.__file__).parent / "wasm"
NAMES = ["tracking_event_v1.wasm", "tracking_event_v2.wasm"]


def described(wasm: bytes) -> bytes:
    """Run a module with a minimal host and return the description that it writes."""
    engine = wasmtime.Engine()
    store, code, linker = wasmtime.Store(engine), wasmtime.Module(engine, wasm), wasmtime.Linker(engine)
    description = bytearray()
    memory: list[wasmtime.Memory] = []

    def sink_write(_sink: int, start: int, length: int) -> int:
        (count,) = memory[0].read(store, length, length + 4)[:1]
        size = int.from_bytes(memory[0].read(store, length, length + 4), "little")
        assert count == size & 0xFF
        description.extend(memory[0].read(store, start, start + size))
        return 0

    for needed in code.imports:
        kind = needed.type
        assert isinstance(kind, wasmtime.FuncType)
        if needed.name == "bytes_sink_write":
            linker.define_func(needed.module, str(needed.name), kind, sink_write)
        else:
            linker.define_func(needed.module, str(needed.name), kind, _refuse)
    instance = linker.instantiate(store, code)
    exports = instance.exports(store)
    sections = exports["memory"]
    assert isinstance(sections, wasmtime.Memory)
    memory.append(sections)
    for export in sorted(one.name for one in code.exports if one.name.startswith("__preinit__")):
        _run(store, exports[export])
    _run(store, exports["__describe_module__"], 1)
    return bytes(description)


def _refuse(*_arguments: object) -> int:
    return 1


def _run(store: wasmtime.Store, function: object, *arguments: int) -> None:
    assert isinstance(function, wasmtime.Func)
    function(store, *arguments)


def exports_of(wasm: bytes) -> set[str]:
    names = {one.name for one in wasmtime.Module(wasmtime.Engine(), wasm).exports}
    return {name for name in names if not name.startswith("__preinit__")} | {
        re.sub(r"^__preinit__\d+_", "", name) for name in names if name.startswith("__preinit__")
    }


def texts(described_bytes: bytes) -> set[str]:
    """Return the names in a description: strings with a length prefix."""
    strings = set()
    for match in re.finditer(rb"[A-Za-z_][A-Za-z0-9_]{2,40}", described_bytes):
        for end in range(match.end(), match.start(), -1):
            length = end - match.start()
            if described_bytes[match.start() - 4 : match.start()] == length.to_bytes(4, "little"):
                strings.add(described_bytes[match.start() : end].decode())
    return strings


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_module_matches_its_source(modules: Path, name: str) -> None:
    """Same exports and description; the bytes depend on versions that cargo may choose."""
    built, shipped = (modules / name).read_bytes(), publish.read_wasm(name)
    assert exports_of(built) == exports_of(shipped)
    assert described(built) == described(shipped)
    assert len(shipped) < 120_000


@pytest.mark.parametrize("name", NAMES)
def test_the_description_names_the_table_its_columns_and_the_functions(modules: Path, name: str) -> None:
    """In both versions; only the 2.x module has the procedure."""
    names = texts(described((modules / name).read_bytes()))
    expected = {"tracking_event", "record_tracking_events", "ScopeKind", "Site", "Module", "User", "Profile"}
    assert expected | set(TrackingEvent.__struct_fields__) <= names
    assert ("record_tracking_events_counted" in names) is (name == NAMES[1])
    exported = exports_of((modules / name).read_bytes())
    assert {"__describe_module__", "__call_reducer__"} <= exported
    assert ("__call_procedure__" in exported) is (name == NAMES[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_module_contains_no_path_and_no_registry(modules: Path, name: str) -> None:
    """Neither the shipped module nor one that is built from source."""
    for data in (publish.read_wasm(name), (modules / name).read_bytes()):
        assert not re.search(rb"/root|/home|/tmp|index\.crates|registry/src", data)


def test_a_changed_module_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum differs."""
    folder = tmp_path / "wasm"
    folder.mkdir()
    (folder / "SHA256SUMS").write_bytes((SHIPPED / "SHA256SUMS").read_bytes())
    (folder / NAMES[0]).write_bytes(publish.read_wasm(NAMES[0]) + b"\0")
    monkeypatch.setattr(publish, "files", lambda _package: tmp_path)
    with pytest.raises(publish.PublishError, match="checksum"):
        publish.read_wasm(NAMES[0])


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PILLARBOX_")}
    command = [sys.executable, "-m", "pillarbox", "spacetimedb", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=60, check=False)


def test_publish_creates_a_database_that_accepts_events(shared_server: SpacetimeDbServer, tmp_path: Path) -> None:
    """Without Rust, and with a new identity whose token is not printed."""
    completed = run("publish", "--server", shared_server.url, "--database", "by-command", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    token = tmp_path / "spacetimedb.token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text().strip() not in completed.stdout + completed.stderr
    assert len(completed.stdout.splitlines()) <= 24
    url = f"spacetimedb://127.0.0.1:{shared_server.port}/by-command?confirm_wait=0&token_file={token}"
    assert all(check.ok for check in run_check(url))
    assert deliver_batches(url, make_batch(event(1)))[1]
    for options, word in (([], "unchanged"), (["--replace"], "updated")):
        again = run("publish", "--server", shared_server.url, "--database", "by-command", "--json", *options, cwd=tmp_path)
        assert (again.returncode, json.loads(again.stdout)["action"]) == (0, word)
    assert deliver_batches(url, make_batch(event(1)))[1]
    query = f"SELECT COUNT(*) AS n FROM {publish.TABLE}"
    headers = {"Authorization": f"Bearer {token.read_text().strip()}"}
    assert json.loads(shared_server.request("POST", "/v1/database/by-command/sql", query.encode(), **headers)[1])[0][
        "rows"
    ] == [[1]]


@pytest.mark.parametrize(
    ("database", "message"),
    [
        ("events", "belongs to another identity"),
        (
            "other",
            "another module (tables: note; functions: lacks_profile, other_arguments, record_notes), which is not replaced",
        ),
        ("Not A Name", "lower-case letters"),
    ],
)
def test_publish_changes_no_database_of_others(
    shared_server: SpacetimeDbServer, tmp_path: Path, database: str, message: str
) -> None:
    """It says what to do instead."""
    before = shared_server.request("GET", f"/v1/database/{database.replace(' ', '-')}/schema?version=9")
    completed = run("publish", "--server", shared_server.url, "--database", database, cwd=tmp_path)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert shared_server.request("GET", f"/v1/database/{database.replace(' ', '-')}/schema?version=9") == before


def test_publish_reports_an_unreachable_server(tmp_path: Path) -> None:
    """It leaves no file behind."""
    completed = run("publish", "--server", "http://127.0.0.1:1", "--database", "x", cwd=tmp_path)
    assert completed.returncode == 2
    assert "cannot connect to" in completed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("major", [1, 2])
def test_scaffold_prints_a_table_and_a_function(tmp_path: Path, major: int) -> None:
    """For the requested version."""
    completed = run("scaffold", "--for", major, cwd=tmp_path)
    assert completed.returncode == 0
    assert f"#[spacetimedb::table({'name' if major == 1 else 'accessor'} = tracking_event)]" in completed.stdout
    assert "pub fn record_tracking_events(ctx: &ReducerContext, events: Vec<TrackingEvent>)" in completed.stdout
