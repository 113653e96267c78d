"""The command line, as a user types it: real processes, real pipes, real signals."""

from __future__ import annotations

import contextlib
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

from tests.conftest import existing_events

PILLARBOX = [sys.executable, "-m", "pillarbox"]
UNHURRIED = {"PILLARBOX_FLUSH_INTERVAL": "3600"}  # for who stores one by one: no file is sealed by age in between
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PILLARBOX_", "TRACKING_OUTBOX_"))}


def run(
    *arguments: object, cwd: Path, stdin: bytes = b"", environ: dict[str, str] | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[bytes]:
    command = [*PILLARBOX, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, timeout=seconds, env=CLEAN | (environ or {}), check=False
    )


def ids(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [row[0] for row in database.execute("SELECT event_id FROM tracking_event ORDER BY rowid")]


def bare(number: int) -> bytes:
    return b'{"event_id":"e-%06d","event_key":"k","scope_kind":"Site","scope_id":"s"}\n' % number


def test_the_version_says_whether_the_c_extensions_are_in_use(tmp_path: Path) -> None:
    """Speed depends on it."""
    is_there = find_spec("pillarbox._speedups") is not None
    for declined, how in (("1", "no C extensions"), ("", "C extensions" if is_there else "no C extensions")):
        done = run("--version", cwd=tmp_path, environ={"PILLARBOX_PURE_PYTHON": declined})
        expected = f"pillarbox {version('pillarbox')} ({how}), Python {platform.python_version()}\n"
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")


def test_enqueue_then_deliver_then_status(tmp_path: Path) -> None:
    """The three commands on one directory."""
    lines = b"".join(map(bare, range(1200)))
    done = run("enqueue", "-d", "box", "--ack", cwd=tmp_path, stdin=lines)
    assert done.returncode == 0
    assert done.stdout.split() == [b"e-%06d" % number for number in range(1200)]
    waiting = json.loads(run("status", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert waiting["sealed_files"] >= 1
    assert waiting["heartbeat"] is None
    delivered = run("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", cwd=tmp_path)
    assert (delivered.returncode, delivered.stdout[:15]) == (0, b"delivered 1,200")
    assert ids(tmp_path / "events.db") == [f"e-{number:06d}" for number in range(1200)]
    after = json.loads(run("status", "-d", "box", "--json", cwd=tmp_path).stdout)
    assert (after["pending_bytes"], after["heartbeat"]["delivered"]) == (0, 1200)
    assert b"pending       0 files, 0 bytes" in run("status", "-d", "box", cwd=tmp_path).stdout


def test_settings_come_from_the_environment_and_from_toml_too(tmp_path: Path) -> None:
    """Under the same names."""
    (tmp_path / "p.toml").write_text('[outbox]\nsink = "sqlite:///events.db"\n')
    assert run("enqueue", cwd=tmp_path, stdin=bare(1), environ={"TRACKING_OUTBOX_DIR": "box"}).returncode == 0
    assert run("deliver", "--once", "-c", "p.toml", cwd=tmp_path, environ={"PILLARBOX_DIRECTORY": "box"}).returncode == 0
    assert ids(tmp_path / "events.db") == ["e-000001"]


def test_a_line_that_is_no_event_is_reported_with_its_number(tmp_path: Path) -> None:
    """The rest goes on, and the exit code says so."""
    lines = [
        bare(1),
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","colour":"red"}\n',
        b"not json\n",
        b"\n",
        b'{"event_key":"k","scope_kind":5,"scope_id":"s"}\n',
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","metadata_json":"{"}\n',
        b'{"event_key":"\xff","scope_kind":"Site","scope_id":"s"}\n',
        b'{"event_key":"k","scope_kind":"Site","scope_id":"s","occurred_at_micros":9223372036854775808}\n',
        bare(2).rstrip(b"\n"),
    ]
    done = run("enqueue", "-d", "box", "--ack", cwd=tmp_path, stdin=b"".join(lines))
    assert done.returncode == 1
    assert done.stdout.split() == [b"e-000001", b"e-000002"]
    said = done.stderr.decode()
    for number, word in [(2, "colour"), (3, "JSON"), (5, "scope_kind"), (6, "metadata_json"), (7, "utf-8"), (8, "occurred_at")]:
        assert any(line.startswith(f"line {number}: ") and word in line for line in said.splitlines()), (number, said)
    assert "accepted 2 events, dropped 6" in said


def test_what_the_older_system_left_is_delivered_by_the_command(existing: Path, tmp_path: Path) -> None:
    """All of it."""
    assert run("deliver", "-d", existing, "--sink", "sqlite:///events.db", "--once", cwd=tmp_path).returncode == 0
    assert ids(tmp_path / "events.db") == [event["event_id"] for event in existing_events()]


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
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
    tmp_path: Path, arguments: list[str], environ: dict[str, str], said: str
) -> None:
    """With the way out; no traceback."""
    (tmp_path / "file").write_text("")
    done = run(*arguments, cwd=tmp_path, environ=environ)
    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_deliver_once_says_what_is_left_and_why(tmp_path: Path) -> None:
    """Exit code 1, and nothing lost."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=bare(1))
    done = run("deliver", "-d", "box", "--sink", "sqlite:///no/such/folder.db", "--once", cwd=tmp_path)
    assert done.returncode == 1
    assert b"1 batch pending; stopped: " in done.stdout
    assert b"create its directory" in done.stdout
    assert b"stopped: " in run("status", "-d", "box", cwd=tmp_path).stdout


def test_the_rate_is_an_option_of_deliver_too(tmp_path: Path) -> None:
    """The first batch goes, the next would have to wait; a rate that is none is refused with what is allowed."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=b"".join(map(bare, range(1200))), environ=UNHURRIED)
    words = ("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once", "-q")
    refused = run(*words, "--max-rate", "0", cwd=tmp_path)
    assert (refused.returncode, b"max_rate" in refused.stderr, b"events per second" in refused.stderr) == (2, True, True)
    assert b"live_share" in run(*words, "--live-share", "2", cwd=tmp_path).stderr
    done = run(*words, "--max-rate", "10", "--live-share", "0.5", "--timeout", "0.5", cwd=tmp_path)
    assert (done.returncode, len(ids(tmp_path / "events.db"))) == (1, 500)


def test_check_says_whether_a_destination_fits(tmp_path: Path) -> None:
    """As text and as JSON."""
    assert run("check", "sqlite:///events.db", cwd=tmp_path).returncode == 0
    bad = run("check", "sqlite:///no/such.db", "--json", cwd=tmp_path)
    assert bad.returncode == 1
    (finding,) = json.loads(bad.stdout)
    assert not finding["ok"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_deliver_runs_until_it_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    """And says what it did."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=bare(1))
    command = [*PILLARBOX, "deliver", "-d", "box", "--sink", "sqlite:///events.db"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN)
    try:
        while json.loads(run("status", "-d", "box", "--json", cwd=tmp_path).stdout)["pending_files"]:
            assert process.poll() is None
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out[:11]) == (0, b"delivered 1")


def test_killed_in_the_middle_of_enqueue_every_acknowledged_event_arrives_once(tmp_path: Path) -> None:
    """Kill -9 after 20,000 acknowledgements."""
    (tmp_path / "lines.ndjson").write_bytes(b"".join(map(bare, range(200_000))))
    command = [*PILLARBOX, "enqueue", "-d", "box", "--ack", "-q", "lines.ndjson"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=CLEAN)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline() for _ in range(20_000)]
    process.kill()
    acknowledged += [line for line in process.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    words = ("deliver", "-d", "box", "--sink", "sqlite:///events.db", "--once")
    assert run(*words, cwd=tmp_path, seconds=300).returncode == 0  # of some sixty files, each of which is synced
    arrived = ids(tmp_path / "events.db")
    assert len(arrived) == len(set(arrived)) < 200_000
    assert {line.decode().strip() for line in acknowledged} <= set(arrived)
    assert arrived == sorted(arrived)


def test_without_its_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    """One sentence."""
    code = "import sys; sys.modules['typer'] = None; from pillarbox.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.decode().strip() == "pillarbox: the command line needs typer; pip install 'pillarbox[cli]'"
