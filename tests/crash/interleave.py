"""Every interleaving of the real code of several processes on one directory, up to so many preemptions and kills.

A process is a greenlet with a file system, a `Directory` and a clock of its own. Each of its file-system calls, and each arrival of a
batch at the destination, is a point at which another process may continue instead (a preemption), or at which the process is
killed: it loses its descriptors and locks, and none of its later calls has an effect. When a process ends, any other one continues.

A schedule is the list of the decisions that are not "continue": what is done at which point. `explore` runs a schedule, reads the
points that it came by, and adds every further decision that the bounds allow, so that each schedule is run exactly once. A call that
no other process can notice while the power stays on is not a point. After each schedule a new process recovers and delivers what is
left, and `violations` says what must not be.

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
RULES: Final = DeliveryConfig(stop_after_rejected_batches=0, page_files=2)  # so that what waits is named in several parts
# What no other process can notice. Where the others cannot tell before from after, one point stands for both.
UNNOTICED: Final = frozenset(
    {"sync_data", "sync_directory", "disk_space", "inspect_directory", "make_directory", "overwrite", "write_back"}
)

LOCKS: Final = frozenset({layout.DELIVER_LOCK, layout.EVICT_LOCK})

Decision = tuple[int, Literal["go", "kill"], int]  # at which point, which process goes on or is killed
Schedule = tuple[Decision, ...]


class SimulatedEventLoop(asyncio.BaseEventLoop):
    """An event loop without input or output, in which waiting takes no time."""

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


def deliver_once(directory: Directory, sink: Sink, clock: Clock, on_gone: Callable[[int], None] = lambda _bytes: None) -> None:
    """One round of the real delivery worker, if it gets the lease: adopt, send, settle."""
    worker = Worker(directory, NamedSink(sink, "test"), clock, RULES, DeliveryCallbacks(on_gone))
    worker.end()
    loop = SimulatedEventLoop()
    try:
        loop.run_until_complete(worker.run())
    finally:
        loop.close()


class InterleavedProcess:
    """One of the processes: what its program does with the real code."""

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
        """What an application does: start, append so many events at a time with a round of the sealer after each, end."""
        directory = self.directory
        inbox = SealerInbox()
        writer = Writer(directory, WriterLimits(2, 10**6, evict_above or 2**30), inbox.wake)
        if evict_above is not None:
            self._note_what_is_evicted()
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

    def _note_what_is_evicted(self) -> None:
        remove = self.directory.remove

        def noting(name: str) -> None:
            sealed = layout.kind_of(name) is Kind.SEALED
            data = self.world.content(name) if sealed and name in self.world.names() else b""
            remove(name)
            self.world.evicted.update(reader.read_lines(data, lambda: None).payloads)

        self.directory.remove = noting  # type: ignore[method-assign]

    def die_with(self, count: int) -> None:
        """Append events, and never end."""
        writer = Writer(self.directory, WriterLimits(2, 10**6, 2**30), lambda: None)
        writer.start(0, 0)
        for _ in range(count):
            event = self.world.new_event()
            assert writer.append(record.line(event), 1)
            self.world.accepted.add(event)
        self.die()

    def adopt(self) -> None:
        """What each process does when it starts."""
        recover(self.directory)

    def deliver(self) -> None:
        """One round of the real delivery worker, if it gets the lease: adopt, send, settle."""
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
    """A disk, the processes on it, and what was accepted and delivered."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.interleaved = False
        self.processes: list[InterleavedProcess] = []
        self.accepted: set[bytes] = set()
        self.attempted: set[bytes] = set()
        self.excused: set[bytes] = set()  # an operator deletes them
        self.evicted: Counter[bytes] = Counter()
        self.delivered: list[tuple[bytes, str]] = []  # payload, batch id
        self.more_sinks: tuple[str, ...] = ()  # where there are several at all
        self.judge = violations  # looks what is wrong in the end
        self.damaged = b""  # what is to be in quarantine in the end, and nothing else
        self.new_id = map("id-{:04d}".format, itertools.count(1)).__next__
        self._number = itertools.count(1).__next__
        InterleavedProcess(self, -1).filesystem.make_directory(OUTBOX_PATH)

    def new_event(self) -> bytes:
        """The JSON of an event that differs from all others."""
        event = b'{"n":%d}' % self._number()
        self.attempted.add(event)
        return event

    def another(self) -> InterleavedProcess:
        """A process that is not interleaved."""
        return InterleavedProcess(self, -1)

    def put(self, name: str, events: int, raw: bytes = b"") -> set[bytes]:
        """Create a file that was there before, with events that count as accepted."""
        made = [self.new_event() for _ in range(events)]
        process = self.another()
        fd = process.filesystem.create(f"{OUTBOX_PATH}/{name}")
        process.filesystem.write_all(fd, b"".join(map(record.line, made)) + raw)
        process.filesystem.kill()
        self.accepted.update(made)
        return set(made)

    def names(self) -> list[str]:
        """The names in the directory."""
        return sorted(entry.name for entry in self.another().filesystem.list_files(OUTBOX_PATH))

    def content(self, name: str) -> bytes:
        """The content of a file."""
        filesystem = self.another().filesystem
        return filesystem.read_all(filesystem.open_existing(f"{OUTBOX_PATH}/{name}", allow_links=True))


Program = Callable[[InterleavedProcess], None]
Scenario = Callable[[InterleavingWorld], list[Program]]


class SchedulePoint(NamedTuple):
    """Where a decision may be taken: which process was about to do what, and what else could be decided there."""

    process: int
    doing: str
    others: tuple[Decision, ...]


class ScheduleResult(NamedTuple):
    """The result of one schedule."""

    points: list[SchedulePoint]
    troubles: list[str]


class InterleavingReport(NamedTuple):
    """The results of many schedules."""

    schedules: int
    points: int
    complete: bool  # every schedule within the bounds was run
    violations: list[tuple[str, Schedule, list[str]]]

    def __str__(self) -> str:
        extent = "all schedules" if self.complete else "a part of the schedules"
        lines = [f"{extent}: {self.schedules}, with {self.points} points; {len(self.violations)} violate something"]
        lines += [
            f"  reproduce({name!r}, {schedule!r}): {'; '.join(troubles)}" for name, schedule, troubles in self.violations[:10]
        ]
        return "\n".join(lines)


def run_schedule(scenario: Scenario, schedule: Schedule) -> ScheduleResult:
    """Run the processes of a scenario as the schedule says, then recover and find what is wrong."""
    world = InterleavingWorld()
    programs = scenario(world)
    troubles: list[str] = []
    decided = {point: (what, who) for point, what, who in schedule}
    points: list[SchedulePoint] = []
    world.processes = [InterleavedProcess(world, number) for number in range(len(programs))]
    threads = [
        greenlet(_guarded(process, program, troubles)) for process, program in zip(world.processes, programs, strict=True)
    ]
    world.interleaved = True
    alive = list(range(len(programs)))
    current, doing = 0, "begin"
    begun: set[int] = set()
    while alive:
        number, ended = len(points), current not in alive
        others: list[Decision] = [(number, "go", other) for other in alive if other != current]
        # To kill a process that has not begun shows nothing.
        others += [(number, "kill", other) for other in alive if other in begun]
        what, who = decided.get(number, ("go", alive[0] if ended else current))
        points.append(SchedulePoint(current, "end" if ended else doing, tuple(one for one in others if one[1:] != (what, who))))
        if what == "go":
            current = who
            begun.add(who)
            doing = threads[who].switch()
        else:
            world.processes[who].die()
            threads[who].throw(Killed)
        if threads[who].dead:
            world.processes[who].die()  # the end of a process takes its descriptors too
            alive.remove(who)
    world.interleaved = False
    troubles += world.judge(world, killed=any(what == "kill" for _, what, _ in schedule))
    return ScheduleResult(points, troubles)


def _guarded(process: InterleavedProcess, program: Program, troubles: list[str]) -> Callable[[], None]:
    def run() -> None:
        try:
            program(process)
        except Killed:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            troubles.append(f"process {process.number} raised {type(error).__name__}: {error}")

    return run


def violations(world: InterleavingWorld, *, killed: bool) -> list[str]:
    """What is wrong once a new process has recovered and delivered everything."""
    found: list[str] = []
    last = world.another()
    try:
        last.deliver()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        found.append(f"recovery raised {type(error).__name__}: {error}")
    last.die()
    payloads = Counter(payload for payload, _ in world.delivered)
    if lost := world.accepted - world.excused - world.evicted.keys() - payloads.keys():
        found.append(f"lost: {sorted(lost)}")
    if invented := payloads.keys() - world.attempted:
        found.append(f"invented: {sorted(invented)}")
    if not killed and (both := [payload for payload in payloads if world.evicted[payload]]):
        found.append(f"delivered, and evicted: {both}")
    for payload, count in payloads.items():
        batches = {batch for one, batch in world.delivered if one == payload}
        if count > 1 and not killed:
            found.append(f"{payload!r} was delivered {count} times")
        elif len(batches) > 1:
            found.append(f"{payload!r} was delivered as a part of {sorted(batches)}")
    kinds = {name: layout.kind_of(name) for name in world.names() if name not in LOCKS}
    if left := [name for name, kind in kinds.items() if kind not in (Kind.CORRUPT, Kind.RANGES)]:
        found.append(f"left behind: {left}")
    if (kept := [world.content(name) for name, kind in kinds.items() if kind is Kind.CORRUPT]) != [world.damaged] * bool(
        world.damaged
    ):
        found.append(f"in quarantine: {kept}")
    return found


def within(schedule: Schedule, points: Sequence[SchedulePoint], preemptions: int, kills: int) -> bool:
    """Whether a schedule is within the bounds; when a process has ended or was killed, another one continues at no cost."""
    preempted = sum(what == "go" and points[number].doing not in ("end", "begin") for number, what, _ in schedule)
    return preempted <= preemptions and sum(what == "kill" for _, what, _ in schedule) <= kills


def explore(
    scenario: Scenario, preemptions: int = PREEMPTIONS, kills: int = KILLS, seconds: float | None = None, seed: int = 0
) -> InterleavingReport:
    """Run every schedule within the bounds; with `seconds`, in an order that the seed decides, and no longer than that."""
    chance = random.Random(seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    waiting: list[Schedule] = [()]
    schedules = points = 0
    found: list[tuple[str, Schedule, list[str]]] = []
    with _quiet():
        while waiting and (deadline is None or time.monotonic() < deadline):
            if deadline is not None:
                index = chance.randrange(len(waiting))
                waiting[index], waiting[-1] = waiting[-1], waiting[index]
            schedule = waiting.pop()
            ran = run_schedule(scenario, schedule)
            schedules += 1
            points += len(ran.points)
            if ran.troubles:
                found.append((scenario.__name__, schedule, ran.troubles))
            first = schedule[-1][0] + 1 if schedule else 0
            for point in ran.points[first:]:
                longer = [(*schedule, decision) for decision in point.others]
                waiting += [one for one in longer if within(one, ran.points, preemptions, kills)]
    return InterleavingReport(schedules, points, not waiting, found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without log lines, and with the hooks of the interpreter restored."""
    logger, hooks = logging.getLogger("pillarbox"), sys.get_asyncgen_hooks()
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
        sys.set_asyncgen_hooks(*hooks)


def reproduce(name: str, schedule: Schedule) -> list[str]:
    """Run one schedule of a scenario and print every point of it; returns what is wrong."""
    ran = run_schedule(next(one for one in SCENARIOS if one.__name__ == name), schedule)
    decided = {point: (what, who) for point, what, who in schedule}
    for number, point in enumerate(ran.points):
        print(f"{number:4} process {point.process}: {point.doing:60} {decided.get(number, '')}")  # noqa: T201 - that is its use
    return ran.troubles


# Scenarios: each prepares the world and says what its processes do.


def two_start_and_adopt_the_same_file(world: InterleavingWorld) -> list[Program]:
    world.another().die_with(2)
    return [lambda one: one.write(1), lambda two: two.write(1)]


def one_begins_files_while_another_recovers(world: InterleavingWorld) -> list[Program]:
    def recover_twice(process: InterleavedProcess) -> None:
        process.adopt()
        process.adopt()

    return [lambda one: one.write(1, 2), recover_twice]


def one_adopts_while_another_delivers(world: InterleavingWorld) -> list[Program]:
    world.another().die_with(1)
    world.put(layout.sealed_name(1, "old"), 1)
    return [InterleavedProcess.adopt, InterleavedProcess.deliver]


def two_deliver(world: InterleavingWorld) -> list[Program]:
    world.put(layout.sealed_name(1, "a"), 2)
    world.put(layout.sealed_name(2, "b"), 1)
    return [InterleavedProcess.deliver, InterleavedProcess.deliver]


def two_deliver_what_a_third_writes(world: InterleavingWorld) -> list[Program]:
    return [lambda one: one.write(1), InterleavedProcess.deliver, InterleavedProcess.deliver]


def one_writes_and_the_others_adopt_and_deliver(world: InterleavingWorld) -> list[Program]:
    world.another().die_with(1)
    return [lambda one: one.write(1), InterleavedProcess.adopt, InterleavedProcess.deliver]


def two_adopt_what_the_older_system_left(world: InterleavingWorld) -> list[Program]:
    world.put(layout.LEGACY_ACTIVE, 2)
    return [lambda one: one.write(1), InterleavedProcess.adopt]


def one_adopts_what_the_older_system_left_and_another_delivers(world: InterleavingWorld) -> list[Program]:
    world.put(layout.LEGACY_ACTIVE, 2)
    return [InterleavedProcess.adopt, InterleavedProcess.deliver]


def one_delivers_what_an_operator_deletes(world: InterleavingWorld) -> list[Program]:
    name = layout.sealed_name(1, "a")
    world.excused |= world.put(name, 2)
    world.put(layout.sealed_name(2, "b"), 1)
    return [InterleavedProcess.deliver, lambda operator: operator.directory.remove(name)]


def one_evicts_while_another_delivers(world: InterleavingWorld) -> list[Program]:
    for stamp in (1, 2, 3):
        world.put(layout.sealed_name(stamp, "a"), 1)
    return [lambda one: one.write(1, evict_above=110), InterleavedProcess.deliver]


def two_evict(world: InterleavingWorld) -> list[Program]:
    for stamp in (1, 2, 3):
        world.put(layout.sealed_name(stamp, "a"), 1)
    return [lambda one: one.write(1, evict_above=110), lambda two: two.write(1, evict_above=110)]


def two_deliver_what_is_damaged(world: InterleavingWorld) -> list[Program]:
    name = layout.sealed_name(1, "a")
    world.put(name, 1, raw=b"rubbish\n")
    world.damaged = b"rubbish\n"
    return [InterleavedProcess.deliver, InterleavedProcess.deliver]


def one_adopts_what_is_torn_and_another_delivers(world: InterleavingWorld) -> list[Program]:
    world.put(layout.active_name("dead", 1), 2, raw=b'{"event":{"n"')
    world.damaged = b'{"event":{"n"'
    return [InterleavedProcess.adopt, InterleavedProcess.deliver]


SCENARIOS: Final[list[Scenario]] = [
    two_start_and_adopt_the_same_file,
    one_begins_files_while_another_recovers,
    one_adopts_while_another_delivers,
    two_deliver,
    two_deliver_what_a_third_writes,
    one_writes_and_the_others_adopt_and_deliver,
    two_adopt_what_the_older_system_left,
    one_adopts_what_the_older_system_left_and_another_delivers,
    one_delivers_what_an_operator_deletes,
    one_evicts_while_another_delivers,
    two_evict,
    two_deliver_what_is_damaged,
    one_adopts_what_is_torn_and_another_delivers,
]


def run(seconds: float | None = None, seed: int = 0, preemptions: int = PREEMPTIONS, kills: int = KILLS) -> InterleavingReport:
    """Run every scenario; with `seconds`, each for its share of them."""
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
    parser.add_argument("--seconds", type=float, help="in all; without it, until every schedule was run")
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
