"""Looks whether a directory's account balances, while writers and a deliverer run. Locks, creates and adopts nothing.

The ledger is read before and after the files. A batch that is gone from the second look must have an entry that says why, for
entries are written before files go; one that appears meanwhile is left out.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout, reader
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import parse_ledger
from pillarbox.store.reconciliation import (
    BATCH_ENTRIES,
    FAN_OUT_WRITER,
    QUEUE_WRITERS,
    Discrepancy,
    EvictedEntry,
    FannedOutEntry,
    FileCounts,
    LedgerEntry,
    Reconciliation,
    SettledEntry,
    reconcile_entries,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory

_ATTEMPTS: Final = 5  # what is out of step because somebody was at work is in step the next time
_BETWEEN_ATTEMPTS_S: Final = 0.2
_COUNTED_KINDS: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE, Kind.SEALED, Kind.DEAD})
_UNREADABLE_COUNTS: Final = FileCounts(0, 1)  # how many records a file holds that cannot be read, nobody knows


class ReconciliationReport(NamedTuple):
    """What was found."""

    reconciliation: Reconciliation
    unread_entries: int  # lines of the ledger that this version does not know, or that are damaged
    unreadable: list[str]  # files

    @property
    def balances(self) -> bool:
        """Whether everything is accounted for; what cannot be read is not."""
        return self.reconciliation.balances and not self.unreadable


def reconcile_queues(
    directory: Directory, outbox_report: ReconciliationReport, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> dict[str, ReconciliationReport]:
    """The accounts of several sinks, by name, after the one of the directory they share. Raises `OSError`.

    What was handed over to a sink must be in its account: who hands over writes there first. What else it has accepted, because
    it was sent or went in again, says nothing of that.
    """
    found: dict[str, ReconciliationReport] = {}
    for queue in directory.queues():
        one = reconcile(queue, progress)
        handed = sum(row.accepted_max for row in one.reconciliation.writers if row.writer in QUEUE_WRITERS)
        missing = outbox_report.reconciliation.fanned_out.get(queue.sink, 0) - handed
        if missing > 0:
            one.reconciliation.discrepancies.append(
                Discrepancy("", FAN_OUT_WRITER, missing, "handed over, and not in the account of the sink")
            )
        found[queue.sink] = one
    return found


def reconcile(directory: Directory, progress: Callable[[int, int], None] = lambda _done, _total: None) -> ReconciliationReport:
    """The account of a directory; `progress(done, total)` is called with bytes that were read. Raises `OSError`."""
    known: dict[str, FileCounts] = {}
    found = _reconcile_once(directory, progress, known)
    for _ in range(_ATTEMPTS - 1):
        if found.balances:
            break
        threading.Event().wait(_BETWEEN_ATTEMPTS_S)
        found = _reconcile_once(directory, progress, known)
    return found


def _reconcile_once(
    directory: Directory, progress: Callable[[int, int], None], known_counts: dict[str, FileCounts]
) -> ReconciliationReport:
    """One look; sealed files never change, so that those in `known_counts`, which is added to, are not read again."""
    before, _ = _read_entries(directory)
    # Twice, as in `Directory.waiting`: what is compressed meanwhile must not be missing.
    listing = sorted(dict(entry for _ in range(2) for entry in directory.filesystem.list_files(directory.path)).items())
    total = sum(size for name, size in listing if layout.kind_of(name) in _COUNTED_KINDS)
    found: dict[str, FileCounts] = {}
    active: dict[str, FileCounts] = {}
    dead: dict[str, int] = {}
    unreadable: list[str] = []
    done = 0
    for name, size in listing:
        kind = layout.kind_of(name)
        if kind not in _COUNTED_KINDS:
            continue
        progress(done, total)
        done += size
        if name in known_counts:
            found[layout.batch_id(name)] = known_counts[name]
            continue
        try:
            if kind is Kind.SEALED:
                known_counts[name] = found[layout.batch_id(name)] = _count_sealed(directory, name)
                continue
            data = _read_file(directory, name)
        except FileNotFoundError:
            continue
        except (OSError, FileUnusableError):
            unreadable.append(name)
            data = None
            if kind is Kind.SEALED:
                found[layout.batch_id(name)] = _UNREADABLE_COUNTS
        if kind is Kind.DEAD:
            dead[layout.batch_id(name).removeprefix("dead-")] = 0 if data is None else data.count(b"\n")
        elif kind is not Kind.SEALED:
            writer = layout.writer_of(name)
            active[name] = (
                FileCounts(0, 1, writer) if data is None else _count_records(name, data[: data.rfind(b"\n") + 1], writer)
            )
    progress(total, total)
    entries, unread = _read_entries(directory)
    there = {name for name, _ in directory.filesystem.list_files(directory.path)}
    still_active = [file for name, file in active.items() if name in there]
    ignored = _batch_ids(entries) - _batch_ids(before) - found.keys()
    settled = {entry.batch for entry in entries if isinstance(entry, (SettledEntry, FannedOutEntry, EvictedEntry))}
    # Those of a batch that is not settled yet are written before the ledger has them.
    kept = sum(count for batch, count in dead.items() if batch in settled or batch not in found)
    return ReconciliationReport(reconcile_entries(entries, found, still_active, ignored, kept), unread, unreadable)


def _read_entries(directory: Directory) -> tuple[list[LedgerEntry], int]:
    return parse_ledger(directory.read_small_file(layout.LEDGER))


def _batch_ids(entries: list[LedgerEntry]) -> set[str]:
    return {entry.batch for entry in entries if isinstance(entry, BATCH_ENTRIES)}


def _read_file(directory: Directory, name: str) -> bytes:
    fd = directory.open_existing(name)
    try:
        return directory.filesystem.read_all(fd)
    finally:
        directory.filesystem.close(fd)


def _count_sealed(directory: Directory, name: str) -> FileCounts:
    try:
        return _count_records(name, _read_file(directory, name))
    except FileNotFoundError:  # gone, or compressed meanwhile
        name = layout.compressed_name(name)
        return _count_records(name, _read_file(directory, name))


def _count_records(name: str, data: bytes, writer: str = "") -> FileCounts:
    contents, _ = reader.read_file(name, data, lambda: None)
    return FileCounts(len(contents.payloads), len(contents.damaged), writer)
