"""The file system of the operating system. No other module of the package uses `os` on files, or `open`.

Paths are text, descriptors are integers, and errors are `OSError`s as the kernel reports them. Nothing here makes decisions.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from functools import cache
from typing import TYPE_CHECKING, BinaryIO, Final

from pillarbox._native import COMPILED, speedups
from pillarbox.errors import FileUnusableError
from pillarbox.forks import fork_lock
from pillarbox.store import ownership
from pillarbox.store.dirscan import (
    ALL_NAMES,
    FileEntry,
    FileTotals,
    NamePage,
    first_names,
    matches,
    matching_names,
    totals_by_pattern,
)
from pillarbox.store.filesystem import DirectoryInfo, DiskSpace, SequentialBatchOps
from pillarbox.store.open_files import occupy_standard_descriptors, path_of_open_file
from pillarbox.store.ownership import counted_owners, ownership_problem, usable_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pillarbox.store.dirscan import NamePatterns

_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # do not follow a planted link, and do not block on a planted pipe
_FILE_MODE = 0o600
_DIRECTORY_MODE = 0o700
_FIRST_FD: Final = 3  # below it are standard input, output and error
_READ_CHUNK_BYTES = 1 << 20
# The number of links of a directory without subdirectories, if the file system counts "." and ".." (ext4, XFS): its name and
# its own ".". On a file system that does not count them (btrfs) it is 1.
_LINKS_WITHOUT_SUBDIRECTORY: Final = 2
_MOUNTS: Final = "/proc/self/mountinfo"
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_DELETED: Final = " (deleted)"  # after the path of an open file that has no name any more
# Problems that `foreign_entries` reports, for callers that distinguish them.
IS_DIRECTORY: Final = "is a directory"  # allowed where it is a queue
HAS_SECOND_LINK: Final = ownership.HAS_SECOND_LINK
BELONGS_TO: Final = ownership.BELONGS_TO


class OsFilesystem(SequentialBatchOps):
    """The file systems of the machine."""

    write = staticmethod(os.write)
    truncate = staticmethod(os.ftruncate)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    remove_directory = staticmethod(os.rmdir)

    def __init__(self) -> None:
        occupy_standard_descriptors()
        self._open_fds: set[int] = set()  # a forked child closes them, because it would hold its parent's locks otherwise

    def make_directory(self, path: str) -> None:
        """Create the directory and the missing ones above it, durably and for the owner only.

        The names of existing directories above it are synced too, up to the mount point: the process that created them may have
        died before they were durable, and the contents would be lost with the name.
        """
        parent = os.path.abspath(path)
        _make_directories(parent)
        while not os.path.ismount(parent):
            parent = os.path.dirname(parent)
            with contextlib.suppress(PermissionError):  # another user's directory cannot be synced
                self.sync_directory(parent)

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        """The facts about `path`, or None if it does not exist. Follows links, because the directory may be elsewhere."""
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        usable = os.access(path, os.R_OK | os.W_OK | os.X_OK)
        return DirectoryInfo(os.path.isdir(path), status.st_mode & 0o777, usable, filesystem_type_of(path))

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """The regular files in a directory that count, with their sizes: those of this user and of the directory's owner.

        A file that is removed meanwhile is left out.
        """
        owners = counted_owners(path)
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    if not entry.is_file(follow_symlinks=False):
                        continue
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if status.st_uid in owners:
                    yield FileEntry(entry.name, status.st_size)

    def list_names(self, path: str, patterns: NamePatterns, *, counted: bool = False) -> Iterator[str]:
        """The names of the regular files in a directory that match one of the patterns.

        All of them, whoever owns them; with `counted`, those that `list_files` returns.
        """
        if counted:
            yield from matching_names(self.list_files(path), patterns)
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if any(matches(entry.name, pattern) for pattern in patterns) and entry.is_file(follow_symlinks=False):
                    yield entry.name

    def file_totals(self, path: str, patterns: NamePatterns) -> list[FileTotals]:
        """The totals of the files in a directory; each file counts for the first pattern that its name matches."""
        return totals_by_pattern(self.list_files(path), patterns)

    def first_names(self, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0) -> NamePage:
        """Of the names that match one of the patterns, the first `limit` behind `after` and up to `until`.

        An empty `until` means no end. Names are ordered by their bytes, which is the order of their characters.
        """
        return first_names(self.list_names(path, patterns), after, until, limit)

    def subdirectories(self, path: str) -> list[str]:
        """The names of the subdirectories, without links: those of this user and of the directory's owner."""
        if os.stat(path).st_nlink == _LINKS_WITHOUT_SUBDIRECTORY:
            return []  # a shortcut: this is called often, for directories with very many files
        owners = counted_owners(path)
        names: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid in owners:
                        names.append(entry.name)
        return names

    def create(self, path: str) -> int:
        """Create a file to append to. The name must be free."""
        return self._open_new(path, os.O_APPEND)

    def open_existing(self, path: str, *, allow_links: bool = False) -> int:
        """Open an existing file to read, sync and lock. Raises `FileUnusableError` if it is not ours to use.

        With `allow_links` it may have further hard links, as a batch file that waits for several sinks has.
        """
        return self._open_checked(path, os.O_RDONLY, allow_links=allow_links)

    def open_lock_file(self, path: str) -> int:
        """Open a lock file, and create it if it is missing. Raises `FileUnusableError` as `open_existing` does."""
        return self._open_or_create(path, 0)

    def open_append(self, path: str) -> int:
        """Open a file to append to, and create it if it is missing. Raises `FileUnusableError` as `open_existing` does."""
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
            with contextlib.suppress(OSError):  # the file system has no owners
                os.fchown(fd, *owner)
        return fd

    def _open_checked(self, path: str, flags: int, *, allow_links: bool = False) -> int:
        try:
            fd = self._open(path, flags)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise FileUnusableError(path, "is a link, a pipe, a device or a directory") from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise FileUnusableError(path, f"cannot be opened by this process ({error.strerror})") from None
            raise
        try:
            problem = ownership_problem(os.fstat(fd), path, usable_owner(path), allow_links=allow_links)
        except BaseException:
            self.close(fd)
            raise
        if problem:
            self.close(fd)
            raise FileUnusableError(path, problem)
        return fd

    def _open(self, path: str, flags: int) -> int:
        with fork_lock.lock:
            fd = _open_above_stdio(path, flags | _OPEN_FLAGS)
            self._note_open(fd)
        return fd

    def _note_open(self, fd: int) -> None:
        self._open_fds.add(fd)

    def _note_closed(self, fd: int) -> bool:
        """Forget an open file, before it is closed. False if a fork has closed it already."""
        self._open_fds.discard(fd)
        return True

    def close(self, fd: int) -> None:
        """Close a file, and release its lock if it is held, also where a child that C code has forked has the file open."""
        with fork_lock.lock:
            self._note_closed(fd)  # first: after the close another thread may get the number
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def close_inherited(self) -> None:
        """In a forked child: close the parent's files, without releasing the parent's locks."""
        for fd in list(self._open_fds):
            if self._note_closed(fd):
                with contextlib.suppress(OSError):  # one that is closed already must not keep the others open
                    os.close(fd)

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file. False if another process holds it. Only closing the file releases it."""
        return self._lock(fd, fcntl.LOCK_EX)

    def lock_shared(self, fd: int) -> bool:
        """Take a shared lock of an open file. False if another process holds the exclusive one."""
        return self._lock(fd, fcntl.LOCK_SH)

    def _lock(self, fd: int, how: int) -> bool:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_file_at(self, fd: int, path: str) -> bool:
        """Whether `path` names the open file."""
        try:
            named = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(fd), named)

    def is_same_file(self, path: str, other: str) -> bool:
        """Whether both paths name the same, existing file."""
        try:
            return os.path.samestat(os.stat(path, follow_symlinks=False), os.stat(other, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def has_name(self, fd: int) -> bool:
        """Whether the open file has a name left."""
        return os.fstat(fd).st_nlink > 0

    def current_path(self, fd: int) -> str:
        """The current path of an open file that was moved; empty if it was deleted, even if another hard link is left."""
        if not self.has_name(fd):
            return ""
        try:
            path = path_of_open_file(fd)
        except OSError:
            return "an unknown place"
        return "" if path.endswith(_DELETED) else path

    def size(self, fd: int) -> int:
        """The size in bytes."""
        return os.fstat(fd).st_size

    def read_all(self, fd: int) -> bytes:
        """The whole content, whatever the descriptor's position."""
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
        """Write everything, in as many writes as the kernel needs."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def overwrite(self, fd: int, data: bytes) -> None:
        """Make `data` the whole content of a small file."""
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))

    def sync_data(self, fd: int) -> None:
        """Sync a file's data."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # on macOS, fsync leaves the data in the drive's cache
        else:
            os.fdatasync(fd)

    def sync_directory(self, path: str) -> None:
        """Sync a directory, so that the names in it are durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def disk_space(self, path: str) -> DiskSpace:
        """The space on the volume that `path` is on."""
        status = os.statvfs(path)
        sizes = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
        return DiskSpace(*sizes, status.f_favail, status.f_files)


class CompiledOsFilesystem(OsFilesystem):
    """The same with compiled batch operations and directory scans, which release the GIL once for all of their system calls."""

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """As `OsFilesystem`."""
        for chunk in speedups.DirectoryChunks(path, ALL_NAMES, sizes=True, counted=True):
            yield from map(FileEntry._make, chunk)

    def list_names(self, path: str, patterns: NamePatterns, *, counted: bool = False) -> Iterator[str]:
        """As `OsFilesystem`."""
        for chunk in speedups.DirectoryChunks(path, patterns, sizes=False, counted=counted):
            yield from chunk

    def file_totals(self, path: str, patterns: NamePatterns) -> list[FileTotals]:
        """The totals of the files in a directory; each file counts for the first pattern that its name matches."""
        return list(map(FileTotals._make, speedups.scan_sums(path, patterns)))

    def first_names(self, path: str, patterns: NamePatterns, after: str = "", until: str = "", limit: int = 0) -> NamePage:
        """As `OsFilesystem`."""
        return NamePage._make(speedups.scan_first(path, patterns, after, until, limit))

    def open_locked(self, path: str, *, writable: bool = False, allow_links: bool = False, shared: bool = False) -> int | None:
        """Open and lock an existing file. None where only the step-by-step path is available."""
        with fork_lock.lock:
            flags = (os.O_RDWR if writable else os.O_RDONLY) | _OPEN_FLAGS
            return self._track_fd(speedups.open_locked(path, flags, allow_links, shared, usable_owner(path)))

    def append_locked(self, lock_path: str, path: str, lines: bytes, *, max_size: int) -> int | None:
        """As `SequentialBatchOps` describes; None in all but the simple case."""
        with fork_lock.lock:  # a child that is forked meanwhile would keep the lock
            flags = os.O_RDWR | _OPEN_FLAGS
            return self._track_fd(speedups.append_locked(lock_path, path, lines, flags, max_size, usable_owner(path)))

    def _track_fd(self, fd: int) -> int | None:
        if fd < 0:
            return None
        self._note_open(fd)
        return fd

    def _note_open(self, fd: int) -> None:
        super()._note_open(fd)
        speedups.note_open(fd)

    def _note_closed(self, fd: int) -> bool:
        super()._note_closed(fd)
        return speedups.note_closed(fd)

    def _open_checked(self, path: str, flags: int, *, allow_links: bool = False) -> int:
        with fork_lock.lock:
            fd = self._track_fd(speedups.open_existing(path, flags | _OPEN_FLAGS, allow_links, usable_owner(path)))
        return super()._open_checked(path, flags, allow_links=allow_links) if fd is None else fd

    def sync_each(self, fds: Sequence[int]) -> list[OSError | None]:
        """As `SequentialBatchOps`, but the writeback of all files starts before it waits for the first."""
        return [_os_error(number) for number in speedups.sync_each(fds)]

    def rename_each(self, sources: Sequence[str], targets: Sequence[str]) -> tuple[int, OSError | None]:
        """As `SequentialBatchOps`."""
        done, number = speedups.rename_each(sources, targets)
        return done, _os_error(number, *sources[done : done + 1])

    def create_each(self, paths: Sequence[str]) -> tuple[list[int], OSError | None]:
        """As `SequentialBatchOps`."""
        owner = _owner_of_directory(paths[0]) if paths else None
        with fork_lock.lock:
            fds, number = speedups.create_each(
                paths, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | _OPEN_FLAGS, _FILE_MODE, *(owner or (-1, -1))
            )
            for fd in fds:
                self._track_fd(fd)
        return fds, _os_error(number, *paths[len(fds) : len(fds) + 1])

    def close_each(self, fds: Sequence[int]) -> None:
        """As `SequentialBatchOps`."""
        with fork_lock.lock:
            for fd in fds:
                self._note_closed(fd)
            speedups.close_each(fds)

    def sync_directory(self, path: str) -> None:
        """Sync a directory, so that the names in it are durable."""
        error = _os_error(speedups.sync_directory(path), path)
        if error is not None:
            raise error


def local_filesystem() -> OsFilesystem:
    """The file system of this machine, compiled where the C extension is in use."""
    return CompiledOsFilesystem() if COMPILED else OsFilesystem()


def _os_error(number: int, *path: str) -> OSError | None:
    return OSError(number, os.strerror(number), *path) if number else None


def _open_above_stdio(path: str, flags: int) -> int:
    """Open a file, never as standard input, output or error.

    If a program has closed one of these, its number is free, and the output of C code would be written into the file.
    """
    fd = os.open(path, flags, _FILE_MODE)
    if fd >= _FIRST_FD:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    finally:
        os.close(fd)


def _owner_of_directory(path: str) -> tuple[int, int] | None:
    """The owner for a new file.

    Files that root creates are given to the owner of the directory, whose programs must be able to use them.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            status = os.stat(os.path.dirname(path) or ".")
            if status.st_uid or status.st_gid:
                return status.st_uid, status.st_gid
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
        with contextlib.suppress(OSError):  # the file system has no owners
            os.chown(path, *owner, follow_symlinks=False)


def filesystem_type_of(path: str) -> str:
    """The type of the file system that `path` is on, e.g. "ext4"; empty if it cannot be determined."""
    try:
        with open(_MOUNTS, "rb") as file:
            mounts = file.read().splitlines()
    except OSError:
        return ""
    target = os.fsencode(os.path.realpath(path)) + b"/"
    best, medium = b"", b""
    for mount in mounts:
        fields, _, source = mount.partition(b" - ")
        point = fields.split(b" ")[4].replace(b"\\040", b" ")
        # of two mounts on one point the later counts
        if target.startswith(point.rstrip(b"/") + b"/") and len(point) >= len(best):
            best, medium = point, source.split(b" ")[0]
    return medium.decode(errors="replace")


def file_identity(path: str) -> tuple[int, int] | None:
    """The device and inode number of a path; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_file_identity(fd: int) -> tuple[int, int]:
    """The device and inode number of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@cache
def boot_id() -> str:
    """The id of the machine's current boot, within which monotonic clocks can be compared; empty if it is unknown."""
    try:
        return read_file(_BOOT_ID).decode(errors="replace").strip()
    except OSError:
        return ""


def working_directory() -> str:
    """The working directory of this process; empty if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def absolute_path(path: str) -> str:
    """The absolute path, which stays valid when the process changes its working directory. Links are not resolved."""
    return path if os.path.isabs(path) else os.path.join(working_directory(), path)


def link_count(path: str) -> int:
    """The number of hard links of a file."""
    return os.lstat(path).st_nlink


def exists(path: str) -> bool:
    """Whether a path that the user names exists."""
    return os.path.lexists(path)


def foreign_entries(path: str, *, allow_links: bool = False) -> Iterator[tuple[str, str]]:
    """The entries of a directory that are not ours to use, and why; "." is the directory itself. Opens nothing.

    With `allow_links` files may have further hard links, as for `open_existing`.
    """
    me, status = os.geteuid(), os.stat(path)
    if me not in (0, status.st_uid):
        yield ".", f"{BELONGS_TO} {status.st_uid}"
    owner = usable_owner(f"{path}/")
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISLNK(status.st_mode):
                yield entry.name, "is a symbolic link"
            elif stat.S_ISDIR(status.st_mode):
                yield entry.name, IS_DIRECTORY
            elif problem := ownership_problem(status, entry.path, owner, allow_links=allow_links):
                yield entry.name, problem


def create_private_file(path: str, data: bytes) -> None:
    """Create a file that only its owner may read. Raises `FileExistsError`."""
    fd = _open_above_stdio(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    with open(fd, "wb") as file:
        file.write(data)


def ensure_private_file(path: str) -> None:
    """Create an empty file that only its owner may read, unless there is one. Follows links."""
    os.close(_open_above_stdio(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC))


@contextlib.contextmanager
def atomic_output(path: str, *, overwrite: bool) -> Iterator[Callable[[bytes], int]]:
    """Write a file that the user names: to a temporary file, renamed once it is complete and durable.

    Only its owner may read it.

    Raises `FileExistsError` if the file exists by then, unless `overwrite`. An interrupt at any moment removes the temporary
    file; that is why this is a generator.
    """
    beside = f"{path}.{os.getpid()}.aside"
    try:
        fd = _open_above_stdio(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        with open(fd, "wb") as file:
            yield file.write
            file.flush()
            os.fsync(fd)
        (os.rename if overwrite else os.link)(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def open_for_reading(path: str) -> BinaryIO:
    """Open a file that the user names, to read it line by line."""
    return open(path, "rb")


def read_file(path: str) -> bytes:
    """The content of a file that the user names."""
    with open(path, "rb") as file:
        return file.read()
