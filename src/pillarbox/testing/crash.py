"""A disk in memory, and simulated processes that use it.

A `Disk` is one medium. Each `CrashFilesystem` is one process's view of it, with its own descriptors and locks. Every operation
is recorded in `Disk.trace`, from which `durability_model.py` knows what a power loss may leave. A process that dies loses its
descriptors and locks; the disk keeps everything (`Disk.files`).
"""

from __future__ import annotations

import errno
import itertools
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store.dirscan import FileEntry, PortableScanOps
from pillarbox.store.filesystem import DirectoryInfo, DiskSpace, SequentialBatchOps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_SPACE: Final = DiskSpace(2**40, 2**41)
_FACTS: Final = DirectoryInfo(is_directory=True, mode=0o700, is_usable=True, filesystem_type="memory")

State = dict[str, bytes]  # path -> content; the path of a subdirectory ends with a slash, and has no content


class Killed(BaseException):
    """The simulated process is dead: its operations do not reach the disk, and no handler of its own stops this exception."""


class MisuseError(Exception):
    """A descriptor was used that is not open, or that was opened read-only."""


class Op(NamedTuple):
    """An operation on the disk, or a mark.

    `verb` is one of found, create, link, write, truncate, sync_data, sync_failed, rename, unlink, make_directory,
    remove_directory, sync_directory, mark.
    """

    verb: str
    path: str = ""  # one of the file's names, or a directory; that of a subdirectory that existed before ends with a slash
    inode: int = 0  # or the number of the directory that is made, renamed or removed
    offset: int = 0  # offset of a write; new size of a truncation
    data: bytes = b""
    target: str = ""  # the new name of a rename or link
    note: object = None  # the text of a mark


class _Inode:
    """A file as the running system sees it."""

    __slots__ = ("data", "exclusive", "holders", "number", "paths")

    def __init__(self, number: int, path: str, data: bytes = b"") -> None:
        self.number = number
        self.paths = [path]  # its names, oldest first; empty once it is deleted
        self.data = bytearray(data)
        self.holders: set[_OpenFile] = set()  # the open files that hold its lock
        self.exclusive = False  # whether the lock is exclusive

    @property
    def path(self) -> str:
        return self.paths[0] if self.paths else ""


class _OpenFile:
    """An open file description."""

    __slots__ = ("inode", "writable")

    def __init__(self, inode: _Inode, *, writable: bool) -> None:
        self.inode = inode
        self.writable = writable


class Disk:
    """One medium, shared by all simulated processes. `files` are on it, durable, from the start.

    `links` are further names of these files: path -> path of the file.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None, links: Mapping[str, str] | None = None) -> None:
        self.trace: list[Op] = []
        self.directories: dict[str, dict[str, _Inode]] = {}
        self.numbers: dict[str, int] = {}  # of subdirectories
        self._new_number = itertools.count(1).__next__
        links = links or {}
        for path, data in (files or {}).items():
            self._add_directory(path.rpartition("/")[0])
            if path not in links and not path.endswith("/"):
                names, name = self.names_at(path)
                inode = names[name] = _Inode(self._new_number(), path, data)
                self.trace.append(Op("found", path, inode.number, data=data))
        for path, source in links.items():
            self.link(source, path)
            self.trace.append(Op("sync_directory", path.rpartition("/")[0]))

    def _add_directory(self, path: str) -> None:
        """Add a directory that exists from the start, and the directories above it."""
        above, _, name = path.rpartition("/")
        if path in self.directories:
            return
        self.directories[path] = {}
        if above and name:
            self._add_directory(above)
            self.numbers[path] = number = self._new_number()
            self.trace.append(Op("found", path + "/", number))

    @property
    def files(self) -> State:
        """Path -> content, as the running system sees it. The same is left when every process dies."""
        found = dict.fromkeys((path + "/" for path in self.numbers), b"")
        for above, names in self.directories.items():
            found |= {f"{above}/{name}": bytes(inode.data) for name, inode in names.items()}
        return found

    @property
    def links(self) -> dict[str, str]:
        """The further names of files with several -> the first name."""
        inodes = {inode for names in self.directories.values() for inode in names.values()}
        return {path: inode.path for inode in inodes for path in inode.paths[1:]}

    def mark(self, note: object) -> None:
        """Record a mark between the operations."""
        self.trace.append(Op("mark", note=note))

    def add_file(self, path: str) -> _Inode:
        """Create an empty file."""
        names, name = self.names_at(path)
        inode = names[name] = _Inode(self._new_number(), path)
        self.trace.append(Op("create", path, inode.number))
        return inode

    def link(self, source: str, target: str) -> None:
        """Give a file a further name."""
        names, name = self.names_at(source)
        into, new = self.names_at(target)
        if name not in names:
            raise _not_found(source)
        self.must_be_free(target)
        inode = into[new] = names[name]
        inode.paths.append(target)
        self.trace.append(Op("link", source, inode.number, target=target))

    def make_directory(self, path: str) -> None:
        """Make a directory in another one. A directory at the root exists from the start."""
        above = path.rpartition("/")[0]
        if not above:
            self.directories[path] = {}
            return
        if above not in self.directories:
            self.make_directory(above)
        self.numbers[path] = number = self._new_number()
        self.directories[path] = {}
        self.trace.append(Op("make_directory", path, number))

    def rename_directory(self, source: str, target: str) -> None:
        """Rename a directory with its content, at most over an empty one."""
        if target in self.directories:
            self.remove_directory(target, Op("rename", source, self.numbers[source], target=target))
        else:
            self.must_be_free(target)
            self.trace.append(Op("rename", source, self.numbers[source], target=target))
        for path in [path for path in self.directories if (path + "/").startswith(source + "/")]:
            moved = target + path[len(source) :]
            self.directories[moved], self.numbers[moved] = self.directories.pop(path), self.numbers.pop(path)
            for inode in self.directories[moved].values():
                inode.paths = [f"{moved}{one[len(path) :]}" if one.rpartition("/")[0] == path else one for one in inode.paths]

    def remove_directory(self, path: str, because: Op | None = None) -> None:
        """Remove an empty directory."""
        if path not in self.numbers:
            raise _not_found(path)
        if self.directories[path] or self.subdirectories(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        del self.directories[path]
        self.trace.append(because or Op("remove_directory", path, self.numbers[path]))
        del self.numbers[path]

    def subdirectories(self, path: str) -> list[str]:
        """The names of the directories in a directory."""
        return [one.rpartition("/")[2] for one in self.directories if one.rpartition("/")[0] == path]

    def must_be_free(self, path: str) -> None:
        """Raise `FileExistsError` where a file or directory has this name."""
        names, name = self.names_at(path)
        if name in names or path in self.directories:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    def names_at(self, path: str) -> tuple[dict[str, _Inode], str]:
        """The directory that a path is in, and the name in it."""
        above, _, name = path.rpartition("/")
        names = self.directories.get(above)
        if names is None:
            raise _not_found(path)
        return names, name


def _not_found(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _openable(inode: _Inode, path: str, *, allow_links: bool = False) -> _Inode:
    """The file, if it may be opened: unless `allow_links`, it must not have a second name."""
    if len(inode.paths) > 1 and not allow_links:
        raise FileUnusableError(path, "has a second hard link")
    return inode


class CrashFilesystem(SequentialBatchOps, PortableScanOps):
    """A process's view of a `Disk`: a `Filesystem` with open files and locks as the kernel manages them.

    `before(verb, path)` is called before every operation and may raise: a point for a switch of processes, a kill, or a fault.
    """

    def __init__(self, disk: Disk, before: Callable[[str, str], None] = lambda _verb, _path: None) -> None:
        self.disk = disk
        self._before = before
        self._open: dict[int, _OpenFile] = {}
        self._next_fd = itertools.count(3).__next__
        self._is_dead = False

    def kill(self) -> None:
        """Kill the process: it loses its descriptors and locks; the disk keeps everything."""
        self._is_dead = True
        self.close_inherited()

    def close_inherited(self) -> None:
        """Close everything that is open."""
        for opened in self._open.values():
            opened.inode.holders.discard(opened)
        self._open.clear()

    def _before_path_op(self, verb: str, path: str) -> None:
        if self._is_dead:
            raise Killed
        self._before(verb, path)

    def _before_fd_op(self, verb: str, fd: int) -> _Inode:
        """The open file that an operation is about to use."""
        if self._is_dead:
            raise Killed
        opened = self._open.get(fd)
        if opened is None:
            raise MisuseError(f"{verb}: descriptor {fd} is not open")
        self._before(verb, opened.inode.path)
        return opened.inode

    def _before_change(self, verb: str, fd: int) -> _Inode:
        inode = self._before_fd_op(verb, fd)
        if not self._open[fd].writable:
            raise MisuseError(f"{verb}: {inode.path} is open to read only")
        return inode

    def _add_descriptor(self, inode: _Inode, *, writable: bool) -> int:
        fd = self._next_fd()
        self._open[fd] = _OpenFile(inode, writable=writable)
        return fd

    # Directories.

    def make_directory(self, path: str) -> None:
        """Make the directory and what is missing above it, and sync what is above."""
        self._before_path_op("make_directory", path)
        if path not in self.disk.directories:
            if path.rpartition("/")[0] in self.disk.directories:
                self.disk.must_be_free(path)
            self.disk.make_directory(path)
        while path := path.rpartition("/")[0]:
            self.sync_directory(path)

    def inspect_directory(self, path: str) -> DirectoryInfo | None:
        """A directory is ours and private."""
        self._before_path_op("inspect_directory", path)
        return _FACTS if path in self.disk.directories else None

    def list_files(self, path: str) -> Iterator[FileEntry]:
        """The files in a directory at this moment."""
        self._before_path_op("list_files", path)
        names = self.disk.directories.get(path)
        if names is None:
            raise _not_found(path)
        return iter([FileEntry(name, len(inode.data)) for name, inode in names.items()])

    def subdirectories(self, path: str) -> list[str]:
        """The directories in a directory at this moment."""
        self._before_path_op("subdirectories", path)
        if path not in self.disk.directories:
            raise _not_found(path)
        return self.disk.subdirectories(path)

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        self._before_path_op("remove_directory", path)
        self.disk.remove_directory(path)

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        self._before_path_op("sync_directory", path)
        if path not in self.disk.directories:
            raise _not_found(path)
        self.disk.trace.append(Op("sync_directory", path))

    def disk_space(self, path: str) -> DiskSpace:
        """There is always space."""
        self._before_path_op("disk_space", path)
        return _SPACE

    # Names.

    def create(self, path: str) -> int:
        """Create a file to append to. The name must be free."""
        self._before_path_op("create", path)
        self.disk.must_be_free(path)
        return self._add_descriptor(self.disk.add_file(path), writable=True)

    def open_existing(self, path: str, *, allow_links: bool = False) -> int:
        """Open a file to read, sync and lock; with `allow_links` it may have further names."""
        self._before_path_op("open_existing", path)
        names, name = self.disk.names_at(path)
        if name not in names:
            raise _not_found(path)
        return self._add_descriptor(_openable(names[name], path, allow_links=allow_links), writable=False)

    def open_lock_file(self, path: str) -> int:
        """Open a file, creating it where it is missing."""
        return self._open_or_create("open_lock_file", path)

    def open_append(self, path: str) -> int:
        """The same; every `write` appends anyway."""
        return self._open_or_create("open_append", path)

    def _open_or_create(self, verb: str, path: str) -> int:
        self._before_path_op(verb, path)
        names, name = self.disk.names_at(path)
        inode = _openable(names[name], path) if name in names else self.disk.add_file(path)
        return self._add_descriptor(inode, writable=True)

    def link(self, source: str, target: str) -> None:
        """Give a file a further name, which must be free."""
        self._before_path_op("link", target)
        self.disk.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Rename within a directory. A file or empty directory with the new name loses it.

        Where both are names of one file nothing happens, as rename(2) says.
        """
        self._before_path_op("rename", source)
        names, name = self.disk.names_at(source)
        into, new = self.disk.names_at(target)
        if names is not into:
            raise MisuseError(f"rename: {source} to another directory: {target}")
        if source in self.disk.numbers:
            self.disk.rename_directory(source, target)
            return
        if name not in names:
            raise _not_found(source)
        inode = names[name]
        if into.get(new) is inode:
            return
        if new in into:
            into[new].paths.remove(target)
        into[new] = names.pop(name)
        inode.paths[inode.paths.index(source)] = target
        self.disk.trace.append(Op("rename", source, inode.number, target=target))

    def unlink(self, path: str) -> None:
        """Remove a name. Processes that have the file open keep it."""
        self._before_path_op("unlink", path)
        names, name = self.disk.names_at(path)
        inode = names.pop(name, None)
        if inode is None:
            raise _not_found(path)
        inode.paths.remove(path)
        self.disk.trace.append(Op("unlink", path, inode.number))

    # Open files.

    def close(self, fd: int) -> None:
        """Close a file, and release its lock."""
        self._before_fd_op("close", fd)
        opened = self._open.pop(fd)
        opened.inode.holders.discard(opened)

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock, as `flock`: it belongs to the open file description."""
        return self._lock("lock", fd, exclusive=True)

    def lock_shared(self, fd: int) -> bool:
        """Take a shared lock."""
        return self._lock("lock_shared", fd, exclusive=False)

    def _lock(self, verb: str, fd: int, *, exclusive: bool) -> bool:
        inode, opened = self._before_fd_op(verb, fd), self._open[fd]
        if opened in inode.holders and inode.exclusive == exclusive:
            return True
        inode.holders.discard(opened)  # first, as flock(2) says: the old lock is lost even where the new one cannot be taken
        if inode.holders and (exclusive or inode.exclusive):
            return False
        inode.holders.add(opened)
        inode.exclusive = exclusive
        return True

    def is_file_at(self, fd: int, path: str) -> bool:
        """Whether `path` names the open file."""
        return path in self._before_fd_op("is_file_at", fd).paths

    def is_same_file(self, path: str, other: str) -> bool:
        """Whether both paths name the same file."""
        self._before_path_op("is_same_file", path)
        (names, name), (others, another) = self.disk.names_at(path), self.disk.names_at(other)
        return name in names and names[name] is others.get(another)

    def has_name(self, fd: int) -> bool:
        """Whether the open file has a name left."""
        return bool(self._before_fd_op("has_name", fd).paths)

    def current_path(self, fd: int) -> str:
        """One of the names of an open file; empty if it has none."""
        return self._before_fd_op("current_path", fd).path

    def size(self, fd: int) -> int:
        """The size in bytes."""
        return len(self._before_fd_op("size", fd).data)

    def read_all(self, fd: int) -> bytes:
        """The whole content."""
        return bytes(self._before_fd_op("read_all", fd).data)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        return bytes(self._before_fd_op("read_at", fd).data[offset : offset + count])

    def write(self, fd: int, data: bytes) -> int:
        """Append."""
        inode = self._before_change("write", fd)
        self.disk.trace.append(Op("write", inode.path, inode.number, len(inode.data), bytes(data)))
        inode.data += data
        return len(data)

    def write_all(self, fd: int, data: bytes) -> None:
        """Append everything in one write."""
        self.write(fd, data)

    def overwrite(self, fd: int, data: bytes) -> None:
        """Write from the beginning, then truncate."""
        inode = self._before_change("overwrite", fd)
        self.disk.trace.append(Op("write", inode.path, inode.number, 0, data))
        inode.data[: len(data)] = data
        self._truncate(inode, len(data))

    def truncate(self, fd: int, size: int) -> None:
        """Truncate a file."""
        self._truncate(self._before_change("truncate", fd), size)

    def _truncate(self, inode: _Inode, size: int) -> None:
        self.disk.trace.append(Op("truncate", inode.path, inode.number, size))
        del inode.data[size:]

    def sync_data(self, fd: int) -> None:
        """Make a file's data durable."""
        inode = self._before_fd_op("sync_data", fd)
        self.disk.trace.append(Op("sync_data", inode.path, inode.number))

    def sync_failed(self, fd: int) -> None:
        """What a failed `sync_data` does to a file: see `durability_model.py`."""
        inode = self._open[fd].inode
        self.disk.trace.append(Op("sync_failed", inode.path, inode.number))
