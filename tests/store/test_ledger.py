"""The ledger: concurrent appends and compaction, full disks and failing disks."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from pillarbox.store import layout, ledger, reconciliation
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import (
    AdoptedEntry,
    EvictedEntry,
    LedgerEntry,
    LostEntry,
    PurgedEntry,
    RepairedEntry,
    ReplayedEntry,
    SealedEntry,
    SettledEntry,
    SummaryEntry,
    parse_ledger,
)
from pillarbox.store.os_filesystem import OsFilesystem
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import FaultFilesystem, ManualClock
from pillarbox.testing.fault import Fault

ROOT = Path(__file__).parents[2]
APPEND_SCRIPT = """
import sys
from pillarbox.clock import SystemClock
from pillarbox.store import ledger
from pillarbox.store.ledger_entries import SealedEntry, SettledEntry
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
path, name, sync, bytes_max = sys.argv[1], sys.argv[2], sys.argv[3] == "sync", int(sys.argv[4])
ledger.COMPACT_BYTES = bytes_max
ledger_writer = ledger.LedgerWriter(Directory(path, OsFilesystem(), SystemClock()), SystemClock())
for number in range(2000):
    batch = f"sealed-{number:016d}-{name}"
    ledger_writer.add(SealedEntry(number, batch, name, 10, 1000))
    ledger_writer.write(sync=False)
    ledger_writer.add(SettledEntry(number, batch, "sink", 10, 0, 0, 0))
    if number % 50 == 0:
        ledger_writer.write(sync=sync)
assert ledger_writer.write(sync=True)
"""


def sealed(number: int, events: int = 10) -> SealedEntry:
    """The entry of a sealed batch."""
    return SealedEntry(number, f"sealed-{number:016d}-x", "w", events, 100 * events)


def settled(number: int, events: int = 10) -> SettledEntry:
    """The entry of a batch whose events were all delivered."""
    return SettledEntry(number, f"sealed-{number:016d}-x", "sink", events, 0, 0, 0)


def content(outbox_dir: Directory) -> bytes:
    """The bytes of the ledger."""
    return Path(outbox_dir.path_of(layout.LEDGER)).read_bytes()


def faulty_ledger_writer(outbox_dir: Directory, clock: ManualClock, fault: Fault) -> tuple[LedgerWriter, FaultFilesystem]:
    """A ledger writer on a failing disk."""
    filesystem = FaultFilesystem(outbox_dir.filesystem, fault)
    return LedgerWriter(Directory(outbox_dir.path, filesystem, clock), clock), filesystem


def test_added_entries_are_in_the_file_after_a_write(outbox_dir: Directory, clock: ManualClock) -> None:
    """Entries of every kind are unchanged."""
    ledger_writer = LedgerWriter(outbox_dir, clock)
    entries: list[LedgerEntry] = [
        sealed(1),
        AdoptedEntry(2, "b", "w"),
        settled(1),
        EvictedEntry(3, "c", 5),
        ReplayedEntry(4, "d", 6),
        RepairedEntry(5, "e", 7),
        PurgedEntry(6, "f", "dead", 8),
    ]
    ledger_writer.add(*entries)
    assert not Path(outbox_dir.path_of(layout.LEDGER)).exists()
    assert ledger_writer.write(sync=True)
    assert parse_ledger(content(outbox_dir)) == (entries, 0)
    assert ledger_writer.write(sync=True)
    assert parse_ledger(content(outbox_dir)) == (entries, 0)


def test_entries_after_a_torn_line_start_on_a_new_line(outbox_dir: Directory, clock: ManualClock) -> None:
    """The torn line is skipped and counted."""
    ledger_writer = LedgerWriter(outbox_dir, clock)
    ledger_writer.add(sealed(1), sealed(2))
    ledger_writer.write(sync=False)
    Path(outbox_dir.path_of(layout.LEDGER)).write_bytes(content(outbox_dir)[:-9])
    ledger_writer.add(sealed(3))
    assert ledger_writer.write(sync=False)
    assert parse_ledger(content(outbox_dir)) == ([sealed(1), sealed(3)], 1)


@pytest.mark.parametrize("verb", ["open_append", "open_lock_file", "write_all", "sync_data"])
def test_entries_wait_in_memory_while_the_disk_is_full_and_count_once(
    outbox_dir: Directory, clock: ManualClock, verb: str
) -> None:
    """Also if a part was written before the error."""
    ledger_writer, filesystem = faulty_ledger_writer(
        outbox_dir, clock, Fault(verb, 1, errno.ENOSPC, partial=verb == "write_all")
    )
    entries: list[LedgerEntry] = [ReplayedEntry(4, "d", 6), PurgedEntry(6, "f", "dead", 8), sealed(1), settled(1)]
    ledger_writer.add(*entries)
    assert not ledger_writer.write(sync=True)
    filesystem.counter.clear_faults()
    ledger_writer.add(settled(2))
    assert ledger_writer.write(sync=True)
    account = reconciliation.reconcile_entries(parse_ledger(content(outbox_dir))[0], {}, [])
    assert (account.total.delivered, account.total.resent, account.replayed, account.purged_dead) == (20, 0, 6, 8)


def test_entries_beyond_the_buffer_are_lost_and_counted_as_lost(
    outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a reader of the ledger knows that entries are missing, and how many."""
    monkeypatch.setattr(ledger, "_BUFFER_ENTRIES_MAX", 3)
    ledger_writer, filesystem = faulty_ledger_writer(outbox_dir, clock, Fault("open_append", 1, errno.ENOSPC))
    for number in range(5):
        ledger_writer.add(sealed(number))
    assert not ledger_writer.write(sync=False)
    filesystem.counter.clear_faults()
    while not ledger_writer.write(sync=False):
        pass
    ledger_writer.add(sealed(9))
    ledger_writer.write(sync=False)
    entries, _ = parse_ledger(content(outbox_dir))
    assert sum(entry.entries for entry in entries if isinstance(entry, LostEntry)) == 2
    assert sum(isinstance(entry, SealedEntry) for entry in entries) == 4


def test_a_write_waits_for_the_lock_only_with_sync(outbox_dir: Directory, clock: ManualClock) -> None:
    """Without `sync`, the entries stay in memory while the lock is held."""
    lock = outbox_dir.acquire_lock_file(layout.LEDGER_LOCK)
    assert lock is not None
    ledger_writer = LedgerWriter(outbox_dir, clock)
    ledger_writer.add(sealed(1))
    assert not ledger_writer.write(sync=False)
    outbox_dir.filesystem.close(lock.fd)
    assert ledger_writer.write(sync=False)


def test_a_synced_write_also_syncs_entries_of_other_threads(outbox_dir: Directory, clock: ManualClock) -> None:
    """Delivery adds an entry, the sealer appends it with its own, and then delivery needs it durable."""
    synced = []

    class SyncRecordingFilesystem(OsFilesystem):
        def sync_data(self, fd: int) -> None:
            synced.append(self.size(fd))

    ledger_writer = LedgerWriter(Directory(outbox_dir.path, SyncRecordingFilesystem(), clock), clock)
    ledger_writer.add(settled(1))
    assert ledger_writer.write(sync=False)
    assert not synced
    assert ledger_writer.write(sync=True)
    assert synced == [len(content(outbox_dir))]
    assert ledger_writer.write(sync=True)
    assert len(synced) == 1


def test_compaction_changes_no_total(outbox_dir: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the ledger stays bounded, and pending batches keep their entries."""
    monkeypatch.setattr(ledger, "COMPACT_BYTES", 50_000)
    monkeypatch.setattr(reconciliation, "RECENT_BATCHES_MAX", 20)
    ledger_writer = LedgerWriter(outbox_dir, clock)
    Path(outbox_dir.path_of(layout.sealed_name(0, "x"))).write_bytes(b"")
    largest = 0
    for number in range(2000):
        ledger_writer.add(sealed(number))
        if number:
            ledger_writer.add(settled(number))
        if number % 10 == 0:
            ledger_writer.add(ReplayedEntry(number, "d", 1))
        assert ledger_writer.write(sync=False)
        largest = max(largest, len(content(outbox_dir)))
    assert largest < 60_000
    entries, unread = parse_ledger(content(outbox_dir))
    assert unread == 0
    assert sum(isinstance(entry, SummaryEntry) for entry in entries) == 1
    account = reconciliation.reconcile_entries(
        entries, {layout.batch_id(layout.sealed_name(0, "x")): reconciliation.FileCounts(10, 0)}, []
    )
    assert account.balances
    assert (account.total.accepted, account.total.delivered, account.replayed) == (20_000, 19_990, 200)


@pytest.mark.parametrize("verb", ["create", "rename", "list_files", "sync_directory"])
def test_the_ledger_grows_if_compaction_fails(
    outbox_dir: Directory, clock: ManualClock, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No entry is written twice."""
    monkeypatch.setattr(ledger, "COMPACT_BYTES", 1000)
    ledger_writer, filesystem = faulty_ledger_writer(
        outbox_dir, clock, Fault(verb, 1 + (verb == "sync_directory"), errno.ENOSPC, permanent=True)
    )
    for number in range(20):
        ledger_writer.add(sealed(number), settled(number))
        assert ledger_writer.write(sync=False)
    assert parse_ledger(content(outbox_dir)) == (
        [entry_of(number) for number in range(20) for entry_of in (sealed, settled)],
        0,
    )
    assert filesystem.counter.failures < 10


def test_processes_that_append_during_compaction_lose_no_entry(tmp_path: Path) -> None:
    """Each of the three processes also compacts it again and again."""
    (tmp_path / "box").mkdir()
    commands = [
        [sys.executable, "-c", APPEND_SCRIPT, str(tmp_path / "box"), name, mode, size]
        for name, mode, size in (("a", "sync", "100000000"), ("b", "fast", "100000000"), ("c", "fast", "100000"))
    ]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    entries, unread = parse_ledger((tmp_path / "box" / layout.LEDGER).read_bytes())
    account = reconciliation.reconcile_entries(entries, {}, [])
    assert unread == 0
    assert any(isinstance(entry, SummaryEntry) for entry in entries)
    assert account.balances
    assert {row.writer: (row.accepted, row.delivered) for row in account.writers} == dict.fromkeys("abc", (20_000, 20_000))
    assert not list((tmp_path / "box").glob("*.aside"))


def test_a_ledger_that_is_deleted_while_in_use_is_created_again(outbox_dir: Directory, clock: ManualClock) -> None:
    """Only earlier entries are lost."""
    ledger_writer = LedgerWriter(outbox_dir, clock)
    for number in itertools.islice(itertools.count(), 3):
        ledger_writer.add(sealed(number))
        assert ledger_writer.write(sync=True)
        if number == 1:
            Path(outbox_dir.path_of(layout.LEDGER)).unlink()
    assert parse_ledger(content(outbox_dir)) == ([sealed(2)], 0)


def test_a_segment_is_recorded_as_sealed_only_after_its_name_is_durable(outbox_dir: Directory, clock: ManualClock) -> None:
    """Otherwise a power loss could undo the rename, and reconciliation would miss a batch that does not exist."""
    ledger_writer, filesystem = faulty_ledger_writer(outbox_dir, clock, Fault("sync_directory", 1, errno.EIO))
    directory = Directory(outbox_dir.path, filesystem, clock)
    inbox = SealerInbox()
    writer = Writer(directory, WriterLimits(500, 10**6, 10**9), inbox.wake)
    sealer = Sealer(directory, writer, inbox, clock, 1.0, lambda: None, 0, ledger=ledger_writer)
    writer.start(0, 0)
    writer.append(b"1\n2\n", 2)
    writer.rotate("manual")
    sealer.step()
    assert len(outbox_dir.batch_names()) == 1
    assert ledger_writer.write(sync=True)  # as the delivery worker does
    assert not Path(outbox_dir.path_of(layout.LEDGER)).exists()
    sealer.step()
    (entry,), _ = parse_ledger(content(outbox_dir))
    assert isinstance(entry, SealedEntry)
    assert (entry.batch + layout.SUFFIX, entry.events) == (outbox_dir.batch_names()[0], 2)
