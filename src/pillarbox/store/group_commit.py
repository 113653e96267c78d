"""Group commit: callers with `durability="power"` that wait at the same time share one write and one sync.

One of the waiting threads is the leader. It appends the lines of all callers, syncs the segments, passes leadership on, and
wakes the others. So an event waits for at most two rounds: the one that is under way, and its own. A coroutine cannot lead; if
no thread leads, a helper thread leads for coroutines, and wakes those of one event loop with one callback. No thread holds the
writer's lock while it syncs.

An interrupt may happen anywhere. A leader that is interrupted passes leadership on; the next leader drops the events of which
it is unknown whether they were appended. In case even that is interrupted, waiting threads check once a second whether the
leader still runs, and the helper is woken for coroutines.
"""

from __future__ import annotations

import contextlib
import logging
from asyncio import get_running_loop
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from pillarbox._native import CommitFuture, encode_record, gather_group, resolve_futures
from pillarbox.clock import SystemClock
from pillarbox.forks import check_fork
from pillarbox.outcome import DROPPED, ENQUEUED, ENQUEUED_POWER, Dropped
from pillarbox.store.state_log import StateLog
from pillarbox.system import threads

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator
    from types import EllipsisType
    from typing import Any

    from pillarbox.outcome import Outcome
    from pillarbox.store.append_hooks import AppendHooks
    from pillarbox.store.directory import Directory
    from pillarbox.store.segment import Segment
    from pillarbox.store.writer import Writer

log = logging.getLogger("pillarbox")

# lines in memory that are not being appended yet; beyond it events are dropped with would_block
QUEUED_BYTES_MAX: Final = 64 * 2**20
_LEADER_CHECK_S: Final = 1.0  # after so long a waiting thread checks whether the leader still runs
_NO_LEADER: Final = 0


class _WaitingThread:
    """A thread that waits for its outcome or for leadership."""

    __slots__ = ("events", "lines", "lock", "next_to_wake", "outcome")

    loop: Final = None

    def __init__(self, lines: bytes, events: int) -> None:
        self.lines = lines
        self.events = events
        self.lock = _acquired_lock()
        self.outcome: Outcome | None = None
        self.next_to_wake: _WaitingThread | None = None  # the thread that it wakes: all at once would compete for the GIL


_PendingCommit = _WaitingThread | CommitFuture  # a waiting caller, with its lines and their number of events


class _AppendGroup(NamedTuple):
    """Commits that are appended with one write."""

    entries: list[_PendingCommit]
    lines: bytes
    events: int
    loop: asyncio.AbstractEventLoop | EllipsisType | None  # of all commits; None for threads, ... for several loops

    def by_loop(self) -> Iterator[tuple[asyncio.AbstractEventLoop | None, list[_PendingCommit]]]:
        """The commits of each loop."""
        if self.loop is not ...:
            yield self.loop, self.entries[:]
            return
        for loop in {entry.loop for entry in self.entries}:
            yield loop, [entry for entry in self.entries if entry.loop is loop]


class _AppendedGroup(NamedTuple):
    """An `_AppendGroup` that was appended."""

    group: _AppendGroup
    segment: Segment
    end: int  # number of bytes of the segment that must be durable


class _LoopResults:
    """Coroutines of one loop that get the same outcome. Those that were woken have left the list."""

    __slots__ = ("loop", "outcome", "waiters")

    def __init__(self, loop: asyncio.AbstractEventLoop, waiters: list[CommitFuture], outcome: Outcome) -> None:
        self.loop = loop
        self.waiters = waiters
        self.outcome = outcome


class GroupCommitter:
    """Appends to a `Writer`, and returns once the lines are durable. Shared by the threads and event loops of one process."""

    def __init__(self, directory: Directory, writer: Writer) -> None:
        self._directory = directory
        self._writer = writer
        self._lock = writer.lock
        self._sync_log, self._defect_log = StateLog(SystemClock()), StateLog(SystemClock())
        self._queue: list[_PendingCommit] = []  # any thread appends to it; only the leader takes from its front
        self._queued_bytes = 0  # approximate, because it is counted without a lock; each leader resets it
        self._appending: list[_PendingCommit] = []  # what the leader is appending at this moment
        self._appended: list[_AppendedGroup] = []  # groups that are appended and not known to be durable
        self._unwoken: deque[_LoopResults] = deque()  # callers that have an outcome and are not woken yet
        self._leader = _NO_LEADER
        self._threads_inside: set[int] = set()  # threads that are in `commit`
        self._helper: threads.Thread | None = None
        self._ending = False
        self._helper_lock = _acquired_lock()

    def commit(self, lines: bytes, events: int) -> Outcome | None:
        """Append whole lines and wait until they are durable. None before the writer has started.

        A signal handler that interrupts this thread in here, or in an append, gets `Dropped("would_block")`: it would wait for
        itself.
        """
        writer = self._writer
        me = threads.caller_id()
        if (
            me in self._threads_inside
            or writer.is_locked_by_this_thread()
            or self._queued_bytes + len(lines) > QUEUED_BYTES_MAX
        ):
            return writer.drop("would_block", events)
        if not writer.accepts:
            return writer.drop_when_closed(events)
        waiting = _WaitingThread(lines, events)
        try:
            self._threads_inside.add(me)
            self._queued_bytes += len(lines)
            self._queue.append(waiting)
            while waiting.outcome is None:
                if self._try_to_lead(me):
                    self._run_round()
                else:
                    waiting.lock.acquire(timeout=_LEADER_CHECK_S)
        finally:
            self._threads_inside.discard(me)
            cut_short = waiting.outcome is None
            if cut_short:
                waiting.outcome = DROPPED["io_error"]  # no caller waits any more: leadership must not be passed to it
            if waiting.next_to_wake is not None:
                _release_lock(waiting.next_to_wake.lock)
            # Interrupted while leading, passing leadership or waking, or after leadership was passed to it: threads that wait
            # notice that themselves.
            if self._unwoken or ((cut_short or self._leader == me) and self._has_waiting_coroutines()):
                self._wake_helper()
        return waiting.outcome

    def build_start_commit(
        self, hooks: AppendHooks, start_commit_slowly: Callable[[bytes], CommitFuture | Outcome]
    ) -> Callable[[Any], CommitFuture | Outcome]:
        """Build the hot path of coroutines: encode an event, make a record of it, and queue it.

        One closure, as `Writer.build_enqueue`.

        It passes records to `start_commit_slowly` if it cannot simply queue them.
        """
        writer = self._writer
        queue, limit, helper_turn = self._queue, QUEUED_BYTES_MAX, self._helper_lock
        encode, event_type, bytes_max = hooks.encode, hooks.event_type, hooks.event_bytes_max

        def queue_event(event: Any) -> CommitFuture | Outcome:
            """Queue one event for a coroutine."""
            check_fork()
            try:
                payload = encode(event)
                if type(event) is not event_type or len(payload) > bytes_max:
                    hooks.raise_invalid(event, payload)
            except Exception as error:  # noqa: BLE001 - an event may raise anything when it is encoded; the caller continues
                return hooks.drop_invalid(event, error)
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

        return queue_event

    def start_commit(self, lines: bytes, events: int) -> CommitFuture | Outcome | None:
        """`commit` for a coroutine: returns the awaitable. If it is cancelled, queued or appended lines stay."""
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
        """The lines of a segment that are in memory and not yet synced, with their offsets."""
        with self._lock:
            return [
                (chunk.end - len(chunk.group.lines), chunk.group.lines) for chunk in self._appended if chunk.segment is file
            ]

    def _has_waiting_coroutines(self) -> bool:
        """Whether a coroutine waits that is not answered."""
        with self._lock:
            entries = [*self._unanswered(), *self._queue]
        return any(entry.loop is not None for entry in entries)

    def _has_work(self) -> bool:
        """Whether a commit is not answered, or an answered coroutine is not woken."""
        return bool(self._queue or self._appending or self._appended or self._unwoken)

    def _unanswered(self) -> list[_PendingCommit]:
        """The commits that a leader has begun to append and has not answered. Call it with the lock held."""
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
        """Lead one round."""
        woken: list[_WaitingThread] = []
        errors: list[str] = []
        try:
            self._fail_interrupted_group(woken)
            self._append_all(woken)
            self._wake_loops()  # those of the round before: they continue while this one syncs
            errors = self._sync_all(woken)
        finally:
            self._pass_leadership()
            self._wake_waiters(woken)
        for error in errors:
            if self._sync_log.is_new_problem(error):
                log.error("%s", error)
        if not errors:
            self._sync_log.is_over()

    def _fail_interrupted_group(self, woken: list[_WaitingThread]) -> None:
        """After the interrupt of a leader: drop the events of which it is unknown whether they were appended."""
        if self._appending:
            known = {id(entry) for chunk in self._appended for entry in chunk.group.entries}
            known.update(map(id, self._queue))
            unknown = [entry for entry in self._appending if id(entry) not in known]
            self._assign_results(_append_group_of(unknown), DROPPED["io_error"], woken)
            self._appending = []

    def _append_all(self, woken: list[_WaitingThread]) -> None:
        """Append the queued lines, as many at a time as fit into a segment."""
        left = len(self._queue)  # later callers are in the next round
        self._queued_bytes = 0
        while left:
            with self._lock:
                group = _AppendGroup(*gather_group(self._queue, left, *self._writer.batch_room()))
                self._appending = group.entries
                del self._queue[: len(group.entries)]  # after `_appending` was set: an interrupt in between leaves them in both
                left -= len(group.entries)
                dropped = self._append_group(group)
            if isinstance(dropped, Dropped) and dropped.reason != "io_error" and len(group.entries) > 1:
                # One commit may fit where all of them do not. Not after an I/O error: a part may be written, and would be
                # delivered twice.
                for at, entry in enumerate(group.entries, 1):
                    single = _append_group_of([entry])
                    self._assign_results(single, self._append_group(single), woken)
                    self._appending = group.entries[at:]
            else:
                self._assign_results(group, dropped, woken)
            self._appending = []

    def _append_group(self, group: _AppendGroup) -> Outcome | None:
        """Append a group with one write. Returns the outcome if it was dropped, or None."""
        with self._lock:
            outcome, file = self._writer.append_unsynced(group.lines, group.events)
            if outcome is not ENQUEUED:
                return outcome
            self._appended.append(_AppendedGroup(group, file, file.bytes))  # before anybody can sync it
            return None

    def _sync_all(self, woken: list[_WaitingThread]) -> list[str]:
        """Sync the appended groups and set their outcomes, segment by segment. Returns messages to log."""
        errors: list[str] = []
        files = dict.fromkeys(chunk.segment for chunk in self._appended)
        names_failure: OSError | None = None  # set after the sync of the directory has failed
        for file in files:
            self._wake_loops()  # those of the segment before: they continue while this one is synced
            chunks = [chunk for chunk in self._appended if chunk.segment is file]
            failure: OSError | None = None
            try:
                errors.append(self._writer.syncer.sync(file, self.unsynced_lines))
                if not file.name_durable:
                    if names_failure is None:
                        names_failure = self._sync_names(files)
                    failure = names_failure
            except OSError as error:
                failure = error
            for chunk in chunks:
                durable = failure is None and chunk.end <= file.synced_bytes
                # Whatever the error says: the records are written, so they may be delivered, and no room would help.
                self._assign_results(chunk.group, ENQUEUED_POWER if durable else DROPPED["io_error"], woken)
            with self._lock:
                del self._appended[: len(chunks)]
            if failure is not None:
                errors.append(f"{file.locked_file.name}: not made durable: {failure}")
        return [message for message in errors if message]

    def _sync_names(self, files: Iterable[Segment]) -> OSError | None:
        """Sync the directory, so that the names of the segments are durable. Returns the error, or None."""
        before = [(file, file.locked_file) for file in files]
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            return error
        for file, locked_file in before:
            if file.locked_file is locked_file:  # it is not where the sealer has rewritten the segment meanwhile
                file.name_durable = True
        return None

    def _assign_results(self, group: _AppendGroup, outcome: Outcome | None, woken: list[_WaitingThread]) -> None:
        """Set the outcome of commits; None means not yet. The first thread goes to `woken`, and each thread wakes the next."""
        if outcome is None:
            return
        if isinstance(outcome, Dropped):
            self._writer.drop(outcome.reason, group.events)
        for loop, entries in group.by_loop():
            if loop is not None:
                self._unwoken.append(_LoopResults(loop, cast("list[CommitFuture]", entries), outcome))
                continue
            waiting = cast("list[_WaitingThread]", entries)
            for before, thread in pairwise(waiting):  # set first: a thread that sees its outcome leaves, and wakes the next
                before.next_to_wake = thread
            for thread in waiting:
                thread.outcome = outcome
            woken += waiting[:1]

    def _pass_leadership(self) -> None:
        """Let a waiting caller lead. Called before the group is woken, so that the next sync begins at once."""
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
        """Wake the callers that have an outcome: the coroutines of a loop at once, and of each group the first thread."""
        for thread in woken:
            _release_lock(thread.lock)
        # Woken coroutines hold the GIL until all have run: a leader that has more to append does that first.
        if not (self._queue and self._helper is not None and self._helper.is_current()):
            self._wake_loops()

    def _wake_loops(self) -> None:
        while self._unwoken:
            with contextlib.suppress(IndexError, ValueError):  # another leader may wake them too; that is harmless
                group = self._unwoken[0]
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    group.loop.call_soon_threadsafe(_wake_group, group)
                self._unwoken.remove(group)

    def _wake_helper(self) -> None:
        """Have the helper thread lead: the first waiting caller is a coroutine."""
        if self._helper is None:
            try:
                self._start_helper()
            except RuntimeError:  # no thread could be started
                self._lead_in_this_thread()
                return
        _release_lock(self._helper_lock)

    def _start_helper(self) -> None:
        with self._lock:
            if self._helper is None:
                helper = threads.Thread(target=self._run_helper, name="pillarbox-committer")
                helper.start()
                self._helper = helper  # after it has started: if no thread can be started, the next caller tries again

    def _lead_in_this_thread(self) -> None:
        """Commit the queue in this thread, although its event loop waits for the disk meanwhile."""
        me = threads.caller_id()
        if me in self._threads_inside:  # it leads, and takes what is queued in its next round
            return
        self._threads_inside.add(me)
        try:
            while self._has_work() and self._try_to_lead(me):
                self._run_round()
        finally:
            self._threads_inside.discard(me)

    def stop(self) -> None:
        """End the helper thread, once it has answered all. The writer accepts nothing more."""
        self._ending = True
        if self._helper is not None:
            _release_lock(self._helper_lock)

    def _run_helper(self) -> None:
        me = threads.caller_id()
        self._threads_inside.add(me)
        while not (self._ending and not self._has_work()):
            self._helper_lock.acquire(timeout=_LEADER_CHECK_S if self._ending else -1)
            while self._has_work() and self._try_to_lead(me):
                try:
                    self._run_round()
                except Exception as error:  # a defect must not end this thread, because coroutines would wait forever
                    if self._defect_log.is_new_problem(f"{type(error).__name__}: {error}"):
                        log.exception("%s: a defect in Pillarbox during a group commit", self._directory.path)


def _append_group_of(entries: list[_PendingCommit]) -> _AppendGroup:
    lines = b"".join([entry.lines for entry in entries])
    return _AppendGroup(entries, lines, sum(entry.events for entry in entries), ...)


def _wake_group(group: _LoopResults) -> None:
    """Wake a group, on the thread of its loop."""
    try:
        resolve_futures(group.waiters, group.outcome)
    finally:
        if group.waiters:  # a task has raised an exception that ends this round of the loop, or the loop
            group.loop.call_soon(_wake_group, group)


def _acquired_lock() -> threads.Lock:
    lock = threads.Lock()
    lock.acquire()
    return lock


def _release_lock(lock: threads.Lock) -> None:
    """Release a lock that somebody waits for. Idempotent."""
    with contextlib.suppress(RuntimeError):
        lock.release()
