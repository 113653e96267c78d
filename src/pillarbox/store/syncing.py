"""Makes what a writer has appended durable: syncs, and what is done where one fails.

A second sync of a file whose first has failed would answer that all is well while the disk holds something else. So such a
file is retired and written anew: what can be read, and over it what is still in memory.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from pillarbox.store.directory import Directory
    from pillarbox.store.segment import Segment

    UnsyncedLines = Callable[[Segment], Iterable[tuple[int, bytes]]]  # what is in memory of a file: offsets and lines


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
