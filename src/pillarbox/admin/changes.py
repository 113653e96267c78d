"""What acts: events in through the front door, then the ledger, then the file that kept them; some files at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pillarbox.admin.dead_letters import Trouble
from pillarbox.outcome import Dropped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pillarbox.outcome import Durability, Outcome
    from pillarbox.store.directory import Directory, Taken
    from pillarbox.store.ledger import Ledger, Purged, Repaired, Replayed

MEND_LOCK: Final = "mend.lock"
_FILES_MAX: Final = 100  # changed together: what a kill has gone in twice is bounded, and one sync serves them all
_TROUBLES_MAX: Final = 1000  # kept to be named; all are counted
_ONES_OWN: Final = frozenset({"invalid", "filtered"})  # an event is refused for itself: others may still go in


class Door(Protocol):
    """The part of an `Outbox` through which events come back."""

    def enqueue_json(self, payloads: Iterable[bytes], *, durability: Durability | None = None) -> list[Outcome]:
        """Store events that are JSON already, byte for byte; one outcome for each, in order."""


class Change(NamedTuple):
    """What is to happen to the files of one batch."""

    file: str
    sends: list[bytes]  # events that go in before
    events: int  # how many are concerned where none are sent
    entry: Callable[[int], Purged | Repaired | Replayed]  # the ledger's, for so many
    finish: Callable[[set[int]], None]  # change the file, for the `sends` at these indexes went in; may raise `OSError`


class Report:
    """What was done, or would be, and what was not."""

    def __init__(self) -> None:
        self.events = 0
        self.files = 0
        self.troubles: list[Trouble] = []
        self.troubles_count = 0
        self.refused = ""  # why the front door takes nothing more
        self.interrupted = False
        self.ledger_behind = False  # it could not be written: what was done is not in it

    def trouble(self, file: str, problem: str, line: int | None = None) -> None:
        """Something is left as it is."""
        self.add(Trouble(file, problem, line))

    def add(self, *troubles: Trouble) -> None:
        """Some things are left as they are."""
        self.troubles_count += len(troubles)
        self.troubles += troubles[: _TROUBLES_MAX - len(self.troubles)]

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was done."""
        return not (self.troubles_count or self.refused or self.interrupted or self.ledger_behind)


class Bounds(NamedTuple):
    """How much goes in with one write: what makes a batch of the usual size."""

    events: int
    bytes: int


def take_turn(directory: Directory) -> Taken | None:
    """The lock of whoever changes what is kept, until its `fd` is closed; None where another command has it."""
    return directory.take_lock(MEND_LOCK)


class Carrier:
    """Carries changes out, whole files at a time, and never begins the next ones once it is told to stop."""

    def __init__(
        self,
        directory: Directory,
        ledger: Ledger,
        report: Report,
        stop: Callable[[], bool],
        progress: Callable[[int], None],
        door: Door | None = None,
        durability: Durability = "power",
        bounds: Bounds = Bounds(500, 1_000_000),  # noqa: B008 - immutable
    ) -> None:
        self._directory = directory
        self._ledger = ledger
        self._report = report
        self._stop = stop
        self._progress = progress
        self._door = door
        self._durability = durability
        self._bounds = bounds
        self._begun = False

    def carry_out(self, changes: Iterable[Change]) -> None:
        """Do them, in order."""
        together: list[Change] = []
        events = size = 0
        for change in changes:
            together.append(change)
            events += len(change.sends)
            size += sum(map(len, change.sends))
            if events >= self._bounds.events or size >= self._bounds.bytes or len(together) >= _FILES_MAX:
                self._do(together)
                together, events, size = [], 0, 0
            if self._stop():
                self._report.interrupted = True
            if self._report.interrupted or self._report.refused:
                break
        if together and not self._report.interrupted:
            self._do(together)

    def _do(self, changes: list[Change]) -> None:
        if not self._begun and not self._sync("nothing was done"):
            # A removal of the deliverer's that is not durable could bring a batch back, and with it what is taken out here.
            self._report.refused = "io_error"
            return
        self._begun = True
        accepted = self._send(changes)
        done: list[tuple[Change, set[int], int]] = []
        for change, indexes in zip(changes, accepted, strict=True):
            events = len(indexes) if change.sends else change.events
            if indexes or not change.sends:
                done.append((change, indexes, events))
                self._ledger.note(change.entry(events))
        if not done:
            return
        # Where there is no room for it the files are changed all the same: that makes room.
        if not self._ledger.write(sync=True):
            self._report.ledger_behind = True
        for change, indexes, events in done:
            try:
                change.finish(indexes)
            except OSError as error:
                again = "; what went in goes in a second time with the next try, under the same ids" if indexes else ""
                self._report.trouble(change.file, f"cannot be changed: {error.strerror}{again}")
            else:
                self._report.events += events
                self._report.files += 1
                self._progress(events)
        self._sync("power loss may undo what was done")
        if self._report.ledger_behind:
            self._report.ledger_behind = not self._ledger.write(sync=True)

    def _sync(self, otherwise: str) -> bool:
        try:
            self._directory.filesystem.sync_directory(self._directory.path)
        except OSError as error:
            self._report.trouble(".", f"the directory cannot be synced ({error.strerror}): {otherwise}")
            return False
        return True

    def _send(self, changes: list[Change]) -> list[set[int]]:
        """Put the events in; which of each change's are durable now."""
        accepted: list[set[int]] = [set() for _ in changes]
        if self._door is None:
            return accepted
        for part in self._parts(changes):
            if self._report.refused:
                break
            outcomes = self._door.enqueue_json([payload for _, _, payload in part], durability=self._durability)
            for (number, index, _), outcome in zip(part, outcomes, strict=True):
                if not isinstance(outcome, Dropped):
                    accepted[number].add(index)
                elif outcome.reason in _ONES_OWN:
                    self._report.trouble(changes[number].file, f"an event was refused at the door: {outcome.reason}")
                else:
                    self._report.refused = outcome.reason
        return accepted

    def _parts(self, changes: list[Change]) -> Iterator[list[tuple[int, int, bytes]]]:
        """(change, index in its `sends`, event) of all, as much at a time as goes in with one write."""
        part: list[tuple[int, int, bytes]] = []
        size = 0
        for number, change in enumerate(changes):
            for index, payload in enumerate(change.sends):
                if part and (len(part) >= self._bounds.events or size + len(payload) > self._bounds.bytes):
                    yield part
                    part, size = [], 0
                part.append((number, index, payload))
                size += len(payload)
        if part:
            yield part
