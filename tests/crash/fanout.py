"""Checks histories of several sinks on one directory, with every state after a crash at any moment.

A history is a string with one letter of `STEPS` for each step. Its trace has marks, from which `SinkObligations` computes the
events that each sink must receive. A new process opens each state after a kill or a power loss, and delivers and fans out in
turn until nothing is left, to sinks that do not deduplicate. Then the ledgers must balance. `problem_of` checks the result.
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
from pillarbox.store.queue_changes import cancel_queue_request, remove_queue, request_queue
from pillarbox.store.reconciliation import reconcile, reconcile_queues
from pillarbox.store.sealer import Sealer, SealerInbox
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, Op, State
from pillarbox.testing.durability_model import NAMES_MAX, DurabilityModel
from tests.crash.compiled_order import crash_filesystem
from tests.crash.enumeration import ENDS
from tests.crash.interleave import DELIVERY_CONFIG, OUTBOX_PATH, run_until_drained
from tests.crash.simulation import number_of, numbers_in, payload_of, steps_of

LOCKS: Final = frozenset({layout.DELIVER_LOCK, layout.EVICT_LOCK, layout.LEDGER_LOCK})
LIMITS: Final = WriterLimits(batch_size=2, batch_bytes=10**6, max_bytes=2**29)
STEPS: Final = {
    "a": "append an event and seal its segment",
    "o": "append an event that stays in the active segment",
    "f": "fan out all batches",
    "d": "deliver all queues",
    "x": "deliver the first sink's queue",
    "y": "deliver the second sink's queue",
    "c": "add a sink, which receives the batches that are sealed from then on",
    "p": "add a sink, and request that it starts with the backlog",
    "r": "remove the second sink and its queue",
    "v": "evict all pending batches",
    "k": "kill the process; the next step starts a new one",
}
FIRST: Final = ("a", "b")  # the sinks at the beginning
LATER: Final = "c"
AFTER: Final = 10**6  # the number of the event that is appended after a recovery
ROUNDS: Final = 3  # of delivery and fan-out, after which nothing may be left
STATES_MAX: Final = 120  # of a moment; if there are more, this many are chosen at random
FEW_STATES_MAX: Final = 12  # of a moment, in histories of which only a few states are checked

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
    """Run the real worker on a queue until nothing is pending."""
    worker = Worker(queue, NamedSink(sink, queue.sink), clock, DELIVERY_CONFIG, ledger=ledger)
    run_until_drained(worker)
    return worker.counters


class FanOutProcess:
    """A process without threads that stores, seals, fans out and delivers."""

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
        self.reported_problem = ""

    def start(self) -> None:
        """Do what an `Outbox` does at its creation and its first use."""
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
        """Fan out all batches, as `FanOutRunner` does, and store the problems that it reports."""
        fan_out = self.fan_out(sinks)
        self.reported_problem = "raised"
        self._sealer.adopt_segments()
        fan_out.distribute_all()
        self.reported_problem = "; ".join(fan_out.problems.values())
        self._disk.mark(("fanned out", tuple(sinks)))

    def deliver(self, sinks: Iterable[str]) -> None:
        """Deliver the queues of these sinks."""
        for queue in self.directory.queues():
            if queue.sink in sinks:
                ledger = self.fan_out(sinks).ledger_for(queue)
                deliver(queue, FanOutDestination(self._disk, queue.sink), self._clock, ledger)

    def remove(self, sink: str) -> None:
        """Remove the queue of a sink, or the request for it."""
        for queue in self.directory.queues():
            if queue.sink == sink:
                remove_queue(queue, self._ledger, self._clock)
        if sink in self.directory.requested_queues():
            cancel_queue_request(self.directory, sink)

    def evict(self) -> None:
        """Evict all batches, by a limit of zero bytes."""
        quota, writer = self._sealer.quota, self._writer
        self._disk.mark(("evicting", True))
        quota._evicts, writer.limits = True, LIMITS._replace(max_bytes=0)
        try:
            quota.enforce()
        finally:
            quota._evicts, writer.limits = False, LIMITS
            self._disk.mark(("evicting", False))


Wrap = Callable[[CrashFilesystem], Filesystem]


class FanOutWorld:
    """A disk, the process on it, and the sinks."""

    def __init__(self, wrap: Wrap = lambda filesystem: filesystem) -> None:
        self.disk = Disk()
        self.clock = ManualClock()
        self._wrap = wrap
        self._new_id = map("{:04d}".format, itertools.count(1)).__next__
        self._number = itertools.count(1).__next__
        self._fuse: int | None = None  # operations until the process is killed
        self._filesystem: CrashFilesystem | None = None
        self._process: FanOutProcess | None = None
        self.sinks: tuple[str, ...] = FIRST
        self.disk.mark(("sinks", self.sinks))

    @property
    def process(self) -> FanOutProcess:
        """The running process, which is started if there is none."""
        if self._process is None:
            self._filesystem = crash_filesystem(self.disk, self._before)
            process = FanOutProcess(self.disk, self._wrap(self._filesystem), self.clock, self._new_id)
            process.start()
            self._process = process
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether a process runs."""
        return self._process is not None

    def _before(self, _verb: str, _path: str) -> None:
        if self._fuse is not None:
            self._fuse -= 1
            if self._fuse < 0:
                raise Killed

    def run(self, history: str) -> None:
        """Run all steps. A number after a letter kills the process before that operation of the step."""
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
                sinks = {"d": self.sinks, "x": self.sinks[:1], "y": self.sinks[1:2]}[letter]
                self.process.deliver(sinks)
            case "c" | "p":
                if letter == "p":
                    request_queue(self.process.directory, LATER)
                self._set_sinks((*self.sinks, LATER), requested=letter == "p")
            case "r":
                removed = self.sinks[1]
                self._set_sinks(tuple(sink for sink in self.sinks if sink != removed))
                self.process.remove(removed)
            case "v":
                self.process.evict()
            case "k":
                self.kill()

    def _set_sinks(self, sinks: tuple[str, ...], *, requested: bool = False) -> None:
        self.sinks = sinks
        self.disk.mark(("requested" if requested else "sinks", sinks))

    def kill(self) -> None:
        """Kill the process, if it runs."""
        if self._filesystem is not None:
            self._filesystem.kill()
        self._filesystem = self._process = None


class SinkObligations:
    """The events that each sink must receive, at a moment of a trace, and those that have arrived."""

    def __init__(self) -> None:
        self.sinks: tuple[str, ...] = ()
        self.removed: set[str] = set()
        self.accepted: set[int] = set()
        self.promised: set[int] = set()  # survive a power loss
        self.owed: dict[str, set[int]] = {}
        self.not_for: dict[str, set[int]] = {}  # events that were finished before a sink was added
        self.arrived: list[Arrival] = []
        self.evicted: set[int] = set()  # or possibly evicted
        self.evicted_for: dict[str, set[int]] = {}  # certainly evicted, by sink
        self._sealed: set[int] = set()
        self._fanned_out: set[int] = set()
        self._evicting = False
        self._begun: set[str] = set()  # sinks that receive the events that are accepted from now on

    def apply(self, op: Op, content: Callable[[str], bytes]) -> None:
        """Apply one more operation; `content(path)` is what the running system saw before it."""
        in_outbox = op.path.rpartition("/")[0] == OUTBOX_PATH
        if op.verb == "mark":
            self._mark(op.note)
        elif op.verb == "rename" and in_outbox and layout.kind_of(op.target.rpartition("/")[2]) is Kind.SEALED:
            self._sealed |= numbers_in(content(op.path))
        elif op.verb == "unlink" and layout.kind_of(op.path.rpartition("/")[2]) is Kind.SEALED:
            removed = numbers_in(content(op.path))
            self._fanned_out |= removed if in_outbox else set()
            if self._evicting:
                self._evict(
                    op.path, removed, in_outbox=in_outbox, counts=not content(f"{OUTBOX_PATH}/{op.path.rpartition('/')[2]}")
                )

    def _evict(self, path: str, removed: set[int], *, in_outbox: bool, counts: bool) -> None:
        """A name is removed. `counts`: for a link in a queue, whether it already belonged to its sink."""
        self.evicted |= removed
        for sink in self.sinks:
            if in_outbox or (counts and f"/{layout.queue_name(sink)}/" in path):
                self.evicted_for.setdefault(sink, set()).update(removed)

    def _mark(self, note: object) -> None:
        assert isinstance(note, tuple)
        name, value = note
        if name in ("sinks", "requested"):
            new, gone = set(value) - set(self.sinks), set(self.sinks) - set(value)
            self.removed = (self.removed | gone) - new
            finished = self._fanned_out - (self._pending() if name == "requested" else set())
            for sink in new:
                self.not_for[sink] = finished if self.sinks else set()
                # A later sink receives the batches that are sealed once its queue exists, unless its backlog was requested.
                self.owed[sink] = set() if name == "sinks" and self.sinks else self.accepted - finished
            self._begun |= new if name == "requested" or not self.sinks else set()
            self.sinks = value
        elif name == "accepted":
            self.accepted.add(value)
            for sink in self._begun:
                self.owed[sink].add(value)
        elif name == "sealed":
            self.promised |= self._sealed
        elif name == "arrived":
            self.arrived += value
        elif name == "fanned out":
            self._begun |= set(value)
        else:
            self._evicting = value

    def _pending(self) -> set[int]:
        """Events that are fanned out and not yet delivered to all sinks."""
        pending: set[int] = set()
        for sink in self.sinks:
            pending |= self._fanned_out - {number for receiver, _, number in self.arrived if receiver == sink}
        return pending


class FanOutRecoveryOutcome(NamedTuple):
    """The result of a recovery."""

    arrived: tuple[Arrival, ...]
    problem: str


def links_of(state: Mapping[str, bytes]) -> dict[str, str]:
    """The links of a state: paths with the same sealed name are one file, because such a name is used only once."""
    first: dict[str, str] = {}
    links: dict[str, str] = {}
    for path in sorted(state, key=lambda path: (path.count("/"), path)):
        name = path.rpartition("/")[2]
        if layout.kind_of(name) is Kind.SEALED and first.setdefault(name, path) != path:
            links[path] = first[name]
    return links


def recover(state: State, sinks: tuple[str, ...], removed: Iterable[str]) -> FanOutRecoveryOutcome:
    """Open the state after a crash, deliver it, append an event and deliver that too, and check the ledgers."""
    disk, clock = Disk(state, links_of(state)), ManualClock()
    clock.advance(3600.0)
    process = FanOutProcess(disk, crash_filesystem(disk), clock, map("r{:03d}".format, itertools.count(1)).__next__)
    process.start()
    for sink in removed:
        process.remove(sink)
    if f"{OUTBOX_PATH}/{layout.adding_name(LATER)}/" in state:
        process.fan_out_once(sinks)  # first, because batches that are delivered before it are not for that sink
    for _ in range(ROUNDS):
        process.deliver(sinks)
        process.fan_out_once(sinks)
    process.append(AFTER)
    process.fan_out_once(sinks)
    process.deliver(sinks)
    arrived = [arrival for op in disk.trace if op.verb == "mark" for arrival in _arrivals(op.note)]
    return FanOutRecoveryOutcome(tuple(arrived), _remaining(disk, sinks) or _imbalance(process.directory))


def _arrivals(note: object) -> list[Arrival]:
    assert isinstance(note, tuple)
    return list(note[1]) if note[0] == "arrived" else []


def _remaining(disk: Disk, sinks: tuple[str, ...]) -> str:
    """The first file that must not be left; empty if there is none."""
    for path in disk.files:
        name = path.removesuffix("/").rpartition("/")[2]
        if (
            layout.sink_of_queue(name) not in (None, *sinks)
            or layout.sink_of_adding(name) in sinks
            or layout.is_removing_name(name)
        ):
            return f"left behind: {path}"
        if layout.kind_of(name) in (Kind.SEALED, Kind.TEMPORARY, Kind.DEAD):
            return f"left behind: {path}"
    return ""


def _imbalance(directory: Directory) -> str:
    directory_report = reconcile(directory)
    reports = {"the directory": directory_report, **reconcile_queues(directory, directory_report)}
    for name, report in reports.items():
        if not report.balances:
            return f"the ledger of {name} does not balance: {report.reconciliation.discrepancies} {report.unreadable}"
    return ""


def problem_of(state: State, outcome: FanOutRecoveryOutcome, obligations: SinkObligations, *, power: bool) -> str:
    """The problem of the recovery of a state after a crash; empty if there is none."""
    if outcome.problem:
        return outcome.problem
    arrived_before = set(obligations.arrived)
    batches: dict[tuple[str, int], set[str]] = {}
    for sink, batch, number in (*obligations.arrived, *outcome.arrived):
        batches.setdefault((sink, number), set()).add(batch)
    for sink in obligations.sinks:
        arrived = {number for receiver, _, number in (*arrived_before, *outcome.arrived) if receiver == sink}
        durable = obligations.promised if power else obligations.accepted
        due = obligations.owed[sink] & durable - obligations.evicted
        if lost := (due | {AFTER}) - arrived:
            return f"{sink} misses {sorted(lost)}"
        if wrong := {number for receiver, _, number in outcome.arrived if receiver == sink} & obligations.not_for[sink]:
            return f"{sink} received events that were finished before it was added: {sorted(wrong)}"
    for (sink, number), ids in batches.items():
        if len(ids) > 1:
            return f"{sink} received {number} in several batches: {sorted(ids)}"
    if power:
        return ""
    for (sink, batch, number), times in Counter(outcome.arrived).items():
        if number in obligations.evicted_for.get(sink, ()):
            return f"{sink} received {number}, which was evicted"
        is_repeated = (sink, batch, number) in arrived_before
        in_flight = f"{OUTBOX_PATH}/{layout.queue_name(sink)}/{batch}{layout.SUFFIX}" in state
        if times > 1 or (is_repeated and not in_flight):
            return f"{sink} received {number} twice"
    return ""


class FanOutMoment(NamedTuple):
    """A point in a trace at which the crash may happen, and the states after it."""

    at: int
    states: Iterable[State]
    obligations: SinkObligations
    power: bool  # whether power is lost; otherwise the process is killed


def moments(trace: list[Op], most: int = STATES_MAX) -> Iterator[FanOutMoment]:
    """All moments, each with at most `most` states. The yielded objects change with the iteration."""
    obligations, model, has_changed = SinkObligations(), DurabilityModel(ignoring=LOCKS), True
    for at, op in enumerate(trace):
        if has_changed and op.verb in ("mark", "sync_data", "sync_failed", "sync_directory"):
            yield FanOutMoment(at, _some(model, at, most), obligations, power=True)
            has_changed = False
        obligations.apply(op, lambda path: model.complete_state().get(path, b""))
        model.apply(op)
        has_changed = True
        if op.verb not in ("sync_data", "sync_failed", "sync_directory"):
            yield FanOutMoment(at + 1, [model.complete_state()], obligations, power=False)
    yield FanOutMoment(len(trace), _some(model, len(trace), most), obligations, power=True)


def _some(model: DurabilityModel, at: int, most: int) -> Iterable[State]:
    if model.unsynced_names <= NAMES_MAX and model.count(ENDS) <= most:
        return model.states(ENDS)
    chance = random.Random(at)
    return [model.random_state(chance) for _ in range(most)]


class FanOutEnumeration:
    """Checks histories, and collects the violations."""

    def __init__(self) -> None:
        self.checked = 0
        self.known: dict[int, FanOutRecoveryOutcome] = {}
        self.violations: list[str] = []

    def check_history(self, history: str, *, few: bool = False) -> None:
        """Check every state at every moment of a history, or a `few` states, up to the first violation."""
        world = FanOutWorld()
        world.run(history)
        self.check_trace(history, world.disk.trace, few=few)

    def check_trace(self, history: str, trace: list[Op], *, few: bool = False, faults: bool = False) -> None:
        """Check a trace. With `faults`, a ledger may lack an entry that the disk did not write."""
        for moment in moments(trace, FEW_STATES_MAX if few else STATES_MAX):
            if not moment.obligations.sinks:
                continue  # before the first mark
            for state in moment.states:
                self.checked += 1
                problem = self.problem_of(state, moment)
                if problem and not (faults and "balance" in problem):
                    self.violations.append(f"{problem}\n  {history!r}, operation {moment.at}, power {moment.power}: {state}")
                    return

    def problem_of(self, state: State, moment: FanOutMoment) -> str:
        """The problem of a state; empty if there is none."""
        obligations = moment.obligations
        key = hash((frozenset(state.items()), obligations.sinks, frozenset(obligations.removed)))
        if key not in self.known:
            self.known[key] = recover(state, obligations.sinks, obligations.removed)
        return problem_of(state, self.known[key], obligations, power=moment.power)
