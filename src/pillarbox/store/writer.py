"""Appends events to the active segment, and rotates segments.

The writer does not sync, log or measure. It calls no callback except to wake the sealer, under its lock.

The hot path is one closure (`build_enqueue`), because calls and attribute look-ups cost more than the checksum. It makes one
comparison: with `_limit`, the number of bytes that the active segment may grow to. While an append is under way, `_limit` is
`_IN_PROGRESS`, which is negative, so that nothing fits. Two kinds of callers can find that value: a signal handler that
interrupts an append, which continues afterwards (the handler may append, and change nothing else); or the first caller after an
append that an exception cut short (`_append_interrupted`), which repairs the segment.

CPython runs signal handlers only at calls and at backward jumps: none can run between the lines marked "no call".
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from typing import TYPE_CHECKING, Final
from zlib import crc32

from pillarbox._native import RECORD_TEMPLATE, WriterState, compile_enqueue
from pillarbox.forks import check_fork
from pillarbox.outcome import DROP_REASONS, DROPPED, ENQUEUED, Dropped, DropReason, Durability, Outcome
from pillarbox.store import layout
from pillarbox.store.file_parts import end_of_last_line
from pillarbox.store.segment import (
    NO_FILE,
    Segment,
    SegmentSyncer,
    WriterLimits,
    WriterProgress,
    cut_off_short_write,
    drop_reason_of,
    ends_with_line_feed,
)
from pillarbox.system import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import msgspec

    from pillarbox.store.append_hooks import AppendHooks, EnqueueFunction
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.segment import SealReason

__all__ = ["RETIRED_MAX", "SPARES_MAX", "Writer", "WriterLimits", "WriterProgress"]

# segments waiting to be sealed, each with an open descriptor; at this number the active segment grows instead
RETIRED_MAX: Final = 64
SPARES_MAX: Final = 48  # empty segments that are held ready, each with an open descriptor
# the numbers of spares are multiples of this; segments that callers create get numbers in between
_SPARE_NUMBER_STEP: Final = 1000
_IN_PROGRESS: Final = -1  # an append or a rotation is under way, or was cut short
_NO_SEGMENT: Final = -2  # there is no active segment, or the writer is closed
_MARKED_POLLS_MAX: Final = 10  # polls after which the sealer waits for the lock, to learn whether an append is under way


class Writer(WriterState):
    """Appends lines to the active segment and rotates segments. Shared by the threads of a process.

    `wake_sealer()` tells the sealer that it has work. It is called under the lock, so it must be re-entrant and quick.
    """

    _file: Segment

    def __init__(self, directory: Directory, limits: WriterLimits, wake_sealer: Callable[[], None]) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self.limits = limits
        self._wake_sealer = wake_sealer
        self.lock = threads.RLock()  # re-entrant: a signal handler may enqueue in the middle of an append
        self._writer_id = directory.new_id()
        self._highest_used = self._highest_spare = 0  # the highest numbers so far, of a segment in use and of a spare
        self._started = self._closed = False
        self.accepts = False  # the writer has started and is not closed
        self._file = self._last_appended = Segment(NO_FILE)
        self._spares: deque[Segment] = deque()  # segments that are ready to become active
        self._retiring: Segment | None = None  # `_repair_torn_tail` finishes a rotation that was cut short
        self._limit = _NO_SEGMENT
        self._append_interrupted = False  # an exception cut an append short, which will not reset `_limit`
        self._repairing = False  # the end of the segment is being repaired: not even a signal handler may append to it
        self._bytes_left = 0  # size of the active segment at which `max_bytes` is reached
        self._disk_low = False  # the volume has less free space than `min_free_bytes`
        self._sealer_notified = False  # the sealer was woken since its last poll
        self._marked_polls = 0  # consecutive polls of the sealer that found an append under way and the lock held
        self.pending_files = 0  # including the active segment once it holds an event
        self.retired: deque[Segment] = deque()  # oldest first
        self.syncer = SegmentSyncer(directory, lambda: self.lock, self._stop_appending)
        self._retired_events = self._retired_bytes = 0
        self._released_bytes = 0  # bytes of files that were delivered or evicted
        self.dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)

    def build_enqueue(self, hooks: AppendHooks) -> EnqueueFunction:
        """Build the hot path: encode an event, make a record of it, append it to the active segment."""
        w, write, checksum, template = self, self._filesystem.write, crc32, RECORD_TEMPLATE
        encode, event_type, bytes_max, is_power, raise_invalid, drop_invalid, append_unstarted, commit, power = hooks

        def enqueue(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
            """Store one event, as `Outbox.enqueue` describes it."""
            check_fork()
            synced = power if durability is None else is_power(durability)
            try:
                payload = encode(event)
                if type(event) is not event_type or len(payload) > bytes_max:
                    raise_invalid(event, payload)
            except Exception as error:  # noqa: BLE001 - an event may raise anything when it is encoded; the caller continues
                return drop_invalid(event, error)
            line = template % (payload, checksum(payload))
            if synced:
                return commit(line)
            size = len(line)
            with w.lock:
                limit = w._limit
                w._limit = _IN_PROGRESS
                file = w._file
                if file.bytes + size <= limit:
                    try:
                        written = write(file.fd, line)
                        if written != size:
                            w._complete_append(file, line, written)
                        file.bytes += size
                        file.events = count = file.events + 1
                        w._limit = limit
                        if count >= file.threshold_events:
                            w._notify_threshold()
                    except OSError as error:
                        return w._undo_append(error, 1)
                    except BaseException:
                        w._append_interrupted = True
                        raise
                    return ENQUEUED
                try:
                    outcome = w._append_slow(line, 1, limit)
                except BaseException:
                    w._append_interrupted |= limit != _IN_PROGRESS
                    raise
            return outcome if outcome is not None else append_unstarted(line, 1)

        return compile_enqueue(w, enqueue, encode, event_type, bytes_max, append_unstarted, write, power=power)

    def append(self, lines: bytes, events: int) -> Outcome | None:
        """Append whole lines with `events` events, all or none. None before `start`."""
        with self.lock:
            previous_limit, self._limit = self._limit, _IN_PROGRESS
            try:
                return self._append_slow(lines, events, previous_limit)
            except BaseException:
                self._append_interrupted |= previous_limit != _IN_PROGRESS
                raise

    def append_unsynced(self, lines: bytes, events: int) -> tuple[Outcome, Segment]:
        """Append whole lines for a caller that holds them in memory until they are synced, and that counts drops itself."""
        with self.lock:
            outcome = self.append(lines, events)
            if isinstance(outcome, Dropped):
                self.dropped[outcome.reason] -= events
            return outcome if outcome is not None else DROPPED["closed"], self._last_appended

    def batch_room(self) -> tuple[int, int]:
        """The events and bytes that fit into the active segment, or into the next one if this one is full."""
        return self.limits.room_beside(self._file)

    def drop_when_closed(self, events: int) -> Dropped | None:
        """Drop events because the writer is closed; None if it has not started yet."""
        return self.drop("closed", events) if self._started else None

    def is_locked_by_this_thread(self) -> bool:
        """Whether the caller is a signal handler that has interrupted this thread in the middle of a call."""
        return self.lock._is_owned()  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001 - as `threads.Condition` does

    def abandon_after_fork(self) -> None:
        """In a forked child: abandon the parent's segments. The child's `enqueue` calls `AppendHooks.append_unstarted`."""
        self.lock = threads.RLock()
        self._started = self._closed = self._append_interrupted = self.accepts = False
        self._file, self._limit = Segment(NO_FILE), _NO_SEGMENT
        self._spares.clear()
        self._last_appended = self._file

    # The methods from here on are called with the lock held.

    def _append_slow(self, lines: bytes, events: int, previous_limit: int) -> Outcome | None:
        """Append if the hot path could not. `previous_limit` is the value that `_limit` had."""
        if previous_limit == _IN_PROGRESS:
            if not self._append_interrupted:
                return self._append_nested(lines, events)
            # No call: a signal handler that runs from here on finds an append under way.
            self._append_interrupted, self._repairing = False, True
        try:
            try:
                return self._append_checked(lines, events)
            except OSError as error:
                return self._undo_append(error, events)
        except BaseException:
            self._append_interrupted = True
            raise

    def _append_checked(self, lines: bytes, events: int) -> Outcome | None:
        """Drop the events, repair or rotate the segment, and append."""
        if self._closed or not self._started:
            self._limit = _NO_SEGMENT
            return self._count_drop("closed", events) if self._started else None
        if self._repairing:
            self._repair_torn_tail()
        size = len(lines)
        full, can_retire = self.limits.is_full_for(self._file, size), len(self.retired) < RETIRED_MAX
        reason = self.limits.drop_reason(self._file, size, self._bytes_left, self.pending_files, can_retire=can_retire)
        reason = "disk_low" if self._disk_low and reason != "max_bytes" else reason
        if reason is not None:
            self._update_limit()
            return self._count_drop(reason, events)
        if full and can_retire:
            if not self._spares:
                self._spares.append(self._create_segment())
            self._retire("batch_bytes")
        if self._file.locked_file is NO_FILE:
            self._file = self._create_segment()
        file = self._file
        written = self._filesystem.write(file.fd, lines)
        if written != size:
            self._complete_append(file, lines, written)
        file.bytes += size
        file.events += events
        self._last_appended = file
        self._notify_threshold()
        return ENQUEUED

    def _append_nested(self, lines: bytes, events: int) -> Outcome:
        """Append in a signal handler that interrupted an append: to the active segment if it ends whole, or to a new one."""
        size = len(lines)
        file, own = self._file, False
        if size > self._bytes_left - file.bytes:
            return self._count_drop("max_bytes", events)
        if self._disk_low:
            return self._count_drop("disk_low", events)
        try:
            usable = not self._repairing and file.locked_file is not NO_FILE and self.limits.may_grow(file, size)
            if not usable or not ends_with_line_feed(self._filesystem, file.fd):
                if len(self.retired) >= 2 * RETIRED_MAX:
                    return self._count_drop("would_block", events)
                file, own = self._create_segment(), True
            written = self._filesystem.write(file.fd, lines)
            if written != size:
                return self._count_drop(cut_off_short_write(self._filesystem, file.fd, written), events)
            if own:
                file.bytes, file.events = size, events  # set before the retirement: the sealer syncs what has bytes
        except OSError as error:
            return self._count_drop(drop_reason_of(error), events)
        finally:
            if own:
                self._add_retired(file)
        if own:
            self._retired_bytes += size
            self._retired_events += events
            self._bytes_left -= size
        else:
            file.bytes += size
            file.events += events
            self._count_as_pending(file)
        self._notify_sealer()
        return ENQUEUED

    def _add_retired(self, file: Segment) -> None:
        self._count_as_pending(file)
        self.retired.append(file)

    def _count_as_pending(self, file: Segment) -> None:
        """Count the active segment among the pending files, once it holds an event."""
        if not file.is_counted:
            file.is_counted, file.threshold_events = True, self.limits.batch_size
            self.pending_files += 1

    def _update_limit(self) -> None:
        """Set how many bytes the active segment may grow to without a further check."""
        if self._file.locked_file is NO_FILE:
            self._limit = _NO_SEGMENT
        else:
            has_room = not self._disk_low and (self._file.is_counted or self.pending_files < self.limits.max_files)
            self._limit = max(0, min(self._bytes_left, self.limits.batch_bytes)) if has_room else 0

    def _notify_sealer(self) -> None:
        if not self._sealer_notified:
            self._sealer_notified = True
            self._wake_sealer()

    def _count_drop(self, reason: DropReason, events: int) -> Dropped:
        self.dropped[reason] += events
        return DROPPED[reason]

    def _create_segment(self) -> Segment:
        """Create a segment for a caller that finds no spare."""
        return Segment(self._directory.create_with_new_name(self._next_segment_name))

    def _next_segment_name(self) -> str:
        """A name that was never used, with a number above those in use and below those of spares being created."""
        # No call: a signal handler must get another number. Multiples of the step belong to spares.
        self._highest_used += 2 if self._highest_used % _SPARE_NUMBER_STEP == _SPARE_NUMBER_STEP - 1 else 1
        number = self._highest_used
        return layout.active_name(self._writer_id, number)

    def _complete_append(self, file: Segment, lines: bytes, written: int) -> None:
        """After a short write: cut off what was written, and write the lines again, all or none."""
        self._repairing = True
        filesystem = self._filesystem
        self._truncate(file, filesystem.size(file.fd) - written)
        written = filesystem.write(file.fd, lines)
        if written != len(lines):
            self._truncate(file, filesystem.size(file.fd) - written)
            raise OSError(errno.ENOSPC, "only a part of the line was written")
        self._repairing = False

    def _truncate(self, file: Segment, size: int) -> None:
        file.truncated = True  # set before, because an interrupt may follow, and after, because a sync may happen in between
        self._filesystem.truncate(file.fd, size)
        file.truncated = True

    def _start_repair(self) -> None:
        """Repair the segment; if that fails, the next caller repairs it. Raises `OSError`."""
        self._limit, self._append_interrupted, self._repairing = _IN_PROGRESS, False, True
        try:
            self._repair_torn_tail()
        except BaseException:
            self._append_interrupted = True
            raise

    def _repair_torn_tail(self) -> None:
        """Finish a rotation that was cut short. Cut off a torn line; count whole lines that were not counted."""
        self._repairing = True
        try:
            self._finish_retiring()
            file, filesystem = self._file, self._filesystem
            if file.locked_file is not NO_FILE:
                size = filesystem.size(file.fd)
                end = end_of_last_line(filesystem, file.fd, size)
                if end < size:
                    self._truncate(file, end)
                if end > file.bytes:
                    more = filesystem.read_at(file.fd, file.bytes, end - file.bytes).count(b"\n")
                    file.events += more  # no call from here on: bytes and events must agree
                file.bytes = end
            self._append_interrupted = False
        finally:
            self._repairing = False

    def _undo_append(self, error: OSError, events: int) -> Dropped:
        """After a failed append: cut off what it wrote. If that fails too, retire the segment as it is."""
        self._repairing = True
        reason = drop_reason_of(error)
        try:
            file = self._file
            if file.locked_file is not NO_FILE and self._filesystem.size(file.fd) > file.bytes:
                self._truncate(file, file.bytes)
        except OSError:
            file.has_leftover = True
            reason = "io_error"  # bytes that could not be cut off may be delivered
            self._retire("manual")
        finally:
            self._repairing = False
        self._append_interrupted = False
        self._update_limit()
        return self._count_drop(reason, events)

    def _notify_threshold(self) -> None:
        """Handle the first event of a segment and a full segment, which the hot path does not."""
        self._limit = _IN_PROGRESS
        file = self._file
        if file.events and not file.is_counted:
            self._count_as_pending(file)
            self._notify_sealer()
        if not self._retire_if_full() and file.events >= self.limits.batch_size:
            due = self.limits.events_due(len(self.retired))
            if file.events < due:
                file.threshold_events = min(due, file.events + self.limits.batch_size)  # some may be sealed by then
            else:  # a check at each event would cost more than the event
                file.threshold_events = self.limits.recheck_at(file.events)
        self._update_limit()

    def _retire_if_full(self) -> bool:
        """Retire the active segment if it is full. Without a spare, or at `max_files`, it grows to `batch_bytes` instead."""
        is_full = self._file.events >= self.limits.events_due(len(self.retired))
        if is_full and self._spares and len(self.retired) < RETIRED_MAX and self.pending_files < self.limits.max_files:
            self._retire("batch_size")
            return True
        return False

    def _retire(self, reason: SealReason) -> None:
        """Make a spare the active segment, or none if there is no spare."""
        spare = self._spares[0] if self._spares else Segment(NO_FILE)
        # No call, and no allocation that could start the garbage collector: an append finds the one segment or the other.
        self._limit = _IN_PROGRESS
        old = self._retiring = self._file
        old.seal_reason = reason
        self._file = spare
        if spare.number > self._highest_used:  # noqa: PLR1730 - `max` is a call
            self._highest_used = spare.number
        self._bytes_left -= old.bytes
        self._retired_events += old.events
        self._retired_bytes += old.bytes
        self._finish_retiring()
        self._notify_sealer()

    def _finish_retiring(self) -> None:
        """Finish a rotation after the segments were swapped. Idempotent."""
        if self._spares and self._spares[0] is self._file:
            self._spares.popleft()
        if self._retiring is not None:
            # A segment that is sealed already was in the list, and was removed from it.
            if self._retiring is not self._file and not self._retiring.is_sealed and self._retiring not in self.retired:
                self.retired.append(self._retiring)
            self._retiring = None

    # The methods from here on take the lock themselves.

    def create_spares(self, count: int) -> tuple[list[LockedFile], OSError | None]:
        """For the sealer: create and lock `count` empty segments, up to the first error. Returns the files and the error."""
        first = max(self._highest_spare, self._highest_used) // _SPARE_NUMBER_STEP + 1
        numbers = [_SPARE_NUMBER_STEP * number for number in range(first, first + count)]
        self._highest_spare = numbers[-1]
        return self._directory.create_each([layout.active_name(self._writer_id, number) for number in numbers])

    def start(self, pending_bytes: int, pending_files: int) -> None:
        """Start to accept events. `pending_bytes` and `pending_files` are the totals of the files in the directory."""
        with self.lock:
            self._bytes_left = self.limits.max_bytes - pending_bytes
            self.pending_files = pending_files
            self._started = True
            self.accepts = not self._closed

    def poll_for_sealer(self) -> int:
        """For the sealer: start a new poll. Returns the number of spares to create.

        There should be twice as many spares as retired segments, plus one, because a writer without a spare is slow.
        """
        self._sealer_notified = False
        if self._limit != _IN_PROGRESS:
            self._marked_polls = 0
        elif self.lock.acquire(blocking=self._marked_polls >= _MARKED_POLLS_MAX):
            try:
                self._marked_polls = 0
                if self._limit == _IN_PROGRESS:
                    # The lock is free and an append seems to be under way: it was cut short, and nobody will finish it.
                    self._start_repair()
                    self._update_limit()
            finally:
                self.lock.release()
        else:
            self._marked_polls += 1
        if self._file.locked_file is NO_FILE or self._closed or len(self.retired) >= RETIRED_MAX:
            return 0
        return min(SPARES_MAX, 2 * len(self.retired) + 1) - len(self._spares)

    def add_spares(self, files: Iterable[LockedFile], *, names_durable: bool = False) -> list[LockedFile]:
        """Add spares; with `names_durable` the directory was synced after that. Returns those that cannot be used."""
        spares = [Segment(locked_file, name_durable=names_durable) for locked_file in files]
        with self.lock:
            # Recovery sorts by number: spares below the segments that callers have created since would change the order.
            newest = self._highest_used
            self._spares.extend(file for file in spares if file.number > newest)
            self.retire_if_full()
            return [file.locked_file for file in spares if file.number < newest]

    def take_spares(self) -> list[LockedFile]:
        """Remove all spares. Returns their files."""
        with self.lock:
            spares = [spare.locked_file for spare in self._spares]
            self._spares.clear()
            return spares

    def retire_if_full(self) -> None:
        """Retire the active segment if it became full when it could not be retired, because no event may follow."""
        with self.lock:
            previous_limit, self._limit = self._limit, _IN_PROGRESS
            self._restore_limit(previous_limit)

    def rotate(self, reason: SealReason) -> bool:
        """Retire the active segment if it holds events. False if an append is under way, which must find its segment."""
        with self.lock:
            previous_limit, self._limit = self._limit, _IN_PROGRESS
            if previous_limit == _IN_PROGRESS and not self._append_interrupted:
                return False
            try:
                if previous_limit == _IN_PROGRESS:
                    self._start_repair()
                if self._file.bytes:
                    self._retire(reason)
                self._update_limit()
            except OSError:
                return False
            except BaseException:
                self._append_interrupted = True
                raise
            return True

    def _stop_appending(self, file: Segment, error: OSError) -> None:
        """Ensure that nothing more is appended to a segment. Raises `error` if an append is under way."""
        with self.lock:
            if self._file is file and not self.rotate("manual"):
                raise error

    def retired_segments(self) -> list[Segment]:
        """The retired segments, oldest first. Taken without the lock."""
        return list(self.retired.copy())

    def remove_oldest_retired(self, count: int) -> None:
        """Remove the first `count` retired segments, which are sealed."""
        for _ in range(count):
            self.retired.popleft()

    def release_bytes(self, size: int, files: int = 1) -> None:
        """Subtract a delivered or evicted file of `size` bytes; with `files=0`, bytes of a file that became smaller."""
        with self.lock:
            previous_limit, self._limit = self._limit, _IN_PROGRESS
            self._released_bytes += size
            self.pending_files -= files
            self._bytes_left += size
            self._restore_limit(previous_limit)

    def set_disk_low(self, *, low: bool) -> None:
        """For the sealer: drop all events while the volume is `low` on space."""
        with self.lock:
            if self._disk_low != low:
                previous_limit, self._limit = self._limit, _IN_PROGRESS
                self._disk_low = low
                self._restore_limit(previous_limit)

    def _restore_limit(self, previous_limit: int) -> None:
        """Update the limit after a change that may allow a full segment to retire. An append under way does so itself."""
        if previous_limit != _IN_PROGRESS:
            self._retire_if_full()
            self._update_limit()

    def _pending_bytes(self) -> int:
        return self.limits.max_bytes - self._bytes_left + self._file.bytes

    def progress(self) -> WriterProgress:
        """The bytes appended and released so far, to pass to `correct_pending` after a listing."""
        with self.lock:
            return WriterProgress(self._retired_bytes + self._file.bytes, self._released_bytes)

    def correct_pending(self, progress_before: WriterProgress, listed_bytes: int, listed_files: int) -> None:
        """Correct the pending counts by a listing, unless appends and releases during the listing explain the difference."""
        with self.lock:
            previous_limit, self._limit = self._limit, _IN_PROGRESS
            difference = listed_bytes - self._pending_bytes()
            appended = self._retired_bytes + self._file.bytes - progress_before.appended
            if abs(difference) > appended + self._released_bytes - progress_before.released:
                self.pending_files = listed_files
                self._bytes_left -= difference + appended
            self._restore_limit(previous_limit)

    def pending_counts(self) -> tuple[int, int, int]:
        """(pending bytes, pending files, events accepted since the start)."""
        with self.lock:
            return self._pending_bytes(), self.pending_files, self._retired_events + self._file.events

    @property
    def appended_bytes(self) -> int:
        """Bytes that this process has appended. Read without the lock, so it may lag behind."""
        return self._retired_bytes + self._file.bytes

    @property
    def accepted_events(self) -> int:
        """Events accepted since the start. Read without the lock, so it may lag behind."""
        return self._retired_events + self._file.events

    def active_segment(self) -> tuple[str, int] | None:
        """The name and the number of events of the active segment; None if it is empty. Read without the lock."""
        file = self._file
        return (file.locked_file.name, file.events) if file.bytes else None

    def uncount_drop(self, reason: DropReason, events: int) -> None:
        """Subtract counted drops of events that are tried again."""
        with self.lock:
            self.dropped[reason] -= events

    def drop(self, reason: DropReason, events: int = 1) -> Dropped:
        """Count events that are dropped before they reach a segment."""
        with self.lock:
            return self._count_drop(reason, events)

    def close(self) -> list[LockedFile]:
        """Stop accepting events, and retire the active segment. Returns the empty segments, which the sealer removes."""
        with self.lock:
            self._closed, self.accepts = True, False
            if self._limit == _IN_PROGRESS:
                with contextlib.suppress(OSError):  # if this fails, the segment is sealed with what can be read
                    self._start_repair()
            spares = self.take_spares()
            if self._file.bytes:
                self._retire("shutdown")
            empty = [file for file in (self._file.locked_file, *spares) if file is not NO_FILE]
            self._file = Segment(NO_FILE)
            self._limit = _NO_SEGMENT
            return empty
