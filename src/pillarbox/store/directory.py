"""The outbox directory: names, locks, sealing, recovery and deletion. No other module renames or deletes files."""

from __future__ import annotations

import contextlib
import errno
import logging
import uuid
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout
from pillarbox.store.dirscan import TIMESTAMP_MAX_MICROS
from pillarbox.store.file_parts import parts_of
from pillarbox.store.filesystem import concerns_one_file, is_full
from pillarbox.store.layout import Kind
from pillarbox.store.usage import measure_usage
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.dirscan import FileEntry
    from pillarbox.store.filesystem import Filesystem
    from pillarbox.store.usage import DiskUsage

log = logging.getLogger("pillarbox")

# 1 January 2100, in microseconds since 1970: the latest time from the clock that is used as a seal time.
# `TIMESTAMP_MAX_MICROS` is a year later, so that later seal times still sort after existing ones.
_SEALED_AT_MAX_MICROS: Final = 4_102_444_800_000_000
_CREATE_ATTEMPTS_MAX: Final = (
    100  # consecutive attempts in which recovery was quicker to lock the new file; only locks that do not work take so many
)
T = TypeVar("T")

OTHERS_MASK: Final = 0o077
_COMPARE_BYTES: Final = 1 << 20  # bytes of each of two files that are in memory at a time
VOLATILE_FILESYSTEMS: Final = frozenset({"tmpfs", "ramfs"})
NETWORK_FILESYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs"})


class LockedFile(NamedTuple):
    """A file whose lock this process holds, until `fd` is closed."""

    name: str
    fd: int


class BatchPage(NamedTuple):
    """Names of batch files, in order."""

    names: list[str]
    next_after: str  # the last name of this page if others follow it; otherwise empty
    last: str  # the last name on any page


class Directory:
    """An outbox directory, or the queue of one of its sinks. Shared by the threads of a process.

    A queue has hard links to batch files. A link counts once the outbox directory itself no longer has the name.
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
        self.parent = parent  # the outbox directory, if this is a queue
        self.sink = sink  # the sink that the queue is for
        self.filesystem = filesystem
        self.new_id = new_id  # returns ids that are unique among all processes
        self._clock = clock
        self._last_sealed_at = 0
        self._names_unsynced = False  # the sync after renaming has failed
        self._has_queues = False  # queues exist or were requested; once True it is not checked again
        # removes spares or a retained batch on a full volume; returns whether anything was removed
        self.reclaim_space: Callable[[], bool] = lambda: False
        self._logged_skips: dict[str, str] = {}  # files that recovery cannot use, with the problem
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """In a forked child: make new locks, and a new suffix, so that names differ from the parent's."""
        self._sealed_at_lock = threads.Lock()
        self.recovery_lock = threads.Lock()  # held by `recovery.recover`: one thread at a time
        self._release_lock = threads.Lock()
        self._name_suffix = self.new_id()  # with strictly increasing timestamps, one suffix for all names is enough

    def path_of(self, name: str) -> str:
        """The path of a file in the directory."""
        return f"{self.path}/{name}"

    def ensure_usable(self) -> None:
        """Create the directory if it is missing, and check that it can be used. Raises `DirectoryUnusableError`."""
        try:
            self.filesystem.make_directory(self.path)
            facts = self.filesystem.inspect_directory(self.path)
        except FileExistsError:
            raise DirectoryUnusableError(self.path, "is a file", "name a directory") from None
        except OSError as error:
            raise DirectoryUnusableError(
                self.path, f"cannot be created: {error.strerror}", "create it, or choose another"
            ) from None
        if facts is None or not facts.is_directory:
            raise DirectoryUnusableError(self.path, "is not a directory", "name a directory")
        if not facts.is_usable:
            raise DirectoryUnusableError(
                self.path, "cannot be read and written by this process", "change its owner or mode, or name another"
            )
        if facts.filesystem_type in NETWORK_FILESYSTEMS:
            raise DirectoryUnusableError(
                self.path,
                f"is on {facts.filesystem_type}, a network filesystem, where locks and syncs are not reliable",
                "name a directory on a local file system",
            )
        if facts.mode & OTHERS_MASK:
            log.warning(
                "%s is open to other users (mode %03o), and events may be personal: run chmod 700", self.path, facts.mode
            )

    def create_control_files(self) -> None:
        """Create the missing lock files and ledgers, also in the queues.

        Without them nobody could deliver, evict or purge once the volume has no byte and no inode left.
        """
        for name in layout.CONTROL_FILES:
            with contextlib.suppress(OSError, FileUnusableError):  # the operation that needs the file reports it
                self.filesystem.close(self.filesystem.open_lock_file(self.path_of(name)))
        with contextlib.suppress(OSError):  # as above
            for queue in self.queues():
                queue.create_control_files()

    def check_power_durability(self) -> None:
        """Check that a sync makes data durable here. Raises `DirectoryUnusableError`."""
        facts = self.filesystem.inspect_directory(self.path)
        if facts is not None and facts.filesystem_type in VOLATILE_FILESYSTEMS:
            raise DirectoryUnusableError(
                self.path,
                f'is on {facts.filesystem_type}, which is in memory, so durability "power" is impossible',
                'name a directory on a disk, or set durability "process"',
            )

    def queue(self, sink: str) -> Directory:
        """The queue of a sink; it may not exist yet."""
        path = self.path_of(layout.queue_name(sink))
        return Directory(path, self.filesystem, self._clock, self.new_id, parent=self, sink=sink)

    def queues(self) -> list[Directory]:
        """The existing queues, by name. None if the outbox has a single sink."""
        if self.parent is not None:
            return []
        sinks = map(layout.sink_of_queue, self.filesystem.subdirectories(self.path))
        return [self.queue(sink) for sink in sorted(sink for sink in sinks if sink is not None)]

    def requested_queues(self) -> set[str]:
        """The sinks whose queues were requested and start with the current backlog."""
        sinks = map(layout.sink_of_adding, self.filesystem.subdirectories(self.path))
        return {sink for sink in sinks if sink is not None}

    def rename_subdirectory(self, name: str, new_name: str) -> None:
        """Rename a directory in this one, durably.

        It is synced first: otherwise a power loss could bring back what was removed from it, under the new name.
        """
        self.filesystem.sync_directory(self.path_of(name))
        self.filesystem.rename(self.path_of(name), self.path_of(new_name))
        self.filesystem.sync_directory(self.path)

    def disk_usage(self) -> DiskUsage:
        """List the directory and its queues once, and add up their files. Opens no file."""
        return measure_usage(self.filesystem, self.path, [queue.path for queue in self.queues()])

    def disk_usage_at_start(self) -> DiskUsage:
        """The disk usage. Creates a directory again that was deleted, and the control files.

        Raises `OSError` and `DirectoryUnusableError`.
        """
        try:
            usage = self.disk_usage()
        except FileNotFoundError:
            self.ensure_usable()
            usage = self.disk_usage()
        self.create_control_files()
        return usage

    def pending(self) -> tuple[int, int]:
        """The pending bytes and files; both are 0 if the directory cannot be listed."""
        try:
            usage = self.disk_usage()
        except OSError:
            return 0, 0
        return usage.pending_bytes, usage.pending_files

    def batch_names(self) -> list[str]:
        """The names of pending batch files, oldest first. Of a plain file and its compressed copy, only the plain one."""
        names = self.all_sealed_names()
        if self.parent is not None and names:
            # List the outbox directory after the queue: a name that is in the queue only has all its links by then.
            names -= self.parent.all_sealed_names()
        return sorted(name for name in names if layout.plain_name(name) not in names)

    def waiting_batch_ids(self) -> set[str]:
        """The ids of the batches that are pending here or in a queue, without other users' files. File names may change."""
        # List twice: a listing that runs while a file is replaced by its compressed copy may show neither. That happens once
        # per file. The queues are listed after the directory, so that a batch that moves to a queue is seen in one of them.
        names: set[str] = set()
        for directory in (self, *self.queues()):
            for _ in range(2):
                names.update(self.filesystem.list_names(directory.path, layout.SEALED_PATTERNS, counted=True))
        return set(map(layout.batch_id, names))

    def all_sealed_names(self) -> set[str]:
        """The names of the sealed files here, including links that do not count yet."""
        return set(self.filesystem.list_names(self.path, layout.SEALED_PATTERNS))

    def oldest_batches(self, limit: int, after: str = "", until: str = "") -> BatchPage | None:
        """The first `limit` names of `batch_names` after `after` and up to `until`. Holds no other names in memory.

        None if only `batch_names` can tell, because some links in this queue may not count yet.
        """
        names, last, files = self.filesystem.first_names(self.path, layout.SEALED_PATTERNS, after, until, limit)
        # After the queue was listed, as in `batch_names`.
        outbox = self.parent
        if outbox is not None and files and outbox.filesystem.first_names(outbox.path, layout.SEALED_PATTERNS).total_files:
            return None
        known = {after, *names} - {""}  # a plain file sorts before its copy
        next_after = names[-1] if len(names) < files and names else ""
        return BatchPage([name for name in names if layout.plain_name(name) not in known], next_after, last)

    def contains(self, name: str) -> bool:
        """Whether a file exists."""
        return self.filesystem.is_same_file(self.path_of(name), self.path_of(name))

    @property
    def release_lock(self) -> threads.Lock:
        """A lock for threads of this process, of all queues, that remove a batch and check whether another queue has it."""
        return (self.parent or self)._release_lock  # noqa: SLF001 - of the same class

    def is_queued_elsewhere(self, file: LockedFile) -> bool:
        """Whether another queue also has this batch file, which this process has locked."""
        others = self.parent.queues() if self.parent is not None and self.filesystem.has_name(file.fd) else []
        return any(self.filesystem.is_file_at(file.fd, queue.path_of(file.name)) for queue in others if queue.sink != self.sink)

    def lock_existing(self, name: str, *, exclusive: bool = False) -> LockedFile | None:
        """Lock an existing file. None if another process holds the lock or the file is gone. Raises `FileUnusableError`.

        In a queue the lock is shared with the queues of other sinks, unless `exclusive`.
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
            self.filesystem.close(fd)  # renamed or removed between open and lock: try again
        self.filesystem.close(fd)
        return None

    def log_skip(self, name: str, problem: str) -> None:
        """Log that a file cannot be recovered: once, and again when the problem changes."""
        if self._logged_skips.get(name) != problem:
            self._logged_skips[name] = problem
            log.warning("skipping %s: %s", self.path_of(name), problem)

    def forget_skips(self, names: Iterable[str]) -> None:
        """Forget the logged problems of all but these files."""
        if self._logged_skips:
            self._logged_skips = {name: self._logged_skips[name] for name in names if name in self._logged_skips}

    def open_existing(self, name: str) -> int:
        """Open an existing file for reading, without a lock. Raises `FileUnusableError`."""
        path = self.path_of(name)
        try:
            return self.filesystem.open_existing(path, allow_links=self.parent is not None)
        except FileUnusableError:
            # Cached: during fan-out this is called for each batch.
            self._has_queues = self._has_queues or bool(self.queues() or self.requested_queues())
            if not self._has_queues:
                raise
        return self.filesystem.open_existing(path, allow_links=True)  # it is being linked into the queues

    def acquire_lock_file(self, name: str) -> LockedFile | None:
        """Lock a lock file, and create it if it is missing.

        None if another process holds the lock. Raises `FileUnusableError`.
        """
        path = self.path_of(name)
        locked_fd = self.filesystem.open_locked(path, writable=True)
        if locked_fd is not None:
            return LockedFile(name, locked_fd)
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
        """Create and lock a file. None if recovery in another process removed it as a dead writer's file."""
        created, error = self.create_each([name])
        if error is not None:
            raise error
        return created[0] if created else None

    def create_each(self, names: Sequence[str]) -> tuple[list[LockedFile], OSError | None]:
        """Create and lock files, up to the first error.

        Leaves out those that recovery in another process was quicker to lock.
        """
        fds, error = self.filesystem.create_each([self.path_of(name) for name in names])
        return [LockedFile(name, fd) for name, fd in zip(names, fds, strict=False) if fd >= 0], error

    def create_with_new_name(self, new_name: Callable[[], str]) -> LockedFile:
        """Create and lock a file under a name from `new_name`, which never returns a name twice."""
        for _ in range(_CREATE_ATTEMPTS_MAX):
            file = self.create(new_name())
            if file is not None:
                return file
        raise OSError(errno.ENOLCK, "a new file could not be locked; file locks do not work here", self.path)

    def seal_after(self, micros: int | None) -> None:
        """Give later seals a later time than `micros`, even if the clock steps back."""
        with self._sealed_at_lock:
            if micros is not None and self._last_sealed_at < micros <= TIMESTAMP_MAX_MICROS:
                self._last_sealed_at = micros

    def _next_sealed_name(self, like: str = "") -> str:
        with self._sealed_at_lock:
            self._last_sealed_at = max(self._last_sealed_at + 1, min(self._clock.micros(), _SEALED_AT_MAX_MICROS))
            return layout.sealed_name(self._last_sealed_at, self._name_suffix, like)

    def delivered_files(self) -> list[FileEntry]:
        """The retained files, the first delivered first."""
        return sorted(entry for entry in self.filesystem.list_files(self.path) if layout.kind_of(entry.name) is Kind.DELIVERED)

    def retain(self, name: str) -> str:
        """Rename a delivered batch file so that it is retained. Returns the new name, which the next sync makes durable."""
        retained_name = layout.delivered_name(name, self._clock.micros())
        self.filesystem.rename(self.path_of(name), self.path_of(retained_name))
        return retained_name

    def reseal(self, name: str) -> str | None:
        """Rename a retained file so that it is delivered again, as a new batch.

        Returns the new name, durable once synced, or None.
        """
        new_name = self._next_sealed_name(name)
        try:
            self.filesystem.rename(self.path_of(name), self.path_of(new_name))
        except FileNotFoundError:
            return None
        return new_name

    def rewrite(self, file: LockedFile, in_memory: Iterable[tuple[int, bytes]] = (), size: int | None = None) -> LockedFile:
        """Replace a locked file by a synced one with the same name and content. Returns it, locked.

        The new content is what can be read of the first `size` bytes, overwritten by `in_memory`: lines with their offsets. The
        name is durable once the directory is synced. Raises `OSError`; then the file is unchanged.
        """
        new_file = self._write_and_rename(file.name, parts_of(self.filesystem, file.fd, size, in_memory))
        self.filesystem.close(file.fd)
        return new_file

    def seal(self, files: Sequence[LockedFile], on_renamed: Callable[[Sequence[LockedFile], Sequence[str]], None]) -> None:
        """Seal locked and synced files: rename them all in this order, then sync the directory once.

        `on_renamed(files, sealed_names)` is called for each group of files that was renamed, up to an error. The name is empty
        for a file that somebody has moved elsewhere together with its events. The caller must close the descriptors. Raises
        `OSError`.
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
                on_renamed(left[:1], [self._replace_missing(left[0], names[done])])
                del left[0]
            elif error is not None:
                raise error
        if files:
            self._sync_names()

    def _replace_missing(self, file: LockedFile, name: str) -> str:
        """Recreate a deleted file from its descriptor, which still has the acknowledged events. Returns the new name.

        A file that was moved, with the directory or alone, is left where it is, and the returned name is empty.
        """
        current_path = self.filesystem.current_path(file.fd)
        self.filesystem.make_directory(self.path)  # the whole directory may be gone
        if current_path:
            advice = "its events are delivered from there if a process delivers that directory"
            log.error("%s was moved to %s: %s", self.path_of(file.name), current_path, advice)
            return ""
        log.error("%s was deleted externally; recreated as %s", file.name, name)
        self.write_atomically(name, parts_of(self.filesystem, file.fd))
        return name

    def retry_name_sync(self) -> bool:
        """Sync the directory if that failed after sealing. Returns whether it was due."""
        due = self._names_unsynced
        if due:
            self._sync_names()
        return due

    def _sync_names(self) -> None:
        self._names_unsynced = False  # set before the sync: if the sync of another thread fails meanwhile, it stays due
        try:
            self.filesystem.sync_directory(self.path)
        except OSError:
            self._names_unsynced = True
            raise

    def replace_with_compressed(self, file: LockedFile, name: str, data: bytes) -> None:
        """Replace a locked batch file by its compressed copy, which is durable before the other is removed."""
        copy = self._write_and_rename(name, (data,))
        try:
            self.filesystem.sync_directory(self.path)
            self.remove(file.name)  # if this fails, it is unknown whether the file is gone: keep both
        finally:
            self.filesystem.close(copy.fd)

    def remove_stale_copies(self, names: Iterable[str]) -> None:
        """Where a plain file and its compressed copy exist, remove the copy; every reader understands the plain file.

        The process that compresses holds the lock of the plain file until it has removed that file. If the process died, the
        copy must be removed before the plain file, because the batch would be delivered again otherwise.
        """
        name_set = set(names)
        for name in [name for name in name_set if layout.plain_name(name) in name_set]:
            try:
                plain = self.lock_existing(layout.plain_name(name))
            except FileUnusableError:
                continue
            except OSError as error:
                if not concerns_one_file(error):
                    raise
                continue
            if plain is not None:  # otherwise another process is compressing it, or has removed both
                try:
                    self.remove(name)
                finally:
                    self.filesystem.close(plain.fd)

    def read_small_file(self, name: str, bytes_max: int | None = None) -> bytes:
        """The content of a small file, or its first `bytes_max` bytes; empty if it does not exist. Takes no lock."""
        try:
            fd = self.filesystem.open_existing(self.path_of(name))
        except (FileNotFoundError, FileUnusableError):
            return b""
        try:
            return self.filesystem.read_all(fd) if bytes_max is None else self.filesystem.read_at(fd, 0, bytes_max)
        finally:
            self.filesystem.close(fd)

    def write_atomically(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Make `data`, or its parts, the durable content of a file, whole or not at all. Idempotent."""
        self.filesystem.close(self._write_and_rename(name, (data,) if isinstance(data, bytes) else data).fd)
        self.filesystem.sync_directory(self.path)

    def link_into(self, queue: Directory, file: LockedFile) -> None:
        """Link a locked file into a queue. Idempotent; a copy with the same bytes counts as the link.

        Copying a directory without its hard links makes such copies.
        """
        path = queue.path_of(file.name)
        try:
            self.filesystem.link(self.path_of(file.name), path)
        except FileExistsError:
            if not self.filesystem.is_file_at(file.fd, path) and not self._has_same_bytes(file.fd, path):
                raise FileUnusableError(path, "is a different file from the batch that belongs there") from None

    def _has_same_bytes(self, fd: int, path: str) -> bool:
        filesystem = self.filesystem
        other = filesystem.open_existing(path, allow_links=True)
        try:
            size = filesystem.size(fd)
            return size == filesystem.size(other) and all(
                filesystem.read_at(fd, at, _COMPARE_BYTES) == filesystem.read_at(other, at, _COMPARE_BYTES)
                for at in range(0, size, _COMPARE_BYTES)
            )
        finally:
            filesystem.close(other)

    def _write_and_rename(self, name: str, parts: Iterable[bytes]) -> LockedFile:
        """Write a temporary file, sync it, and rename it to `name`. Locked from the beginning."""
        file = self.create_temporary(name)
        try:
            for part in parts:
                self.filesystem.write_all(file.fd, part)
        except BaseException:
            self.remove_temporary(file)
            raise
        return self.publish_temporary(file, name)

    def create_temporary(self, name: str) -> LockedFile:
        """Create and lock a temporary file that will be renamed to `name`."""
        # Each attempt uses a new name: recovery may be about to remove the temporary file of an earlier attempt.
        return self.create_with_new_name(lambda: layout.temporary_name(name, self.new_id()))

    def publish_temporary(self, file: LockedFile, name: str) -> LockedFile:
        """Sync a temporary file and rename it. Returns it, locked; after an error it is removed."""
        try:
            self.filesystem.sync_data(file.fd)
            self.filesystem.rename(self.path_of(file.name), self.path_of(name))
        except BaseException:
            self.remove_temporary(file)
            raise
        return LockedFile(name, file.fd)

    def remove_temporary(self, file: LockedFile) -> None:
        """Remove a temporary file and close it. If that fails, the next recovery removes it."""
        with contextlib.suppress(OSError):
            self.remove(file.name)
        self.filesystem.close(file.fd)

    def make_room(self, error: OSError) -> bool:
        """After an error that says that the volume is full: delete something less important. Returns whether to try again."""
        if not is_full(error):
            return False
        with contextlib.suppress(OSError):
            return (self.parent or self).reclaim_space()
        return False

    def with_room(self, write: Callable[[], T], may_retry: Callable[[], bool] = lambda: True) -> T:
        """Call `write`, and once more after a full volume if something less important could be deleted and `may_retry()`."""
        try:
            return write()
        except OSError as error:
            if not may_retry() or not self.make_room(error):
                raise
        return write()

    def remove(self, name: str) -> None:
        """Delete a file. It is no error if it is gone already."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.unlink(self.path_of(name))
