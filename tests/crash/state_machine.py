"""Compares random sequences of calls of several processes, kills and power losses with a simple model.

A Hypothesis state machine on a disk in memory. Each step is a call of the real code, and may have a fuse: the process is
killed, or the power fails, before the k-th file-system operation of the call. After a power loss the disk has one of the states
that the durability model admits, and Hypothesis makes all choices. The model is five sets of events: attempted, accepted and
not lost in a power loss, promised to survive one, delivered (with the batch), and evicted.

    .venv/bin/python -m tests.crash.state_machine --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

import msgspec
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pillarbox.outcome import DROPPED
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Rejected, Rejection, Retry
from pillarbox.store import layout, reader, record
from pillarbox.store.directory import Directory
from pillarbox.store.group_commit import GroupCommitter
from pillarbox.store.layout import Kind
from pillarbox.store.recovery import recover
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.usage import DiskUsage
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, State
from pillarbox.testing.durability_model import DurabilityModel, _contents_after, _with_name_change
from tests.crash.compiled_order import crash_filesystem
from tests.crash.interleave import LOCKS, OUTBOX_PATH, deliver_once

STEPS: Final = 25
OPERATIONS_MAX: Final = 40  # of one call, before which its fuse may end it
LIMITS: Final = WriterLimits(batch_size=3, batch_bytes=400, max_bytes=2**20)
EVICT_ABOVE: Final = 500  # bytes: a dozen events


class Fuse(NamedTuple):
    """How a call is interrupted."""

    operations: int  # before the interruption
    how: Literal["kill", "cut"]


def pick(disk: Disk, chance: random.Random) -> State:
    """Choose one of the states after a power loss. `DurabilityModel.states` lists all of them, which may be too many.

    The state is without the lock files, whose contents differ from run to run.
    """
    model = DurabilityModel(disk.trace, ignoring=LOCKS)
    names = model._durable
    for renaming in model._unsynced:
        if chance.random() < 0.5:
            names = _with_name_change(names, renaming)
    state: State = {}
    may_tear = True
    for path, inode in model._paths(names).items():
        file = model._files[inode]
        contents, torn = {file.base}, False
        for change in file.changes:
            possible, torn_contents = (
                _contents_after(change, contents, set(), ())
                if not torn
                else (_contents_after(change, set(), contents, ())[1], set())
            )
            if torn_contents and may_tear and chance.random() < 0.2:
                may_tear, torn, possible = False, True, torn_contents
            contents = {chance.choice(sorted(possible))}
        (state[path],) = contents
    return state


class MachineProcess:
    """A process on the disk: a file system that may kill it, a directory, and a clock."""

    def __init__(self, disk: Disk, clock: ManualClock, new_id: Callable[[], str]) -> None:
        self.operations_left: int | None = None  # until the process is killed
        self.dead = False
        self.filesystem = crash_filesystem(disk, self._before)
        self.directory = Directory(OUTBOX_PATH, self.filesystem, clock, new_id)
        self.clock = clock

    def _before(self, _verb: str, _path: str) -> None:
        if self.dead:
            raise Killed
        if self.operations_left is not None:
            self.operations_left -= 1
            if self.operations_left < 0:
                self.dead = True
                raise Killed

    def count_files(self) -> DiskUsage:
        """Count the files, and continue after the newest seal time, as a process does first."""
        account = self.directory.disk_usage()
        self.directory.seal_after(account.newest_sealed_at)
        return account

    def die(self) -> None:
        """Lose descriptors and locks."""
        self.dead = True
        self.filesystem.kill()


class MachineApplication(MachineProcess):
    """A process that stores events."""

    def start(self, on_sealed: Callable[[], None], *, evicts: bool) -> None:
        """Do what an `Outbox` does at its first event, without threads."""
        limits = LIMITS._replace(max_bytes=EVICT_ABOVE) if evicts else LIMITS
        inbox = SealerInbox()
        self.writer = Writer(self.directory, limits, inbox.wake)
        self.committer = GroupCommitter(self.directory, self.writer)
        self.sealer = Sealer(
            self.directory,
            self.writer,
            inbox,
            self.clock,
            1.0,
            on_sealed,
            min_free_bytes=0,
            evicts=evicts,
            committer=self.committer,
        )
        account = self.count_files()
        self.writer.start(account.pending_bytes, account.pending_files)
        self.sealer.adopt_segments()


class ScriptedDestination(RecordingSink):
    """Answers as scripted: accepts a batch, fails before or after accepting it, or rejects it."""

    def __init__(self, machine: OutboxMachine, answers: list[str]) -> None:
        super().__init__()
        self._machine = machine
        self._answers = deque(answers)

    async def deliver(self, batch: Batch) -> DeliveryResult:
        answer = self._answers.popleft() if self._answers else "accept"
        if answer != "accept":
            self._machine.may_repeat = True
        if answer == "fail":
            return Retry("unavailable")
        if answer == "reject":
            self._machine.may_reorder = True  # the other records are sent without the rejected one, and perhaps again with it
            return Rejected(Rejection("no", "scripted"))
        self._machine.delivered += [(bytes(payload), batch.id.partition(":")[0]) for payload in batch.payloads]
        if answer == "accept and fail":
            raise OSError("connection lost")
        return Delivered(len(batch))


FUSES = st.none() | st.builds(Fuse, st.integers(0, 12) | st.integers(0, OPERATIONS_MAX), st.sampled_from(["kill", "cut"]))
ANSWERS = st.lists(st.sampled_from(["accept", "fail", "accept and fail", "reject"]), max_size=4)


class OutboxMachine(RuleBasedStateMachine):
    """The state machine, whose rules are the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.clock = ManualClock()
        self.new_id = map("id-{:04d}".format, itertools.count(1)).__next__
        self._number = itertools.count(1).__next__
        self.application: MachineApplication | None = None
        self.evicts = False
        self.attempted: set[bytes] = set()
        self.accepted: set[bytes] = set()  # without events that were lost in a power loss
        self.promised: set[bytes] = set()
        self.evicted: set[bytes] = set()
        self.delivered: list[tuple[bytes, str]] = []
        self.may_repeat = False
        self.may_reorder = False
        self.was_cut = False
        CrashFilesystem(self.disk).make_directory(OUTBOX_PATH)

    @initialize(evicts=st.booleans())
    def begin(self, *, evicts: bool) -> None:
        """Choose whether the oldest events are evicted."""
        self.evicts = evicts

    # Running a call, and its end.

    def _within(self, process: MachineProcess, fuse: Fuse | None, chance: random.Random, call: Callable[[], None]) -> bool:
        """Run a call of a process. Returns whether it finished."""
        if fuse is not None:
            process.operations_left = fuse.operations
        try:
            call()
        except Killed:
            self._kill(process)
            if fuse is not None and fuse.how == "cut":
                self._cut(chance)
            return False
        process.operations_left = None
        return True

    def _kill(self, process: MachineProcess) -> None:
        process.die()
        self.may_repeat = True
        if process is self.application:
            self.application = None

    def _cut(self, chance: random.Random) -> None:
        if self.application is not None:
            self._kill(self.application)
        self.disk = Disk(pick(self.disk, chance))
        CrashFilesystem(self.disk).make_directory(OUTBOX_PATH)
        self.may_repeat = self.was_cut = True
        self.accepted &= self.promised

    def _promise_sealed(self) -> None:
        """Sealed names are durable, so the events in batch files are promised to survive a power loss."""
        for path, data in self.disk.files.items():
            if layout.kind_of(path.removeprefix(f"{OUTBOX_PATH}/")) is Kind.SEALED:
                self.promised.update(reader.read_lines(data, lambda: None).payloads)

    def _record_evictions(self, process: MachineProcess) -> None:
        remove = process.directory.remove

        def remove_and_record(name: str) -> None:
            data = self.disk.files.get(f"{OUTBOX_PATH}/{name}", b"") if layout.kind_of(name) is Kind.SEALED else b""
            remove(name)
            self.evicted.update(reader.read_lines(data, lambda: None).payloads)

        process.directory.remove = remove_and_record  # type: ignore[method-assign]

    # The application.

    @precondition(lambda self: self.application is None)
    @rule(fuse=FUSES, chance=st.randoms())
    def start(self, fuse: Fuse | None, chance: random.Random) -> None:
        """Start a process that stores events, and recovers the files of dead writers."""
        application = self.application = MachineApplication(self.disk, self.clock, self.new_id)
        self._record_evictions(application)
        self._within(application, fuse, chance, lambda: application.start(self._promise_sealed, evicts=self.evicts))

    @precondition(lambda self: self.application is not None)
    @rule(count=st.integers(1, 4), durability=st.sampled_from(["process", "power"]), fuse=FUSES, chance=st.randoms())
    def enqueue(self, count: int, durability: str, fuse: Fuse | None, chance: random.Random) -> None:
        """Store one event, or several in one call."""
        application = self._running()
        events = [b'{"n":%d}' % self._number() for _ in range(count)]
        self.attempted.update(events)
        lines = b"".join(map(record.line, events))

        def call() -> None:
            store = application.committer.commit if durability == "power" else application.writer.append
            outcome = store(lines, count)
            assert outcome is not None
            if outcome:
                self.accepted.update(events)
                if durability == "power":
                    self.promised.update(events)
            else:
                assert self.evicts
                assert outcome == DROPPED["max_bytes"]
                self.attempted.difference_update(events)

        self._within(application, fuse, chance, call)

    @precondition(lambda self: self.application is not None)
    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 100.0]), fuse=FUSES, chance=st.randoms())
    def run_sealer(self, seconds: float, fuse: Fuse | None, chance: random.Random) -> None:
        """Run a step of the sealer, after a while."""
        self.clock.advance(seconds)
        application = self._running()

        def call() -> None:
            application.sealer.step()

        self._within(application, fuse, chance, call)

    @precondition(lambda self: self.application is not None)
    @rule(fuse=FUSES, chance=st.randoms())
    def flush(self, fuse: Fuse | None, chance: random.Random) -> None:
        """Seal the active segment."""
        application = self._running()

        def call() -> None:
            assert application.writer.rotate("manual")
            application.sealer.step()

        self._within(application, fuse, chance, call)

    @precondition(lambda self: self.application is not None)
    @rule(fuse=FUSES, chance=st.randoms())
    def close(self, fuse: Fuse | None, chance: random.Random) -> None:
        """Close the application."""
        application = self._running()
        if self._within(application, fuse, chance, application.sealer.seal_remaining):
            application.die()
            self.application = None

    def _running(self) -> MachineApplication:
        assert self.application is not None
        return self.application

    # Other processes.

    @rule(answers=ANSWERS, fuse=FUSES, chance=st.randoms())
    def deliver(self, answers: list[str], fuse: Fuse | None, chance: random.Random) -> None:
        """Run the real delivery worker in a new process, until nothing is pending."""
        process = MachineProcess(self.disk, self.clock, self.new_id)
        self._within(process, fuse, chance, lambda: self._deliver(process, answers))
        process.die()

    def _deliver(self, process: MachineProcess, answers: list[str]) -> None:
        process.count_files()
        deliver_once(process.directory, ScriptedDestination(self, answers), self.clock)

    @rule(fuse=FUSES, chance=st.randoms())
    def recover(self, fuse: Fuse | None, chance: random.Random) -> None:
        """Recover in another process, which does nothing else."""
        process = MachineProcess(self.disk, self.clock, self.new_id)

        def call() -> None:
            process.count_files()
            if recover(process.directory):
                self._promise_sealed()

        self._within(process, fuse, chance, call)
        process.die()

    @precondition(lambda self: self.application is not None)
    @rule()
    def kill(self) -> None:
        """Kill the application between two calls."""
        self._kill(self._running())

    @rule(chance=st.randoms())
    def cut(self, chance: random.Random) -> None:
        """Let the power fail between two calls."""
        self._cut(chance)

    @rule(seconds=st.sampled_from([-3600.0, 3600.0]))
    def step_clock(self, seconds: float) -> None:
        """Change the wall clock, but not the monotonic one."""
        self.clock.step(seconds)

    # The comparison with the model.

    def teardown(self) -> None:
        """Recover, deliver everything that is pending, and compare with the model."""
        if self.application is not None:
            self.application.die()
            self.may_repeat = True
        last = MachineProcess(self.disk, self.clock, self.new_id)
        self._deliver(last, [])
        last.die()
        batches: dict[bytes, list[str]] = {}
        for payload, batch in self.delivered:
            batches.setdefault(payload, []).append(batch)
        dead, remaining = self._dead_letters(), self._remaining_kinds()
        assert not self.accepted - batches.keys() - dead - self.evicted, "lost"
        assert batches.keys() | dead <= self.attempted, "invented"
        assert remaining <= {Kind.DEAD} | ({Kind.CORRUPT, Kind.RANGES} if self.was_cut else set()), "left behind"
        for payload, ids in batches.items():
            assert len(ids) == 1 or self.may_repeat, f"{payload!r} was delivered {len(ids)} times"
            assert len(set(ids)) == 1, f"{payload!r} was delivered in several batches: {set(ids)}"
        if not self.was_cut and not self.may_reorder:
            numbers = [msgspec.json.decode(payload)["n"] for payload in batches]
            assert numbers == sorted(numbers), "out of order"

    def _dead_letters(self) -> set[bytes]:
        payloads = set()
        for path, data in self.disk.files.items():
            if layout.kind_of(path.removeprefix(f"{OUTBOX_PATH}/")) is Kind.DEAD:
                payloads |= {bytes(msgspec.json.decode(line, type=DeadLetterLine).event) for line in data.splitlines()}
        return payloads

    def _remaining_kinds(self) -> set[Kind]:
        names = {path.removeprefix(f"{OUTBOX_PATH}/") for path in self.disk.files}
        return {layout.kind_of(name) for name in names - LOCKS}


class DeadLetterLine(msgspec.Struct):
    """The part of a dead letter that is checked."""

    event: msgspec.Raw


def torture(examples: int, number: int | None = None, *, shrink: bool = True) -> None:
    """Run `examples` sequences of steps, with `number` as the seed, or always the same. Raises with the shortest that fails."""
    profile = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    machine = type(OutboxMachine.__name__, (OutboxMachine,), {})  # a copy, because the seed is stored in the class
    with _quiet():
        run_state_machine_as_test(seed(number)(machine) if number is not None else machine, settings=profile)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("pillarbox")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(seconds: float, number: int, examples: int = 500) -> int:
    """Run sequences of steps from one seed after another. Returns the number of seeds. Raises as `torture` does."""
    deadline = time.monotonic() + seconds
    for count in itertools.count():
        if time.monotonic() >= deadline:
            return count
        print(f"seed {number + count}", flush=True)  # noqa: T201 - to reproduce a failure
        torture(examples, number + count)
    return 0


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    sys.exit(run(chosen.seconds, chosen.seed) == 0)


if __name__ == "__main__":
    main()
