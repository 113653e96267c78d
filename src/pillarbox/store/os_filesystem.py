"""The only user of `os.*` on files and of `open`: a protocol, so that crashes and faults can be simulated, and the real one.

Paths are text, descriptors are whole numbers, errors are `OSError`s as the kernel gives them. Nothing here decides anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO, Final

from pillarbox._native import COMPILED, speedups
from pillarbox.errors import FileUnusableError
from pillarbox.store.dirscan import ALL_NAMES, FileEntry, FileTotals, NamePage, first_names, matches, totals_by_pattern
from pillarbox.store.filesystem import DirectoryInfo, DiskSpace, SequentialBatchOps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.store.dirscan import NamePatterns

_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # what is planted under our names neither redirects nor hangs us
_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700
_READ_CHUNK_BYTES = 1 << 20
# The links of a directory, where the file system counts the "." and ".." that name it (ext4, XFS): its name and its own ".".
# One that does not count them (btrfs) says 1.
_LINKS_WITHOUT_SUBDIRECTORY: Final = 2
_MOUNTS: Final = "/proc/self/mountinfo"
IS_DIRECTORY: Final = "is a directory"  # what a stranger may be, that a queue is


class OsFilesystem(SequentialBatchOps):
    """The machine's own file systems."""

    write = staticmethod(os.write)
    truncate = staticmethod(os.ftruncate)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    remove_directory = staticmethod(os.rmdir)

    def __init__(self) -> None:
        self._open_fds: set[int] = set()  # what a forked child must close, lest it keeps its parent's locks alive

    def make_directory(self, path: str) -> None:
        """Have the directory and what is missing above it, durably and for the owner only.

        The names of those that are there are synced too, up to the mount point: whoever made them may have died before that,
        and what is kept in the directory would be lost with its name.
        """
        place = os.path.abspath(path)
        _make_directories(place)
        while not os.path.ismount(place):
            place = os.path.dirname(place)
            with contextlib.suppress(PermissionError):  # not ours to make durable
                self.sync_directory(place)

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        """What is at `path`, or None; follows links, for an operator may put the directory elsewhere."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return None
        usable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
        return DirectoryInfo(os.path.isdir(path), found.st_mode & 0o777, usable, filesystem_type_of(path))

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """The regular files in a directory with their sizes; one that goes away meanwhile is left out."""
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    if entry.is_file(follow_symlinks=False):
                        yield FileEntry(entry.name, entry.stat(follow_symlinks=False).st_size)
                except FileNotFoundError:
                    continue

    def list_names(self, path: str, patterns: NamePatterns) -> Iterator[str]:
        """The names of the regular files in a directory that follow one of the patterns."""
        with os.scandir(path) as entries:
            for entry in entries:
                if any(matches(entry.name, pattern) for pattern in patterns) and entry.is_file(follow_symlinks=False):
                    yield entry.name

    def file_totals(self, path: str, patterns: NamePatterns) -> list[FileTotals]:
        """What the files in a directory add up to; each counts for the first of the patterns that its name follows."""
        return totals_by_pattern(self.list_files(path), patterns)

    def first_names(self, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0) -> NamePage:
        """Of the names that follow one of the patterns, the first `limit` behind `after` and up to `until`.

        Where `until` is empty, there is no end. They are in the order of their bytes, which is that of their characters.
        """
        return first_names(self.list_names(path, patterns), after, until, limit)

    def subdirectories(self, path: str) -> list[str]:
        """The names of the directories in a directory; links to one do not count."""
        if os.stat(path).st_nlink == _LINKS_WITHOUT_SUBDIRECTORY:
            return []  # it is asked of directories with very many files, at every look
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    def create(self, path: str) -> int:
        """A new file to append to; the name must be free."""
        return self._open_new(path, os.O_APPEND)

    def open_existing(self, path: str, *, allow_links: bool = False) -> int:
        """A file under one of our names to read, sync and lock, if it is ours to use; raises `FileUnusableError` if it is not.

        With `allow_links` it may have other names: it waits for several sinks.
        """
        return self._open_checked(path, os.O_RDONLY, allow_links=allow_links)

    def open_lock_file(self, path: str) -> int:
        """A lock file, made where it is missing; never removed. Raises `FileUnusableError` as `open_existing` does."""
        return self._open_or_create(path, 0)

    def open_append(self, path: str) -> int:
        """A file to append to, made where it is missing. Raises `FileUnusableError` as `open_existing` does."""
        return self._open_or_create(path, os.O_APPEND)

    def _open_or_create(self, path: str, flags: int) -> int:
        while True:
            try:
                return self._open_checked(path, os.O_RDWR | flags)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another process was quicker
                    return self._open_new(path, flags)

    def _open_new(self, path: str, flags: int) -> int:
        fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags)
        owner = _owner_of_directory(path)
        if owner is not None:
            with contextlib.suppress(OSError):  # a file system without owners
                os.fchown(fd, *owner)
        return fd

    def _open_checked(self, path: str, flags: int, *, allow_links: bool = False) -> int:
        try:
            fd = self._open(path, flags)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise FileUnusableError(path, "is a link, a pipe, a device or a directory") from None
            raise
        found = os.fstat(fd)
        problem = None
        if not stat.S_ISREG(found.st_mode):
            problem = "is not a regular file"
        elif found.st_nlink > 1 and not allow_links:
            problem = "has a second hard link"
        elif found.st_uid != os.geteuid() and os.geteuid() != 0:
            problem = f"belongs to user {found.st_uid}"
        if problem:
            self.close(fd)
            raise FileUnusableError(path, problem)
        return fd

    def _open(self, path: str, flags: int) -> int:
        with _fork_lock:
            fd = os.open(path, flags | _OPEN_FLAGS, _FILE_MODE)
            self._open_fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Close, and release the lock if it is held."""
        with _fork_lock:
            self._open_fds.discard(fd)  # before: afterwards the number may be somebody else's
            os.close(fd)

    def close_inherited(self) -> None:
        """In a forked child: close the parent's files and locks."""
        while self._open_fds:
            with contextlib.suppress(OSError):  # one that is closed already must not keep the others open
                os.close(self._open_fds.pop())

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file; False where another holds it. It is released by closing only."""
        return self._lock(fd, fcntl.LOCK_EX)

    def lock_shared(self, fd: int) -> bool:
        """The same, beside others who take it so."""
        return self._lock(fd, fcntl.LOCK_SH)

    def _lock(self, fd: int, how: int) -> bool:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_file_at(self, fd: int, path: str) -> bool:
        """Whether `path` still names the open file."""
        try:
            named = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(fd), named)

    def is_same_file(self, path: str, other: str) -> bool:
        """Whether two paths name one file; not where one of them names none."""
        try:
            return os.path.samestat(os.stat(path, follow_symlinks=False), os.stat(other, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def has_name(self, fd: int) -> bool:
        """Whether the open file has a name at all."""
        return os.fstat(fd).st_nlink > 0

    def size(self, fd: int) -> int:
        """Size in bytes."""
        return os.fstat(fd).st_size

    def read_all(self, fd: int) -> bytes:
        """The whole file, whatever the descriptor's position."""
        parts: list[bytes] = []
        offset = 0
        while part := os.pread(fd, _READ_CHUNK_BYTES, offset):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        return os.pread(fd, count, offset)

    def write_all(self, fd: int, data: bytes) -> None:
        """Write everything, however often the kernel takes a part only."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def overwrite(self, fd: int, data: bytes) -> None:
        """Make `data` the whole content of a small file."""
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))

    def sync_data(self, fd: int) -> None:
        """Make a file's data durable."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # there fsync leaves the data in the drive's cache
        else:
            os.fdatasync(fd)

    def sync_directory(self, path: str) -> None:
        """Make a directory's entries durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def disk_space(self, path: str) -> DiskSpace:
        """What is left on the volume that `path` is on."""
        found = os.statvfs(path)
        return DiskSpace(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


class CompiledOsFilesystem(OsFilesystem):
    """The same, with the verbs that are several in one compiled: each is one call, without the interpreter lock."""

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """The regular files in a directory with their sizes; one that goes away meanwhile is left out."""
        for chunk in speedups.DirectoryChunks(path, ALL_NAMES, sizes=True):
            yield from map(FileEntry._make, chunk)

    def list_names(self, path: str, patterns: NamePatterns) -> Iterator[str]:
        """The names of the regular files in a directory that follow one of the patterns."""
        for chunk in speedups.DirectoryChunks(path, patterns, sizes=False):
            yield from chunk

    def file_totals(self, path: str, patterns: NamePatterns) -> list[FileTotals]:
        """What the files in a directory add up to; each counts for the first of the patterns that its name follows."""
        return list(map(FileTotals._make, speedups.scan_sums(path, patterns)))

    def first_names(self, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0) -> NamePage:
        """As `OsFilesystem`."""
        return NamePage._make(speedups.scan_first(path, patterns, after, until, limit))

    def open_locked(self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False) -> int | None:
        """A file that is there and ours to use, opened and locked; None where that is to be seen step by step."""
        with _fork_lock:
            return self._track_fd(
                speedups.hold(path, (os.O_RDWR if writable else os.O_RDONLY) | _OPEN_FLAGS, allow_links, shared)
            )

    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None:
        """As `SequentialBatchOps` says, where it is simple."""
        with _fork_lock:  # a child that was forked meanwhile would keep the lock
            return self._track_fd(speedups.append_under(lock_path, path, lines, os.O_RDWR | _OPEN_FLAGS, max_size))

    def _track_fd(self, fd: int) -> int | None:
        if fd < 0:
            return None
        self._open_fds.add(fd)
        return fd

    def _open_checked(self, path: str, flags: int, *, allow_links: bool = False) -> int:
        with _fork_lock:
            fd = self._track_fd(speedups.open_existing(path, flags | _OPEN_FLAGS, allow_links))
        return super()._open_checked(path, flags, allow_links=allow_links) if fd is None else fd

    def sync_each(self, fds: Sequence[int]) -> list[OSError | None]:
        """As `SequentialBatchOps`, but that all are being written before the first is waited for."""
        return [_os_error(number) for number in speedups.sync_each(fds)]

    def rename_each(self, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]:
        """As `SequentialBatchOps`."""
        done, number = speedups.rename_each(sources, targets)
        return done, _os_error(number, *sources[done : done + 1])

    def create_each(self, paths: Sequence[str]) -> tuple[list[int], OSError | None]:
        """As `SequentialBatchOps`."""
        owner = _owner_of_directory(paths[0]) if paths else None
        with _fork_lock:
            found, number = speedups.create_each(
                paths, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | _OPEN_FLAGS, _FILE_MODE, *(owner or (-1, -1))
            )
            self._open_fds.update(fd for fd in found if fd >= 0)
        return found, _os_error(number, *paths[len(found) : len(found) + 1])

    def close_each(self, fds: Sequence[int]) -> None:
        """As `SequentialBatchOps`."""
        with _fork_lock:
            self._open_fds.difference_update(fds)
            speedups.close_each(fds)

    def sync_directory(self, path: str) -> None:
        """Make a directory's entries durable."""
        error = _os_error(speedups.sync_directory(path), path)
        if error is not None:
            raise error


def local_filesystem() -> OsFilesystem:
    """That of this machine, compiled where it can be."""
    return CompiledOsFilesystem() if COMPILED else OsFilesystem()


def _os_error(number: int, *path: str) -> OSError | None:
    return OSError(number, os.strerror(number), *path) if number else None


def _owner_of_directory(path: str) -> tuple[int, int] | None:
    """Whose a new file is to be: what root creates belongs to the directory's owner, whose programs must be able to use it."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            found = os.stat(os.path.dirname(path) or ".")
            if found.st_uid or found.st_gid:
                return found.st_uid, found.st_gid
    return None


def _make_directories(path: str) -> None:
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if not os.path.lexists(above):
        _make_directories(above)
    try:
        os.mkdir(path, _DIRECTORY_MODE)
    except FileExistsError:
        if not os.path.isdir(path):  # otherwise another process was quicker
            raise
        return
    owner = _owner_of_directory(path)
    if owner is not None:
        with contextlib.suppress(OSError):  # a file system without owners
            os.chown(path, *owner, follow_symlinks=False)


def filesystem_type_of(path: str) -> str:
    """The type of the file system that `path` is on, e.g. "ext4"; empty where the system does not tell."""
    try:
        with open(_MOUNTS, "rb") as file:
            mounts = file.read().splitlines()
    except OSError:
        return ""
    place = os.fsencode(os.path.realpath(path)) + b"/"
    best, medium = b"", b""
    for mount in mounts:
        fields, _, source = mount.partition(b" - ")
        point = fields.split(b" ")[4].replace(b"\\040", b" ")
        if place.startswith(point.rstrip(b"/") + b"/") and len(point) >= len(best):  # of two on one point the later counts
            best, medium = point, source.split(b" ")[0]
    return medium.decode(errors="replace")


# Held while a descriptor comes or goes and while a process forks: a child must know of each one that it inherits.
_fork_lock = threading.RLock()


def _before_fork() -> None:
    _fork_lock.acquire()


def _after_fork_in_parent() -> None:
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock  # noqa: PLW0603 - the parent's is held by a thread that does not exist here
    _fork_lock = threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def file_identity(path: str) -> tuple[int, int] | None:
    """Which file a path names at the moment: its device and number; None where it names none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def open_file_identity(fd: int) -> tuple[int, int]:
    """Which file is open: its device and number."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def exists(path: str) -> bool:
    """Whether there is something under a path that a user names."""
    return os.path.lexists(path)


def foreign_entries(path: str, *, allow_links: bool = False) -> Iterator[tuple[str, str]]:
    """Whatever in a directory is not ours to use, and why not; "." is the directory itself. Opens nothing.

    With `allow_links` files may have other names, as for `open_existing`.
    """
    me = os.geteuid()
    found = os.stat(path)
    if me not in (0, found.st_uid):
        yield ".", f"belongs to user {found.st_uid}"
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISLNK(found.st_mode):
                yield entry.name, "is a symbolic link"
            elif not stat.S_ISREG(found.st_mode):
                yield entry.name, IS_DIRECTORY if stat.S_ISDIR(found.st_mode) else "is not a regular file"
            elif found.st_nlink > 1 and not allow_links:
                yield entry.name, "has a second hard link"
            elif me not in (0, found.st_uid):
                yield entry.name, f"belongs to user {found.st_uid}"


def create_private_file(path: str, data: bytes) -> None:
    """A new file that only its owner may read; raises `FileExistsError` where there is one."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
    with open(fd, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def atomic_output(path: str, *, overwrite: bool) -> Iterator[Callable[[bytes], int]]:
    """Write a file that a user names beside it, and rename it when it is whole and durable; only its owner may read it.

    Without `overwrite` an error, `FileExistsError`, where there is one by then. A generator, for an interrupt anywhere in it,
    and also before the caller's block begins, ends it: what is beside goes.
    """
    beside = f"{path}.{os.getpid()}.aside"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE_MODE)
        with open(fd, "wb") as file:
            yield file.write
            file.flush()
            os.fsync(fd)
        (os.rename if overwrite else os.link)(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def open_for_reading(path: str) -> BinaryIO:
    """A file that a user names, to be read line by line."""
    return open(path, "rb")


def read_file(path: str) -> bytes:
    """The content of a file that a user names."""
    with open(path, "rb") as file:
        return file.read()
