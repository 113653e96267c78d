"""Where an event, a batch or a file is now: what the files show, and what the ledgers remember of batches."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pillarbox.admin import dead_letters, quarantine
from pillarbox.admin.scan import ScannedLine, all_directories, files_by_batch, read_first_available, scan_files, split_lines
from pillarbox.admin.tail import ACCEPTED, ACTIVE
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import (
    AdoptedEntry,
    EvictedEntry,
    LedgerEntry,
    PurgedEntry,
    SealedEntry,
    SettledEntry,
    parse_ledger,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.admin.dead_letters import FileProblem, IdentityDecoder
    from pillarbox.admin.event_filters import EventHeaderDecoder
    from pillarbox.admin.scan import FileRef
    from pillarbox.store.directory import Directory

_STATES = {
    Kind.ACTIVE: "active",
    Kind.LEGACY_ACTIVE: "active",
    Kind.SEALED: "waiting",
    Kind.DELIVERED: "kept",
    Kind.DEAD: "dead",
    Kind.CORRUPT: "quarantined",
    Kind.RANGES: "quarantined",
}


class HistoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is known of a batch."""

    state: str  # active, waiting, kept, dead, quarantined; or an entry of the ledger: sealed, adopted, settled, evicted, ...
    at_micros: int | None  # of the entry; of what waits, when it was sealed
    sink: str  # whose queue, where there are several sinks; "" for the outbox itself
    file: str  # from the outbox directory on; "" where the ledger says it
    text: str


class BatchHistory(msgspec.Struct, frozen=True):
    """All that is known of a batch, in order of time; what the files show comes last."""

    batch: str
    entries: list[HistoryEntry]


class EventLocation(msgspec.Struct, frozen=True, kw_only=True):
    """A place where an event is."""

    state: str  # as of a fact
    file: str
    offset: int | None  # of its line, or of the damaged span
    batch: str  # "" while it is not sealed
    record: str | None = None  # a dead letter's name
    code: str | None = None
    reason: str | None = None  # why it was refused, or is damaged
    event: msgspec.Raw | None = None  # None in damaged bytes


class DamagedRange(msgspec.Struct, frozen=True):
    """Damaged bytes in a file."""

    offset: int
    length: int
    reason: str


class FileContents(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file."""

    file: str
    state: str
    batch: str
    writer: str | None  # where the name tells
    bytes: int
    events: int
    damaged: list[DamagedRange]
    unfinished_bytes: int  # of an active file: behind its last whole line
    first_micros: int | None  # of the events' own times
    last_micros: int | None


class _QueueLedger(NamedTuple):
    """A ledger."""

    sink: str
    entries: list[LedgerEntry]


class Locator:
    """One look at the directory, its queues and their ledgers; raises `OSError` where they cannot be listed."""

    def __init__(self, directory: Directory, header_decoder: EventHeaderDecoder, identity_decoder: IdentityDecoder) -> None:
        self.problems: list[FileProblem] = []
        self._header_decoder = header_decoder
        self._identity_decoder = identity_decoder
        # The ledgers last: what settles meanwhile is in one, if its file is gone from the other.
        self._files = scan_files(directory)
        self._ledgers = [
            _QueueLedger(place.sink, parse_ledger(place.read_small_file(layout.LEDGER))[0])
            for place in all_directories(directory)
        ]

    @property
    def total_bytes(self) -> int:
        """How many bytes there are to search."""
        return sum(sight.size for sight in self._files)

    def find_files(self, name: str) -> list[FileRef]:
        """The files of this name, from the outbox directory on or by itself."""
        base = name.rpartition("/")[2]
        exact = [sight for sight in self._files if sight.display_name == name]
        return exact or [sight for sight in self._files if sight.name == base]

    def knows_batch(self, batch: str) -> bool:
        """Whether a file or a ledger has the batch."""
        return bool(self.batch_history(batch).entries)

    def batch_history(self, batch: str) -> BatchHistory:
        """What is known of a batch."""
        remembered = [
            HistoryEntry(
                state=type(entry).__name__.lower(),
                at_micros=entry.at_micros,
                sink=memory.sink,
                file="",
                text=_describe_entry(entry),
            )
            for memory in self._ledgers
            for entry in memory.entries
            if getattr(entry, "batch", None) == batch
        ]
        found = [self._file_entry(sight) for sight in self._files if batch and sight.batch == batch]
        return BatchHistory(batch, sorted(remembered, key=lambda fact: fact.at_micros or 0) + found)

    def _file_entry(self, file: FileRef) -> HistoryEntry:
        stamp = layout.sealed_at(file.batch) if file.kind is Kind.SEALED else None
        match file.kind:
            case Kind.SEALED:
                text = f"waits for {file.sink}" if file.sink else "waits"
            case Kind.DELIVERED:
                text = "is kept after delivery"
            case Kind.DEAD:
                text = self._describe_dead_letters(file)
            case Kind.CORRUPT:
                text = f"{file.size} damaged bytes: pillarbox quarantine show {file.batch}"
            case _:
                text = "where the damaged bytes stood"
        return HistoryEntry(state=_STATES[file.kind], at_micros=stamp, sink=file.sink, file=file.display_name, text=text)

    def _describe_dead_letters(self, file: FileRef) -> str:
        codes = Counter(record.letter.code for record in self._read_dead_letters(file))
        counts = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        return f"dead letters, {counts or 'none'}: pillarbox dead show --batch {file.batch}"

    def _read_dead_letters(self, file: FileRef) -> list[dead_letters.DeadLetterRecord]:
        data = read_first_available([file], self.problems.append)
        letters = dead_letters.parse(file.batch, data or b"", self._identity_decoder)
        self.problems += letters.problems
        return letters.records

    def find_event(self, event_id: str, on_progress: Callable[[int], None]) -> Iterator[EventLocation]:
        """Everywhere an event is, by reading everything; `progress(bytes)` is called with what was read."""
        encoded = msgspec.json.encode(event_id)[1:-1]
        seen = encoded if encoded.isascii() else b""  # what is not may be written in several ways
        read = files_by_batch(self._files, ACCEPTED - ACTIVE)
        active = [[sight] for sight in self._files if sight.kind in ACTIVE]
        for sights in [*read.values(), *active]:
            data = read_first_available(sights, self.problems.append) or b""
            if seen in data:
                yield from self._in_lines(sights[0], data, event_id)
            on_progress(sum(sight.size for sight in sights))
        for sight in self._files:
            if sight.kind is Kind.DEAD:
                yield from self._in_dead_letters(sight, event_id)
                on_progress(sight.size)
            elif sight.kind is Kind.CORRUPT:
                yield from self._in_quarantine(sight, encoded)
                on_progress(sight.size)

    def _in_lines(self, file: FileRef, data: bytes, event_id: str) -> Iterator[EventLocation]:
        for line in _complete_lines(file, data):
            if line.payload is not None and self._header_decoder.decode(line.payload).event_id == event_id:
                yield EventLocation(
                    state=_STATES[file.kind],
                    file=file.display_name,
                    offset=line.offset,
                    batch=file.batch,
                    event=msgspec.Raw(line.payload),
                )

    def _in_dead_letters(self, file: FileRef, event_id: str) -> Iterator[EventLocation]:
        for record in self._read_dead_letters(file):
            if record.event_id == event_id:
                yield EventLocation(
                    state="dead",
                    file=file.display_name,
                    offset=None,
                    batch=file.batch,
                    record=record.name,
                    code=record.letter.code,
                    reason=record.letter.reason,
                    event=record.letter.event,
                )

    def _in_quarantine(self, file: FileRef, encoded: bytes) -> Iterator[EventLocation]:
        kept = quarantine.read_batch(file.directory, file.batch)
        if kept is None:
            return
        for span, piece in zip(kept.ranges, kept.pieces, strict=False):
            if encoded in piece:
                yield EventLocation(
                    state="quarantined", file=file.display_name, offset=span.offset, batch=file.batch, reason=span.reason
                )

    def read_contents(self, file: FileRef) -> FileContents:
        """What is in a file, by reading it."""
        times: list[int] = []
        events = 0
        damaged: list[DamagedRange] = []
        data = read_first_available([file], self.problems.append) or b""
        if file.kind in ACCEPTED:
            for line in _complete_lines(file, data):
                if line.damage is not None:
                    damaged.append(DamagedRange(line.damage.offset, line.damage.length, line.damage.reason))
                if line.payload is not None:
                    events += 1
                    at = self._header_decoder.decode(line.payload).occurred_at_micros
                    times += [] if at is None else [at]
                    times = [min(times), max(times)] if times else []
        elif file.kind is Kind.DEAD:
            events = len(self._read_dead_letters(file))
        else:
            kept = quarantine.read_batch(file.directory, file.batch)
            damaged = [
                DamagedRange(span.offset, span.length, span.reason) for span in (kept.ranges if kept is not None else [])
            ]
        return FileContents(
            file=file.display_name,
            state=_STATES[file.kind],
            batch=file.batch,
            writer=layout.writer_of(file.name) or None,
            bytes=file.size,
            events=events,
            damaged=damaged,
            unfinished_bytes=len(data) - data.rfind(b"\n") - 1 if file.kind in ACTIVE else 0,
            first_micros=times[0] if times else None,
            last_micros=times[-1] if times else None,
        )


def _complete_lines(file: FileRef, data: bytes) -> Iterator[ScannedLine]:
    """The lines; of an active file those that are whole."""
    return split_lines(data[: data.rfind(b"\n") + 1] if file.kind in ACTIVE else data)


def _describe_entry(entry: LedgerEntry) -> str:
    """An entry of the ledger as a sentence."""
    match entry:
        case SealedEntry(writer=writer, events=events, bytes=size):
            count = "events that nobody counted" if events is None else f"{events} events"
            return f"sealed by writer {writer}: {count}, {size} bytes"
        case AdoptedEntry(writer=writer):
            return f"sealed by another process: its writer {writer or 'of an older system'} had died"
        case SettledEntry():
            parts = [f"delivered to {entry.sink}: {entry.delivered} events"]
            parts += [f"{entry.duplicates} of them it had before"] if entry.duplicates else []
            parts += [f"refused: {entry.dead}"] if entry.dead else []
            parts += [f"damaged spans: {entry.quarantined}"] if entry.quarantined else []
            return ", ".join(parts)
        case EvictedEntry(events=events):
            return f"given up for newer events: {events} events"
        case PurgedEntry(kind=kind, events=events):
            return f"purged from {kind}: {events}"
    return f"{type(entry).__name__.lower()}: {getattr(entry, 'events', '')} events"
