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
    from pillarbox.store.segment import ActiveFile

    Kept = Callable[[ActiveFile], Iterable[tuple[int, bytes]]]  # what is in memory of a file: offsets and lines


class Syncs:
    """Of one writer's files. Never called with the writer's lock held: callers append meanwhile."""

    def __init__(
        self,
        directory: Directory,
        cutting: Callable[[], AbstractContextManager[object]],
        give_up: Callable[[ActiveFile, OSError], None],
    ) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self._cutting = cutting  # the lock under which files are cut
        self._give_up = give_up  # has nothing more appended to a file; raises where that cannot be

    def make_durable(self, file: ActiveFile, kept: Kept) -> str:
        """Sync what is in a file, as far as it is not. Returns what went wrong and was mended; raises the `OSError` of that."""
        with file.syncing:
            size = self._due(file)
            if size is None:
                return ""
            (error,) = self._sync([file])
            if error is None and not self._filesystem.is_linked(file.fd):
                file.doubtful = False
                error = FileNotFoundError(errno.ENOENT, "was removed by somebody", file.taken.name)
                self._give_up(file, error)
                raise error
            return self._conclude(file, size, error, kept)

    def make_final(self, files: Sequence[ActiveFile], kept: Kept) -> list[str]:
        """The same of files that get their sealed names next, in one go. Returns also what could not be mended."""
        troubles: list[str] = []
        with contextlib.ExitStack() as held:
            for file in files:
                held.enter_context(file.syncing)
            due = [(file, size) for file in files if (size := self._due(file)) is not None]
            for (file, size), error in zip(due, self._sync([file for file, _ in due]), strict=True):
                try:
                    troubles.append(self._conclude(file, size, error, kept))
                except OSError as failed:
                    troubles.append(f"{file.taken.name}: the disk does not take it ({failed}); sealed as it can be read")
            for file in files:
                file.sealed = True
        return [trouble for trouble in troubles if trouble]

    def _due(self, file: ActiveFile) -> int | None:
        """How many bytes of a file are to be synced: all that it has by now; None where they are."""
        size, cut = file.bytes, file.cut
        if cut:
            with self._cutting():  # or a cut that goes on would be forgotten
                file.cut = False
        return None if file.sealed or (file.synced >= size and not cut) else size

    def _sync(self, files: Sequence[ActiveFile]) -> list[OSError | None]:
        """Of each, what went wrong.

        Not worth a sync are those behind whose bytes there are more, which cannot be cut off, and those whose last one was cut
        short by an interrupt: it may have failed, and the next one would not say so.
        """
        unfit = [
            OSError(errno.EIO, "what was refused cannot be cut off")
            if file.spoilt
            else OSError(errno.EIO, "nobody knows how its last sync ended")
            if file.doubtful
            else None
            for file in files
        ]
        fit = [file for file, error in zip(files, unfit, strict=True) if error is None]
        for file in fit:
            file.doubtful = True
        synced = iter(self._filesystem.sync_each([file.fd for file in fit]))
        return [next(synced) if error is None else error for error in unfit]

    def _conclude(self, file: ActiveFile, size: int, error: OSError | None, kept: Kept) -> str:
        """After the sync of so many bytes: write the file anew where it has failed."""
        if error is None:
            file.synced = size
            file.doubtful = False
            return ""
        trouble = f"{file.taken.name}: the disk did not take it ({error.strerror}); written anew"
        file.cut = True
        self._give_up(file, error)
        file.taken = self._directory.write_anew(file.taken, kept(file), file.bytes)
        file.fd = file.taken.fd
        file.entered = file.cut = file.spoilt = file.doubtful = False
        file.synced = file.bytes
        return trouble
