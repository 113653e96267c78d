"""The directory: listing, sizes, taking and adopting, sealing names, deletion. The only deleter."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import uuid
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout
from pillarbox.store.layout import Kind
from pillarbox.store.recovery import RECOVERABLE, RECOVERY, Action, Lock, Tail, tail_of
from pillarbox.store.usage import tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.dirscan import Entry
    from pillarbox.store.filesystem import Filesystem
    from pillarbox.store.usage import Account

log = logging.getLogger("pillarbox")

# A found stamp further ahead than this is a name that somebody made up, not a clock that was wrong for a while.
_STAMP_AHEAD_MAX: Final = 366 * 86_400 * 1_000_000
# What those who died may have left that is not as it should be: files of these kinds, and copies of files that are still there.
_LEFT: Final = (*layout.patterns_of(*RECOVERABLE), *layout.COPIES)
_CREATIONS_MAX: Final = 100  # in a row that who recovers was quicker to lock; nothing but locks that do not work takes so many
OPEN_MODE: Final = 0o077
VOLATILE_MEDIA: Final = frozenset({"tmpfs", "ramfs"})
NETWORK_MEDIA: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs"})


class Taken(NamedTuple):
    """A file whose lock this process holds, until `fd` is closed."""

    name: str
    fd: int


class Oldest(NamedTuple):
    """Names of sealed files that wait, in order."""

    names: list[str]
    behind: str  # where there are others, they come behind this one; empty where there are none
    last: str  # of all, these and the others


class Adopted(NamedTuple):
    """A dead writer's file that was sealed."""

    found: str
    sealed: str
    bytes: int


class Directory:
    """One outbox directory, or within one the queue of one of several sinks. Safe to share between a process's threads.

    In a queue are second names of files: a file is there for its sink once the outbox directory itself has the name no more.
    """

    def __init__(
        self,
        path: str,
        filesystem: Filesystem,
        clock: Clock,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        *,
        main: Directory | None = None,
        sink: str = "",
    ) -> None:
        self.path = path
        self.main = main  # the outbox directory that this is a queue in
        self.sink = sink  # whose queue
        self.filesystem = filesystem
        self.new_id = new_id  # each differs from all others, of any process
        self._clock = clock
        self._last_stamp = 0
        self._names_unsynced = False  # the sync that follows renaming has failed
        self._has_queues = False  # or is about to have them, as far as was looked
        self.renew()

    def renew(self) -> None:
        """Become another process's: in a forked child, whose names must not meet its parent's, nor its locks."""
        self._stamp_lock = threading.Lock()
        self._recovering = threading.Lock()
        self._turn = threading.Lock()
        self._unique = self.new_id()  # with stamps that strictly increase, one for all names is unique enough

    def at(self, name: str) -> str:
        """The path of a file in the directory."""
        return f"{self.path}/{name}"

    def open(self) -> None:
        """Make sure that the directory is there and can be used; raises `DirectoryUnusableError`."""
        try:
            self.filesystem.make_directory(self.path)
            facts = self.filesystem.directory_facts(self.path)
        except FileExistsError:
            raise DirectoryUnusableError(self.path, "is a file", "name a directory") from None
        except OSError as error:
            raise DirectoryUnusableError(self.path, f"cannot be made: {error.strerror}", "make it, or name another") from None
        if facts is None or not facts.is_directory:
            raise DirectoryUnusableError(self.path, "is not a directory", "name a directory")
        if not facts.usable:
            raise DirectoryUnusableError(
                self.path, "cannot be read and written by this process", "change its owner or mode, or name another"
            )
        if facts.medium in NETWORK_MEDIA:
            raise DirectoryUnusableError(
                self.path,
                f"is on {facts.medium}, over a network, where locks and syncs do not hold what is promised here",
                "name a directory on a local file system",
            )
        if facts.mode & OPEN_MODE:
            log.warning("%s is open to other users (mode %03o); events may be personal: chmod 700", self.path, facts.mode)

    def check_power(self) -> None:
        """Make sure that a sync here means something; raises `DirectoryUnusableError`."""
        facts = self.filesystem.directory_facts(self.path)
        if facts is not None and facts.medium in VOLATILE_MEDIA:
            raise DirectoryUnusableError(
                self.path,
                f'is on {facts.medium}, in memory, where durability "power" cannot be kept',
                'name a directory on a disk, or ask for durability "process"',
            )

    def queue(self, sink: str) -> Directory:
        """The queue of one of several sinks, which may not be there yet."""
        return Directory(self.at(layout.queue_name(sink)), self.filesystem, self._clock, self.new_id, main=self, sink=sink)

    def queues(self) -> list[Directory]:
        """Those that are there, by name; none where there is one sink."""
        if self.main is not None:
            return []
        found = map(layout.sink_of, self.filesystem.subdirectories(self.path))
        return [self.queue(sink) for sink in sorted(sink for sink in found if sink is not None)]

    def asked_for(self) -> set[str]:
        """The sinks whose queues are to be made, and to begin with what waits."""
        found = map(layout.sink_asked_for, self.filesystem.subdirectories(self.path))
        return {sink for sink in found if sink is not None}

    def ask_for(self, sink: str) -> None:
        """Have a queue made that begins with what waits; done twice, it is as done once."""
        self.filesystem.make_directory(self.at(layout.adding_name(sink)))

    def add_queue(self, sink: str) -> list[str]:
        """Make the queue that was asked for, with what waits here or in another one; the names of that.

        Killed anywhere, it is done again from the beginning.
        """
        adding = self.at(layout.adding_name(sink))
        names: dict[str, str] = {}  # by batch, which one queue may have compressed and another not
        for place in (self, *self.queues()):
            for name in place.sealed():
                if names.setdefault(layout.batch_id(name), name) != name:
                    continue
                try:
                    self.filesystem.link(place.at(name), f"{adding}/{name}")
                except FileNotFoundError:
                    del names[layout.batch_id(name)]  # settled, or compressed, just now
                except FileExistsError:
                    pass  # from another queue, or by an earlier attempt
        for name, _ in self.filesystem.listing(adding):
            if layout.batch_id(name) not in names:  # by an earlier attempt, and given up since
                self.remove(f"{layout.adding_name(sink)}/{name}")
        self.filesystem.sync_directory(adding)
        self.filesystem.rename(adding, self.at(layout.queue_name(sink)))
        self.filesystem.sync_directory(self.path)
        return sorted(names.values())

    def remove_queue(self) -> None:
        """Remove this queue with all that is in it. It is none any more at once; killed then, its files are left over."""
        if self.main is None:
            raise ValueError(self.path)
        self.main.remove_as(self.sink, self.path)

    def ask_no_more_for(self, sink: str) -> None:
        """Have no queue made for a sink that one was asked for."""
        self.remove_as(sink, self.at(layout.adding_name(sink)))

    def remove_as(self, sink: str, path: str) -> None:
        """Remove a directory that is a sink's queue, or was to become that."""
        self.finish_removing()  # of an earlier one of that name
        self.filesystem.rename(path, self.at(layout.removing_name(sink)))
        self.filesystem.sync_directory(self.path)
        self.finish_removing()

    def finish_removing(self) -> None:
        """Remove what is left over of queues that were being removed; somebody may be at it just now."""
        for name in filter(layout.is_removing, self.filesystem.subdirectories(self.path)):
            going = self.at(name)
            with contextlib.suppress(FileNotFoundError):
                for file, _ in self.filesystem.listing(going):
                    self.remove(f"{name}/{file}")
                self.filesystem.remove_directory(going)

    def rename_queue(self, sink: str) -> None:
        """Have this queue be another sink's."""
        if self.main is None:
            raise ValueError(self.path)
        self.filesystem.rename(self.path, self.main.at(layout.queue_name(sink)))
        self.filesystem.sync_directory(self.main.path)

    def hand_back(self) -> int:
        """Give what waits in this queue its name in the directory itself again; how many files. The names here go."""
        if self.main is None:
            raise ValueError(self.path)
        names = self.sealed()
        for name in names:
            with contextlib.suppress(FileExistsError):
                self.filesystem.link(self.at(name), self.main.at(name))
        self.filesystem.sync_directory(self.main.path)
        for name in names:
            self.remove(name)
        return len(names)

    def account(self) -> Account:
        """List the directory and its queues once and add up; opens no file."""
        return tally(self.filesystem, self.path, [queue.path for queue in self.queues()])

    def sealed(self) -> list[str]:
        """The names of the sealed files that wait here to be sent, oldest first; of a plain one and its copy, that."""
        names = self.sealed_names()
        if self.main is not None and names:
            # Listed behind the queue: a name that has gone there by then had all its links before.
            names -= self.main.sealed_names()
        return sorted(name for name in names if layout.copied_name(name) not in names)

    def waiting(self) -> set[str]:
        """The batches that wait, here or in a queue; the names of their files may change."""
        # Twice: a listing that runs while a file becomes its compressed copy may show neither, and that happens once to each.
        names = self.sealed_names() | self.sealed_names()
        for queue in self.queues():  # behind the directory: what moves from here to there meanwhile is seen in one of them
            names |= queue.sealed_names() | queue.sealed_names()
        return set(map(layout.batch_id, names))

    def sealed_names(self) -> set[str]:
        """The names of sealed files here, also those that do not count yet."""
        return set(self.filesystem.names(self.path, layout.SEALED))

    def oldest(self, most: int, after: str = "", until: str = "") -> Oldest | None:
        """Of the names that `sealed` tells, the first `most` behind `after` and up to `until`, holding no others in memory.

        None where only `sealed` can tell: what is on its way into this queue does not count yet.
        """
        names, last, files = self.filesystem.first(self.path, layout.SEALED, after, until, most)
        # Listed behind the queue, as in `sealed`.
        if self.main is not None and files and self.main.filesystem.first(self.main.path, layout.SEALED).files:
            return None
        there = {after, *names} - {""}  # a plain file comes before its copy
        behind = names[-1] if len(names) < files and names else ""
        return Oldest([name for name in names if layout.copied_name(name) not in there], behind, last)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.filesystem.is_one(self.at(name), self.at(name))

    @property
    def turn(self) -> threading.Lock:
        """For this process's threads, of all queues, that let go of files and look who else has them."""
        return (self.main or self)._turn  # noqa: SLF001 - of the same class

    def waits_elsewhere(self, file: Taken) -> bool:
        """Whether a file of this queue that this process holds waits for another sink too."""
        others = self.main.queues() if self.main is not None and self.filesystem.is_linked(file.fd) else []
        return any(self.filesystem.is_still(file.fd, queue.at(file.name)) for queue in others if queue.sink != self.sink)

    def take(self, name: str, *, alone: bool = False) -> Taken | None:
        """Lock a found file; None where another holds it or it is gone. Raises `FileUnusableError` for what is not ours.

        In a queue beside others who take it in theirs, unless `alone`.
        """
        path = self.at(name)
        shared = not alone and self.main is not None
        fd = self.filesystem.hold(path, linked=self.main is not None, shared=shared)
        if fd is not None:
            return Taken(name, fd)
        lock = self.filesystem.lock_shared if shared else self.filesystem.lock
        while True:
            try:
                fd = self.open_found(name)
            except FileNotFoundError:
                return None
            try:
                if not lock(fd):
                    break
                if self.filesystem.is_still(fd, path):
                    return Taken(name, fd)
            except BaseException:
                self.filesystem.close(fd)
                raise
            self.filesystem.close(fd)  # renamed or removed between open and lock: look again
        self.filesystem.close(fd)
        return None

    def open_found(self, name: str) -> int:
        """Open a found file to read, without its lock. Raises `FileUnusableError` for what is not ours."""
        path = self.at(name)
        try:
            return self.filesystem.open_existing(path, linked=self.main is not None)
        except FileUnusableError:
            # Listed once: whoever hands over a backlog comes here with each file.
            self._has_queues = self._has_queues or bool(self.queues() or self.asked_for())
            if not self._has_queues:
                raise
        return self.filesystem.open_existing(path, linked=True)  # on its way into the queues

    def take_lock(self, name: str) -> Taken | None:
        """Take a lock file, made where it is missing; None where another process holds it. Raises `FileUnusableError`."""
        path = self.at(name)
        held = self.filesystem.hold(path, writable=True)
        if held is not None:
            return Taken(name, held)
        fd = self.filesystem.open_lock(path)
        try:
            if self.filesystem.lock(fd) and self.filesystem.is_still(fd, path):
                return Taken(name, fd)
        except BaseException:
            self.filesystem.close(fd)
            raise
        self.filesystem.close(fd)
        return None

    def create(self, name: str) -> Taken | None:
        """Create and lock a file; None where somebody who recovers removed it between the two, as a dead writer's."""
        created, error = self.create_each([name])
        if error is not None:
            raise error
        return created[0] if created else None

    def create_each(self, names: Sequence[str]) -> tuple[list[Taken], OSError | None]:
        """Create and lock files, up to the first that fails; without those that somebody who recovers was quicker to remove."""
        fds, error = self.filesystem.create_each([self.at(name) for name in names])
        return [Taken(name, fd) for name, fd in zip(names, fds, strict=False) if fd >= 0], error

    def create_anew(self, name: Callable[[], str]) -> Taken:
        """Create and lock a file under one of the names that `name` makes, each of which was never used."""
        for _ in range(_CREATIONS_MAX):
            taken = self.create(name())
            if taken is not None:
                return taken
        raise OSError(errno.ENOLCK, "a new file cannot be locked: locks do not hold here", self.path)

    def note_stamp(self, stamp: int | None) -> None:
        """Seal after this one from now on, even where the clock has stepped back."""
        with self._stamp_lock:
            if stamp is not None and self._last_stamp < stamp <= self._clock.micros() + _STAMP_AHEAD_MAX:
                self._last_stamp = stamp

    def _next_sealed_name(self, like: str = "") -> str:
        with self._stamp_lock:
            self._last_stamp = max(self._last_stamp + 1, self._clock.micros())
            return layout.sealed_name(self._last_stamp, self._unique, like)

    def delivered(self) -> list[Entry]:
        """The files that are kept after their delivery, the first delivered first."""
        return sorted(entry for entry in self.filesystem.listing(self.path) if layout.kind_of(entry.name) is Kind.DELIVERED)

    def keep(self, name: str) -> str:
        """Have a sealed file that this process holds kept as delivered now; its new name, durable with the next sync."""
        kept = layout.delivered_name(name, self._clock.micros())
        self.filesystem.rename(self.at(name), self.at(kept))
        return kept

    def reseal(self, name: str) -> str | None:
        """Have a delivered file wait again, as a batch of its own; its new name, durable once synced. None: it is gone."""
        anew = self._next_sealed_name(name)
        try:
            self.filesystem.rename(self.at(name), self.at(anew))
        except FileNotFoundError:
            return None
        return anew

    def write_anew(self, file: Taken, kept: Iterable[tuple[int, bytes]] = (), size: int | None = None) -> Taken:
        """Replace a file that this process holds by one of the same name and content, synced, and held likewise.

        Over what can be read of its first `size` bytes goes `kept`: lines in memory, each with its offset. The name is durable
        once the directory is synced. Raises `OSError`; the file is then as it was.
        """
        data = bytearray(self.filesystem.read_all(file.fd)[:size])
        for offset, lines in kept:
            data[offset : offset + len(lines)] = lines
        anew = self._write_aside(file.name, bytes(data))
        self.filesystem.close(file.fd)
        return anew

    def seal(self, ready: Sequence[Taken], renamed: Callable[[Sequence[Taken], Sequence[str]], None]) -> None:
        """Seal files that this process holds and has made durable, in this order: rename all, sync the directory once.

        `renamed(files, sealed names)` is called once these have them, with all of them or up to one with which something went
        wrong; the descriptors stay open, for the caller to close. Raises `OSError`.
        """
        left = list(ready)
        while left:
            names = [self._next_sealed_name() for _ in left]
            done, error = self.filesystem.rename_each([self.at(file.name) for file in left], [self.at(name) for name in names])
            if done:
                renamed(left[:done], names[:done])
            del left[:done]
            if isinstance(error, FileNotFoundError):
                self._write_removed(left[0], names[done])
                renamed(left[:1], names[done : done + 1])
                del left[0]
            elif error is not None:
                raise error
        if ready:
            self._sync_names()

    def _write_removed(self, file: Taken, name: str) -> None:
        """Somebody removed it; what was acknowledged is still in the open file."""
        log.error("%s was removed by somebody; written anew as %s", file.name, name)
        self.filesystem.make_directory(self.path)  # it may have been removed with everything in it
        self.put(name, self.filesystem.read_all(file.fd))

    def finish_sealing(self) -> bool:
        """Sync the directory where that has failed after sealing; whether it was due."""
        due = self._names_unsynced
        if due:
            self._sync_names()
        return due

    def _sync_names(self) -> None:
        self._names_unsynced = False  # before: what another thread fails to sync meanwhile stays due
        try:
            self.filesystem.sync_directory(self.path)
        except OSError:
            self._names_unsynced = True
            raise

    def replace(self, file: Taken, name: str, data: bytes) -> None:
        """Put a compressed copy into the place of a sealed file that this process holds: durable before the other goes."""
        copy = self._write_aside(name, data)
        try:
            self.filesystem.sync_directory(self.path)
            self.remove(file.name)  # where that fails, nobody knows whether it is gone: both stay
        finally:
            self.filesystem.close(copy.fd)

    def remove_copies(self, names: Iterable[str]) -> None:
        """Of each plain file and its compressed copy among these names, keep the plain one, which every reader knows.

        Who makes a copy holds the plain file until that is gone. A copy whose maker has died goes before the plain file
        does, or the batch would be there again.
        """
        found = set(names)
        for name in [name for name in found if layout.copied_name(name) in found]:
            try:
                plain = self.take(layout.copied_name(name))
            except FileUnusableError:
                continue
            if plain is not None:  # or whoever holds it makes the copy, or is done with both
                try:
                    self.remove(name)
                finally:
                    self.filesystem.close(plain.fd)

    def recover(self) -> list[Adopted]:
        """Adopt what dead writers left: seal what holds events, remove what holds none and copies that are not needed.

        One at a time: whoever returns from here finds under its sealed name what another thread was adopting.
        """
        with self._recovering:
            return self._recover()

    def _recover(self) -> list[Adopted]:
        names = list(self.filesystem.names(self.path, _LEFT))
        found = sorted((name for name in names if layout.kind_of(name) in RECOVERABLE), key=layout.by_writer)
        if len(found) < len(names):  # the others are compressed
            self.remove_copies(self.sealed_names())
        to_seal: list[Taken] = []
        adopted: list[Adopted] = []
        held: set[str] = set()  # writers of which somebody has a file: that one comes before the others of the same writer

        def renamed(files: Sequence[Taken], names: Sequence[str]) -> None:
            for file, name in zip(files, names, strict=True):
                adopted.append(Adopted(file.name, name, self.filesystem.size(file.fd)))
                to_seal.remove(file)
            self.filesystem.close_each([file.fd for file in files])

        try:
            for name in found:
                writer, _ = layout.by_writer(name)
                if writer not in held and not self._recover_one(name, to_seal):
                    held.add(writer)
            if to_seal:
                self.note_stamp(self.account().newest_stamp)  # what others sealed since is older, whatever the clock says
            for index, file in enumerate(to_seal):
                to_seal[index] = self._made_durable(file)
            self.seal(to_seal.copy(), renamed)
        finally:
            for file in to_seal:
                self.filesystem.close(file.fd)
        return adopted

    def _made_durable(self, file: Taken) -> Taken:
        """Synced, or written anew where that fails, or as it is: its lines are checked when they are read."""
        try:
            self.filesystem.sync_data(file.fd)
        except OSError as error:
            log.error("%s: the disk did not take it (%s); written anew", file.name, error.strerror)  # noqa: TRY400 - the trace says nothing
        else:
            return file
        try:
            return self.write_anew(file)
        except OSError as error:
            log.error("%s: nor did it take it anew (%s); sealed as it can be read", file.name, error.strerror)  # noqa: TRY400 - the trace says nothing
            return file

    def _recover_one(self, name: str, to_seal: list[Taken]) -> bool:
        """Do with a file what the table says, or have it among those to be sealed; False where another has it."""
        try:
            taken = self.take(name)
        except FileUnusableError as error:
            log.warning("left alone: %s", error)
            return True
        lock = Lock.ANOTHER if taken is None else Lock.NOBODY
        try:
            tail = Tail.EMPTY if taken is None else self._tail(taken)
            action = RECOVERY[layout.kind_of(name), lock, tail]
        except OSError as error:
            log.error("left alone, it cannot be read: %s: %s", name, error)  # noqa: TRY400 - the trace says nothing
            action = Action.LEAVE
        if taken is None:
            return False
        if action is Action.SEAL:
            to_seal.append(taken)
            return True
        try:
            if action is Action.REMOVE:
                self.remove(name)
        finally:
            self.filesystem.close(taken.fd)
        return True

    def _tail(self, taken: Taken) -> Tail:
        size = self.filesystem.size(taken.fd)
        return tail_of(self.filesystem.read_at(taken.fd, size - 1, 1) if size else b"")

    def read_bytes(self, name: str) -> bytes:
        """A small file's content, empty where there is none; takes no lock."""
        try:
            fd = self.filesystem.open_existing(self.at(name))
        except (FileNotFoundError, FileUnusableError):
            return b""
        try:
            return self.filesystem.read_all(fd)
        finally:
            self.filesystem.close(fd)

    def put(self, name: str, data: bytes) -> None:
        """Make `data` the durable content of `name`, whole or not at all; done twice, it is as done once."""
        self.filesystem.close(self._write_aside(name, data).fd)
        self.filesystem.sync_directory(self.path)

    def link_into(self, queue: Directory, file: Taken) -> None:
        """Give a file that this process holds its name in a queue too; done twice, it is as done once."""
        path = queue.at(file.name)
        try:
            self.filesystem.link(self.at(file.name), path)
        except FileExistsError:
            if not self.filesystem.is_still(file.fd, path):
                raise FileUnusableError(path, "is another file than the one that is to wait there") from None

    def _write_aside(self, name: str, data: bytes) -> Taken:
        """Write a file aside, sync it, and rename it to, or over, `name`; held from the beginning."""
        # Never a name twice: who recovers and holds a file that another attempt left would remove this one.
        taken = self.create_anew(lambda: layout.aside_name(name, self.new_id()))
        aside = taken.name
        try:
            self.filesystem.write_all(taken.fd, data)
            self.filesystem.sync_data(taken.fd)
            self.filesystem.rename(self.at(aside), self.at(name))
        except BaseException:
            with contextlib.suppress(OSError):  # otherwise who recovers next removes it
                self.remove(aside)
            self.filesystem.close(taken.fd)
            raise
        return Taken(name, taken.fd)

    def remove(self, name: str) -> None:
        """Delete a file; gone already is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.unlink(self.at(name))
