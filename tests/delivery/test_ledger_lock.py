"""While another process holds `ledger.lock`, no uncounted batch is deleted. A disk that rejects ledger entries delays nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pillarbox import Outbox
from pillarbox.clock import SystemClock
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.delivery.worker import Worker
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import EvictedEntry, parse_ledger
from pillarbox.store.reconciliation import reconcile, reconcile_queues
from pillarbox.testing import RecordingSink
from tests.admin.prepared_outboxes import event_json, outbox_with_dead_letters
from tests.cli.test_commands import NO_SEAL_BY_AGE, delivered_event_ids, event_line, run
from tests.conftest import event, wait_until
from tests.delivery.fanout_setup import balanced_totals, batch_files, enqueue_files, open_directory, stored_event_ids
from tests.delivery.worker_setup import QUICK_CONFIG, drain_worker, seal_batch
from tests.sinks.http_server import closed_port_url


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `ledger.lock` of a directory, like a process that is suspended while it appends."""
    fd = os.open(folder / layout.LEDGER_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """An outbox directory with one pending batch of four events, which the ledger has."""
    lines = b"".join(map(event_line, range(4)))
    assert run("enqueue", "-d", "box", cwd=tmp_path, stdin=lines, environ=NO_SEAL_BY_AGE).returncode == 0
    return tmp_path / "box"


def test_delivered_batches_wait_for_a_held_lock_and_the_state_says_so(box: Path) -> None:
    """They are delivered once, and deleted when the lock is released; then the ledger balances."""
    database = box.parent / "x.db"
    with held(box):
        outbox = Outbox(str(box), sink=f"sqlite:///{database}")
        outbox.flush(0)
        wait_until(lambda: outbox.stats().state.name == "waiting")
        assert "another process holds ledger.lock" in outbox.stats().state.reason
        wait_until(lambda: "another process holds ledger.lock" in str(read_heartbeat(open_directory(box))))
        assert stored_event_ids(database)
        assert len(batch_files(box)) == 1
    wait_until(lambda: not batch_files(box))
    wait_until(lambda: outbox.stats().state.name == "idle")
    stats = outbox.stats()
    outbox.close()
    assert (stats.delivered, stats.duplicates, stats.unwritten_ledger_entries) == (4, 0, 0)
    report = reconcile(open_directory(box)).reconciliation
    assert (report.balances, report.total.delivered, report.total.resent) == (True, 4, 0)


def test_a_worker_that_ends_while_the_lock_is_held_leaves_the_batches(box: Path) -> None:
    """It says so and exits with 1; the next worker sends them again under their ids, and the ledger balances."""
    deliver = ("deliver", "-d", "box", "--sink", "sqlite:///x.db", "--once", "--timeout", "2")
    with held(box):
        completed = run(*deliver, cwd=box.parent)
        assert completed.returncode == 1
        assert b"1 delivered batch stays on disk" in completed.stderr
        assert b"another process holds ledger.lock" in completed.stderr
        assert len(batch_files(box)) == 1
    assert run(*deliver, cwd=box.parent).returncode == 0
    assert delivered_event_ids(box.parent / "x.db") == [f"e-{number:06d}" for number in range(4)]
    verified = run("verify", "-d", "box", cwd=box.parent)
    assert (verified.returncode, verified.stdout[:28]) == (0, b"balanced: accepted 4 = deliv"), verified.stdout


def test_a_command_that_ends_with_counts_unwritten_says_so_and_exits_with_1(box: Path) -> None:
    """The events are stored nevertheless."""
    with held(box):
        completed = run("enqueue", "-d", "box", "--json", cwd=box.parent, stdin=event_line(9))
        assert completed.returncode == 1
        assert json.loads(completed.stdout) == {"accepted": 1, "dropped": 0}
        assert (
            b"1 ledger entry is lost, so that pillarbox verify may not balance: another process holds ledger"
            in completed.stderr
        )
    assert len(batch_files(box)) == 2


@pytest.mark.parametrize("queue", ["", "sink-b"])
def test_batches_are_not_fanned_out_while_a_ledger_is_locked(tmp_path: Path, queue: str) -> None:
    """This holds for the ledger of the directory and for that of a queue. Afterwards each sink gets every event once."""
    box = tmp_path / "box"
    with Outbox(str(box), sinks={name: f"sqlite:///{tmp_path / name}.db" for name in "ab"}) as outbox:
        wait_until((box / "sink-b").exists)
        with held(box / queue):
            enqueue_files(outbox, 2)
            wait_until(lambda: "another process holds ledger.lock" in outbox.stats().state.reason)
            assert len(batch_files(box)) == 2
        assert outbox.flush(60)
    assert all(len(stored_event_ids(tmp_path / f"{name}.db")) == 20 for name in "ab")
    rows = balanced_totals(box)
    assert {name: row.delivered for name, row in rows.items() if name} == {"a": 20, "b": 20}


def test_nothing_is_evicted_while_the_ledger_is_locked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New events are dropped meanwhile, and the state says why. The log line at the end names this problem."""
    caplog.set_level(logging.INFO, "pillarbox")
    box = tmp_path / "box"
    limits = {"batch_size": 1, "max_bytes": 5000, "min_free_bytes": 0}
    with Outbox(str(box), sink=closed_port_url(), when_full="drop_oldest", **limits) as outbox:  # type: ignore[arg-type]
        assert outbox.enqueue(event(0))
        wait_until(lambda: b"sealed" in (box / layout.LEDGER).read_bytes() if (box / layout.LEDGER).exists() else False)
        with held(box):
            dropped = 0
            for number in range(1, 100):
                dropped += not outbox.enqueue(event(number))
            assert dropped
            wait_until(lambda: "ledger.lock" in outbox._sealer.problem)
            assert outbox.stats().evicted == 0
        wait_until(lambda: outbox.stats().evicted > 0)

        def ends() -> list[logging.LogRecord]:
            return [entry for entry in caplog.records if ": over after" in entry.message]

        wait_until(lambda: bool(ends()))
        assert [entry.levelname for entry in ends()] == ["ERROR"]
        assert f"nothing can be evicted: another process holds {box}/ledger.lock" in ends()[0].message
    report = reconcile(open_directory(box)).reconciliation
    assert report.balances, report
    assert report.total.evicted > 0


def test_a_batch_is_evicted_only_from_queues_whose_ledger_can_be_written(tmp_path: Path) -> None:
    """A ledger never has an eviction of a file that its queue still has."""
    box = tmp_path / "box"
    with Outbox(str(box), sinks=dict.fromkeys("ab", closed_port_url()), batch_size=1) as outbox:
        enqueue_files(outbox, 10)
        wait_until(lambda: len(batch_files(box / "sink-b")) == 10)
    limits = {"when_full": "drop_oldest", "max_bytes": 5000, "min_free_bytes": 0}
    with held(box / "sink-b"), Outbox(str(box), deliver="external", **limits) as outbox:  # type: ignore[arg-type]
        wait_until(lambda: "sink-b/ledger.lock" in outbox._sealer.problem)
        evicted, present = evicted_batches(box / "sink-a"), set(map(layout.batch_id, batch_files(box / "sink-a")))
        assert evicted
        assert not evicted & present
        assert not evicted_batches(box / "sink-b")
        assert outbox.stats().evicted == 0
    with Outbox(str(box), deliver="external", **limits) as outbox:  # type: ignore[arg-type]
        wait_until(lambda: outbox.stats().evicted > 0)
    assert evicted_batches(box / "sink-b") >= evicted
    assert all(report.balances for report in reconcile_queues(open_directory(box), reconcile(open_directory(box))).values())


def evicted_batches(queue: Path) -> set[str]:
    """The ids of the batches whose eviction a ledger has."""
    entries, _ = parse_ledger((queue / layout.LEDGER).read_bytes())
    return {entry.batch for entry in entries if isinstance(entry, EvictedEntry)}


def test_a_disk_that_refuses_the_ledger_holds_up_nothing(box: Path) -> None:
    """The batches are delivered and deleted; the command says that counts are lost, and exits with 1."""
    (box / layout.LEDGER).unlink()
    (box / layout.LEDGER).mkdir()
    completed = run("deliver", "-d", "box", "--sink", "sqlite:///x.db", "--once", "--timeout", "20", cwd=box.parent)
    assert (completed.returncode, batch_files(box)) == (1, [])
    assert b"1 ledger entry is lost, so that pillarbox verify may not balance" in completed.stderr
    assert len(delivered_event_ids(box.parent / "x.db")) == 4


def test_on_a_full_disk_the_ledger_is_written_as_soon_as_one_file_of_a_group_is_deleted(
    outbox_dir: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a kill while the others are deleted would lose the entries of all of them."""
    steps: list[str] = []
    ledger = LedgerWriter(outbox_dir, SystemClock())
    for number in range(3):
        seal_batch(outbox_dir, number, b'"event"')
    sink = RecordingSink()
    sink.capabilities = sink.capabilities._replace(deduplicates_by="event_id")  # so that files are settled in groups
    remove, append = Directory.remove, LedgerWriter._append

    def remove_and_note(directory: Directory, name: str) -> None:
        steps.append("delete")
        remove(directory, name)

    def append_if_there_is_space(writer: LedgerWriter, *, sync: bool) -> bool:
        if "delete" not in steps:
            raise OSError(errno.ENOSPC, "no space")
        steps.append("write")
        return append(writer, sync=sync)

    monkeypatch.setattr(Directory, "remove", remove_and_note)
    monkeypatch.setattr(LedgerWriter, "_append", append_if_there_is_space)
    worker = Worker(outbox_dir, NamedSink(sink, "test"), SystemClock(), QUICK_CONFIG, ledger=ledger)
    drain_worker(worker)
    assert worker.state.name == "idle"
    assert steps == ["delete", "write", "delete", "delete"]


def test_dead_letters_stay_while_the_ledger_is_locked(tmp_path: Path) -> None:
    """`dead purge` says so and exits with 1; once the lock is released it succeeds."""
    box = outbox_with_dead_letters(tmp_path, [event_json(1, 5)])
    with held(box):
        completed = run("dead", "purge", "--all", "--yes", "-d", "box", cwd=tmp_path)
        assert completed.returncode == 1
        assert b"ledger.lock: is held by another process; nothing more was changed, try again" in completed.stderr
        assert list(box.glob("dead-*"))
    assert run("dead", "purge", "--all", "--yes", "-d", "box", cwd=tmp_path).returncode == 0
    assert not list(box.glob("dead-*"))
    assert b"(purged 1)" in run("verify", "-d", "box", cwd=tmp_path).stdout
