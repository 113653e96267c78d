"""Group commit: who asks for `durability="power"` waits for a write and a sync that serve all who wait at that moment.

One of the waiting threads leads: it appends everybody's lines, syncs the files that they went to, hands the lead on and wakes
the others. So an event waits for two rounds at most, the one that is under way and its own. Coroutines cannot lead; where
nobody else does, a thread of ours leads for them, and wakes with one callback all of a group that belong to one event loop.
Nobody holds the writer's lock while syncing.

An interrupt may strike anywhere. A leader that is cut short hands the lead on, and whoever is next answers those for whom it
is unknown how far they came; should even that be cut short, threads that wait look each second whether the leader is at work,
and our thread is called for the coroutines.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from _thread import allocate_lock
from asyncio import get_running_loop
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from pillarbox._native import CommitFuture, encode_record, gather_group, resolve_futures
from pillarbox.outcome import DROPPED, ENQUEUED, ENQUEUED_POWER, Dropped
from pillarbox.store.writer import drop_reason_of

if TYPE_CHECKING:
    import asyncio
    from _thread import LockType
    from collections.abc import Callable, Iterable, Iterator
    from types import EllipsisType
    from typing import Any

    from pillarbox.outcome import Outcome
    from pillarbox.store.append_hooks import AppendHooks
    from pillarbox.store.directory import Directory
    from pillarbox.store.segment import Segment
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

QUEUED_BYTES_MAX: Final = 64 * 2**20  # lines in memory that nobody has begun to append; above, would_block
_LEADER_CHECK_S: Final = 1.0  # before somebody who waits looks whether the leader is still at work
_NO_LEADER: Final = 0


class _WaitingThread:
    """A thread that waits: for its outcome, or to lead."""

    __slots__ = ("events", "lines", "lock", "next_to_wake", "outcome")

    loop: Final = None

    def __init__(self, lines: bytes, events: int) -> None:
        self.lines = lines
        self.events = events
        self.lock = _acquired_lock()
        self.outcome: Outcome | None = None
        self.next_to_wake: _WaitingThread | None = (
            None  # whom it wakes when it is woken: all at once would fight for the interpreter
        )


_PendingCommit = _WaitingThread | CommitFuture  # who waits, with whole lines, and how many events they are


class _AppendGroup(NamedTuple):
    """Entries that are appended together."""

    entries: list[_PendingCommit]
    lines: bytes
    events: int
    loop: asyncio.AbstractEventLoop | EllipsisType | None  # of all; None where they are threads, ... where it is not one

    def by_loop(self) -> Iterator[tuple[asyncio.AbstractEventLoop | None, list[_PendingCommit]]]:
        """The entries of each loop."""
        if self.loop is not ...:
            yield self.loop, self.entries[:]
            return
        for loop in {entry.loop for entry in self.entries}:
            yield loop, [entry for entry in self.entries if entry.loop is loop]


class _AppendedGroup(NamedTuple):
    """A party that was appended."""

    group: _AppendGroup
    segment: Segment
    end: int  # how many bytes of the file must be durable


class _LoopResults:
    """Coroutines of one loop that have the same outcome; who was woken has left the list."""

    __slots__ = ("loop", "outcome", "waiters")

    def __init__(self, loop: asyncio.AbstractEventLoop, waiters: list[CommitFuture], outcome: Outcome) -> None:
        self.loop = loop
        self.waiters = waiters
        self.outcome = outcome


class GroupCommitter:
    """Appends to a `Writer` and answers when that is durable. Of one process; safe to share between threads and loops."""

    def __init__(self, directory: Directory, writer: Writer) -> None:
        self._directory = directory
        self._writer = writer
        self._lock = writer.lock
        self._queue: list[_PendingCommit] = []  # anybody appends; whoever leads takes from its front
        self._queued_bytes = 0  # roughly: it is counted without a lock, and set right by each leader
        self._appending: list[_PendingCommit] = []  # by the leader, at this moment
        self._appended: list[_AppendedGroup] = []  # appended, and not known to be durable
        self._unwoken: deque[_LoopResults] = deque()  # and not woken
        self._leader = _NO_LEADER
        self._threads_inside: set[int] = set()  # threads that are in here
        self._helper: threading.Thread | None = None
        self._helper_lock = _acquired_lock()

    def commit(self, lines: bytes, events: int) -> Outcome | None:
        """Append whole lines and wait until they are durable; None before the writer has started.

        A signal handler that interrupts this thread in here, or while it appends, is refused: it would wait for itself.
        """
        writer = self._writer
        me = threading.get_ident()
        if (
            me in self._threads_inside
            or writer.is_locked_by_this_thread()
            or self._queued_bytes + len(lines) > QUEUED_BYTES_MAX
        ):
            return writer.drop("would_block", events)
        if not writer.accepts:
            return writer.drop_when_closed(events)
        turn = _WaitingThread(lines, events)
        try:
            self._threads_inside.add(me)
            self._queued_bytes += len(lines)
            self._queue.append(turn)
            while turn.outcome is None:
                if self._try_to_lead(me):
                    self._run_round()
                else:
                    turn.lock.acquire(timeout=_LEADER_CHECK_S)
        finally:
            self._threads_inside.discard(me)
            cut_short = turn.outcome is None
            if cut_short:
                turn.outcome = DROPPED["io_error"]  # nobody waits for it: the lead is not to be handed to it
            if turn.next_to_wake is not None:
                _release_lock(turn.next_to_wake.lock)
            # Cut short while leading, handing on or waking, or handed the lead: threads that wait see to that themselves.
            if self._unwoken or ((cut_short or self._leader == me) and self._has_waiting_coroutines()):
                self._wake_helper()
        return turn.outcome

    def build_start_commit(
        self, door: AppendHooks, start_commit_slowly: Callable[[bytes], CommitFuture | Outcome]
    ) -> Callable[[Any], CommitFuture | Outcome]:
        """`start_commit` with all before it: event -> line -> what is to be awaited; one closure, as `Writer.build_enqueue`.

        Lines that it does not simply take it hands to `start_commit_slowly`.
        """
        writer = self._writer
        queue, limit, helper_turn = self._queue, QUEUED_BYTES_MAX, self._helper_lock
        encode, event_type, bytes_max = door.encode, door.event_type, door.event_bytes_max

        def begin(event: Any) -> CommitFuture | Outcome:
            """Queue one event for a coroutine."""
            try:
                payload = encode(event)
                if type(event) is not event_type or len(payload) > bytes_max:
                    door.raise_invalid(event, payload)
            except Exception as error:  # noqa: BLE001 - whatever an event does when encoded, the caller goes on
                return door.drop_invalid(event, error)
            lines = encode_record(payload)
            size = self._queued_bytes + len(lines)
            if size > limit or not writer.accepts:
                return start_commit_slowly(lines)
            waiter = CommitFuture(lines, 1, get_running_loop())
            self._queued_bytes = size
            queue.append(waiter)
            if self._leader == _NO_LEADER and helper_turn.locked():
                self._wake_helper()
            return waiter

        return begin

    def start_commit(self, lines: bytes, events: int) -> CommitFuture | Outcome | None:
        """`commit`, for a coroutine: what it is to await. Cancelled, what is queued or appended stays."""
        writer = self._writer
        size = self._queued_bytes + len(lines)
        if size > QUEUED_BYTES_MAX:
            return writer.drop("would_block", events)
        if not writer.accepts:
            return writer.drop_when_closed(events)
        waiter = CommitFuture(lines, events, get_running_loop())
        self._queued_bytes = size
        self._queue.append(waiter)
        if self._leader == _NO_LEADER and self._helper_lock.locked():
            self._wake_helper()
        return waiter

    def unsynced_lines(self, file: Segment) -> list[tuple[int, bytes]]:
        """What waits in memory for the sync of a file: offsets and lines."""
        with self._lock:
            return [
                (chunk.end - len(chunk.group.lines), chunk.group.lines) for chunk in self._appended if chunk.segment is file
            ]

    def _has_waiting_coroutines(self) -> bool:
        """Whether any waits that is not answered."""
        with self._lock:
            entries = [*self._unanswered(), *self._queue]
        return any(entry.loop is not None for entry in entries)

    def _unanswered(self) -> list[_PendingCommit]:
        """Those whose lines a leader has begun to append, and has not answered. With the lock."""
        return [*self._appending, *(entry for chunk in self._appended for entry in chunk.group.entries)]

    def _try_to_lead(self, me: int) -> bool:
        if self._leader in self._threads_inside and self._leader != me:
            return False
        with self._lock:
            if self._leader in self._threads_inside and self._leader != me:
                return False
            self._leader = me
            return True

    def _run_round(self) -> None:
        """One round."""
        woken: list[_WaitingThread] = []
        troubles: list[str] = []
        try:
            self._fail_interrupted_group(woken)
            self._append_all(woken)
            self._wake_loops()  # with what the round before has left: they go on while this one syncs
            troubles = self._sync_all(woken)
        finally:
            self._pass_leadership()
            self._wake_waiters(woken)
        for trouble in troubles:
            log.error("%s", trouble)

    def _fail_interrupted_group(self, woken: list[_WaitingThread]) -> None:
        """From a leader that was cut short: answer those of whom nobody knows how far they came."""
        if self._appending:
            known = {id(entry) for chunk in self._appended for entry in chunk.group.entries}
            known.update(map(id, self._queue))
            unknown = [entry for entry in self._appending if id(entry) not in known]
            self._assign_results(_append_group_of(unknown), DROPPED["io_error"], woken)
            self._appending = []

    def _append_all(self, woken: list[_WaitingThread]) -> None:
        """Append what is queued, as many lines at a time as a file takes."""
        left = len(self._queue)  # who comes meanwhile, comes with the next round
        self._queued_bytes = 0
        while left:
            with self._lock:
                party = _AppendGroup(*gather_group(self._queue, left, *self._writer.batch_room()))
                self._appending = party.entries
                del self._queue[: len(party.entries)]  # after they are noted: cut short in between, they are in both
                left -= len(party.entries)
                refused = self._append_group(party)
            if refused is not None and len(party.entries) > 1:
                # One line may fit where all of them do not.
                for at, entry in enumerate(party.entries, 1):
                    one = _append_group_of([entry])
                    self._assign_results(one, self._append_group(one), woken)
                    self._appending = party.entries[at:]
            else:
                self._assign_results(party, refused, woken)
            self._appending = []

    def _append_group(self, party: _AppendGroup) -> Outcome | None:
        """Append a party with one write; what it is refused for, or None."""
        with self._lock:
            outcome, file = self._writer.append_unsynced(party.lines, party.events)
            if outcome is not ENQUEUED:
                return outcome
            self._appended.append(_AppendedGroup(party, file, file.bytes))  # before anybody can sync it
            return None

    def _sync_all(self, woken: list[_WaitingThread]) -> list[str]:
        """Make durable what was appended, and answer, file by file. Returns what there is to be logged."""
        troubles: list[str] = []
        files = dict.fromkeys(chunk.segment for chunk in self._appended)
        nameless: OSError | None = None  # the sync of the directory, of which there is one, has failed
        for file in files:
            self._wake_loops()  # of the file before: they go on while this one is synced
            chunks = [chunk for chunk in self._appended if chunk.segment is file]
            refused: OSError | None = None
            try:
                troubles.append(self._writer.syncer.sync(file, self.unsynced_lines))
                if not file.name_durable:
                    if nameless is None:
                        nameless = self._sync_names(files)
                    refused = nameless
            except OSError as error:
                refused = error
            for chunk in chunks:
                durable = refused is None and chunk.end <= file.synced_bytes
                reason = "io_error" if refused is None else drop_reason_of(refused)
                self._assign_results(chunk.group, ENQUEUED_POWER if durable else DROPPED[reason], woken)
            with self._lock:
                del self._appended[: len(chunks)]
            if refused is not None:
                troubles.append(f"{file.locked_file.name}: not made durable: {refused}")
        return [trouble for trouble in troubles if trouble]

    def _sync_names(self, files: Iterable[Segment]) -> OSError | None:
        """Make the names of files durable; what that failed of, or None."""
        before = [(file, file.locked_file) for file in files]
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            return error
        for file, taken in before:
            if file.locked_file is taken:  # or the sealer has written it anew meanwhile
                file.name_durable = True
        return None

    def _assign_results(self, party: _AppendGroup, outcome: Outcome | None, woken: list[_WaitingThread]) -> None:
        """Note an outcome; None is none yet. Of threads the first goes to `woken`: it wakes the next, and so on."""
        if outcome is None:
            return
        if isinstance(outcome, Dropped):
            self._writer.drop(outcome.reason, party.events)
        for loop, entries in party.by_loop():
            if loop is not None:
                self._unwoken.append(_LoopResults(loop, cast("list[CommitFuture]", entries), outcome))
                continue
            turns = cast("list[_WaitingThread]", entries)
            for before, turn in pairwise(turns):  # first: who happens to look sees its outcome, leaves, and wakes the next
                before.next_to_wake = turn
            for turn in turns:
                turn.outcome = outcome
            woken += turns[:1]

    def _pass_leadership(self) -> None:
        """Let somebody lead who waits: before the group is woken, so that the next sync begins at once."""
        with self._lock:
            self._leader = _NO_LEADER
            # Others append to the queue at this moment; nobody takes from it without the lock.
            waiting = [*self._unanswered(), *self._queue[:1]]
            for who in waiting:
                if isinstance(who, _WaitingThread) and who.outcome is None:
                    _release_lock(who.lock)
                    return
            if waiting:
                self._wake_helper()

    def _wake_waiters(self, woken: list[_WaitingThread]) -> None:
        """Wake those who are answered: a group of coroutines at once; threads one after another, of each party the first."""
        for turn in woken:
            _release_lock(turn.lock)
        # Coroutines hold the interpreter lock from the first to the last: the next round appends before, in a moment.
        if not (self._queue and threading.current_thread() is self._helper):
            self._wake_loops()

    def _wake_loops(self) -> None:
        while self._unwoken:
            with contextlib.suppress(IndexError, ValueError):  # another leader wakes it too: twice is as once
                group = self._unwoken[0]
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    group.loop.call_soon_threadsafe(_wake_group, group)
                self._unwoken.remove(group)

    def _wake_helper(self) -> None:
        """Have our thread lead: the first who waits is a coroutine."""
        if self._helper is None:
            with self._lock:
                if self._helper is None:
                    helper = threading.Thread(target=self._run_helper, name="pillarbox-committer", daemon=True)
                    helper.start()
                    self._helper = helper  # once it is: where none can be had, the next caller tries again
        _release_lock(self._helper_lock)

    def _run_helper(self) -> None:
        me = threading.get_ident()
        self._threads_inside.add(me)
        while True:
            self._helper_lock.acquire()
            while (self._queue or self._appending or self._appended or self._unwoken) and self._try_to_lead(me):
                self._run_round()


def _append_group_of(entries: list[_PendingCommit]) -> _AppendGroup:
    lines = b"".join([entry.lines for entry in entries])
    return _AppendGroup(entries, lines, sum(entry.events for entry in entries), ...)


def _wake_group(group: _LoopResults) -> None:
    """Wake a group, on the thread of its loop."""
    try:
        resolve_futures(group.waiters, group.outcome)
    finally:
        if group.waiters:  # one of the tasks raised what ends the loop, or this round of it
            group.loop.call_soon(_wake_group, group)


def _acquired_lock() -> LockType:
    lock = allocate_lock()
    lock.acquire()
    return lock


def _release_lock(lock: LockType) -> None:
    """Let whoever waits for a lock go on; twice is as once."""
    with contextlib.suppress(RuntimeError):
        lock.release()
