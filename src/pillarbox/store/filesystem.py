"""What the store asks of a file system: a protocol, and the operations in it that are several others in one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.store.dirscan import FileEntry, FileTotals, NamePage, NamePatterns


class DirectoryInfo(NamedTuple):
    """What `Directory` needs to know of a path before it uses it."""

    is_directory: bool
    mode: int
    is_usable: bool  # by this process, to list, create and remove in
    filesystem_type: str  # the type of the file system, e.g. "ext4"; empty where it cannot be told


class DiskSpace(NamedTuple):
    """What is left on a volume for this process."""

    free_bytes: int
    total_bytes: int


class Filesystem(Protocol):
    """What the store asks of a file system, one verb a method."""

    @property
    def write(self) -> Callable[[int, bytes], int]: ...  # a function, not a method: the hot path calls it

    def make_directory(self, path: str) -> None: ...
    def inspect_directory(self, path: str) -> DirectoryInfo | None: ...
    def list_files(self, path: str) -> Iterator[FileEntry]: ...
    def list_names(self, path: str, patterns: NamePatterns) -> Iterator[str]: ...
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

    # Several calls in one: where that is compiled, who enqueues meanwhile waits for it less often.
    def open_locked(
        self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False
    ) -> int | None: ...
    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None: ...
    def sync_each(self, fds: Sequence[int]) -> list[OSError | None]: ...
    def rename_each(self, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]: ...
    def create_each(self, paths: Sequence[str]) -> tuple[list[int], OSError | None]: ...
    def close_each(self, fds: Sequence[int]) -> None: ...


class SequentialBatchOps:
    """The verbs that are several in one, made of those."""

    def open_locked(self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False) -> int | None:  # noqa: ARG002 - see below
        """A file that is there and ours to use, opened and locked; None where that is to be seen step by step: here always."""
        return None

    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None:  # noqa: ARG002 - as above
        """Append lines, under the lock of another file, to one that ends in a whole line and has less than `max_size` bytes.

        Both are there and ours to use. The descriptor of the file, the lock released; None where that is to be seen and done
        step by step: here always. Of several lines a part may be there then, if the disk is full and lets nothing be cut off.
        """
        return None

    def sync_each(self: Filesystem, fds: Sequence[int]) -> list[OSError | None]:
        """Make the data of each file durable: what went wrong with it, or None."""
        return [_error_of(self.sync_data, fd) for fd in fds]

    def rename_each(self: Filesystem, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]:
        """Rename each, up to the first that fails: how many were renamed, and what went wrong with the next one."""
        for done, (source, target) in enumerate(zip(sources, targets, strict=True)):
            error = _error_of(self.rename, source, target)
            if error is not None:
                return done, error
        return len(sources), None

    def create_each(self: Filesystem, paths: Sequence[str]) -> tuple[list[int], OSError | None]:
        """Create each and take its lock, up to the first that fails: the descriptors, and what went wrong with the next one.

        A descriptor of -1 is a file that who recovers was quicker to lock, and removes or has removed.
        """
        found: list[int] = []
        for path in paths:
            try:
                fd = self.create(path)
            except OSError as error:
                return found, error
            try:
                held = self.lock(fd) and self.has_name(fd)
            except OSError as error:
                self.close(fd)
                return found, error
            except BaseException:
                self.close(fd)
                raise
            if not held:
                self.close(fd)
            found.append(fd if held else -1)
        return found, None

    def close_each(self: Filesystem, fds: Sequence[int]) -> None:
        """Close each, and release its lock if it is held. What goes wrong with that is nobody's to mend: it is closed."""
        for fd in fds:
            with contextlib.suppress(OSError):
                self.close(fd)


def _error_of(verb: Callable[..., object], *arguments: object) -> OSError | None:
    try:
        verb(*arguments)
    except OSError as error:
        return error
    return None
