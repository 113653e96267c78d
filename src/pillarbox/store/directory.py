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
from pillarbox.store.recovery import RECOVERABLE_KINDS, RECOVERY, FileTail, LockState, RecoveryAction, tail_of
from pillarbox.store.usage import measure_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.dirscan import FileEntry
    from pillarbox.store.filesystem import Filesystem
    from pillarbox.store.usage import DiskUsage

log = logging.getLogger("pillarbox")

# A found stamp further ahead than this is a name that somebody made up, not a clock that was wrong for a while.
_SEALED_AT_AHEAD_MAX_MICROS: Final = 366 * 86_400 * 1_000_000
# What those who died may have left that is not as it should be: files of these kinds, and copies of files that are still there.
_RECOVERY_PATTERNS: Final = (*layout.patterns_of(*RECOVERABLE_KINDS), *layout.COMPRESSED_PATTERNS)
_CREATE_ATTEMPTS_MAX: Final = (
    100  # in a row that who recovers was quicker to lock; nothing but locks that do not work takes so many
)
OTHERS_MASK: Final = 0o077
VOLATILE_FILESYSTEMS: Final = frozenset({"tmpfs", "ramfs"})
NETWORK_FILESYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs"})


class LockedFile(NamedTuple):
    """A file whose lock this process holds, until `fd` is closed."""

    name: str
    fd: int


class BatchPage(NamedTuple):
    """Names of sealed files that wait, in order."""

    names: list[str]
    next_after: str  # where there are others, they come behind this one; empty where there are none
    last: str  # of all, these and the others


class AdoptedFile(NamedTuple):
    """A dead writer's file that was sealed."""

    active_name: str
    sealed_name: str
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
        parent: Directory | None = None,
        sink: str = "",
    ) -> None:
        self.path = path
        self.parent = parent  # the outbox directory that this is a queue in
        self.sink = sink  # whose queue
        self.filesystem = filesystem
        self.new_id = new_id  # each differs from all others, of any process
        self._clock = clock
        self._last_sealed_at = 0
        self._names_unsynced = False  # the sync that follows renaming has failed
        self._has_queues = False  # or is about to have them, as far as was looked
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Become another process's: in a forked child, whose names must not meet its parent's, nor its locks."""
        self._sealed_at_lock = threading.Lock()
        self._recovery_lock = threading.Lock()
        self._release_lock = threading.Lock()
        self._name_suffix = self.new_id()  # with stamps that strictly increase, one for all names is unique enough

    def path_of(self, name: str) -> str:
        """The path of a file in the directory."""
        return f"{self.path}/{name}"

    def ensure_usable(self) -> None:
        """Make sure that the directory is there and can be used; raises `DirectoryUnusableError`."""
        try:
            self.filesystem.make_directory(self.path)
            facts = self.filesystem.inspect_directory(self.path)
        except FileExistsError:
            raise DirectoryUnusableError(self.path, "is a file", "name a directory") from None
        except OSError as error:
            raise DirectoryUnusableError(self.path, f"cannot be made: {error.strerror}", "make it, or name another") from None
        if facts is None or not facts.is_directory:
            raise DirectoryUnusableError(self.path, "is not a directory", "name a directory")
        if not facts.is_usable:
            raise DirectoryUnusableError(
                self.path, "cannot be read and written by this process", "change its owner or mode, or name another"
            )
        if facts.filesystem_type in NETWORK_FILESYSTEMS:
            raise DirectoryUnusableError(
                self.path,
                f"is on {facts.filesystem_type}, over a network, where locks and syncs do not hold what is promised here",
                "name a directory on a local file system",
            )
        if facts.mode & OTHERS_MASK:
            log.warning("%s is open to other users (mode %03o); events may be personal: chmod 700", self.path, facts.mode)

    def check_power_durability(self) -> None:
        """Make sure that a sync here means something; raises `DirectoryUnusableError`."""
        facts = self.filesystem.inspect_directory(self.path)
        if facts is not None and facts.filesystem_type in VOLATILE_FILESYSTEMS:
            raise DirectoryUnusableError(
                self.path,
                f'is on {facts.filesystem_type}, in memory, where durability "power" cannot be kept',
                'name a directory on a disk, or ask for durability "process"',
            )

    def queue(self, sink: str) -> Directory:
        """The queue of one of several sinks, which may not be there yet."""
        path = self.path_of(layout.queue_name(sink))
        return Directory(path, self.filesystem, self._clock, self.new_id, parent=self, sink=sink)

    def queues(self) -> list[Directory]:
        """Those that are there, by name; none where there is one sink."""
        if self.parent is not None:
            return []
        found = map(layout.sink_of_queue, self.filesystem.subdirectories(self.path))
        return [self.queue(sink) for sink in sorted(sink for sink in found if sink is not None)]

    def requested_queues(self) -> set[str]:
        """The sinks whose queues are to be made, and to begin with what waits."""
        found = map(layout.sink_of_adding, self.filesystem.subdirectories(self.path))
        return {sink for sink in found if sink is not None}

    def request_queue(self, sink: str) -> None:
        """Have a queue made that begins with what waits; done twice, it is as done once."""
        self.filesystem.make_directory(self.path_of(layout.adding_name(sink)))

    def create_requested_queue(self, sink: str) -> list[str]:
        """Make the queue that was asked for, with what waits here or in another one; the names of that.

        Killed anywhere, it is done again from the beginning.
        """
        adding = self.path_of(layout.adding_name(sink))
        names: dict[str, str] = {}  # by batch, which one queue may have compressed and another not
        for place in (self, *self.queues()):
            for name in place.batch_names():
                if names.setdefault(layout.batch_id(name), name) != name:
                    continue
                try:
                    self.filesystem.link(place.path_of(name), f"{adding}/{name}")
                except FileNotFoundError:
                    del names[layout.batch_id(name)]  # settled, or compressed, just now
                except FileExistsError:
                    pass  # from another queue, or by an earlier attempt
        for name, _ in self.filesystem.list_files(adding):
            if layout.batch_id(name) not in names:  # by an earlier attempt, and given up since
                self.remove(f"{layout.adding_name(sink)}/{name}")
        self.filesystem.sync_directory(adding)
        self.filesystem.rename(adding, self.path_of(layout.queue_name(sink)))
        self.filesystem.sync_directory(self.path)
        return sorted(names.values())

    def remove_queue(self) -> None:
        """Remove this queue with all that is in it. It is none any more at once; killed then, its files are left over."""
        if self.parent is None:
            raise ValueError(self.path)
        self.parent.remove_queue_directory(self.sink, self.path)

    def cancel_queue_request(self, sink: str) -> None:
        """Have no queue made for a sink that one was asked for."""
        self.remove_queue_directory(sink, self.path_of(layout.adding_name(sink)))

    def remove_queue_directory(self, sink: str, path: str) -> None:
        """Remove a directory that is a sink's queue, or was to become that."""
        self.finish_queue_removals()  # of an earlier one of that name
        self.filesystem.rename(path, self.path_of(layout.removing_name(sink)))
        self.filesystem.sync_directory(self.path)
        self.finish_queue_removals()

    def finish_queue_removals(self) -> None:
        """Remove what is left over of queues that were being removed; somebody may be at it just now."""
        for name in filter(layout.is_removing_name, self.filesystem.subdirectories(self.path)):
            going = self.path_of(name)
            with contextlib.suppress(FileNotFoundError):
                for file, _ in self.filesystem.list_files(going):
                    self.remove(f"{name}/{file}")
                self.filesystem.remove_directory(going)

    def rename_queue(self, sink: str) -> None:
        """Have this queue be another sink's."""
        if self.parent is None:
            raise ValueError(self.path)
        self.filesystem.rename(self.path, self.parent.path_of(layout.queue_name(sink)))
        self.filesystem.sync_directory(self.parent.path)

    def return_batches(self) -> int:
        """Give what waits in this queue its name in the directory itself again; how many files. The names here go."""
        if self.parent is None:
            raise ValueError(self.path)
        names = self.batch_names()
        for name in names:
            with contextlib.suppress(FileExistsError):
                self.filesystem.link(self.path_of(name), self.parent.path_of(name))
        self.filesystem.sync_directory(self.parent.path)
        for name in names:
            self.remove(name)
        return len(names)

    def disk_usage(self) -> DiskUsage:
        """List the directory and its queues once and add up; opens no file."""
        return measure_usage(self.filesystem, self.path, [queue.path for queue in self.queues()])

    def batch_names(self) -> list[str]:
        """The names of the sealed files that wait here to be sent, oldest first; of a plain one and its copy, that."""
        names = self.all_sealed_names()
        if self.parent is not None and names:
            # Listed behind the queue: a name that has gone there by then had all its links before.
            names -= self.parent.all_sealed_names()
        return sorted(name for name in names if layout.plain_name(name) not in names)

    def waiting_batch_ids(self) -> set[str]:
        """The batches that wait, here or in a queue; the names of their files may change."""
        # Twice: a listing that runs while a file becomes its compressed copy may show neither, and that happens once to each.
        names = self.all_sealed_names() | self.all_sealed_names()
        for queue in self.queues():  # behind the directory: what moves from here to there meanwhile is seen in one of them
            names |= queue.all_sealed_names() | queue.all_sealed_names()
        return set(map(layout.batch_id, names))

    def all_sealed_names(self) -> set[str]:
        """The names of sealed files here, also those that do not count yet."""
        return set(self.filesystem.list_names(self.path, layout.SEALED_PATTERNS))

    def oldest_batches(self, limit: int, after: str = "", until: str = "") -> BatchPage | None:
        """Of the names that `sealed` tells, the first `limit` behind `after` and up to `until`, holding no others in memory.

        None where only `sealed` can tell: what is on its way into this queue does not count yet.
        """
        names, last, files = self.filesystem.first_names(self.path, layout.SEALED_PATTERNS, after, until, limit)
        # Listed behind the queue, as in `sealed`.
        outbox = self.parent
        if outbox is not None and files and outbox.filesystem.first_names(outbox.path, layout.SEALED_PATTERNS).total_files:
            return None
        there = {after, *names} - {""}  # a plain file comes before its copy
        behind = names[-1] if len(names) < files and names else ""
        return BatchPage([name for name in names if layout.plain_name(name) not in there], behind, last)

    def contains(self, name: str) -> bool:
        """Whether a file is there."""
        return self.filesystem.is_same_file(self.path_of(name), self.path_of(name))

    @property
    def release_lock(self) -> threading.Lock:
        """For this process's threads, of all queues, that let go of files and look who else has them."""
        return (self.parent or self)._release_lock  # noqa: SLF001 - of the same class

    def is_queued_elsewhere(self, file: LockedFile) -> bool:
        """Whether a file of this queue that this process holds waits for another sink too."""
        others = self.parent.queues() if self.parent is not None and self.filesystem.has_name(file.fd) else []
        return any(self.filesystem.is_file_at(file.fd, queue.path_of(file.name)) for queue in others if queue.sink != self.sink)

    def lock_existing(self, name: str, *, exclusive: bool = False) -> LockedFile | None:
        """Lock a found file; None where another holds it or it is gone. Raises `FileUnusableError` for what is not ours.

        In a queue beside others who take it in theirs, unless `exclusive`.
        """
        path = self.path_of(name)
        shared = not exclusive and self.parent is not None
        fd = self.filesystem.open_locked(path, allow_links=self.parent is not None, shared=shared)
        if fd is not None:
            return LockedFile(name, fd)
        lock = self.filesystem.lock_shared if shared else self.filesystem.lock
        while True:
            try:
                fd = self.open_existing(name)
            except FileNotFoundError:
                return None
            try:
                if not lock(fd):
                    break
                if self.filesystem.is_file_at(fd, path):
                    return LockedFile(name, fd)
            except BaseException:
                self.filesystem.close(fd)
                raise
            self.filesystem.close(fd)  # renamed or removed between open and lock: look again
        self.filesystem.close(fd)
        return None

    def open_existing(self, name: str) -> int:
        """Open a found file to read, without its lock. Raises `FileUnusableError` for what is not ours."""
        path = self.path_of(name)
        try:
            return self.filesystem.open_existing(path, allow_links=self.parent is not None)
        except FileUnusableError:
            # Listed once: whoever hands over a backlog comes here with each file.
            self._has_queues = self._has_queues or bool(self.queues() or self.requested_queues())
            if not self._has_queues:
                raise
        return self.filesystem.open_existing(path, allow_links=True)  # on its way into the queues

    def acquire_lock_file(self, name: str) -> LockedFile | None:
        """Take a lock file, made where it is missing; None where another process holds it. Raises `FileUnusableError`."""
        path = self.path_of(name)
        held = self.filesystem.open_locked(path, writable=True)
        if held is not None:
            return LockedFile(name, held)
        fd = self.filesystem.open_lock_file(path)
        try:
            if self.filesystem.lock(fd) and self.filesystem.is_file_at(fd, path):
                return LockedFile(name, fd)
        except BaseException:
            self.filesystem.close(fd)
            raise
        self.filesystem.close(fd)
        return None

    def create(self, name: str) -> LockedFile | None:
        """Create and lock a file; None where somebody who recovers removed it between the two, as a dead writer's."""
        created, error = self.create_each([name])
        if error is not None:
            raise error
        return created[0] if created else None

    def create_each(self, names: Sequence[str]) -> tuple[list[LockedFile], OSError | None]:
        """Create and lock files, up to the first that fails; without those that somebody who recovers was quicker to remove."""
        fds, error = self.filesystem.create_each([self.path_of(name) for name in names])
        return [LockedFile(name, fd) for name, fd in zip(names, fds, strict=False) if fd >= 0], error

    def create_with_new_name(self, new_name: Callable[[], str]) -> LockedFile:
        """Create and lock a file under one of the names that `new_name` makes, each of which was never used."""
        for _ in range(_CREATE_ATTEMPTS_MAX):
            taken = self.create(new_name())
            if taken is not None:
                return taken
        raise OSError(errno.ENOLCK, "a new file cannot be locked: locks do not hold here", self.path)

    def seal_after(self, micros: int | None) -> None:
        """Seal after this one from now on, even where the clock has stepped back."""
        with self._sealed_at_lock:
            if micros is not None and self._last_sealed_at < micros <= self._clock.micros() + _SEALED_AT_AHEAD_MAX_MICROS:
                self._last_sealed_at = micros

    def _next_sealed_name(self, like: str = "") -> str:
        with self._sealed_at_lock:
            self._last_sealed_at = max(self._last_sealed_at + 1, self._clock.micros())
            return layout.sealed_name(self._last_sealed_at, self._name_suffix, like)

    def delivered_files(self) -> list[FileEntry]:
        """The files that are kept after their delivery, the first delivered first."""
        return sorted(entry for entry in self.filesystem.list_files(self.path) if layout.kind_of(entry.name) is Kind.DELIVERED)

    def retain(self, name: str) -> str:
        """Have a sealed file that this process holds kept as delivered now; its new name, durable with the next sync."""
        kept = layout.delivered_name(name, self._clock.micros())
        self.filesystem.rename(self.path_of(name), self.path_of(kept))
        return kept

    def reseal(self, name: str) -> str | None:
        """Have a delivered file wait again, as a batch of its own; its new name, durable once synced. None: it is gone."""
        anew = self._next_sealed_name(name)
        try:
            self.filesystem.rename(self.path_of(name), self.path_of(anew))
        except FileNotFoundError:
            return None
        return anew

    def rewrite(self, file: LockedFile, in_memory: Iterable[tuple[int, bytes]] = (), size: int | None = None) -> LockedFile:
        """Replace a file that this process holds by one of the same name and content, synced, and held likewise.

        Over what can be read of its first `size` bytes goes `in_memory`: lines, each with its offset. The name is durable
        once the directory is synced. Raises `OSError`; the file is then as it was.
        """
        data = bytearray(self.filesystem.read_all(file.fd)[:size])
        for offset, lines in in_memory:
            data[offset : offset + len(lines)] = lines
        anew = self._write_and_rename(file.name, bytes(data))
        self.filesystem.close(file.fd)
        return anew

    def seal(self, files: Sequence[LockedFile], on_renamed: Callable[[Sequence[LockedFile], Sequence[str]], None]) -> None:
        """Seal files that this process holds and has made durable, in this order: rename all, sync the directory once.

        `renamed(files, sealed names)` is called once these have them, with all of them or up to one with which something went
        wrong; the descriptors stay open, for the caller to close. Raises `OSError`.
        """
        left = list(files)
        while left:
            names = [self._next_sealed_name() for _ in left]
            done, error = self.filesystem.rename_each(
                [self.path_of(file.name) for file in left], [self.path_of(name) for name in names]
            )
            if done:
                on_renamed(left[:done], names[:done])
            del left[:done]
            if isinstance(error, FileNotFoundError):
                self._recreate_deleted(left[0], names[done])
                on_renamed(left[:1], names[done : done + 1])
                del left[0]
            elif error is not None:
                raise error
        if files:
            self._sync_names()

    def _recreate_deleted(self, file: LockedFile, name: str) -> None:
        """Somebody removed it; what was acknowledged is still in the open file."""
        log.error("%s was removed by somebody; written anew as %s", file.name, name)
        self.filesystem.make_directory(self.path)  # it may have been removed with everything in it
        self.write_atomically(name, self.filesystem.read_all(file.fd))

    def retry_name_sync(self) -> bool:
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

    def replace_with_compressed(self, file: LockedFile, name: str, data: bytes) -> None:
        """Put a compressed copy into the place of a sealed file that this process holds: durable before the other goes."""
        copy = self._write_and_rename(name, data)
        try:
            self.filesystem.sync_directory(self.path)
            self.remove(file.name)  # where that fails, nobody knows whether it is gone: both stay
        finally:
            self.filesystem.close(copy.fd)

    def remove_stale_copies(self, names: Iterable[str]) -> None:
        """Of each plain file and its compressed copy among these names, keep the plain one, which every reader knows.

        Who makes a copy holds the plain file until that is gone. A copy whose maker has died goes before the plain file
        does, or the batch would be there again.
        """
        found = set(names)
        for name in [name for name in found if layout.plain_name(name) in found]:
            try:
                plain = self.lock_existing(layout.plain_name(name))
            except FileUnusableError:
                continue
            if plain is not None:  # or whoever holds it makes the copy, or is done with both
                try:
                    self.remove(name)
                finally:
                    self.filesystem.close(plain.fd)

    def recover(self) -> list[AdoptedFile]:
        """Adopt what dead writers left: seal what holds events, remove what holds none and copies that are not needed.

        One at a time: whoever returns from here finds under its sealed name what another thread was adopting.
        """
        with self._recovery_lock:
            return self._recover()

    def _recover(self) -> list[AdoptedFile]:
        names = list(self.filesystem.list_names(self.path, _RECOVERY_PATTERNS))
        found = sorted((name for name in names if layout.kind_of(name) in RECOVERABLE_KINDS), key=layout.active_sort_key)
        if len(found) < len(names):  # the others are compressed
            self.remove_stale_copies(self.all_sealed_names())
        to_seal: list[LockedFile] = []
        adopted: list[AdoptedFile] = []
        held: set[str] = set()  # writers of which somebody has a file: that one comes before the others of the same writer

        def renamed(files: Sequence[LockedFile], names: Sequence[str]) -> None:
            for file, name in zip(files, names, strict=True):
                adopted.append(AdoptedFile(file.name, name, self.filesystem.size(file.fd)))
                to_seal.remove(file)
            self.filesystem.close_each([file.fd for file in files])

        try:
            for name in found:
                writer, _ = layout.active_sort_key(name)
                if writer not in held and not self._recover_file(name, to_seal):
                    held.add(writer)
            if to_seal:
                # what others sealed since is older, whatever the clock says
                self.seal_after(self.disk_usage().newest_sealed_at)
            for index, file in enumerate(to_seal):
                to_seal[index] = self._sync_or_rewrite(file)
            self.seal(to_seal.copy(), renamed)
        finally:
            for file in to_seal:
                self.filesystem.close(file.fd)
        return adopted

    def _sync_or_rewrite(self, file: LockedFile) -> LockedFile:
        """Synced, or written anew where that fails, or as it is: its lines are checked when they are read."""
        try:
            self.filesystem.sync_data(file.fd)
        except OSError as error:
            log.error("%s: the disk did not take it (%s); written anew", file.name, error.strerror)  # noqa: TRY400 - the trace says nothing
        else:
            return file
        try:
            return self.rewrite(file)
        except OSError as error:
            log.error("%s: nor did it take it anew (%s); sealed as it can be read", file.name, error.strerror)  # noqa: TRY400 - the trace says nothing
            return file

    def _recover_file(self, name: str, to_seal: list[LockedFile]) -> bool:
        """Do with a file what the table says, or have it among those to be sealed; False where another has it."""
        try:
            taken = self.lock_existing(name)
        except FileUnusableError as error:
            log.warning("left alone: %s", error)
            return True
        lock = LockState.ANOTHER if taken is None else LockState.NOBODY
        try:
            tail = FileTail.EMPTY if taken is None else self._tail(taken)
            action = RECOVERY[layout.kind_of(name), lock, tail]
        except OSError as error:
            log.error("left alone, it cannot be read: %s: %s", name, error)  # noqa: TRY400 - the trace says nothing
            action = RecoveryAction.LEAVE
        if taken is None:
            return False
        if action is RecoveryAction.SEAL:
            to_seal.append(taken)
            return True
        try:
            if action is RecoveryAction.REMOVE:
                self.remove(name)
        finally:
            self.filesystem.close(taken.fd)
        return True

    def _tail(self, taken: LockedFile) -> FileTail:
        size = self.filesystem.size(taken.fd)
        return tail_of(self.filesystem.read_at(taken.fd, size - 1, 1) if size else b"")

    def read_small_file(self, name: str) -> bytes:
        """A small file's content, empty where there is none; takes no lock."""
        try:
            fd = self.filesystem.open_existing(self.path_of(name))
        except (FileNotFoundError, FileUnusableError):
            return b""
        try:
            return self.filesystem.read_all(fd)
        finally:
            self.filesystem.close(fd)

    def write_atomically(self, name: str, data: bytes) -> None:
        """Make `data` the durable content of `new_name`, whole or not at all; done twice, it is as done once."""
        self.filesystem.close(self._write_and_rename(name, data).fd)
        self.filesystem.sync_directory(self.path)

    def link_into(self, queue: Directory, file: LockedFile) -> None:
        """Give a file that this process holds its name in a queue too; done twice, it is as done once."""
        path = queue.path_of(file.name)
        try:
            self.filesystem.link(self.path_of(file.name), path)
        except FileExistsError:
            if not self.filesystem.is_file_at(file.fd, path):
                raise FileUnusableError(path, "is another file than the one that is to wait there") from None

    def _write_and_rename(self, name: str, data: bytes) -> LockedFile:
        """Write a file aside, sync it, and rename it to, or over, `new_name`; held from the beginning."""
        # Never a name twice: who recovers and holds a file that another attempt left would remove this one.
        taken = self.create_with_new_name(lambda: layout.temporary_name(name, self.new_id()))
        aside = taken.name
        try:
            self.filesystem.write_all(taken.fd, data)
            self.filesystem.sync_data(taken.fd)
            self.filesystem.rename(self.path_of(aside), self.path_of(name))
        except BaseException:
            with contextlib.suppress(OSError):  # otherwise who recovers next removes it
                self.remove(aside)
            self.filesystem.close(taken.fd)
            raise
        return LockedFile(name, taken.fd)

    def remove(self, name: str) -> None:
        """Delete a file; gone already is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.unlink(self.path_of(name))
