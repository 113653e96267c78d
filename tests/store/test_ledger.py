"""The ledger: appended to by several at once, shortened meanwhile, on disks that are full or fail."""

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
APPEND = """
import sys
from pillarbox.clock import SystemClock
from pillarbox.store import ledger
from pillarbox.store.ledger_entries import SealedEntry, SettledEntry
from pillarbox.store.directory import Directory
from pillarbox.store.os_filesystem import OsFilesystem
place, name, sync, bytes_max = sys.argv[1], sys.argv[2], sys.argv[3] == "sync", int(sys.argv[4])
ledger.COMPACT_BYTES = bytes_max
pen = ledger.LedgerWriter(Directory(place, OsFilesystem(), SystemClock()), SystemClock())
for number in range(2000):
    batch = f"sealed-{number:016d}-{name}"
    pen.add(SealedEntry(number, batch, name, 10, 1000))
    pen.write(sync=False)
    pen.add(SettledEntry(number, batch, "sink", 10, 0, 0, 0))
    if number % 50 == 0:
        pen.write(sync=sync)
assert pen.write(sync=True)
"""


def sealed(number: int, events: int = 10) -> SealedEntry:
    """A batch of one writer."""
    return SealedEntry(number, f"sealed-{number:016d}-x", "w", events, 100 * events)


def settled(number: int, events: int = 10) -> SettledEntry:
    """All of it delivered."""
    return SettledEntry(number, f"sealed-{number:016d}-x", "sink", events, 0, 0, 0)


def content(place: Directory) -> bytes:
    """The ledger's bytes."""
    return Path(place.path_of(layout.LEDGER)).read_bytes()


def faulty(place: Directory, clock: ManualClock, fault: Fault) -> tuple[LedgerWriter, FaultFilesystem]:
    """A ledger on a disk that fails."""
    filesystem = FaultFilesystem(place.filesystem, fault)
    return LedgerWriter(Directory(place.path, filesystem, clock), clock), filesystem


def test_what_is_noted_is_there_once_it_is_written(place: Directory, clock: ManualClock) -> None:
    """Every kind of entry, as it was."""
    pen = LedgerWriter(place, clock)
    entries: list[LedgerEntry] = [
        sealed(1),
        AdoptedEntry(2, "b", "w"),
        settled(1),
        EvictedEntry(3, "c", 5),
        ReplayedEntry(4, "d", 6),
        RepairedEntry(5, "e", 7),
        PurgedEntry(6, "f", "dead", 8),
    ]
    pen.add(*entries)
    assert not Path(place.path_of(layout.LEDGER)).exists()
    assert pen.write(sync=True)
    assert parse_ledger(content(place)) == (entries, 0)
    assert pen.write(sync=True)
    assert parse_ledger(content(place)) == (entries, 0)


def test_behind_a_torn_line_a_line_of_its_own_begins(place: Directory, clock: ManualClock) -> None:
    """The torn one is stepped over and counted."""
    pen = LedgerWriter(place, clock)
    pen.add(sealed(1), sealed(2))
    pen.write(sync=False)
    Path(place.path_of(layout.LEDGER)).write_bytes(content(place)[:-9])
    pen.add(sealed(3))
    assert pen.write(sync=False)
    assert parse_ledger(content(place)) == ([sealed(1), sealed(3)], 1)


@pytest.mark.parametrize("verb", ["open_append", "open_lock_file", "write_all", "sync_data"])
def test_what_a_full_disk_refuses_waits_in_memory_and_counts_once(place: Directory, clock: ManualClock, verb: str) -> None:
    """Also what it refuses after it took a part."""
    pen, filesystem = faulty(place, clock, Fault(verb, 1, errno.ENOSPC, partial=verb == "write_all"))
    again: list[LedgerEntry] = [ReplayedEntry(4, "d", 6), PurgedEntry(6, "f", "dead", 8), sealed(1), settled(1)]
    pen.add(*again)
    assert not pen.write(sync=True)
    filesystem.counter.clear_faults()
    pen.add(settled(2))
    assert pen.write(sync=True)
    account = reconciliation.reconcile_entries(parse_ledger(content(place))[0], {}, [])
    assert (account.total.delivered, account.total.resent, account.replayed, account.purged_dead) == (20, 0, 6, 8)


def test_more_than_fits_into_memory_is_lost_and_said_to_be(
    place: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a reader knows why something is missing."""
    monkeypatch.setattr(ledger, "_BUFFER_ENTRIES_MAX", 3)
    pen, filesystem = faulty(place, clock, Fault("open_append", 1, errno.ENOSPC))
    for number in range(5):
        pen.add(sealed(number))
    assert not pen.write(sync=False)
    filesystem.counter.clear_faults()
    while not pen.write(sync=False):
        pass
    pen.add(sealed(9))
    pen.write(sync=False)
    entries, _ = parse_ledger(content(place))
    assert sum(entry.entries for entry in entries if isinstance(entry, LostEntry)) == 2
    assert sum(isinstance(entry, SealedEntry) for entry in entries) == 4


def test_a_lock_that_another_has_is_waited_for_only_where_the_file_is_to_go(place: Directory, clock: ManualClock) -> None:
    """Without `sync` the entries wait instead."""
    lock = place.acquire_lock_file(layout.LEDGER_LOCK)
    assert lock is not None
    pen = LedgerWriter(place, clock)
    pen.add(sealed(1))
    assert not pen.write(sync=False)
    place.filesystem.close(lock.fd)
    assert pen.write(sync=False)


def test_what_another_thread_appended_is_synced_by_who_needs_it(place: Directory, clock: ManualClock) -> None:
    """The deliverer notes, the sealer's round appends it along with its own, and then the deliverer wants it durable."""
    synced = []

    class Disk(OsFilesystem):
        def sync_data(self, fd: int) -> None:
            synced.append(self.size(fd))

    pen = LedgerWriter(Directory(place.path, Disk(), clock), clock)
    pen.add(settled(1))
    assert pen.write(sync=False)
    assert not synced
    assert pen.write(sync=True)
    assert synced == [len(content(place))]
    assert pen.write(sync=True)
    assert len(synced) == 1


def test_it_is_summed_up_and_the_account_stays(place: Directory, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size stays bounded; what is pending stays named."""
    monkeypatch.setattr(ledger, "COMPACT_BYTES", 50_000)
    monkeypatch.setattr(reconciliation, "RECENT_BATCHES_MAX", 20)
    pen = LedgerWriter(place, clock)
    Path(place.path_of(layout.sealed_name(0, "x"))).write_bytes(b"")
    largest = 0
    for number in range(2000):
        pen.add(sealed(number))
        if number:
            pen.add(settled(number))
        if number % 10 == 0:
            pen.add(ReplayedEntry(number, "d", 1))
        assert pen.write(sync=False)
        largest = max(largest, len(content(place)))
    assert largest < 60_000
    entries, unread = parse_ledger(content(place))
    assert unread == 0
    assert sum(isinstance(entry, SummaryEntry) for entry in entries) == 1
    account = reconciliation.reconcile_entries(
        entries, {layout.batch_id(layout.sealed_name(0, "x")): reconciliation.FileCounts(10, 0)}, []
    )
    assert account.balances
    assert (account.total.accepted, account.total.delivered, account.replayed) == (20_000, 19_990, 200)


@pytest.mark.parametrize("verb", ["create", "rename", "list_files", "sync_directory"])
def test_where_it_cannot_be_shortened_it_grows_on(
    place: Directory, clock: ManualClock, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no entry is written twice."""
    monkeypatch.setattr(ledger, "COMPACT_BYTES", 1000)
    pen, filesystem = faulty(place, clock, Fault(verb, 1 + (verb == "sync_directory"), errno.ENOSPC, permanent=True))
    for number in range(20):
        pen.add(sealed(number), settled(number))
        assert pen.write(sync=False)
    assert parse_ledger(content(place)) == ([one(number) for number in range(20) for one in (sealed, settled)], 0)
    assert filesystem.counter.failures < 10


def test_two_processes_append_at_once_while_it_is_shortened_and_nothing_is_lost(tmp_path: Path) -> None:
    """Each of the three shortens it too, all the time."""
    (tmp_path / "box").mkdir()
    commands = [
        [sys.executable, "-c", APPEND, str(tmp_path / "box"), name, mode, size]
        for name, mode, size in (("a", "sync", "100000000"), ("b", "fast", "100000000"), ("c", "fast", "100000"))
    ]
    running = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    entries, unread = parse_ledger((tmp_path / "box" / layout.LEDGER).read_bytes())
    account = reconciliation.reconcile_entries(entries, {}, [])
    assert unread == 0
    assert any(isinstance(entry, SummaryEntry) for entry in entries)
    assert account.balances
    assert {row.writer: (row.accepted, row.delivered) for row in account.writers} == dict.fromkeys("abc", (20_000, 20_000))
    assert not list((tmp_path / "box").glob("*.aside"))


def test_a_ledger_that_is_removed_while_it_is_used_is_made_anew(place: Directory, clock: ManualClock) -> None:
    """What came before is gone, and nothing else."""
    pen = LedgerWriter(place, clock)
    for number in itertools.islice(itertools.count(), 3):
        pen.add(sealed(number))
        assert pen.write(sync=True)
        if number == 1:
            Path(place.path_of(layout.LEDGER)).unlink()
    assert parse_ledger(content(place)) == ([sealed(2)], 0)


def test_a_file_is_noted_as_sealed_only_once_its_name_is_durable(place: Directory, clock: ManualClock) -> None:
    """Otherwise the power could take the name away, and the ledger would miss a batch that never was."""
    pen, filesystem = faulty(place, clock, Fault("sync_directory", 1, errno.EIO))
    directory = Directory(place.path, filesystem, clock)
    inbox = SealerInbox()
    writer = Writer(directory, WriterLimits(500, 10**6, 10**9), inbox.wake)
    sealer = Sealer(directory, writer, inbox, clock, 1.0, lambda: None, 0, ledger=pen)
    writer.start(0, 0)
    writer.append(b"1\n2\n", 2)
    writer.rotate("manual")
    sealer.step()
    assert len(place.batch_names()) == 1
    assert pen.write(sync=True)  # as the deliverer does
    assert not Path(place.path_of(layout.LEDGER)).exists()
    sealer.step()
    (entry,), _ = parse_ledger(content(place))
    assert isinstance(entry, SealedEntry)
    assert (entry.batch + layout.SUFFIX, entry.events) == (place.batch_names()[0], 2)
