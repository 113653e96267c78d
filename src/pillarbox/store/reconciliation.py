"""Reconciliation: accepted = delivered + pending + dead + quarantined + evicted.

Two independent sources are compared: the writers' own counts, in the entries of sealed segments, and the counts of the same
files when they were delivered, or now. So a loss is noticed.

`reconcile` reads a directory while writers and delivery run, without taking locks or changing anything. It reads the ledger
before and after the files. A batch that disappears meanwhile must have an entry that says why, because entries are written
before files are removed; a batch that appears meanwhile is left out. The rest is pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.file_parts import parts_of
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import (
    BATCH_ENTRIES,
    EARLIER_WRITERS,
    FAN_OUT_WRITER,
    QUEUE_WRITERS,
    REDELIVERY_WRITER,
    UNKNOWN_WRITER,
    AdoptedEntry,
    DroppedEntry,
    EvictedEntry,
    FannedOutEntry,
    LedgerEntry,
    LedgerRow,
    LostEntry,
    PurgedEntry,
    QueueRenamedEntry,
    RedeliveredEntry,
    RepairedEntry,
    ReplayedEntry,
    ReturnedEntry,
    SealedEntry,
    SettledEntry,
    SummaryEntry,
)
from pillarbox.store.ledger_reader import LedgerPart, read_parts
from pillarbox.store.windows import count_records
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from pillarbox.store.directory import Directory

_ENTRIES_MAX: Final = 50_000  # of a ledger in memory; a compacted ledger has a tenth of that
RECENT_BATCHES_MAX: Final = 1000  # finished batches that are not summed up yet: a late or repeated entry must find them
WRITERS_MAX: Final = 64  # writers with a row of their own in a summary; earlier ones share a row


class FileCounts(msgspec.Struct, frozen=True):
    """The counts of a file: good records and damaged byte ranges."""

    records: int
    damaged_ranges: int
    writer: str = ""  # of a segment


class Discrepancy(msgspec.Struct, frozen=True):
    """A batch whose counts differ."""

    batch: str  # batch id
    writer: str  # id of the writer of the batch
    events: int  # number of missing events; negative if there are extra ones
    problem: str  # what is wrong


class _BatchEntries:
    """The entries of a batch.

    A batch that was finished may come back, whole or damaged, where its deletion was lost with the power; then there are two
    entries of a kind. The one with more events counts, because what it counts has happened.
    """

    def __init__(self) -> None:
        self.writer = UNKNOWN_WRITER
        self.is_sealed = False  # there is an entry from the process that sealed it
        self.writer_count: int | None = None
        self.settled: SettledEntry | None = None
        self.fanned_out: FannedOutEntry | None = None
        self.evicted: int | None = None
        self.redelivered = 0
        self._settlements: set[SettledEntry] = set()

    @property
    def is_over(self) -> bool:
        return self.settled is not None or self.evicted is not None or self.fanned_out is not None

    def add_entry(self, entry: LedgerEntry) -> None:
        match entry:
            case SealedEntry(writer=writer, events=events):
                self._set_writer(writer, events)
            case AdoptedEntry(writer=writer):
                self.writer, self.is_sealed = writer if not self.is_sealed else self.writer, True
            case RedeliveredEntry(events=events):
                self._set_writer(REDELIVERY_WRITER, events)
            case SettledEntry():
                self._add_settlement(entry)
            case FannedOutEntry():
                before = self.fanned_out
                if before is not None and before.events > entry.events:
                    entry = msgspec.structs.replace(entry, events=before.events, spans=before.spans)
                self.fanned_out = entry
            case ReturnedEntry():
                self.fanned_out = None
            case EvictedEntry(events=events):
                self.evicted = max(events, self.evicted or 0)

    def _set_writer(self, writer: str, events: int | None) -> None:
        known = [count for count in (self.writer_count, events) if count is not None]
        self.writer, self.writer_count, self.is_sealed = writer, max(known, default=None), True

    def _add_settlement(self, entry: SettledEntry) -> None:
        if entry in self._settlements:
            return  # written again after an error of the disk
        self._settlements.add(entry)
        other = self.settled
        if other is None:
            self.settled = entry
            return
        if entry.delivered + entry.dead >= other.delivered + other.dead:
            self.settled = entry
        self.redelivered += min(other.delivered, entry.delivered)

    def to_row(self, counts: FileCounts | None) -> tuple[LedgerRow, Discrepancy | None]:
        """The counts of the batch, and what is wrong with them. `counts` is None if its file is gone."""
        row = LedgerRow(writer=self.writer, resent=self.redelivered)
        ranges = 0
        if self.settled is not None:
            row.delivered, row.dead, row.duplicates = self.settled.delivered, self.settled.dead, self.settled.duplicates
            records, ranges = row.delivered + row.dead, self.settled.quarantined
            row.quarantined_max = ranges
        elif self.evicted is not None:
            row.evicted = records = self.evicted
        elif self.fanned_out is not None:
            row.shared = row.shared_max = records = self.fanned_out.events
            ranges = self.fanned_out.spans
            row.shared_max += ranges
        elif counts is not None:
            row.pending = row.pending_max = records = counts.records
            ranges = counts.damaged_ranges
            row.pending_max += ranges
        else:
            row.accepted = row.accepted_max = self.writer_count or 0
            return row, self._discrepancy(
                self.writer_count or 0, "the file is gone without a ledger entry: the events or the entry are lost"
            )
        row.accepted, row.accepted_max = records, records + ranges
        if self.writer_count is None:
            return row, None
        return self._with_writer_count(row, records, ranges)

    def _with_writer_count(self, row: LedgerRow, records: int, ranges: int) -> tuple[LedgerRow, Discrepancy | None]:
        """The same with a writer's count: missing events are assumed to be the damaged ones."""
        counted = self.writer_count or 0
        row.accepted = row.accepted_max = counted
        missing = counted - records
        if missing < 0 or (missing and not ranges):
            row.pending_max, row.quarantined_max, row.shared_max = row.pending, row.quarantined, row.shared
            return row, self._discrepancy(missing, f"the writer counted {counted} events, the file has {records}")
        if self.settled is not None:
            row.quarantined = row.quarantined_max = missing
        elif self.fanned_out is not None:
            row.shared = row.shared_max = row.shared + missing
        else:
            row.pending = row.pending_max = row.pending + missing
        return row, None

    def _discrepancy(self, events: int, problem: str) -> Discrepancy:
        return Discrepancy("", self.writer, events, problem)


class Reconciliation(msgspec.Struct, kw_only=True):
    """The reconciled counts of a directory."""

    total: LedgerRow  # the counts of all writers together
    writers: list[LedgerRow]  # the counts of each writer
    replayed: int = 0  # dead letters put back into the outbox
    repaired: int = 0  # events recovered from quarantine
    resent_on_request: int = 0  # events that `redeliver` delivered again
    purged_dead: int = 0  # dead letters deleted on request
    purged_quarantine: int = 0  # damaged byte ranges deleted on request
    lost_entries: int = 0  # ledger entries that could not be written
    dead_on_disk: int = 0  # dead letters on disk
    dead_missing: int = 0  # dead letters that the ledger has and the disk does not
    fanned_out: dict[str, int] = {}  # events fanned out, by sink; the least number where damage makes a count unknown
    earlier_discrepancy: int = 0  # events missing or extra in batches that the ledger has summed up
    discrepancies: list[Discrepancy]  # batches whose counts differ
    dropped: dict[str, int] = {}  # events that `enqueue` did not store, by reason; in no other count
    dropped_at: dict[str, int] = {}  # when the last event was dropped, in microseconds since 1970, by reason

    @property
    def balances(self) -> bool:
        """Whether every accepted event is accounted for, within the ranges that crashes have left."""
        low, high = self.total.accounted_range
        within = low <= self.total.accepted_max and self.total.accepted <= high
        return within and not (self.discrepancies or self.earlier_discrepancy or self.dead_missing)


class LedgerFold:
    """Adds up entries, in the order in which they were written."""

    def __init__(self, entries: Iterable[LedgerEntry]) -> None:
        self.batches: dict[str, _BatchEntries] = {}
        self.redelivered: dict[str, int] = {}  # events by batch id; "" for batches that are summed up
        self.rows: dict[str, LedgerRow] = {}
        self.fanned_out: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.dropped_at: dict[str, int] = {}
        # Returned batches that were summed up before, with a substitute for their entry.
        self._returned: dict[str, SealedEntry] = {}
        self.replayed = self.repaired = self.purged_dead = self.purged_quarantine = self.lost = self.discrepancy = 0
        seen: set[LedgerEntry] = set()
        for entry in entries:
            if isinstance(entry, (ReplayedEntry, RepairedEntry, PurgedEntry, DroppedEntry)):
                if entry in seen:
                    continue  # the entry was written again after a disk error
                seen.add(entry)
            self._add_entry(entry)

    def _add_entry(self, entry: LedgerEntry) -> None:
        match entry:
            case SummaryEntry():
                self._add_summary(entry)
            case ReplayedEntry(events=events):
                self.replayed += events
            case RepairedEntry(events=events):
                self.repaired += events
            case PurgedEntry(kind="dead", events=events):
                self.purged_dead += events
            case PurgedEntry(events=events):
                self.purged_quarantine += events
            case DroppedEntry(at_micros=at_micros, reason=reason, events=events):
                self._add_dropped(reason, events, at_micros)
            case ReturnedEntry(batch=batch) if batch not in self.batches:
                self._take_out_of_sums(entry)
            case LostEntry(entries=lost):
                self.lost += lost
            case QueueRenamedEntry(sink=sink, to=to):
                self._rename_queue(sink, to)
            case _:
                if isinstance(entry, RedeliveredEntry):
                    self.redelivered[entry.batch] = entry.events
                self.batches.setdefault(entry.batch, _BatchEntries()).add_entry(entry)

    def _add_summary(self, entry: SummaryEntry) -> None:
        for row in entry.rows:
            self.add_row(row)
        self.replayed += entry.replayed
        self.repaired += entry.repaired
        self.purged_dead += entry.purged_dead
        self.purged_quarantine += entry.purged_quarantine
        self.lost += entry.lost
        self.discrepancy += entry.wrong
        self.redelivered[""] = self.redelivered.get("", 0) + entry.resent
        for sink, events in entry.shared.items():
            self._add_fanned_out(sink, events)
        for reason, events in entry.dropped.items():
            self._add_dropped(reason, events, entry.dropped_at.get(reason, 0))

    def may_be_fanned_out(self, batch: str) -> bool:
        """Whether a batch was fanned out and not returned since. True also if the entries do not tell."""
        life = self.batches.get(batch)
        return life is None or life.fanned_out is not None

    def _take_out_of_sums(self, entry: ReturnedEntry) -> None:
        """Count a batch individually again that was summed up as fanned out and is pending again."""
        life = self.batches[entry.batch] = _BatchEntries()
        events = entry.events or 0
        row = next((row for row in self.rows.values() if events and row.shared >= events), None)
        if row is None:
            return
        for field in ("accepted", "accepted_max", "shared", "shared_max"):
            setattr(row, field, getattr(row, field) - events)
        self._returned[entry.batch] = SealedEntry(entry.at_micros, entry.batch, row.writer, events, 0)
        life.add_entry(self._returned[entry.batch])

    def compacted_entry(self, entry: LedgerEntry) -> LedgerEntry:
        """The entry to write for a batch that is not summed up, instead of one of its entries."""
        match entry:
            case FannedOutEntry(batch=batch):
                return self.batches[batch].fanned_out or entry  # queues may have been renamed since
            case ReturnedEntry(batch=batch):
                return self._returned.get(batch, entry)
        return entry

    def add_batch(self, batch: _BatchEntries, counts: FileCounts | None) -> Discrepancy | None:
        """Add the counts of a batch. Returns what is wrong with them."""
        row, wrong = batch.to_row(counts)
        self.add_row(row)
        if batch.settled is not None:
            self.purged_dead += batch.settled.discarded
            self.purged_quarantine += batch.settled.discarded_spans
        if batch.fanned_out is not None:
            for sink in batch.fanned_out.sinks:
                self._add_fanned_out(sink, batch.fanned_out.events)
        return wrong

    def _rename_queue(self, sink: str, to: str) -> None:
        """Count events that were fanned out to the old name for the new one, or for none if the queue was removed."""
        before = self.fanned_out.pop(sink, 0)
        if to:
            self._add_fanned_out(to, before)
        for life in self.batches.values():
            if life.fanned_out is not None and sink in life.fanned_out.sinks:
                sinks = [to if name == sink else name for name in life.fanned_out.sinks]
                life.fanned_out = msgspec.structs.replace(life.fanned_out, sinks=list(filter(None, sinks)))

    def _add_fanned_out(self, sink: str, events: int) -> None:
        self.fanned_out[sink] = self.fanned_out.get(sink, 0) + events

    def _add_dropped(self, reason: str, events: int, at_micros: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + events
        self.dropped_at[reason] = max(at_micros, self.dropped_at.get(reason, 0))

    def add_row(self, row: LedgerRow) -> None:
        """Add a row to the row of its writer."""
        self.rows.setdefault(row.writer, LedgerRow(writer=row.writer)).add(row)


def compact_entries(entries: list[LedgerEntry], present: AbstractSet[str], now_micros: int) -> list[LedgerEntry]:
    """The same totals in fewer entries.

    Keeps the entries of batches that are present or unfinished, and of the last finished ones.
    """
    fold = LedgerFold(entries)
    over = [batch for batch, life in fold.batches.items() if life.is_over and batch not in present]
    summed = set(over[: max(0, len(over) - RECENT_BATCHES_MAX)])
    for batch in over[: len(summed)]:
        wrong = fold.add_batch(fold.batches[batch], None)
        fold.discrepancy += abs(wrong.events) if wrong is not None else 0
    rows = list(fold.rows.values())
    earlier = [row for row in rows[: max(0, len(rows) - WRITERS_MAX)] if row.writer not in (EARLIER_WRITERS, *QUEUE_WRITERS)]
    for row in earlier:
        fold.rows.pop(row.writer)
        row.writer = EARLIER_WRITERS
        fold.add_row(row)
    rows = sorted(fold.rows.values(), key=lambda row: row.writer != EARLIER_WRITERS)
    first = SummaryEntry(
        now_micros,
        rows,
        fold.replayed,
        fold.repaired,
        fold.purged_dead,
        fold.purged_quarantine,
        fold.lost,
        fold.discrepancy,
        sum(events for batch, events in fold.redelivered.items() if not batch or batch in summed),
        fold.fanned_out,
        fold.dropped,
        fold.dropped_at,
    )
    remaining = [entry for entry in entries if isinstance(entry, BATCH_ENTRIES) and entry.batch not in summed]
    return [first, *map(fold.compacted_entry, remaining)]


def reconcile_entries(
    entries: Iterable[LedgerEntry],
    sealed: Mapping[str, FileCounts],
    active: Iterable[FileCounts],
    ignored: AbstractSet[str] = frozenset(),
    dead_on_disk: int = 0,
) -> Reconciliation:
    """Reconcile these entries with the counts of batch files, by batch id, and of segments.

    Batches in `ignored` appeared during the scan. `dead_on_disk` is the number of dead letters on disk.
    """
    fold = LedgerFold(entries)
    wrong: list[Discrepancy] = []
    for batch, life in fold.batches.items():
        if batch in ignored and not life.is_over and batch not in sealed:
            continue
        problem = fold.add_batch(life, sealed.get(batch))
        if problem is not None:
            wrong.append(msgspec.structs.replace(problem, batch=batch))
    for batch, file in sealed.items():
        if batch not in fold.batches:
            fold.add_batch(_BatchEntries(), file)
    for file in active:
        life = _BatchEntries()
        life.writer = file.writer
        fold.add_batch(life, file)
    total = LedgerRow()
    for row in fold.rows.values():
        total.add(row)
    expected = total.dead - fold.replayed - fold.purged_dead
    return Reconciliation(
        total=total,
        writers=list(fold.rows.values()),
        replayed=fold.replayed,
        repaired=fold.repaired,
        resent_on_request=sum(fold.redelivered.values()),
        purged_dead=fold.purged_dead,
        purged_quarantine=fold.purged_quarantine,
        lost_entries=fold.lost,
        dead_on_disk=dead_on_disk,
        dead_missing=max(0, expected - dead_on_disk),
        fanned_out=fold.fanned_out,
        earlier_discrepancy=fold.discrepancy,
        discrepancies=wrong,
        dropped=fold.dropped,
        dropped_at=fold.dropped_at,
    )


_ATTEMPTS: Final = 5  # a difference that is due to work in progress is gone at the next attempt
_BETWEEN_ATTEMPTS_S: Final = 0.2
_COUNTED_KINDS: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE, Kind.SEALED, Kind.DEAD})
_UNREADABLE_COUNTS: Final = FileCounts(0, 1)  # a file that cannot be read has an unknown number of events


class ReconciliationReport(NamedTuple):
    """The reconciliation of a directory, and the entries and files that could not be read."""

    reconciliation: Reconciliation
    unread_entries: int  # lines of the ledger that are damaged or of a later version
    unreadable: list[str]  # names of files

    @property
    def balances(self) -> bool:
        """Whether every accepted event is accounted for, and everything could be read."""
        return self.reconciliation.balances and not self.unreadable


def reconcile_queues(
    directory: Directory, outbox_report: ReconciliationReport, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> dict[str, ReconciliationReport]:
    """Reconcile the queues of several sinks, by sink, after the outbox directory. Raises `OSError`.

    Every event that was fanned out to a sink must be in the sink's ledger, because fan-out writes there first. Events that a
    queue accepted by replay or redelivery do not count for that.
    """
    reports: dict[str, ReconciliationReport] = {}
    for queue in directory.queues():
        report = reconcile(queue, progress)
        fanned_out = sum(row.accepted_max for row in report.reconciliation.writers if row.writer in QUEUE_WRITERS)
        missing = outbox_report.reconciliation.fanned_out.get(queue.sink, 0) - fanned_out
        if missing > 0:
            report.reconciliation.discrepancies.append(
                Discrepancy("", FAN_OUT_WRITER, missing, "fanned out, but not in the ledger of the sink")
            )
        reports[queue.sink] = report
    return reports


def reconcile(directory: Directory, progress: Callable[[int, int], None] = lambda _done, _total: None) -> ReconciliationReport:
    """Reconcile a directory. `progress(done, total)` is called with the bytes read so far. Raises `OSError`."""
    known: dict[str, FileCounts] = {}
    report = _reconcile_once(directory, progress, known)
    for _ in range(_ATTEMPTS - 1):
        if report.balances:
            break
        threads.pause(_BETWEEN_ATTEMPTS_S)
        report = _reconcile_once(directory, progress, known)
    return report


def _reconcile_once(
    directory: Directory, progress: Callable[[int, int], None], known_counts: dict[str, FileCounts]
) -> ReconciliationReport:
    """One attempt. Batch files never change, so those in `known_counts` are not read again; new ones are added to it."""
    before = _batch_ids(read_ledger(directory).entries)
    # Twice, as in `Directory.waiting_batch_ids`: a file that is compressed meanwhile must not be missed.
    listing = sorted(dict(entry for _ in range(2) for entry in directory.filesystem.list_files(directory.path)).items())
    total = sum(size for name, size in listing if layout.kind_of(name) in _COUNTED_KINDS)
    sealed: dict[str, FileCounts] = {}
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
            sealed[layout.batch_id(name)] = known_counts[name]
            continue
        try:
            if kind is Kind.SEALED:
                known_counts[name] = sealed[layout.batch_id(name)] = _count_sealed(directory, name)
                continue
            if kind is Kind.DEAD:
                dead[layout.batch_id(name).removeprefix("dead-")] = _count_lines(directory, name)
            else:
                active[name] = _count_records(directory, name, is_growing=True)
        except FileNotFoundError:
            continue
        except (OSError, FileUnusableError, MemoryError):
            unreadable.append(name)
            if kind is Kind.SEALED:
                sealed[layout.batch_id(name)] = _UNREADABLE_COUNTS
            elif kind is Kind.DEAD:
                dead[layout.batch_id(name).removeprefix("dead-")] = 0
            else:
                active[name] = msgspec.structs.replace(_UNREADABLE_COUNTS, writer=layout.writer_of(name))
    progress(total, total)
    entries, unread = read_ledger(directory)
    present = {name for name, _ in directory.filesystem.list_files(directory.path)}
    still_active = [file for name, file in active.items() if name in present]
    ignored = _batch_ids(entries) - before - sealed.keys()
    settled = {entry.batch for entry in entries if isinstance(entry, (SettledEntry, FannedOutEntry, EvictedEntry))}
    # Dead letters of a batch that is not settled yet are written before the ledger has them.
    dead_on_disk = sum(count for batch, count in dead.items() if batch in settled or batch not in sealed)
    return ReconciliationReport(reconcile_entries(entries, sealed, still_active, ignored, dead_on_disk), unread, unreadable)


def read_ledger(directory: Directory) -> LedgerPart:
    """The entries of the ledger of a directory; none where there is no ledger. Raises `OSError`.

    Of a large one, finished batches are summed up while it is read, as when the file is compacted: the totals are the same.
    """
    filesystem = directory.filesystem
    try:
        fd = filesystem.open_existing(directory.path_of(layout.LEDGER))
    except (FileNotFoundError, FileUnusableError):
        return LedgerPart([], 0)
    try:
        entries: list[LedgerEntry] = []
        unread, entries_max = 0, _ENTRIES_MAX
        for part in read_parts(filesystem, fd):
            entries += part.entries
            unread += part.unread
            if len(entries) > entries_max:
                present = {layout.batch_id(name) for name in directory.batch_names()}
                entries = compact_entries(entries, present, entries[-1].at_micros)
                entries_max = _ENTRIES_MAX + 2 * len(entries)
        return LedgerPart(entries, unread)
    finally:
        filesystem.close(fd)


def _batch_ids(entries: list[LedgerEntry]) -> set[str]:
    return {entry.batch for entry in entries if isinstance(entry, BATCH_ENTRIES)}


def _count_lines(directory: Directory, name: str) -> int:
    fd = directory.open_existing(name)
    try:
        return sum(part.count(b"\n") for part in parts_of(directory.filesystem, fd))
    finally:
        directory.filesystem.close(fd)


def _count_sealed(directory: Directory, name: str) -> FileCounts:
    try:
        return _count_records(directory, name)
    except FileNotFoundError:  # it was removed or compressed meanwhile
        return _count_records(directory, layout.compressed_name(name))


def _count_records(directory: Directory, name: str, *, is_growing: bool = False) -> FileCounts:
    fd = directory.open_existing(name)
    try:
        return FileCounts(*count_records(directory.filesystem, name, fd, is_growing=is_growing), layout.writer_of(name))
    finally:
        directory.filesystem.close(fd)
