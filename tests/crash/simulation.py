"""Processes on a simulated disk, a destination, and the events that the store must not lose.

An event is a number; the destination rejects negative numbers for good. A history is a string with one letter of `STEPS` for
each step. Each step runs the real code of store and delivery, without threads. `Obligations` depends only on the trace of the
disk, so it can be computed for each moment of a history.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from pillarbox.delivery import settlement
from pillarbox.delivery.dead_letter import DeadLetter
from pillarbox.errors import DirectoryUnusableError
from pillarbox.outcome import Dropped, Enqueued, Outcome
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
LIMITS: Final = WriterLimits(batch_size=2, batch_bytes=10**6, max_bytes=2**29)  # two steps fill a segment
STEPS: Final = {
    "a": "append an event",
    "p": 'append an event with durability "power"',
    "m": "append two events in one write",
    "x": "append an event that the destination rejects",
    "g": "append a line that is not a record",
    "s": "run a step of the sealer",
    "r": "retire the active segment",
    "d": "deliver all batches, and recover the files of dead writers",
    "v": "evict all batches",
    "c": "close; the next step starts a new process",
    "k": "kill the process; the next step starts a new one",
    "A": "append an event in a second process",
    "P": 'append an event with durability "power" in the second process',
    "S": "run a step of the sealer in the second process",
    "K": "kill the second process",
}
REJECTION: Final = Rejection("no", "negative")
_NUMBER: Final = re.compile(rb'\{"n":(-?\d+)\}')
_RECORD: Final = re.compile(
    rb'^\{"event":\{"n":(-?\d+)\},"crc":"[0-9a-f]{8}"\}\n', re.MULTILINE
)  # at the start of a line, because one after NUL bytes is not a record
_RUBBISH: Final = re.compile(rb"rubbish (\d+)\n")
_AFTER: Final = 10**6  # the number of the event that is appended after a recovery; plus the depth of the recovery
OPERATIONS_MAX: Final = 3000  # of one step; a step has at most a few hundred


class SimulationViolation(AssertionError):  # noqa: N818 - it is not an error of the program that raises it
    """Something that must never happen."""


def payload_of(number: int) -> bytes:
    """The JSON of an event."""
    return b'{"n":%d}' % number


def rubbish_in(data: bytes) -> set[int]:
    """The numbers of damaged lines."""
    return {int(found) for found in _RUBBISH.findall(data)}


def numbers_in(data: bytes) -> set[int]:
    """The numbers of records and dead letters, and of damaged lines."""
    return {int(found) for pattern in (_NUMBER, _RUBBISH) for found in pattern.findall(data)}


def records_in(data: bytes) -> set[int]:
    """The numbers of whole records, and of damaged lines."""
    return {int(found) for pattern in (_RECORD, _RUBBISH) for found in pattern.findall(data)}


def kind_at(path: str) -> Kind:
    """The kind of the file at a path."""
    return layout.kind_of(path.rpartition("/")[2])


class Obligations:
    """The events that must not be lost, repeated or invented, at a moment of a trace. Damaged lines have numbers too.

    The trace has marks: offered, acknowledged, promised, dropped, delivered, evicting, and reports of the code that files are
    sealed ("sealed") or that deliveries or evictions are finished ("over"). The rest follows from the operations: a sealed name
    promises the events in the file, once the code has reported it or the directory is synced; its removal settles them, in the
    same way.
    """

    def __init__(self) -> None:
        self.offered: set[int] = set()
        self.acknowledged: set[int] = set()  # survive a kill
        self.promised: set[int] = set()  # survive a power loss too
        self.delivered: set[int] = set()  # at the destination: may be repeated, need not be
        self.evicted: set[int] = set()
        self.settled: set[int] = set()  # must not reappear
        self.unsure: set[int] = set()  # dropped, but may be stored
        self.dropped: set[int] = set()  # the caller knows it: must never arrive
        self.sealed: dict[str, bytes] = {}  # the contents of each batch file when it got its name
        self._evicting = False
        self._in_sealed_names: set[int] = set()  # promised with the next sync of the directory
        self._removed: set[int] = set()  # settled with the next sync of the directory
        self._failed_inodes: set[int] = set()  # a sync of these files failed, so sealing them promises nothing more

    def after_crash(self, *, power: bool) -> Obligations:
        """The obligations after a crash, which cover only durable events."""
        other = Obligations()
        other.offered, other.delivered, other.evicted = self.offered.copy(), self.delivered.copy(), self.evicted.copy()
        other.promised = (self.promised if power else self.acknowledged).copy()
        other.acknowledged = other.promised.copy()
        other.settled, other.dropped, other.sealed = self.settled.copy(), self.dropped.copy(), self.sealed.copy()
        return other

    def apply(self, op: Op, content: Callable[[str], bytes]) -> None:
        """Apply one more operation; `content(path)` is what the running system saw before it."""
        if op.verb == "mark":
            self._mark(op.note)
        elif op.verb == "sync_failed":
            self._failed_inodes.add(op.inode)
        elif op.verb == "rename" and kind_at(op.target) is Kind.SEALED and op.inode not in self._failed_inodes:
            self.sealed[op.target] = data = content(op.path)
            self._in_sealed_names |= records_in(data)
        elif op.verb == "unlink" and kind_at(op.path) is Kind.SEALED:
            removed = records_in(content(op.path))
            self._removed |= removed
            if self._evicting:
                self.evicted |= removed
        elif op.verb == "sync_directory":
            self._apply_report("sealed")
            self._apply_report("over")

    def _mark(self, note: object) -> None:
        assert isinstance(note, tuple)
        name, numbers = note
        if name == "evicting":
            self._evicting = numbers
        elif name == "reported":
            self._apply_report(numbers)
        else:
            getattr(self, name).update(numbers)

    def _apply_report(self, report: str) -> None:
        if report == "sealed":
            self.promised |= self._in_sealed_names
            self._in_sealed_names = set()
        else:
            self.settled |= self._removed
            self._removed = set()

    def owed(self, *, power: bool) -> set[int]:
        """The events that must still arrive, become dead letters, or be in quarantine."""
        return (self.promised if power else self.acknowledged) - self.delivered - self.evicted


class SimulatedDestination:
    """Accepts every number that is not negative."""

    capabilities = SinkCapabilities(deduplicates_by="nothing", survives="power")

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.arrived: list[int] = []  # including the rejected ones

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
        accepted = {number for number in numbers if number >= 0}
        self._disk.mark(("delivered", accepted))
        rejected = {index: REJECTION for index, number in enumerate(numbers) if number < 0}
        return PartialFailure(rejected, len(accepted)) if rejected else Delivered(len(accepted))

    async def confirm(self, batches: Sequence[Batch]) -> int:
        raise AssertionError

    async def check(self) -> Iterable[CheckResult]:
        raise AssertionError

    async def close(self) -> None:
        pass


def number_of(payload: bytes) -> int:
    """The number of the event with this payload."""
    match = _NUMBER.fullmatch(payload)
    if match is None:
        raise SimulationViolation(f"this was never enqueued: {payload!r}")
    return int(match[1])


class SimulationProcess:
    """A process without threads: directory, writer, sealer and group committer, and a worker while it delivers."""

    def __init__(
        self,
        filesystem: Filesystem,
        new_id: Callable[[], str],
        clock: ManualClock,
        report: Callable[[str], None],
    ) -> None:
        self.filesystem = filesystem
        self.directory = Directory(OUTBOX_PATH, filesystem, clock, new_id)
        inbox = SealerInbox()
        self.writer = Writer(self.directory, LIMITS, inbox.wake)
        self.committer = GroupCommitter(self.directory, self.writer)
        self.sealer = Sealer(
            self.directory, self.writer, inbox, clock, 1.0, lambda: report("sealed"), 0, committer=self.committer
        )
        self._clock = clock

    def start(self) -> None:
        """Do what an `Outbox` does at its creation and its first use."""
        self.directory.ensure_usable()
        account = self.directory.disk_usage()
        self.directory.seal_after(account.newest_sealed_at)
        self.writer.start(account.pending_bytes, account.pending_files)
        self.sealer.adopt_segments()

    def deliver(self, sink: SimulatedDestination) -> None:
        """Deliver everything by the real worker."""
        deliver_once(self.directory, sink, self._clock, self.writer.release_bytes)

    def evict(self) -> None:
        """Evict all batches, by a limit of zero bytes."""
        quota, writer = self.sealer.quota, self.writer
        quota._evicts, writer.limits = True, LIMITS._replace(max_bytes=0)
        try:
            quota.enforce()
        finally:
            quota._evicts, writer.limits = False, LIMITS


Wrap = Callable[[CrashFilesystem], Filesystem]


class SimulationWorld:
    """A disk with up to two processes, which run the steps of a history."""

    def __init__(self, wrap: Wrap = lambda filesystem: filesystem) -> None:
        self.disk = Disk()
        self.clock = ManualClock()
        self.new_id = map("{:04d}".format, itertools.count(1)).__next__
        self.destination = SimulatedDestination(self.disk)
        self._operations = 0  # on the disk, in this step
        self.operations_left: int | None = None  # until the process is killed
        self.can_truncate = True  # whether the disk can cut off the lines of a failed append
        # After a failure of the disk, the code may only log that a round is not finished.
        self.disk_has_failed: Callable[[], bool] = lambda: False
        self._wrap = wrap
        self._number = itertools.count(1).__next__
        self._processes: dict[int, tuple[CrashFilesystem, SimulationProcess]] = {}

    def _mark_reported(self, report: str) -> None:
        self.disk.mark(("reported", report))

    def _before(self, _verb: str, _path: str) -> None:
        self._operations += 1
        if self._operations > OPERATIONS_MAX:
            raise Killed
        if self.operations_left is not None:
            self.operations_left -= 1
            if self.operations_left < 0:
                raise Killed

    def _process(self, which: int) -> SimulationProcess | None:
        """The process, which is started if it does not run. None if it cannot start because of the disk."""
        if which not in self._processes:
            filesystem = crash_filesystem(self.disk, self._before)
            process = SimulationProcess(self._wrap(filesystem), self.new_id, self.clock, self._mark_reported)
            self._processes[which] = filesystem, process
            try:
                process.start()
            except (OSError, DirectoryUnusableError):
                self.kill(which)
                return None
        return self._processes[which][1]

    def is_running(self, letter: str) -> bool:
        """Whether the process of a step runs."""
        return (1 if letter.islower() else 2) in self._processes

    def kill(self, which: int) -> None:
        """Kill the process, if it runs."""
        if which in self._processes:
            self._processes.pop(which)[0].kill()

    def run(self, history: str) -> None:
        """Run all steps. A number after a letter kills the process before that operation of the step."""
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
            raise SimulationViolation(f"a step does not end: {letter}")
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
        outcome = process.writer.append(b"".join(lines), len(numbers))
        self._mark_outcome(outcome, set(numbers), may_be_stored=not self.can_truncate)

    def _commit(self, process: SimulationProcess) -> None:
        number = self._number()
        self.disk.mark(("offered", {number}))
        outcome = process.committer.commit(record.line(payload_of(number)), 1)
        self._mark_outcome(outcome, {number}, may_be_stored=True)
        if outcome == Enqueued("power"):
            self.disk.mark(("promised", {number}))

    def _mark_outcome(self, outcome: Outcome | None, numbers: set[int], *, may_be_stored: bool) -> None:
        """Mark what the caller knows. After any drop but that for an I/O error the events must never arrive."""
        is_unsure = may_be_stored and isinstance(outcome, Dropped) and outcome.reason == "io_error"
        self.disk.mark(("acknowledged" if outcome else "unsure" if is_unsure else "dropped", numbers))

    def _evict(self, process: SimulationProcess) -> None:
        self.disk.mark(("evicting", True))
        try:
            process.evict()
            self._report_over()
        except OSError:
            return  # the step of the sealer ends with this error
        finally:
            self.disk.mark(("evicting", False))

    def _report_over(self) -> None:
        if not self.disk_has_failed():
            self._mark_reported("over")


def steps_of(history: str) -> list[tuple[str, int | None]]:
    """The letters of a history, each with the operation before which the process is killed."""
    steps = re.findall(r"([a-zA-Z])(\d*)", history)
    assert "".join(letter + fuse for letter, fuse in steps) == history, history
    return [(letter, int(fuse) if fuse else None) for letter, fuse in steps]


class RecoveryOutcome(NamedTuple):
    """The result of a recovery."""

    arrived: tuple[int, ...]
    rejected: frozenset[int]  # events in dead letters and in quarantine
    problem: str


def recover(disk: Disk, depth: int = 0) -> RecoveryOutcome:
    """Recover the state after a crash, twice; deliver everything; append an event and deliver it.

    `depth` is the number of recoveries before this one that were interrupted.
    """
    clock = ManualClock()
    new_id = map(f"r{depth}-{{:02d}}".format, itertools.count(1)).__next__
    after = _AFTER + depth
    destination = SimulatedDestination(disk)
    problem = ""
    try:
        process = SimulationProcess(crash_filesystem(disk), new_id, clock, lambda report: disk.mark(("reported", report)))
        process.start()
        operations = len(disk.trace)
        reopened = Directory(OUTBOX_PATH, crash_filesystem(disk), clock, new_id)
        reopened.ensure_usable()
        recovery.recover(reopened)
        if len(disk.trace) != operations:
            problem = f"a second recovery changes something: {disk.trace[operations:]}"
        deliver(process.directory, destination)
        disk.mark(("reported", "over"))
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
        problem = f"an event that is appended after the recovery does not arrive alone: {destination.arrived}"
    rejected: set[int] = set()
    for path, data in disk.files.items():
        if kind_at(path) is Kind.DEAD:
            rejected |= numbers_in(data)
        elif kind_at(path) is Kind.CORRUPT:
            rejected |= rubbish_in(data)  # an event with a damaged line is lost
        elif kind_at(path) is not Kind.RANGES:
            problem = f"left behind: {path}"
    return RecoveryOutcome(arrived, frozenset(rejected), problem or _write_to_sealed(disk.trace))


def _write_to_sealed(trace: Iterable[Op]) -> str:
    """The first write to a file with a sealed name; empty if there is none."""
    for op in trace:
        if op.verb in ("write", "truncate") and kind_at(op.path) is Kind.SEALED:
            return f"a sealed file is written to: {op.path}"
    return ""


def deliver(directory: Directory, destination: SimulatedDestination) -> None:
    """Do what the worker does with each batch, in the same order, without an event loop."""
    filesystem = directory.filesystem
    recovery.recover(directory)
    for name in directory.batch_names():
        locked_file = directory.lock_existing(name)
        if locked_file is None:
            raise SimulationViolation(f"{name} cannot be locked, and no other process runs")
        data = filesystem.read_all(locked_file.fd)
        contents = reader.read_lines(data, lambda: None)
        result = destination.answer(contents.payloads) if contents.payloads else Delivered(0)
        batch = layout.batch_id(name)
        if contents.damaged:
            settlement.write_quarantine(directory, batch, data, contents.damaged)
        if isinstance(result, PartialFailure):
            settlement.write_dead_letters(
                directory, batch, {index: _letter(contents.payloads[index], index) for index in result.rejected}
            )
        directory.remove(name)
        filesystem.close(locked_file.fd)
    filesystem.sync_directory(OUTBOX_PATH)


def _letter(payload: bytes, index: int) -> DeadLetter:
    return DeadLetter(msgspec.Raw(payload), REJECTION.code, REJECTION.reason, "sink", index, 1, 0, 0)


def problem_of(state: State, outcome: RecoveryOutcome, obligations: Obligations, *, power: bool) -> str:
    """The problem of a state after a crash, or of the result of its recovery; empty if there is none."""
    if outcome.problem:
        return outcome.problem
    for path, data in state.items():
        if obligations.sealed.get(path, data) != data:
            return f"a sealed file is not what it was when it got its name: {path}: {data!r}, was {obligations.sealed[path]!r}"
    arrived = set(outcome.arrived)
    if not arrived <= obligations.offered:
        return f"never enqueued: {sorted(arrived - obligations.offered)}"
    # After a power loss, a dropped event may reappear if a part of it was written: the truncation is not synced.
    if not power and arrived & obligations.dropped:
        return f"reported as dropped, and it arrives: {sorted(arrived & obligations.dropped)}"
    if arrived & obligations.settled:
        return f"settled, and came back: {sorted(arrived & obligations.settled)}"
    if lost := obligations.owed(power=power) - arrived - outcome.rejected:
        return f"lost: {sorted(lost)}"
    return ""
