"""A file system that fails where it is told to, around any other.

A `Fault` names an operation, the n-th of its kind, and the error; it comes once, or from there on for good. With `part`, an
operation that can take effect in part does so first: of what is written a half is there. (A plain `write` then answers how
much it took, as the kernel does, and fails, if it is for good, when it is called again.) A listing fails half way.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.store.dirscan import ByListing
from pillarbox.store.onebyone import OneByOne
from pillarbox.testing.crash import CrashFilesystem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pillarbox.store.dirscan import Entry
    from pillarbox.store.filesystem import DirectoryFacts, Filesystem, Space

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_OPEN: Final = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO)

# Each verb that can fail, and the errors that it can fail with: what open(2), write(2) and the rest of section 2 of the Linux
# manual name, without EINTR, after which Python goes on, and without what only a wrong call gets. `close`, `is_still`,
# `is_one`, `is_linked` and `size` work on what the kernel has in memory. ENOENT is what somebody leaves who removes the
# directory.
VERBS: Final[dict[str, tuple[int, ...]]] = {
    "make_directory": (errno.EACCES, errno.EIO, errno.EROFS, *_FULL),
    "directory_facts": (errno.EACCES, errno.EIO),
    "listing": (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO),
    "create": (*_OPEN, errno.EROFS, *_FULL, errno.ENOENT),
    "open_existing": _OPEN,
    "open_lock": (*_OPEN, errno.EROFS, *_FULL),
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
    "replace_all": (errno.EIO, errno.EFBIG, errno.EROFS, *_FULL),
    "truncate": (errno.EIO, errno.EROFS),
    "sync_data": (errno.EIO, *_FULL, errno.EROFS),
    "sync_directory": (errno.EIO, errno.EMFILE, errno.ENFILE, *_FULL, errno.EROFS),
    "rename": (errno.EACCES, errno.EIO, errno.EROFS, *_FULL),
    "unlink": (errno.EACCES, errno.EIO, errno.EROFS),
    "space": (errno.EIO, errno.EACCES),
}
PARTIAL: Final = frozenset({"write", "write_all", "replace_all", "listing"})  # may take effect in part


class Fault(NamedTuple):
    """What fails, and how."""

    verb: str
    nth: int  # from 1; of operations of this verb
    errno: int
    for_good: bool = False  # this one and all later ones of the verb; otherwise this one only
    part: bool = False


class Meter:
    """Counts operations, and knows when one is to fail: of a disk that several processes use."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        self.counts: dict[str, int] = dict.fromkeys(VERBS, 0)
        self.hits = 0  # so many have failed

    def heal(self) -> None:
        """Nothing fails any more."""
        self.faults = ()

    def count(self, verb: str) -> Fault | None:
        """An operation is about to begin; the fault that it meets."""
        self.counts[verb] += 1
        count = self.counts[verb]
        for fault in self.faults:
            if fault.verb == verb and (count == fault.nth or (count > fault.nth and fault.for_good)):
                self.hits += 1
                return fault
        return None


class FaultFilesystem(OneByOne, ByListing):
    """A `Filesystem` of which operations fail."""

    def __init__(self, inner: Filesystem, fault: Fault | Meter | None = None) -> None:
        self._inner = inner
        self.meter = fault if isinstance(fault, Meter) else Meter(*([fault] if fault else []))

    def _meet(self, verb: str, path: str = "") -> None:
        """Fail where that is due and nothing takes effect in part."""
        fault = self.meter.count(verb)
        if fault is not None:
            raise _error(fault, path)

    # What follows are the verbs of the protocol.

    def make_directory(self, path: str) -> None:
        """Or fail."""
        self._meet("make_directory", path)
        self._inner.make_directory(path)

    def directory_facts(self, path: str) -> DirectoryFacts | None:
        """Or fail."""
        self._meet("directory_facts", path)
        return self._inner.directory_facts(path)

    def listing(self, path: str) -> Iterator[Entry]:
        """Or fail, at once or half way."""
        fault = self.meter.count("listing")
        if fault is None:
            return self._inner.listing(path)
        if not fault.part:
            raise _error(fault, path)
        return self._half_a_listing(fault, path)

    def _half_a_listing(self, fault: Fault, path: str) -> Iterator[Entry]:
        entries = list(self._inner.listing(path))
        yield from entries[: len(entries) // 2]
        raise _error(fault, path)

    def create(self, path: str) -> int:
        """Or fail."""
        self._meet("create", path)
        return self._inner.create(path)

    def subdirectories(self, path: str) -> list[str]:
        """Or fail."""
        self._meet("subdirectories", path)
        return self._inner.subdirectories(path)

    def remove_directory(self, path: str) -> None:
        """Or fail."""
        self._meet("remove_directory", path)
        self._inner.remove_directory(path)

    def open_existing(self, path: str, *, linked: bool = False) -> int:
        """Or fail."""
        self._meet("open_existing", path)
        return self._inner.open_existing(path, linked=linked)

    def open_lock(self, path: str) -> int:
        """Or fail."""
        self._meet("open_lock", path)
        return self._inner.open_lock(path)

    def open_append(self, path: str) -> int:
        """Or fail."""
        self._meet("open_append", path)
        return self._inner.open_append(path)

    def lock(self, fd: int) -> bool:
        """Or fail."""
        self._meet("lock")
        return self._inner.lock(fd)

    def lock_shared(self, fd: int) -> bool:
        """Or fail."""
        self._meet("lock_shared")
        return self._inner.lock_shared(fd)

    def is_still(self, fd: int, path: str) -> bool:
        """As it is."""
        return self._inner.is_still(fd, path)

    def is_one(self, path: str, other: str) -> bool:
        """As it is."""
        return self._inner.is_one(path, other)

    def is_linked(self, fd: int) -> bool:
        """As it is."""
        return self._inner.is_linked(fd)

    def size(self, fd: int) -> int:
        """As it is."""
        return self._inner.size(fd)

    def read_all(self, fd: int) -> bytes:
        """Or fail."""
        self._meet("read_all")
        return self._inner.read_all(fd)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Or fail."""
        self._meet("read_at")
        return self._inner.read_at(fd, offset, count)

    def write(self, fd: int, data: bytes) -> int:
        """Or fail, or take a half."""
        fault = self.meter.count("write")
        if fault is None:
            return self._inner.write(fd, data)
        if not fault.part or len(data) < 2 or self.meter.counts["write"] > fault.nth:
            raise _error(fault)
        return self._inner.write(fd, data[: len(data) // 2])

    def write_all(self, fd: int, data: bytes) -> None:
        """Or fail, at once or half way."""
        fault = self.meter.count("write_all")
        if fault is None:
            self._inner.write_all(fd, data)
            return
        if fault.part:
            self._inner.write_all(fd, data[: len(data) // 2])
        raise _error(fault)

    def replace_all(self, fd: int, data: bytes) -> None:
        """Or fail, at once or half way."""
        fault = self.meter.count("replace_all")
        if fault is None:
            self._inner.replace_all(fd, data)
            return
        if fault.part:
            self._inner.replace_all(fd, data[: len(data) // 2])
        raise _error(fault)

    def truncate(self, fd: int, size: int) -> None:
        """Or fail."""
        self._meet("truncate")
        self._inner.truncate(fd, size)

    def sync_data(self, fd: int) -> None:
        """Or fail; a simulated disk is told."""
        fault = self.meter.count("sync_data")
        if fault is None:
            self._inner.sync_data(fd)
            return
        if isinstance(self._inner, CrashFilesystem):
            self._inner.sync_failed(fd)
        raise _error(fault)

    def sync_directory(self, path: str) -> None:
        """Or fail."""
        self._meet("sync_directory", path)
        self._inner.sync_directory(path)

    def rename(self, source: str, target: str) -> None:
        """Or fail."""
        self._meet("rename", source)
        self._inner.rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Or fail."""
        self._meet("link", source)
        self._inner.link(source, target)

    def unlink(self, path: str) -> None:
        """Or fail."""
        self._meet("unlink", path)
        self._inner.unlink(path)

    def close(self, fd: int) -> None:
        """As it is."""
        self._inner.close(fd)

    def space(self, path: str) -> Space:
        """Or fail."""
        self._meet("space", path)
        return self._inner.space(path)

    def close_inherited(self) -> None:
        """As it is."""
        self._inner.close_inherited()


def _error(fault: Fault, path: str = "") -> OSError:
    return OSError(fault.errno, os.strerror(fault.errno), path) if path else OSError(fault.errno, os.strerror(fault.errno))
