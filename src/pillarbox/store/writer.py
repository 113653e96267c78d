"""One process's appender in a directory: append and rotation. Never syncs, logs, meters or calls back under its lock.

The hot path is one closure (`append`), because look-ups cost as much as the checksum, and it makes one comparison: with the
number of bytes that the active file may grow to. That number is also the mark: it is -1 while the file is touched, so that
whatever interrupts an append, the next one takes the slow way, and repairs.
"""

from __future__ import annotations

import errno
import threading
import uuid
from collections import deque
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pillarbox.outcome import DROP_REASONS, DROPPED, ENQUEUED, Dropped, DropReason, Outcome
from pillarbox.store import layout
from pillarbox.store.directory import Taken

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.store.directory import Directory

SealReason = Literal["batch_size", "batch_bytes", "flush_interval", "startup", "adopted", "shutdown", "manual"]

RETIRED_MAX: Final = 64  # files that wait for their sync; beyond it the active file grows instead, for each holds a descriptor
_MARK: Final = -1
_TAIL_BYTES: Final = 64 * 1024  # how much is read at a time to find the last whole line
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Limits(NamedTuple):
    """What bounds a writer."""

    batch_size: int  # events a file
    batch_bytes: int  # bytes a file, overshot by one append
    max_bytes: int  # pending bytes of the directory


class Mark(NamedTuple):
    """Bytes appended and released by this process, ever."""

    appended: int
    released: int


class Retired(NamedTuple):
    """A file that its writer is done with."""

    file: Taken
    bytes: int
    events: int
    reason: SealReason


class Writer:
    """Appends lines to the active file and swaps files; shared by the threads of a process.

    `wake()` tells the sealer that there is work; it must be re-entrant and quick, for it is called under the lock.
    """

    def __init__(self, directory: Directory, limits: Limits, wake: Callable[[], None]) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self._limits = limits
        self._wake = wake
        self.lock = threading.RLock()  # re-entrant: a signal handler may enqueue in the middle of an append
        self._name = str(uuid.uuid4())
        self._number = 0
        self._started = False
        self._closed = False
        self._active: Taken | None = None
        self._spare: Taken | None = None
        self._fd = -1
        self._limit = _MARK
        self._bytes = 0
        self._events = 0
        self._attend_at = 1  # number of events in the file at which the hot path calls `_attend`
        self._room = 0  # how many bytes the active file may have before `max_bytes` is reached
        self._told = False  # the sealer, since it last looked
        self.files = 0  # pending files, the active one only where it holds something
        self.retired: deque[Retired] = deque()
        self.retired_events = 0
        self.retired_bytes = 0
        self._released = 0  # bytes of files that are gone
        self.dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)
        self.append = self._build_append()

    def _build_append(self) -> Callable[[bytes, int], Outcome | None]:
        w = self
        lock, write = w.lock, w._filesystem.write

        def append(lines: bytes, events: int) -> Outcome | None:
            """Append whole lines that hold `events` events; None before `start`."""
            size = len(lines)
            with lock:
                limit = w._limit
                if w._bytes + size > limit:
                    outcome = w._append_slowly(lines, events)
                    if outcome is not None or not w._started:
                        return outcome
                    limit = w._limit
                w._limit = _MARK
                try:
                    written = write(w._fd, lines)
                    if written != size:
                        w._complete(lines, written)
                except OSError as error:
                    return w._refuse(w._undo(error), events)
                w._bytes += size
                w._events = count = w._events + events
                w._limit = limit
                if count >= w._attend_at:
                    w._attend()
            return ENQUEUED

        return append

    # What follows is called with the lock held.

    def _append_slowly(self, lines: bytes, events: int) -> Outcome | None:
        """Where the file does not simply take the lines: refuse, mend, or begin another file (None: now it takes them)."""
        if self._closed or not self._started:
            return self._refuse("closed", events) if self._started else None
        size = len(lines)
        if size > self._room - self._bytes:
            return self._refuse("max_bytes", events)
        try:
            if self._active is not None and self._limit == _MARK:
                return self._append_after_interrupt(lines, events)
            if self._active is not None and len(self.retired) < RETIRED_MAX and self._bytes:
                self._retire("batch_bytes")
            if self._active is None:
                self._begin(self.new_file())
        except OSError as error:
            return self._refuse(self._undo(error), events)
        self._allow(size)
        return None

    def _append_after_interrupt(self, lines: bytes, events: int) -> Outcome:
        """Another append was interrupted, for good or by the signal handler that calls: append and nothing more.

        Above all no rotation: the interrupted append may go on, and must find its file.
        """
        self._repair()
        self._limit = _MARK
        written = self._filesystem.write(self._fd, lines)
        if written != len(lines):
            self._complete(lines, written)
        self._bytes += len(lines)
        self._events += events
        self._allow(0)
        self._tell_sealer()
        return ENQUEUED

    def _allow(self, size: int) -> None:
        """Set how far the active file may grow: to `max_bytes`, and to `batch_bytes` or the `size` that is due now."""
        self._limit = min(self._room, max(self._limits.batch_bytes, self._bytes + size))

    def _tell_sealer(self) -> None:
        if not self._told:
            self._told = True
            self._wake()

    def _refuse(self, reason: DropReason, events: int) -> Dropped:
        self.dropped[reason] += events
        return DROPPED[reason]

    def _begin(self, file: Taken) -> None:
        self._active, self._fd, self._bytes, self._events, self._attend_at = file, file.fd, 0, 0, 1
        self._allow(0)

    def _complete(self, lines: bytes, written: int) -> None:
        """After a short write: take the part back and write the lines again, all or none of them."""
        for last in (False, True):
            # Where a signal handler has appended meanwhile, it has cut the part and taken the mark away.
            if self._limit == _MARK:
                self._filesystem.truncate(self._fd, self._filesystem.size(self._fd) - written)
            if last:
                raise OSError(errno.ENOSPC, "the disk takes a part of a line only")
            self._limit = _MARK
            written = self._filesystem.write(self._fd, lines)
            if written == len(lines):
                return

    def _repair(self) -> None:
        """Cut what an interrupted append may have left behind the last whole line."""
        size = end = self._filesystem.size(self._fd)
        while end:
            start = max(0, end - _TAIL_BYTES)
            found = self._filesystem.read_at(self._fd, start, end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._filesystem.truncate(self._fd, end)
        if end > self._bytes:
            # A whole line that was interrupted before it was counted: the file must not pass for an empty one.
            self._bytes, self._events = end, self._events + 1
        self._allow(0)

    def _undo(self, error: OSError) -> DropReason:
        """After a failed append: leave whole lines; where that fails too, let the file be sealed as it is."""
        if self._active is not None and self._limit == _MARK:
            try:
                self._repair()
            except OSError:
                self._retire("manual")
        return "disk_full" if error.errno in _DISK_FULL else "io_error"

    def _attend(self) -> None:
        """What the hot path leaves out: the first event of a file, and a full file."""
        if self._attend_at == 1:
            self._attend_at = self._limits.batch_size
            self.files += 1
            self._tell_sealer()
        # Without a spare the sealer is behind: the file grows to `batch_bytes` rather than that the caller opens another.
        if self._events >= self._limits.batch_size and self._spare is not None:
            self._retire("batch_size")

    def _retire(self, reason: SealReason) -> None:
        if self._active is None:
            return
        self.retired.append(Retired(self._active, self._bytes, self._events, reason))
        self.retired_events += self._events
        self.retired_bytes += self._bytes
        self._room -= self._bytes
        self._active, self._fd, self._limit, self._bytes, self._events = None, -1, _MARK, 0, 0
        if self._spare is not None:
            spare, self._spare = self._spare, None
            self._begin(spare)
        self._tell_sealer()

    # What follows takes the lock itself.

    def new_file(self) -> Taken:
        """Create and lock an active file under a name that was never used."""
        with self.lock:
            self._number += 1
            name = layout.active_name(self._name, self._number)
        fd = self._filesystem.create(self._directory.at(name))
        self._filesystem.lock(fd)
        return Taken(name, fd)

    def start(self, pending_bytes: int, pending_files: int) -> None:
        """Begin to accept; what is pending already counts."""
        with self.lock:
            self._room = self._limits.max_bytes - pending_bytes
            self.files = pending_files
            self._started = True

    def look(self) -> bool:
        """The sealer's: from now on tell it of news. Returns whether it should open a file for the next rotation."""
        with self.lock:
            self._told = False
            return self._spare is None and self._active is not None and not self._closed

    def give_spare(self, file: Taken) -> None:
        """Have the next file ready."""
        with self.lock:
            self._spare = file

    def rotate(self, reason: SealReason) -> None:
        """Retire the active file if it holds anything."""
        with self.lock:
            if self._bytes:
                self._retire(reason)

    def release(self, size: int) -> None:
        """A pending file of `size` bytes is gone."""
        with self.lock:
            self._released += size
            self.files -= 1
            self._make_room(self._room + size)

    def _make_room(self, room: int) -> None:
        self._room = room
        if self._limit != _MARK:
            self._allow(0)

    def _pending_bytes(self) -> int:
        return self._limits.max_bytes - self._room + self._bytes

    def mark(self) -> Mark:
        """What was appended and released here so far, to hand to `correct` after a listing."""
        with self.lock:
            return Mark(self.retired_bytes + self._bytes, self._released)

    def correct(self, before: Mark, found_bytes: int, found_files: int) -> None:
        """Take a listing's word for what is pending, unless what was done here while it ran explains the difference."""
        with self.lock:
            difference = found_bytes - self._pending_bytes()
            appended = self.retired_bytes + self._bytes - before.appended
            if abs(difference) > appended + self._released - before.released:
                self._make_room(self._room - difference - appended)
                self.files = found_files

    def pending(self) -> tuple[int, int, int]:
        """(pending bytes, pending files, events accepted since start)."""
        with self.lock:
            return self._pending_bytes(), self.files, self.retired_events + self._events

    def active(self) -> tuple[str, int] | None:
        """The name of the active file and its number of events, if it holds any."""
        with self.lock:
            return (self._active.name, self._events) if self._active is not None and self._bytes else None

    def refuse(self, reason: DropReason, events: int = 1) -> Dropped:
        """Count an event that does not get as far as the file."""
        with self.lock:
            return self._refuse(reason, events)

    def close(self) -> list[Taken]:
        """Accept nothing more; retires what is there and returns the empty files, for the sealer to remove."""
        with self.lock:
            self._closed = True
            if self._bytes:
                spare, self._spare = self._spare, None
                self._retire("shutdown")
                self._spare = spare
            empty = [file for file in (self._active, self._spare) if file is not None]
            self._active = self._spare = None
            self._limit, self._fd = _MARK, -1
            return empty
