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

from pillarbox.outcome import DROP_REASONS, DROPPED, ENQUEUED, Dropped, DropReason, Durability, Outcome
from pillarbox.store import layout
from pillarbox.store.limits import AGAIN_SHARE, Limits, Mark, reason_of
from pillarbox.store.plain import LINE
from pillarbox.store.segment import NOWHERE, ActiveFile, end_of_lines
from pillarbox.store.speed import Appending, quickest
from pillarbox.store.syncing import Syncs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import msgspec

    from pillarbox.store.directory import Directory, Taken
    from pillarbox.store.door import Door, Enqueue
    from pillarbox.store.segment import SealReason

__all__ = ["RETIRED_MAX", "SPARES_MAX", "Limits", "Mark", "Writer", "reason_of"]

RETIRED_MAX: Final = 64  # files that wait for their sync; beyond it the active file grows instead, for each holds a descriptor
SPARES_MAX: Final = 48  # empty files held ready, each with a descriptor
_SPACING: Final = 1000  # of the numbers of spares: between them are those of files that are made while they are
_WAITING: Final = 8  # files that wait for their sync: for each so many, the next may hold `batch_size` events more
_MARK: Final = -1  # an append or a rotation is under way, or was cut short
_NO_FILE: Final = -2  # there is none yet, or none any more
_MARKED_LOOKS_MAX: Final = 10  # then the sealer waits for the lock, to see whose mark it is


class Writer(Appending):
    """Appends lines to the active file and swaps files; shared by the threads of a process.

    `wake()` tells the sealer that there is work; it must be re-entrant and quick: it is called under the lock.
    """

    _file: ActiveFile

    def __init__(self, directory: Directory, limits: Limits, wake: Callable[[], None]) -> None:
        self._directory = directory
        self._filesystem = directory.filesystem
        self.limits = limits
        self._wake = wake
        self.lock = threading.RLock()  # re-entrant: a signal handler may enqueue in the middle of an append
        self._name = directory.new_id()
        self._newest = self._spare = 0  # the highest numbers so far, of a file in use and of a spare
        self._started = False
        self._closed = False
        self.accepts = False  # it has started and is not closed
        self._file = self._appended_to = ActiveFile(NOWHERE)
        self._spares: deque[ActiveFile] = deque()  # ready to be swapped in
        self._leaving: ActiveFile | None = None  # being swapped out; what an interrupt leaves of that, `_repair` finishes
        self._limit = _NO_FILE
        self._broken = False  # an exception cut an append short: the mark is nobody's
        self._mending = False  # the end of the file is being put right: not even a signal handler may append to it
        self._room = 0  # how many bytes the active file may have before `max_bytes` is reached
        self._low = False  # the volume has less room than it must keep
        self._told = False  # the sealer, since it last looked
        self._marked_looks = 0  # of the sealer, in a row, that found the mark in place and the lock taken
        self.files = 0  # pending files, the active one only where it holds something
        self.retired: deque[ActiveFile] = deque()  # oldest first
        self.syncs = Syncs(directory, lambda: self.lock, self._give_up)
        self._retired_events = 0
        self._retired_bytes = 0
        self._released = 0  # bytes of files that are gone
        self.dropped: dict[str, int] = dict.fromkeys(DROP_REASONS, 0)

    def build_enqueue(self, door: Door) -> Enqueue:
        """The hot path: event -> line -> active file."""
        w, write, checksum, template = self, self._filesystem.write, crc32, LINE
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
                w._limit = _MARK
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
                    outcome = w._append_slowly(line, 1, limit)
                except BaseException:
                    w._broken |= limit != _MARK
                    raise
            return outcome if outcome is not None else begin(line, 1)

        return quickest(w, enqueue, door, write)

    def append(self, lines: bytes, events: int) -> Outcome | None:
        """Append whole lines that hold `events` events, all or none; None before `start`."""
        with self.lock:
            found, self._limit = self._limit, _MARK
            try:
                return self._append_slowly(lines, events, found)
            except BaseException:
                self._broken |= found != _MARK
                raise

    def append_kept(self, lines: bytes, events: int) -> tuple[Outcome, ActiveFile]:
        """Append whole lines, for a caller that keeps them until they are synced; refusals are its to count."""
        with self.lock:
            outcome = self.append(lines, events)
            if isinstance(outcome, Dropped):
                self.dropped[outcome.reason] -= events
            return outcome if outcome is not None else DROPPED["closed"], self._appended_to

    def room(self) -> tuple[int, int]:
        """How many events and bytes the active file takes until it has `batch_size`, or the next one, where it has."""
        limits, file = self.limits, self._file
        events, size = limits.batch_size - file.events, limits.batch_bytes - file.bytes
        return (events, size) if min(events, size) > 0 else (limits.batch_size, limits.batch_bytes)

    def refuse_closed(self, events: int) -> Dropped | None:
        """What to answer while it does not accept: None before it has started."""
        return self.refuse("closed", events) if self._started else None

    def is_entered(self) -> bool:
        """Whether this thread is in here already."""
        return self.lock._is_owned()  # type: ignore[attr-defined,no-any-return]  # noqa: SLF001 - as `threading.Condition` does

    def abandon(self) -> None:
        """In a forked child: this is the parent's. Whoever still calls it is sent to `Door.begin`."""
        self.lock = threading.RLock()
        self._started = self._closed = self._broken = self.accepts = False
        self._file, self._limit = ActiveFile(NOWHERE), _NO_FILE
        self._spares.clear()
        self._appended_to = self._file

    # What follows is called with the lock held.

    def _append_slowly(self, lines: bytes, events: int, found: int) -> Outcome | None:
        """Where the file does not simply take the lines; `found` is the limit that stood there."""
        if found == _MARK:
            if not self._broken:
                return self._append_within(lines, events)
            # No call: whoever comes from here on finds somebody at work.
            self._broken, self._mending = False, True
        try:
            try:
                return self._append_with_care(lines, events)
            except OSError as error:
                return self._undo(error, events)
        except BaseException:
            self._broken = True
            raise

    def _append_with_care(self, lines: bytes, events: int) -> Outcome | None:
        """Refuse, mend, or begin another file, and append."""
        if self._closed or not self._started:
            self._limit = _NO_FILE
            return self._refuse("closed", events) if self._started else None
        if self._mending:
            self._repair()
        size = len(lines)
        if size > self._room - self._file.bytes:
            self._allow()
            return self._refuse("max_bytes", events)
        if self._low:
            self._allow()
            return self._refuse("disk_low", events)
        full = self._file.bytes > 0 and self._file.bytes + size > self.limits.batch_bytes
        if self.files >= self.limits.max_files and (full or not self._file.counted):
            self._allow()
            return self._refuse("max_files", events)
        if full and len(self.retired) < RETIRED_MAX:
            if not self._spares:
                self._spares.append(self._new_file())
            self._retire("batch_bytes")
        if self._file.taken is NOWHERE:
            self._file = self._new_file()
        file = self._file
        written = self._filesystem.write(file.fd, lines)
        if written != size:
            self._complete(file, lines, written)
        file.bytes += size
        file.events += events
        self._appended_to = file
        self._attend()
        return ENQUEUED

    def _append_within(self, lines: bytes, events: int) -> Outcome:
        """A signal handler, in the middle of an append that goes on: append and nothing more, or to a file of its own."""
        size = len(lines)
        file, own = self._file, False
        if size > self._room - file.bytes:
            return self._refuse("max_bytes", events)
        if self._low:
            return self._refuse("disk_low", events)
        try:
            if self._mending or file.taken is NOWHERE or not self._ends_whole(file):
                if len(self.retired) >= 2 * RETIRED_MAX:
                    return self._refuse("would_block", events)
                file, own = self._new_file(), True
            written = self._filesystem.write(file.fd, lines)
            if written != size:
                self._filesystem.truncate(file.fd, self._filesystem.size(file.fd) - written)
                return self._refuse("disk_full", events)
            if own:
                file.bytes, file.events = size, events  # ahead of the sealer, which syncs what has bytes
        except OSError as error:
            return self._refuse(reason_of(error), events)
        finally:
            if own:
                self._set_aside(file)
        if own:
            self._retired_bytes += size
            self._retired_events += events
            self._room -= size
        else:
            file.bytes += size
            file.events += events
            self._count(file)
        self._tell_sealer()
        return ENQUEUED

    def _ends_whole(self, file: ActiveFile) -> bool:
        size = self._filesystem.size(file.fd)
        return size == 0 or self._filesystem.read_at(file.fd, size - 1, 1) == b"\n"

    def _set_aside(self, file: ActiveFile) -> None:
        self._count(file)
        self.retired.append(file)

    def _count(self, file: ActiveFile) -> None:
        """Among the pending files, from the first event on."""
        if not file.counted:
            file.counted, file.attend_at = True, self.limits.batch_size
            self.files += 1

    def _allow(self) -> None:
        """Set how far the active file may grow without another thought."""
        if self._low or (self.files >= self.limits.max_files and not self._file.counted):
            self._limit = 0 if self._file.taken is not NOWHERE else _NO_FILE
        elif self._file.taken is not NOWHERE:
            self._limit = max(0, min(self._room, self.limits.batch_bytes))
        else:
            self._limit = _NO_FILE

    def _tell_sealer(self) -> None:
        if not self._told:
            self._told = True
            self._wake()

    def _refuse(self, reason: DropReason, events: int) -> Dropped:
        self.dropped[reason] += events
        return DROPPED[reason]

    def _new_file(self) -> ActiveFile:
        """For a caller that finds no spare."""
        return ActiveFile(self._directory.create_anew(self._own_name))

    def _own_name(self) -> str:
        """One that was never used, behind those that were, and ahead of the spares that are being made."""
        # No call: a signal handler has another number. Multiples are the spares'.
        self._newest += 2 if self._newest % _SPACING == _SPACING - 1 else 1
        number = self._newest
        return layout.active_name(self._name, number)

    def _complete(self, file: ActiveFile, lines: bytes, written: int) -> None:
        """After a short write: take the part back and write the lines again, all or none of them."""
        self._mending = True
        filesystem = self._filesystem
        self._cut(file, filesystem.size(file.fd) - written)
        written = filesystem.write(file.fd, lines)
        if written != len(lines):
            self._cut(file, filesystem.size(file.fd) - written)
            raise OSError(errno.ENOSPC, "the disk takes a part of a line only")
        self._mending = False

    def _cut(self, file: ActiveFile, size: int) -> None:
        file.cut = True  # before, for an interrupt may follow; after, for a sync may come in between
        self._filesystem.truncate(file.fd, size)
        file.cut = True

    def _mend(self) -> None:
        """Repair, as the one who does; raises where the disk does not allow it, and then somebody else has to."""
        self._limit, self._broken, self._mending = _MARK, False, True
        try:
            self._repair()
        except BaseException:
            self._broken = True
            raise

    def _repair(self) -> None:
        """Finish a rotation that was cut short; cut and count what such an append has left."""
        self._mending = True
        try:
            self._finish_retiring()
            file, filesystem = self._file, self._filesystem
            if file.taken is not NOWHERE:
                size = filesystem.size(file.fd)
                end = end_of_lines(filesystem, file.fd, size)
                if end < size:
                    self._cut(file, end)
                if end > file.bytes:
                    more = filesystem.read_at(file.fd, file.bytes, end - file.bytes).count(b"\n")
                    file.events += more  # no call from here: bytes and events belong together
                file.bytes = end
            self._broken = False
        finally:
            self._mending = False

    def _undo(self, error: OSError, events: int) -> Dropped:
        """After a failed append: leave nothing of it; where that fails too, let the file be sealed as it is."""
        self._mending = True
        try:
            file = self._file
            if file.taken is not NOWHERE and self._filesystem.size(file.fd) > file.bytes:
                self._cut(file, file.bytes)
        except OSError:
            file.spoilt = True
            self._retire("manual")
        finally:
            self._mending = False
        self._broken = False
        self._allow()
        return self._refuse(reason_of(error), events)

    def _attend(self) -> None:
        """What the hot path leaves out: the first event of a file, and a full file."""
        self._limit = _MARK
        file = self._file
        if file.events and not file.counted:
            self._count(file)
            self._tell_sealer()
        # The sealer being behind, the file grows: a file more costs it more than events. Without a spare it grows to
        # `batch_bytes`; so too where no further file may begin.
        due = self.limits.batch_size * (1 + len(self.retired) // _WAITING)
        if file.events >= self.limits.batch_size:
            if file.events < due:
                file.attend_at = min(due, file.events + self.limits.batch_size)  # they may be sealed by then
            elif self._spares and len(self.retired) < RETIRED_MAX and self.files < self.limits.max_files:
                self._retire("batch_size")
            else:  # to look again at each event would cost more than the event
                file.attend_at = file.events + max(1, self.limits.batch_size // AGAIN_SHARE)
        self._allow()

    def _retire(self, reason: SealReason) -> None:
        """Swap the active file for a spare, or for none."""
        spare = self._spares[0] if self._spares else ActiveFile(NOWHERE)
        # No call, and nothing allocated that could set the garbage collector off: what appends finds the one or the other.
        self._limit = _MARK
        old = self._leaving = self._file
        old.reason = reason
        self._file = spare
        if spare.number > self._newest:  # noqa: PLR1730 - `max` is a call
            self._newest = spare.number
        self._room -= old.bytes
        self._retired_events += old.events
        self._retired_bytes += old.bytes
        self._finish_retiring()
        self._tell_sealer()

    def _finish_retiring(self) -> None:
        """What is left to do once the files are swapped; done twice, it is as done once."""
        if self._spares and self._spares[0] is self._file:
            self._spares.popleft()
        if self._leaving is not None:
            # What has its sealed name already was there, and is no more.
            if self._leaving is not self._file and not self._leaving.sealed and self._leaving not in self.retired:
                self.retired.append(self._leaving)
            self._leaving = None

    # What follows takes the lock itself.

    def new_files(self, count: int) -> tuple[list[Taken], OSError | None]:
        """The sealer's: create and lock so many files to be spares, as far as the disk allows; and what it does not."""
        first = max(self._spare, self._newest) // _SPACING + 1
        numbers = [_SPACING * number for number in range(first, first + count)]
        self._spare = numbers[-1]
        return self._directory.create_each([layout.active_name(self._name, number) for number in numbers])

    def start(self, pending_bytes: int, pending_files: int) -> None:
        """Begin to accept; what is pending already counts."""
        with self.lock:
            self._room = self.limits.max_bytes - pending_bytes
            self.files = pending_files
            self._started = True
            self.accepts = not self._closed

    def look(self) -> int:
        """The sealer's: from now on tell it of news. Returns how many files it should open for the next rotations.

        Twice as many as were filled since it last looked, for a writer that ran out of them could not show its speed.
        """
        self._told = False
        if self._limit != _MARK:
            self._marked_looks = 0
        elif self.lock.acquire(blocking=self._marked_looks >= _MARKED_LOOKS_MAX):
            try:
                self._marked_looks = 0
                if self._limit == _MARK:
                    # The lock is free and the mark in place: nobody is coming back to take it away.
                    self._mend()
                    self._allow()
            finally:
                self.lock.release()
        else:
            self._marked_looks += 1
        if self._file.taken is NOWHERE or self._closed or len(self.retired) >= RETIRED_MAX:
            return 0
        return min(SPARES_MAX, 2 * len(self.retired) + 1) - len(self._spares)

    def give_spares(self, files: Iterable[Taken], *, entered: bool = False) -> list[Taken]:
        """Have more files ready; `entered` where their names are durable. Returns those that come after a higher number."""
        spares = [ActiveFile(taken, entered=entered) for taken in files]
        with self.lock:
            # Callers may have made very many since: adoption, by number, would turn their order around.
            newest = self._newest
            self._spares.extend(file for file in spares if file.number > newest)
            return [file.taken for file in spares if file.number < newest]

    def rotate(self, reason: SealReason) -> bool:
        """Retire the active file if it holds anything; False in the middle of an append, which must find its file."""
        with self.lock:
            found, self._limit = self._limit, _MARK
            if found == _MARK and not self._broken:
                return False
            try:
                if found == _MARK:
                    self._mend()
                if self._file.bytes:
                    self._retire(reason)
                self._allow()
            except OSError:
                return False
            except BaseException:
                self._broken = True
                raise
            return True

    def _give_up(self, file: ActiveFile, error: OSError) -> None:
        """Have nothing more appended to a file; raises where that cannot be."""
        with self.lock:
            if self._file is file and not self.rotate("manual"):
                raise error

    def waiting(self) -> list[ActiveFile]:
        """The retired files, oldest first; without the lock, of which they have no more need."""
        return list(self.retired.copy())

    def forget_oldest(self, count: int) -> None:
        """The first `count` of the retired files have their sealed names."""
        for _ in range(count):
            self.retired.popleft()

    def release(self, size: int, files: int = 1) -> None:
        """A pending file of `size` bytes is gone, or with 0 `files` so much smaller."""
        with self.lock:
            found, self._limit = self._limit, _MARK
            self._released += size
            self.files -= files
            self._room += size
            self._go_on(found)

    def keep_free(self, *, low: bool) -> None:
        """The sealer's: accept nothing more while the volume is `low` on room."""
        with self.lock:
            if self._low != low:
                found, self._limit = self._limit, _MARK
                self._low = low
                self._go_on(found)

    def _go_on(self, found: int) -> None:
        """After a change of what bounds the active file; an append that is under way, or was cut short, does it itself."""
        if found != _MARK:
            self._allow()

    def _pending_bytes(self) -> int:
        return self.limits.max_bytes - self._room + self._file.bytes

    def mark(self) -> Mark:
        """What was appended and released here so far, to hand to `correct` after a listing."""
        with self.lock:
            return Mark(self._retired_bytes + self._file.bytes, self._released)

    def correct(self, before: Mark, found_bytes: int, found_files: int) -> None:
        """Take a listing's word for what is pending, unless what was done here while it ran explains the difference."""
        with self.lock:
            found, self._limit = self._limit, _MARK
            difference = found_bytes - self._pending_bytes()
            appended = self._retired_bytes + self._file.bytes - before.appended
            if abs(difference) > appended + self._released - before.released:
                self.files = found_files
                self._room -= difference + appended
            self._go_on(found)

    def pending(self) -> tuple[int, int, int]:
        """(pending bytes, pending files, events accepted since start)."""
        with self.lock:
            return self._pending_bytes(), self.files, self._retired_events + self._file.events

    @property
    def appended(self) -> int:
        """Bytes appended by this process, ever; without the lock, so that it may be behind."""
        return self._retired_bytes + self._file.bytes

    @property
    def accepted(self) -> int:
        """Events accepted since start; without the lock, so that it may be behind."""
        return self._retired_events + self._file.events

    def active(self) -> tuple[str, int] | None:
        """The name of the active file and its number of events, if it holds any; without the lock."""
        file = self._file
        return (file.taken.name, file.events) if file.bytes else None

    def forgive(self, reason: DropReason, events: int) -> None:
        """Take a refusal back, for it is tried again."""
        with self.lock:
            self.dropped[reason] -= events

    def refuse(self, reason: DropReason, events: int = 1) -> Dropped:
        """Count an event that does not get as far as the file."""
        with self.lock:
            return self._refuse(reason, events)

    def close(self) -> list[Taken]:
        """Accept nothing more; retires what is there and returns the empty files, for the sealer to remove."""
        with self.lock:
            self._closed, self.accepts = True, False
            if self._limit == _MARK:
                with contextlib.suppress(OSError):  # sealed as it can be read
                    self._mend()
            spares = list(self._spares)
            self._spares.clear()
            if self._file.bytes:
                self._retire("shutdown")
            empty = [file.taken for file in (self._file, *spares) if file.taken is not NOWHERE]
            self._file = ActiveFile(NOWHERE)
            self._limit = _NO_FILE
            return empty
