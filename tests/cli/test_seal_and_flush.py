"""`pillarbox seal` and `pillarbox flush`, as a user types them, beside real writers and a real deliverer."""

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
from tests.cli.test_commands import CLEAN, PILLARBOX, bare, ids, run
from tests.conftest import event, wait_until

# Stores an event for each line that it reads, and says so; what it stores is sealed by age only after a long time.
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

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def writers(folder: Path, count: int = 1) -> Iterator[list[Writer]]:
    made: list[Writer] = []
    try:
        made.extend(Writer(folder) for _ in range(count))
        yield made
    finally:
        for writer in made:
            writer.end()


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


def call(command: str, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """What a command answers, which has more time than `run` gives it: none ends because its time is over."""
    done = run(command, "-d", "box", "--json", "--timeout", "600", *more, cwd=folder)
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


def sealed(folder: Path) -> list[Path]:
    return sorted((folder / "box").glob("sealed-*"))


def test_seal_reaches_every_writer_and_waits_for_them(tmp_path: Path) -> None:
    """An idle one and one that starts later have nothing to seal."""
    with writers(tmp_path, 3) as (first, second, _idle):
        first.store("a", "b")
        second.store("c")
        code, done = call("seal", tmp_path)
        assert (code, len(done["sealed"]), done["unsealed"], done["reason"]) == (0, 2, [], "")
        assert done["seconds"] < 60  # of the time that `call` gives it
        assert len(sealed(tmp_path)) == 2
        second.store("d")
        with writers(tmp_path) as (late,):
            late.store("e")
            assert call("seal", tmp_path)[0] == 0
        assert len(sealed(tmp_path)) == 4
    text = b"".join(file.read_bytes() for file in sealed(tmp_path))
    assert [text.count(b'"event_id":"%c"' % letter) for letter in b"abcde"] == [1] * 5
    assert (tmp_path / "box" / layout.SEAL_REQUEST).stat().st_mode & 0o777 == 0o600


def test_with_nothing_to_seal_it_asks_nobody(tmp_path: Path) -> None:
    """And an outbox that is not there is not made."""
    (tmp_path / "box").mkdir(mode=0o700)
    done = run("seal", "-d", "box", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"nothing to seal\n")
    assert list((tmp_path / "box").iterdir()) == []
    missing = run("seal", "-d", "missing", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (2, b"")
    assert not (tmp_path / "missing").exists()


def test_what_a_killed_writer_left_is_named(tmp_path: Path) -> None:
    """It waits for no time that cannot help; the next start adopts it."""
    with writers(tmp_path, 2) as (dead, living):
        dead.store("a")
        living.store("b")
        dead.end()
        code, done = call("seal", tmp_path)
        assert (code, len(done["sealed"]), len(done["unsealed"])) == (1, 1, 1)
        assert done["unsealed"] == done["orphaned"]
        assert (
            done["reason"] == "1 segment of dead writers; the next start of an application or of pillarbox deliver recovers it"
        )
        assert done["seconds"] < 60
        flushed = run("flush", "-d", "box", cwd=tmp_path)
        assert (flushed.returncode, b"of dead writers" in flushed.stdout) == (1, True)
    with delivering(tmp_path):
        assert call("flush", tmp_path)[0] == 0
    assert ids(tmp_path / "events.db") == ["b", "a"]


def test_a_writer_that_hangs_is_told_from_one_that_is_dead(tmp_path: Path) -> None:
    """Stopped by a signal, it holds its file."""
    with writers(tmp_path) as (writer,):
        writer.store("a")
        writer.process.send_signal(signal.SIGSTOP)
        code, done = call("seal", tmp_path, "--timeout", "1.5")
        writer.process.send_signal(signal.SIGCONT)
        assert (code, len(done["unsealed"]), done["orphaned"]) == (1, 1, [])
        assert "the writer hangs" in done["reason"]
        assert call("seal", tmp_path)[0] == 0


def test_flush_waits_until_it_is_delivered(tmp_path: Path) -> None:
    """What several processes stored, by the process that delivers."""
    with writers(tmp_path, 2) as (first, second), delivering(tmp_path):
        for number in range(20):
            (first, second)[number % 2].store(f"e-{number:02d}")
        code, done = call("flush", tmp_path)
        assert (code, done["pending_batches"], done["unsealed"], done["reason"]) == (0, 0, [], "")
        assert sorted(ids(tmp_path / "events.db")) == [f"e-{number:02d}" for number in range(20)]
        assert run("flush", "-d", "box", cwd=tmp_path).stdout == b"everything is delivered\n"


def test_flush_says_why_it_does_not_get_there(tmp_path: Path) -> None:
    """Nobody delivers; or the one who does is refused."""
    run("enqueue", "-d", "box", cwd=tmp_path, stdin=bare(1))
    done = run("flush", "-d", "box", "--timeout", "0.3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout == b"delivered 0 of 1 batch; not delivered after 0.3 s; no delivery worker yet\n"
    with delivering(tmp_path, "sqlite:///missing/events.db"):
        lock = tmp_path / "box" / "deliver.lock"
        wait_until(lambda: b"stopped" in lock.read_bytes() or b"waiting" in lock.read_bytes())  # it begins as idle
        code, found = call("flush", tmp_path, "--timeout", "1")
        assert (code, found["batches"], found["pending_batches"]) == (1, 1, 1)
        assert "stopped: " in found["reason"] or "waiting: " in found["reason"]


def test_within_a_process_too_the_request_is_followed(tmp_path: Path) -> None:
    """With the reason "manual"; what `enqueue` answers does not change."""
    with Outbox(str(tmp_path / "box"), flush_interval=3600.0) as outbox:
        assert outbox.enqueue(event(1))
        assert call("seal", tmp_path)[0] == 0
        wait_until(lambda: outbox.stats().sealed["manual"] > 0)  # counted once it has its name
        assert outbox.stats().sealed["manual"] == 1


@pytest.mark.parametrize("command", ["seal", "flush"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_at_once(tmp_path: Path, command: str, number: signal.Signals) -> None:
    """Quietly, with exit code 130, and what was asked for goes on."""
    with writers(tmp_path) as (writer,):
        writer.store("a")
        writer.process.send_signal(signal.SIGSTOP)
        request = tmp_path / "box" / layout.SEAL_REQUEST
        asking = subprocess.Popen(
            [*PILLARBOX, command, "-d", "box", "--timeout", "600"],
            cwd=tmp_path, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            wait_until(lambda: request.exists() and request.stat().st_size > 0)
            asking.send_signal(number)
            assert (asking.communicate(timeout=60), asking.returncode) == ((b"", b""), 130)
        finally:
            asking.kill()
            writer.process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(sealed(tmp_path)) == 1)


def test_a_request_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    """A link is not followed."""
    with writers(tmp_path) as (writer,):
        writer.store("a")
        (tmp_path / "box" / layout.SEAL_REQUEST).symlink_to(tmp_path / "elsewhere")
        done = run("seal", "-d", "box", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"is a link" in done.stderr
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes as another")
def test_what_root_asks_for_belongs_to_the_owner_of_the_directory(tmp_path: Path) -> None:
    """So that the owner can ask too."""
    (tmp_path / "box").mkdir(mode=0o700)
    (tmp_path / "box" / "active-dead-1.ndjson").write_bytes(b'{"event":{}}\n')
    os.chown(tmp_path / "box", 12345, 12346)
    assert run("seal", "-d", "box", "--timeout", "0.1", cwd=tmp_path).returncode == 1
    found = (tmp_path / "box" / layout.SEAL_REQUEST).stat()
    assert (found.st_uid, found.st_gid) == (12345, 12346)
