"""Several sinks on one directory: histories of the real code, and every state that a crash at any moment of them leaves.

A history is a text, one letter of `STEPS` a step. Its trace has marks of what is owed to each sink. Each state that a kill or a loss
of power may leave is opened by a new process, which delivers first, then fans out, and so on until nothing is left, to sinks that do
not deduplicate; then the accounts must balance. `problem_of` says what must not be.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.fanout import FanOut
from pillarbox.delivery.worker import Worker
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult
from pillarbox.stats import DeliveryCounters
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import Filesystem
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.reconciliation import reconcile, reconcile_queues
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, Op, State
from pillarbox.testing.durability_model import NAMES_MAX, DurabilityModel
from tests.crash.compiled_order import crash_filesystem
from tests.crash.enumeration import ENDS
from tests.crash.interleave import OUTBOX_PATH, RULES, SimulatedEventLoop
from tests.crash.simulation import number_of, numbers_in, payload_of, steps_of

LOCKS: Final = frozenset({layout.DELIVER_LOCK, layout.EVICT_LOCK, layout.LEDGER_LOCK})
LIMITS: Final = WriterLimits(batch_size=2, batch_bytes=10**6, max_bytes=2**29)
STEPS: Final = {
    "a": "append an event and have its file sealed",
    "o": "append an event that stays in the active file",
    "f": "a round of handing over",
    "d": "deliver all queues",
    "x": "deliver the first sink's queue",
    "y": "deliver the second sink's queue",
    "c": "name one more sink, which begins with what is sealed from then on",
    "p": "name one more sink, and ask that it begins with what waits",
    "r": "name the second sink no more, and remove its queue",
    "v": "evict what waits, as if there were no room at all",
    "k": "kill the process; the next step starts another",
}
FIRST: Final = ("a", "b")  # the sinks that are named from the beginning
LATER: Final = "c"
AFTER: Final = 10**6  # the number of the event that is appended after a recovery
ROUNDS: Final = 3  # of delivering and handing over, after which nothing may be left
STATES_MAX: Final = 120  # of a moment; of more, so many by chance
FEW: Final = 12  # where only so many are looked at

Arrival = tuple[str, str, int]  # sink, batch id, event


class FanOutDestination(RecordingSink):
    """Accepts everything, and adds a mark to the trace."""

    def __init__(self, disk: Disk, name: str) -> None:
        super().__init__()
        self._disk = disk
        self._name = name

    async def deliver(self, batch: Batch) -> DeliveryResult:
        """Accept it."""
        arrivals = [(self._name, batch.id, number_of(bytes(payload))) for payload in batch.payloads]
        self._disk.mark(("arrived", arrivals))
        return Delivered(len(batch))


def deliver(queue: Directory, sink: RecordingSink, clock: ManualClock, ledger: LedgerWriter) -> DeliveryCounters:
    """One round of the real worker on a queue."""
    worker = Worker(queue, NamedSink(sink, queue.sink), clock, RULES, ledger=ledger)
    worker.end()
    loop = SimulatedEventLoop()
    try:
        loop.run_until_complete(worker.run())
    finally:
        loop.close()
    return worker.counters


class FanOutProcess:
    """A process without threads: writes, seals, fans out, delivers."""

    def __init__(self, disk: Disk, filesystem: Filesystem, clock: ManualClock, new_id: Callable[[], str]) -> None:
        self._disk = disk
        self._clock = clock
        self.directory = Directory(OUTBOX_PATH, filesystem, clock, new_id)
        self._ledger = LedgerWriter(self.directory, clock)
        inbox = SealerInbox()
        self._writer = Writer(self.directory, LIMITS, inbox.wake)
        self._sealer = Sealer(
            self.directory, self._writer, inbox, clock, 1.0, lambda: disk.mark(("sealed", ())), 0, ledger=self._ledger
        )
        self._fan_outs: dict[tuple[str, ...], FanOut] = {}
        self.trouble = ""

    def start(self) -> None:
        """What an `Outbox` does when it is made and then first used."""
        self.directory.ensure_usable()
        account = self.directory.disk_usage()
        self.directory.seal_after(account.newest_sealed_at)
        self._writer.start(account.pending_bytes, account.pending_files)
        self._sealer.adopt_segments()
        self._disk.mark(("sealed", ()))

    def append(self, number: int, *, seal: bool = True) -> None:
        """Append an event."""
        if self._writer.append(record.line(payload_of(number)), 1):
            self._disk.mark(("accepted", number))
        if seal:
            self._writer.rotate("manual")
            self._sealer.step()

    def fan_out(self, sinks: Iterable[str]) -> FanOut:
        """The `FanOut` of these sinks."""
        key = tuple(sinks)
        if key not in self._fan_outs:
            self._fan_outs[key] = FanOut(self.directory, key, self._clock, self._ledger)
        return self._fan_outs[key]

    def fan_out_once(self, sinks: Iterable[str]) -> None:
        """One round of fanning out, as `FanOutRunner` does it; what it reports is kept as the trouble of the process."""
        fan_out = self.fan_out(sinks)
        self.trouble = "raised"
        self._sealer.adopt_segments()
        fan_out.distribute_all()
        self.trouble = "; ".join(fan_out.problems.values())
        self._disk.mark(("handed over", tuple(sinks)))

    def deliver(self, sinks: Iterable[str]) -> None:
        """What the threads of these sinks do."""
        for queue in self.directory.queues():
            if queue.sink in sinks:
                ledger = self.fan_out(sinks).ledger_for(queue)
                deliver(queue, FanOutDestination(self._disk, queue.sink), self._clock, ledger)

    def remove(self, sink: str) -> None:
        """Remove what is left of a queue."""
        for queue in self.directory.queues():
            if queue.sink == sink:
                queue.remove_queue()
        if sink in self.directory.requested_queues():
            self.directory.cancel_queue_request(sink)

    def evict(self) -> None:
        """Evict everything that is sealed."""
        capacity, writer = self._sealer.quota, self._writer
        self._disk.mark(("evicting", True))
        capacity._evicts, writer.limits = True, LIMITS._replace(max_bytes=0)
        try:
            capacity.enforce()
        finally:
            capacity._evicts, writer.limits = False, LIMITS
            self._disk.mark(("evicting", False))


Wrap = Callable[[CrashFilesystem], Filesystem]


class FanOutWorld:
    """A disk, the process on it, and the sinks."""

    def __init__(self, wrap: Wrap = lambda plain: plain) -> None:
        self.disk = Disk()
        self.clock = ManualClock()
        self._wrap = wrap
        self._new_id = map("{:04d}".format, itertools.count(1)).__next__
        self._number = itertools.count(1).__next__
        self._fuse: int | None = None  # operations until the process dies
        self._plain: CrashFilesystem | None = None
        self._living: FanOutProcess | None = None
        self.sinks: tuple[str, ...] = FIRST
        self.disk.mark(("sinks", self.sinks))

    @property
    def process(self) -> FanOutProcess:
        """The process that runs, started if none does."""
        if self._living is None:
            self._plain = crash_filesystem(self.disk, self._before)
            living = FanOutProcess(self.disk, self._wrap(self._plain), self.clock, self._new_id)
            living.start()
            self._living = living
        return self._living

    @property
    def lives(self) -> bool:
        """Whether a process runs."""
        return self._living is not None

    def _before(self, _verb: str, _path: str) -> None:
        if self._fuse is not None:
            self._fuse -= 1
            if self._fuse < 0:
                raise Killed

    def run(self, history: str) -> None:
        """Run all steps; a number behind a letter makes the process die before that operation of the step."""
        for letter, fuse in steps_of(history):
            self._fuse = fuse
            try:
                self._step(letter)
            except Killed:
                self.kill()
            self._fuse = None

    def _step(self, letter: str) -> None:
        match letter:
            case "a" | "o":
                self.process.append(self._number(), seal=letter == "a")
            case "f":
                self.process.fan_out_once(self.sinks)
            case "d" | "x" | "y":
                which = {"d": self.sinks, "x": self.sinks[:1], "y": self.sinks[1:2]}[letter]
                self.process.deliver(which)
            case "c" | "p":
                if letter == "p":
                    self.process.directory.request_queue(LATER)
                self._name((*self.sinks, LATER), asked=letter == "p")
            case "r":
                gone = self.sinks[1]
                self._name(tuple(sink for sink in self.sinks if sink != gone))
                self.process.remove(gone)
            case "v":
                self.process.evict()
            case "k":
                self.kill()

    def _name(self, sinks: tuple[str, ...], *, asked: bool = False) -> None:
        self.sinks = sinks
        self.disk.mark(("asked" if asked else "sinks", sinks))

    def kill(self) -> None:
        """The process dies, if it runs."""
        if self._plain is not None:
            self._plain.kill()
        self._plain = self._living = None


class SinkObligations:
    """What is owed to each sink at a moment of a trace, and what has arrived."""

    def __init__(self) -> None:
        self.sinks: tuple[str, ...] = ()
        self.removed: set[str] = set()
        self.accepted: set[int] = set()
        self.promised: set[int] = set()  # survive the loss of power
        self.owed: dict[str, set[int]] = {}
        self.not_for: dict[str, set[int]] = {}  # what was over before a sink was named
        self.arrived: list[Arrival] = []
        self.evicted: set[int] = set()  # or may be
        self.given_up: dict[str, set[int]] = {}  # for good, by that
        self._sealed: set[int] = set()
        self._gone: set[int] = set()  # handed over
        self._evicting = False
        self._begun: set[str] = set()  # sinks that get what is accepted from now on

    def apply(self, op: Op, content: Callable[[str], bytes]) -> None:
        """Apply one more operation; `content(path)` is what the running system saw before it."""
        in_place = op.path.rpartition("/")[0] == OUTBOX_PATH
        if op.verb == "mark":
            self._mark(op.note)
        elif op.verb == "rename" and in_place and layout.kind_of(op.target.rpartition("/")[2]) is Kind.SEALED:
            self._sealed |= numbers_in(content(op.path))
        elif op.verb == "unlink" and layout.kind_of(op.path.rpartition("/")[2]) is Kind.SEALED:
            gone = numbers_in(content(op.path))
            self._gone |= gone if in_place else set()
            if self._evicting:
                self._evict(op.path, gone, in_place=in_place, counts=not content(f"{OUTBOX_PATH}/{op.path.rpartition('/')[2]}"))

    def _evict(self, path: str, gone: set[int], *, in_place: bool, counts: bool) -> None:
        """A name is removed; `counts`: in a queue, whether it already belonged to its sink."""
        self.evicted |= gone
        for sink in self.sinks:
            if in_place or (counts and f"/{layout.queue_name(sink)}/" in path):
                self.given_up.setdefault(sink, set()).update(gone)

    def _mark(self, what: object) -> None:
        assert isinstance(what, tuple)
        name, about = what
        if name in ("sinks", "asked"):
            new, gone = set(about) - set(self.sinks), set(self.sinks) - set(about)
            self.removed = (self.removed | gone) - new
            over = self._gone - (self._waiting() if name == "asked" else set())
            for sink in new:
                self.not_for[sink] = over if self.sinks else set()
                # A later one begins with what is sealed once its queue is there, unless it was asked for.
                self.owed[sink] = set() if name == "sinks" and self.sinks else self.accepted - over
            self._begun |= new if name == "asked" or not self.sinks else set()
            self.sinks = about
        elif name == "accepted":
            self.accepted.add(about)
            for sink in self._begun:
                self.owed[sink].add(about)
        elif name == "sealed":
            self.promised |= self._sealed
        elif name == "arrived":
            self.arrived += about
        elif name == "handed over":
            self._begun |= set(about)
        else:
            self._evicting = about

    def _waiting(self) -> set[int]:
        """Events that are fanned out and not yet with all sinks."""
        waiting: set[int] = set()
        for one in self.sinks:
            waiting |= self._gone - {number for sink, _, number in self.arrived if sink == one}
        return waiting


class FanOutRecoveryOutcome(NamedTuple):
    """The result of a recovery."""

    arrived: tuple[Arrival, ...]
    problem: str


def links_of(state: Mapping[str, bytes]) -> dict[str, str]:
    """Which paths of a state are one file: those with the same sealed name, for such a name is used once."""
    first: dict[str, str] = {}
    links: dict[str, str] = {}
    for path in sorted(state, key=lambda path: (path.count("/"), path)):
        name = path.rpartition("/")[2]
        if layout.kind_of(name) is Kind.SEALED and first.setdefault(name, path) != path:
            links[path] = first[name]
    return links


def recover(state: State, sinks: tuple[str, ...], removed: Iterable[str]) -> FanOutRecoveryOutcome:
    """Open what a crash has left, deliver it to the sinks, append an event and deliver that too; check the accounts."""
    disk, clock = Disk(state, links_of(state)), ManualClock()
    clock.advance(3600.0)
    process = FanOutProcess(disk, crash_filesystem(disk), clock, map("r{:03d}".format, itertools.count(1)).__next__)
    process.start()
    for sink in removed:
        process.remove(sink)
    if f"{OUTBOX_PATH}/{layout.adding_name(LATER)}/" in state:
        process.fan_out_once(sinks)  # first: what is delivered until it was done does not wait for that sink
    for _ in range(ROUNDS):
        process.deliver(sinks)
        process.fan_out_once(sinks)
    process.append(AFTER)
    process.fan_out_once(sinks)
    process.deliver(sinks)
    arrived = [arrival for op in disk.trace if op.verb == "mark" for arrival in _arrivals(op.note)]
    return FanOutRecoveryOutcome(tuple(arrived), _left_over(disk, sinks) or _out_of_balance(process.directory))


def _arrivals(what: object) -> list[Arrival]:
    assert isinstance(what, tuple)
    return list(what[1]) if what[0] == "arrived" else []


def _left_over(disk: Disk, sinks: tuple[str, ...]) -> str:
    """What is left that must not be."""
    for path in disk.files:
        name = path.removesuffix("/").rpartition("/")[2]
        if layout.sink_of_queue(name) not in (None, *sinks) or layout.sink_of_adding(name) in sinks:
            return f"left behind: {path}"
        if layout.kind_of(name) in (Kind.SEALED, Kind.TEMPORARY, Kind.DEAD):
            return f"left behind: {path}"
    return ""


def _out_of_balance(directory: Directory) -> str:
    found = reconcile(directory)
    for name, one in {"the directory": found, **reconcile_queues(directory, found)}.items():
        if not one.balances:
            return f"the account of {name} does not balance: {one.reconciliation.discrepancies} {one.unreadable}"
    return ""


def problem_of(state: State, outcome: FanOutRecoveryOutcome, owed: SinkObligations, *, power: bool) -> str:
    """What is wrong with the recovery of a state that a crash has left; empty if nothing is."""
    if outcome.problem:
        return outcome.problem
    before = set(owed.arrived)
    batches: dict[tuple[str, int], set[str]] = {}
    for sink, batch, number in (*owed.arrived, *outcome.arrived):
        batches.setdefault((sink, number), set()).add(batch)
    for sink in owed.sinks:
        had = {number for one, _, number in (*before, *outcome.arrived) if one == sink}
        due = owed.owed[sink] & (owed.promised if power else owed.accepted) - owed.evicted
        if lost := (due | {AFTER}) - had:
            return f"{sink} misses {sorted(lost)}"
        if wrong := {number for one, _, number in outcome.arrived if one == sink} & owed.not_for[sink]:
            return f"{sink} is given what was over before it was named: {sorted(wrong)}"
    for (sink, number), ids in batches.items():
        if len(ids) > 1:
            return f"{sink} is given {number} in several batches: {sorted(ids)}"
    if power:
        return ""
    for (sink, batch, number), times in Counter(outcome.arrived).items():
        if number in owed.given_up.get(sink, ()):
            return f"{sink} is given {number}, which was given up"
        again = (sink, batch, number) in before
        in_flight = f"{OUTBOX_PATH}/{layout.queue_name(sink)}/{batch}{layout.SUFFIX}" in state
        if times > 1 or (again and not in_flight):
            return f"{sink} is given {number} twice"
    return ""


class Moment(NamedTuple):
    """A point in a trace at which everything may stop, and the states that it may leave."""

    at: int
    states: Iterable[State]
    owed: SinkObligations
    power: bool  # lost; otherwise the process dies


def moments(trace: list[Op], most: int = STATES_MAX) -> Iterator[Moment]:
    """All moments, each with at most so many states. The objects that are yielded change with the iteration."""
    owed, survivors, news = SinkObligations(), DurabilityModel(ignoring=LOCKS), True
    for at, op in enumerate(trace):
        if news and op.verb in ("mark", "sync_data", "sync_failed", "sync_directory"):
            yield Moment(at, _some(survivors, at, most), owed, power=True)
            news = False
        owed.apply(op, lambda path: survivors.complete_state().get(path, b""))
        survivors.apply(op)
        news = True
        if op.verb not in ("sync_data", "sync_failed", "sync_directory"):
            yield Moment(at + 1, [survivors.complete_state()], owed, power=False)
    yield Moment(len(trace), _some(survivors, len(trace), most), owed, power=True)


def _some(survivors: DurabilityModel, at: int, most: int) -> Iterable[State]:
    if survivors.unsynced_names <= NAMES_MAX and survivors.count(ENDS) <= most:
        return survivors.states(ENDS)
    chance = random.Random(at)
    return [survivors.random_state(chance) for _ in range(most)]


class FanOutEnumeration:
    """Checks histories; the violations."""

    def __init__(self) -> None:
        self.checked = 0
        self.known: dict[int, FanOutRecoveryOutcome] = {}
        self.violations: list[str] = []

    def check_history(self, history: str, *, few: bool = False) -> None:
        """Check every state at every moment of a history, or a `few`, until one is wrong."""
        world = FanOutWorld()
        world.run(history)
        self.check_trace(history, world.disk.trace, few=few)

    def check_trace(self, history: str, trace: list[Op], *, few: bool = False, faults: bool = False) -> None:
        """The same of a trace; in one with `faults` an account may lack an entry that the disk did not take."""
        for moment in moments(trace, FEW if few else STATES_MAX):
            if not moment.owed.sinks:
                continue  # the first mark is still to come
            for state in moment.states:
                self.checked += 1
                problem = self.problem_of(state, moment)
                if problem and not (faults and "balance" in problem):
                    self.violations.append(f"{problem}\n  {history!r}, operation {moment.at}, power {moment.power}: {state}")
                    return

    def problem_of(self, state: State, moment: Moment) -> str:
        """What is wrong with a state."""
        owed = moment.owed
        key = hash((frozenset(state.items()), owed.sinks, frozenset(owed.removed)))
        if key not in self.known:
            self.known[key] = recover(state, owed.sinks, owed.removed)
        return problem_of(state, self.known[key], owed, power=moment.power)
