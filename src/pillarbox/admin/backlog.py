"""Counts pending events, their rates and dropped events, from the ledgers and the files.

Takes no lock. A batch whose count the ledger does not have is counted in its file, up to a number of bytes; beyond it, and for
compressed files, the number is estimated from the size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.file_parts import parts_of
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import (
    DroppedEntry,
    EvictedEntry,
    SealedEntry,
    SettledEntry,
    SummaryEntry,
)
from pillarbox.store.ledger_reader import read_parts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.store.directory import Directory
    from pillarbox.store.ledger_entries import LedgerEntry

RATE_WINDOW_S: Final = 300.0  # long enough to contain seals: in an outage a segment is sealed once a minute
_LEDGER_BYTES_MAX: Final = 32 * 2**20  # read of a ledger, at its end; it is compacted at 4 MiB
_COUNTED_BYTES_MAX: Final = 64 * 2**20  # of files whose events are counted
_EVENT_BYTES: Final = 300  # of a record, if no file was counted
_ACTIVE_KINDS: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})


class DropTotal(msgspec.Struct, frozen=True):
    """Events that were not stored for one reason, in all processes."""

    events: int  # number of events
    last_at_micros: int  # when the last one was dropped, in microseconds since 1970


class LedgerFacts:
    """Counts, drops and rates that a ledger records."""

    def __init__(self, directory: Directory, now_micros: int) -> None:
        self.events_by_batch: dict[str, int] = {}
        self.dropped: dict[str, DropTotal] = {}
        self._bytes_by_batch: dict[str, int] = {}
        self._in_bytes = self._out_bytes = 0
        self._span_s = 0.0
        since = now_micros - int(RATE_WINDOW_S * 1e6)
        entries = _read_latest_entries(directory)
        seen: set[DroppedEntry] = set()
        for entry in entries:
            match entry:
                case SealedEntry(batch=batch, events=events, bytes=size, at_micros=at):
                    self._bytes_by_batch[batch] = size
                    if events is not None:
                        self.events_by_batch[batch] = events
                    self._in_bytes += size if at >= since else 0
                case SettledEntry(batch=batch, at_micros=at) | EvictedEntry(batch=batch, at_micros=at):
                    self._out_bytes += self._bytes_by_batch.get(batch, 0) if at >= since else 0
                case DroppedEntry(reason=reason, events=events, at_micros=at) if entry not in seen:
                    seen.add(entry)
                    self._add_dropped(reason, events, at)
                case SummaryEntry(dropped=dropped, dropped_at=dropped_at):
                    for reason, events in dropped.items():
                        self._add_dropped(reason, events, dropped_at.get(reason, 0))
        if entries:
            first_s = max(0.0, (now_micros - min(entry.at_micros for entry in entries)) / 1e6)
            self._span_s = min(RATE_WINDOW_S, first_s)

    def _add_dropped(self, reason: str, events: int, at_micros: int) -> None:
        before = self.dropped.get(reason, DropTotal(0, 0))
        self.dropped[reason] = DropTotal(before.events + events, max(before.last_at_micros, at_micros))

    def in_bytes_per_s(self, active_bytes: int) -> float | None:
        """Bytes per second that were stored in the last minutes; None if that is unknown."""
        return (self._in_bytes + active_bytes) / self._span_s if self._span_s >= 1 else None

    @property
    def out_bytes_per_s(self) -> float:
        """Bytes per second that were settled or evicted in the last minutes."""
        return self._out_bytes / self._span_s if self._span_s >= 1 else 0.0


def _read_latest_entries(directory: Directory) -> list[LedgerEntry]:
    """The entries in the last bytes of a ledger; none if it cannot be read."""
    filesystem = directory.filesystem
    try:
        fd = filesystem.open_existing(directory.path_of(layout.LEDGER))
    except (OSError, FileUnusableError):
        return []
    try:
        start = max(0, filesystem.size(fd) - _LEDGER_BYTES_MAX)
        return [entry for part in read_parts(filesystem, fd, start) for entry in part.entries]
    except OSError:
        return []
    finally:
        filesystem.close(fd)


class PendingEvents(msgspec.Struct, frozen=True):
    """The number of pending events."""

    events: int
    is_exact: bool  # otherwise a part is estimated from sizes


class EventCounter:
    """Counts pending events. `facts` are those of all ledgers that may have a count."""

    def __init__(self, facts: Iterable[LedgerFacts]) -> None:
        self._known: dict[str, int] = {}
        for ledger in facts:
            self._known |= ledger.events_by_batch
        self._bytes_left = _COUNTED_BYTES_MAX
        self._counted_events = self._counted_bytes = 0
        self._counts: dict[str, tuple[int, int]] = {}  # by batch id: events, bytes that were not counted

    def count(self, directories: Iterable[Directory]) -> PendingEvents:
        """The events of the batches and segments in these directories; a batch in several of them counts once."""
        seen: set[str] = set()
        events = uncounted = 0
        for directory in directories:
            for name, size in directory.filesystem.list_files(directory.path):
                kind = layout.kind_of(name)
                key = layout.batch_id(name) if kind is Kind.SEALED else name
                if key in seen or not (kind is Kind.SEALED or kind in _ACTIVE_KINDS):
                    continue
                seen.add(key)
                if key not in self._counts:
                    self._counts[key] = self._count_file(directory, name, key, size)
                events += self._counts[key][0]
                uncounted += self._counts[key][1]
        average = self._counted_bytes / self._counted_events if self._counted_events else _EVENT_BYTES
        return PendingEvents(events + round(uncounted / average), is_exact=not uncounted)

    def _count_file(self, directory: Directory, name: str, key: str, size: int) -> tuple[int, int]:
        known = self._known.get(key)
        if known is None and size <= self._bytes_left and not name.endswith(layout.COMPRESSED_SUFFIX):
            self._bytes_left -= size
            try:
                fd = directory.open_existing(name)
                try:
                    known = sum(part.count(b"\n") for part in parts_of(directory.filesystem, fd))
                finally:
                    directory.filesystem.close(fd)
            except FileNotFoundError:
                return 0, 0  # settled meanwhile
            except (OSError, FileUnusableError):
                return 0, size
        if known is None:
            return 0, size
        self._counted_events += known
        self._counted_bytes += size
        return known, 0
