"""What an outbox holds, of the kinds that are asked for: every event that is there for the whole of the reading, and that once.

The order is that in which events move: what is pending is read before what it may become, and what came meanwhile at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pillarbox.admin import dead_letters, quarantine
from pillarbox.admin.filters import Selection
from pillarbox.admin.salvage import salvage
from pillarbox.admin.scan import places
from pillarbox.admin.tail import ACCEPTED, PENDING, Follower
from pillarbox.store import layout
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.admin.dead_letters import Heading, Trouble
    from pillarbox.admin.event_filters import Faces, Wanted
    from pillarbox.admin.mend import Gate
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

What = Literal["pending", "dead", "quarantine", "delivered", "all"]
_FILES: Final[dict[What, frozenset[Kind]]] = {
    "pending": PENDING,
    "delivered": frozenset({Kind.DELIVERED}),
    "all": ACCEPTED,
}


class Kept(NamedTuple):
    """An event, and where it was found."""

    payload: bytes
    file: str
    place: int | str  # the offset of its line, or the name of a dead letter


class Stock:
    """Reads it all once; what is left out, and what changed meanwhile, is counted."""

    def __init__(self, directory: Directory, clock: Clock, faces: Faces, wanted: Wanted, heading: Heading, gate: Gate) -> None:
        self.troubles: list[Trouble] = []  # files that cannot be read, lines that are none
        self.went = 0  # batches that were delivered or given up before they were read
        self.came = 0  # events that were accepted meanwhile, and are in it
        self.hopeless = 0  # damaged spans from which no event can be had
        self._directory = directory
        self._clock = clock
        self._faces = faces
        self._wanted = wanted
        self._heading = heading
        self._gate = gate

    def events(self, what: What) -> Iterator[Kept]:
        """All that is meant; raises `OSError` where the directory cannot be listed."""
        follower = Follower(self._directory, self._clock, self._faces, self._wanted, _FILES.get(what, frozenset()))
        try:
            for event in follower.backlog(None):
                yield Kept(event.payload, event.file, event.offset)
            if what in ("dead", "all"):
                yield from self._dead(follower.read)
            if what in ("quarantine", "all"):
                yield from self._quarantine()
            for event in follower.news():
                self.came += 1
                yield Kept(event.payload, event.file, event.offset)
        finally:
            self.went = follower.went
            self.troubles += follower.troubles
            follower.close()

    def _dead(self, read: set[str]) -> Iterator[Kept]:
        """The dead letters, but for those of batches that were `read` as a whole."""
        seen: set[str] = set()  # one that several sinks refuse is one event
        for place in places(self._directory):
            found = dead_letters.find(place, Kind.DEAD, Selection())
            for file in dead_letters.files(place, (batch for batch in found.batches if batch not in read), self._heading):
                self.troubles += file.troubles
                for record in file.records:
                    if record.name not in seen and self._takes(bytes(record.letter.event), record.batch):
                        seen.add(record.name)
                        yield Kept(bytes(record.letter.event), layout.dead_name(record.batch), record.name)

    def _quarantine(self) -> Iterator[Kept]:
        """The events that can be had from damaged bytes, but for those that were had already."""
        seen: set[tuple[str, int]] = set()
        for place in places(self._directory):
            for batch in dead_letters.find(place, Kind.CORRUPT, Selection()).batches:
                kept = quarantine.read(place, batch)
                if kept is None:
                    continue
                if kept.trouble is not None:
                    self.troubles.append(kept.trouble)
                    continue
                for span, piece in zip(kept.spans, kept.pieces, strict=True):
                    if span.repaired_at_micros is None and (batch, span.offset) not in seen:
                        seen.add((batch, span.offset))
                        yield from self._salvaged(batch, span.offset, piece)

    def _salvaged(self, batch: str, offset: int, piece: bytes) -> Iterator[Kept]:
        found = salvage(piece, self._gate)
        self.hopeless += not found.events
        for event in found.events:
            if self._takes(event.payload, batch):
                yield Kept(event.payload, layout.corrupt_name(batch), offset)

    def _takes(self, payload: bytes, batch: str) -> bool:
        return self._wanted.takes(payload, self._faces.of(payload), layout.stamp_of(batch))
