"""The operations that the store needs of a file system: a protocol, and a sequential version of its batch operations."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.store.dirscan import FileEntry, FileTotals, NamePage, NamePatterns


_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE})
_EXHAUSTED: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def concerns_one_file(error: OSError) -> bool:
    """Whether an error concerns only the file on which it happened, so that the same operation may work on the next file."""
    return error.errno not in _SHORTAGES


def is_full(error: OSError) -> bool:
    """Whether an error says that a volume, a quota or a limit is exhausted."""
    return error.errno in _EXHAUSTED


class DirectoryInfo(NamedTuple):
    """The facts about a path that `Directory` checks before it uses it."""

    is_directory: bool
    mode: int
    is_usable: bool  # this process may list it, and create and remove files in it
    filesystem_type: str  # e.g. "ext4"; empty if it cannot be determined


class DiskSpace(NamedTuple):
    """The space on a volume for this process."""

    free_bytes: int
    total_bytes: int
    free_inodes: int = 0  # number of files that can still be created
    total_inodes: int = 0  # 0 if the file system has no limit of its own


class Filesystem(Protocol):
    """The file system operations that the store needs, one per method."""

    @property
    def write(self) -> Callable[[int, bytes], int]: ...  # a function, not a method: the hot path calls it

    def make_directory(self, path: str) -> None: ...
    def inspect_directory(self, path: str) -> DirectoryInfo | None: ...
    def list_files(self, path: str) -> Iterator[FileEntry]: ...
    def list_names(self, path: str, patterns: NamePatterns, *, counted: bool = False) -> Iterator[str]: ...
    def file_totals(self, path: str, patterns: NamePatterns) -> list[FileTotals]: ...
    def first_names(self, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0) -> NamePage: ...
    def subdirectories(self, path: str) -> list[str]: ...
    def remove_directory(self, path: str) -> None: ...
    def create(self, path: str) -> int: ...
    def open_existing(self, path: str, *, allow_links: bool = False) -> int: ...
    def open_lock_file(self, path: str) -> int: ...
    def open_append(self, path: str) -> int: ...
    def lock(self, fd: int) -> bool: ...
    def lock_shared(self, fd: int) -> bool: ...
    def is_file_at(self, fd: int, path: str) -> bool: ...
    def is_same_file(self, path: str, other: str) -> bool: ...
    def has_name(self, fd: int) -> bool: ...
    def current_path(self, fd: int) -> str: ...
    def size(self, fd: int) -> int: ...
    def read_all(self, fd: int) -> bytes: ...
    def read_at(self, fd: int, offset: int, count: int) -> bytes: ...
    def write_all(self, fd: int, data: bytes) -> None: ...
    def overwrite(self, fd: int, data: bytes) -> None: ...
    def truncate(self, fd: int, size: int) -> None: ...
    def sync_data(self, fd: int) -> None: ...
    def sync_directory(self, path: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def link(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def close(self, fd: int) -> None: ...
    def disk_space(self, path: str) -> DiskSpace: ...
    def close_inherited(self) -> None: ...

    # Batch operations. The compiled ones release the GIL once for all of their system calls.
    def open_locked(
        self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False
    ) -> int | None: ...
    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None: ...
    def sync_each(self, fds: Sequence[int]) -> list[OSError | None]: ...
    def rename_each(self, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]: ...
    def create_each(self, paths: Sequence[str]) -> tuple[list[int], OSError | None]: ...
    def close_each(self, fds: Sequence[int]) -> None: ...


class SequentialBatchOps:
    """The batch operations as sequences of single ones, for simulated file systems and for use without the C extension."""

    def open_locked(self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False) -> int | None:  # noqa: ARG002 - see below
        """Open and lock an existing file. Returns None if only the step-by-step path is available, as always here."""
        return None

    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None:  # noqa: ARG002 - as above
        """Append lines to a file under the lock of another file, if it ends in a whole line and has less than `max_size` bytes.

        Both files exist and are usable. Returns the descriptor of the file, with the lock released; or None if only the
        step-by-step path is available, as always here. If the disk is full and a short write cannot be cut off, a part of the
        lines may remain.
        """
        return None

    def sync_each(self: Filesystem, fds: Sequence[int]) -> list[OSError | None]:
        """Sync the data of each file. Returns the error of each, or None."""
        return [_error_of(self.sync_data, fd) for fd in fds]

    def rename_each(self: Filesystem, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]:
        """Rename each file, up to the first error. Returns how many were renamed, and the error."""
        for done, (source, target) in enumerate(zip(sources, targets, strict=True)):
            error = _error_of(self.rename, source, target)
            if error is not None:
                return done, error
        return len(sources), None

    def create_each(self: Filesystem, paths: Sequence[str]) -> tuple[list[int], OSError | None]:
        """Create and lock each file, up to the first error. Returns the descriptors, and the error.

        A descriptor of -1 stands for a file that recovery in another process was quicker to lock, and removes.
        """
        fds: list[int] = []
        for path in paths:
            try:
                fd = self.create(path)
            except OSError as error:
                return fds, error
            try:
                is_ours = self.lock(fd) and self.has_name(fd)
            except OSError as error:
                self.close(fd)
                return fds, error
            except BaseException:
                self.close(fd)
                raise
            if not is_ours:
                self.close(fd)
            fds.append(fd if is_ours else -1)
        return fds, None

    def close_each(self: Filesystem, fds: Sequence[int]) -> None:
        """Close each file, which releases its lock. Errors are ignored, because the descriptor is closed in any case."""
        for fd in fds:
            with contextlib.suppress(OSError):
                self.close(fd)


def _error_of(verb: Callable[..., object], *arguments: object) -> OSError | None:
    try:
        verb(*arguments)
    except OSError as error:
        return error
    return None
