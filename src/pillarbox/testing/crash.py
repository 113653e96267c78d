"""A disk in memory, processes that use it, and THE written weak model of what is left of it when the power fails.

A `Disk` is one medium; each `CrashFilesystem` is one process's view of it, with descriptors and locks of its own. Every
operation goes into `Disk.trace`. `Survivors` reads a trace, or its beginning, and knows each state that a loss of power at
that moment may leave.

DATA. Each write since the file's last `sync_data` is lost, applied, or sized only (the file is as long as if it had been
written, with NUL bytes there), each for itself, in whatever order. At most one write of a file is torn, at any byte: of the
data or of the NUL bytes only a beginning is there, or a beginning of the data and then NUL bytes to its end. A write that
is there behind one that is lost leaves NUL bytes in the gap. Each truncation is applied or not, or leaves the old size and
NUL bytes from the cut to the end of its page. `sync_data` makes the file's data durable and nothing else, least of all its
name.

FAILED SYNCS. What is not durable in a file when `sync_data` fails on it is doomed: lost, sized, torn or there, whatever later
syncs answer, for a kernel forgets what it could not write. What is written afterwards is like any other write.

NAMES. Each creation, rename and unlink is atomic and, until `sync_directory` of its directory has returned, applied or not,
each for itself. A rename takes the old name away and gives the new one together; it may be there though the file's creation
or an earlier rename is not. A file has one name or none, and without a name it is gone. After a `sync_directory` that fails
the names are as unsure as before it, and a later one that returns is believed: names are in a journal, and a file system
whose journal fails takes nothing more. A directory is durable from the moment it is made.

A PROCESS THAT DIES loses its descriptors and locks; the disk keeps everything (`Disk.files`).
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.store.filesystem import DirectoryFacts, Entry, Space

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from random import Random

_NUL: Final = b"\0"
_PAGE: Final = 4096
_SPACE: Final = Space(2**40, 2**41)
_FACTS: Final = DirectoryFacts(is_directory=True, mode=0o700, usable=True, medium="memory")

State = dict[str, bytes]  # path -> content


class Killed(BaseException):
    """The process is dead: nothing that it still tries reaches the disk, nor does any handler of its own stop it."""


class Misuse(Exception):  # noqa: N818 - reads as the sentence it is
    """A descriptor was used that is not open, or that was opened to read only."""


class Op(NamedTuple):
    """What happened to the disk: an operation, or a mark.

    `verb` is one of found, create, write, truncate, sync_data, sync_failed, rename, unlink, sync_directory, mark.
    """

    verb: str
    path: str = ""  # of a directory where that is what is synced
    inode: int = 0
    offset: int = 0  # of a write; the size where that is what is set
    data: bytes = b""
    target: str = ""  # of a rename
    what: object = None  # of a mark


class _Inode:
    """A file as the running system sees it."""

    __slots__ = ("data", "holder", "number", "path")

    def __init__(self, number: int, path: str, data: bytes = b"") -> None:
        self.number = number
        self.path = path  # empty once it has no name
        self.data = bytearray(data)
        self.holder: _Opened | None = None  # of its lock


class _Opened:
    """An open file description."""

    __slots__ = ("inode", "writable")

    def __init__(self, inode: _Inode, *, writable: bool) -> None:
        self.inode = inode
        self.writable = writable


class Disk:
    """One medium, shared by all simulated processes; `files` were on it, durable, before everything."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.trace: list[Op] = []
        self.directories: dict[str, dict[str, _Inode]] = {}
        self._numbers = itertools.count(1).__next__
        for path, data in (files or {}).items():
            above, _, name = path.rpartition("/")
            inode = self.directories.setdefault(above, {})[name] = _Inode(self._numbers(), path, data)
            self.trace.append(Op("found", path, inode.number, data=data))

    @property
    def files(self) -> State:
        """Path -> content, as the running system sees it; also what is left when every process dies."""
        return {inode.path: bytes(inode.data) for names in self.directories.values() for inode in names.values()}

    def mark(self, what: object) -> None:
        """Note something in the trace, between the operations."""
        self.trace.append(Op("mark", what=what))

    def add(self, names: dict[str, _Inode], name: str, path: str) -> _Inode:
        """A new, empty file."""
        inode = names[name] = _Inode(self._numbers(), path)
        self.trace.append(Op("create", path, inode.number))
        return inode

    def names_at(self, path: str) -> tuple[dict[str, _Inode], str]:
        """The directory that a path is in, and the name there."""
        above, _, name = path.rpartition("/")
        names = self.directories.get(above)
        if names is None:
            raise _missing(path)
        return names, name


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class CrashFilesystem:
    """A process's view of a `Disk`: a `Filesystem`, with open files and locks as the kernel keeps them.

    `before(verb, path)` is called ahead of every operation and may raise: a switch point, a cut, a fault.
    """

    def __init__(self, disk: Disk, before: Callable[[str, str], None] = lambda _verb, _path: None) -> None:
        self.disk = disk
        self._before = before
        self._open: dict[int, _Opened] = {}
        self._next_fd = itertools.count(3).__next__
        self._dead = False

    def kill(self) -> None:
        """The process dies: its descriptors and locks go, the disk keeps everything."""
        self._dead = True
        self.close_inherited()

    def close_inherited(self) -> None:
        """Close everything that is open."""
        for opened in self._open.values():
            if opened.inode.holder is opened:
                opened.inode.holder = None
        self._open.clear()

    def _begin(self, verb: str, path: str) -> None:
        if self._dead:
            raise Killed
        self._before(verb, path)

    def _use(self, verb: str, fd: int) -> _Inode:
        """The open file that an operation is about to touch."""
        if self._dead:
            raise Killed
        opened = self._open.get(fd)
        if opened is None:
            raise Misuse(f"{verb}: descriptor {fd} is not open")
        self._before(verb, opened.inode.path)
        return opened.inode

    def _change(self, verb: str, fd: int) -> _Inode:
        inode = self._use(verb, fd)
        if not self._open[fd].writable:
            raise Misuse(f"{verb}: {inode.path} is open to read only")
        return inode

    def _admit(self, inode: _Inode, *, writable: bool) -> int:
        fd = self._next_fd()
        self._open[fd] = _Opened(inode, writable=writable)
        return fd

    # Directories.

    def make_directory(self, path: str) -> None:
        """Durable at once; what is there stays."""
        self._begin("make_directory", path)
        names, name = self.disk.directories.get(path.rpartition("/")[0], {}), path.rpartition("/")[2]
        if name in names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self.disk.directories.setdefault(path, {})

    def directory_facts(self, path: str) -> DirectoryFacts | None:
        """A directory is ours and private."""
        self._begin("directory_facts", path)
        return _FACTS if path in self.disk.directories else None

    def listing(self, path: str) -> Iterator[Entry]:
        """The files of a directory, as they are at this moment."""
        self._begin("listing", path)
        names = self.disk.directories.get(path)
        if names is None:
            raise _missing(path)
        return iter([Entry(name, len(inode.data)) for name, inode in names.items()])

    def sync_directory(self, path: str) -> None:
        """Make names durable."""
        self._begin("sync_directory", path)
        if path not in self.disk.directories:
            raise _missing(path)
        self.disk.trace.append(Op("sync_directory", path))

    def space(self, path: str) -> Space:
        """Plenty."""
        self._begin("space", path)
        return _SPACE

    # Names.

    def create(self, path: str) -> int:
        """A new file to append to; the name must be free."""
        self._begin("create", path)
        names, name = self.disk.names_at(path)
        if name in names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return self._admit(self.disk.add(names, name, path), writable=True)

    def open_existing(self, path: str) -> int:
        """To read, sync and lock."""
        self._begin("open_existing", path)
        names, name = self.disk.names_at(path)
        if name not in names:
            raise _missing(path)
        return self._admit(names[name], writable=False)

    def open_lock(self, path: str) -> int:
        """A file made where it is missing."""
        return self._open_or_make("open_lock", path)

    def open_append(self, path: str) -> int:
        """The same: every `write` appends here."""
        return self._open_or_make("open_append", path)

    def _open_or_make(self, verb: str, path: str) -> int:
        self._begin(verb, path)
        names, name = self.disk.names_at(path)
        return self._admit(names.get(name) or self.disk.add(names, name, path), writable=True)

    def rename(self, source: str, target: str) -> None:
        """One name for another; what had that one has none any more."""
        self._begin("rename", source)
        names, name = self.disk.names_at(source)
        if name not in names:
            raise _missing(source)
        into, new = self.disk.names_at(target)
        inode = names.pop(name)
        if new in into:
            into[new].path = ""
        into[new] = inode
        inode.path = target
        self.disk.trace.append(Op("rename", source, inode.number, target=target))

    def unlink(self, path: str) -> None:
        """Take the name away; who has it open keeps the file."""
        self._begin("unlink", path)
        names, name = self.disk.names_at(path)
        inode = names.pop(name, None)
        if inode is None:
            raise _missing(path)
        inode.path = ""
        self.disk.trace.append(Op("unlink", path, inode.number))

    # Open files.

    def close(self, fd: int) -> None:
        """And release its lock."""
        self._use("close", fd)
        opened = self._open.pop(fd)
        if opened.inode.holder is opened:
            opened.inode.holder = None

    def lock(self, fd: int) -> bool:
        """As `flock`: of the open file description."""
        inode, opened = self._use("lock", fd), self._open[fd]
        if inode.holder not in (None, opened):
            return False
        inode.holder = opened
        return True

    def is_still(self, fd: int, path: str) -> bool:
        """Whether `path` names the open file."""
        return self._use("is_still", fd).path == path

    def is_linked(self, fd: int) -> bool:
        """Whether the open file has a name."""
        return bool(self._use("is_linked", fd).path)

    def size(self, fd: int) -> int:
        """In bytes."""
        return len(self._use("size", fd).data)

    def read_all(self, fd: int) -> bytes:
        """The whole file."""
        return bytes(self._use("read_all", fd).data)

    def read_at(self, fd: int, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        return bytes(self._use("read_at", fd).data[offset : offset + count])

    def write(self, fd: int, data: bytes) -> int:
        """Append."""
        inode = self._change("write", fd)
        self.disk.trace.append(Op("write", inode.path, inode.number, len(inode.data), bytes(data)))
        inode.data += data
        return len(data)

    def write_all(self, fd: int, data: bytes) -> None:
        """Append everything; one write."""
        self.write(fd, data)

    def replace_all(self, fd: int, data: bytes) -> None:
        """Write from the beginning, then cut."""
        inode = self._change("replace_all", fd)
        self.disk.trace.append(Op("write", inode.path, inode.number, 0, data))
        inode.data[: len(data)] = data
        self._cut(inode, len(data))

    def truncate(self, fd: int, size: int) -> None:
        """Cut."""
        self._cut(self._change("truncate", fd), size)

    def _cut(self, inode: _Inode, size: int) -> None:
        self.disk.trace.append(Op("truncate", inode.path, inode.number, size))
        del inode.data[size:]

    def sync_data(self, fd: int) -> None:
        """Make a file's data durable."""
        inode = self._use("sync_data", fd)
        self.disk.trace.append(Op("sync_data", inode.path, inode.number))

    def sync_failed(self, fd: int) -> None:
        """What a `sync_data` that fails does to the file: see the head of this module."""
        inode = self._open[fd].inode
        self.disk.trace.append(Op("sync_failed", inode.path, inode.number))


class _Change(NamedTuple):
    """A write or truncation of which it is not known whether it is there."""

    cuts: bool
    offset: int
    data: bytes
    certain: bool = False  # a doomed one before it is all that keeps it from being part of the durable content


class _File:
    """What may be left of a file's data."""

    __slots__ = ("base", "changes", "doomed", "variants")

    def __init__(self, data: bytes = b"") -> None:
        self.base = data  # durable
        self.changes: list[_Change] = []  # since then, in order
        self.doomed = 0  # so many of them, from the first on, no sync makes certain
        self.variants: dict[Tears, tuple[list[bytes], list[bytes]]] = {}

    def add(self, change: _Change) -> None:
        self.changes.append(change)
        self.variants.clear()

    def sync(self) -> None:
        self.variants.clear()
        if self.doomed:
            self.changes[self.doomed :] = [change._replace(certain=True) for change in self.changes[self.doomed :]]
            return
        self.base = self.whole()
        self.changes.clear()

    def fail(self) -> None:
        # What a later sync had made certain behind a doomed write stays so: the flag is its own.
        self.doomed = len(self.changes)

    def whole(self) -> bytes:
        """Its content if everything is there."""
        data = self.base
        for change in self.changes:
            data = data[: change.offset] if change.cuts else _put(data, change.offset, change.data)
        return data


Tears = tuple[int, ...]  # at which bytes a write may be torn; negative ones count from its end, empty means at any
NAMES_MAX: Final = 16  # unsynced changes of names; of more, which may leave 65,536 directories, only `one` tells


class Survivors:
    """What may be left on the disk after a trace, or a beginning of one; moves on with it.

    Files whose name is in `ignoring` are left out, as if they were never made.
    """

    def __init__(self, trace: Iterable[Op] = (), ignoring: Container[str] = ()) -> None:
        self._ignoring = ignoring
        self._files: dict[int, _File] = {}
        self._durable: dict[str, int] = {}  # path -> inode
        self._unsure: list[Op] = []  # changes of names that are not durable
        for op in trace:
            self.apply(op)

    def apply(self, op: Op) -> None:
        """One more operation has come to its end."""
        verb, inode = op.verb, op.inode
        if verb in ("found", "create"):
            if op.path.rpartition("/")[2] in self._ignoring:
                return
            self._files[inode] = _File(op.data)
            if verb == "found":
                self._durable[op.path] = inode
            else:
                self._unsure.append(op)
        elif verb == "sync_directory":
            self._sync_names(op.path)
        elif (file := self._files.get(inode)) is None:
            return  # a mark, or a file that is ignored
        elif verb in ("write", "truncate"):
            file.add(_Change(verb == "truncate", op.offset, op.data))
        elif verb == "sync_data":
            file.sync()
        elif verb == "sync_failed":
            file.fail()
        else:
            self._unsure.append(op)

    def _sync_names(self, directory: str) -> None:
        left: list[Op] = []
        for op in self._unsure:
            if op.path.rpartition("/")[0] == directory:
                self._durable = _renamed(self._durable, op)
            else:
                left.append(op)
        self._unsure = left

    def whole(self) -> State:
        """What is there if everything is: what the death of every process leaves."""
        names = self._durable
        for op in self._unsure:
            names = _renamed(names, op)
        return {path: self._files[inode].whole() for path, inode in names.items()}

    def states(self, tears: Tears = (), torn: int = 1) -> Iterator[State]:
        """Each state that may be left, with at most `torn` files of which a write is torn, and torn at `tears` only.

        States that differ in which file has which name, but not in names and contents, may come twice.
        """
        for names in self._directories():
            variants = [self._variants(self._files[inode], tears) for inode in names.values()]
            for broken in range(min(torn, len(variants)) + 1):
                for chosen in itertools.combinations(range(len(variants)), broken):
                    contents = [variants[index][index in chosen] for index in range(len(variants))]
                    for content in itertools.product(*contents):
                        yield dict(zip(names, content, strict=True))

    def count(self, tears: Tears = (), torn: int = 1) -> int:
        """How many `states` there are, without making them."""
        total = 0
        for names in self._directories():
            sizes = [tuple(map(len, self._variants(self._files[inode], tears))) for inode in names.values()]
            for broken in range(min(torn, len(sizes)) + 1):
                for chosen in itertools.combinations(range(len(sizes)), broken):
                    total += math.prod(size[index in chosen] for index, size in enumerate(sizes))
        return total

    def one(self, chance: Random) -> State:
        """One of the states, by chance: for those that are too many to look at."""
        names = self._durable
        for op in self._unsure:
            if chance.random() < 1 / 2:
                names = _renamed(names, op)
        state: State = {}
        whole = chance.random() < 1 / 2
        for path, inode in names.items():
            file = self._files[inode]
            torn = -1 if whole or not file.changes else chance.randrange(len(file.changes))
            contents = {file.base}
            for index, change in enumerate(file.changes):
                made, made_torn = _after(change, contents, set(), ())
                contents = {chance.choice(sorted(made_torn if index == torn and made_torn else made))}
            whole |= torn >= 0
            state[path] = contents.pop()
        return state

    def admits(self, state: Mapping[str, bytes]) -> bool:
        """Whether a disk that looks like this is what the model says may be left; in any number of files a write is torn."""
        seen = {path: data for path, data in state.items() if path.rpartition("/")[2] not in self._ignoring}
        return any(
            names.keys() == seen.keys() and all(self._may_hold(self._files[names[path]], data) for path, data in seen.items())
            for names in self._directories()
        )

    @property
    def unsure(self) -> int:
        """How many changes of names are not durable; each doubles the directories that may be left."""
        return len(self._unsure)

    def _directories(self) -> Iterable[dict[str, int]]:
        """The names that may be there; each different directory once."""
        if len(self._unsure) > NAMES_MAX:
            raise OverflowError(f"{len(self._unsure)} changes of names without a sync of their directory")
        found = {frozenset(self._durable.items()): self._durable}
        for op in self._unsure:
            for names in list(found.values()):
                changed = _renamed(names, op)
                found.setdefault(frozenset(changed.items()), changed)
        return found.values()

    def _variants(self, file: _File, tears: Tears) -> tuple[list[bytes], list[bytes]]:
        """The contents a file may have: with each write whole, and with one torn."""
        known = file.variants.get(tears)
        if known is None:
            whole, torn = {file.base}, set[bytes]()
            for change in file.changes:
                whole, torn = _after(change, whole, torn, tears)
            known = file.variants[tears] = (sorted(whole), sorted(torn - whole))
        return known

    def _may_hold(self, file: _File, data: bytes) -> bool:
        """Whether a content is among a file's variants, which are too many to list: none is kept that cannot become it."""
        whole, torn = {file.base}, set[bytes]()
        for index, change in enumerate(file.changes):
            whole, torn = _after(change, whole, torn, ())
            # Nothing that follows changes what is ahead of this byte, but by filling gaps with NUL bytes.
            final = min((later.offset for later in file.changes[index + 1 :]), default=len(data) + 1)
            whole = {content for content in whole if _leads_to(content, data, final)}
            torn = {content for content in torn if _leads_to(content, data, final)}
        return data in whole or data in torn


def _renamed(names: dict[str, int], op: Op) -> dict[str, int]:
    """Names with one creation, rename or unlink applied, whatever else is."""
    if op.verb == "create":
        return {**names, op.path: op.inode}
    changed = {path: inode for path, inode in names.items() if inode != op.inode}
    if op.verb == "rename":
        changed[op.target] = op.inode
    return changed


def _put(content: bytes, offset: int, data: bytes) -> bytes:
    return content[:offset].ljust(offset, _NUL) + data + content[offset + len(data) :]


def _after(change: _Change, whole: set[bytes], torn: set[bytes], tears: Tears) -> tuple[set[bytes], set[bytes]]:
    """The contents that may be there after one more change; `torn` are those in which a write is torn already."""
    offset, data = change.offset, change.data
    if change.cuts:
        made, made_torn = ({content[:offset] for content in group} for group in (whole, torn))
    else:
        made, made_torn = ({_put(content, offset, data) for content in group} for group in (whole, torn))
    if change.certain:
        return made, made_torn
    made |= whole
    made_torn |= torn
    if change.cuts:
        made |= {_wiped(content, offset) for content in whole}
        made_torn |= {_wiped(content, offset) for content in torn}
    else:
        end = offset + len(data)
        made |= {content.ljust(end, _NUL) for content in whole}
        made_torn |= {content.ljust(end, _NUL) for content in torn}
        for at in _tears(len(data), tears):
            for content in whole:
                part = _put(content, offset, data[:at])
                made_torn |= {part, part.ljust(end, _NUL), content.ljust(offset + at, _NUL)}
    return made, made_torn


def _wiped(content: bytes, offset: int) -> bytes:
    """What a truncation leaves that wiped the rest of its page in memory, and of which only that page reached the disk."""
    end = min(len(content), -(-offset // _PAGE) * _PAGE)
    return content[:offset] + bytes(max(0, end - offset)) + content[max(offset, end) :]


def _tears(size: int, tears: Tears) -> Sequence[int]:
    """The bytes at which a write of so many may be torn."""
    if not tears:
        return range(1, size)
    return sorted({at % size for at in tears if -size < at < size and at})


def _leads_to(content: bytes, data: bytes, final: int) -> bool:
    """Whether a content can still become `data` when no byte ahead of `final` is written any more."""
    ready = min(len(content), final)
    return data[:ready] == content[:ready] and (len(content) >= final or not data[ready:final].strip(_NUL))
