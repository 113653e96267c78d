"""A segment: a file that one writer appends to. It is a spare, then active, then retired until it is sealed.

`SegmentSyncer` makes its bytes durable. A kernel may drop data that it could not write and report success for the next sync. So
a segment whose sync has failed is never synced again: it is retired and rewritten, from what can be read and from the lines
that are still in memory.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pillarbox._native import SegmentCounters
from pillarbox.store import layout
from pillarbox.store.directory import LockedFile
from pillarbox.store.filesystem import is_full
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from pillarbox.outcome import DropReason
    from pillarbox.store.directory import Directory
    from pillarbox.store.filesystem import Filesystem


SealReason = Literal["batch_size", "batch_bytes", "flush_interval", "startup", "adopted", "shutdown", "manual"]


class Segment(SegmentCounters):
    """A segment and its state in this process. The base class has the counters that the hot path needs."""

    __slots__ = (
        "has_leftover",
        "is_counted",
        "is_sealed",
        "locked_file",
        "name_durable",
        "number",
        "seal_reason",
        "sync_lock",
        "sync_unknown",
        "synced_bytes",
        "truncated",
    )

    def __init__(self, locked_file: LockedFile, *, name_durable: bool = False) -> None:
        self.locked_file = locked_file
        self.fd = locked_file.fd
        self.number = layout.active_sort_key(locked_file.name)[1]  # a writer fills its segments in this order
        self.sync_lock = threads.Lock()  # held while the segment is synced, rewritten or closed
        self.synced_bytes = 0  # number of bytes that are known to be durable
        self.truncated = False  # bytes were cut off since the last sync, and may come back after a crash without another one
        self.name_durable = name_durable  # the directory was synced after the file was created
        self.sync_unknown = False  # a sync has begun, and its result is not known yet
        self.has_leftover = False  # bytes of a dropped call that could not be cut off follow the counted ones
        self.is_sealed = False  # it was renamed to its sealed name, and its descriptor is closed
        self.bytes = 0
        self.events = 0
        self.threshold_events = 1  # number of events at which the hot path calls `_notify_threshold`
        self.is_counted = False  # in `Writer.pending_files`
        self.seal_reason: SealReason = "manual"  # why it was retired


NO_FILE: Final = LockedFile("", -1)


def ends_with_line_feed(filesystem: Filesystem, fd: int) -> bool:
    """Whether a file is empty or ends in a whole line."""
    size = filesystem.size(fd)
    return size == 0 or filesystem.read_at(fd, size - 1, 1) == b"\n"


def cut_off_short_write(filesystem: Filesystem, fd: int, written: int) -> DropReason:
    """Cut off the bytes of a short write. Returns the drop reason, because bytes that cannot be cut off may be delivered."""
    try:
        filesystem.truncate(fd, filesystem.size(fd) - written)
    except OSError:
        return "io_error"
    return "disk_full"


# a full segment gets one part in this many of `batch_size` more events before the writer checks for a spare again
SPARE_RECHECK_SHARE: Final = 16
# Limit of a segment that cannot be retired because too many wait to be sealed: the disk is slower than the callers. A batch
# must stay small enough to be compressed, and to be delivered soon.
SEGMENT_BYTES_MAX: Final = 64 * 2**20
_GROW_EVERY: Final = 8  # for every this many retired segments, the active one may hold `batch_size` events more


class WriterLimits(NamedTuple):
    """The limits of a writer."""

    batch_size: int  # events per segment
    batch_bytes: int  # bytes per segment; one append may exceed it
    max_bytes: int  # pending bytes of the directory
    max_files: int = 200_000  # pending files of the directory; the default number is listed in well under a second

    def events_due(self, retired: int) -> int:
        """The number of events at which a segment is full: more while many retired ones wait, as each costs the sealer time."""
        return self.batch_size * (1 + retired // _GROW_EVERY)

    def is_full_for(self, segment: Segment, size: int) -> bool:
        """Whether `size` more bytes belong into the next segment."""
        return segment.bytes > 0 and segment.bytes + size > self.batch_bytes

    def may_grow(self, segment: Segment, size: int) -> bool:
        """Whether a segment that cannot be retired may have `size` more bytes."""
        return segment.bytes == 0 or segment.bytes + size <= max(SEGMENT_BYTES_MAX, self.batch_bytes)

    def drop_reason(
        self, segment: Segment, size: int, bytes_left: int, pending_files: int, *, can_retire: bool
    ) -> DropReason | None:
        """Why `size` bytes cannot be appended, or None. `bytes_left` are those that the segment may have for `max_bytes`."""
        if size > bytes_left - segment.bytes:
            return "max_bytes"
        full = self.is_full_for(segment, size)
        if pending_files >= self.max_files and (full or not segment.is_counted):
            return "max_files"
        return None if can_retire or self.may_grow(segment, size) else "disk_slow"

    def recheck_at(self, events: int) -> int:
        """The number of events at which a full segment that could not be retired is checked again."""
        return events + max(1, self.batch_size // SPARE_RECHECK_SHARE)

    def room_beside(self, segment: Segment) -> tuple[int, int]:
        """The events and bytes that fit into a segment, or into an empty one if it is full."""
        events, size = self.batch_size - segment.events, self.batch_bytes - segment.bytes
        return (events, size) if min(events, size) > 0 else (self.batch_size, self.batch_bytes)


class WriterProgress(NamedTuple):
    """The total bytes that this process has appended, and those that were released as delivered or evicted."""

    appended: int
    released: int


def drop_reason_of(error: OSError) -> DropReason:
    """The drop reason for an `OSError`."""
    return "disk_full" if is_full(error) else "io_error"


# The lines of a segment that stay in memory until they are durable: (offset in the file, lines).
UnsyncedLines = Callable[[Segment], Iterable[tuple[int, bytes]]]


class SegmentSyncer:
    """Makes the segments of one writer durable. Call it without the writer's lock: callers append meanwhile."""

    def __init__(
        self,
        directory: Directory,
        truncate_lock: Callable[[], AbstractContextManager[object]],
        stop_appending: Callable[[Segment, OSError], None],
    ) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self._truncate_lock = truncate_lock  # the lock under which segments are truncated
        # ensures that nothing more is appended to a segment; raises the error if it cannot
        self._stop_appending = stop_appending

    def sync(self, file: Segment, unsynced_lines: UnsyncedLines) -> str:
        """Sync the data that a segment has now. Returns a message about a failed sync that was repaired, or "".

        Raises `OSError` if the data could not be made durable.
        """
        with file.sync_lock:
            size = self._unsynced_size(file)
            if size is None:
                return ""
            (error,) = self._sync_data([file])
            if error is None and not self._filesystem.has_name(file.fd):
                file.sync_unknown = False
                error = FileNotFoundError(errno.ENOENT, "the segment was deleted externally", file.locked_file.name)
                self._stop_appending(file, error)
                raise error
            return self._finish_sync(file, size, error, unsynced_lines)

    def sync_for_seal(self, files: Sequence[Segment], unsynced_lines: UnsyncedLines) -> list[str]:
        """Sync segments that are about to be sealed, all in one call. Returns messages about failed syncs, repaired or not."""
        messages: list[str] = []
        with contextlib.ExitStack() as locks:
            for file in files:
                locks.enter_context(file.sync_lock)
            due = [(file, size) for file in files if (size := self._unsynced_size(file)) is not None]
            for (file, size), error in zip(due, self._sync_data([file for file, _ in due]), strict=True):
                try:
                    messages.append(self._finish_sync(file, size, error, unsynced_lines))
                except OSError as rewrite_error:
                    messages.append(
                        f"{file.locked_file.name}: rewriting failed too ({rewrite_error}); sealing what can be read"
                    )
            for file in files:
                file.is_sealed = True
        return [message for message in messages if message]

    def _unsynced_size(self, file: Segment) -> int | None:
        """The number of bytes to sync: all that the segment has now. None if all of them are durable."""
        size, cut = file.bytes, file.truncated
        if cut:
            with self._truncate_lock():  # otherwise a truncation that is under way could be missed
                file.truncated = False
        return None if file.is_sealed or (file.synced_bytes >= size and not cut) else size

    def _sync_data(self, files: Sequence[Segment]) -> list[OSError | None]:
        """Sync the data of each segment; the error of each, or None.

        Two kinds of segments are not synced but reported as failed: those with leftover bytes that could not be cut off, and
        those whose last sync was interrupted. That sync may have failed, and the next one would not report it.
        """
        errors = [
            OSError(errno.EIO, "the bytes of a dropped call could not be cut off")
            if file.has_leftover
            else OSError(errno.EIO, "its last sync was interrupted")
            if file.sync_unknown
            else None
            for file in files
        ]
        syncable = [file for file, error in zip(files, errors, strict=True) if error is None]
        for file in syncable:
            file.sync_unknown = True
        synced = iter(self._filesystem.sync_each([file.fd for file in syncable]))
        return [next(synced) if error is None else error for error in errors]

    def _finish_sync(self, file: Segment, size: int, error: OSError | None, unsynced_lines: UnsyncedLines) -> str:
        """Record the result of a sync of `size` bytes. Rewrites the segment if the sync has failed."""
        if error is None:
            file.synced_bytes = size
            file.sync_unknown = False
            return ""
        message = f"{file.locked_file.name}: fsync failed ({error.strerror}); file rewritten"
        file.truncated = True
        self._stop_appending(file, error)
        file.locked_file = self._directory.rewrite(file.locked_file, unsynced_lines(file), file.bytes)
        file.fd = file.locked_file.fd
        file.name_durable = file.truncated = file.has_leftover = file.sync_unknown = False
        file.synced_bytes = file.bytes
        return message
