"""A file system that wraps another one and makes chosen operations fail.

A `Fault` names an operation, its n-th call, and the error. It fails once, or permanently from there on. With `partial`, an
operation that can take effect in part does so first: half of the data is written. (A plain `write` then returns how much it
wrote, as the kernel does; a permanent fault raises at the next call.) A partial `list_files` fails half way.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.store.dirscan import PortableScanOps
from pillarbox.store.filesystem import SequentialBatchOps
from pillarbox.testing.crash import CrashFilesystem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.store.dirscan import FileEntry
    from pillarbox.store.filesystem import DirectoryInfo, DiskSpace, Filesystem

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_OPEN: Final = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO)

# Each operation that can fail, with its errors: those in section 2 of the Linux manual, without EINTR, after which Python
# continues, and without those that only a wrong call gets. `close`, `is_file_at`, `is_same_file`, `has_name` and `size` use
# what the kernel has in memory, and do not fail. ENOENT is what a deleted directory causes.
VERBS: Final[dict[str, tuple[int, ...]]] = {
    "make_directory": (errno.EACCES, errno.EIO, errno.EROFS, *_FULL),
    "inspect_directory": (errno.EACCES, errno.EIO),
    "list_files": (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO),
    "create": (*_OPEN, errno.EROFS, *_FULL, errno.ENOENT),
    "open_existing": _OPEN,
    "open_lock_file": (*_OPEN, errno.EROFS, *_FULL),
    "open_append": (*_OPEN, errno.EROFS, *_FULL),
    "lock": (errno.ENOLCK,),
    "lock_shared": (errno.ENOLCK,),
    "subdirectories": (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO),
    "remove_directory": (errno.EACCES, errno.EIO, errno.EROFS),
    "link": (errno.EACCES, errno.EIO, errno.EMLINK, errno.EROFS, *_FULL),
    "read_all": (errno.EIO,),
    "read_at": (errno.EIO,),
    "write": (errno.EIO, errno.EFBIG, errno.EROFS, *_FULL),
    "write_all": (errno.EIO, errno.EFBIG, errno.EROFS, *_FULL),
    "overwrite": (errno.EIO, errno.EFBIG, errno.EROFS, *_FULL),
    "truncate": (errno.EIO, errno.EROFS),
    "sync_data": (errno.EIO, *_FULL, errno.EROFS),
    "write_back": (errno.EIO, *_FULL),  # of the compiled `sync_each` only: sync_file_range(2)
    "sync_directory": (errno.EIO, errno.EMFILE, errno.ENFILE, *_FULL, errno.EROFS),
    "rename": (errno.EACCES, errno.EIO, errno.EROFS, *_FULL),
    "unlink": (errno.EACCES, errno.EIO, errno.EROFS),
    "disk_space": (errno.EIO, errno.EACCES),
}
PARTIAL_VERBS: Final = frozenset({"write", "write_all", "overwrite", "list_files"})  # may take effect in part


class Fault(NamedTuple):
    """Which call fails, and how."""

    verb: str
    nth: int  # counted from 1, of calls of this operation
    errno: int
    permanent: bool = False  # later calls fail too
    partial: bool = False


class FaultCounter:
    """Counts operations and says which one fails; shared by all processes of a disk."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        self.counts: dict[str, int] = dict.fromkeys(VERBS, 0)
        self.failures = 0  # number of operations that have failed

    def clear_faults(self) -> None:
        """Remove all faults: no operation fails any more."""
        self.faults = ()

    def count(self, verb: str) -> Fault | None:
        """Count an operation that is about to begin. Returns the fault that applies to it, or None."""
        self.counts[verb] += 1
        count = self.counts[verb]
        for fault in self.faults:
            if fault.verb == verb and (count == fault.nth or (count > fault.nth and fault.permanent)):
                self.failures += 1
                return fault
        return None


class FaultFilesystem(SequentialBatchOps, PortableScanOps):
    """A `Filesystem` whose operations fail."""

    def __init__(self, inner: Filesystem, fault: Fault | FaultCounter | None = None) -> None:
        self._inner = inner
        self.counter = fault if isinstance(fault, FaultCounter) else FaultCounter(*([fault] if fault else []))

    def _fail_if_due(self, verb: str, path: str = "") -> None:
        """Raise the error if this call must fail. For operations that cannot take effect in part."""
        fault = self.counter.count(verb)
        if fault is not None:
            raise _error(fault, path)

    # The operations of the protocol.

    def make_directory(self, path: str) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("make_directory", path)
        self._inner.make_directory(path)

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        """Fail, or pass it on."""
        self._fail_if_due("inspect_directory", path)
        return self._inner.inspect_directory(path)

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """Fail at once or half way, or pass it on."""
        fault = self.counter.count("list_files")
        if fault is None:
            return self._inner.list_files(path)
        if not fault.partial:
            raise _error(fault, path)
        return self._half_listing(fault, path)

    def _half_listing(self, fault: Fault, path: str) -> Iterator[FileEntry]:
        entries = list(self._inner.list_files(path))
        yield from entries[: len(entries) // 2]
        raise _error(fault, path)

    def create(self, path: str) -> int:
        """Fail, or pass it on."""
        self._fail_if_due("create", path)
        return self._inner.create(path)

    def subdirectories(self, path: str) -> list[str]:
        """Fail, or pass it on."""
        self._fail_if_due("subdirectories", path)
        return self._inner.subdirectories(path)

    def remove_directory(self, path: str) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("remove_directory", path)
        self._inner.remove_directory(path)

    def open_existing(self, path: str, *, allow_links: bool = False) -> int:
        """Fail, or pass it on."""
        self._fail_if_due("open_existing", path)
        return self._inner.open_existing(path, allow_links=allow_links)

    def open_lock_file(self, path: str) -> int:
        """Fail, or pass it on."""
        self._fail_if_due("open_lock_file", path)
        return self._inner.open_lock_file(path)

    def open_append(self, path: str) -> int:
        """Fail, or pass it on."""
        self._fail_if_due("open_append", path)
        return self._inner.open_append(path)

    def lock(self, fd: int) -> bool:
        """Fail, or pass it on."""
        self._fail_if_due("lock")
        return self._inner.lock(fd)

    def lock_shared(self, fd: int) -> bool:
        """Fail, or pass it on."""
        self._fail_if_due("lock_shared")
        return self._inner.lock_shared(fd)

    def is_file_at(self, fd: int, path: str) -> bool:
        """Never fails."""
        return self._inner.is_file_at(fd, path)

    def is_same_file(self, path: str, other: str) -> bool:
        """Never fails."""
        return self._inner.is_same_file(path, other)

    def has_name(self, fd: int) -> bool:
        """Never fails."""
        return self._inner.has_name(fd)

    def current_path(self, fd: int) -> str:
        """Never fails."""
        return self._inner.current_path(fd)

    def size(self, fd: int) -> int:
        """Never fails."""
        return self._inner.size(fd)

    def read_all(self, fd: int) -> bytes:
        """Fail, or pass it on."""
        self._fail_if_due("read_all")
        return self._inner.read_all(fd)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Fail, or pass it on."""
        self._fail_if_due("read_at")
        return self._inner.read_at(fd, offset, count)

    def write(self, fd: int, data: bytes) -> int:
        """Fail, or write half."""
        fault = self.counter.count("write")
        if fault is None:
            return self._inner.write(fd, data)
        if not fault.partial or len(data) < 2 or self.counter.counts["write"] > fault.nth:
            raise _error(fault)
        return self._inner.write(fd, data[: len(data) // 2])

    def write_all(self, fd: int, data: bytes) -> None:
        """Fail at once or half way, or pass it on."""
        fault = self.counter.count("write_all")
        if fault is None:
            self._inner.write_all(fd, data)
            return
        if fault.partial:
            self._inner.write_all(fd, data[: len(data) // 2])
        raise _error(fault)

    def overwrite(self, fd: int, data: bytes) -> None:
        """Fail at once or half way, or pass it on."""
        fault = self.counter.count("overwrite")
        if fault is None:
            self._inner.overwrite(fd, data)
            return
        if fault.partial:
            self._inner.overwrite(fd, data[: len(data) // 2])
        raise _error(fault)

    def truncate(self, fd: int, size: int) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("truncate")
        self._inner.truncate(fd, size)

    def sync_data(self, fd: int) -> None:
        """Fail, and tell a simulated disk that the sync failed."""
        fault = self.counter.count("sync_data")
        if fault is None:
            self._inner.sync_data(fd)
            return
        if isinstance(self._inner, CrashFilesystem):
            self._inner.sync_failed(fd)
        raise _error(fault)

    def sync_directory(self, path: str) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("sync_directory", path)
        self._inner.sync_directory(path)

    def rename(self, source: str, target: str) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("rename", source)
        self._inner.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("link", source)
        self._inner.link(source, target)

    def unlink(self, path: str) -> None:
        """Fail, or pass it on."""
        self._fail_if_due("unlink", path)
        self._inner.unlink(path)

    def close(self, fd: int) -> None:
        """Never fails."""
        self._inner.close(fd)

    def disk_space(self, path: str) -> DiskSpace:
        """Fail, or pass it on."""
        self._fail_if_due("disk_space", path)
        return self._inner.disk_space(path)

    def close_inherited(self) -> None:
        """Never fails."""
        self._inner.close_inherited()


def _error(fault: Fault, path: str = "") -> OSError:
    return OSError(fault.errno, os.strerror(fault.errno), path) if path else OSError(fault.errno, os.strerror(fault.errno))
