"""Applies changes to dead letters and quarantine in a crash-safe order: enqueue, ledger, then the files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pillarbox.admin.scan import FileProblem
from pillarbox.outcome import Dropped
from pillarbox.store import layout
from pillarbox.store.ledger import LedgerWrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.outcome import Durability, Outcome
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.ledger_entries import PurgedEntry, RepairedEntry, ReplayedEntry

ADMIN_LOCK: Final = layout.ADMIN_LOCK
BATCH_PENDING: Final = (
    "the batch is still pending, and its delivery worker may write this file again; try again once it is delivered"
)

_GROUP_FILES_MAX: Final = 100  # files changed with one fsync; after a kill, at most these are changed again
_PROBLEMS_MAX: Final = 1000  # problems held in memory; all are counted
_PER_EVENT_REASONS: Final = frozenset({"invalid", "filtered"})  # drops for these reasons say nothing about other events


class Enqueuer(Protocol):
    """The part of an `Outbox` that a replay needs."""

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events that are JSON already, byte for byte; returns one outcome for each, in order."""


class BatchChange(NamedTuple):
    """A change to the files of one batch."""

    file: str
    payloads: list[bytes]  # events to enqueue before the files are changed
    event_count: int  # number of events concerned, if there are no payloads
    make_ledger_entry: Callable[[int], PurgedEntry | RepairedEntry | ReplayedEntry]  # makes the entry from the number of events
    apply: Callable[[set[int]], None]  # changes the files, given the indexes of the accepted payloads; may raise `OSError`


class ChangeReport:
    """What was changed or would be changed, and what was left unchanged."""

    def __init__(self) -> None:
        self.events = 0
        self.files = 0
        self.problems: list[FileProblem] = []  # the first 1,000
        self.problems_count = 0
        self.drop_reason = ""  # why the outbox accepts no more events; "" if it does
        self.interrupted = False
        self.ledger_locked = False  # another process held the ledger's lock, so nothing more was changed
        self.ledger_behind = False  # the ledger could not be written, so it lacks these changes

    def add_problem(self, file: str, problem: str, line: int | None = None) -> None:
        """Report a file or line that was left unchanged."""
        self.add_problems(FileProblem(file, problem, line))

    def add_problems(self, *problems: FileProblem) -> None:
        """Report several files or lines that were left unchanged."""
        self.problems_count += len(problems)
        self.problems += problems[: _PROBLEMS_MAX - len(self.problems)]

    @property
    def complete(self) -> bool:
        """Whether every requested change was made."""
        return not (self.problems_count or self.drop_reason or self.interrupted or self.ledger_behind)


class WriteLimits(NamedTuple):
    """How much is enqueued with one write: the size of an ordinary batch."""

    max_events: int
    max_bytes: int


def acquire_lock(directory: Directory) -> LockedFile | None:
    """Take the lock that allows changes, until its `fd` is closed. None if another command holds it."""
    return directory.acquire_lock_file(ADMIN_LOCK)


class ChangeExecutor:
    """Applies changes, whole files at a time.

    Args:
        directory: The directory whose files are changed.
        ledger: The ledger of the same directory.
        report: Receives what was changed and what was not.
        should_stop: Called between groups of files; once it returns True, no further group is started.
        on_progress: Called with the number of events of each changed file.
        enqueuer: Accepts the payloads; may be None if there are none.
        durability: The durability with which the payloads are enqueued.
        limits: The limits of one write.
    """

    def __init__(
        self,
        directory: Directory,
        ledger: LedgerWriter,
        report: ChangeReport,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int], None],
        enqueuer: Enqueuer | None = None,
        durability: Durability = "power",
        limits: WriteLimits = WriteLimits(500, 1_000_000),  # noqa: B008 - immutable
    ) -> None:
        self._directory = directory
        self._ledger = ledger
        self._report = report
        self._should_stop = should_stop
        self._on_progress = on_progress
        self._enqueuer = enqueuer
        self._durability = durability
        self._limits = limits
        self._started = False

    def execute(self, changes: Iterable[BatchChange]) -> None:
        """Apply changes in order, until told to stop or until the outbox accepts no more events."""
        group: list[BatchChange] = []
        events = size = 0
        for change in changes:
            group.append(change)
            events += len(change.payloads)
            size += sum(map(len, change.payloads))
            if events >= self._limits.max_events or size >= self._limits.max_bytes or len(group) >= _GROUP_FILES_MAX:
                self._execute_group(group)
                group, events, size = [], 0, 0
            if self._should_stop():
                self._report.interrupted = True
            if self._is_stopped:
                break
        if group and not self._report.interrupted and not self._report.ledger_locked:
            self._execute_group(group)

    @property
    def _is_stopped(self) -> bool:
        return self._report.interrupted or self._report.ledger_locked or bool(self._report.drop_reason)

    def _execute_group(self, group: list[BatchChange]) -> None:
        if not self._started and not self._sync_directory("nothing was changed"):
            # If the deletion of a delivered batch were not durable, the batch could reappear after a power loss, and its
            # delivery worker would write the records that are taken out here again.
            self._report.drop_reason = "io_error"
            return
        self._started = True
        done: list[tuple[BatchChange, set[int], int]] = []
        for change, accepted in zip(group, self._enqueue_events(group), strict=True):
            event_count = len(accepted) if change.payloads else change.event_count
            if accepted or not change.payloads:
                done.append((change, accepted, event_count))
                self._ledger.add(change.make_ledger_entry(event_count))
        if not done:
            return
        # On a full disk the files are changed although the ledger could not be written: that frees space.
        outcome = self._ledger.write(sync=True)
        if outcome is LedgerWrite.LOCKED:
            repeat = "; events that are replayed already are enqueued a second time then, under the same ids"
            problem = "is held by another process; nothing more was changed, try again"
            self._report.add_problem(layout.LEDGER_LOCK, problem + (repeat if any(accepted for _, accepted, _ in done) else ""))
            self._report.ledger_locked = True
            return
        if not outcome:
            self._report.ledger_behind = True
        for change, accepted, event_count in done:
            try:
                change.apply(accepted)
            except OSError as error:
                repeat = "; the next attempt enqueues its events a second time, under the same ids" if accepted else ""
                self._report.add_problem(change.file, f"cannot be changed: {error.strerror}{repeat}")
            else:
                self._report.events += event_count
                self._report.files += 1
                self._on_progress(event_count)
        self._sync_directory("a power loss may undo the changes")
        if self._report.ledger_behind:
            self._report.ledger_behind = not self._ledger.write(sync=True)

    def _sync_directory(self, consequence: str) -> bool:
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            self._report.add_problem(".", f"fsync of the directory failed ({error.strerror}): {consequence}")
            return False
        return True

    def _enqueue_events(self, group: list[BatchChange]) -> list[set[int]]:
        """Enqueue the payloads; returns the indexes of those that are durable now, for each change."""
        accepted: list[set[int]] = [set() for _ in group]
        if self._enqueuer is None:
            return accepted
        for chunk in self._write_chunks(group):
            if self._report.drop_reason:
                break
            outcomes = self._enqueuer.enqueue_json([payload for _, _, payload in chunk], durability=self._durability)
            for (number, index, _), outcome in zip(chunk, outcomes, strict=True):
                if not isinstance(outcome, Dropped):
                    accepted[number].add(index)
                elif outcome.reason in _PER_EVENT_REASONS:
                    self._report.add_problem(group[number].file, f"the outbox dropped an event: {outcome.reason}")
                else:
                    self._report.drop_reason = outcome.reason
        return accepted

    def _write_chunks(self, group: list[BatchChange]) -> Iterator[list[tuple[int, int, bytes]]]:
        """Yield the payloads as (number of the change, index in its payloads, payload), in chunks of one write."""
        chunk: list[tuple[int, int, bytes]] = []
        size = 0
        for number, change in enumerate(group):
            for index, payload in enumerate(change.payloads):
                if chunk and (len(chunk) >= self._limits.max_events or size + len(payload) > self._limits.max_bytes):
                    yield chunk
                    chunk, size = [], 0
                chunk.append((number, index, payload))
                size += len(payload)
        if chunk:
            yield chunk
