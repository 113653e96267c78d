"""No command imports a module from the working directory, which may be another user's outbox, unless a setting names it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import typer

from pillarbox.cli.main import app
from pillarbox.sinks import schemes
from tests.cli.test_commands import CLEAN, event_line, run

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SCRIPT = [str(Path(sys.executable).parent / "pillarbox")]
PLANTED = "open({marker!r}, 'a').write(__name__ + '\\n')\n"
# What a command needs beside `-d box`, so that it gets as far as its work.
ARGUMENTS = {
    "check": ["sqlite:///events.db"],
    "dead purge": ["-d", "box", "--all"],
    "dead replay": ["-d", "box", "--all"],
    "dead edit": ["-d", "box", "--all", "--editor", "true"],
    "deliver": ["-d", "box", "--once", "--sink", "sqlite:///events.db", "--metrics", "127.0.0.1:0"],
    "flush": ["-d", "box", "--timeout", "1"],
    "import": ["events.ndjson", "-d", "box"],
    "inspect": ["e-000001", "-d", "box"],
    "quarantine purge": ["-d", "box", "--all"],
    "quarantine repair": ["-d", "box", "--all"],
    "redeliver": ["-d", "box", "--all"],
    "sinks add": ["live", "-d", "box"],
    "sinks remove": ["live", "-d", "box"],
    "sinks rename": ["live", "other", "-d", "box"],
    "spacetimedb publish": ["--server", "http://127.0.0.1:9", "--database", "events"],
    "spacetimedb scaffold": [],
}


def all_commands(group: typer.Typer, *words: str) -> list[str]:
    """The words of every command."""
    names = [" ".join((*words, command.name or "")) for command in group.registered_commands]
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            names += all_commands(inner.typer_instance, *words, inner.typer_instance.info.name or "")
    return sorted(names)


def plant_modules(folder: Path) -> Path:
    """Put a module of every name that Python or a dependency has into a folder; each writes its name to the returned file."""
    marker = folder / "imported.txt"
    text = PLANTED.format(marker=str(marker))
    names = {*sys.stdlib_module_names, *packages_distributions(), "backports", "compression", "sitecustomize"}
    for name in names - {"pillarbox"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(text)
    metadata = folder / "evil-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pillarbox.sinks]\nevil = planted_sink:Sink\n")
    (folder / "planted_sink.py").write_text(text)
    return marker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with an outbox in it and a file of events."""
    (tmp_path / "events.ndjson").write_bytes(event_line(1))
    assert run("enqueue", "-d", "box", cwd=tmp_path, stdin=event_line(1)).returncode == 0
    # To read a compressed batch a command imports a package, which it does late.
    compressed = zstd.compress(b'{"event":' + event_line(2).rstrip() + b"}\n")
    (tmp_path / "box" / "sealed-0000000000000001-x.ndjson.zst").write_bytes(compressed)
    return tmp_path


@pytest.mark.parametrize("command", all_commands(app))
def test_no_module_of_a_command_comes_from_the_working_directory(folder: Path, command: str) -> None:
    """Whoever owns the directory would run code as whoever looks at it."""
    marker = plant_modules(folder)
    arguments = [*command.split(), *ARGUMENTS.get(command, ["-d", "box"])]
    completed = subprocess.run(
        [*SCRIPT, *arguments], cwd=folder, env=CLEAN, input=b"", capture_output=True, timeout=60, check=False
    )
    assert not marker.exists(), marker.read_text()
    assert completed.returncode in (0, 1, 2), completed.stderr
    assert b"Traceback" not in completed.stderr


@pytest.mark.parametrize("arguments", [["verify", "-d", "box"], ["tail", "-d", "box"], ["check", "sqlite:///e.db"]])
def test_python_m_pillarbox_imports_no_later_module_from_the_working_directory(folder: Path, arguments: list[str]) -> None:
    """What Python imports before the package's own code runs cannot be helped: the guide says to use `pillarbox`."""
    marker = folder / "imported.txt"
    for name in ("sqlite3", "httpx", "backports", "typer", "rich", "h11", "certifi", "prometheus_client"):
        (folder / f"{name}.py").write_text(PLANTED.format(marker=str(marker)))
    command = [sys.executable, "-m", "pillarbox", *arguments]
    completed = subprocess.run(command, cwd=folder, env=CLEAN, capture_output=True, timeout=60, check=False)
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert not marker.exists(), marker.read_text()


def test_an_installed_sink_is_not_replaced_by_one_in_the_working_directory(folder: Path) -> None:
    """Entry points are looked up on the import path too."""
    plant_modules(folder)
    completed = subprocess.run(
        [*SCRIPT, "check", "evil://x"], cwd=folder, env=CLEAN, capture_output=True, timeout=60, check=False
    )
    assert completed.returncode == 2
    assert "evil" not in schemes()
    assert b"use a URL that begins with one of" in completed.stderr


def test_an_event_type_may_lie_in_the_working_directory(folder: Path) -> None:
    """It is the one module that the user has named; afterwards the directory is not on the path any more."""
    (folder / "shop.py").write_text(
        "import sys, os, msgspec\nassert sys.path[-1] == os.getcwd()\nassert sys.path.count(os.getcwd()) == 1\n"
        "class Click(msgspec.Struct):\n    event_id: str\n"
    )
    program = (
        "import sys, os; from pillarbox.cli.context import load_settings; import pillarbox.cli as cli;"
        "cli._stop_importing_from_working_directory();"
        "print(load_settings(None, event_type='shop:Click').event_type.__name__, os.getcwd() in sys.path, '' in sys.path)"
    )
    completed = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=folder, env=CLEAN, capture_output=True, timeout=60, check=False
    )
    assert completed.stdout == b"Click False False\n", completed.stderr


def test_an_installed_module_wins_over_one_of_the_same_name_in_the_working_directory(folder: Path) -> None:
    """Also as an event type."""
    marker = folder / "imported.txt"
    (folder / "pillarbox.py").write_text(PLANTED.format(marker=str(marker)))
    arguments = ["tail", "-d", "box", "--event-type", "pillarbox:TrackingEvent"]
    completed = subprocess.run([*SCRIPT, *arguments], cwd=folder, env=CLEAN, capture_output=True, timeout=60, check=False)
    assert completed.returncode == 0, completed.stderr
    assert not marker.exists()
