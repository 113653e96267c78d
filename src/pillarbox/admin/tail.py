"""The accepted events of an outbox, in order, each once: what there is, and then what comes.

Within a writer the order is that of acceptance; across writers it is that of sealing, and for what is not sealed yet that of
the events' own times.
"""

from __future__ import annotations

from heapq import merge
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin.dead_letters import FileProblem
from pillarbox.admin.gaps import GapDetector
from pillarbox.admin.scan import files_by_batch, find_batch_files, read_first_available, scan_files, split_lines
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.os_filesystem import file_identity, open_file_identity

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pillarbox.admin.event_filters import EventFilter, EventHeader, EventHeaderDecoder
    from pillarbox.admin.scan import FileRef
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

ACTIVE: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})
PENDING: Final = ACTIVE | {Kind.SEALED}
ACCEPTED: Final = PENDING | {Kind.DELIVERED}
_SCANS_MAX: Final = (
    3  # in which the sealed file of an active one must turn up; more than the one that a renaming may hide it from
)
_KNOWN_FOR_S: Final = 60.0  # how long a batch that is gone stays known: longer than any listing misses it


class AcceptedEvent(NamedTuple):
    """An event that was accepted, and where it stood when it was read."""

    batch: str  # empty while it is not sealed
    file: str  # from the outbox directory on
    offset: int  # of its line
    writer: str  # empty where the name does not tell
    payload: bytes
    header: EventHeader


class _OpenSegment:
    """An active file, held open, so that it can be read to its end under whatever name."""

    def __init__(self, file: FileRef, fd: int) -> None:
        self.file = file
        self.fd = fd
        self.writer = layout.writer_of(file.name)
        self.path = file.directory.path_of(file.name)
        self.identity = open_file_identity(fd)
        self.offset = 0  # up to where it was read
        self.scans_missing = 0  # in which its name was gone


class Tailer:
    """Reads an outbox from its beginning, or from now on. Closed by `close`; keeps one open file an active one."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        header_decoder: EventHeaderDecoder,
        event_filter: EventFilter,
        kinds: frozenset[Kind] = ACCEPTED,
    ) -> None:
        self.problems: list[FileProblem] = []  # for the caller to take
        self.listing_s = 0.0  # how long the last listing took
        self.batches_read: set[str] = set()  # batches of the backlog that were read
        self.vanished_batches = 0  # batches that were gone before they were read
        self.damaged_lines = 0  # lines
        self.gap_detector = GapDetector(directory, clock)
        self._kinds = kinds
        self._directory = directory
        self._filesystem = directory.filesystem
        self._clock = clock
        self._header_decoder = header_decoder
        self._filter = event_filter
        self._known: dict[str, float] = {}  # batches that were read, and when they were last seen
        self._segments: dict[str, _OpenSegment] = {}
        self._unlinked: list[_OpenSegment] = []  # whose name is gone, and whose sealed one has not turned up
        self._reported: set[str] = set()  # files of which a trouble was told

    def close(self) -> None:
        """Let go of what is held open."""
        for stream in [*self._segments.values(), *self._unlinked]:
            self._filesystem.close(stream.fd)
        self._segments.clear()
        self._unlinked.clear()

    def read_backlog(self, count: int | None) -> Iterator[AcceptedEvent]:
        """What is there already: the newest `count` of the events that are meant, or all; the oldest first."""
        self.gap_detector.start()
        for _ in range(_SCANS_MAX):
            self.close()
            sights = scan_files(self._directory)
            self._open_segments(sights)
            if not any(sight.kind in ACTIVE and file_identity(sight.directory.path_of(sight.name)) is None for sight in sights):
                break  # otherwise one was sealed meanwhile: its batch is not among those that are there already
        found = files_by_batch(sights, self._kinds - ACTIVE)
        self._known = dict.fromkeys(found, self._clock.monotonic())
        fresh = self._from_segments()
        if count is None:
            for batch, sights_of_one in found.items():
                if (yield from self._from_batch(sights_of_one)):
                    self.batches_read.add(batch)
            yield from fresh
            return
        chunks = [list(fresh)]
        left = count - len(chunks[0])
        for sights_of_one in reversed(found.values()):
            if left <= 0:
                break
            chunks.append(list(self._from_batch(sights_of_one)))
            left -= len(chunks[-1])
        newest = [event for chunk in reversed(chunks) for event in chunk]
        yield from newest[max(0, len(newest) - count) :]

    def read_new(self) -> Iterator[AcceptedEvent]:
        """What was accepted since the last time; raises `OSError` where the directory cannot be listed."""
        begun = self._clock.monotonic()
        try:
            sights = scan_files(self._directory)
        except FileNotFoundError:  # removed with everything in it; whoever writes makes it anew
            sights = []
        self.listing_s = self._clock.monotonic() - begun
        found = files_by_batch(sights, self._kinds - ACTIVE)
        self._set_unlinked_aside({sight.name for sight in sights})
        turned_up = self._sealed_since(found)
        yield from self._from_unlinked()
        now = self._clock.monotonic()
        for batch, sights_of_one in found.items():
            if batch in turned_up:
                yield from self._rest_of_segment(turned_up[batch], batch)
            elif batch not in self._known and not (yield from self._from_batch(sights_of_one)):
                continue  # not seen, and so not known: a gap, once the ledger tells of it
            self._known[batch] = now
        self._open_segments(sights)
        yield from self._from_segments()
        self.gap_detector.update(self._known)
        for batch in [batch for batch, seen in self._known.items() if seen < now - _KNOWN_FOR_S]:
            del self._known[batch]

    def _open_segments(self, files: list[FileRef]) -> None:
        for sight in files:
            if sight.kind in ACTIVE & self._kinds and sight.name not in self._segments:
                try:
                    fd = sight.directory.open_existing(sight.name)
                except FileNotFoundError:
                    continue  # sealed meanwhile
                except (OSError, FileUnusableError) as error:
                    self._report_problem(FileProblem(sight.display_name, f"cannot be read: {error}"))
                    continue
                self._segments[sight.name] = _OpenSegment(sight, fd)

    def _set_unlinked_aside(self, names: set[str]) -> None:
        """Put aside the active files whose name is gone; one that was written anew under its name is read on there."""
        for name, stream in list(self._segments.items()):
            if name in names and self._filesystem.is_file_at(stream.fd, stream.path):
                continue
            del self._segments[name]
            anew = file_identity(stream.path) if stream.file.kind is Kind.ACTIVE else None
            if anew is None:
                self._unlinked.append(stream)
                continue
            self._filesystem.close(stream.fd)
            self._open_segments([stream.file])
            if name in self._segments:
                self._segments[name].offset = stream.offset

    def _sealed_since(self, found: dict[str, list[FileRef]]) -> dict[str, _OpenSegment]:
        """Which of the new batches are active files that were read so far."""
        turned_up: dict[str, _OpenSegment] = {}
        for batch, sights in found.items():
            if batch in self._known or not self._unlinked:
                continue
            for sight in sights:
                seen = file_identity(sight.directory.path_of(sight.name))
                stream = next((stream for stream in self._unlinked if seen is not None and stream.identity == seen), None)
                if stream is not None:
                    self._unlinked.remove(stream)
                    turned_up[batch] = stream
                    break
        return turned_up

    def _from_unlinked(self) -> Iterator[AcceptedEvent]:
        """What was sealed and removed before its sealed name was seen is read as long as it is held."""
        for stream in sorted(self._unlinked, key=lambda one: layout.active_sort_key(one.file.name)):
            stream.scans_missing += 1
            if stream.scans_missing < _SCANS_MAX:
                yield from self._read_appended(stream, self._filesystem.size(stream.fd))
                continue
            self._unlinked.remove(stream)
            if size := self._filesystem.size(stream.fd):
                self.gap_detector.note_file_read(stream.writer, size)
            yield from self._rest_of_segment(stream, "")

    def _rest_of_segment(self, segment: _OpenSegment, batch: str) -> Iterator[AcceptedEvent]:
        """The rest of an active file that is complete."""
        try:
            yield from self._read_appended(segment, self._filesystem.size(segment.fd), batch, whole=True)
        finally:
            self._filesystem.close(segment.fd)

    def _from_segments(self) -> Iterator[AcceptedEvent]:
        """What was appended: the size of a writer's later file first, lest it is read further than the one before it."""
        streams = sorted(self._segments.values(), key=lambda one: layout.active_sort_key(one.file.name))
        sizes = {stream.file.name: self._filesystem.size(stream.fd) for stream in reversed(streams)}
        writers = [list(group) for _, group in groupby(streams, key=lambda one: one.writer)]
        timed = [self._with_times(group, sizes) for group in writers]
        yield from (event for _, event in merge(*timed, key=lambda one: one[0]))

    def _with_times(self, streams: list[_OpenSegment], sizes: dict[str, int]) -> Iterator[tuple[int, AcceptedEvent]]:
        """A writer's new events, each with a time that never steps back."""
        latest = 0
        for stream in streams:
            for event in self._read_appended(stream, sizes[stream.file.name]):
                latest = max(latest, event.header.occurred_at_micros or 0)
                yield latest, event

    def _read_appended(
        self, stream: _OpenSegment, size: int, batch: str = "", *, whole: bool = False
    ) -> Iterator[AcceptedEvent]:
        """What stands between where a file was read up to and `size`: whole lines, unless it is `whole` itself."""
        stream.offset = min(stream.offset, size)  # an append that failed was cut off again
        try:
            data = self._filesystem.read_at(stream.fd, stream.offset, size - stream.offset) if size > stream.offset else b""
        except OSError as error:
            self._report_problem(FileProblem(stream.file.display_name, f"cannot be read: {error.strerror}"))
            return
        if not whole:
            data = data[: data.rfind(b"\n") + 1]
        begin, stream.offset = stream.offset, stream.offset + len(data)
        yield from self._events(data, begin, batch, stream.file.display_name, stream.writer)

    def _from_batch(self, files: list[FileRef]) -> Generator[AcceptedEvent, None, bool]:
        """Its events; whether it was there."""
        data = read_first_available(files, self._report_problem)
        if data is None:  # moved, perhaps
            data = read_first_available(find_batch_files(self._directory, files[0].batch, self._kinds), self._report_problem)
        if data is None:
            self.vanished_batches += 1
            return False
        yield from self._events(data, 0, files[0].batch, files[0].display_name, "")
        return True

    def _events(self, data: bytes, begin: int, batch: str, file: str, writer: str) -> Iterator[AcceptedEvent]:
        stamp = layout.sealed_at(batch)
        for line in split_lines(data, begin):
            if line.damage is not None:
                self.damaged_lines += 1
                self._report_problem(
                    FileProblem(file, f"damaged at {line.damage.offset}: {line.damage.reason}"), f"{file} {line.offset}"
                )
            if line.payload is not None:
                face = self._header_decoder.decode(line.payload)
                if self._filter.matches(line.payload, face, stamp):
                    yield AcceptedEvent(batch, file, line.offset, writer, line.payload, face)

    def _report_problem(self, problem: FileProblem, key: str = "") -> None:
        if (key or problem.file) not in self._reported:
            self._reported.add(key or problem.file)
            self.problems.append(problem)
