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
RECENT: Final = 1000  # batches that are over and still kept one by one: a late or second entry must find them
WRITERS_MAX: Final = 64  # kept one by one when summed up; those before are one row
EARLIER: Final = "earlier writers"
UNKNOWN: Final = "unknown"
RESENT: Final = "resent"  # stands for the writer of what was sent again on request
HANDED_OVER: Final = "handed over"  # stands for the writer in the account of a queue
OF_A_QUEUE: Final = frozenset({HANDED_OVER, UNKNOWN})  # whose what was handed over may be: an entry may be lost


class _Entry(msgspec.Struct, frozen=True, tag_field="entry", tag=str.lower):
    at_micros: int


class Sealed(_Entry, frozen=True):
    """A writer sealed a file; `events` is its own count, None where it cannot be sure."""

    batch: str
    writer: str
    events: int | None
    bytes: int


class Adopted(_Entry, frozen=True):
    """Somebody sealed what a dead writer left: nobody counted."""

    batch: str
    writer: str


class Settled(_Entry, frozen=True):
    """The destination has all that it takes of a batch; `quarantined` counts spans of damaged bytes."""

    batch: str
    sink: str
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int = 0  # of the dead letters, those that were not kept, for want of room
    discarded_spans: int = 0  # of the spans likewise


class Shared(_Entry, frozen=True):
    """A batch went into the queues of these sinks, each of which has an account of its own."""

    batch: str
    sinks: list[str]
    events: int  # good records that were found in it
    spans: int  # of damaged bytes


class Renamed(_Entry, frozen=True):
    """The queue of a sink is another's from now on; with `to` empty it is gone, and one of that name is a new one."""

    sink: str
    to: str


class Evicted(_Entry, frozen=True):
    """A batch was given up for newer events."""

    batch: str
    events: int


class Replayed(_Entry, frozen=True):
    """Dead letters of a batch went in again: they are accepted once more, as a part of another batch."""

    batch: str
    events: int


class Repaired(_Entry, frozen=True):
    """Records that were recovered from a batch's quarantine went in again."""

    batch: str
    events: int


class Resent(_Entry, frozen=True):
    """A delivered file waits again on request, as a batch of its own: its events are accepted once more."""

    batch: str  # what it is now
    of: str  # what it was
    events: int


class Purged(_Entry, frozen=True):
    """What was set aside of a batch was given up: dead letters, or spans of damaged bytes."""

    batch: str
    kind: PurgedKind
    events: int


class Lost(_Entry, frozen=True):
    """So many entries could not be written and did not fit into memory."""

    entries: int


class Row(msgspec.Struct, kw_only=True):
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

    def add(self, other: Row) -> None:
        """Add another row's numbers to this one's."""
        for field in NUMBERS:
            setattr(self, field, getattr(self, field) + getattr(other, field))

    @property
    def settled_and_pending(self) -> tuple[int, int]:
        """What the accepted must be equal to: the two ends."""
        fixed = self.delivered + self.dead + self.evicted
        low = fixed + self.pending + self.quarantined + self.shared
        return low, fixed + self.pending_max + self.quarantined_max + self.shared_max


NUMBERS: Final = tuple(field for field in Row.__struct_fields__ if field != "writer")


class Sum(_Entry, frozen=True):
    """What is over, summed up: a row a writer, and what was mended."""

    rows: list[Row]
    replayed: int = 0
    repaired: int = 0
    purged_dead: int = 0
    purged_quarantine: int = 0
    lost: int = 0
    wrong: int = 0  # events by which batches that are over did not balance
    resent: int = 0  # on request
    shared: dict[str, int] = {}  # events handed over, by sink


OF_A_BATCH: Final = (Sealed, Adopted, Settled, Resent, Shared, Evicted)
Entry = Sealed | Adopted | Settled | Shared | Renamed | Evicted | Replayed | Repaired | Resent | Purged | Lost | Sum


class Found(msgspec.Struct, frozen=True):
    """What was read of a file that is there now: good records, and spans of damaged bytes."""

    records: int
    spans: int
    writer: str = ""  # of an active file


class Wrong(msgspec.Struct, frozen=True):
    """A batch that does not balance: `events` are missing, or, below zero, too many."""

    batch: str
    writer: str
    events: int
    problem: str


class _Life:
    """What the entries say of a batch."""

    def __init__(self) -> None:
        self.writer = UNKNOWN
        self.known = False  # by an entry of whoever sealed it
        self.counted: int | None = None
        self.settled: Settled | None = None
        self.shared: Shared | None = None
        self.evicted: int | None = None
        self.resent = 0

    @property
    def is_over(self) -> bool:
        return self.settled is not None or self.evicted is not None or self.shared is not None

    def take(self, entry: Entry) -> None:
        match entry:
            case Sealed(writer=writer, events=events):
                self.writer, self.counted, self.known = writer, events, True
            case Adopted(writer=writer):
                self.writer, self.known = writer if not self.known else self.writer, True
            case Resent(events=events):
                self.writer, self.counted, self.known = RESENT, events, True
            case Settled():
                if self.settled is not None and self.settled != entry:
                    self.resent += entry.delivered
                self.settled = entry
            case Shared():
                self.shared = entry
            case Evicted(events=events):
                self.evicted = events

    def row(self, found: Found | None) -> tuple[Row, Wrong | None]:
        """The batch's part of the account; `found` is None where its file is gone."""
        row = Row(writer=self.writer, resent=self.resent)
        spans = 0
        if self.settled is not None:
            row.delivered, row.dead, row.duplicates = self.settled.delivered, self.settled.dead, self.settled.duplicates
            records, spans = row.delivered + row.dead, self.settled.quarantined
            row.quarantined_max = spans
        elif self.evicted is not None:
            row.evicted = records = self.evicted
        elif self.shared is not None:
            row.shared = row.shared_max = records = self.shared.events
            spans = self.shared.spans
            row.shared_max += spans
        elif found is not None:
            row.pending = row.pending_max = records = found.records
            spans = found.spans
            row.pending_max += spans
        else:
            row.accepted = row.accepted_max = self.counted or 0
            return row, self._wrong(self.counted or 0, "gone without an entry: lost, or its entry is")
        row.accepted, row.accepted_max = records, records + spans
        if self.counted is None:
            return row, None
        return self._counted(row, records, spans)

    def _counted(self, row: Row, records: int, spans: int) -> tuple[Row, Wrong | None]:
        """The same, where the writer has counted: what is damaged is what is missing."""
        counted = self.counted or 0
        row.accepted = row.accepted_max = counted
        missing = counted - records
        if missing < 0 or (missing and not spans):
            row.pending_max, row.quarantined_max, row.shared_max = row.pending, row.quarantined, row.shared
            return row, self._wrong(missing, f"the writer counted {counted}, found were {records}")
        if self.settled is not None:
            row.quarantined = row.quarantined_max = missing
        elif self.shared is not None:
            row.shared = row.shared_max = row.shared + missing
        else:
            row.pending = row.pending_max = row.pending + missing
        return row, None

    def _wrong(self, events: int, problem: str) -> Wrong:
        return Wrong("", self.writer, events, problem)


class Account(msgspec.Struct, kw_only=True):
    """The account of a directory."""

    total: Row
    writers: list[Row]
    replayed: int = 0
    repaired: int = 0
    resent_on_request: int = 0
    purged_dead: int = 0
    purged_quarantine: int = 0
    lost_entries: int = 0
    dead_kept: int = 0  # dead letters on disk
    dead_missing: int = 0  # that the ledger has and the disk has not
    shared: dict[str, int] = {}  # events handed over, by sink; at the least, where damage made a count unknowable
    earlier_wrong: int = 0  # events by which batches that are summed up did not balance
    wrong: list[Wrong]

    @property
    def balances(self) -> bool:
        """Whether every accepted event is accounted for, within the ranges that crashes have left."""
        low, high = self.total.settled_and_pending
        within = low <= self.total.accepted_max and self.total.accepted <= high
        return within and not (self.wrong or self.earlier_wrong or self.dead_missing)


class _Fold:
    """Entries, folded."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.lives: dict[str, _Life] = {}
        self.resent: dict[str, int] = {}  # events by batch; what is summed up has no name
        self.rows: dict[str, Row] = {}
        self.shared: dict[str, int] = {}
        self.replayed = self.repaired = self.purged_dead = self.purged_quarantine = self.lost = self.wrong = 0
        mended: set[Entry] = set()
        for entry in entries:
            if isinstance(entry, (Replayed, Repaired, Purged)):
                if entry in mended:
                    continue  # the disk refused it after it had taken it, so it was written again
                mended.add(entry)
            self._take(entry)

    def _take(self, entry: Entry) -> None:
        match entry:
            case Sum():
                for row in entry.rows:
                    self.add(row)
                self.replayed += entry.replayed
                self.repaired += entry.repaired
                self.purged_dead += entry.purged_dead
                self.purged_quarantine += entry.purged_quarantine
                self.lost += entry.lost
                self.wrong += entry.wrong
                self.resent[""] = self.resent.get("", 0) + entry.resent
                for sink, events in entry.shared.items():
                    self._share(sink, events)
            case Replayed(events=events):
                self.replayed += events
            case Repaired(events=events):
                self.repaired += events
            case Purged(kind=kind, events=events):
                self.purged_dead += events if kind == "dead" else 0
                self.purged_quarantine += events if kind == "quarantine" else 0
            case Lost(entries=lost):
                self.lost += lost
            case Renamed(sink=sink, to=to):
                self._rename(sink, to)
            case _:
                if isinstance(entry, Resent):
                    self.resent[entry.batch] = entry.events
                self.lives.setdefault(entry.batch, _Life()).take(entry)

    def conclude(self, life: _Life, found: Found | None) -> Wrong | None:
        """Add a batch's part of the account; what is wrong with it."""
        row, wrong = life.row(found)
        self.add(row)
        if life.settled is not None:
            self.purged_dead += life.settled.discarded
            self.purged_quarantine += life.settled.discarded_spans
        if life.shared is not None:
            for sink in life.shared.sinks:
                self._share(sink, life.shared.events)
        return wrong

    def _rename(self, sink: str, to: str) -> None:
        """What was handed over so far to the one, was to the other; or to a queue that is no more."""
        before = self.shared.pop(sink, 0)
        if to:
            self._share(to, before)
        for life in self.lives.values():
            if life.shared is not None and sink in life.shared.sinks:
                sinks = [to if one == sink else one for one in life.shared.sinks]
                life.shared = msgspec.structs.replace(life.shared, sinks=list(filter(None, sinks)))

    def _share(self, sink: str, events: int) -> None:
        self.shared[sink] = self.shared.get(sink, 0) + events

    def add(self, row: Row) -> None:
        """To what is known of its writer."""
        self.rows.setdefault(row.writer, Row(writer=row.writer)).add(row)


def condensed(entries: list[Entry], there: AbstractSet[str], now_micros: int) -> list[Entry]:
    """The same account in fewer entries. Batches that are there or not over stay as they are, and the last that are over."""
    fold = _Fold(entries)
    over = [batch for batch, life in fold.lives.items() if life.is_over and batch not in there]
    summed = set(over[: max(0, len(over) - RECENT)])
    for batch in over[: len(summed)]:
        wrong = fold.conclude(fold.lives[batch], None)
        fold.wrong += abs(wrong.events) if wrong is not None else 0
    rows = list(fold.rows.values())
    earlier = [row for row in rows[: max(0, len(rows) - WRITERS_MAX)] if row.writer not in (EARLIER, *OF_A_QUEUE)]
    for row in earlier:
        fold.rows.pop(row.writer)
        row.writer = EARLIER
        fold.add(row)
    rows = sorted(fold.rows.values(), key=lambda row: row.writer != EARLIER)
    first = Sum(
        now_micros,
        rows,
        fold.replayed,
        fold.repaired,
        fold.purged_dead,
        fold.purged_quarantine,
        fold.lost,
        fold.wrong,
        sum(events for batch, events in fold.resent.items() if not batch or batch in summed),
        fold.shared,
    )
    kept = [entry for entry in entries if isinstance(entry, OF_A_BATCH) and entry.batch not in summed]
    # Queues may have got other names since.
    return [first, *(fold.lives[entry.batch].shared or entry if isinstance(entry, Shared) else entry for entry in kept)]


def account(
    entries: Iterable[Entry],
    found: Mapping[str, Found],
    active: Iterable[Found],
    ignored: AbstractSet[str] = frozenset(),
    dead_kept: int = 0,
) -> Account:
    """The account of these entries and of what was read of sealed files, by batch id, and of active ones.

    Batches in `ignored` appeared while it was looked. `dead_kept` counts the dead letters that are on disk.
    """
    fold = _Fold(entries)
    wrong: list[Wrong] = []
    for batch, life in fold.lives.items():
        if batch in ignored and not life.is_over and batch not in found:
            continue
        problem = fold.conclude(life, found.get(batch))
        if problem is not None:
            wrong.append(msgspec.structs.replace(problem, batch=batch))
    for batch, file in found.items():
        if batch not in fold.lives:
            fold.conclude(_Life(), file)
    for file in active:
        life = _Life()
        life.writer = file.writer
        fold.conclude(life, file)
    total = Row()
    for row in fold.rows.values():
        total.add(row)
    expected = total.dead - fold.replayed - fold.purged_dead
    return Account(
        total=total,
        writers=list(fold.rows.values()),
        replayed=fold.replayed,
        repaired=fold.repaired,
        resent_on_request=sum(fold.resent.values()),
        purged_dead=fold.purged_dead,
        purged_quarantine=fold.purged_quarantine,
        lost_entries=fold.lost,
        dead_kept=dead_kept,
        dead_missing=max(0, expected - dead_kept),
        shared=fold.shared,
        earlier_wrong=fold.wrong,
        wrong=wrong,
    )
