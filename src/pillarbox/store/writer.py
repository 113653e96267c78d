"""One process's appender in a directory: append and rotation. Never syncs, logs, meters or calls back under its lock.

The hot path is one closure (`build_enqueue`), because calls and look-ups cost more than the checksum, and it makes one
comparison: with the number of bytes that the active file may grow to. That number is also the mark: it is negative while
the file is touched. What finds the mark in place is either a signal handler in the middle of an append that goes on
afterwards, which may append and nothing more, or comes after an append that an exception cut short (`_broken`), and
repairs.

CPython runs signal handlers at calls and backward jumps only. Lines marked "no call" rely on it: nothing comes in between.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import deque
from typing import TYPE_CHECKING, Final
from zlib import crc32

from pillarbox._native import RECORD_TEMPLATE, WriterState, compile_enqueue
from pillarbox.outcome import DROP_REASONS, DROPPED, ENQUEUED, Dropped, DropReason, Durability, Outcome
from pillarbox.store import layout
from pillarbox.store.segment import (
    NO_FILE,
    SPARE_RECHECK_SHARE,
    Segment,
    SegmentSyncer,
    WriterLimits,
    WriterProgress,
    drop_reason_of,
    end_of_last_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import msgspec

    from pillarbox.store.append_hooks import AppendHooks, EnqueueFunction
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.segment import SealReason

__all__ = ["RETIRED_MAX", "SPARES_MAX", "Writer", "WriterLimits", "WriterProgress", "drop_reason_of"]

RETIRED_MAX: Final = 64  # files that wait for their sync; beyond it the active file grows instead, for each holds a descriptor
SPARES_MAX: Final = 48  # empty files held ready, each with a descriptor
_SPARE_NUMBER_STEP: Final = 1000  # of the numbers of spares: between them are those of files that are made while they are
_GROW_EVERY: Final = 8  # files that wait for their sync: for each so many, the next may hold `batch_size` events more
_IN_PROGRESS: Final = -1  # an append or a rotation is under way, or was cut short
_NO_SEGMENT: Final = -2  # there is none yet, or none any more
_MARKED_POLLS_MAX: Final = 10  # then the sealer waits for the lock, to see whose mark it is


class Writer(WriterState):
    """Appends lines to the active file and swaps files; shared by the threads of a process.

    `wake_sealer()` tells the sealer that there is work; it must be re-entrant and quick: it is called under the lock.
    """

    _file: Segment

    def __init__(self, directory: Directory, limits: WriterLimits, wake_sealer: Callable[[], None]) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self.limits = limits
        self._wake_sealer = wake_sealer
        self.lock = threading.RLock()  # re-entrant: a signal handler may enqueue in the middle of an append
        self._writer_id = directory.new_id()
        self._highest_used = self._highest_spare = 0  # the highest numbers so far, of a file in use and of a spare
        self._started = False
        self._closed = False
        self.accepts = False  # it has started and is not closed
        self._file = self._last_appended = Segment(NO_FILE)
        self._spares: deque[Segment] = deque()  # ready to be swapped in
        self._retiring: Segment | None = (
            None  # being swapped out; what an interrupt leaves of that, `_repair_torn_tail` finishes
        )
        self._limit = _NO_SEGMENT
        self._broken = False  # an exception cut an append short: the mark is nobody's
        self._repairing = False  # the end of the file is being put right: not even a signal handler may append to it
        self._bytes_left = 0  # how many bytes the active file may have before `max_bytes` is reached
        self._disk_low = False  # the volume has less room than it must keep
        self._sealer_notified = False  # the sealer, since it last looked
        self._marked_polls = 0  # of the sealer, in a row, that found the mark in place and the lock taken
        self.pending_files = 0  # pending files, the active one only where it holds something
        self.retired: deque[Segment] = deque()  # oldest first
        self.syncer = SegmentSyncer(directory, lambda: self.lock, self._stop_appending)
        self._retired_events = 0
        self._retired_bytes = 0
        self._released_bytes = 0  # bytes of files that are gone
        self.dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)

    def build_enqueue(self, door: AppendHooks) -> EnqueueFunction:
        """The hot path: event -> line -> active file."""
        w, write, checksum, template = self, self._filesystem.write, crc32, RECORD_TEMPLATE
        encode, event_type, bytes_max, is_power, refuse, invalid, begin, durably, power = door

        def enqueue(event: msgspec.Struct, *, durability: Durability | None = None) -> Outcome:
            """Store one event; `Enqueued` once it is as durable as asked for, `Dropped(reason)` where it is refused.

            Never raises for trouble of destination, disk or event (except `InvalidEventError` with `on_invalid="raise"`).
            """
            synced = power if durability is None else is_power(durability)
            try:
                payload = encode(event)
                if type(event) is not event_type or len(payload) > bytes_max:
                    refuse(event, payload)
            except Exception as error:  # noqa: BLE001 - whatever an event does when encoded, the caller goes on
                return invalid(event, error)
            line = template % (payload, checksum(payload))
            if synced:
                return durably(line)
            size = len(line)
            with w.lock:
                limit = w._limit
                w._limit = _IN_PROGRESS
                file = w._file
                if file.bytes + size <= limit:
                    try:
                        written = write(file.fd, line)
                        if written != size:
                            w._complete(file, line, written)
                        file.bytes += size
                        file.events = count = file.events + 1
                        w._limit = limit
                        if count >= file.attend_at:
                            w._attend()
                    except OSError as error:
                        return w._undo(error, 1)
                    except BaseException:
                        w._broken = True
                        raise
                    return ENQUEUED
                try:
                    outcome = w._append_slow(line, 1, limit)
                except BaseException:
                    w._broken |= limit != _IN_PROGRESS
                    raise
            return outcome if outcome is not None else begin(line, 1)

        return compile_enqueue(w, enqueue, encode, event_type, bytes_max, begin, write, power=power)

    def append(self, lines: bytes, events: int) -> Outcome | None:
        """Append whole lines that hold `events` events, all or none; None before `start`."""
        with self.lock:
            found, self._limit = self._limit, _IN_PROGRESS
            try:
                return self._append_slow(lines, events, found)
            except BaseException:
                self._broken |= found != _IN_PROGRESS
                raise

    def append_unsynced(self, lines: bytes, events: int) -> tuple[Outcome, Segment]:
        """Append whole lines, for a caller that keeps them until they are synced; refusals are its to count."""
        with self.lock:
            outcome = self.append(lines, events)
            if isinstance(outcome, Dropped):
                self.dropped[outcome.reason] -= events
            return outcome if outcome is not None else DROPPED["closed"], self._last_appended

    def batch_room(self) -> tuple[int, int]:
        """How many events and bytes the active file takes until it has `batch_size`, or the next one, where it has."""
        limits, file = self.limits, self._file
        events, size = limits.batch_size - file.events, limits.batch_bytes - file.bytes
        return (events, size) if min(events, size) > 0 else (limits.batch_size, limits.batch_bytes)

    def drop_when_closed(self, events: int) -> Dropped | None:
        """What to answer while it does not accept: None before it has started."""
        return self.drop("closed", events) if self._started else None

    def is_locked_by_this_thread(self) -> bool:
        """Whether this thread is in here already."""
        return self.lock._is_owned()  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001 - as `threading.Condition` does

    def abandon_after_fork(self) -> None:
        """In a forked child: this is the parent's. Whoever still calls it is sent to `AppendHooks.begin`."""
        self.lock = threading.RLock()
        self._started = self._closed = self._broken = self.accepts = False
        self._file, self._limit = Segment(NO_FILE), _NO_SEGMENT
        self._spares.clear()
        self._last_appended = self._file

    # What follows is called with the lock held.

    def _append_slow(self, lines: bytes, events: int, previous_limit: int) -> Outcome | None:
        """Where the file does not simply take the lines; `previous_limit` is the limit that stood there."""
        if previous_limit == _IN_PROGRESS:
            if not self._broken:
                return self._append_nested(lines, events)
            # No call: whoever comes from here on finds somebody at work.
            self._broken, self._repairing = False, True
        try:
            try:
                return self._append_checked(lines, events)
            except OSError as error:
                return self._undo(error, events)
        except BaseException:
            self._broken = True
            raise

    def _append_checked(self, lines: bytes, events: int) -> Outcome | None:
        """Refuse, mend, or begin another file, and append."""
        if self._closed or not self._started:
            self._limit = _NO_SEGMENT
            return self._count_drop("closed", events) if self._started else None
        if self._repairing:
            self._repair_torn_tail()
        size = len(lines)
        if size > self._bytes_left - self._file.bytes:
            self._update_limit()
            return self._count_drop("max_bytes", events)
        if self._disk_low:
            self._update_limit()
            return self._count_drop("disk_low", events)
        full = self._file.bytes > 0 and self._file.bytes + size > self.limits.batch_bytes
        if self.pending_files >= self.limits.max_files and (full or not self._file.is_counted):
            self._update_limit()
            return self._count_drop("max_files", events)
        if full and len(self.retired) < RETIRED_MAX:
            if not self._spares:
                self._spares.append(self._create_segment())
            self._retire("batch_bytes")
        if self._file.locked_file is NO_FILE:
            self._file = self._create_segment()
        file = self._file
        written = self._filesystem.write(file.fd, lines)
        if written != size:
            self._complete(file, lines, written)
        file.bytes += size
        file.events += events
        self._last_appended = file
        self._attend()
        return ENQUEUED

    def _append_nested(self, lines: bytes, events: int) -> Outcome:
        """A signal handler, in the middle of an append that goes on: append and nothing more, or to a file of its own."""
        size = len(lines)
        file, own = self._file, False
        if size > self._bytes_left - file.bytes:
            return self._count_drop("max_bytes", events)
        if self._disk_low:
            return self._count_drop("disk_low", events)
        try:
            if self._repairing or file.locked_file is NO_FILE or not self._ends_with_line_feed(file):
                if len(self.retired) >= 2 * RETIRED_MAX:
                    return self._count_drop("would_block", events)
                file, own = self._create_segment(), True
            written = self._filesystem.write(file.fd, lines)
            if written != size:
                self._filesystem.truncate(file.fd, self._filesystem.size(file.fd) - written)
                return self._count_drop("disk_full", events)
            if own:
                file.bytes, file.events = size, events  # ahead of the sealer, which syncs what has bytes
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

    def _ends_with_line_feed(self, file: Segment) -> bool:
        size = self._filesystem.size(file.fd)
        return size == 0 or self._filesystem.read_at(file.fd, size - 1, 1) == b"\n"

    def _add_retired(self, file: Segment) -> None:
        self._count_as_pending(file)
        self.retired.append(file)

    def _count_as_pending(self, file: Segment) -> None:
        """Among the pending files, from the first event on."""
        if not file.is_counted:
            file.is_counted, file.attend_at = True, self.limits.batch_size
            self.pending_files += 1

    def _update_limit(self) -> None:
        """Set how far the active file may grow without another thought."""
        if self._disk_low or (self.pending_files >= self.limits.max_files and not self._file.is_counted):
            self._limit = 0 if self._file.locked_file is not NO_FILE else _NO_SEGMENT
        elif self._file.locked_file is not NO_FILE:
            self._limit = max(0, min(self._bytes_left, self.limits.batch_bytes))
        else:
            self._limit = _NO_SEGMENT

    def _notify_sealer(self) -> None:
        if not self._sealer_notified:
            self._sealer_notified = True
            self._wake_sealer()

    def _count_drop(self, reason: DropReason, events: int) -> Dropped:
        self.dropped[reason] += events
        return DROPPED[reason]

    def _create_segment(self) -> Segment:
        """For a caller that finds no spare."""
        return Segment(self._directory.create_with_new_name(self._next_segment_name))

    def _next_segment_name(self) -> str:
        """One that was never used, behind those that were, and ahead of the spares that are being made."""
        # No call: a signal handler has another number. Multiples are the spares'.
        self._highest_used += 2 if self._highest_used % _SPARE_NUMBER_STEP == _SPARE_NUMBER_STEP - 1 else 1
        number = self._highest_used
        return layout.active_name(self._writer_id, number)

    def _complete(self, file: Segment, lines: bytes, written: int) -> None:
        """After a short write: take the part back and write the lines again, all or none of them."""
        self._repairing = True
        filesystem = self._filesystem
        self._truncate(file, filesystem.size(file.fd) - written)
        written = filesystem.write(file.fd, lines)
        if written != len(lines):
            self._truncate(file, filesystem.size(file.fd) - written)
            raise OSError(errno.ENOSPC, "the disk takes a part of a line only")
        self._repairing = False

    def _truncate(self, file: Segment, size: int) -> None:
        file.truncated = True  # before, for an interrupt may follow; after, for a sync may come in between
        self._filesystem.truncate(file.fd, size)
        file.truncated = True

    def _start_repair(self) -> None:
        """Repair, as the one who does; raises where the disk does not allow it, and then somebody else has to."""
        self._limit, self._broken, self._repairing = _IN_PROGRESS, False, True
        try:
            self._repair_torn_tail()
        except BaseException:
            self._broken = True
            raise

    def _repair_torn_tail(self) -> None:
        """Finish a rotation that was cut short; cut and count what such an append has left."""
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
                    file.events += more  # no call from here: bytes and events belong together
                file.bytes = end
            self._broken = False
        finally:
            self._repairing = False

    def _undo(self, error: OSError, events: int) -> Dropped:
        """After a failed append: leave nothing of it; where that fails too, let the file be sealed as it is."""
        self._repairing = True
        try:
            file = self._file
            if file.locked_file is not NO_FILE and self._filesystem.size(file.fd) > file.bytes:
                self._truncate(file, file.bytes)
        except OSError:
            file.has_leftover = True
            self._retire("manual")
        finally:
            self._repairing = False
        self._broken = False
        self._update_limit()
        return self._count_drop(drop_reason_of(error), events)

    def _attend(self) -> None:
        """What the hot path leaves out: the first event of a file, and a full file."""
        self._limit = _IN_PROGRESS
        file = self._file
        if file.events and not file.is_counted:
            self._count_as_pending(file)
            self._notify_sealer()
        # The sealer being behind, the file grows: a file more costs it more than events. Without a spare it grows to
        # `batch_bytes`; so too where no further file may begin.
        due = self.limits.batch_size * (1 + len(self.retired) // _GROW_EVERY)
        if file.events >= self.limits.batch_size:
            if file.events < due:
                file.attend_at = min(due, file.events + self.limits.batch_size)  # they may be sealed by then
            elif self._spares and len(self.retired) < RETIRED_MAX and self.pending_files < self.limits.max_files:
                self._retire("batch_size")
            else:  # to look again at each event would cost more than the event
                file.attend_at = file.events + max(1, self.limits.batch_size // SPARE_RECHECK_SHARE)
        self._update_limit()

    def _retire(self, reason: SealReason) -> None:
        """Swap the active file for a spare, or for none."""
        spare = self._spares[0] if self._spares else Segment(NO_FILE)
        # No call, and nothing allocated that could set the garbage collector off: what appends finds the one or the other.
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
        """What is left to do once the files are swapped; done twice, it is as done once."""
        if self._spares and self._spares[0] is self._file:
            self._spares.popleft()
        if self._retiring is not None:
            # What has its sealed name already was there, and is no more.
            if self._retiring is not self._file and not self._retiring.is_sealed and self._retiring not in self.retired:
                self.retired.append(self._retiring)
            self._retiring = None

    # What follows takes the lock itself.

    def create_spares(self, count: int) -> tuple[list[LockedFile], OSError | None]:
        """The sealer's: create and lock so many files to be spares, as far as the disk allows; and what it does not."""
        first = max(self._highest_spare, self._highest_used) // _SPARE_NUMBER_STEP + 1
        numbers = [_SPARE_NUMBER_STEP * number for number in range(first, first + count)]
        self._highest_spare = numbers[-1]
        return self._directory.create_each([layout.active_name(self._writer_id, number) for number in numbers])

    def start(self, pending_bytes: int, pending_files: int) -> None:
        """Begin to accept; what is pending already counts."""
        with self.lock:
            self._bytes_left = self.limits.max_bytes - pending_bytes
            self.pending_files = pending_files
            self._started = True
            self.accepts = not self._closed

    def poll_for_sealer(self) -> int:
        """The sealer's: from now on tell it of news. Returns how many files it should open for the next rotations.

        Twice as many as were filled since it last looked, for a writer that ran out of them could not show its speed.
        """
        self._sealer_notified = False
        if self._limit != _IN_PROGRESS:
            self._marked_polls = 0
        elif self.lock.acquire(blocking=self._marked_polls >= _MARKED_POLLS_MAX):
            try:
                self._marked_polls = 0
                if self._limit == _IN_PROGRESS:
                    # The lock is free and the mark in place: nobody is coming back to take it away.
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
        """Have more files ready; `entered` where their names are durable. Returns those that come after a higher number."""
        spares = [Segment(taken, name_durable=names_durable) for taken in files]
        with self.lock:
            # Callers may have made very many since: adoption, by number, would turn their order around.
            newest = self._highest_used
            self._spares.extend(file for file in spares if file.number > newest)
            return [file.locked_file for file in spares if file.number < newest]

    def rotate(self, reason: SealReason) -> bool:
        """Retire the active file if it holds anything; False in the middle of an append, which must find its file."""
        with self.lock:
            found, self._limit = self._limit, _IN_PROGRESS
            if found == _IN_PROGRESS and not self._broken:
                return False
            try:
                if found == _IN_PROGRESS:
                    self._start_repair()
                if self._file.bytes:
                    self._retire(reason)
                self._update_limit()
            except OSError:
                return False
            except BaseException:
                self._broken = True
                raise
            return True

    def _stop_appending(self, file: Segment, error: OSError) -> None:
        """Have nothing more appended to a file; raises where that cannot be."""
        with self.lock:
            if self._file is file and not self.rotate("manual"):
                raise error

    def retired_segments(self) -> list[Segment]:
        """The retired files, oldest first; without the lock, of which they have no more need."""
        return list(self.retired.copy())

    def remove_oldest_retired(self, count: int) -> None:
        """The first `count` of the retired files have their sealed names."""
        for _ in range(count):
            self.retired.popleft()

    def release_bytes(self, size: int, files: int = 1) -> None:
        """A pending file of `size` bytes is gone, or with 0 `pending_files` so much smaller."""
        with self.lock:
            found, self._limit = self._limit, _IN_PROGRESS
            self._released_bytes += size
            self.pending_files -= files
            self._bytes_left += size
            self._restore_limit(found)

    def set_disk_low(self, *, low: bool) -> None:
        """The sealer's: accept nothing more while the volume is `low` on room."""
        with self.lock:
            if self._disk_low != low:
                found, self._limit = self._limit, _IN_PROGRESS
                self._disk_low = low
                self._restore_limit(found)

    def _restore_limit(self, previous_limit: int) -> None:
        """After a change of what bounds the active file; an append that is under way, or was cut short, does it itself."""
        if previous_limit != _IN_PROGRESS:
            self._update_limit()

    def _pending_bytes(self) -> int:
        return self.limits.max_bytes - self._bytes_left + self._file.bytes

    def progress(self) -> WriterProgress:
        """What was appended and released here so far, to hand to `correct_pending` after a listing."""
        with self.lock:
            return WriterProgress(self._retired_bytes + self._file.bytes, self._released_bytes)

    def correct_pending(self, progress_before: WriterProgress, listed_bytes: int, listed_files: int) -> None:
        """Take a listing's word for what is pending, unless what was done here while it ran explains the difference."""
        with self.lock:
            found, self._limit = self._limit, _IN_PROGRESS
            difference = listed_bytes - self._pending_bytes()
            appended = self._retired_bytes + self._file.bytes - progress_before.appended
            if abs(difference) > appended + self._released_bytes - progress_before.released:
                self.pending_files = listed_files
                self._bytes_left -= difference + appended
            self._restore_limit(found)

    def pending_counts(self) -> tuple[int, int, int]:
        """(pending bytes, pending files, events accepted since start)."""
        with self.lock:
            return self._pending_bytes(), self.pending_files, self._retired_events + self._file.events

    @property
    def appended_bytes(self) -> int:
        """Bytes appended by this process, ever; without the lock, so that it may be behind."""
        return self._retired_bytes + self._file.bytes

    @property
    def accepted_events(self) -> int:
        """Events accepted since start; without the lock, so that it may be behind."""
        return self._retired_events + self._file.events

    def active_segment(self) -> tuple[str, int] | None:
        """The name of the active file and its number of events, if it holds any; without the lock."""
        file = self._file
        return (file.locked_file.name, file.events) if file.bytes else None

    def uncount_drop(self, reason: DropReason, events: int) -> None:
        """Take a refusal back, for it is tried again."""
        with self.lock:
            self.dropped[reason] -= events

    def drop(self, reason: DropReason, events: int = 1) -> Dropped:
        """Count an event that does not get as far as the file."""
        with self.lock:
            return self._count_drop(reason, events)

    def close(self) -> list[LockedFile]:
        """Accept nothing more; retires what is there and returns the empty files, for the sealer to remove."""
        with self.lock:
            self._closed, self.accepts = True, False
            if self._limit == _IN_PROGRESS:
                with contextlib.suppress(OSError):  # sealed as it can be read
                    self._start_repair()
            spares = list(self._spares)
            self._spares.clear()
            if self._file.bytes:
                self._retire("shutdown")
            empty = [file.locked_file for file in (self._file, *spares) if file.locked_file is not NO_FILE]
            self._file = Segment(NO_FILE)
            self._limit = _NO_SEGMENT
            return empty
