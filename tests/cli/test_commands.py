"""The commands, run as a user runs them: in real processes, with real pipes and signals."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.command_server import CommandServer, depends_on_start
from tests.conftest import existing_events

PILLARBOX = [sys.executable, "-m", "pillarbox"]
NO_SEAL_BY_AGE = {"PILLARBOX_FLUSH_INTERVAL": "3600"}  # so that events enqueued one by one end up in one batch
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PILLARBOX_", "TRACKING_OUTBOX_"))}


def run(
    *arguments: object, cwd: Path, stdin: bytes = b"", environ: dict[str, str] | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end."""
    environment = CLEAN | (environ or {})
    if not depends_on_start(environment):
        return command_server().run(list(map(str, arguments)), cwd, stdin, environment, seconds)
    command = [*PILLARBOX, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=seconds, env=environment, check=False)


@functools.cache
def command_server() -> CommandServer:
    """The one of this process."""
    return CommandServer()


def delivered_event_ids(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [row[0] for row in database.execute("SELECT event_id FROM tracking_event ORDER BY rowid")]


def event_line(number: int) -> bytes:
    return b'{"event_id":"e-%06d","event_key":"k","scope_kind":"Site","scope_id":"s"}\n' % number


def test_the_version_says_whether_the_c_extensions_are_in_use(tmp_path: Path) -> None:
    """Their use decides how fast Pillarbox is, so `--version` must name it."""
    has_extensions = find_spec("pillarbox._speedups") is not None
    for pure_python, how in (("1", "no C extensions"), ("", "C extensions" if has_extensions else "no C extensions")):
        completed = run("--version", cwd=tmp_path, environ={"PILLARBOX_PURE_PYTHON": pure_python})
        expected = f"pillarbox {version('pillarbox')} ({how}), Python {platform.python_version()}\n"
        assert (completed.returncode, completed.stdout.decode(), completed.stderr) == (0, expected, b"")


def test_enqueue_then_deliver_then_status(tmp_path: Path) -> None:
    """The three commands work on the same directory."""
    lines = b"".join(map(event_line, range(1200)))
    enqueued = run("enqueue", "-d", "box", "--ack", cwd=tmp_path, stdin=lines)
    assert enqueued.returncode == 0
    assert enqueued.stdout.split() == [b"e-%06d" % number for number in range(1200)]
    before = json.loads(run("status", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert before["sealed_files"] >= 1
    assert before["heartbeat"] is None
    delivered = run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path)
    assert (delivered.returncode, delivered.stdout[:15]) == (0, b"delivered 1,200")
    assert delivered_event_ids(tmp_path / "events.db") == [f"e-{number:06d}" for number in range(1200)]
    after = json.loads(run("status", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert (after["pending_bytes"], after["heartbeat"]["delivered"]) == (0, 1200)
    assert b"pending       0 files, 0 bytes" in run("status", "-d", "box", cwd=tmp_path).stdout


def test_settings_can_come_from_the_environment_and_from_toml(tmp_path: Path) -> None:
    """The names of the settings are the same as on the command line."""
    (tmp_path / "p.toml").write_text('[outbox]\nsink = "sqlite:///events.db"\n')
    assert run("enqueue", cwd=tmp_path, stdin=event_line(1), environ={"TRACKING_OUTBOX_DIR": "box"}).returncode == 0
    assert run("deliver", "--once", "-c", "p.toml", cwd=tmp_path, environ={"PILLARBOX_DIRECTORY": "box"}).returncode == 0
    assert delivered_event_ids(tmp_path / "events.db") == ["e-000001"]


def test_an_invalid_line_is_reported_with_its_number(tmp_path: Path) -> None:
    """The other lines are stored, and the exit code is 1."""
    lines = [
        event_line(1),
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","colour":"red"}\n',
        b"not json\n",
        b"\n",
        b'{"event_key":"k","scope_kind":5,"scope_id":"s"}\n',
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","metadata_json":"{"}\n',
        b'{"event_key":"\xff","scope_kind":"Site","scope_id":"s"}\n',
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","occurred_at_micros":9223372036854775808}\n',
        event_line(2).rstrip(b"\n"),
    ]
    completed = run("enqueue", "-d", "box", "--ack", cwd=tmp_path, stdin=b"".join(lines))
    assert completed.returncode == 1
    assert completed.stdout.split() == [b"e-000001", b"e-000002"]
    errors = completed.stderr.decode()
    for number, word in [(2, "colour"), (3, "JSON"), (5, "scope_kind"), (6, "metadata_json"), (7, "utf-8"), (8, "occurred_at")]:
        assert any(line.startswith(f"line {number}: ") and word in line for line in errors.splitlines()), (number, errors)
    assert "accepted 2 events, dropped 6" in errors


def test_deliver_reads_a_directory_of_the_older_system(existing: Path, tmp_path: Path) -> None:
    """All its events are delivered."""
    assert run("deliver", "-d", existing, "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode == 0
    assert delivered_event_ids(tmp_path / "events.db") == [event["event_id"] for event in existing_events()]


@pytest.mark.parametrize(
    ("arguments", "environ", "error"),
    [
        (["enqueue"], {}, "PILLARBOX_DIRECTORY"),
        (
            ["enqueue", "-d", "box"],
            {"PILLARBOX_BATCH_SIZE": "many"},
            "batch_size = 'many' (from environment PILLARBOX_BATCH_SIZE)",
        ),
        (["enqueue", "-d", "file"], {}, "file: is a file"),
        (["enqueue", "-d", "box", "missing.ndjson"], {}, "missing.ndjson"),
        (["enqueue", "-d", "box", "--max-bytes", "x"], {}, "max_bytes = 'x' (from the command line)"),
        (["deliver", "-d", "box"], {}, "PILLARBOX_SINK"),
        (["deliver", "-d", "box", "--sink", "nosuch://x"], {}, "sqlite://"),
        (["status", "-d", "missing"], {}, "missing: cannot be listed"),
        (["check", "sqlite://host/x"], {}, "sqlite:///relative/path.db"),
        (["nonsense"], {}, "nonsense"),
    ],
)
def test_a_usage_error_is_one_clear_sentence_and_exit_code_2(
    tmp_path: Path, arguments: list[str], environ: dict[str, str], error: str
) -> None:
    """The message says how to correct the command; there is no traceback."""
    (tmp_path / "file").write_text("")
    completed = run(*arguments, cwd=tmp_path, environ=environ)
    assert completed.returncode == 2
    assert error in completed.stderr.decode()
    assert b"Traceback" not in completed.stderr


def test_deliver_once_reports_pending_batches_and_the_reason(tmp_path: Path) -> None:
    """The exit code is 1, and no event is lost."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=event_line(1))
    completed = run("deliver", "-d", "box", "--sink", "sqlite:///no/such/folder.db", "--once", cwd=tmp_path)
    assert completed.returncode == 1
    assert b"1 batch pending; stopped: " in completed.stdout
    assert b"create its directory" in completed.stdout
    assert b"stopped: " in run("status", "-d", "box", cwd=tmp_path).stdout


def test_deliver_has_an_option_for_the_rate(tmp_path: Path) -> None:
    """The first batch is sent and the next would have to wait. An invalid rate is an error that names the allowed values."""
    for first in (0, 300, 600):  # each command seals a batch; two of these are too large for one call
        lines = b"".join(map(event_line, range(first, first + 300)))
        run("enqueue", "-d", "box", cwd=tmp_path, stdin=lines, environ=NO_SEAL_BY_AGE)
    assert len(list((tmp_path / "box").glob("sealed-*"))) == 3
    command = ("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", "-q")
    invalid = run(*command, "--max-rate", "0", cwd=tmp_path)
    assert (invalid.returncode, b"max_rate" in invalid.stderr, b"events per second" in invalid.stderr) == (2, True, True)
    assert b"live_share" in run(*command, "--live-share", "2", cwd=tmp_path).stderr
    completed = run(*command, "--max-rate", "10", "--live-share", "0.5", "--timeout", "0.5", cwd=tmp_path)
    assert (completed.returncode, len(delivered_event_ids(tmp_path / "events.db"))) == (1, 300)


def test_check_reports_whether_a_destination_is_usable(tmp_path: Path) -> None:
    """As text and as JSON."""
    assert run("check", "sqlite:///events.db", cwd=tmp_path).returncode == 0
    unusable = run("check", "sqlite:///no/such.db", "--json", cwd=tmp_path)
    assert unusable.returncode == 1
    (finding,) = json.loads(unusable.stdout)
    assert not finding["ok"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_deliver_runs_until_it_is_stopped(tmp_path: Path, signal_number: signal.Signals) -> None:
    """SIGINT and SIGTERM end it, and it prints how much it delivered."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=event_line(1))
    command = [*PILLARBOX, "deliver", "-d", "box", "--sink", "sqlite:///events.db"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN)
    try:
        while json.loads(run("status", "-d", "box", "--json", cwd=tmp_path).stdout)["pending_files"]:
            assert process.poll() is None
        process.send_signal(signal_number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out[:11]) == (0, b"delivered 1")


def test_if_enqueue_is_killed_every_acknowledged_event_arrives_once(tmp_path: Path) -> None:
    """The process gets SIGKILL after 20,000 acknowledgements."""
    (tmp_path / "lines.ndjson").write_bytes(b"".join(map(event_line, range(200_000))))
    command = [*PILLARBOX, "enqueue", "-d", "box", "--ack", "-q", "lines.ndjson"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=CLEAN)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline() for _ in range(20_000)]
    process.kill()
    acknowledged += [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    deliver = ("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once")
    assert run(*deliver, cwd=tmp_path, seconds=300).returncode == 0  # slow: it delivers some sixty files and fsyncs each
    arrived = delivered_event_ids(tmp_path / "events.db")
    assert len(arrived) == len(set(arrived)) < 200_000
    assert {line.decode().strip() for line in acknowledged} <= set(arrived)
    assert arrived == sorted(arrived)


def test_without_typer_the_command_says_what_to_install(tmp_path: Path) -> None:
    """One sentence, no traceback."""
    code = "import sys; sys.modules['typer'] = None; from pillarbox.cli import start; start()"
    completed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert completed.returncode == 1
    assert completed.stderr.decode().strip() == "pillarbox: the command line needs typer; pip install 'pillarbox[cli]'"
