"""Group commit: who asks for `durability="power"` waits for a write and a sync that serve all who wait at that moment.

One of the waiting threads leads: it appends everybody's lines, syncs the files that they went to, hands the lead on and wakes
the others. So an event waits for two rounds at most, the one that is under way and its own. Coroutines cannot lead; where
nobody else does, a thread of ours leads for them. Nobody holds the writer's lock while syncing.

An interrupt may strike anywhere. A leader that is cut short hands the lead on, and whoever is next answers those for whom it
is unknown how far they came; should even that be cut short, those who wait look each second whether the leader is at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from _thread import allocate_lock
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from pillarbox.outcome import DROPPED, ENQUEUED, ENQUEUED_POWER, Dropped
from pillarbox.store.writer import reason_of

if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Iterable

    from pillarbox.outcome import Outcome
    from pillarbox.store.active import ActiveFile
    from pillarbox.store.directory import Directory
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

QUEUED_BYTES_MAX: Final = 64 * 2**20  # lines in memory that nobody has begun to append; above, would_block
_PATIENCE_S: Final = 1.0  # before somebody who waits looks whether the leader is still at work
_NOBODY: Final = 0


class _Turn:
    """A thread that waits: for its outcome, or to lead."""

    __slots__ = ("following", "lock", "outcome")

    def __init__(self) -> None:
        self.lock = _taken_lock()
        self.outcome: Outcome | None = None
        self.following: _Turn | None = None  # whom it wakes when it is woken: all at once would fight for the interpreter


_Entry = tuple[bytes, int, _Turn | asyncio.Future["Outcome"]]  # whole lines, how many events, who waits


class _Chunk(NamedTuple):
    """Entries that were appended together."""

    entries: list[_Entry]
    lines: bytes
    file: ActiveFile
    end: int  # how many bytes of the file must be durable


class Committer:
    """Appends to a `Writer` and answers when that is durable. Of one process; safe to share between threads and loops."""

    def __init__(self, directory: Directory, writer: Writer) -> None:
        self._directory = directory
        self._writer = writer
        self._lock = writer.lock
        self._queue: deque[_Entry] = deque()
        self._queued_bytes = 0  # roughly: it is counted without a lock, and set right by each leader
        self._appending: list[_Entry] = []  # by the leader, at this moment
        self._chunks: list[_Chunk] = []  # appended, and not known to be durable
        self._leader = _NOBODY
        self._busy: set[int] = set()  # threads that are in here
        self._helper: threading.Thread | None = None
        self._helper_turn = _taken_lock()

    def commit(self, lines: bytes, events: int) -> Outcome | None:
        """Append whole lines and wait until they are durable; None before the writer has started.

        A signal handler that interrupts this thread in here, or while it appends, is refused: it would wait for itself.
        """
        writer = self._writer
        me = threading.get_ident()
        if me in self._busy or writer.is_entered() or self._queued_bytes + len(lines) > QUEUED_BYTES_MAX:
            return writer.refuse("would_block", events)
        if not writer.accepts:
            return writer.refuse_closed(events)
        turn = _Turn()
        try:
            self._busy.add(me)
            self._queued_bytes += len(lines)
            self._queue.append((lines, events, turn))
            while turn.outcome is None:
                if self._may_lead(me):
                    self._lead()
                else:
                    turn.lock.acquire(timeout=_PATIENCE_S)
        finally:
            self._busy.discard(me)
            if turn.following is not None:
                _release(turn.following.lock)
        return turn.outcome

    def commit_async(self, lines: bytes, events: int) -> asyncio.Future[Outcome] | Outcome | None:
        """`commit`, for a coroutine: what it is to await. Cancelled, what is queued or appended stays."""
        writer = self._writer
        if self._queued_bytes + len(lines) > QUEUED_BYTES_MAX:
            return writer.refuse("would_block", events)
        if not writer.accepts:
            return writer.refuse_closed(events)
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queued_bytes += len(lines)
        self._queue.append((lines, events, future))
        if self._leader == _NOBODY:
            self._call_helper()
        return future

    def kept(self, file: ActiveFile) -> list[tuple[int, bytes]]:
        """What waits in memory for the sync of a file: offsets and lines."""
        with self._lock:
            return [(chunk.end - len(chunk.lines), chunk.lines) for chunk in self._chunks if chunk.file is file]

    def _may_lead(self, me: int) -> bool:
        if self._leader in self._busy and self._leader != me:
            return False
        with self._lock:
            if self._leader in self._busy and self._leader != me:
                return False
            self._leader = me
            return True

    def _lead(self) -> None:
        """One round."""
        answers: list[tuple[_Entry, Outcome]] = []
        troubles: list[str] = []
        try:
            self._answer(self._appending, DROPPED["io_error"], answers)  # of a leader that was cut short: nobody knows
            self._appending = []
            self._append_all(answers)
            troubles = self._sync_all(answers)
        finally:
            self._hand_on()
            _wake(answers)
        for trouble in troubles:
            log.error("%s", trouble)

    def _append_all(self, answers: list[tuple[_Entry, Outcome]]) -> None:
        """Append what is queued, as many lines at a time as a file takes."""
        left = len(self._queue)  # who comes meanwhile, comes with the next round
        self._queued_bytes = 0
        while left:
            with self._lock:
                room_events, room_bytes = self._writer.room()
                entries = self._appending = [self._queue.popleft()]
                room_events -= entries[0][1]
                room_bytes -= len(entries[0][0])
                while len(entries) < left and self._queue[0][1] <= room_events and len(self._queue[0][0]) <= room_bytes:
                    entry = self._queue.popleft()
                    entries.append(entry)
                    room_events -= entry[1]
                    room_bytes -= len(entry[0])
                left -= len(entries)
                refused = self._append(entries)
            if refused is not None and len(entries) > 1:
                # One line may fit where all of them do not.
                for entry in entries:
                    self._answer([entry], self._append([entry]), answers)
            else:
                self._answer(entries, refused, answers)
            self._appending = []

    def _append(self, entries: list[_Entry]) -> Outcome | None:
        """Append entries with one write; what they are refused for, or None."""
        lines = b"".join([entry[0] for entry in entries])
        with self._lock:
            outcome, file = self._writer.append_kept(lines, sum([entry[1] for entry in entries]))
            if outcome is not ENQUEUED:
                return outcome
            self._chunks.append(_Chunk(entries, lines, file, file.bytes))  # before anybody can sync it
            return None

    def _sync_all(self, answers: list[tuple[_Entry, Outcome]]) -> list[str]:
        """Make durable what was appended, and answer. Returns what there is to be logged."""
        chunks = list(self._chunks)
        troubles: list[str] = []
        failed: dict[ActiveFile, OSError] = {}
        files = dict.fromkeys(chunk.file for chunk in chunks)
        for file in files:
            try:
                troubles.append(self._writer.syncs.make_durable(file, self.kept))
            except OSError as error:
                failed[file] = error
        nameless = [file for file in files if not file.entered and file not in failed]
        if nameless:
            try:
                self._directory.filesystem.sync_directory(self._directory.path)
            except OSError as error:
                failed |= dict.fromkeys(nameless, error)
            else:
                for file in nameless:
                    file.entered = True
        for chunk in chunks:
            refused = failed.get(chunk.file)
            durable = refused is None and chunk.end <= chunk.file.synced
            reason = "io_error" if refused is None else reason_of(refused)
            self._answer(chunk.entries, ENQUEUED_POWER if durable else DROPPED[reason], answers)
        with self._lock:
            del self._chunks[: len(chunks)]
        troubles += [f"{file.taken.name}: not made durable: {error}" for file, error in failed.items()]
        return [trouble for trouble in troubles if trouble]

    def _answer(self, entries: list[_Entry], outcome: Outcome | None, answers: list[tuple[_Entry, Outcome]]) -> None:
        """Note an outcome; None is none yet."""
        if outcome is None:
            return
        for entry in entries:
            if isinstance(outcome, Dropped):
                self._writer.refuse(outcome.reason, entry[1])
            if isinstance(entry[2], _Turn):
                entry[2].outcome = outcome
            answers.append((entry, outcome))

    def _hand_on(self) -> None:
        """Let somebody lead who waits: before the group is woken, so that the next sync begins at once."""
        with self._lock:
            self._leader = _NOBODY
            waiting = [*self._appending, *(entry for chunk in self._chunks for entry in chunk.entries)]
            if self._queue:  # others append to it at this moment; nobody takes from it without the lock
                waiting.append(self._queue[0])
            for _, _, who in waiting:
                if isinstance(who, _Turn) and who.outcome is None:
                    _release(who.lock)
                    return
            if waiting:
                self._call_helper()

    def _call_helper(self) -> None:
        """Have our thread lead: the first who waits is a coroutine."""
        if self._helper is None:
            with self._lock:
                if self._helper is None:
                    self._helper = threading.Thread(target=self._help, name="pillarbox-committer", daemon=True)
                    self._helper.start()
        _release(self._helper_turn)

    def _help(self) -> None:
        me = threading.get_ident()
        self._busy.add(me)
        while True:
            self._helper_turn.acquire()
            while (self._queue or self._appending or self._chunks) and self._may_lead(me):
                self._lead()


def _wake(answers: Iterable[tuple[_Entry, Outcome]]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Outcome], Outcome]]] = {}
    first = last = None
    for (_, _, who), outcome in answers:
        if isinstance(who, _Turn):
            if last is None:
                first = who
            else:
                last.following = who
            last = who
        else:
            loops.setdefault(who.get_loop(), []).append((who, outcome))
    for loop, settled in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_settle, settled)
    if first is not None:
        _release(first.lock)


def _settle(settled: list[tuple[asyncio.Future[Outcome], Outcome]]) -> None:
    for future, outcome in settled:
        if not future.done():
            future.set_result(outcome)


def _taken_lock() -> LockType:
    lock = allocate_lock()
    lock.acquire()
    return lock


def _release(lock: LockType) -> None:
    """Let whoever waits for a lock go on; twice is as once."""
    with contextlib.suppress(RuntimeError):
        lock.release()
