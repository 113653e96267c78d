"""Locates an event, a batch or a file: where it is now according to the files, and what the ledgers say about a batch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.admin import dead_letters, quarantine
from pillarbox.admin.scan import all_directories, files_by_batch, read_first_available, scan_files, split_lines
from pillarbox.admin.tail import ACCEPTED, ACTIVE
from pillarbox.admin.text import counted
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import (
    AdoptedEntry,
    EvictedEntry,
    FannedOutEntry,
    PurgedEntry,
    RedeliveredEntry,
    RepairedEntry,
    ReplayedEntry,
    SealedEntry,
    SettledEntry,
)
from pillarbox.store.ledger_reader import read_parts
from pillarbox.store.reader import DamagedRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.admin.dead_letters import DeadLetterRecord, IdentityDecoder
    from pillarbox.admin.filters import EventHeaderDecoder
    from pillarbox.admin.scan import FilePart, FileProblem, FileRef, ScannedLine
    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger_entries import LedgerEntry

_FILE_STATES: Final = {
    Kind.ACTIVE: "active",
    Kind.LEGACY_ACTIVE: "active",
    Kind.SEALED: "pending",
    Kind.DELIVERED: "retained",
    Kind.DEAD: "dead",
    Kind.CORRUPT: "quarantined",
    Kind.RANGES: "quarantined",
}
_ENTRY_STATES: Final = {
    SealedEntry: "sealed",
    AdoptedEntry: "adopted",
    SettledEntry: "settled",
    FannedOutEntry: "fanned out",
    EvictedEntry: "evicted",
    ReplayedEntry: "replayed",
    RepairedEntry: "repaired",
    RedeliveredEntry: "redelivered",
    PurgedEntry: "purged",
}


class HistoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One step in the life of a batch."""

    state: str  # of a file: active, pending, retained, dead, quarantined; of a ledger entry: its kind, such as settled
    at_micros: int | None  # time of the ledger entry; for a pending file, when it was sealed
    sink: str  # name of the sink whose queue or ledger has it; "" for the outbox directory
    file: str  # path relative to the outbox directory; "" for a ledger entry
    text: str  # details in words


class BatchHistory(msgspec.Struct, frozen=True):
    """What is known of a batch: the ledger entries in order of time, then its files."""

    batch: str  # batch id
    entries: list[HistoryEntry]  # the steps, in order of time


class EventLocation(msgspec.Struct, frozen=True, kw_only=True):
    """A place where an event is stored."""

    state: str  # state of the file, as in `HistoryEntry`
    file: str  # path relative to the outbox directory
    offset: int | None  # offset of the event's line, or of the damaged byte range
    batch: str  # batch id; "" in an active segment
    record: str | None = None  # name of the dead letter
    code: str | None = None  # rejection code of the dead letter
    reason: str | None = None  # why the event was rejected, or what is wrong with the bytes
    event: msgspec.Raw | None = None  # the event; None within damaged bytes


class FileSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a file contains, in numbers."""

    file: str  # path relative to the outbox directory
    state: str  # state of the file, as in `HistoryEntry`
    batch: str  # batch id; "" for a segment
    writer: str | None  # id of the writer; None if the file's name does not tell
    bytes: int  # size of the file
    events: int  # number of good records
    damaged: list[DamagedRange]  # byte ranges that are not records
    unfinished_bytes: int  # in an active segment: bytes after its last complete line
    first_micros: int | None  # earliest time among the events' own times
    last_micros: int | None  # latest of them


class Locator:
    """Searches one snapshot of the files and ledgers. Creating it raises `OSError` if a directory cannot be listed."""

    def __init__(self, directory: Directory, header_decoder: EventHeaderDecoder, identity_decoder: IdentityDecoder) -> None:
        self.problems: list[FileProblem] = []
        self._header_decoder = header_decoder
        self._identity_decoder = identity_decoder
        # The ledgers are read later: a batch that is delivered meanwhile is then among the files or in a ledger.
        self._files = scan_files(directory)
        self._directories = all_directories(directory)

    @property
    def total_bytes(self) -> int:
        """How many bytes `find_event` reads."""
        return sum(file.size for file in self._files)

    def find_files(self, name: str) -> list[FileRef]:
        """The files with a path relative to the outbox directory; if there is none, those with that file name."""
        base = name.rpartition("/")[2]
        exact = [file for file in self._files if file.display_name == name]
        return exact or [file for file in self._files if file.name == base]

    def knows_batch(self, batch: str) -> bool:
        """Whether a file or a ledger has the batch."""
        return bool(self.batch_history(batch).entries)

    def batch_history(self, batch: str) -> BatchHistory:
        """What is known of a batch."""
        from_ledgers = [
            HistoryEntry(
                state=_ENTRY_STATES.get(type(entry), "other"),
                at_micros=entry.at_micros,
                sink=directory.sink,
                file="",
                text=_describe_entry(entry),
            )
            for directory in self._directories
            for entry in _entries_of(directory, batch)
        ]
        files = [file for file in self._files if batch and file.batch == batch]
        from_files = [self._file_entry(file) for file in sorted(files, key=lambda file: (file.directory.path, file.name))]
        return BatchHistory(batch, sorted(from_ledgers, key=lambda entry: entry.at_micros or 0) + from_files)

    def _file_entry(self, file: FileRef) -> HistoryEntry:
        at_micros = layout.sealed_at(file.batch) if file.kind is Kind.SEALED else None
        match file.kind:
            case Kind.SEALED:
                text = f"pending for sink {file.sink}" if file.sink else "pending"
            case Kind.DELIVERED:
                text = "retained after delivery"
            case Kind.DEAD:
                text = self._describe_dead_letters(file)
            case Kind.CORRUPT:
                damaged = counted(file.size, "damaged byte")
                text = f"{damaged}; to show them: pillarbox quarantine show --batch {file.batch}"
            case _:
                text = "offsets of the damaged bytes"
        return HistoryEntry(
            state=_FILE_STATES[file.kind], at_micros=at_micros, sink=file.sink, file=file.display_name, text=text
        )

    def _describe_dead_letters(self, file: FileRef) -> str:
        codes = Counter(record.letter.code for record in self._read_dead_letters(file))
        counts = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        return f"dead letters: {counts or 'none'}; to show them: pillarbox dead show --batch {file.batch}"

    def _read_dead_letters(self, file: FileRef) -> list[DeadLetterRecord]:
        parts = read_first_available([file], self.problems.append) or ()
        letters = dead_letters.parse(file.batch, b"".join(part.data for part in parts), self._identity_decoder)
        self.problems += letters.problems
        return letters.records

    def find_event(self, event_id: str, on_progress: Callable[[int], None]) -> Iterator[EventLocation]:
        """Read every file and return each place where an event is; `on_progress` is called with numbers of bytes read."""
        encoded = msgspec.json.encode(event_id)[1:-1]
        needle = encoded if encoded.isascii() else b""  # JSON can escape other text in several ways: then decode every file
        by_batch = files_by_batch(self._files, ACCEPTED - ACTIVE)
        active = [[file] for file in self._files if file.kind in ACTIVE]
        for files in [*by_batch.values(), *active]:
            for part in read_first_available(files, self.problems.append) or ():
                if needle in part.data:
                    yield from self._in_lines(files[0], part, event_id)
            on_progress(sum(file.size for file in files))
        for file in self._files:
            if file.kind is Kind.DEAD:
                yield from self._in_dead_letters(file, event_id)
                on_progress(file.size)
            elif file.kind is Kind.CORRUPT:
                yield from self._in_quarantine(file, encoded)
                on_progress(file.size)

    def _in_lines(self, file: FileRef, part: FilePart, event_id: str) -> Iterator[EventLocation]:
        for line in _complete_lines(file, part):
            if line.payload is not None and self._header_decoder.decode(line.payload).event_id == event_id:
                yield EventLocation(
                    state=_FILE_STATES[file.kind],
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
        quarantined = quarantine.read_batch(file.directory, file.batch)
        if quarantined is None:
            return
        for damage, piece in zip(quarantined.ranges, quarantined.pieces, strict=False):
            if encoded in piece:
                yield EventLocation(
                    state="quarantined",
                    file=file.display_name,
                    offset=damage.offset,
                    batch=file.batch,
                    reason=damage.reason,
                )

    def read_summary(self, file: FileRef) -> FileSummary:
        """Read a file and summarize it."""
        times: list[int] = []
        events = 0
        damaged: list[DamagedRange] = []
        unfinished_bytes = 0
        if file.kind in ACCEPTED:
            for part in read_first_available([file], self.problems.append) or ():
                unfinished_bytes = len(part.data) - part.data.rfind(b"\n") - 1 if file.kind in ACTIVE else 0
                for line in _complete_lines(file, part):
                    if line.damage is not None:
                        damaged.append(line.damage)
                    if line.payload is not None:
                        events += 1
                        at = self._header_decoder.decode(line.payload).occurred_at_micros
                        times += [] if at is None else [at]
                        times = [min(times), max(times)] if times else []
        elif file.kind is Kind.DEAD:
            events = len(self._read_dead_letters(file))
        else:
            quarantined = quarantine.read_batch(file.directory, file.batch)
            ranges = [] if quarantined is None else quarantined.ranges
            damaged = [DamagedRange(damage.offset, damage.length, damage.reason) for damage in ranges]
        return FileSummary(
            file=file.display_name,
            state=_FILE_STATES[file.kind],
            batch=file.batch,
            writer=layout.writer_of(file.name) or None,
            bytes=file.size,
            events=events,
            damaged=damaged,
            unfinished_bytes=unfinished_bytes,
            first_micros=times[0] if times else None,
            last_micros=times[-1] if times else None,
        )


def _entries_of(directory: Directory, batch: str) -> Iterator[LedgerEntry]:
    """The entries of a batch in the ledger of a directory, which may be larger than the memory."""
    try:
        fd = directory.filesystem.open_existing(directory.path_of(layout.LEDGER))
    except (FileNotFoundError, FileUnusableError):
        return
    try:
        for part in read_parts(directory.filesystem, fd):
            yield from (entry for entry in part.entries if getattr(entry, "batch", None) == batch)
    finally:
        directory.filesystem.close(fd)


def _complete_lines(file: FileRef, part: FilePart) -> Iterator[ScannedLine]:
    """The lines of a part; of an active segment, whose last line may be just being written, the complete ones."""
    offset, data = part
    return split_lines(data[: data.rfind(b"\n") + 1] if file.kind in ACTIVE else data, offset)


def _describe_entry(entry: LedgerEntry) -> str:
    match entry:
        case SealedEntry(writer=writer, events=events, bytes=size):
            count = "unknown number of events" if events is None else counted(events, "event")
            return f"sealed by writer {writer}: {count}, {counted(size, 'byte')}"
        case AdoptedEntry(writer=writer):
            return f"sealed for a writer that had died ({writer or 'of an older version'})"
        case SettledEntry():
            parts = [f"delivered to {entry.sink}: {counted(entry.delivered, 'event')}"]
            parts += [f"duplicates: {entry.duplicates}"] if entry.duplicates else []
            parts += [f"rejected: {entry.dead}"] if entry.dead else []
            parts += [f"damaged byte ranges: {entry.quarantined}"] if entry.quarantined else []
            return ", ".join(parts)
        case FannedOutEntry(events=events, sinks=sinks):
            return f"fanned out to {', '.join(sinks)}: {counted(events, 'event')}"
        case EvictedEntry(events=events):
            return f"evicted for newer events: {counted(events, 'event')}"
        case RedeliveredEntry(events=events):
            return f"a redelivery of {entry.of}: {counted(events, 'event')}"
        case PurgedEntry(kind="dead", events=events):
            return f"purged: {counted(events, 'dead letter')}"
        case PurgedEntry(events=events):
            return f"purged: {counted(events, 'damaged byte range')}"
        case ReplayedEntry(events=events):
            return f"replayed: {counted(events, 'dead letter')}"
        case RepairedEntry(events=events):
            return f"repaired: {counted(events, 'event')} salvaged"
    return ""
