"""A disk in memory that knows what may be left of it when the power fails, and file systems on it, one a process.

THE MODEL, weaker than any file system that we know. What a file's last `sync_data` covers is durable, and nothing else:

- each write since then is lost, applied, or applied in its size only: its bytes are NUL. One of them, on the whole disk, may be
  torn at any byte: the rest of it is missing, or NUL. Where a write is lost and a later one is not, NUL fills the gap.
- each truncation since then is lost or applied.
- after a `sync_data` that failed, what it was asked to sync may be lost for good, whatever later ones answer.
- each creation, rename and removal of a name since the last `sync_directory` is lost or applied, as a whole and each for
  itself, whatever became of the file's data. A rename that is applied gives the file its new name even where its creation is
  lost. What has no name is gone.

The death of a process (`CrashFilesystem.kill`) loses nothing of this: only its descriptors and locks go.
"""

from __future__ import annotations

import errno
import itertools
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.store.filesystem import DirectoryFacts, Entry, Space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

State = dict[str, bytes]  # what is left: path -> content
Seen = tuple[bytes, tuple["_Change", ...]]  # a file's durable content and its changes since

_SPACE: Final = Space(2**40, 2**41)
_LOST, _APPLIED, _NUL = range(3)


class _Change(NamedTuple):
    """A write at an offset, or, where there is no data, a truncation to it."""

    offset: int
    data: bytes | None


class _Inode:
    """A file."""

    __slots__ = ("base", "changes", "data", "doomed", "holder", "links")

    def __init__(self, data: bytes = b"", links: int = 1) -> None:
        self.data = bytearray(data)  # as the running system sees it
        self.base = data  # what is durable
        self.changes: list[_Change] = []  # since then
        self.doomed = False  # a sync has failed
        self.links = links
        self.holder: tuple[CrashFilesystem, int] | None = None


class _Rename(NamedTuple):
    """A change of names: from nowhere where the file is created, to nowhere where it is removed."""

    source: str | None
    target: str | None
    inode: _Inode


class Disk:
    """One medium. Its running view is that of all processes; `survivor()` is what a loss of power may leave of it."""

    def __init__(self, state: State | None = None) -> None:
        self.names: dict[str, _Inode] = {name: _Inode(data) for name, data in (state or {}).items()}
        self._durable: dict[str, _Inode] = self.names.copy()
        self._renames: list[_Rename] = []
        self.trace: list[tuple[str, str]] = []  # every operation, with its path; and the marks

    @property
    def files(self) -> State:
        """The running view."""
        return {name: bytes(inode.data) for name, inode in self.names.items()}

    def mark(self, what: str) -> None:
        """Note in the trace what somebody was told."""
        self.trace.append(("mark", what))

    def survivor(self) -> Survivor:
        """What may be left if the power fails now."""
        return Survivor(self._durable, self._renames)

    def change_names(self, source: str | None, target: str | None, inode: _Inode) -> None:
        """Create, rename or remove."""
        if source is not None:
            del self.names[source]
        if target is None:
            inode.links -= 1
        else:
            replaced = self.names.get(target)
            if replaced is not None:
                replaced.links -= 1
            self.names[target] = inode
        self._renames.append(_Rename(source, target, inode))

    def sync_names(self) -> None:
        """Make them durable."""
        self._durable = self.names.copy()
        self._renames = []


class Survivor:
    """The states that one moment may leave; made at that moment, enumerated whenever."""

    def __init__(self, durable: dict[str, _Inode], renames: list[_Rename]) -> None:
        self._places = list(_places(durable, renames))
        inodes = {inode for place in self._places for _, inode in place}
        self._seen: dict[_Inode, Seen] = {inode: (inode.base, tuple(inode.changes)) for inode in inodes}

    def states(self) -> Iterator[State]:
        """Each state, at least once."""
        contents = {inode: _contents(*seen) for inode, seen in self._seen.items()}
        for place in self._places:
            names = [name for name, _ in place]
            whole = [contents[inode][0] for _, inode in place]
            for choice in itertools.product(*whole):
                yield dict(zip(names, choice, strict=True))
            for index, (_, inode) in enumerate(place):
                torn = contents[inode][1]
                if torn:
                    for choice in itertools.product(*whole[:index], torn, *whole[index + 1 :]):
                        yield dict(zip(names, choice, strict=True))

    def count(self) -> int:
        """How many `states` yields."""
        contents = {inode: _contents(*seen) for inode, seen in self._seen.items()}
        total = 0
        for place in self._places:
            whole = [len(contents[inode][0]) for _, inode in place]
            product = 1
            for number in whole:
                product *= number
            total += product + sum(product // len(contents[inode][0]) * len(contents[inode][1]) for _, inode in place)
        return total

    def admits(self, state: State) -> bool:
        """Whether something that was found is one of the states, with any number of torn writes."""
        for place in self._places:
            if len(place) == len(state) and all(
                name in state and _admits(*self._seen[inode], state[name]) for name, inode in place
            ):
                return True
        return False


def _places(durable: dict[str, _Inode], renames: list[_Rename]) -> Iterator[tuple[tuple[str, _Inode], ...]]:
    """The sets of names that may be left, each once."""
    found: set[tuple[tuple[str, int], ...]] = set()
    for choice in itertools.product((True, False), repeat=len(renames)):
        names = durable.copy()
        for applied, (source, target, inode) in zip(choice, renames, strict=True):
            if applied:
                if source is not None and names.get(source) is inode:
                    del names[source]
                if target is not None:
                    names[target] = inode
        place = tuple(sorted(names.items(), key=lambda item: item[0]))
        key = tuple((name, id(inode)) for name, inode in place)
        if key not in found:
            found.add(key)
            yield place


def _contents(base: bytes, changes: tuple[_Change, ...]) -> tuple[list[bytes], list[bytes]]:
    """What a file may hold: with whole writes, and with one that is torn."""
    if not changes:
        return [base], []
    fates = [(_LOST, _APPLIED) if change.data is None else (_LOST, _APPLIED, _NUL) for change in changes]
    whole = dict.fromkeys(_built(base, changes, choice) for choice in itertools.product(*fates))
    torn: dict[bytes, None] = {}
    for index, change in enumerate(changes):
        if change.data is None:
            continue
        others = [*fates[:index], (_APPLIED,), *fates[index + 1 :]]
        for end in range(1, len(change.data)):
            for data in (change.data[:end], change.data[:end] + bytes(len(change.data) - end)):
                changed = (*changes[:index], _Change(change.offset, data), *changes[index + 1 :])
                torn.update(dict.fromkeys(_built(base, changed, choice) for choice in itertools.product(*others)))
    return list(whole), [content for content in torn if content not in whole]


def _built(base: bytes, changes: Iterable[_Change], fates: Iterable[int]) -> bytes:
    content = bytearray(base)
    for (offset, data), fate in zip(changes, fates, strict=True):
        if fate == _LOST:
            continue
        if data is None:
            del content[offset:]
            continue
        end = offset + len(data)
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        if fate == _APPLIED:
            content[offset:end] = data
    return bytes(content)


def _admits(base: bytes, changes: tuple[_Change, ...], content: bytes) -> bool:
    """Exact where writes only append; where they overlap or truncate, each byte must come from somewhere."""
    if content == base:
        return True
    end = len(base)
    for offset, data in changes:
        if offset != end or data is None:
            return _admits_bytewise(base, changes, content)
        end += len(data)
    if not len(base) <= len(content) <= end or content[: len(base)] != base:
        return False
    for offset, data in changes:
        part = content[offset : offset + len(data or b"")]
        kept = part.rstrip(b"\0")
        if not (data or b"").startswith(kept):
            return False
    return True


def _admits_bytewise(base: bytes, changes: tuple[_Change, ...], content: bytes) -> bool:
    ends = [offset + len(data or b"") for offset, data in changes]
    if len(content) > max(len(base), *ends):
        return False
    for index, byte in enumerate(content):
        sources = {base[index]} if index < len(base) else {0}
        for offset, data in changes:
            if data is not None and offset <= index < offset + len(data):
                sources |= {data[index - offset], 0}
        if byte not in sources and byte != 0:
            return False
    return True


class CrashFilesystem:
    """One process's view of a `Disk`: a `Filesystem`. `before(verb, path)` is called ahead of every operation.

    What it raises there, the operation raises; what it does there, has happened just before.
    """

    def __init__(self, disk: Disk, before: Callable[[str, str], None] | None = None) -> None:
        self.disk = disk
        self._before = before
        self._open: dict[int, tuple[_Inode, str]] = {}
        self._next_fd = 3

    def kill(self) -> None:
        """The process dies."""
        for fd in list(self._open):
            self._let_go(fd)

    def doom(self, fd: int) -> None:
        """A sync of this file has failed: nothing later makes durable what it was asked for."""
        self._open[fd][0].doomed = True

    def _note(self, verb: str, path: str) -> None:
        if self._before is not None:
            self._before(verb, path)
        self.disk.trace.append((verb, path))

    def _of(self, verb: str, fd: int) -> _Inode:
        found = self._open.get(fd)
        self._note(verb, found[1] if found else "")
        if found is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return found[0]

    def _named(self, path: str) -> _Inode:
        inode = self.disk.names.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return inode

    def _opened(self, inode: _Inode, path: str) -> int:
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = (inode, path)
        return fd

    def _let_go(self, fd: int) -> None:
        inode, _ = self._open.pop(fd)
        if inode.holder == (self, fd):
            inode.holder = None

    def make_directory(self, path: str) -> None:
        """It is there, and durable."""
        self._note("make_directory", path)

    def directory_facts(self, path: str) -> DirectoryFacts | None:
        """As of an ordinary directory on a disk."""
        self._note("directory_facts", path)
        return DirectoryFacts(is_directory=True, mode=0o700, usable=True, medium="ext4")

    def listing(self, path: str) -> Iterator[Entry]:
        """The files right below."""
        self._note("listing", path)
        start = len(path) + 1
        return iter(
            [Entry(name[start:], len(inode.data)) for name, inode in self.disk.names.items() if name[:start] == f"{path}/"]
        )

    def create(self, path: str) -> int:
        """A new file; the name must be free."""
        self._note("create", path)
        if path in self.disk.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = _Inode()
        self.disk.change_names(None, path, inode)
        return self._opened(inode, path)

    def open_existing(self, path: str) -> int:
        """A file that is there."""
        self._note("open_existing", path)
        return self._opened(self._named(path), path)

    def open_lock(self, path: str) -> int:
        """A lock file, made where it is missing."""
        self._note("open_lock", path)
        if path not in self.disk.names:
            self.disk.change_names(None, path, _Inode())
        return self._opened(self._named(path), path)

    def lock(self, fd: int) -> bool:
        """Take the lock, unless another descriptor holds it."""
        inode = self._of("lock", fd)
        if inode.holder not in (None, (self, fd)):
            return False
        inode.holder = (self, fd)
        return True

    def is_still(self, fd: int, path: str) -> bool:
        """Whether the path still names the open file."""
        return self._of("is_still", fd) is self.disk.names.get(path)

    def is_linked(self, fd: int) -> bool:
        """Whether the open file has a name."""
        return self._of("is_linked", fd).links > 0

    def size(self, fd: int) -> int:
        """Size in bytes."""
        return len(self._of("size", fd).data)

    def read_all(self, fd: int) -> bytes:
        """The whole file."""
        return bytes(self._of("read_all", fd).data)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        return bytes(self._of("read_at", fd).data[offset : offset + count])

    def write(self, fd: int, data: bytes) -> int:
        """Append."""
        inode = self._of("write", fd)
        inode.changes.append(_Change(len(inode.data), data))
        inode.data += data
        return len(data)

    def write_all(self, fd: int, data: bytes) -> None:
        """Append."""
        if data:
            self.write(fd, bytes(data))
        else:
            self._of("write", fd)

    def replace_all(self, fd: int, data: bytes) -> None:
        """Overwrite, and cut."""
        inode = self._of("replace_all", fd)
        inode.changes += [_Change(0, bytes(data)), _Change(len(data), None)]
        inode.data[:] = data

    def truncate(self, fd: int, size: int) -> None:
        """Cut."""
        inode = self._of("truncate", fd)
        inode.changes.append(_Change(size, None))
        del inode.data[size:]

    def sync_data(self, fd: int) -> None:
        """Make this file's data durable, and nothing else."""
        inode = self._of("sync_data", fd)
        if not inode.doomed:
            inode.base = bytes(inode.data)
            inode.changes = []

    def sync_directory(self, path: str) -> None:
        """Make the names durable."""
        self._note("sync_directory", path)
        self.disk.sync_names()

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, over what has it."""
        self._note("rename", f"{source} -> {target}")
        self.disk.change_names(source, target, self._named(source))

    def unlink(self, path: str) -> None:
        """Take a name away."""
        self._note("unlink", path)
        self.disk.change_names(path, None, self._named(path))

    def close(self, fd: int) -> None:
        """Close, and release the lock."""
        self._of("close", fd)
        self._let_go(fd)

    def space(self, path: str) -> Space:
        """Plenty."""
        self._note("space", path)
        return _SPACE

    def close_inherited(self) -> None:
        """Nothing forks here."""
