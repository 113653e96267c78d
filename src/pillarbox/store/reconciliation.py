"""The account: what was accepted must be delivered, pending, dead, quarantined or evicted. Pure.

Two sources that know nothing of each other are held together: the writers' own counts, which the entry of a sealed file
carries, and what was found of the same file when it was settled or is looked at now. So the account can fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

PurgedKind = Literal["dead", "quarantine"]
RECENT_BATCHES_MAX: Final = 1000  # batches that are over and still kept one by one: a late or second entry must find them
WRITERS_MAX: Final = 64  # kept one by one when summed up; those before are one row
EARLIER_WRITERS: Final = "earlier writers"
UNKNOWN_WRITER: Final = "unknown"
REDELIVERY_WRITER: Final = "resent"  # stands for the writer of what was sent again on request
FAN_OUT_WRITER: Final = "handed over"  # stands for the writer in the account of a queue
QUEUE_WRITERS: Final = frozenset({FAN_OUT_WRITER, UNKNOWN_WRITER})  # whose what was handed over may be: an entry may be lost


class _LedgerEntry(msgspec.Struct, frozen=True, tag_field="entry"):
    at_micros: int


class SealedEntry(_LedgerEntry, frozen=True, tag="sealed"):
    """A writer sealed a file; `events` is its own count, None where it cannot be sure."""

    batch: str
    writer: str
    events: int | None
    bytes: int


class AdoptedEntry(_LedgerEntry, frozen=True, tag="adopted"):
    """Somebody sealed what a dead writer left: nobody counted."""

    batch: str
    writer: str


class SettledEntry(_LedgerEntry, frozen=True, tag="settled"):
    """The destination has all that it takes of a batch; `quarantined` counts spans of damaged bytes."""

    batch: str
    sink: str
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int = 0  # of the dead letters, those that were not kept, for want of room
    discarded_spans: int = 0  # of the spans likewise


class FannedOutEntry(_LedgerEntry, frozen=True, tag="shared"):
    """A batch went into the queues of these sinks, each of which has an account of its own."""

    batch: str
    sinks: list[str]
    events: int  # good records that were found in it
    spans: int  # of damaged bytes


class QueueRenamedEntry(_LedgerEntry, frozen=True, tag="renamed"):
    """The queue of a sink is another's from now on; with `to` empty it is gone, and one of that name is a new one."""

    sink: str
    to: str


class EvictedEntry(_LedgerEntry, frozen=True, tag="evicted"):
    """A batch was given up for newer events."""

    batch: str
    events: int


class ReplayedEntry(_LedgerEntry, frozen=True, tag="replayed"):
    """Dead letters of a batch went in again: they are accepted once more, as a part of another batch."""

    batch: str
    events: int


class RepairedEntry(_LedgerEntry, frozen=True, tag="repaired"):
    """Records that were recovered from a batch's quarantine went in again."""

    batch: str
    events: int


class RedeliveredEntry(_LedgerEntry, frozen=True, tag="resent"):
    """A delivered file waits again on request, as a batch of its own: its events are accepted once more."""

    batch: str  # what it is now
    of: str  # what it was
    events: int


class PurgedEntry(_LedgerEntry, frozen=True, tag="purged"):
    """What was set aside of a batch was given up: dead letters, or spans of damaged bytes."""

    batch: str
    kind: PurgedKind
    events: int


class LostEntry(_LedgerEntry, frozen=True, tag="lost"):
    """So many entries could not be written and did not fit into memory."""

    entries: int


class LedgerRow(msgspec.Struct, kw_only=True):
    """A writer's account, or all of them together; in events. Of a range, `_max` is the upper end."""

    writer: str = ""
    accepted: int = 0
    accepted_max: int = 0
    delivered: int = 0
    pending: int = 0
    pending_max: int = 0
    dead: int = 0
    quarantined: int = 0
    quarantined_max: int = 0
    evicted: int = 0
    shared: int = 0  # handed over to the queues of several sinks
    shared_max: int = 0
    duplicates: int = 0  # of those delivered, what the destination had before
    resent: int = 0  # delivered once more after a kill

    def add(self, other: LedgerRow) -> None:
        """Add another row's numbers to this one's."""
        for field in NUMBERS:
            setattr(self, field, getattr(self, field) + getattr(other, field))

    @property
    def accounted_range(self) -> tuple[int, int]:
        """What the accepted must be equal to: the two ends."""
        fixed = self.delivered + self.dead + self.evicted
        low = fixed + self.pending + self.quarantined + self.shared
        return low, fixed + self.pending_max + self.quarantined_max + self.shared_max


NUMBERS: Final = tuple(field for field in LedgerRow.__struct_fields__ if field != "writer")


class SummaryEntry(_LedgerEntry, frozen=True, tag="sum"):
    """What is over, summed up: a row a writer, and what was mended."""

    rows: list[LedgerRow]
    replayed: int = 0
    repaired: int = 0
    purged_dead: int = 0
    purged_quarantine: int = 0
    lost: int = 0
    wrong: int = 0  # events by which batches that are over did not balance
    resent: int = 0  # on request
    shared: dict[str, int] = {}  # events handed over, by sink


BATCH_ENTRIES: Final = (SealedEntry, AdoptedEntry, SettledEntry, RedeliveredEntry, FannedOutEntry, EvictedEntry)
LedgerEntry = (
    SealedEntry
    | AdoptedEntry
    | SettledEntry
    | FannedOutEntry
    | QueueRenamedEntry
    | EvictedEntry
    | ReplayedEntry
    | RepairedEntry
    | RedeliveredEntry
    | PurgedEntry
    | LostEntry
    | SummaryEntry
)


class FileCounts(msgspec.Struct, frozen=True):
    """What was read of a file that is there now: good records, and spans of damaged bytes."""

    records: int
    damaged_ranges: int
    writer: str = ""  # of an active file


class Discrepancy(msgspec.Struct, frozen=True):
    """A batch that does not balance: `events` are missing, or, below zero, too many."""

    batch: str
    writer: str
    events: int
    problem: str


class _BatchEntries:
    """What the entries say of a batch."""

    def __init__(self) -> None:
        self.writer = UNKNOWN_WRITER
        self.is_sealed = False  # by an entry of whoever sealed it
        self.writer_count: int | None = None
        self.settled: SettledEntry | None = None
        self.fanned_out: FannedOutEntry | None = None
        self.evicted: int | None = None
        self.redelivered = 0

    @property
    def is_over(self) -> bool:
        return self.settled is not None or self.evicted is not None or self.fanned_out is not None

    def add_entry(self, entry: LedgerEntry) -> None:
        match entry:
            case SealedEntry(writer=writer, events=events):
                self.writer, self.writer_count, self.is_sealed = writer, events, True
            case AdoptedEntry(writer=writer):
                self.writer, self.is_sealed = writer if not self.is_sealed else self.writer, True
            case RedeliveredEntry(events=events):
                self.writer, self.writer_count, self.is_sealed = REDELIVERY_WRITER, events, True
            case SettledEntry():
                if self.settled is not None and self.settled != entry:
                    self.redelivered += entry.delivered
                self.settled = entry
            case FannedOutEntry():
                self.fanned_out = entry
            case EvictedEntry(events=events):
                self.evicted = events

    def to_row(self, found: FileCounts | None) -> tuple[LedgerRow, Discrepancy | None]:
        """The batch's part of the account; `sealed` is None where its file is gone."""
        row = LedgerRow(writer=self.writer, resent=self.redelivered)
        spans = 0
        if self.settled is not None:
            row.delivered, row.dead, row.duplicates = self.settled.delivered, self.settled.dead, self.settled.duplicates
            records, spans = row.delivered + row.dead, self.settled.quarantined
            row.quarantined_max = spans
        elif self.evicted is not None:
            row.evicted = records = self.evicted
        elif self.fanned_out is not None:
            row.shared = row.shared_max = records = self.fanned_out.events
            spans = self.fanned_out.spans
            row.shared_max += spans
        elif found is not None:
            row.pending = row.pending_max = records = found.records
            spans = found.damaged_ranges
            row.pending_max += spans
        else:
            row.accepted = row.accepted_max = self.writer_count or 0
            return row, self._discrepancy(self.writer_count or 0, "gone without an entry: lost, or its entry is")
        row.accepted, row.accepted_max = records, records + spans
        if self.writer_count is None:
            return row, None
        return self._with_writer_count(row, records, spans)

    def _with_writer_count(self, row: LedgerRow, records: int, spans: int) -> tuple[LedgerRow, Discrepancy | None]:
        """The same, where the writer has counted: what is damaged is what is missing."""
        counted = self.writer_count or 0
        row.accepted = row.accepted_max = counted
        missing = counted - records
        if missing < 0 or (missing and not spans):
            row.pending_max, row.quarantined_max, row.shared_max = row.pending, row.quarantined, row.shared
            return row, self._discrepancy(missing, f"the writer counted {counted}, found were {records}")
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
    """The account of a directory."""

    total: LedgerRow
    writers: list[LedgerRow]
    replayed: int = 0
    repaired: int = 0
    resent_on_request: int = 0
    purged_dead: int = 0
    purged_quarantine: int = 0
    lost_entries: int = 0
    dead_on_disk: int = 0  # dead letters on disk
    dead_missing: int = 0  # that the ledger has and the disk has not
    fanned_out: dict[str, int] = {}  # events handed over, by sink; at the least, where damage made a count unknowable
    earlier_discrepancy: int = 0  # events by which batches that are summed up did not balance
    discrepancies: list[Discrepancy]

    @property
    def balances(self) -> bool:
        """Whether every accepted event is accounted for, within the ranges that crashes have left."""
        low, high = self.total.accounted_range
        within = low <= self.total.accepted_max and self.total.accepted <= high
        return within and not (self.discrepancies or self.earlier_discrepancy or self.dead_missing)


class _LedgerFold:
    """Entries, folded."""

    def __init__(self, entries: Iterable[LedgerEntry]) -> None:
        self.batches: dict[str, _BatchEntries] = {}
        self.redelivered: dict[str, int] = {}  # events by batch; what is summed up has no name
        self.rows: dict[str, LedgerRow] = {}
        self.fanned_out: dict[str, int] = {}
        self.replayed = self.repaired = self.purged_dead = self.purged_quarantine = self.lost = self.discrepancy = 0
        mended: set[LedgerEntry] = set()
        for entry in entries:
            if isinstance(entry, (ReplayedEntry, RepairedEntry, PurgedEntry)):
                if entry in mended:
                    continue  # the disk refused it after it had taken it, so it was written again
                mended.add(entry)
            self._add_entry(entry)

    def _add_entry(self, entry: LedgerEntry) -> None:
        match entry:
            case SummaryEntry():
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
            case ReplayedEntry(events=events):
                self.replayed += events
            case RepairedEntry(events=events):
                self.repaired += events
            case PurgedEntry(kind=kind, events=events):
                self.purged_dead += events if kind == "dead" else 0
                self.purged_quarantine += events if kind == "quarantine" else 0
            case LostEntry(entries=lost):
                self.lost += lost
            case QueueRenamedEntry(sink=sink, to=to):
                self._rename_queue(sink, to)
            case _:
                if isinstance(entry, RedeliveredEntry):
                    self.redelivered[entry.batch] = entry.events
                self.batches.setdefault(entry.batch, _BatchEntries()).add_entry(entry)

    def add_batch(self, life: _BatchEntries, found: FileCounts | None) -> Discrepancy | None:
        """Add a batch's part of the account; what is wrong with it."""
        row, wrong = life.to_row(found)
        self.add_row(row)
        if life.settled is not None:
            self.purged_dead += life.settled.discarded
            self.purged_quarantine += life.settled.discarded_spans
        if life.fanned_out is not None:
            for sink in life.fanned_out.sinks:
                self._add_fanned_out(sink, life.fanned_out.events)
        return wrong

    def _rename_queue(self, sink: str, to: str) -> None:
        """What was handed over so far to the one, was to the other; or to a queue that is no more."""
        before = self.fanned_out.pop(sink, 0)
        if to:
            self._add_fanned_out(to, before)
        for life in self.batches.values():
            if life.fanned_out is not None and sink in life.fanned_out.sinks:
                sinks = [to if one == sink else one for one in life.fanned_out.sinks]
                life.fanned_out = msgspec.structs.replace(life.fanned_out, sinks=list(filter(None, sinks)))

    def _add_fanned_out(self, sink: str, events: int) -> None:
        self.fanned_out[sink] = self.fanned_out.get(sink, 0) + events

    def add_row(self, row: LedgerRow) -> None:
        """To what is known of its writer."""
        self.rows.setdefault(row.writer, LedgerRow(writer=row.writer)).add(row)


def compact_entries(entries: list[LedgerEntry], present: AbstractSet[str], now_micros: int) -> list[LedgerEntry]:
    """The same account in fewer entries. Batches that are there or not over stay as they are, and the last that are over."""
    fold = _LedgerFold(entries)
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
    )
    kept = [entry for entry in entries if isinstance(entry, BATCH_ENTRIES) and entry.batch not in summed]
    # Queues may have got other names since.
    return [
        first,
        *(fold.batches[entry.batch].fanned_out or entry if isinstance(entry, FannedOutEntry) else entry for entry in kept),
    ]


def reconcile_entries(
    entries: Iterable[LedgerEntry],
    sealed: Mapping[str, FileCounts],
    active: Iterable[FileCounts],
    ignored: AbstractSet[str] = frozenset(),
    dead_on_disk: int = 0,
) -> Reconciliation:
    """The account of these entries and of what was read of sealed files, by batch id, and of active ones.

    Batches in `ignored` appeared while it was looked. `dead_on_disk` counts the dead letters that are on disk.
    """
    fold = _LedgerFold(entries)
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
    )
