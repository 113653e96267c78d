"""The ledger of a directory: `ledger.ndjson`, with an entry for each batch that is sealed, delivered, evicted or repaired.

An entry is a line like a record's, with a checksum. Entries are keyed by batch id, so that an entry that was written twice
counts once. Recovery does not need the ledger: without it only the history is lost. It is appended to under a lock of its own.
While another process holds the lock or the disk fails, entries wait in memory; callers of `enqueue` never wait for them. Who is
about to delete a file must know which of the two it is (`LedgerWrite`): it waits for a lock, because the entry can be written
once that is released, but not for a full disk, which may be full until the file is deleted. `reconciliation.py` adds them up.
"""

from __future__ import annotations

import logging
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final

from pillarbox.errors import DirectoryUnusableError, FileUnusableError
from pillarbox.store import layout
from pillarbox.store.ledger_entries import (
    LedgerEntry,
    LostEntry,
    encode_entries,
)
from pillarbox.store.reconciliation import compact_entries, read_ledger
from pillarbox.store.state_log import StateLog
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pillarbox.clock import Clock
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

COMPACT_BYTES: Final = 4 * 2**20  # bytes beyond which finished batches are summed up
_BUFFER_ENTRIES_MAX: Final = 10_000  # entries in memory; entries beyond it are lost, and counted
_LOCK_TRIES: Final = 1000  # the lock is held for microseconds, except during compaction
_LOCK_PAUSE_S: Final = 0.001
_LOCKED_OUT_S: Final = 1.0  # a lock that another process holds for so long is reported
LOCKED_PROBLEM: Final = "another process holds ledger.lock; what must be counted first waits for it"


class LedgerWrite(Enum):
    """The result of a write of ledger entries. True if all are written."""

    WRITTEN = "written"
    LOCKED = "locked"  # another process holds `ledger.lock`: wait
    REFUSED = "refused"  # the disk failed, or the file cannot be used: waiting may not help

    def __bool__(self) -> bool:
        return self is LedgerWrite.WRITTEN


class LedgerWriter:
    """Appends entries to the ledger, for one process. Shared by its threads; a forked child creates its own."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._buffer: deque[LedgerEntry] = deque()
        self._lost = 0
        # Never held during a system call. Re-entrant, because a signal handler may drop an event.
        self._buffer_lock = threads.RLock()
        self._unsynced = False  # entries were appended and not synced
        self._write_lock = threads.Lock()
        self._compact_at_bytes = COMPACT_BYTES
        self._state_log = StateLog(clock)
        self._lock_missed_at_s: float | None = None  # monotonic seconds; since then another process has held the lock
        self._lock_timed_out = False  # no further wait for the lock until it is released
        self._problem_since_s = 0.0
        self.problem = ""  # why entries wait in memory, once that was logged

    @property
    def unwritten_entries(self) -> int:
        """The number of entries that wait in memory, or were lost there."""
        return len(self._buffer) + self._lost

    def add(self, *entries: LedgerEntry) -> None:
        """Buffer entries for the next `write`."""
        with self._buffer_lock:
            room = max(0, _BUFFER_ENTRIES_MAX - len(self._buffer))
            self._buffer.extend(entries[:room])
            self._lost += len(entries[room:])

    def withdraw(self, entries: Iterable[LedgerEntry]) -> None:
        """Remove entries that were not written, because their operations will not be done now."""
        withdrawn = set(map(id, entries))
        with self._write_lock, self._buffer_lock:
            self._buffer = deque(entry for entry in self._buffer if id(entry) not in withdrawn)

    def write(self, *, sync: bool) -> LedgerWrite:
        """Append the buffered entries; with `sync`, everything that was appended is durable then. Never raises `OSError`.

        Without `sync` it never waits. With it, it waits about a second for a lock, and not again until that is released.
        """
        if not self._write_lock.acquire(blocking=sync):
            return LedgerWrite.LOCKED  # another thread of this process is writing
        try:
            return self._write(sync=sync)
        finally:
            self._write_lock.release()

    def write_or_raise(self) -> None:
        """Append the buffered entries durably. Raises `DirectoryUnusableError` if that is impossible."""
        outcome = self.write(sync=True)
        if outcome is LedgerWrite.LOCKED:
            problem, remedy = "its ledger.lock is held by another process", "resume or end that process, and try again"
            raise DirectoryUnusableError(self._directory.path, problem, remedy)
        if not outcome:
            raise DirectoryUnusableError(self._directory.path, "its ledger cannot be written", "free disk space and try again")

    def finish(self) -> int:
        """Write the entries that still wait in memory at the end of the process. Returns the number that cannot be written."""
        self._lock_timed_out = False  # wait for the lock once more
        if self.unwritten_entries and not self.write(sync=True):
            entries = "1 ledger entry is" if self.unwritten_entries == 1 else f"{self.unwritten_entries} ledger entries are"
            text = "%s: this process ends and %s lost, so that pillarbox verify may not balance: %s"
            log.error(text, self._directory.path, entries, self.problem)
        return self.unwritten_entries

    def _write(self, *, sync: bool) -> LedgerWrite:
        with self._buffer_lock:
            if self._lost and len(self._buffer) < _BUFFER_ENTRIES_MAX:
                lost, self._lost = self._lost, 0
                self._buffer.append(LostEntry(self._clock.micros(), lost))
        # Another thread may have appended the caller's entries without a sync.
        if not self._buffer and not (sync and self._unsynced):
            return LedgerWrite.WRITTEN
        try:
            is_written = self._directory.with_room(lambda: self._append(sync=sync))
        except (OSError, FileUnusableError) as error:
            self._log_state_change(f"the ledger could not be written; its entries wait in memory: {error}")
            return LedgerWrite.REFUSED
        if not is_written:
            self._note_locked()
            return LedgerWrite.LOCKED
        self._lock_missed_at_s, self._lock_timed_out = None, False
        self._log_state_change("")
        return LedgerWrite.WRITTEN

    def _note_locked(self) -> None:
        """Report a lock that another process holds for more than a moment."""
        now_s = self._clock.monotonic()
        if self._lock_missed_at_s is None:
            self._lock_missed_at_s = now_s
        if self._lock_timed_out or now_s - self._lock_missed_at_s >= _LOCKED_OUT_S:
            self._log_state_change(LOCKED_PROBLEM)

    def _append(self, *, sync: bool) -> bool:
        """Append the buffer. False if another process holds the lock."""
        if self._append_fast(sync=sync):
            return True
        lock = self._directory.acquire_lock_file(layout.LEDGER_LOCK)
        for _ in range(_LOCK_TRIES if sync and not self._lock_timed_out else 0):
            if lock is not None:
                break
            threads.pause(_LOCK_PAUSE_S)
            lock = self._directory.acquire_lock_file(layout.LEDGER_LOCK)
        if lock is None:
            self._lock_timed_out |= sync
            return False
        filesystem = self._directory.filesystem
        try:
            fd = filesystem.open_append(self._directory.path_of(layout.LEDGER))
        except BaseException:
            filesystem.close(lock.fd)
            raise
        try:
            try:
                entries = self._append_buffer(fd)
            finally:
                filesystem.close(lock.fd)
            if sync:
                self._sync(fd, entries)  # without the lock, for which others wait
        finally:
            filesystem.close(fd)
        return True

    def _append_fast(self, *, sync: bool) -> bool:
        """Append the buffer in one call. In all but the simple case it does nothing and returns False."""
        directory, entries = self._directory, self._buffered_entries()
        self._unsynced |= bool(entries)
        fd = directory.filesystem.append_locked(
            directory.path_of(layout.LEDGER_LOCK),
            directory.path_of(layout.LEDGER),
            encode_entries(entries),
            max_size=self._compact_at_bytes,
        )
        if fd is None:
            return False
        try:
            self._drop_from_buffer(entries)
            if sync:
                self._sync(fd, entries)
        finally:
            directory.filesystem.close(fd)
        return True

    def _buffered_entries(self) -> list[LedgerEntry]:
        with self._buffer_lock:
            return list(self._buffer)

    def _drop_from_buffer(self, entries: list[LedgerEntry]) -> None:
        for _ in entries:
            self._buffer.popleft()

    def _append_buffer(self, fd: int) -> list[LedgerEntry]:
        """Append the buffer, and compact the file if that is due."""
        filesystem = self._directory.filesystem
        entries = self._buffered_entries()
        size = filesystem.size(fd)
        if not size:  # the file may be new, and its content is durable only under a durable name
            filesystem.sync_directory(self._directory.path)
        self._unsynced |= bool(entries)
        self._append_to(fd, size, encode_entries(entries))
        self._drop_from_buffer(entries)
        if size >= self._compact_at_bytes:
            try:
                self._compact()
            except (OSError, FileUnusableError, MemoryError) as error:
                log.warning("%s: the ledger could not be compacted: %s", self._directory.path, error)
                self._compact_at_bytes = size + COMPACT_BYTES
        return entries

    def _sync(self, fd: int, entries: list[LedgerEntry]) -> None:
        try:
            self._directory.filesystem.sync_data(fd)
        except OSError:
            # A later sync could not be trusted for these bytes, so write them again: an entry that is there twice counts once.
            with self._buffer_lock:
                self._buffer.extendleft(reversed(entries))
            raise
        self._unsynced = False

    def _append_to(self, fd: int, size: int, lines: bytes) -> None:
        """Append all of the lines or none. After a torn line they start on a new line."""
        filesystem = self._directory.filesystem
        if size and filesystem.read_at(fd, size - 1, 1) != b"\n":
            lines = b"\n" + lines
        try:
            filesystem.write_all(fd, lines)
        except OSError:
            filesystem.truncate(fd, size)
            raise

    def _compact(self) -> None:
        """Sum up finished batches, so that the file does not grow without end. Call it with the lock held."""
        # otherwise a power loss could bring back files that are summed up
        self._directory.filesystem.sync_directory(self._directory.path)
        entries, unread = read_ledger(self._directory)
        if unread:
            log.warning("%s: unreadable lines dropped from the ledger: %d", self._directory.path, unread)
        present = {layout.batch_id(name) for name in self._directory.batch_names()}
        lines = encode_entries(compact_entries(entries, present, self._clock.micros()))
        self._directory.write_atomically(layout.LEDGER, lines)
        self._compact_at_bytes = max(COMPACT_BYTES, 2 * len(lines))

    def _log_state_change(self, problem: str) -> None:
        """Log when entries begin to wait, and, at the same level, when they wait no longer."""
        now_s = self._clock.monotonic()
        if problem:
            if self._state_log.is_new_problem(problem):
                self._problem_since_s = now_s
                log.error("%s: %s", self._directory.path, problem)
        elif self._state_log.is_over():
            log.error("%s: the ledger is written again, after %.0f s", self._directory.path, now_s - self._problem_since_s)
        self.problem = problem
