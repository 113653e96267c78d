"""Which files there are at the moment, in the directory and in the queues of its sinks; and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from pillarbox.admin.dead_letters import Trouble
from pillarbox.errors import FileUnusableError
from pillarbox.store import compression, layout, reader
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

    from pillarbox.store.directory import Directory
    from pillarbox.store.reader import Span


class Sight(NamedTuple):
    """A file of ours that was seen."""

    place: Directory  # the outbox directory, or a sink's queue in it
    name: str
    kind: Kind
    size: int  # bytes

    @property
    def shown(self) -> str:
        """Its name as an operator finds it, from the outbox directory on."""
        return f"{layout.queue_name(self.sink)}/{self.name}" if self.sink else self.name

    @property
    def sink(self) -> str:
        """Whose queue it is in; "" for the outbox directory itself."""
        return self.place.sink

    @property
    def batch(self) -> str:
        """The id of the batch that it is, or was taken from; empty for an active file, which is none yet."""
        name = self.name.removesuffix(".spans.json")
        if self.kind is Kind.DEAD:
            name = name.removeprefix("dead-")
        elif self.kind in (Kind.CORRUPT, Kind.SPANS):
            name = name.removeprefix("corrupt-")
        return "" if self.kind in (Kind.ACTIVE, Kind.LEGACY_ACTIVE) else layout.batch_id(name)


def places(directory: Directory) -> list[Directory]:
    """The outbox directory, and the queues of its sinks."""
    return [directory, *directory.queues()]


def look(directory: Directory) -> list[Sight]:
    """The files in the directory, then those in its queues: what moves there meanwhile is seen twice rather than never."""
    found: list[Sight] = []
    for place in places(directory):
        for name, size in place.filesystem.listing(place.path):
            kind = layout.kind_of(name)
            if kind not in (Kind.ASIDE, Kind.OTHER):
                found.append(Sight(place, name, kind, size))
    return found


def batches(sights: list[Sight], kinds: AbstractSet[Kind]) -> dict[str, list[Sight]]:
    """The sealed or delivered files by batch, the oldest batch first; several files of a batch have the same content."""
    found: dict[str, list[Sight]] = {}
    for sight in sorted(sights, key=lambda one: (one.batch, one.kind is not Kind.SEALED, one.place.path)):
        if sight.kind in kinds:
            found.setdefault(sight.batch, []).append(sight)
    return found


def places_of(directory: Directory, batch: str, kinds: AbstractSet[Kind]) -> list[Sight]:
    """Wherever a batch is now, in whatever state of these."""
    return [sight for sight in look(directory) if sight.batch == batch and sight.kind in kinds]


def content(sights: list[Sight], tell: Callable[[Trouble], None]) -> bytes | None:
    """The lines of the first of some files with the same content that is there; None where all have gone.

    What cannot be read is told, and has no lines.
    """
    troubles: list[Trouble] = []
    for sight in sights:
        try:
            data, problem = compression.unpack(sight.name, _bytes(sight.place, sight.name))
        except FileNotFoundError:
            continue
        except FileUnusableError as error:
            troubles.append(Trouble(sight.shown, error.problem))
        except OSError as error:
            troubles.append(Trouble(sight.shown, f"cannot be read: {error.strerror}"))
        else:
            if problem:
                tell(Trouble(sight.shown, f"cannot be read behind the first {len(data)} bytes: {problem}"))
            return data
    for trouble in troubles[:1]:
        tell(trouble)
    return b"" if troubles else None


def _bytes(place: Directory, name: str) -> bytes:
    fd = place.open_found(name)
    try:
        return place.filesystem.read_all(fd)
    finally:
        place.filesystem.close(fd)


class Line(NamedTuple):
    """A line of a file: a record, or damaged bytes, or both, where a record stands behind NUL bytes."""

    offset: int  # of the line, in the file as it was written
    payload: bytes | None  # the event's JSON
    damage: Span | None


def lines(data: bytes, offset: int = 0) -> Iterator[Line]:
    """The lines of a file, or of a part of it that begins at `offset`; blank ones are left out."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        contents = reader.read(data[begin:end], lambda: None)
        if contents.payloads or contents.spans:
            payload = contents.payloads[0] if contents.payloads else None
            spans = [replace(span, offset=offset + begin + span.offset) for span in contents.spans]
            yield Line(offset + begin, payload, spans[0] if spans else None)
        begin = end
