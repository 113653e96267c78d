"""The accepted events of an outbox, in order, each once: what there is, and then what comes.

Within a writer the order is that of acceptance; across writers it is that of sealing, and for what is not sealed yet that of
the events' own times.
"""

from __future__ import annotations

from heapq import merge
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin.dead_letters import Trouble
from pillarbox.admin.gaps import Missed
from pillarbox.admin.scan import batches, content, lines, look, places_of
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.filesystem import identity, identity_of
from pillarbox.store.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pillarbox.admin.event_filters import Face, Faces, Wanted
    from pillarbox.admin.scan import Sight
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

ACTIVE: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})
PENDING: Final = ACTIVE | {Kind.SEALED}
ACCEPTED: Final = PENDING | {Kind.DELIVERED}
_LOOKS: Final = 3  # in which the sealed file of an active one must turn up; more than the one that a renaming may hide it from
_FORGET_S: Final = 60.0  # how long a batch that is gone stays known: longer than any listing misses it


class Accepted(NamedTuple):
    """An event that was accepted, and where it stood when it was read."""

    batch: str  # empty while it is not sealed
    file: str  # from the outbox directory on
    offset: int  # of its line
    writer: str  # empty where the name does not tell
    payload: bytes
    face: Face


class _Stream:
    """An active file, held open, so that it can be read to its end under whatever name."""

    def __init__(self, sight: Sight, fd: int) -> None:
        self.sight = sight
        self.fd = fd
        self.writer = layout.writer_of(sight.name)
        self.path = sight.place.at(sight.name)
        self.identity = identity_of(fd)
        self.offset = 0  # up to where it was read
        self.looks = 0  # in which its name was gone


class Follower:
    """Reads an outbox from its beginning, or from now on. Closed by `close`; keeps one open file an active one."""

    def __init__(
        self, directory: Directory, clock: Clock, faces: Faces, wanted: Wanted, kinds: frozenset[Kind] = ACCEPTED
    ) -> None:
        self.troubles: list[Trouble] = []  # for the caller to take
        self.listing_s = 0.0  # how long the last listing took
        self.read: set[str] = set()  # batches of the backlog that were read
        self.went = 0  # batches that were gone before they were read
        self.damaged = 0  # lines
        self.missed = Missed(directory, clock)
        self._kinds = kinds
        self._directory = directory
        self._filesystem = directory.filesystem
        self._clock = clock
        self._faces = faces
        self._wanted = wanted
        self._known: dict[str, float] = {}  # batches that were read, and when they were last seen
        self._active: dict[str, _Stream] = {}
        self._gone: list[_Stream] = []  # whose name is gone, and whose sealed one has not turned up
        self._told: set[str] = set()  # files of which a trouble was told

    def close(self) -> None:
        """Let go of what is held open."""
        for stream in [*self._active.values(), *self._gone]:
            self._filesystem.close(stream.fd)
        self._active.clear()
        self._gone.clear()

    def backlog(self, count: int | None) -> Iterator[Accepted]:
        """What is there already: the newest `count` of the events that are meant, or all; the oldest first."""
        self.missed.start()
        for _ in range(_LOOKS):
            self.close()
            sights = look(self._directory)
            self._open(sights)
            if not any(sight.kind in ACTIVE and identity(sight.place.at(sight.name)) is None for sight in sights):
                break  # otherwise one was sealed meanwhile: its batch is not among those that are there already
        found = batches(sights, self._kinds - ACTIVE)
        self._known = dict.fromkeys(found, self._clock.monotonic())
        fresh = self._of_active()
        if count is None:
            for batch, sights_of_one in found.items():
                if (yield from self._of_batch(sights_of_one)):
                    self.read.add(batch)
            yield from fresh
            return
        chunks = [list(fresh)]
        left = count - len(chunks[0])
        for sights_of_one in reversed(found.values()):
            if left <= 0:
                break
            chunks.append(list(self._of_batch(sights_of_one)))
            left -= len(chunks[-1])
        newest = [event for chunk in reversed(chunks) for event in chunk]
        yield from newest[max(0, len(newest) - count) :]

    def news(self) -> Iterator[Accepted]:
        """What was accepted since the last time; raises `OSError` where the directory cannot be listed."""
        begun = self._clock.monotonic()
        try:
            sights = look(self._directory)
        except FileNotFoundError:  # removed with everything in it; whoever writes makes it anew
            sights = []
        self.listing_s = self._clock.monotonic() - begun
        found = batches(sights, self._kinds - ACTIVE)
        self._part_with({sight.name for sight in sights})
        turned_up = self._turned_up(found)
        yield from self._of_gone()
        now = self._clock.monotonic()
        for batch, sights_of_one in found.items():
            if batch in turned_up:
                yield from self._of_stream(turned_up[batch], batch)
            elif batch not in self._known and not (yield from self._of_batch(sights_of_one)):
                continue  # not seen, and so not known: a gap, once the ledger tells of it
            self._known[batch] = now
        self._open(sights)
        yield from self._of_active()
        self.missed.look(self._known)
        for batch in [batch for batch, seen in self._known.items() if seen < now - _FORGET_S]:
            del self._known[batch]

    def _open(self, sights: list[Sight]) -> None:
        for sight in sights:
            if sight.kind in ACTIVE & self._kinds and sight.name not in self._active:
                try:
                    fd = sight.place.open_found(sight.name)
                except FileNotFoundError:
                    continue  # sealed meanwhile
                except (OSError, FileUnusableError) as error:
                    self._tell(Trouble(sight.shown, f"cannot be read: {error}"))
                    continue
                self._active[sight.name] = _Stream(sight, fd)

    def _part_with(self, names: set[str]) -> None:
        """Put aside the active files whose name is gone; one that was written anew under its name is read on there."""
        for name, stream in list(self._active.items()):
            if name in names and self._filesystem.is_still(stream.fd, stream.path):
                continue
            del self._active[name]
            anew = identity(stream.path) if stream.sight.kind is Kind.ACTIVE else None
            if anew is None:
                self._gone.append(stream)
                continue
            self._filesystem.close(stream.fd)
            self._open([stream.sight])
            if name in self._active:
                self._active[name].offset = stream.offset

    def _turned_up(self, found: dict[str, list[Sight]]) -> dict[str, _Stream]:
        """Which of the new batches are active files that were read so far."""
        turned_up: dict[str, _Stream] = {}
        for batch, sights in found.items():
            if batch in self._known or not self._gone:
                continue
            for sight in sights:
                seen = identity(sight.place.at(sight.name))
                stream = next((stream for stream in self._gone if seen is not None and stream.identity == seen), None)
                if stream is not None:
                    self._gone.remove(stream)
                    turned_up[batch] = stream
                    break
        return turned_up

    def _of_gone(self) -> Iterator[Accepted]:
        """What was sealed and removed before its sealed name was seen is read as long as it is held."""
        for stream in sorted(self._gone, key=lambda one: layout.by_writer(one.sight.name)):
            stream.looks += 1
            if stream.looks < _LOOKS:
                yield from self._read_on(stream, self._filesystem.size(stream.fd))
                continue
            self._gone.remove(stream)
            if size := self._filesystem.size(stream.fd):
                self.missed.was_read(stream.writer, size)
            yield from self._of_stream(stream, "")

    def _of_stream(self, stream: _Stream, batch: str) -> Iterator[Accepted]:
        """The rest of an active file that is complete."""
        try:
            yield from self._read_on(stream, self._filesystem.size(stream.fd), batch, whole=True)
        finally:
            self._filesystem.close(stream.fd)

    def _of_active(self) -> Iterator[Accepted]:
        """What was appended: the size of a writer's later file first, lest it is read further than the one before it."""
        streams = sorted(self._active.values(), key=lambda one: layout.by_writer(one.sight.name))
        sizes = {stream.sight.name: self._filesystem.size(stream.fd) for stream in reversed(streams)}
        writers = [list(group) for _, group in groupby(streams, key=lambda one: one.writer)]
        timed = [self._timed(group, sizes) for group in writers]
        yield from (event for _, event in merge(*timed, key=lambda one: one[0]))

    def _timed(self, streams: list[_Stream], sizes: dict[str, int]) -> Iterator[tuple[int, Accepted]]:
        """A writer's new events, each with a time that never steps back."""
        latest = 0
        for stream in streams:
            for event in self._read_on(stream, sizes[stream.sight.name]):
                latest = max(latest, event.face.occurred_at_micros or 0)
                yield latest, event

    def _read_on(self, stream: _Stream, size: int, batch: str = "", *, whole: bool = False) -> Iterator[Accepted]:
        """What stands between where a file was read up to and `size`: whole lines, unless it is `whole` itself."""
        stream.offset = min(stream.offset, size)  # an append that failed was cut off again
        try:
            data = self._filesystem.read_at(stream.fd, stream.offset, size - stream.offset) if size > stream.offset else b""
        except OSError as error:
            self._tell(Trouble(stream.sight.shown, f"cannot be read: {error.strerror}"))
            return
        if not whole:
            data = data[: data.rfind(b"\n") + 1]
        begin, stream.offset = stream.offset, stream.offset + len(data)
        yield from self._events(data, begin, batch, stream.sight.shown, stream.writer)

    def _of_batch(self, sights: list[Sight]) -> Generator[Accepted, None, bool]:
        """Its events; whether it was there."""
        data = content(sights, self._tell)
        if data is None:  # moved, perhaps
            data = content(places_of(self._directory, sights[0].batch, self._kinds), self._tell)
        if data is None:
            self.went += 1
            return False
        yield from self._events(data, 0, sights[0].batch, sights[0].shown, "")
        return True

    def _events(self, data: bytes, begin: int, batch: str, file: str, writer: str) -> Iterator[Accepted]:
        stamp = layout.stamp_of(batch)
        for line in lines(data, begin):
            if line.damage is not None:
                self.damaged += 1
                self._tell(Trouble(file, f"damaged at {line.damage.offset}: {line.damage.reason}"), f"{file} {line.offset}")
            if line.payload is not None:
                face = self._faces.of(line.payload)
                if self._wanted.takes(line.payload, face, stamp):
                    yield Accepted(batch, file, line.offset, writer, line.payload, face)

    def _tell(self, trouble: Trouble, once: str = "") -> None:
        if (once or trouble.file) not in self._told:
            self._told.add(once or trouble.file)
            self.troubles.append(trouble)
