"""`pillarbox seal` and `pillarbox flush`, run as a user runs them, beside real writers and a real delivery worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pillarbox import Outbox
from pillarbox.store import layout
from tests.cli.test_commands import CLEAN, PILLARBOX, delivered_event_ids, event_line, run
from tests.conftest import event, wait_until

# Stores an event for each input line and confirms it. The long flush interval prevents a seal by age.
WRITER = """
import sys
from pillarbox import Outbox, TrackingEvent
with Outbox("box", flush_interval=3600.0) as outbox:
    print("started", flush=True)
    for line in sys.stdin:
        assert outbox.enqueue(TrackingEvent(event_id=line.strip(), event_key="k", scope_kind="Site", scope_id="s"))
        print("stored", flush=True)
"""


class Writer:
    """A process that writes into `box`."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", WRITER]
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=CLEAN)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"started\n"

    def store(self, *names: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for name in names:
            self.process.stdin.write(name.encode() + b"\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == b"stored\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def writers(folder: Path, count: int = 1) -> Iterator[list[Writer]]:
    started: list[Writer] = []
    try:
        started.extend(Writer(folder) for _ in range(count))
        yield started
    finally:
        for writer in started:
            writer.kill()


@contextlib.contextmanager
def delivering(folder: Path, sink: str = "sqlite:///events.db") -> Iterator[subprocess.Popen[bytes]]:
    command = [*PILLARBOX, "deliver", "-q", "-d", "box", "--sink", sink]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=CLEAN)
    try:
        wait_until(lambda: (folder / "box" / "deliver.lock").exists() and (folder / "box" / "deliver.lock").stat().st_size > 0)
        yield process
    finally:
        process.kill()
        process.communicate()


def run_json(command: str, folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run a command with a timeout that is longer than that of `run`, so that it never ends for lack of time."""
    completed = run(command, "-d", "box", "--json", "--timeout", "600", *options, cwd=folder)
    assert completed.stderr == b""
    return completed.returncode, json.loads(completed.stdout)


def batch_files(folder: Path) -> list[Path]:
    return sorted((folder / "box").glob("sealed-*"))


def test_seal_reaches_every_writer_and_waits_for_them(tmp_path: Path) -> None:
    """A writer that stored nothing and one that started later have nothing to seal."""
    with writers(tmp_path, 3) as (first, second, _idle):
        first.store("a", "b")
        second.store("c")
        code, report = run_json("seal", tmp_path)
        assert (code, len(report["sealed"]), report["unsealed"], report["reason"]) == (0, 2, [], "")
        assert report["seconds"] < 60  # far below the timeout of `run_json`
        assert len(batch_files(tmp_path)) == 2
        second.store("d")
        with writers(tmp_path) as (late,):
            late.store("e")
            assert run_json("seal", tmp_path)[0] == 0
        assert len(batch_files(tmp_path)) == 4
    text = b"".join(file.read_bytes() for file in batch_files(tmp_path))
    assert [text.count(b'"event_id":"%c"' % letter) for letter in b"abcde"] == [1] * 5
    assert (tmp_path / "box" / layout.SEAL_REQUEST).stat().st_mode & 0o777 == 0o600


def test_with_nothing_to_seal_no_request_is_written(tmp_path: Path) -> None:
    """A missing outbox directory is not created."""
    (tmp_path / "box").mkdir(mode=0o700)
    completed = run("seal", "-d", "box", cwd=tmp_path)
    assert (completed.returncode, completed.stdout) == (0, b"nothing to seal\n")
    assert list((tmp_path / "box").iterdir()) == []
    missing = run("seal", "-d", "missing", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (2, b"")
    assert not (tmp_path / "missing").exists()


def test_the_segment_of_a_killed_writer_is_reported(tmp_path: Path) -> None:
    """The command does not wait for it; the next start recovers it."""
    with writers(tmp_path, 2) as (dead, other):
        dead.store("a")
        other.store("b")
        dead.kill()
        code, report = run_json("seal", tmp_path)
        assert (code, len(report["sealed"]), len(report["unsealed"])) == (1, 1, 1)
        assert report["unsealed"] == report["orphaned"]
        assert (
            report["reason"]
            == "1 segment of dead writers; the next start of an application or of pillarbox deliver recovers it"
        )
        assert report["seconds"] < 60
        flushed = run("flush", "-d", "box", cwd=tmp_path)
        assert (flushed.returncode, b"of dead writers" in flushed.stdout) == (1, True)
    with delivering(tmp_path):
        assert run_json("flush", tmp_path)[0] == 0
    assert delivered_event_ids(tmp_path / "events.db") == ["b", "a"]


def test_a_hanging_writer_is_distinguished_from_a_dead_one(tmp_path: Path) -> None:
    """A writer stopped by SIGSTOP still has its segment locked."""
    with writers(tmp_path) as (writer,):
        writer.store("a")
        writer.process.send_signal(signal.SIGSTOP)
        code, report = run_json("seal", tmp_path, "--timeout", "1.5")
        writer.process.send_signal(signal.SIGCONT)
        assert (code, len(report["unsealed"]), report["orphaned"]) == (1, 1, [])
        assert "the writer hangs" in report["reason"]
        assert run_json("seal", tmp_path)[0] == 0


def test_flush_waits_until_everything_is_delivered(tmp_path: Path) -> None:
    """Several processes store events, and one delivers them."""
    with writers(tmp_path, 2) as (first, second), delivering(tmp_path):
        for number in range(20):
            (first, second)[number % 2].store(f"e-{number:02d}")
        code, report = run_json("flush", tmp_path)
        assert (code, report["pending_batches"], report["unsealed"], report["reason"]) == (0, 0, [], "")
        assert sorted(delivered_event_ids(tmp_path / "events.db")) == [f"e-{number:02d}" for number in range(20)]
        assert run("flush", "-d", "box", cwd=tmp_path).stdout == b"everything is delivered\n"


def test_flush_says_why_batches_are_not_delivered(tmp_path: Path) -> None:
    """There is no delivery worker, or its destination is unusable."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=event_line(1))
    completed = run("flush", "-d", "box", "--timeout", "0.3", cwd=tmp_path)
    assert (completed.returncode, completed.stderr) == (1, b"")
    assert completed.stdout == b"delivered 0 of 1 batch; not delivered after 0.3 s; no delivery worker yet\n"
    with delivering(tmp_path, "sqlite:///missing/events.db"):
        lock = tmp_path / "box" / "deliver.lock"
        wait_until(lambda: b"stopped" in lock.read_bytes() or b"waiting" in lock.read_bytes())  # its first state is idle
        code, flushed = run_json("flush", tmp_path, "--timeout", "1")
        assert (code, flushed["batches"], flushed["pending_batches"]) == (1, 1, 1)
        assert "stopped: " in flushed["reason"] or "waiting: " in flushed["reason"]


def test_an_outbox_in_this_process_follows_the_request(tmp_path: Path) -> None:
    """The seal is counted with the reason "manual"."""
    with Outbox(str(tmp_path / "box"), flush_interval=3600.0) as outbox:
        assert outbox.enqueue(event(1))
        assert run_json("seal", tmp_path)[0] == 0
        wait_until(lambda: outbox.stats().sealed["manual"] > 0)  # it is counted after the rename
        assert outbox.stats().sealed["manual"] == 1


@pytest.mark.parametrize("command", ["seal", "flush"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_at_once(tmp_path: Path, command: str, signal_number: signal.Signals) -> None:
    """It prints nothing, the exit code is 130, and the seal still happens."""
    with writers(tmp_path) as (writer,):
        writer.store("a")
        writer.process.send_signal(signal.SIGSTOP)
        request = tmp_path / "box" / layout.SEAL_REQUEST
        process = subprocess.Popen(
            [*PILLARBOX, command, "-d", "box", "--timeout", "600"],
            cwd=tmp_path, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            wait_until(lambda: request.exists() and request.stat().st_size > 0)
            process.send_signal(signal_number)
            assert (process.communicate(timeout=60), process.returncode) == ((b"", b""), 130)
        finally:
            process.kill()
            writer.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(batch_files(tmp_path)) == 1)


def test_a_request_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    """A symbolic link is not followed."""
    with writers(tmp_path) as (writer,):
        writer.store("a")
        (tmp_path / "box" / layout.SEAL_REQUEST).unlink()
        (tmp_path / "box" / layout.SEAL_REQUEST).symlink_to(tmp_path / "elsewhere")
        completed = run("seal", "-d", "box", cwd=tmp_path)
        assert (completed.returncode, completed.stdout) == (2, b"")
        assert b"is a link" in completed.stderr
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write into a directory of another user")
def test_a_request_of_root_belongs_to_the_owner_of_the_directory(tmp_path: Path) -> None:
    """So the owner can write the next request."""
    (tmp_path / "box").mkdir(mode=0o700)
    (tmp_path / "box" / "active-dead-1.ndjson").write_bytes(b'{"event":{}}\n')
    os.chown(tmp_path / "box", 12345, 12346)
    assert run("seal", "-d", "box", "--timeout", "0.1", cwd=tmp_path).returncode == 1
    status = (tmp_path / "box" / layout.SEAL_REQUEST).stat()
    assert (status.st_uid, status.st_gid) == (12345, 12346)
