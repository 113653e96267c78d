"""Keeps a directory within its limits: recounts pending bytes and files, checks the free space, and evicts.

It runs on the sealer's thread. Other processes add and remove files too, so only a listing has the true counts.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.errors import FileUnusableError
from pillarbox.store import compression, layout
from pillarbox.store.filesystem import concerns_one_file
from pillarbox.store.ledger import LedgerWrite, LedgerWriter
from pillarbox.store.ledger_entries import EvictedEntry
from pillarbox.store.retention import evict_delivered
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.filesystem import DiskSpace, Filesystem
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

_RECOUNT_S: Final = 1.0  # maximum age of counts that other processes may have changed
_RECOUNT_FULL_S: Final = 0.1  # the same when more than half of a limit is used
_RECOUNT_SHARE: Final = 10  # listing may take a tenth of the time
_SPACE_LOW_CHECK_S: Final = 1.0  # between two checks of the free space while it is low
_SPACE_CHECK_S: Final = 5.0  # the same while there is enough
OVERSHOOT_SHARE: Final = 16  # of `max_bytes`: how much a process may append before it recounts
MIN_FREE_BYTES_MAX: Final = 256 * 2**20  # the default of `min_free_bytes`
MIN_FREE_SHARE: Final = 20  # one part in so many of the volume is the default if that is less
MIN_FREE_INODES_MAX: Final = 1000  # inodes that must stay free, or one part in `MIN_FREE_SHARE` of them if that is less
AHEAD_SHARE: Final = 4  # a quarter of `min_free_bytes` more stays free while there are retained files to delete
# Share of the limit that eviction frees ahead of need, so that events that arrive meanwhile are not dropped.
SLACK_SHARE: Final = 8
# Share of the limit that a segment may have at most with eviction, because whole files are evicted.
FILE_SHARE: Final = 16
_COUNT_BYTES: Final = 1 << 20  # bytes of a file in memory at a time while its events are counted
_EVICT_LOCK_WAIT_S: Final = 2.0  # for a process that evicts; it holds the lock for milliseconds
_EVICT_AT_ONCE_MAX: Final = 32  # files evicted at a time: each holds a descriptor, and they share one sync of the ledger


class FreeSpace(NamedTuple):
    """The bytes and inodes that must stay free on a volume."""

    bytes: int
    inodes: int

    def is_more_than(self, space: DiskSpace) -> bool:
        """Whether the volume has less free space than this."""
        return space.free_bytes < self.bytes or space.free_inodes < self.inodes


def usual_free_bytes(space: DiskSpace) -> int:
    """The default of `min_free_bytes` on a volume."""
    return min(MIN_FREE_BYTES_MAX, space.total_bytes // MIN_FREE_SHARE)


def least_free(space: DiskSpace, min_free_bytes: int | None) -> FreeSpace:
    """The space that must stay free on a volume: none if `min_free_bytes` is 0; the default if it is None."""
    if min_free_bytes == 0:
        return FreeSpace(0, 0)
    inodes = min(MIN_FREE_INODES_MAX, space.total_inodes // MIN_FREE_SHARE)
    return FreeSpace(usual_free_bytes(space) if min_free_bytes is None else min_free_bytes, inodes)


class _EvictionCandidate:
    """A locked batch file that is about to be evicted, and all directories that have a name of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.locked_files: list[LockedFile] = []
        self.directories: list[Directory] = []  # in the order in which the names are removed
        self.size = 0
        self.events = 0


class QuotaEnforcer:
    """Keeps a `Writer` within the limits of its directory."""

    def __init__(
        self,
        directory: Directory,
        writer: Writer,
        clock: Clock,
        min_free_bytes: int | None,
        ledger: LedgerWriter | None = None,
        *,
        evicts: bool,
    ) -> None:
        self._directory = directory
        self._writer = writer
        self._clock = clock
        self._retained_log = StateLog(clock)
        self._eviction_log = StateLog(clock)
        self._min_free_bytes = min_free_bytes
        self._evicts = evicts
        self._ledger = ledger
        self._next_space_check = 0.0
        self._next_recount = 0.0
        self._earliest_recount = 0.0
        self._appended_at_recount = 0  # bytes that this process had appended at the last listing
        self._drops_for_space = 0
        self._appended_at_check = 0  # bytes that this process had appended at the last check of the free space
        self._evict_blocked_since: float | None = None  # monotonic time since which the lock could not be acquired
        self._evicts_without_lock = False
        self._unremovable: set[str] = set()  # files that could not be deleted, which are tried last
        self._recheck_after_bytes = 1  # check again after so many appended bytes
        self._evicted_delivered = False  # retained files, at the last check of the free space
        self.evicted_events = 0

    def enforce(self) -> float:
        """Recount, check the free space and evict, as far as each is due. Returns the seconds until the next call."""
        drops = self._writer.dropped["disk_full"] + self._writer.dropped["disk_low"]
        in_need, self._drops_for_space = drops > self._drops_for_space, drops
        self._evicted_delivered = False
        if in_need:
            self._next_space_check = 0.0
        wait = self._recount()  # first, because it recreates a deleted directory
        wait = min(wait, self.check_free_space(in_need=in_need))
        if self._evicts:
            self._evict(int(in_need and not self._evicted_delivered))
        return wait if self._evict_blocked_since is None else min(wait, _RECOUNT_FULL_S)

    def check_free_space(self, *, in_need: bool = False) -> float:
        """Drop events while the volume has less free space than it must keep. Returns the seconds until the next check.

        Retained files are deleted before that, and also if events were dropped for lack of space (`in_need`).
        """
        now, appended = self._clock.monotonic(), self._writer.appended_bytes
        if now < self._next_space_check and appended - self._appended_at_check < self._recheck_after_bytes:
            return self._next_space_check - now
        space = self._space()
        least = least_free(space, self._min_free_bytes)
        ahead = usual_free_bytes(space) // AHEAD_SHARE
        ample = FreeSpace(least.bytes + ahead, least.inodes + least.inodes // AHEAD_SHARE)
        self._appended_at_check, self._recheck_after_bytes = appended, max(1, ahead // 2)
        if ample.is_more_than(space) or in_need:
            space = self._evict_delivered(space, ample, max(1, ahead) if in_need else 0)
        low = least.is_more_than(space)
        self._writer.set_disk_low(low=low)
        rest = (
            _SPACE_LOW_CHECK_S if low else _SPACE_CHECK_S
        )  # while there is enough space, only many appended bytes call for an earlier check
        self._next_space_check = now + rest
        return rest

    def _space(self) -> DiskSpace:
        return self._directory.filesystem.disk_space(self._directory.path)

    def _evict_delivered(self, space: DiskSpace, free: FreeSpace, size: int) -> DiskSpace:
        """Delete retained files until enough is free and enough bytes were removed. Returns the space after that."""

        def is_enough(removed_bytes: int) -> bool:
            return removed_bytes >= size and not free.is_more_than(self._space())

        try:
            self._evicted_delivered = evict_delivered(self._directory, is_enough) > 0
            self._retained_log.is_over()
        except OSError as error:
            if self._retained_log.is_new_problem(str(error)):
                log.warning("%s: retained batches could not be deleted: %s", self._directory.path, error)
        return self._space() if self._evicted_delivered else space

    def _recount(self) -> float:
        """Correct the pending counts by a listing."""
        now = self._clock.monotonic()
        # A process that appends much recounts earlier.
        much = self._writer.appended_bytes - self._appended_at_recount > self._writer.limits.max_bytes // OVERSHOOT_SHARE
        due = self._earliest_recount if much else self._next_recount
        if now < due:
            return due - now
        before = self._writer.progress()
        try:
            usage = self._directory.disk_usage()
        except FileNotFoundError:
            log.error("%s was deleted or moved; created again", self._directory.path)  # noqa: TRY400 - a traceback adds nothing
            self._directory.filesystem.make_directory(self._directory.path)
            usage = self._directory.disk_usage()
        self._writer.correct_pending(before, usage.pending_bytes, usage.pending_files)
        took = self._clock.monotonic() - now
        limits = self._writer.limits
        full = 2 * usage.pending_bytes > limits.max_bytes or 2 * usage.pending_files > limits.max_files
        rest = max(_RECOUNT_FULL_S if full else _RECOUNT_S, _RECOUNT_SHARE * took)
        self._appended_at_recount = before.appended
        self._earliest_recount = now + took + _RECOUNT_SHARE * took
        self._next_recount = now + took + rest
        return rest

    def _evict(self, least: int) -> None:
        """Evict the oldest batches until there is room again, but none that is being delivered.

        `least` is 1 if something else has filled the volume: evict one file per round while events are dropped.
        """
        excess_bytes, excess_files = self._excess(least)
        if excess_bytes <= 0 and excess_files <= 0:
            self._evict_blocked_since = None
            self._log_eviction_end()
            return
        # Only one process evicts, and by a fresh listing: two processes with their own counts would evict twice as much.
        lock, may_evict = self._acquire_evict_lock()
        if not may_evict:
            return
        candidates: list[_EvictionCandidate] = []
        try:
            self._next_recount = self._earliest_recount = 0.0
            self._recount()
            excess_bytes, excess_files = self._excess(least)
            # The outbox directory is last, because a link in a queue counts once the directory itself no longer has the name.
            directories = [*self._directory.queues(), self._directory]
            for name in self._oldest_first(directories) if excess_bytes > 0 or excess_files > 0 else ():
                if excess_bytes <= 0 and excess_files <= 0:
                    break
                candidate = self._lock_candidate(name, directories)
                if candidate is None:
                    continue
                candidates.append(candidate)
                excess_bytes -= max(1, candidate.size)
                excess_files -= 1
                if len(candidates) >= _EVICT_AT_ONCE_MAX:
                    self._remove_candidates(candidates, directories)
            self._remove_candidates(candidates, directories)
            for directory in directories:
                directory.filesystem.sync_directory(directory.path)  # otherwise a power loss could bring the files back
        finally:
            for candidate in candidates:  # it was not removed because of an error
                self._close_candidate(candidate)
            if lock is not None:
                self._directory.filesystem.close(lock.fd)

    def _acquire_evict_lock(self) -> tuple[LockedFile | None, bool]:
        """The lock for eviction, and whether to evict: without the lock only if it could not be acquired for a while.

        A process that holds it may be suspended. Until it continues, all others would drop every event.
        """
        problem = "another process holds it and may be suspended"
        try:
            lock = self._directory.acquire_lock_file(layout.EVICT_LOCK)
        except (OSError, FileUnusableError) as error:
            lock, problem = None, str(error)
        now = self._clock.monotonic()
        if lock is not None:
            if self._evicts_without_lock:
                log.warning("%s: %s can be locked again", self._directory.path, layout.EVICT_LOCK)
            self._evict_blocked_since, self._evicts_without_lock = None, False
            return lock, True
        if self._evict_blocked_since is None:
            self._evict_blocked_since = now
        blocked_s = now - self._evict_blocked_since
        if blocked_s >= _EVICT_LOCK_WAIT_S and not self._evicts_without_lock:
            self._evicts_without_lock = True
            text = "%s: evicting without %s, which could not be locked for %.0f s: %s"
            log.warning(text, self._directory.path, layout.EVICT_LOCK, blocked_s, problem)
        return None, self._evicts_without_lock

    def _excess(self, least: int) -> tuple[int, int]:
        """The bytes (at least `least`) and files by which the limits, less the slack, are exceeded."""
        limits, writer = self._writer.limits, self._writer
        pending_bytes, pending_files, _ = writer.pending_counts()
        excess_bytes = pending_bytes - limits.max_bytes + limits.max_bytes // SLACK_SHARE
        excess_files = pending_files - limits.max_files + max(1, limits.max_files // SLACK_SHARE)
        return max(least, excess_bytes), excess_files

    def _oldest_first(self, directories: Sequence[Directory]) -> list[str]:
        """The names of all batches, oldest first. Of a plain file and its copy, the plain one."""
        listings = [directory.all_sealed_names() for directory in directories]
        all_names = {name for names in listings for name in names if layout.plain_name(name) not in names}
        self._unremovable &= all_names
        return sorted(all_names, key=lambda name: (name in self._unremovable, name))

    def _lock_candidate(self, name: str, directories: Sequence[Directory]) -> _EvictionCandidate | None:
        """Lock a batch under all its names, and count its events. None if it is in use, not ours, or unreadable."""
        candidate = _EvictionCandidate(name)
        try:
            for directory in directories:
                if any(
                    directory.filesystem.is_file_at(locked.fd, directory.path_of(name)) for locked in candidate.locked_files
                ):
                    candidate.directories.append(directory)  # another link to a locked file
                else:
                    self._lock_name(name, directory, candidate)
        except BaseException:
            self._close_candidate(candidate)
            raise
        return candidate if candidate.locked_files else None

    @staticmethod
    def _lock_name(name: str, directory: Directory, candidate: _EvictionCandidate) -> None:
        kept_open, events = None, None
        try:
            locked = directory.lock_existing(name, exclusive=True)
            if locked is None:
                return
            try:
                size, events = directory.filesystem.size(locked.fd), _events_in(directory.filesystem, locked)
                if events is not None:  # otherwise delivery quarantines what is damaged
                    kept_open = locked
            finally:
                if kept_open is None:
                    directory.filesystem.close(locked.fd)
        except FileUnusableError:
            return
        except OSError as error:
            if not concerns_one_file(error):
                raise
            return
        if kept_open is not None and events is not None:
            candidate.locked_files.append(kept_open)
            candidate.directories.append(directory)
            candidate.size += size
            candidate.events = events

    def _close_candidate(self, candidate: _EvictionCandidate) -> None:
        for locked in candidate.locked_files:
            self._directory.filesystem.close(locked.fd)

    def _remove_candidates(self, candidates: list[_EvictionCandidate], directories: Sequence[Directory]) -> None:
        """Write the ledgers' entries, then remove the batches. If there is no room for the entries, remove them anyway.

        While another process holds the ledger's lock of a directory, nothing is removed there. Raises `BlockingIOError` then.
        """
        now = self._clock.micros()
        locked: list[Directory] = []
        for directory in directories if candidates and self._ledger is not None else ():
            ledger = self._ledger_of(directory)
            entries = [
                EvictedEntry(now, layout.batch_id(candidate.name), candidate.events)
                for candidate in candidates
                if directory in candidate.directories
            ]
            ledger.add(*entries)
            if ledger.write(sync=True) is LedgerWrite.LOCKED:
                ledger.withdraw(entries)
                locked.append(directory)
        while candidates:
            candidate = candidates.pop(0)
            try:
                for directory in candidate.directories:
                    if directory in locked:
                        continue
                    # First remove the compressed copy of a process that died, because it would be delivered otherwise.
                    directory.remove(layout.compressed_name(candidate.name))
                    directory.remove(candidate.name)
            except OSError as error:
                if candidate.name not in self._unremovable:
                    log.error("%s: cannot evict %s: %s", self._directory.path, candidate.name, error)  # noqa: TRY400 - a traceback adds nothing
                self._unremovable.add(candidate.name)
                continue
            finally:
                self._close_candidate(candidate)
            if any(directory in locked for directory in candidate.directories):
                continue  # it is evicted there once the ledger can be written
            self.evicted_events += candidate.events
            self._writer.release_bytes(candidate.size)
            if self._eviction_log.is_new_problem("full"):
                log.warning("%s: full; evicting the oldest events for new ones", self._directory.path)
        if locked:
            lock_path = locked[0].path_of(layout.LEDGER_LOCK)
            raise BlockingIOError(f"nothing can be evicted: another process holds {lock_path}")

    def _ledger_of(self, directory: Directory) -> LedgerWriter:
        if directory is self._directory and self._ledger is not None:
            return self._ledger
        return LedgerWriter(directory, self._clock)

    def _log_eviction_end(self) -> None:
        if self._eviction_log.is_over():
            log.warning("%s: no longer full; events evicted so far: %d", self._directory.path, self.evicted_events)


def _events_in(filesystem: Filesystem, file: LockedFile) -> int | None:
    """The number of events in a batch file, read in parts; None if it is compressed and damaged."""
    if file.name.endswith(layout.COMPRESSED_SUFFIX):
        plain, problem = compression.decompress(file.name, filesystem.read_all(file.fd))
        return None if problem else plain.count(b"\n") + (plain[-1:] not in b"\n")
    events, last, offset = 0, b"", 0
    while part := filesystem.read_at(file.fd, offset, _COUNT_BYTES):
        events += part.count(b"\n")
        last = part[-1:]
        offset += len(part)
    return events + (last not in b"\n")
