"""What an outbox holds, of the kinds that are asked for: every event that is there for the whole of the reading, and that once.

The order is that in which events move: what is pending is read before what it may become, and what came meanwhile at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pillarbox.admin import dead_letters, quarantine
from pillarbox.admin.filters import RecordFilter
from pillarbox.admin.salvage import salvage
from pillarbox.admin.scan import all_directories
from pillarbox.admin.tail import ACCEPTED, PENDING, Tailer
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.admin.dead_letters import FileProblem, IdentityDecoder
    from pillarbox.admin.event_filters import EventFilter, EventHeaderDecoder
    from pillarbox.admin.mend import ReplayValidator
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

ExportScope = Literal["pending", "dead", "quarantine", "delivered", "all"]
_FILES: Final[dict[ExportScope, frozenset[Kind]]] = {
    "pending": PENDING,
    "delivered": frozenset({Kind.DELIVERED}),
    "all": ACCEPTED,
}


class ExportedEvent(NamedTuple):
    """An event, and where it was found."""

    payload: bytes
    file: str
    position: int | str  # the offset of its line, or the name of a dead letter


class EventExporter:
    """Reads it all once; what is left out, and what changed meanwhile, is counted."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        header_decoder: EventHeaderDecoder,
        event_filter: EventFilter,
        identity_decoder: IdentityDecoder,
        validator: ReplayValidator,
    ) -> None:
        self.problems: list[FileProblem] = []  # files that cannot be read, lines that are none
        self.vanished_batches = 0  # batches that were delivered or given up before they were read
        self.arrived_events = 0  # events that were accepted meanwhile, and are in it
        self.unrecoverable_ranges = 0  # damaged spans from which no event can be had
        self._directory = directory
        self._clock = clock
        self._header_decoder = header_decoder
        self._filter = event_filter
        self._identity_decoder = identity_decoder
        self._validator = validator

    def events(self, scope: ExportScope) -> Iterator[ExportedEvent]:
        """All that is meant; raises `OSError` where the directory cannot be listed."""
        follower = Tailer(self._directory, self._clock, self._header_decoder, self._filter, _FILES.get(scope, frozenset()))
        try:
            for event in follower.read_backlog(None):
                yield ExportedEvent(event.payload, event.file, event.offset)
            if scope in ("dead", "all"):
                yield from self._dead_letters(follower.batches_read)
            if scope in ("quarantine", "all"):
                yield from self._quarantined()
            for event in follower.read_new():
                self.arrived_events += 1
                yield ExportedEvent(event.payload, event.file, event.offset)
        finally:
            self.vanished_batches = follower.vanished_batches
            self.problems += follower.problems
            follower.close()

    def _dead_letters(self, batches_read: set[str]) -> Iterator[ExportedEvent]:
        """The dead letters, but for those of batches that were `read` as a whole."""
        seen: set[str] = set()  # one that several sinks refuse is one event
        for place in all_directories(self._directory):
            found = dead_letters.list_batches(place, Kind.DEAD, RecordFilter())
            for file in dead_letters.read_files(
                place, (batch for batch in found.batches if batch not in batches_read), self._identity_decoder
            ):
                self.problems += file.problems
                for record in file.records:
                    if record.name not in seen and self._matches(bytes(record.letter.event), record.batch):
                        seen.add(record.name)
                        yield ExportedEvent(bytes(record.letter.event), layout.dead_name(record.batch), record.name)

    def _quarantined(self) -> Iterator[ExportedEvent]:
        """The events that can be had from damaged bytes, but for those that were had already."""
        seen: set[tuple[str, int]] = set()
        for place in all_directories(self._directory):
            for batch in dead_letters.list_batches(place, Kind.CORRUPT, RecordFilter()).batches:
                kept = quarantine.read_batch(place, batch)
                if kept is None:
                    continue
                if kept.problem is not None:
                    self.problems.append(kept.problem)
                    continue
                for span, piece in zip(kept.ranges, kept.pieces, strict=True):
                    if span.repaired_at_micros is None and (batch, span.offset) not in seen:
                        seen.add((batch, span.offset))
                        yield from self._salvaged(batch, span.offset, piece)

    def _salvaged(self, batch: str, offset: int, piece: bytes) -> Iterator[ExportedEvent]:
        found = salvage(piece, self._validator)
        self.unrecoverable_ranges += not found.events
        for event in found.events:
            if self._matches(event.payload, batch):
                yield ExportedEvent(event.payload, layout.corrupt_name(batch), offset)

    def _matches(self, payload: bytes, batch: str) -> bool:
        return self._filter.matches(payload, self._header_decoder.decode(payload), layout.sealed_at(batch))
