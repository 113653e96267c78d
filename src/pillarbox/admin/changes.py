"""What acts: events in through the front door, then the ledger, then the file that kept them; some files at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pillarbox.admin.dead_letters import FileProblem
from pillarbox.outcome import Dropped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.outcome import Durability, Outcome
    from pillarbox.store.directory import Directory, LockedFile
    from pillarbox.store.ledger import LedgerWriter
    from pillarbox.store.ledger_entries import PurgedEntry, RepairedEntry, ReplayedEntry

ADMIN_LOCK: Final = "mend.lock"
_GROUP_FILES_MAX: Final = 100  # changed together: what a kill has gone in twice is bounded, and one sync serves them all
_PROBLEMS_MAX: Final = 1000  # kept to be named; all are counted
_PER_EVENT_REASONS: Final = frozenset({"invalid", "filtered"})  # an event is refused for itself: others may still go in


class Enqueuer(Protocol):
    """The part of an `Outbox` through which events come back."""

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events that are JSON already, byte for byte; one outcome for each, in order."""


class BatchChange(NamedTuple):
    """What is to happen to the files of one batch."""

    file: str
    payloads: list[bytes]  # events that go in before
    event_count: int  # how many are concerned where none are sent
    make_ledger_entry: Callable[[int], PurgedEntry | RepairedEntry | ReplayedEntry]  # the ledger's, for so many
    apply: Callable[[set[int]], None]  # change the file, for the `payloads` at these indexes went in; may raise `OSError`


class ChangeReport:
    """What was done, or would be, and what was not."""

    def __init__(self) -> None:
        self.events = 0
        self.files = 0
        self.problems: list[FileProblem] = []
        self.problems_count = 0
        self.drop_reason = ""  # why the front door takes nothing more
        self.interrupted = False
        self.ledger_behind = False  # it could not be written: what was done is not in it

    def add_problem(self, file: str, problem: str, line: int | None = None) -> None:
        """Something is left as it is."""
        self.add_problems(FileProblem(file, problem, line))

    def add_problems(self, *problems: FileProblem) -> None:
        """Some things are left as they are."""
        self.problems_count += len(problems)
        self.problems += problems[: _PROBLEMS_MAX - len(self.problems)]

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was done."""
        return not (self.problems_count or self.drop_reason or self.interrupted or self.ledger_behind)


class WriteLimits(NamedTuple):
    """How much goes in with one write: what makes a batch of the usual size."""

    max_events: int
    max_bytes: int


def acquire_lock(directory: Directory) -> LockedFile | None:
    """The lock of whoever changes what is kept, until its `fd` is closed; None where another command has it."""
    return directory.acquire_lock_file(ADMIN_LOCK)


class ChangeExecutor:
    """Carries changes out, whole files at a time, and never begins the next ones once it is told to stop."""

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
        """Do them, in order."""
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
            if self._report.interrupted or self._report.drop_reason:
                break
        if group and not self._report.interrupted:
            self._execute_group(group)

    def _execute_group(self, group: list[BatchChange]) -> None:
        if not self._started and not self._sync_directory("nothing was done"):
            # A removal of the deliverer's that is not durable could bring a batch back, and with it what is taken out here.
            self._report.drop_reason = "io_error"
            return
        self._started = True
        accepted_of_each = self._enqueue_events(group)
        done: list[tuple[BatchChange, set[int], int]] = []
        for change, accepted in zip(group, accepted_of_each, strict=True):
            event_count = len(accepted) if change.payloads else change.event_count
            if accepted or not change.payloads:
                done.append((change, accepted, event_count))
                self._ledger.add(change.make_ledger_entry(event_count))
        if not done:
            return
        # Where there is no room for it the files are changed all the same: that makes room.
        if not self._ledger.write(sync=True):
            self._report.ledger_behind = True
        for change, accepted, event_count in done:
            try:
                change.apply(accepted)
            except OSError as error:
                again = "; what went in goes in a second time with the next try, under the same ids" if accepted else ""
                self._report.add_problem(change.file, f"cannot be changed: {error.strerror}{again}")
            else:
                self._report.events += event_count
                self._report.files += 1
                self._on_progress(event_count)
        self._sync_directory("power loss may undo what was done")
        if self._report.ledger_behind:
            self._report.ledger_behind = not self._ledger.write(sync=True)

    def _sync_directory(self, consequence: str) -> bool:
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            self._report.add_problem(".", f"the directory cannot be synced ({error.strerror}): {consequence}")
            return False
        return True

    def _enqueue_events(self, changes: list[BatchChange]) -> list[set[int]]:
        """Put the events in; which of each change's are durable now."""
        accepted: list[set[int]] = [set() for _ in changes]
        if self._enqueuer is None:
            return accepted
        for chunk in self._write_chunks(changes):
            if self._report.drop_reason:
                break
            outcomes = self._enqueuer.enqueue_json([payload for _, _, payload in chunk], durability=self._durability)
            for (number, index, _), outcome in zip(chunk, outcomes, strict=True):
                if not isinstance(outcome, Dropped):
                    accepted[number].add(index)
                elif outcome.reason in _PER_EVENT_REASONS:
                    self._report.add_problem(changes[number].file, f"an event was refused at the door: {outcome.reason}")
                else:
                    self._report.drop_reason = outcome.reason
        return accepted

    def _write_chunks(self, changes: list[BatchChange]) -> Iterator[list[tuple[int, int, bytes]]]:
        """(change, index in its `payloads`, event) of all, as much at a time as goes in with one write."""
        chunk: list[tuple[int, int, bytes]] = []
        size = 0
        for number, change in enumerate(changes):
            for index, payload in enumerate(change.payloads):
                if chunk and (len(chunk) >= self._limits.max_events or size + len(payload) > self._limits.max_bytes):
                    yield chunk
                    chunk, size = [], 0
                chunk.append((number, index, payload))
                size += len(payload)
        if chunk:
            yield chunk
