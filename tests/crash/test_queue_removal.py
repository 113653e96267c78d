"""`pillarbox sinks add` and `remove` of the last sink: every state after a kill, two kills or a power loss is recovered.

The recovering process has a single sink. It refuses files with a second hard link, as in a directory where others may write.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest

from pillarbox.delivery.context import NamedSink
from pillarbox.delivery.worker import Worker
from pillarbox.store import layout, reconciliation
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.queue_changes import create_requested_queue, remove_queue, request_queue
from pillarbox.store.reconciliation import reconcile
from pillarbox.testing import ManualClock
from pillarbox.testing.crash import Disk, Killed, State
from pillarbox.testing.durability_model import DurabilityModel
from tests.crash.compiled_order import crash_filesystem
from tests.crash.fanout import LOCKS, ROUNDS, FanOutDestination, FanOutProcess, _imbalance, links_of
from tests.crash.interleave import DELIVERY_CONFIG, OUTBOX_PATH, run_until_drained
from tests.crash.simulation import kind_at

EVENTS = 3
SINK = "a"
OPERATIONS_MAX = 80  # of a command
KILLED_TWICE_MIN = 40
SECOND_KILLS = 7  # every seventh operation of the second attempt is killed too


class RemovalWorld:
    """A disk with events in the queue of the only sink, and commands on it that may be killed."""

    def __init__(self, state: State | None = None) -> None:
        self.disk = Disk(state, links_of(state) if state else None)
        self.clock = ManualClock()
        self.clock.advance(60.0 if state else 0.0)
        new_id = map(("r{:03d}" if state else "{:04d}").format, itertools.count(1)).__next__
        self.fuse: int | None = None
        self.filesystem = crash_filesystem(self.disk, self._before)
        self.process = FanOutProcess(self.disk, self.filesystem, self.clock, new_id)
        self.process.start()

    def _before(self, _verb: str, _path: str) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise Killed

    def fill(self) -> None:
        """Store events, fan out the first ones, and store another that is not fanned out."""
        for number in range(EVENTS):
            self.process.append(number)
            if number < EVENTS - 1:
                self.process.fan_out_once([SINK])

    def run(self, command: str, fuse: int | None = None) -> bool:
        """Run a command; with a `fuse`, kill it before that operation. Returns whether it was killed."""
        self.fuse = fuse
        try:
            self._run(command)
        except Killed:
            self.filesystem.kill()
            return True
        finally:
            self.fuse = None
        return False

    def _run(self, command: str) -> None:
        directory = self.process.directory
        if command == "add":
            request_queue(directory, "later")
            create_requested_queue(directory, "later")
            return
        for queue in directory.queues():
            remove_queue(queue, LedgerWriter(directory, self.clock), self.clock, return_batches=command == "return")

    def deliver_single(self) -> set[int]:
        """Deliver with a single sink. Returns the numbers of the events that arrive."""
        directory = self.process.directory
        sink = NamedSink(FanOutDestination(self.disk, "single"), "single")
        worker = Worker(directory, sink, self.clock, DELIVERY_CONFIG, ledger=LedgerWriter(directory, self.clock))
        run_until_drained(worker)
        return self.arrived()

    def arrived(self) -> set[int]:
        """The numbers of the events that have arrived anywhere."""
        notes = [op.note for op in self.disk.trace if op.verb == "mark" and isinstance(op.note, tuple)]
        return {number for name, value in notes if name == "arrived" for _, _, number in value}


def problem_after(state: State, command: str) -> str:
    """Complete the command if the state still has queues, deliver with a single sink, and check the result."""
    world = RemovalWorld(dict(state))
    for _ in range(2):  # a request is cancelled, or its queue is removed with its batches
        world.run("return" if command == "return" else "discard")
    before = reconcile(world.process.directory).reconciliation.total
    if command == "return" and (before.pending, before.shared) != (EVENTS, 0):
        return f"not counted as pending again: {before}"
    arrived = world.deliver_single()
    if command == "return" and (missing := set(range(EVENTS)) - arrived):
        return f"not delivered: {sorted(missing)}"
    left = [
        path
        for path in world.disk.files
        if kind_at(path) is Kind.SEALED or layout.is_removing_name(path[len(OUTBOX_PATH) + 1 : -1])
    ]
    if left:
        return f"left behind: {left}"
    report = reconcile(world.process.directory)
    return "" if report.balances else f"does not balance: {report.reconciliation.discrepancies}"


def problem_after_resuming(state: State) -> str:
    """If the queue still exists, deliver to it as before instead of completing its removal, and check the result."""
    world = RemovalWorld(dict(state))
    if not world.process.directory.queues():
        return ""
    for _ in range(ROUNDS):
        world.process.fan_out_once([SINK])
        world.process.deliver([SINK])
    missing = set(range(EVENTS)) - world.arrived()
    return f"not delivered: {sorted(missing)}" if missing else _imbalance(world.process.directory)


def states_of(command: str) -> Iterator[State]:
    """Every state after a kill or a power loss during the command."""
    world = RemovalWorld()
    world.fill()
    begin = len(world.disk.trace)
    world.run(command)
    model = DurabilityModel(ignoring=LOCKS)
    for at, op in enumerate(world.disk.trace):
        if at >= begin and op.verb in ("sync_data", "sync_directory"):
            yield from model.states()
        model.apply(op)
        if at >= begin:
            yield model.complete_state()
    yield from model.states()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Disable the log, and the second reconciliation of a directory that does not balance."""
    monkeypatch.setattr(reconciliation, "_ATTEMPTS", 1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("command", ["return", "discard", "add"])
def test_every_state_after_a_command_on_queues_was_cut_short_is_recovered(command: str) -> None:
    """A single sink delivers the returned batches, no directory of a removed queue is left, and the ledger balances."""
    states = {frozenset(state.items()): state for state in states_of(command)}
    assert len(states) > 10
    for state in states.values():
        assert not problem_after(state, command), (command, sorted(state))
        assert command == "discard" or not problem_after_resuming(state), (command, sorted(state))


@pytest.mark.parametrize("command", ["return", "discard"])
def test_the_command_may_be_killed_twice(command: str) -> None:
    """The second kill comes while recovery completes the command."""
    killed_twice = 0
    for first in range(OPERATIONS_MAX):
        world = RemovalWorld()
        world.fill()
        if not world.run(command, first):
            break
        for second in range(first % SECOND_KILLS, OPERATIONS_MAX, SECOND_KILLS):
            again = RemovalWorld(world.disk.files)
            if not again.run(command, second):
                break
            killed_twice += 1
            assert not problem_after(again.disk.files, command), (command, first, second)
    assert killed_twice > KILLED_TWICE_MIN


def test_no_state_brings_names_back_into_a_queue_that_is_removed() -> None:
    """Once the queue has its new name, the removal of its batches is durable."""
    for state in states_of("return"):
        back = [path for path in state if kind_at(path) is Kind.SEALED and f"/{layout.removing_name(SINK)}/" in path]
        assert not back, sorted(state)
