"""Exports the events of an outbox: each event that is stored throughout the export, exactly once.

Files are read in the order in which events move: pending files before those that they may become. Events that were accepted
during the export come last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pillarbox.admin import dead_letters, quarantine
from pillarbox.admin.scan import all_directories, list_batches
from pillarbox.admin.tail import ACCEPTED, PENDING, Tailer
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.admin.dead_letters import IdentityDecoder
    from pillarbox.admin.filters import EventFilter, EventHeaderDecoder
    from pillarbox.admin.replay import ReplayValidator
    from pillarbox.admin.scan import FileProblem
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

ExportScope = Literal["pending", "dead", "quarantine", "delivered", "all"]
_FILE_KINDS: Final[dict[ExportScope, frozenset[Kind]]] = {
    "pending": PENDING,
    "delivered": frozenset({Kind.DELIVERED}),
    "all": ACCEPTED,
}


class ExportedEvent(NamedTuple):
    """An event, and where it was read."""

    payload: bytes
    file: str
    position: int | str  # the offset of its line, or the name of a dead letter


class EventExporter:
    """Reads the events of an outbox once, and counts what changed meanwhile."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        header_decoder: EventHeaderDecoder,
        event_filter: EventFilter,
        identity_decoder: IdentityDecoder,
        validator: ReplayValidator,
    ) -> None:
        self.problems: list[FileProblem] = []
        self.vanished_batches = 0  # batches that were delivered or evicted before they were read
        self.arrived_events = 0  # exported events that were accepted during the export
        self.unrecoverable_ranges = 0  # quarantined byte ranges without an event
        self._directory = directory
        self._clock = clock
        self._header_decoder = header_decoder
        self._filter = event_filter
        self._identity_decoder = identity_decoder
        self._validator = validator

    def events(self, scope: ExportScope) -> Iterator[ExportedEvent]:
        """The matching events; raises `OSError` if the directory cannot be listed."""
        kinds = _FILE_KINDS.get(scope, frozenset())
        tailer = Tailer(self._directory, self._clock, self._header_decoder, self._filter, kinds)
        try:
            for event in tailer.read_backlog(None):
                yield ExportedEvent(event.payload, event.file, event.offset)
            if scope in ("dead", "all"):
                yield from self._dead_letters(tailer.batches_read)
            if scope in ("quarantine", "all"):
                yield from self._quarantined()
            for event in tailer.read_new():
                self.arrived_events += 1
                yield ExportedEvent(event.payload, event.file, event.offset)
        finally:
            self.vanished_batches = tailer.vanished_batches
            self.problems += tailer.problems
            tailer.close()

    def _dead_letters(self, batches_read: set[str]) -> Iterator[ExportedEvent]:
        """The dead letters, except for those of batches that were exported as a whole."""
        exported: set[str] = set()  # several sinks may reject the same event
        for directory in all_directories(self._directory):
            listing = list_batches(directory, Kind.DEAD)
            unread = (batch for batch in listing.batches if batch not in batches_read)
            for file in dead_letters.read_files(directory, unread, self._identity_decoder):
                self.problems += file.problems
                for record in file.records:
                    if record.name not in exported and self._matches(bytes(record.letter.event), record.batch):
                        exported.add(record.name)
                        yield ExportedEvent(bytes(record.letter.event), layout.dead_name(record.batch), record.name)

    def _quarantined(self) -> Iterator[ExportedEvent]:
        """The events that can be salvaged from quarantined byte ranges which are not repaired."""
        exported: set[tuple[str, int]] = set()  # the queues of several sinks may have the same byte range
        for directory in all_directories(self._directory):
            for batch in list_batches(directory, Kind.CORRUPT).batches:
                quarantined = quarantine.read_batch(directory, batch)
                if quarantined is None:
                    continue
                if quarantined.problem is not None:
                    self.problems.append(quarantined.problem)
                    continue
                for damage, piece in zip(quarantined.ranges, quarantined.pieces, strict=True):
                    if damage.repaired_at_micros is None and (batch, damage.offset) not in exported:
                        exported.add((batch, damage.offset))
                        yield from self._salvaged(batch, damage.offset, piece)

    def _salvaged(self, batch: str, offset: int, piece: bytes) -> Iterator[ExportedEvent]:
        result = quarantine.salvage(piece, self._validator)
        self.unrecoverable_ranges += not result.events
        for event in result.events:
            if self._matches(event.payload, batch):
                yield ExportedEvent(event.payload, layout.corrupt_name(batch), offset)

    def _matches(self, payload: bytes, batch: str) -> bool:
        return self._filter.matches(payload, self._header_decoder.decode(payload), layout.sealed_at(batch))
