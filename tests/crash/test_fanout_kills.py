"""Real processes with two SQLite databases as sinks, which are killed at random moments and around disk operations."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sqlite3
import threading
from collections import Counter
from pathlib import Path

from pillarbox import Outbox
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.reconciliation import reconcile, reconcile_queues
from pillarbox.testing import ManualClock
from tests.crash import kills

KILLS = 20
LIFE_S = 0.15
EVENTS_MAX = 400  # of one life
FLUSH_S = 30.0


def outbox(directory: Path, chance: random.Random, names: str = "ab") -> Outbox:
    return Outbox(
        str(directory / "outbox"),
        sinks={name: f"sqlite:///{directory / name}.db" for name in names},
        batch_size=chance.choice((1, 3, 10)),
        flush_interval=0.005,
        min_free_bytes=0,
    )


def store_until_killed(directory: Path, life: int, chance: random.Random, report_fd: int) -> None:
    """Store events in a child, and report the accepted ones through a pipe. Never returns."""
    logging.disable(logging.CRITICAL)
    kills._PRCTL(kills._PR_SET_PDEATHSIG, signal.SIGKILL)
    if chance.random() < 0.7:
        kills.kill_self_later(chance)
    storing = outbox(directory, chance)
    for number in range(EVENTS_MAX):
        if storing.enqueue(kills.make_event(life, number)):
            os.write(report_fd, f"{life}-{number}\n".encode())
        if number % 10 == 9:
            # wait: gives the parent time to kill this process in the middle
            threading.Event().wait(0.004)
    signal.pause()


def run_life(directory: Path, life: int, chance: random.Random) -> set[str]:
    """Run a child until it is killed. Returns the ids of the events that it accepted."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            store_until_killed(directory, life, chance, write_fd)
        finally:
            os._exit(kills.FAILED)
    os.close(write_fd)
    killer = threading.Timer(LIFE_S * chance.random() * 2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with open(read_fd, "rb") as file:
        reported = file.read()
    killer.join()  # before `waitpid`, after which the process id may be reused
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"life {life} was not killed: status {status}"
    return {line.decode() for line in reported.splitlines()}


def rows_of(database: Path) -> Counter[str]:
    with contextlib.closing(sqlite3.connect(database, timeout=30.0)) as connection:
        return Counter(row[0] for row in connection.execute("SELECT event_id FROM tracking_event"))


def test_killed_processes_leave_every_event_in_both_databases_once(tmp_path: Path) -> None:
    """The last process delivers the rest. Then nothing is pending, and all ledgers balance."""
    chance = random.Random(20)
    accepted: set[str] = set()
    for life in range(KILLS):
        accepted |= run_life(tmp_path, life, chance)
    assert len(accepted) > KILLS
    with outbox(tmp_path, chance) as last:
        last.enqueue(kills.make_event(KILLS, 0))
        assert last.flush(timeout=FLUSH_S)
    rows_by_sink = {name: rows_of(tmp_path / f"{name}.db") for name in "ab"}
    for name, rows in rows_by_sink.items():
        assert not accepted - rows.keys(), f"{name} misses events"
        assert set(rows.values()) == {1}, f"{name} has events twice"
    assert rows_by_sink["a"] == rows_by_sink["b"]
    outbox_dir = Directory(str(tmp_path / "outbox"), OsFilesystem(), ManualClock())
    assert outbox_dir.disk_usage().pending_files == 0
    report = reconcile(outbox_dir)
    assert report.balances, report
    assert all(queue_report.balances for queue_report in reconcile_queues(outbox_dir, report).values())
