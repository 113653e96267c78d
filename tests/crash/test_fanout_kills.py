"""Real processes with two SQLite databases as sinks, killed at random moments and around single operations on the disk."""

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
EVENTS = 400  # of a life, at the most
FLUSH_S = 30.0


def outbox(directory: Path, chance: random.Random, names: str = "ab") -> Outbox:
    return Outbox(
        str(directory / "outbox"),
        sinks={name: f"sqlite:///{directory / name}.db" for name in names},
        batch_size=chance.choice((1, 3, 10)),
        flush_interval=0.005,
        min_free_bytes=0,
    )


def live(directory: Path, life: int, chance: random.Random, told: int) -> None:
    """What a child does until it is killed: store, and say what is accepted; never returns."""
    logging.disable(logging.CRITICAL)
    kills._PRCTL(kills._PR_SET_PDEATHSIG, signal.SIGKILL)
    if chance.random() < 0.7:
        kills.kill_self_later(chance)
    accepting = outbox(directory, chance)
    for number in range(EVENTS):
        if accepting.enqueue(kills.make_event(life, number)):
            os.write(told, f"{life}-{number}\n".encode())
        if number % 10 == 9:
            # wait: gives the other process time to be killed in the middle
            threading.Event().wait(0.004)
    signal.pause()


def kill_one(directory: Path, life: int, chance: random.Random) -> set[str]:
    """A life that ends by a kill; the events that were accepted in it."""
    hear, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            live(directory, life, chance, tell)
        finally:
            os._exit(kills.FAILED)
    os.close(tell)
    killer = threading.Timer(LIFE_S * chance.random() * 2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with open(hear, "rb") as file:
        said = file.read()
    killer.join()  # before its number may be somebody else's
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"life {life} ended by itself: {status}"
    return {line.decode() for line in said.splitlines()}


def rows_of(database: Path) -> Counter[str]:
    with contextlib.closing(sqlite3.connect(database, timeout=30.0)) as connection:
        return Counter(row[0] for row in connection.execute("SELECT event_id FROM tracking_event"))


def test_processes_that_are_killed_leave_every_event_in_both_databases_once(tmp_path: Path) -> None:
    """The last one delivers what is left; nothing waits then, and all accounts balance."""
    chance = random.Random(20)
    accepted: set[str] = set()
    for life in range(KILLS):
        accepted |= kill_one(tmp_path, life, chance)
    assert len(accepted) > KILLS
    with outbox(tmp_path, chance) as last:
        last.enqueue(kills.make_event(KILLS, 0))
        assert last.flush(timeout=FLUSH_S)
    found = {name: rows_of(tmp_path / f"{name}.db") for name in "ab"}
    for name, rows in found.items():
        assert not accepted - rows.keys(), f"{name} misses events"
        assert set(rows.values()) == {1}, f"{name} has events twice"
    assert found["a"] == found["b"]
    outbox_dir = Directory(str(tmp_path / "outbox"), OsFilesystem(), ManualClock())
    assert outbox_dir.disk_usage().pending_files == 0
    whole = reconcile(outbox_dir)
    assert whole.balances, whole
    assert all(one.balances for one in reconcile_queues(outbox_dir, whole).values())
