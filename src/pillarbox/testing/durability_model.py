"""The model of the states that a power loss may leave on a disk. It is weak: real file systems leave fewer states.

`DurabilityModel` reads the trace of a `Disk`, or a prefix of it, and generates each state that a power loss may leave then.

DATA. Each write since the last `sync_data` of the file is lost, applied, or only sized (the file is as long as if it had been
written, with NUL bytes there), independently of the others. At most one write of a file is torn, at any byte: only a prefix of
its data or of the NUL bytes is there, or a prefix of the data followed by NUL bytes to its end. A write that is applied behind
one that is lost leaves NUL bytes in the gap. Each truncation is applied or not, or leaves the old size and NUL bytes from the
cut to the end of its page. `sync_data` makes the data of a file durable, but not its name. All names of a file show the same
data.

FAILED SYNCS. Writes that are not durable when `sync_data` fails are doomed: they stay lost, sized, torn or applied, whatever
later syncs return, because a kernel forgets what it could not write. Later writes are like any others.

NAMES. Each creation, hard link, rename and unlink is atomic. Until `sync_directory` of its directory has returned, it is
applied or not, independently of the others; syncing another directory changes nothing. A rename removes the old name and adds
the new one together; it may be applied although the creation of the file or an earlier rename is not. A link may be applied
although the name that it was made from is not. A creation or a link starts a name, which renames continue and an unlink ends;
neither affects other names of the file. A file without a name is gone. A `sync_directory` that fails leaves the names as
uncertain as before, and a later one that returns is believed: names are in a journal, and a file system whose journal fails
accepts nothing more.

DIRECTORIES. A directory in another one is a name there, as a file is: making, renaming and removing it is uncertain until the
other one is synced, whatever is synced in it, and its content is lost with it. `make_directory` syncs what is above before it
returns, as the real one does; but a process may die between the two, and the next one finds a directory that may disappear. At
the root, where the only name is that of the directory of a test, a directory is durable from the moment it is made.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
    from random import Random

    from pillarbox.testing.crash import Op, State

_NUL: Final = b"\0"
_PAGE: Final = 4096


class _DataChange(NamedTuple):
    """A write or truncation that may or may not be applied."""

    is_truncation: bool
    offset: int
    data: bytes
    certain: bool = False  # only an earlier doomed change prevents it from being part of the durable content


class _File:
    """The states in which a file's data may be left."""

    __slots__ = ("base", "changes", "unsyncable", "variants")

    def __init__(self, data: bytes = b"") -> None:
        self.base = data  # durable
        self.changes: list[_DataChange] = []  # changes since then, in order
        self.unsyncable = 0  # number of changes, from the first, that no sync makes certain
        self.variants: dict[Tears, tuple[list[bytes], list[bytes]]] = {}

    def add(self, change: _DataChange) -> None:
        self.changes.append(change)
        self.variants.clear()

    def sync(self) -> None:
        self.variants.clear()
        if self.unsyncable:
            self.changes[self.unsyncable :] = [change._replace(certain=True) for change in self.changes[self.unsyncable :]]
            return
        self.base = self.complete()
        self.changes.clear()

    def fail_sync(self) -> None:
        # A change that a later sync made certain after a doomed write stays certain, so each change has its own flag.
        self.unsyncable = len(self.changes)

    def complete(self) -> bytes:
        """The content with every change applied."""
        data = self.base
        for change in self.changes:
            data = data[: change.offset] if change.is_truncation else _overwritten(data, change.offset, change.data)
        return data


Tears = tuple[int, ...]  # the bytes at which a write may be torn; negative ones count from its end, empty means all
NAMES_MAX: Final = 16  # unsynced changes of names, which may leave 65,536 directories; beyond it only `random_state` works


class _Name(NamedTuple):
    """An entry of a directory: a name that started with one creation or link, and what it names."""

    lineage: int
    number: int  # of a file, or of a directory


_Key = tuple[int, str]  # the number of a directory, and a name in it
_Names = dict[_Key, _Name]


class _NameChange(NamedTuple):
    """A change of a name that may or may not be applied."""

    name: _Name
    directory: int  # the directory whose sync makes it durable
    key: _Key | None  # where the name is afterwards; None if it is removed


class DurabilityModel:
    """The states that a power loss may leave after a trace, or a prefix of one. The model advances with the trace.

    Files whose name is in `ignoring` are left out, as if they had never been made.
    """

    def __init__(self, trace: Iterable[Op] = (), ignoring: Container[str] = ()) -> None:
        self._ignoring = ignoring
        self._files: dict[int, _File] = {}
        self._roots: dict[int, str] = {}  # directories that always exist; their numbers are negative
        self._directories_by_path: dict[str, int] = {}  # directories as the running system sees them
        self._lineages = itertools.count().__next__
        self._running: _Names = {}
        self._durable: _Names = {}
        self._unsynced: list[_NameChange] = []  # the changes that lead from the one to the other
        for op in trace:
            self.apply(op)

    def apply(self, op: Op) -> None:
        """Apply one more operation, which has completed."""
        verb, inode = op.verb, op.inode
        if verb in ("found", "create", "make_directory"):
            self._apply_creation(op)
        elif verb == "sync_directory":
            self._sync_names(self._directory_number(op.path))
        elif verb in ("rename", "unlink", "remove_directory"):
            self._apply_rename_or_removal(op)
        elif (file := self._files.get(inode)) is None:
            return  # a mark, or a file that is ignored
        elif verb in ("write", "truncate"):
            file.add(_DataChange(verb == "truncate", op.offset, op.data))
        elif verb == "sync_data":
            file.sync()
        elif verb == "sync_failed":
            file.fail_sync()
        else:
            key = self._key(op.target)
            self._apply_name_change(_NameChange(_Name(self._lineages(), inode), key[0], key))

    def _apply_creation(self, op: Op) -> None:
        path = op.path.removesuffix("/")
        key = self._key(path)
        if key[1] in self._ignoring:
            return
        if op.verb == "make_directory" or path != op.path:
            self._directories_by_path[path] = op.inode
        else:
            self._files[op.inode] = _File(op.data)
        name = _Name(self._lineages(), op.inode)
        if op.verb == "found":
            self._durable[key] = self._running[key] = name
        else:
            self._apply_name_change(_NameChange(name, key[0], key))

    def _apply_rename_or_removal(self, op: Op) -> None:
        """Change a name to another, or remove it."""
        key = self._key(op.path)
        if key not in self._running:
            return  # it is ignored
        target = self._key(op.target) if op.verb == "rename" else None
        self._apply_name_change(_NameChange(self._running[key], key[0], target))
        if op.inode in self._files:
            return
        within = op.path + "/"
        for path in [path for path in self._directories_by_path if (path + "/").startswith(within)]:
            inode = self._directories_by_path.pop(path)
            if target:
                self._directories_by_path[op.target + path[len(op.path) :]] = inode

    def _apply_name_change(self, renaming: _NameChange) -> None:
        self._running = _with_name_change(self._running, renaming)
        self._unsynced.append(renaming)

    def _directory_number(self, path: str) -> int:
        """The number of a directory. One that was never made exists from the start."""
        if path not in self._directories_by_path:
            self._directories_by_path[path] = number = -1 - len(self._roots)
            self._roots[number] = path
        return self._directories_by_path[path]

    def _key(self, path: str) -> _Key:
        above, _, name = path.rpartition("/")
        return self._directory_number(above), name

    def _sync_names(self, inode: int) -> None:
        left: list[_NameChange] = []
        for renaming in self._unsynced:
            if renaming.directory == inode:
                self._durable = _with_name_change(self._durable, renaming)
            else:
                left.append(renaming)
        self._unsynced = left

    def complete_state(self) -> State:
        """The state with every change applied, which the death of every process leaves."""
        contents = {number: file.complete() for number, file in self._files.items()}
        return {path: contents.get(number, b"") for path, number in self._paths(self._running).items()}

    def states(self, tears: Tears = (), torn: int = 1) -> Iterator[State]:
        """Each possible state, with a torn write in at most `torn` files, and torn only at `tears`.

        States that differ only in which file has which name, with the same names and contents, may come twice.
        """
        for names in self._possible_names():
            numbers = self._file_numbers(names)
            variants = [self._contents(self._files[number], tears) for number in numbers]
            for broken in range(min(torn, len(variants)) + 1):
                for chosen in itertools.combinations(range(len(variants)), broken):
                    contents = [variants[index][index in chosen] for index in range(len(variants))]
                    for content in itertools.product(*contents):
                        if len(numbers) == len(names):
                            yield dict(zip(names, content, strict=True))
                        else:
                            held = dict(zip(numbers, content, strict=True))
                            yield {path: held.get(number, b"") for path, number in names.items()}

    def count(self, tears: Tears = (), torn: int = 1) -> int:
        """The number of `states`, without making them."""
        total = 0
        for names in self._possible_names():
            sizes = [tuple(map(len, self._contents(self._files[number], tears))) for number in self._file_numbers(names)]
            for broken in range(min(torn, len(sizes)) + 1):
                for chosen in itertools.combinations(range(len(sizes)), broken):
                    total += math.prod(size[index in chosen] for index, size in enumerate(sizes))
        return total

    def random_state(self, chance: Random) -> State:
        """A random state, for traces with too many states to check."""
        kept = self._durable
        for renaming in self._unsynced:
            if chance.random() < 1 / 2:
                kept = _with_name_change(kept, renaming)
        names = self._paths(kept)
        held: dict[int, bytes] = {}
        whole = chance.random() < 1 / 2
        for number in self._file_numbers(names):
            file = self._files[number]
            torn = -1 if whole or not file.changes else chance.randrange(len(file.changes))
            contents = {file.base}
            for index, change in enumerate(file.changes):
                made, made_torn = _contents_after(change, contents, set(), ())
                contents = {chance.choice(sorted(made_torn if index == torn and made_torn else made))}
            whole |= torn >= 0
            held[number] = contents.pop()
        return {path: held.get(number, b"") for path, number in names.items()}

    def admits(self, state: Mapping[str, bytes]) -> bool:
        """Whether the model allows this state, with torn writes in any number of files."""
        seen = {path: data for path, data in state.items() if path.rpartition("/")[2] not in self._ignoring}
        return any(names.keys() == seen.keys() and self._may_be(names, seen) for names in self._possible_names())

    def _may_be(self, names: dict[str, int], seen: State) -> bool:
        held = {number: seen[path] for path, number in names.items()}
        return all(
            held[number] == data and (self._may_hold(self._files[number], data) if number in self._files else not data)
            for number, data in ((names[path], data) for path, data in seen.items())
        )

    @property
    def unsynced_names(self) -> int:
        """The number of changes of names that are not durable; each doubles the number of possible directories."""
        return len(self._unsynced)

    def _possible_names(self) -> Iterable[dict[str, int]]:
        """The names that may exist, with the file or directory of each; each different directory once."""
        if len(self._unsynced) > NAMES_MAX:
            raise OverflowError(f"{len(self._unsynced)} changes of names without a sync of their directory")
        found = {frozenset(self._durable.items()): self._durable}
        for renaming in self._unsynced:
            for names in list(found.values()):
                changed = _with_name_change(names, renaming)
                found.setdefault(frozenset(changed.items()), changed)
        told_apart = {frozenset(paths.items()): paths for paths in map(self._paths, found.values())}
        return told_apart.values()

    def _paths(self, names: _Names) -> dict[str, int]:
        """The paths that can be reached. That of a directory ends with a slash."""
        above = {number: key for key, (_, number) in names.items() if number not in self._files}
        places: dict[int, str | None] = dict(self._roots)

        def path_of(number: int) -> str | None:
            if number not in places:
                key = above.get(number)
                holder = None if key is None else path_of(key[0])
                places[number] = None if key is None or holder is None else f"{holder}/{key[1]}"
            return places[number]

        paths: dict[str, int] = {}
        for (number, last), name in names.items():
            if (holder := path_of(number)) is not None:
                paths[f"{holder}/{last}" if name.number in self._files else f"{holder}/{last}/"] = name.number
        return paths

    def _file_numbers(self, names: dict[str, int]) -> list[int]:
        """The numbers of the files among these names, each once."""
        return [number for number in dict.fromkeys(names.values()) if number in self._files]

    def _contents(self, file: _File, tears: Tears) -> tuple[list[bytes], list[bytes]]:
        """The contents that a file may have: with every write whole, and with one torn."""
        known = file.variants.get(tears)
        if known is None:
            whole, torn = {file.base}, set[bytes]()
            for change in file.changes:
                whole, torn = _contents_after(change, whole, torn, tears)
            known = file.variants[tears] = (sorted(whole), sorted(torn - whole))
        return known

    def _may_hold(self, file: _File, data: bytes) -> bool:
        """Whether a file may have a content. If there are too many to list, drops those that cannot become this one."""
        whole, torn = {file.base}, set[bytes]()
        for index, change in enumerate(file.changes):
            whole, torn = _contents_after(change, whole, torn, ())
            # Later changes do not change the bytes before this one, except by filling gaps with NUL bytes.
            final = min((later.offset for later in file.changes[index + 1 :]), default=len(data) + 1)
            whole = {content for content in whole if _can_become(content, data, final)}
            torn = {content for content in torn if _can_become(content, data, final)}
        return data in whole or data in torn


def _with_name_change(names: _Names, renaming: _NameChange) -> _Names:
    """The names after one change."""
    lineage = renaming.name.lineage
    changed = {key: name for key, name in names.items() if name.lineage != lineage}
    if renaming.key is not None:
        changed[renaming.key] = renaming.name
    return changed


def _overwritten(content: bytes, offset: int, data: bytes) -> bytes:
    return content[:offset].ljust(offset, _NUL) + data + content[offset + len(data) :]


def _contents_after(change: _DataChange, whole: set[bytes], torn: set[bytes], tears: Tears) -> tuple[set[bytes], set[bytes]]:
    """The contents that may be left after one more change; in those of `torn` a write is torn already."""
    offset, data = change.offset, change.data
    if change.is_truncation:
        made, made_torn = ({content[:offset] for content in group} for group in (whole, torn))
    else:
        made, made_torn = ({_overwritten(content, offset, data) for content in group} for group in (whole, torn))
    if change.certain:
        return made, made_torn
    made |= whole
    made_torn |= torn
    if change.is_truncation:
        made |= {_zeroed_to_page_end(content, offset) for content in whole}
        made_torn |= {_zeroed_to_page_end(content, offset) for content in torn}
    else:
        end = offset + len(data)
        made |= {content.ljust(end, _NUL) for content in whole}
        made_torn |= {content.ljust(end, _NUL) for content in torn}
        for at in _tear_offsets(len(data), tears):
            for content in whole:
                part = _overwritten(content, offset, data[:at])
                made_torn |= {part, part.ljust(end, _NUL), content.ljust(offset + at, _NUL)}
    return made, made_torn


def _zeroed_to_page_end(content: bytes, offset: int) -> bytes:
    """The content after a truncation that zeroed the rest of its page in memory, if only that page reached the disk."""
    end = min(len(content), -(-offset // _PAGE) * _PAGE)
    return content[:offset] + bytes(max(0, end - offset)) + content[max(offset, end) :]


def _tear_offsets(size: int, tears: Tears) -> Sequence[int]:
    """The bytes at which a write of this size may be torn."""
    if not tears:
        return range(1, size)
    return sorted({at % size for at in tears if -size < at < size and at})


def _can_become(content: bytes, data: bytes, final: int) -> bool:
    """Whether a content can still become `data` if no byte before `final` is written any more."""
    ready = min(len(content), final)
    return data[:ready] == content[:ready] and (len(content) >= final or not data[ready:final].strip(_NUL))
