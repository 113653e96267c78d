"""The accepted events of an outbox in order, each once: the backlog, and then what is accepted afterwards.

Events of one writer are in the order of acceptance. Across writers the order is that of sealing; for events in active segments
it is that of the events' own times.
"""

from __future__ import annotations

from collections import deque
from heapq import merge
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.admin.scan import (
    FileProblem,
    files_by_batch,
    find_batch_files,
    read_first_available,
    scan_files,
    split_lines,
)
from pillarbox.errors import FileUnusableError
from pillarbox.store import layout
from pillarbox.store.file_parts import end_of_last_line
from pillarbox.store.layout import Kind
from pillarbox.store.ledger_entries import AdoptedEntry, SealedEntry
from pillarbox.store.ledger_reader import read_parts
from pillarbox.store.os_filesystem import file_identity, open_file_identity
from pillarbox.store.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Container, Generator, Iterator

    from pillarbox.admin.filters import EventFilter, EventHeader, EventHeaderDecoder
    from pillarbox.admin.scan import FileRef
    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

ACTIVE: Final = frozenset({Kind.ACTIVE, Kind.LEGACY_ACTIVE})
PENDING: Final = ACTIVE | {Kind.SEALED}
ACCEPTED: Final = PENDING | {Kind.DELIVERED}
# Scans in which a segment whose name is gone may reappear as a batch. A listing during the rename may show neither name.
_SEALED_NAME_SCANS_MAX: Final = 3
_KNOWN_FOR_S: Final = 60.0  # longer than any listing may still show a deleted batch
_UNSEEN_SCANS_MAX: Final = 5  # scans within which a batch that the ledger names must appear
_LATE_ENTRY_MICROS: Final = 60_000_000  # ledger entries older than this belong to batches that were read
_FILES_READ_MAX: Final = 1000  # segments that were read before the ledger named their batch id


class AcceptedEvent(NamedTuple):
    """An accepted event, and where it was when it was read."""

    batch: str  # batch id; "" in an active segment
    file: str  # path relative to the outbox directory
    offset: int  # offset of the event's line
    writer: str  # id of the writer; "" if the file's name does not tell
    payload: bytes
    header: EventHeader


class Gap(NamedTuple):
    """A batch that was deleted before it could be read."""

    batch: str
    writer: str
    events: int | None  # None if the ledger has no count


class _UnseenBatch:
    """A batch that the ledger names and that no scan has shown yet."""

    def __init__(self, entry: SealedEntry | AdoptedEntry) -> None:
        self.entry = entry
        self.scans = 0


class GapDetector:
    """Finds gaps by following the ledger, which names every batch."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self.gaps: list[Gap] = []  # the caller takes them out
        self._directory = directory
        self._clock = clock
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._since_micros = 0
        self._unseen: dict[str, _UnseenBatch] = {}
        self._decided: dict[str, int] = {}  # batches that need no further check, and the times of their entries
        self._files_read: list[tuple[str, int]] = []  # (writer, bytes) of segments that were read without their batch id

    def start(self) -> None:
        """Ignore the entries that are in the ledger now."""
        self._since_micros = self._clock.micros()
        self._read_new_entries()

    def note_file_read(self, writer: str, size: int) -> None:
        """A segment was read to its end and deleted before its batch id was known."""
        self._files_read = [*self._files_read[-_FILES_READ_MAX:], (writer, size)]

    def update(self, known: Container[str]) -> None:
        """After a scan: find batches that are in the ledger, are not `known`, and have been missing for some scans.

        Never raises `OSError`: without a readable ledger no gap is found.
        """
        for entry in self._read_new_entries():
            if entry.at_micros >= self._since_micros and entry.batch not in known and entry.batch not in self._decided:
                self._unseen.setdefault(entry.batch, _UnseenBatch(entry))
        for batch, unseen in list(self._unseen.items()):
            unseen.scans += 1
            entry = unseen.entry
            size = entry.bytes if isinstance(entry, SealedEntry) else None
            file_read = next((file for file in self._files_read if file[0] == entry.writer and size in (file[1], None)), None)
            if batch in known:
                del self._unseen[batch]
            elif file_read is not None:
                del self._unseen[batch]
                self._files_read.remove(file_read)
                self._decided[batch] = entry.at_micros
            elif unseen.scans >= _UNSEEN_SCANS_MAX:
                del self._unseen[batch]
                self._decided[batch] = entry.at_micros
                self.gaps.append(Gap(batch, entry.writer, entry.events if isinstance(entry, SealedEntry) else None))
        # The tailer does not remember older batches either.
        self._since_micros = max(self._since_micros, self._clock.micros() - _LATE_ENTRY_MICROS)
        self._decided = {batch: at for batch, at in self._decided.items() if at >= self._since_micros}

    def _read_new_entries(self) -> list[SealedEntry | AdoptedEntry]:
        """The entries appended since the last time; all of them if the ledger was rewritten, and is shorter."""
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_existing(self._directory.path_of(layout.LEDGER))
        except (OSError, FileUnusableError):
            return []
        try:
            file, size = open_file_identity(fd), filesystem.size(fd)
            if file != self._file or size < self._offset:
                self._file, self._offset = file, 0
            start, self._offset = self._offset, end_of_last_line(filesystem, fd, size)
            parts = read_parts(filesystem, fd, start, self._offset)
            return [entry for part in parts for entry in part.entries if isinstance(entry, (SealedEntry, AdoptedEntry))]
        except OSError:
            return []
        finally:
            filesystem.close(fd)


class _OpenSegment:
    """An active segment that is held open, so that it can be read to its end after it is renamed or deleted."""

    def __init__(self, file: FileRef, fd: int) -> None:
        self.file = file
        self.fd = fd
        self.writer = layout.writer_of(file.name)
        self.path = file.directory.path_of(file.name)
        self.identity = open_file_identity(fd)
        self.offset = 0  # offset of the first byte that was not read
        self.scans_missing = 0  # since its name is gone


class Tailer:
    """Reads an outbox from its beginning or from now on. Holds each active segment open; end it with `close`.

    Args:
        directory: The outbox directory.
        clock: Says for how long batches that were read are remembered.
        header_decoder: Decodes the headers of events of the event type.
        event_filter: Which events to return.
        kinds: Which files to read.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        header_decoder: EventHeaderDecoder,
        event_filter: EventFilter,
        kinds: frozenset[Kind] = ACCEPTED,
    ) -> None:
        self.problems: list[FileProblem] = []  # the caller removes the problems that it has reported
        self.listing_s = 0.0  # how long the last listing took
        self.batches_read: set[str] = set()  # ids of the batches in the backlog
        self.vanished_batches = 0  # batches that were deleted between listing and reading
        self.damaged_lines = 0
        self.gap_detector = GapDetector(directory, clock)
        self._kinds = kinds
        self._directory = directory
        self._filesystem = directory.filesystem
        self._clock = clock
        self._header_decoder = header_decoder
        self._filter = event_filter
        self._known: dict[str, float] = {}  # batches that were read, and when they were last listed
        self._segments: dict[str, _OpenSegment] = {}  # by name
        self._unlinked: list[_OpenSegment] = []  # segments whose name is gone and that have not reappeared as a batch yet
        self._reported: set[str] = set()  # files with a reported problem

    def close(self) -> None:
        """Close all segments."""
        for segment in [*self._segments.values(), *self._unlinked]:
            self._filesystem.close(segment.fd)
        self._segments.clear()
        self._unlinked.clear()

    def read_backlog(self, count: int | None) -> Iterator[AcceptedEvent]:
        """The newest `count` matching events that are stored now, or all of them; the oldest first."""
        self.gap_detector.start()
        for _ in range(_SEALED_NAME_SCANS_MAX):
            self.close()
            files = scan_files(self._directory)
            self._open_segments(files)
            if not any(file.kind in ACTIVE and file_identity(file.directory.path_of(file.name)) is None for file in files):
                break  # otherwise a segment was sealed during the scan, and its batch may be missing in it
        by_batch = files_by_batch(files, self._kinds - ACTIVE)
        self._known = dict.fromkeys(by_batch, self._clock.monotonic())
        unsealed = self._from_segments()
        if count is None:
            for batch, batch_files in by_batch.items():
                if (yield from self._from_batch(batch_files)):
                    self.batches_read.add(batch)
            yield from unsealed
            return
        chunks = [deque(unsealed, maxlen=count)]  # holds no more in memory, because a file may be of any size
        left = count - len(chunks[0])
        for batch_files in reversed(by_batch.values()):
            if left <= 0:
                break
            chunks.append(deque(self._from_batch(batch_files), maxlen=left))
            left -= len(chunks[-1])
        for chunk in reversed(chunks):
            yield from chunk

    def read_new(self) -> Iterator[AcceptedEvent]:
        """The matching events accepted since the last call; raises `OSError` if the directory cannot be listed."""
        started = self._clock.monotonic()
        try:
            files = scan_files(self._directory)
        except FileNotFoundError:  # the directory was deleted; a writer creates it again
            files = []
        self.listing_s = self._clock.monotonic() - started
        by_batch = files_by_batch(files, self._kinds - ACTIVE)
        self._find_unlinked({file.name for file in files})
        sealed = self._find_sealed(by_batch)
        yield from self._from_unlinked()
        now = self._clock.monotonic()
        for batch, batch_files in by_batch.items():
            if batch in sealed:
                yield from self._rest_of_segment(sealed[batch], batch)
            elif batch not in self._known and not (yield from self._from_batch(batch_files)):
                continue  # not read, so not known: the ledger will show the gap
            self._known[batch] = now
        self._open_segments(files)
        yield from self._from_segments()
        self.gap_detector.update(self._known)
        for batch in [batch for batch, listed_at in self._known.items() if listed_at < now - _KNOWN_FOR_S]:
            del self._known[batch]

    def _open_segments(self, files: list[FileRef]) -> None:
        for file in files:
            if file.kind in ACTIVE & self._kinds and file.name not in self._segments:
                try:
                    fd = file.directory.open_existing(file.name)
                except FileNotFoundError:
                    continue  # sealed meanwhile
                except (OSError, FileUnusableError) as error:
                    self._report_problem(FileProblem(file.display_name, f"cannot be read: {error}"))
                    continue
                self._segments[file.name] = _OpenSegment(file, fd)

    def _find_unlinked(self, names: set[str]) -> None:
        """Move segments whose name is gone to `_unlinked`. One that was rewritten under its name is opened again."""
        for name, segment in list(self._segments.items()):
            if name in names and self._filesystem.is_file_at(segment.fd, segment.path):
                continue
            del self._segments[name]
            # The older system uses the same name for each of its segments, so another file there is not a rewritten one.
            rewritten = file_identity(segment.path) if segment.file.kind is Kind.ACTIVE else None
            if rewritten is None:
                self._unlinked.append(segment)
                continue
            self._filesystem.close(segment.fd)
            self._open_segments([segment.file])
            if name in self._segments:
                self._segments[name].offset = segment.offset

    def _find_sealed(self, by_batch: dict[str, list[FileRef]]) -> dict[str, _OpenSegment]:
        """The new batches that are segments which were read until now."""
        sealed: dict[str, _OpenSegment] = {}
        for batch, files in by_batch.items():
            if batch in self._known or not self._unlinked:
                continue
            for file in files:
                identity = file_identity(file.directory.path_of(file.name))
                matching = (segment for segment in self._unlinked if identity is not None and segment.identity == identity)
                segment = next(matching, None)
                if segment is not None:
                    self._unlinked.remove(segment)
                    sealed[batch] = segment
                    break
        return sealed

    def _from_unlinked(self) -> Iterator[AcceptedEvent]:
        """New events of segments without a name. One that does not reappear as a batch was delivered and deleted."""
        for segment in sorted(self._unlinked, key=lambda segment: layout.active_sort_key(segment.file.name)):
            segment.scans_missing += 1
            if segment.scans_missing < _SEALED_NAME_SCANS_MAX:
                yield from self._read_appended(segment, self._filesystem.size(segment.fd))
                continue
            self._unlinked.remove(segment)
            if size := self._filesystem.size(segment.fd):
                self.gap_detector.note_file_read(segment.writer, size)
            yield from self._rest_of_segment(segment, "")

    def _rest_of_segment(self, segment: _OpenSegment, batch: str) -> Iterator[AcceptedEvent]:
        """The unread events of a segment that gets no more, which is then closed."""
        try:
            yield from self._read_appended(segment, self._filesystem.size(segment.fd), batch, is_final=True)
        finally:
            self._filesystem.close(segment.fd)

    def _from_segments(self) -> Iterator[AcceptedEvent]:
        """New events of the active segments.

        The size of a writer's later segment is taken before that of an earlier one. In the other order an event in the later
        segment could be returned before one that was appended to the earlier segment meanwhile.
        """
        segments = sorted(self._segments.values(), key=lambda segment: layout.active_sort_key(segment.file.name))
        sizes = {segment.file.name: self._filesystem.size(segment.fd) for segment in reversed(segments)}
        by_writer = [list(group) for _, group in groupby(segments, key=lambda segment: segment.writer)]
        timed = [self._with_times(group, sizes) for group in by_writer]
        yield from (event for _, event in merge(*timed, key=lambda timed_event: timed_event[0]))

    def _with_times(self, segments: list[_OpenSegment], sizes: dict[str, int]) -> Iterator[tuple[int, AcceptedEvent]]:
        """A writer's new events, with times that never step back, so that merging keeps their order."""
        latest = 0
        for segment in segments:
            for event in self._read_appended(segment, sizes[segment.file.name]):
                latest = max(latest, event.header.occurred_at_micros or 0)
                yield latest, event

    def _read_appended(
        self, segment: _OpenSegment, size: int, batch: str = "", *, is_final: bool = False
    ) -> Iterator[AcceptedEvent]:
        """The unread events up to `size`: of complete lines, and in a final segment also of the last one."""
        segment.offset = min(segment.offset, size)  # a failed append was truncated
        while segment.offset < size:
            try:
                data = self._filesystem.read_at(segment.fd, segment.offset, min(WINDOW_BYTES, size - segment.offset))
            except OSError as error:
                self._report_problem(FileProblem(segment.file.display_name, f"cannot be read: {error.strerror}"))
                return
            is_end = segment.offset + len(data) >= size
            if not (is_final and is_end):
                end = data.rfind(b"\n") + 1
                if is_end or end:  # otherwise the line is longer than a window, and no record
                    data = data[:end]
            if not data:
                return
            start, segment.offset = segment.offset, segment.offset + len(data)
            yield from self._events(data, start, batch, segment.file.display_name, segment.writer)
            if is_end:
                return

    def _from_batch(self, files: list[FileRef]) -> Generator[AcceptedEvent, None, bool]:
        """The events of a batch; returns whether it could be found."""
        parts = read_first_available(files, self._report_problem)
        if parts is None:  # it may have moved
            parts = read_first_available(find_batch_files(self._directory, files[0].batch, self._kinds), self._report_problem)
        if parts is None:
            self.vanished_batches += 1
            return False
        for offset, data in parts:
            yield from self._events(data, offset, files[0].batch, files[0].display_name, "")
        return True

    def _events(self, data: bytes, start: int, batch: str, file: str, writer: str) -> Iterator[AcceptedEvent]:
        sealed_micros = layout.sealed_at(batch)
        for line in split_lines(data, start):
            if line.damage is not None:
                self.damaged_lines += 1
                problem = FileProblem(file, f"damaged at offset {line.damage.offset}: {line.damage.reason}")
                self._report_problem(problem, f"{file} {line.offset}")
            if line.payload is not None:
                header = self._header_decoder.decode(line.payload)
                if self._filter.matches(line.payload, header, sealed_micros):
                    yield AcceptedEvent(batch, file, line.offset, writer, line.payload, header)

    def _report_problem(self, problem: FileProblem, key: str = "") -> None:
        """Report a problem once for each key, which is the file unless given."""
        if (key or problem.file) not in self._reported:
            self._reported.add(key or problem.file)
            self.problems.append(problem)
