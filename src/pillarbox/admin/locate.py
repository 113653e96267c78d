"""Where an event, a batch or a file is now: what the files show, and what the ledgers remember of batches."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pillarbox.admin import dead_letters, quarantine
from pillarbox.admin.scan import Line, batches, content, lines, look, places
from pillarbox.admin.tail import ACCEPTED, ACTIVE
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import entries_of
from pillarbox.store.reconciliation import Adopted, Entry, Evicted, Purged, Sealed, Settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pillarbox.admin.dead_letters import Heading, Trouble
    from pillarbox.admin.event_filters import Faces
    from pillarbox.admin.scan import Sight
    from pillarbox.store.directory import Directory

_STATES = {
    Kind.ACTIVE: "active",
    Kind.LEGACY_ACTIVE: "active",
    Kind.SEALED: "waiting",
    Kind.DELIVERED: "kept",
    Kind.DEAD: "dead",
    Kind.CORRUPT: "quarantined",
    Kind.SPANS: "quarantined",
}


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is known of a batch."""

    what: str  # active, waiting, kept, dead, quarantined; or an entry of the ledger: sealed, adopted, settled, evicted, ...
    at_micros: int | None  # of the entry; of what waits, when it was sealed
    sink: str  # whose queue, where there are several sinks; "" for the outbox itself
    file: str  # from the outbox directory on; "" where the ledger says it
    text: str


class Story(msgspec.Struct, frozen=True):
    """All that is known of a batch, in order of time; what the files show comes last."""

    batch: str
    facts: list[Fact]


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """A place where an event is."""

    what: str  # as of a fact
    file: str
    offset: int | None  # of its line, or of the damaged span
    batch: str  # "" while it is not sealed
    record: str | None = None  # a dead letter's name
    code: str | None = None
    reason: str | None = None  # why it was refused, or is damaged
    event: msgspec.Raw | None = None  # None in damaged bytes


class Damage(msgspec.Struct, frozen=True):
    """Damaged bytes in a file."""

    offset: int
    length: int
    reason: str


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file."""

    file: str
    what: str
    batch: str
    writer: str | None  # where the name tells
    bytes: int
    events: int
    damaged: list[Damage]
    unfinished_bytes: int  # of an active file: behind its last whole line
    first_micros: int | None  # of the events' own times
    last_micros: int | None


class _Memory(NamedTuple):
    """A ledger."""

    sink: str
    entries: list[Entry]


class Whereabouts:
    """One look at the directory, its queues and their ledgers; raises `OSError` where they cannot be listed."""

    def __init__(self, directory: Directory, faces: Faces, heading: Heading) -> None:
        self.troubles: list[Trouble] = []
        self._faces = faces
        self._heading = heading
        # The ledgers last: what settles meanwhile is in one, if its file is gone from the other.
        self._sights = look(directory)
        self._ledgers = [_Memory(place.sink, entries_of(place.read_bytes(layout.LEDGER))[0]) for place in places(directory)]

    @property
    def size(self) -> int:
        """How many bytes there are to search."""
        return sum(sight.size for sight in self._sights)

    def files(self, name: str) -> list[Sight]:
        """The files of this name, from the outbox directory on or by itself."""
        base = name.rpartition("/")[2]
        exact = [sight for sight in self._sights if sight.shown == name]
        return exact or [sight for sight in self._sights if sight.name == base]

    def knows(self, batch: str) -> bool:
        """Whether a file or a ledger has the batch."""
        return bool(self.story(batch).facts)

    def story(self, batch: str) -> Story:
        """What is known of a batch."""
        remembered = [
            Fact(what=type(entry).__name__.lower(), at_micros=entry.at_micros, sink=memory.sink, file="", text=_said(entry))
            for memory in self._ledgers
            for entry in memory.entries
            if getattr(entry, "batch", None) == batch
        ]
        found = [self._fact(sight) for sight in self._sights if batch and sight.batch == batch]
        return Story(batch, sorted(remembered, key=lambda fact: fact.at_micros or 0) + found)

    def _fact(self, sight: Sight) -> Fact:
        stamp = layout.stamp_of(sight.batch) if sight.kind is Kind.SEALED else None
        match sight.kind:
            case Kind.SEALED:
                text = f"waits for {sight.sink}" if sight.sink else "waits"
            case Kind.DELIVERED:
                text = "is kept after delivery"
            case Kind.DEAD:
                text = self._letters(sight)
            case Kind.CORRUPT:
                text = f"{sight.size} damaged bytes: pillarbox quarantine show {sight.batch}"
            case _:
                text = "where the damaged bytes stood"
        return Fact(what=_STATES[sight.kind], at_micros=stamp, sink=sight.sink, file=sight.shown, text=text)

    def _letters(self, sight: Sight) -> str:
        codes = Counter(record.letter.code for record in self._dead(sight))
        counts = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        return f"dead letters, {counts or 'none'}: pillarbox dead show --batch {sight.batch}"

    def _dead(self, sight: Sight) -> list[dead_letters.Record]:
        data = content([sight], self.troubles.append)
        file = dead_letters.parse(sight.batch, data or b"", self._heading)
        self.troubles += file.troubles
        return file.records

    def of_event(self, event_id: str, progress: Callable[[int], None]) -> Iterator[Sighting]:
        """Everywhere an event is, by reading everything; `progress(bytes)` is called with what was read."""
        encoded = msgspec.json.encode(event_id)[1:-1]
        seen = encoded if encoded.isascii() else b""  # what is not may be written in several ways
        read = batches(self._sights, ACCEPTED - ACTIVE)
        active = [[sight] for sight in self._sights if sight.kind in ACTIVE]
        for sights in [*read.values(), *active]:
            data = content(sights, self.troubles.append) or b""
            if seen in data:
                yield from self._in_lines(sights[0], data, event_id)
            progress(sum(sight.size for sight in sights))
        for sight in self._sights:
            if sight.kind is Kind.DEAD:
                yield from self._in_dead(sight, event_id)
                progress(sight.size)
            elif sight.kind is Kind.CORRUPT:
                yield from self._in_quarantine(sight, encoded)
                progress(sight.size)

    def _in_lines(self, sight: Sight, data: bytes, event_id: str) -> Iterator[Sighting]:
        for line in _whole(sight, data):
            if line.payload is not None and self._faces.of(line.payload).event_id == event_id:
                yield Sighting(
                    what=_STATES[sight.kind],
                    file=sight.shown,
                    offset=line.offset,
                    batch=sight.batch,
                    event=msgspec.Raw(line.payload),
                )

    def _in_dead(self, sight: Sight, event_id: str) -> Iterator[Sighting]:
        for record in self._dead(sight):
            if record.event_id == event_id:
                yield Sighting(
                    what="dead",
                    file=sight.shown,
                    offset=None,
                    batch=sight.batch,
                    record=record.name,
                    code=record.letter.code,
                    reason=record.letter.reason,
                    event=record.letter.event,
                )

    def _in_quarantine(self, sight: Sight, encoded: bytes) -> Iterator[Sighting]:
        kept = quarantine.read(sight.place, sight.batch)
        if kept is None:
            return
        for span, piece in zip(kept.spans, kept.pieces, strict=False):
            if encoded in piece:
                yield Sighting(what="quarantined", file=sight.shown, offset=span.offset, batch=sight.batch, reason=span.reason)

    def contents(self, sight: Sight) -> Contents:
        """What is in a file, by reading it."""
        times: list[int] = []
        events = 0
        damaged: list[Damage] = []
        data = content([sight], self.troubles.append) or b""
        if sight.kind in ACCEPTED:
            for line in _whole(sight, data):
                if line.damage is not None:
                    damaged.append(Damage(line.damage.offset, line.damage.length, line.damage.reason))
                if line.payload is not None:
                    events += 1
                    at = self._faces.of(line.payload).occurred_at_micros
                    times += [] if at is None else [at]
                    times = [min(times), max(times)] if times else []
        elif sight.kind is Kind.DEAD:
            events = len(self._dead(sight))
        else:
            kept = quarantine.read(sight.place, sight.batch)
            damaged = [Damage(span.offset, span.length, span.reason) for span in (kept.spans if kept is not None else [])]
        return Contents(
            file=sight.shown,
            what=_STATES[sight.kind],
            batch=sight.batch,
            writer=layout.writer_of(sight.name) or None,
            bytes=sight.size,
            events=events,
            damaged=damaged,
            unfinished_bytes=len(data) - data.rfind(b"\n") - 1 if sight.kind in ACTIVE else 0,
            first_micros=times[0] if times else None,
            last_micros=times[-1] if times else None,
        )


def _whole(sight: Sight, data: bytes) -> Iterator[Line]:
    """The lines; of an active file those that are whole."""
    return lines(data[: data.rfind(b"\n") + 1] if sight.kind in ACTIVE else data)


def _said(entry: Entry) -> str:
    """An entry of the ledger as a sentence."""
    match entry:
        case Sealed(writer=writer, events=events, bytes=size):
            count = "events that nobody counted" if events is None else f"{events} events"
            return f"sealed by writer {writer}: {count}, {size} bytes"
        case Adopted(writer=writer):
            return f"sealed by another process: its writer {writer or 'of an older system'} had died"
        case Settled():
            parts = [f"delivered to {entry.sink}: {entry.delivered} events"]
            parts += [f"{entry.duplicates} of them it had before"] if entry.duplicates else []
            parts += [f"refused: {entry.dead}"] if entry.dead else []
            parts += [f"damaged spans: {entry.quarantined}"] if entry.quarantined else []
            return ", ".join(parts)
        case Evicted(events=events):
            return f"given up for newer events: {events} events"
        case Purged(kind=kind, events=events):
            return f"purged from {kind}: {events}"
    return f"{type(entry).__name__.lower()}: {getattr(entry, 'events', '')} events"
