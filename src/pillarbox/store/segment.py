"""A file that a writer appends to, will, or did."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pillarbox._native import SegmentCounters
from pillarbox.store import layout
from pillarbox.store.directory import LockedFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from pillarbox.outcome import DropReason
    from pillarbox.store.directory import Directory
    from pillarbox.store.filesystem import Filesystem


_TAIL_READ_BYTES: Final = 64 * 1024  # how much is read at a time to find the last whole line

SealReason = Literal["batch_size", "batch_bytes", "flush_interval", "startup", "adopted", "shutdown", "manual"]


class Segment(SegmentCounters):
    """A file that this writer appends to, will, or did, and what is in it."""

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
        self.number = layout.active_sort_key(locked_file.name)[1]  # a writer's files are filled in this order
        self.sync_lock = threading.Lock()  # held while it is synced, replaced, or closed, by its last user
        self.synced_bytes = 0  # bytes that are known to be durable
        self.truncated = False  # something behind them was cut off since: without a sync it may be there again
        self.name_durable = name_durable  # its name is durable
        self.sync_unknown = False  # a sync of it has begun, and nobody knows yet that it was good
        self.has_leftover = False  # behind its bytes there are more, of a call that was refused
        self.is_sealed = False  # its name is another, its descriptor closed
        self.bytes = 0
        self.events = 0
        self.attend_at = 1  # number of events at which the hot path calls `_attend`
        self.is_counted = False  # among the pending files
        self.seal_reason: SealReason = "manual"  # why it was retired


NO_FILE: Final = LockedFile("", -1)


def end_of_last_line(filesystem: Filesystem, fd: int, size: int) -> int:
    """Where the last whole line of a file of so many bytes ends."""
    while size:
        start = max(0, size - _TAIL_READ_BYTES)
        found = filesystem.read_at(fd, start, size - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


SPARE_RECHECK_SHARE: Final = 16  # of a file's events: how many more go into a full one before another look for a spare
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class WriterLimits(NamedTuple):
    """What bounds a writer."""

    batch_size: int  # events a file
    batch_bytes: int  # bytes a file, overshot by one append
    max_bytes: int  # pending bytes of the directory
    max_files: int = 200_000  # pending files of the directory: so many are listed in well under a second


class WriterProgress(NamedTuple):
    """Bytes appended and released by this process, ever."""

    appended: int
    released: int


def drop_reason_of(error: OSError) -> DropReason:
    """What an error of the disk is to a caller."""
    return "disk_full" if error.errno in _DISK_FULL else "io_error"


# The lines of a segment that are in memory until they are durable: their offsets in the file, and the lines.
UnsyncedLines = Callable[[Segment], Iterable[tuple[int, bytes]]]


class SegmentSyncer:
    """Of one writer's files. Never called with the writer's lock held: callers append meanwhile."""

    def __init__(
        self,
        directory: Directory,
        truncate_lock: Callable[[], AbstractContextManager[object]],
        stop_appending: Callable[[Segment, OSError], None],
    ) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self._truncate_lock = truncate_lock  # the lock under which files are cut
        self._stop_appending = stop_appending  # has nothing more appended to a file; raises where that cannot be

    def sync(self, file: Segment, unsynced_lines: UnsyncedLines) -> str:
        """Sync what is in a file, as far as it is not. Returns what went wrong and was mended; raises the `OSError` of that."""
        with file.sync_lock:
            size = self._unsynced_size(file)
            if size is None:
                return ""
            (error,) = self._sync_data([file])
            if error is None and not self._filesystem.has_name(file.fd):
                file.sync_unknown = False
                error = FileNotFoundError(errno.ENOENT, "was removed by somebody", file.locked_file.name)
                self._stop_appending(file, error)
                raise error
            return self._finish_sync(file, size, error, unsynced_lines)

    def sync_for_seal(self, files: Sequence[Segment], unsynced_lines: UnsyncedLines) -> list[str]:
        """The same of files that get their sealed names next, in one go. Returns also what could not be mended."""
        troubles: list[str] = []
        with contextlib.ExitStack() as held:
            for file in files:
                held.enter_context(file.sync_lock)
            due = [(file, size) for file in files if (size := self._unsynced_size(file)) is not None]
            for (file, size), error in zip(due, self._sync_data([file for file, _ in due]), strict=True):
                try:
                    troubles.append(self._finish_sync(file, size, error, unsynced_lines))
                except OSError as failed:
                    troubles.append(f"{file.locked_file.name}: the disk does not take it ({failed}); sealed as it can be read")
            for file in files:
                file.is_sealed = True
        return [trouble for trouble in troubles if trouble]

    def _unsynced_size(self, file: Segment) -> int | None:
        """How many bytes of a file are to be synced: all that it has by now; None where they are."""
        size, cut = file.bytes, file.truncated
        if cut:
            with self._truncate_lock():  # or a cut that goes on would be forgotten
                file.truncated = False
        return None if file.is_sealed or (file.synced_bytes >= size and not cut) else size

    def _sync_data(self, files: Sequence[Segment]) -> list[OSError | None]:
        """Of each, what went wrong.

        Not worth a sync are those behind whose bytes there are more, which cannot be cut off, and those whose last one was cut
        short by an interrupt: it may have failed, and the next one would not say so.
        """
        unfit = [
            OSError(errno.EIO, "what was refused cannot be cut off")
            if file.has_leftover
            else OSError(errno.EIO, "nobody knows how its last sync ended")
            if file.sync_unknown
            else None
            for file in files
        ]
        fit = [file for file, error in zip(files, unfit, strict=True) if error is None]
        for file in fit:
            file.sync_unknown = True
        synced = iter(self._filesystem.sync_each([file.fd for file in fit]))
        return [next(synced) if error is None else error for error in unfit]

    def _finish_sync(self, file: Segment, size: int, error: OSError | None, unsynced_lines: UnsyncedLines) -> str:
        """After the sync of so many bytes: write the file anew where it has failed."""
        if error is None:
            file.synced_bytes = size
            file.sync_unknown = False
            return ""
        trouble = f"{file.locked_file.name}: the disk did not take it ({error.strerror}); written anew"
        file.truncated = True
        self._stop_appending(file, error)
        file.locked_file = self._directory.rewrite(file.locked_file, unsynced_lines(file), file.bytes)
        file.fd = file.locked_file.fd
        file.name_durable = file.truncated = file.has_leftover = file.sync_unknown = False
        file.synced_bytes = file.bytes
        return trouble
