"""A file system that fails where it is told to, around any other.

A `Fault` names an operation, the n-th of its kind, and the error; it comes once, or from there on for good. With `partial`, an
operation that can take effect in part does so first: of what is written a half is there. (A plain `write` then answers how
much it took, as the kernel does, and fails, if it is for good, when it is called again.) A listing fails half way.
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

# Each verb that can fail, and the errors that it can fail with: what open(2), write(2) and the rest of section 2 of the Linux
# manual name, without EINTR, after which Python goes on, and without what only a wrong call gets. `close`, `is_file_at`,
# `is_same_file`, `has_name` and `size` work on what the kernel has in memory. ENOENT is what somebody leaves who removes the
# directory.
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
    "sync_directory": (errno.EIO, errno.EMFILE, errno.ENFILE, *_FULL, errno.EROFS),
    "rename": (errno.EACCES, errno.EIO, errno.EROFS, *_FULL),
    "unlink": (errno.EACCES, errno.EIO, errno.EROFS),
    "disk_space": (errno.EIO, errno.EACCES),
}
PARTIAL_VERBS: Final = frozenset({"write", "write_all", "overwrite", "list_files"})  # may take effect in part


class Fault(NamedTuple):
    """What fails, and how."""

    verb: str
    nth: int  # from 1; of operations of this verb
    errno: int
    permanent: bool = False  # this one and all later ones of the verb; otherwise this one only
    partial: bool = False


class FaultCounter:
    """Counts operations, and knows when one is to fail: of a disk that several processes use."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        self.counts: dict[str, int] = dict.fromkeys(VERBS, 0)
        self.failures = 0  # so many have failed

    def clear_faults(self) -> None:
        """Nothing fails any more."""
        self.faults = ()

    def count(self, verb: str) -> Fault | None:
        """An operation is about to begin; the fault that it meets."""
        self.counts[verb] += 1
        count = self.counts[verb]
        for fault in self.faults:
            if fault.verb == verb and (count == fault.nth or (count > fault.nth and fault.permanent)):
                self.failures += 1
                return fault
        return None


class FaultFilesystem(SequentialBatchOps, PortableScanOps):
    """A `Filesystem` of which operations fail."""

    def __init__(self, inner: Filesystem, fault: Fault | FaultCounter | None = None) -> None:
        self._inner = inner
        self.counter = fault if isinstance(fault, FaultCounter) else FaultCounter(*([fault] if fault else []))

    def _fail_if_due(self, verb: str, path: str = "") -> None:
        """Fail where that is due and nothing takes effect in part."""
        fault = self.counter.count(verb)
        if fault is not None:
            raise _error(fault, path)

    # What follows are the verbs of the protocol.

    def make_directory(self, path: str) -> None:
        """Or fail."""
        self._fail_if_due("make_directory", path)
        self._inner.make_directory(path)

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        """Or fail."""
        self._fail_if_due("inspect_directory", path)
        return self._inner.inspect_directory(path)

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """Or fail, at once or half way."""
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
        """Or fail."""
        self._fail_if_due("create", path)
        return self._inner.create(path)

    def subdirectories(self, path: str) -> list[str]:
        """Or fail."""
        self._fail_if_due("subdirectories", path)
        return self._inner.subdirectories(path)

    def remove_directory(self, path: str) -> None:
        """Or fail."""
        self._fail_if_due("remove_directory", path)
        self._inner.remove_directory(path)

    def open_existing(self, path: str, *, allow_links: bool = False) -> int:
        """Or fail."""
        self._fail_if_due("open_existing", path)
        return self._inner.open_existing(path, allow_links=allow_links)

    def open_lock_file(self, path: str) -> int:
        """Or fail."""
        self._fail_if_due("open_lock_file", path)
        return self._inner.open_lock_file(path)

    def open_append(self, path: str) -> int:
        """Or fail."""
        self._fail_if_due("open_append", path)
        return self._inner.open_append(path)

    def lock(self, fd: int) -> bool:
        """Or fail."""
        self._fail_if_due("lock")
        return self._inner.lock(fd)

    def lock_shared(self, fd: int) -> bool:
        """Or fail."""
        self._fail_if_due("lock_shared")
        return self._inner.lock_shared(fd)

    def is_file_at(self, fd: int, path: str) -> bool:
        """As it is."""
        return self._inner.is_file_at(fd, path)

    def is_same_file(self, path: str, other: str) -> bool:
        """As it is."""
        return self._inner.is_same_file(path, other)

    def has_name(self, fd: int) -> bool:
        """As it is."""
        return self._inner.has_name(fd)

    def size(self, fd: int) -> int:
        """As it is."""
        return self._inner.size(fd)

    def read_all(self, fd: int) -> bytes:
        """Or fail."""
        self._fail_if_due("read_all")
        return self._inner.read_all(fd)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Or fail."""
        self._fail_if_due("read_at")
        return self._inner.read_at(fd, offset, count)

    def write(self, fd: int, data: bytes) -> int:
        """Or fail, or take a half."""
        fault = self.counter.count("write")
        if fault is None:
            return self._inner.write(fd, data)
        if not fault.partial or len(data) < 2 or self.counter.counts["write"] > fault.nth:
            raise _error(fault)
        return self._inner.write(fd, data[: len(data) // 2])

    def write_all(self, fd: int, data: bytes) -> None:
        """Or fail, at once or half way."""
        fault = self.counter.count("write_all")
        if fault is None:
            self._inner.write_all(fd, data)
            return
        if fault.partial:
            self._inner.write_all(fd, data[: len(data) // 2])
        raise _error(fault)

    def overwrite(self, fd: int, data: bytes) -> None:
        """Or fail, at once or half way."""
        fault = self.counter.count("overwrite")
        if fault is None:
            self._inner.overwrite(fd, data)
            return
        if fault.partial:
            self._inner.overwrite(fd, data[: len(data) // 2])
        raise _error(fault)

    def truncate(self, fd: int, size: int) -> None:
        """Or fail."""
        self._fail_if_due("truncate")
        self._inner.truncate(fd, size)

    def sync_data(self, fd: int) -> None:
        """Or fail; a simulated disk is told."""
        fault = self.counter.count("sync_data")
        if fault is None:
            self._inner.sync_data(fd)
            return
        if isinstance(self._inner, CrashFilesystem):
            self._inner.sync_failed(fd)
        raise _error(fault)

    def sync_directory(self, path: str) -> None:
        """Or fail."""
        self._fail_if_due("sync_directory", path)
        self._inner.sync_directory(path)

    def rename(self, source: str, target: str) -> None:
        """Or fail."""
        self._fail_if_due("rename", source)
        self._inner.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Or fail."""
        self._fail_if_due("link", source)
        self._inner.link(source, target)

    def unlink(self, path: str) -> None:
        """Or fail."""
        self._fail_if_due("unlink", path)
        self._inner.unlink(path)

    def close(self, fd: int) -> None:
        """As it is."""
        self._inner.close(fd)

    def disk_space(self, path: str) -> DiskSpace:
        """Or fail."""
        self._fail_if_due("disk_space", path)
        return self._inner.disk_space(path)

    def close_inherited(self) -> None:
        """As it is."""
        self._inner.close_inherited()


def _error(fault: Fault, path: str = "") -> OSError:
    return OSError(fault.errno, os.strerror(fault.errno), path) if path else OSError(fault.errno, os.strerror(fault.errno))
