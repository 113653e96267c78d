"""Processes on a simulated disk, a destination, and the account of what is owed to whom.

An event is a number; if it is negative, the destination rejects it for good. A history is a text, one letter of `STEPS` a step. Each
step runs the real code of store and delivery, without threads. The account depends on the disk's trace alone, so that it can be drawn
up for each moment of a history.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from pillarbox.delivery import settlement
from pillarbox.delivery.batch import DeadLetter
from pillarbox.errors import DirectoryUnusableError
from pillarbox.outcome import Enqueued
from pillarbox.sinks.base import Batch, CheckResult, Delivered, DeliveryResult, PartialFailure, Rejection, SinkCapabilities
from pillarbox.store import layout, reader, record, recovery
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import Filesystem
from pillarbox.store.group_commit import GroupCommitter
from pillarbox.store.layout import Kind
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, Op, State
from tests.crash.compiled_order import crash_filesystem
from tests.crash.interleave import deliver_once

OUTBOX_PATH: Final = "/outbox"
LOCKS: Final = frozenset({layout.DELIVER_LOCK, layout.EVICT_LOCK})
LIMITS: Final = WriterLimits(batch_size=2, batch_bytes=10**6, max_bytes=2**29)  # so that two steps fill a file
STEPS: Final = {
    "a": "append an event",
    "p": 'append an event with durability "power"',
    "m": "append two events in one write",
    "x": "append an event that the destination refuses",
    "g": "append a line that is no record",
    "s": "a round of the sealer",
    "r": "retire the active file",
    "d": "deliver what is sealed, and adopt what the dead left",
    "v": "evict what is sealed",
    "c": "close; the next step starts anew",
    "k": "kill the process; the next step starts another",
    "A": "append an event in a second process",
    "P": 'append an event with durability "power" in the second process',
    "S": "a round of the second process's sealer",
    "K": "kill the second process",
}
NO: Final = Rejection("no", "negative")
_NUMBER: Final = re.compile(rb'\{"n":(-?\d+)\}')
_RECORD: Final = re.compile(
    rb'^\{"event":\{"n":(-?\d+)\},"crc":"[0-9a-f]{8}"\}\n', re.MULTILINE
)  # one behind NUL bytes is none
_RUBBISH: Final = re.compile(rb"rubbish (\d+)\n")
_AFTER: Final = 10**6  # the number of the event that is appended after a recovery; one more after a recovery of that
OPERATIONS_MAX: Final = 3000  # of a step on the disk; a few hundred are many


class SimulationViolation(AssertionError):  # noqa: N818 - reads as the sentence it is
    """Something that must never happen."""


def payload_of(number: int) -> bytes:
    """An event's JSON."""
    return b'{"n":%d}' % number


def rubbish_in(data: bytes) -> set[int]:
    """The numbers of the damaged lines that were stored as such."""
    return {int(found) for found in _RUBBISH.findall(data)}


def numbers_in(data: bytes) -> set[int]:
    """The numbers of records and dead letters, and of damaged lines."""
    return {int(found) for pattern in (_NUMBER, _RUBBISH) for found in pattern.findall(data)}


def records_in(data: bytes) -> set[int]:
    """The numbers of whole records, and of damaged lines."""
    return {int(found) for pattern in (_RECORD, _RUBBISH) for found in pattern.findall(data)}


def kind_at(path: str) -> Kind:
    """The kind of the file that a path names."""
    return layout.kind_of(path.rpartition("/")[2])


class Obligations:
    """What is owed at a moment of a trace. Numbers are of events, and of damaged lines, which go to quarantine.

    The trace has marks: offered, acknowledged, promised, refused, delivered, evicting, and that the code reported files as sealed or a
    round of deliveries or evictions as over. The rest follows from the operations: a sealed name promises what is in the file, once the
    code has reported it or the directory is synced; its removal settles that, in the same way.
    """

    def __init__(self) -> None:
        self.offered: set[int] = set()
        self.acknowledged: set[int] = set()  # survive the death of the processes
        self.promised: set[int] = set()  # survive the loss of power too
        self.delivered: set[int] = set()  # known to the destination: may come again, need not
        self.evicted: set[int] = set()
        self.settled: set[int] = set()  # must not come back
        self.unsure: set[int] = set()  # refused, but may be there
        self.refused: set[int] = set()  # the caller was told so: must never arrive
        self.sealed: dict[str, bytes] = {}  # what each sealed file held when it got its name
        self._evicting = False
        self._named: set[int] = set()  # promised with the next sync of the directory
        self._removed: set[int] = set()  # settled with it
        self._doomed: set[int] = set()  # files of which a sync has failed: sealed, they promise nothing new

    def after_crash(self, *, power: bool) -> Obligations:
        """What is owed of a state that a crash has left: only what was durable."""
        other = Obligations()
        other.offered, other.delivered, other.evicted = self.offered.copy(), self.delivered.copy(), self.evicted.copy()
        other.promised = (self.promised if power else self.acknowledged).copy()
        other.acknowledged = other.promised.copy()
        other.settled, other.refused, other.sealed = self.settled.copy(), self.refused.copy(), self.sealed.copy()
        return other

    def apply(self, op: Op, content: Callable[[str], bytes]) -> None:
        """Apply one more operation; `content(path)` is what the running system saw before it."""
        if op.verb == "mark":
            self._mark(op.note)
        elif op.verb == "sync_failed":
            self._doomed.add(op.inode)
        elif op.verb == "rename" and kind_at(op.target) is Kind.SEALED and op.inode not in self._doomed:
            self.sealed[op.target] = data = content(op.path)
            self._named |= records_in(data)
        elif op.verb == "unlink" and kind_at(op.path) is Kind.SEALED:
            gone = records_in(content(op.path))
            self._removed |= gone
            if self._evicting:
                self.evicted |= gone
        elif op.verb == "sync_directory":
            self._keep_word("sealed")
            self._keep_word("over")

    def _mark(self, what: object) -> None:
        assert isinstance(what, tuple)
        name, numbers = what
        if name == "evicting":
            self._evicting = numbers
        elif name == "said":
            self._keep_word(numbers)
        else:
            getattr(self, name).update(numbers)

    def _keep_word(self, what: str) -> None:
        if what == "sealed":
            self.promised |= self._named
            self._named = set()
        else:
            self.settled |= self._removed
            self._removed = set()

    def owed(self, *, power: bool) -> set[int]:
        """What must still arrive, become a dead letter, or be in quarantine."""
        return (self.promised if power else self.acknowledged) - self.delivered - self.evicted


class SimulatedDestination:
    """Accepts everything that is not negative."""

    capabilities = SinkCapabilities(deduplicates_by="nothing", survives="power")

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.arrived: list[int] = []  # the refused ones too

    async def open(self) -> None:
        pass

    def prepare(self, batch: Batch) -> None:
        pass

    async def deliver(self, batch: Batch) -> DeliveryResult:
        return self.answer(batch.payloads)

    def answer(self, payloads: Sequence[bytes]) -> DeliveryResult:
        """Accept, and add a mark to the trace."""
        numbers = list(map(number_of, payloads))
        self.arrived += numbers
        taken = {number for number in numbers if number >= 0}
        self._disk.mark(("delivered", taken))
        refused = {index: NO for index, number in enumerate(numbers) if number < 0}
        return PartialFailure(refused, len(taken)) if refused else Delivered(len(taken))

    async def confirm(self, batches: Sequence[Batch]) -> int:
        raise AssertionError

    async def check(self) -> Iterable[CheckResult]:
        raise AssertionError

    async def close(self) -> None:
        pass


def number_of(payload: bytes) -> int:
    """The number of the event that a payload is."""
    found = _NUMBER.fullmatch(payload)
    if found is None:
        raise SimulationViolation(f"this was never enqueued: {payload!r}")
    return int(found[1])


class SimulationProcess:
    """A process without threads: directory, writer, sealer, committer, and a worker when it delivers."""

    def __init__(
        self,
        filesystem: Filesystem,
        new_id: Callable[[], str],
        clock: ManualClock,
        say: Callable[[str], None],
    ) -> None:
        self.filesystem = filesystem
        self.directory = Directory(OUTBOX_PATH, filesystem, clock, new_id)
        inbox = SealerInbox()
        self.writer = Writer(self.directory, LIMITS, inbox.wake)
        self.committer = GroupCommitter(self.directory, self.writer)
        self.sealer = Sealer(self.directory, self.writer, inbox, clock, 1.0, lambda: say("sealed"), 0, committer=self.committer)
        self._clock = clock

    def start(self) -> None:
        """What an `Outbox` does when it is made and then first used."""
        self.directory.ensure_usable()
        account = self.directory.disk_usage()
        self.directory.seal_after(account.newest_sealed_at)
        self.writer.start(account.pending_bytes, account.pending_files)
        self.sealer.adopt_segments()

    def deliver(self, sink: SimulatedDestination) -> None:
        """Deliver everything, with the worker's own loop."""
        deliver_once(self.directory, sink, self._clock, self.writer.release_bytes)

    def evict(self) -> None:
        """Evict everything that is sealed, as if there were no room at all."""
        capacity, writer = self.sealer.quota, self.writer
        capacity._evicts, writer.limits = True, LIMITS._replace(max_bytes=0)
        try:
            capacity.enforce()
        finally:
            capacity._evicts, writer.limits = False, LIMITS


Wrap = Callable[[CrashFilesystem], Filesystem]


class SimulationWorld:
    """A disk, up to two processes on it, and what happens in a history."""

    def __init__(self, wrap: Wrap = lambda plain: plain) -> None:
        self.disk = Disk()
        self.clock = ManualClock()
        self.new_id = map("{:04d}".format, itertools.count(1)).__next__
        self.destination = SimulatedDestination(self.disk)
        self._operations = 0  # of this step
        self.operations_left: int | None = None  # operations until the process dies
        self.can_truncate = True  # whether the disk lets what was refused be cut off
        # Whether the disk has failed, so that a log message may be all.
        self.disk_has_failed: Callable[[], bool] = lambda: False
        self._wrap = wrap
        self._number = itertools.count(1).__next__
        self._processes: dict[int, tuple[CrashFilesystem, SimulationProcess]] = {}

    def _mark_reported(self, what: str) -> None:
        self.disk.mark(("said", what))

    def _before(self, _verb: str, _path: str) -> None:
        self._operations += 1
        if self._operations > OPERATIONS_MAX:
            raise Killed
        if self.operations_left is not None:
            self.operations_left -= 1
            if self.operations_left < 0:
                raise Killed

    def _process(self, which: int) -> SimulationProcess | None:
        """The process, started if it does not run; None if the disk does not let it start."""
        if which not in self._processes:
            plain = crash_filesystem(self.disk, self._before)
            process = SimulationProcess(self._wrap(plain), self.new_id, self.clock, self._mark_reported)
            self._processes[which] = plain, process
            try:
                process.start()
            except (OSError, DirectoryUnusableError):
                self.kill(which)
                return None
        return self._processes[which][1]

    def lives(self, letter: str) -> bool:
        """Whether the process of a step runs."""
        return (1 if letter.islower() else 2) in self._processes

    def kill(self, which: int) -> None:
        """The process dies, if it runs."""
        if which in self._processes:
            self._processes.pop(which)[0].kill()

    def run(self, history: str) -> None:
        """Run all steps; a number behind a letter makes the process die before that operation of the step."""
        for letter, fuse in steps_of(history):
            self.step(letter, fuse)

    def step(self, letter: str, fuse: int | None = None) -> None:
        """Run one step."""
        which = 1 if letter.islower() else 2
        if letter in "kK":
            self.kill(which)
            return
        self.operations_left, self._operations = fuse, 0
        try:
            process = self._process(which)
            if process is not None:
                self._act(process, letter.lower())
        except Killed:
            self.kill(which)
        finally:
            self.operations_left = None
        if self._operations > OPERATIONS_MAX:
            raise SimulationViolation(f"a step does not come to its end: {letter}")
        if letter == "c":
            self.kill(which)

    def _act(self, process: SimulationProcess, letter: str) -> None:
        match letter:
            case "a" | "m" | "x" | "g":
                self._append(process, letter)
            case "p":
                self._commit(process)
            case "s":
                process.sealer.step()
            case "r":
                process.writer.rotate("manual")
            case "d":
                process.deliver(self.destination)
                self._report_over()
            case "v":
                self._evict(process)
            case "c":
                process.sealer.seal_remaining()

    def _append(self, process: SimulationProcess, letter: str) -> None:
        sign = -1 if letter == "x" else 1
        numbers = [sign * self._number() for _ in range(2 if letter == "m" else 1)]
        lines = [b"rubbish %d\n" % number if letter == "g" else record.line(payload_of(number)) for number in numbers]
        self.disk.mark(("offered", set(numbers)))
        answer = (
            "acknowledged"
            if process.writer.append(b"".join(lines), len(numbers))
            else "refused"
            if self.can_truncate
            else "unsure"
        )
        self.disk.mark((answer, set(numbers)))

    def _commit(self, process: SimulationProcess) -> None:
        number = self._number()
        self.disk.mark(("offered", {number}))
        outcome = process.committer.commit(record.line(payload_of(number)), 1)
        if outcome:
            self.disk.mark(("acknowledged", {number}))
        if outcome == Enqueued("power"):
            self.disk.mark(("promised", {number}))

    def _evict(self, process: SimulationProcess) -> None:
        self.disk.mark(("evicting", True))
        try:
            process.evict()
            self._report_over()
        except OSError:
            return  # the sealer's round ends with it
        finally:
            self.disk.mark(("evicting", False))

    def _report_over(self) -> None:
        if not self.disk_has_failed():
            self._mark_reported("over")


def steps_of(history: str) -> list[tuple[str, int | None]]:
    """The letters of a history, each with the operation before which the process dies."""
    found = re.findall(r"([a-zA-Z])(\d*)", history)
    assert "".join(letter + fuse for letter, fuse in found) == history, history
    return [(letter, int(fuse) if fuse else None) for letter, fuse in found]


class RecoveryOutcome(NamedTuple):
    """The result of a recovery."""

    arrived: tuple[int, ...]
    kept: frozenset[int]  # as dead letters or in quarantine
    problem: str


def recover(disk: Disk, depth: int = 0) -> RecoveryOutcome:
    """Open what a crash has left, twice; deliver it; append an event and deliver that. `depth` recoveries were cut short."""
    clock = ManualClock()
    new_id = map(f"r{depth}-{{:02d}}".format, itertools.count(1)).__next__
    after = _AFTER + depth
    destination = SimulatedDestination(disk)
    problem = ""
    try:
        process = SimulationProcess(crash_filesystem(disk), new_id, clock, lambda what: disk.mark(("said", what)))
        process.start()
        done = len(disk.trace)
        again = Directory(OUTBOX_PATH, crash_filesystem(disk), clock, new_id)
        again.ensure_usable()
        recovery.recover(again)
        if len(disk.trace) != done:
            problem = f"opened once more, something is done: {disk.trace[done:]}"
        deliver(process.directory, destination)
        disk.mark(("said", "over"))
        arrived = tuple(destination.arrived)
        disk.mark(("offered", {after}))
        if process.writer.append(record.line(payload_of(after)), 1):
            disk.mark(("acknowledged", {after}))
        else:
            problem = "nothing is accepted after the recovery"
        process.sealer.seal_remaining()
        deliver(process.directory, destination)
    except OSError as error:
        return RecoveryOutcome(tuple(destination.arrived), frozenset(), f"the recovery fails: {error!r}")
    if tuple(destination.arrived) != (*arrived, after):
        problem = f"an event that is appended after the recovery does not arrive, or not alone: {destination.arrived}"
    left = disk.files
    kept: set[int] = set()
    for path, data in left.items():
        if kind_at(path) is Kind.DEAD:
            kept |= numbers_in(data)
        elif kind_at(path) is Kind.CORRUPT:
            kept |= rubbish_in(data)  # an event whose line is damaged is lost
        elif kind_at(path) is not Kind.RANGES:
            problem = f"left behind: {path}"
    return RecoveryOutcome(arrived, frozenset(kept), problem or _changed(disk.trace))


def _changed(trace: Iterable[Op]) -> str:
    """What is wrong if somebody wrote to a file that had a sealed name."""
    for op in trace:
        if op.verb in ("write", "truncate") and kind_at(op.path) is Kind.SEALED:
            return f"a sealed file is written to: {op.path}"
    return ""


def deliver(directory: Directory, destination: SimulatedDestination) -> None:
    """What the worker does with each sealed file, in its order, but without an event loop."""
    filesystem = directory.filesystem
    recovery.recover(directory)
    for name in directory.batch_names():
        taken = directory.lock_existing(name)
        if taken is None:
            raise SimulationViolation(f"{name} cannot be taken, and nobody else lives")
        data = filesystem.read_all(taken.fd)
        contents = reader.read_lines(data, lambda: None)
        answer = destination.answer(contents.payloads) if contents.payloads else Delivered(0)
        batch = layout.batch_id(name)
        if contents.damaged:
            settlement.write_quarantine(directory, batch, data, contents.damaged)
        if isinstance(answer, PartialFailure):
            settlement.write_dead_letters(
                directory, batch, {index: _letter(contents.payloads[index], index) for index in answer.rejected}
            )
        directory.remove(name)
        filesystem.close(taken.fd)
    filesystem.sync_directory(OUTBOX_PATH)


def _letter(payload: bytes, index: int) -> DeadLetter:
    return DeadLetter(msgspec.Raw(payload), NO.code, NO.reason, "sink", index, 1, 0, 0)


def problem_of(state: State, outcome: RecoveryOutcome, account: Obligations, *, power: bool) -> str:
    """What is wrong with a state that a crash has left, or with the result of its recovery; empty if nothing is."""
    if outcome.problem:
        return outcome.problem
    for path, data in state.items():
        if account.sealed.get(path, data) != data:
            return f"a sealed file is not what it was when it got its name: {path}: {data!r}, was {account.sealed[path]!r}"
    arrived = set(outcome.arrived)
    if not arrived <= account.offered:
        return f"never enqueued: {sorted(arrived - account.offered)}"
    # Of what was refused after a part was written, the loss of power may bring that part back: cutting it off is not synced.
    if not power and arrived & account.refused:
        return f"the caller was told that it is refused, and it arrives: {sorted(arrived & account.refused)}"
    if arrived & account.settled:
        return f"settled, and came back: {sorted(arrived & account.settled)}"
    if lost := account.owed(power=power) - arrived - outcome.kept:
        return f"lost: {sorted(lost)}"
    return ""
