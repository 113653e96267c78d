"""Runs the real code of several processes on one directory in every interleaving, up to a number of preemptions and kills.

A process is a greenlet with its own file system, `Directory` and clock. Each of its file-system calls, and each arrival of a
batch at the destination, is a point at which another process may continue instead (a preemption), or at which the process is
killed: it loses its descriptors and locks, and its later calls have no effect. When a process ends, any other one may continue.

A schedule is the list of decisions other than "continue", each at a point. `explore` runs a schedule, reads the
points of the run, and adds every further decision that the bounds allow, so that each schedule is run exactly once. A call that
no other process can notice while the power stays on is not a point. After each schedule a new process recovers and delivers the
remaining files, and `violations` lists what is wrong.

    .venv/bin/python -m tests.crash.interleave --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from greenlet import getcurrent, greenlet

from pillarbox.clock import Clock
from pillarbox.delivery.config import DeliveryConfig
from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.settlement import DeliveryCallbacks
from pillarbox.delivery.worker import Worker
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult, Sink
from pillarbox.store import layout, reader, record
from pillarbox.store.directory import Directory
from pillarbox.store.layout import Kind
from pillarbox.store.recovery import recover
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from pillarbox.testing.crash import Disk, Killed
from tests.crash.compiled_order import crash_filesystem

OUTBOX_PATH: Final = "/outbox"
PREEMPTIONS: Final = 3
KILLS: Final = 1
DELIVERY_CONFIG: Final = DeliveryConfig(
    stop_after_rejected_batches=0, page_files=2
)  # small pages, so that the backlog is listed in several
# Operations that no other process can notice: one point represents the moments before and after them.
UNNOTICED: Final = frozenset(
    {"sync_data", "sync_directory", "disk_space", "inspect_directory", "make_directory", "overwrite", "write_back"}
)

LOCKS: Final = frozenset({layout.DELIVER_LOCK, layout.EVICT_LOCK})

Decision = tuple[int, Literal["go", "kill"], int]  # the number of the point, and the process that continues or is killed
Schedule = tuple[Decision, ...]


class SimulatedEventLoop(asyncio.BaseEventLoop):
    """An event loop without input or output, in which unexplored takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = self

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[object]:
        self._now += timeout or 0.0
        return []

    def _process_events(self, event_list: list[object]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run_until_drained(worker: Worker) -> None:
    """Run the real delivery worker until nothing is pending."""
    worker.end()
    loop = SimulatedEventLoop()
    try:
        loop.run_until_complete(worker.run())
    finally:
        loop.close()


def deliver_once(
    directory: Directory, sink: Sink, clock: Clock, on_release: Callable[[int], None] = lambda _bytes: None
) -> None:
    """Run the real delivery worker until nothing is pending, if it gets the lease: recover, send, settle."""
    run_until_drained(Worker(directory, NamedSink(sink, "test"), clock, DELIVERY_CONFIG, DeliveryCallbacks(on_release)))


class InterleavedProcess:
    """A process that runs a program of calls to the real code."""

    def __init__(self, world: InterleavingWorld, number: int) -> None:
        self.world = world
        self.number = number
        self.dead = False
        self.filesystem = crash_filesystem(world.disk, self.point)
        self.clock = ManualClock()
        self.directory = Directory(OUTBOX_PATH, self.filesystem, self.clock, world.new_id)

    def point(self, verb: str, path: str) -> None:
        """A point at which another process may continue."""
        if self.dead:
            raise Killed
        if verb in UNNOTICED or not self.world.interleaved:
            return
        loop = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        hub = getcurrent().parent
        assert hub is not None
        hub.switch(f"{verb} {path.removeprefix(OUTBOX_PATH)}")
        asyncio._set_running_loop(loop)
        if self.dead:
            raise Killed

    def die(self) -> None:
        """Lose descriptors and locks; no later call has an effect."""
        self.dead = True
        self.filesystem.kill()

    # Programs.

    def write(self, *appends: int, evict_above: int | None = None) -> None:
        """Run an application: start, append `appends` events in turn with a step of the sealer after each, and close."""
        directory = self.directory
        inbox = SealerInbox()
        writer = Writer(directory, WriterLimits(2, 10**6, evict_above or 2**30), inbox.wake)
        if evict_above is not None:
            self._record_evictions()
        sealer = Sealer(
            directory, writer, inbox, self.clock, 1.0, lambda: None, min_free_bytes=0, evicts=evict_above is not None
        )
        account = directory.disk_usage()
        directory.seal_after(account.newest_sealed_at)
        writer.start(account.pending_bytes, account.pending_files)
        sealer.adopt_segments()
        for count in appends:
            if evict_above is not None:
                sealer.step()
            events = [self.world.new_event() for _ in range(count)]
            if writer.append(b"".join(map(record.line, events)), count):
                self.world.accepted.update(events)
            elif evict_above is None:
                raise AssertionError(writer.dropped)
            sealer.step()
        sealer.seal_remaining()

    def _record_evictions(self) -> None:
        remove = self.directory.remove

        def remove_and_record(name: str) -> None:
            sealed = layout.kind_of(name) is Kind.SEALED
            data = self.world.content_of(name) if sealed and name in self.world.names() else b""
            remove(name)
            self.world.evicted.update(reader.read_lines(data, lambda: None).payloads)

        self.directory.remove = remove_and_record  # type: ignore[method-assign]

    def append_and_die(self, count: int) -> None:
        """Append events, and die without closing."""
        writer = Writer(self.directory, WriterLimits(2, 10**6, 2**30), lambda: None)
        writer.start(0, 0)
        for _ in range(count):
            event = self.world.new_event()
            assert writer.append(record.line(event), 1)
            self.world.accepted.add(event)
        self.die()

    def recover_directory(self) -> None:
        """Recover the files of dead writers, as each process does when it starts."""
        recover(self.directory)

    def deliver(self) -> None:
        """Run the real delivery worker until nothing is pending, if it gets the lease."""
        deliver_once(self.directory, InterleavingDestination(self), self.clock)


class InterleavingDestination(RecordingSink):
    """Accepts everything, and records it for all processes."""

    def __init__(self, process: InterleavedProcess) -> None:
        super().__init__()
        self.process = process

    async def deliver(self, batch: Batch) -> DeliveryResult:
        process = self.process
        process.point("deliver", batch.id)
        process.world.delivered += [(bytes(payload), batch.id) for payload in batch.payloads]
        process.point("delivered", batch.id)
        return Delivered(len(batch))


class InterleavingWorld:
    """A disk, the processes on it, and the events that were accepted, delivered and evicted."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.interleaved = False
        self.processes: list[InterleavedProcess] = []
        self.accepted: set[bytes] = set()
        self.attempted: set[bytes] = set()
        self.deletable: set[bytes] = set()  # events that an operator may delete
        self.evicted: Counter[bytes] = Counter()
        self.delivered: list[tuple[bytes, str]] = []  # payload, batch id
        self.added_sinks: tuple[str, ...] = ()  # sinks that are added later, where there are several
        self.find_violations = violations  # lists what is wrong at the end
        self.expected_quarantine = b""  # the exact contents of the quarantine at the end
        self.new_id = map("id-{:04d}".format, itertools.count(1)).__next__
        self._number = itertools.count(1).__next__
        InterleavedProcess(self, -1).filesystem.make_directory(OUTBOX_PATH)

    def new_event(self) -> bytes:
        """The JSON of an event that differs from all others."""
        event = b'{"n":%d}' % self._number()
        self.attempted.add(event)
        return event

    def new_process(self) -> InterleavedProcess:
        """A process that is not interleaved."""
        return InterleavedProcess(self, -1)

    def put_file(self, name: str, events: int, raw: bytes = b"") -> set[bytes]:
        """Create a file before the processes start. Its events count as accepted."""
        new_events = [self.new_event() for _ in range(events)]
        process = self.new_process()
        fd = process.filesystem.create(f"{OUTBOX_PATH}/{name}")
        process.filesystem.write_all(fd, b"".join(map(record.line, new_events)) + raw)
        process.filesystem.kill()
        self.accepted.update(new_events)
        return set(new_events)

    def names(self) -> list[str]:
        """The names in the directory."""
        return sorted(entry.name for entry in self.new_process().filesystem.list_files(OUTBOX_PATH))

    def content_of(self, name: str) -> bytes:
        """The content of a file."""
        filesystem = self.new_process().filesystem
        return filesystem.read_all(filesystem.open_existing(f"{OUTBOX_PATH}/{name}", allow_links=True))


Program = Callable[[InterleavedProcess], None]
Scenario = Callable[[InterleavingWorld], list[Program]]


class SchedulePoint(NamedTuple):
    """A moment in a run: the process, its next operation, and the other decisions that are possible here."""

    process: int
    operation: str
    alternatives: tuple[Decision, ...]


class ScheduleResult(NamedTuple):
    """The result of one schedule."""

    points: list[SchedulePoint]
    problems: list[str]


class InterleavingReport(NamedTuple):
    """The results of many schedules."""

    schedules: int
    points: int
    complete: bool  # every schedule within the bounds was run
    violations: list[tuple[str, Schedule, list[str]]]

    def __str__(self) -> str:
        extent = "all schedules" if self.complete else "some of the schedules"
        lines = [f"{extent}: {self.schedules}, with {self.points} points; {len(self.violations)} with violations"]
        lines += [
            f"  reproduce({name!r}, {schedule!r}): {'; '.join(problems)}" for name, schedule, problems in self.violations[:10]
        ]
        return "\n".join(lines)


def run_schedule(scenario: Scenario, schedule: Schedule) -> ScheduleResult:
    """Run the processes of a scenario by a schedule, recover, and list what is wrong."""
    world = InterleavingWorld()
    programs = scenario(world)
    problems: list[str] = []
    decided = {point: (what, who) for point, what, who in schedule}
    points: list[SchedulePoint] = []
    world.processes = [InterleavedProcess(world, number) for number in range(len(programs))]
    threads = [
        greenlet(_guarded(process, program, problems)) for process, program in zip(world.processes, programs, strict=True)
    ]
    world.interleaved = True
    alive = list(range(len(programs)))
    current, operation = 0, "begin"
    begun: set[int] = set()
    while alive:
        number, ended = len(points), current not in alive
        alternatives: list[Decision] = [(number, "go", other) for other in alive if other != current]
        # A process that has not begun has nothing to lose.
        alternatives += [(number, "kill", other) for other in alive if other in begun]
        what, who = decided.get(number, ("go", alive[0] if ended else current))
        points.append(
            SchedulePoint(
                current,
                "end" if ended else operation,
                tuple(decision for decision in alternatives if decision[1:] != (what, who)),
            )
        )
        if what == "go":
            current = who
            begun.add(who)
            operation = threads[who].switch()
        else:
            world.processes[who].die()
            threads[who].throw(Killed)
        if threads[who].dead:
            world.processes[who].die()  # a process that ends loses its descriptors too
            alive.remove(who)
    world.interleaved = False
    problems += world.find_violations(world, killed=any(what == "kill" for _, what, _ in schedule))
    return ScheduleResult(points, problems)


def _guarded(process: InterleavedProcess, program: Program, problems: list[str]) -> Callable[[], None]:
    def run() -> None:
        try:
            program(process)
        except Killed:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            problems.append(f"process {process.number} raised {type(error).__name__}: {error}")

    return run


def violations(world: InterleavingWorld, *, killed: bool) -> list[str]:
    """Recover and deliver everything in a new process. Returns what is wrong afterwards."""
    problems: list[str] = []
    last = world.new_process()
    try:
        last.deliver()
    except Exception as error:  # noqa: BLE001 - every exception is a violation
        problems.append(f"recovery raised {type(error).__name__}: {error}")
    last.die()
    payloads = Counter(payload for payload, _ in world.delivered)
    if lost := world.accepted - world.deletable - world.evicted.keys() - payloads.keys():
        problems.append(f"lost: {sorted(lost)}")
    if invented := payloads.keys() - world.attempted:
        problems.append(f"invented: {sorted(invented)}")
    if not killed and (both := [payload for payload in payloads if world.evicted[payload]]):
        problems.append(f"delivered and evicted: {both}")
    for payload, count in payloads.items():
        batches = {batch for delivered, batch in world.delivered if delivered == payload}
        if count > 1 and not killed:
            problems.append(f"{payload!r} was delivered {count} times")
        elif len(batches) > 1:
            problems.append(f"{payload!r} was delivered in several batches: {sorted(batches)}")
    kinds = {name: layout.kind_of(name) for name in world.names() if name not in LOCKS}
    if remaining := [name for name, kind in kinds.items() if kind not in (Kind.CORRUPT, Kind.RANGES)]:
        problems.append(f"left behind: {remaining}")
    if (quarantine := [world.content_of(name) for name, kind in kinds.items() if kind is Kind.CORRUPT]) != [
        world.expected_quarantine
    ] * bool(world.expected_quarantine):
        problems.append(f"in quarantine: {quarantine}")
    return problems


def within(schedule: Schedule, points: Sequence[SchedulePoint], preemptions: int, kills: int) -> bool:
    """Whether a schedule is within the bounds. To continue after the end or the kill of a process is not a preemption."""
    preempted = sum(what == "go" and points[number].operation not in ("end", "begin") for number, what, _ in schedule)
    return preempted <= preemptions and sum(what == "kill" for _, what, _ in schedule) <= kills


def explore(
    scenario: Scenario, preemptions: int = PREEMPTIONS, kills: int = KILLS, seconds: float | None = None, seed: int = 0
) -> InterleavingReport:
    """Run every schedule within the bounds. With `seconds`, run them in random order, and no longer than that."""
    chance = random.Random(seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    unexplored: list[Schedule] = [()]
    schedules = points = 0
    violations: list[tuple[str, Schedule, list[str]]] = []
    with _quiet():
        while unexplored and (deadline is None or time.monotonic() < deadline):
            if deadline is not None:
                index = chance.randrange(len(unexplored))
                unexplored[index], unexplored[-1] = unexplored[-1], unexplored[index]
            schedule = unexplored.pop()
            result = run_schedule(scenario, schedule)
            schedules += 1
            points += len(result.points)
            if result.problems:
                violations.append((scenario.__name__, schedule, result.problems))
            first = schedule[-1][0] + 1 if schedule else 0
            for point in result.points[first:]:
                longer = [(*schedule, decision) for decision in point.alternatives]
                unexplored += [candidate for candidate in longer if within(candidate, result.points, preemptions, kills)]
    return InterleavingReport(schedules, points, not unexplored, violations)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disable the log, and restore the hooks of the interpreter afterwards."""
    logger, hooks = logging.getLogger("pillarbox"), sys.get_asyncgen_hooks()
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.set_asyncgen_hooks(*hooks)


def reproduce(name: str, schedule: Schedule) -> list[str]:
    """Run one schedule of a scenario, and print every point. Returns what is wrong."""
    result = run_schedule(next(scenario for scenario in SCENARIOS if scenario.__name__ == name), schedule)
    decided = {point: (what, who) for point, what, who in schedule}
    for number, point in enumerate(result.points):
        print(f"{number:4} process {point.process}: {point.operation:60} {decided.get(number, '')}")  # noqa: T201 - its purpose
    return result.problems


# Scenarios: each prepares the world, and returns the programs of its processes.


def two_writers_recover_the_same_segment(world: InterleavingWorld) -> list[Program]:
    world.new_process().append_and_die(2)
    return [lambda process: process.write(1), lambda process: process.write(1)]


def one_creates_segments_while_another_recovers(world: InterleavingWorld) -> list[Program]:
    def recover_twice(process: InterleavedProcess) -> None:
        process.recover_directory()
        process.recover_directory()

    return [lambda process: process.write(1, 2), recover_twice]


def one_recovers_while_another_delivers(world: InterleavingWorld) -> list[Program]:
    world.new_process().append_and_die(1)
    world.put_file(layout.sealed_name(1, "old"), 1)
    return [InterleavedProcess.recover_directory, InterleavedProcess.deliver]


def two_deliver(world: InterleavingWorld) -> list[Program]:
    world.put_file(layout.sealed_name(1, "a"), 2)
    world.put_file(layout.sealed_name(2, "b"), 1)
    return [InterleavedProcess.deliver, InterleavedProcess.deliver]


def two_deliver_while_a_third_writes(world: InterleavingWorld) -> list[Program]:
    return [lambda process: process.write(1), InterleavedProcess.deliver, InterleavedProcess.deliver]


def one_writes_while_others_recover_and_deliver(world: InterleavingWorld) -> list[Program]:
    world.new_process().append_and_die(1)
    return [lambda process: process.write(1), InterleavedProcess.recover_directory, InterleavedProcess.deliver]


def two_recover_a_legacy_segment(world: InterleavingWorld) -> list[Program]:
    world.put_file(layout.LEGACY_ACTIVE, 2)
    return [lambda process: process.write(1), InterleavedProcess.recover_directory]


def one_recovers_a_legacy_segment_while_another_delivers(world: InterleavingWorld) -> list[Program]:
    world.put_file(layout.LEGACY_ACTIVE, 2)
    return [InterleavedProcess.recover_directory, InterleavedProcess.deliver]


def one_delivers_while_an_operator_deletes(world: InterleavingWorld) -> list[Program]:
    name = layout.sealed_name(1, "a")
    world.deletable |= world.put_file(name, 2)
    world.put_file(layout.sealed_name(2, "b"), 1)
    return [InterleavedProcess.deliver, lambda operator: operator.directory.remove(name)]


def one_evicts_while_another_delivers(world: InterleavingWorld) -> list[Program]:
    for sealed_at in (1, 2, 3):
        world.put_file(layout.sealed_name(sealed_at, "a"), 1)
    return [lambda process: process.write(1, evict_above=110), InterleavedProcess.deliver]


def two_evict(world: InterleavingWorld) -> list[Program]:
    for sealed_at in (1, 2, 3):
        world.put_file(layout.sealed_name(sealed_at, "a"), 1)
    return [lambda process: process.write(1, evict_above=110), lambda process: process.write(1, evict_above=110)]


def two_deliver_a_damaged_batch(world: InterleavingWorld) -> list[Program]:
    name = layout.sealed_name(1, "a")
    world.put_file(name, 1, raw=b"rubbish\n")
    world.expected_quarantine = b"rubbish\n"
    return [InterleavedProcess.deliver, InterleavedProcess.deliver]


def one_recovers_a_torn_segment_while_another_delivers(world: InterleavingWorld) -> list[Program]:
    world.put_file(layout.active_name("dead", 1), 2, raw=b'{"event":{"n"')
    world.expected_quarantine = b'{"event":{"n"'
    return [InterleavedProcess.recover_directory, InterleavedProcess.deliver]


SCENARIOS: Final[list[Scenario]] = [
    two_writers_recover_the_same_segment,
    one_creates_segments_while_another_recovers,
    one_recovers_while_another_delivers,
    two_deliver,
    two_deliver_while_a_third_writes,
    one_writes_while_others_recover_and_deliver,
    two_recover_a_legacy_segment,
    one_recovers_a_legacy_segment_while_another_delivers,
    one_delivers_while_an_operator_deletes,
    one_evicts_while_another_delivers,
    two_evict,
    two_deliver_a_damaged_batch,
    one_recovers_a_torn_segment_while_another_delivers,
]


def run(seconds: float | None = None, seed: int = 0, preemptions: int = PREEMPTIONS, kills: int = KILLS) -> InterleavingReport:
    """Run every scenario. With `seconds`, each gets an equal share of them."""
    share = None if seconds is None else seconds / len(SCENARIOS)
    reports = [explore(scenario, preemptions, kills, share, seed) for scenario in SCENARIOS]
    return InterleavingReport(
        sum(report.schedules for report in reports),
        sum(report.points for report in reports),
        all(report.complete for report in reports),
        [violation for report in reports for violation in report.violations],
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="for all scenarios; the default is to run every schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--preemptions", type=int, default=PREEMPTIONS)
    parser.add_argument("--kills", type=int, default=KILLS)
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}")  # noqa: T201 - the report
    report = run(chosen.seconds, chosen.seed, chosen.preemptions, chosen.kills)
    print(report)  # noqa: T201 - the report
    sys.exit(bool(report.violations))


if __name__ == "__main__":
    main()
