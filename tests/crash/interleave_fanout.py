"""Scenarios of `interleave.py` with several sinks: one process fans out, others deliver their queues, evict, or add a sink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pillarbox.delivery.fanout import FanOut
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.testing import RecordingSink
from tests.crash.interleave import InterleavedProcess, InterleavingWorld, Program, deliver_once

SINKS = ("a", "b")
ROUNDS = 3  # of the last process, after which nothing may wait


class FanOutWithoutLedgers(FanOut):
    """The real one but for the ledgers, whose many operations say nothing here."""

    def _write_ledgers(self, *_: object) -> None:
        pass

    def _add_adopted_entries(self, *_: object) -> None:
        pass


class QueueDestination(RecordingSink):
    """Takes everything, and remembers for the whole world."""

    def __init__(self, process: InterleavedProcess, sink: str) -> None:
        super().__init__()
        self._process = process
        self._sink = sink

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self._process.point("deliver", f"{self._sink} {batch.id}")
        self._process.world.delivered += [(bytes(payload), f"{self._sink} {batch.id}") for payload in batch.payloads]
        return Delivered(len(batch))


def hand_over(process: InterleavedProcess, sinks: Sequence[str] = SINKS) -> None:
    """A round of handing over."""
    FanOutWithoutLedgers(
        process.directory, sinks, process.clock, LedgerWriter(process.directory, process.clock)
    ).distribute_all()


def deliver(process: InterleavedProcess, sink: str) -> None:
    """A round of the real deliverer of one queue, if it is there."""
    for queue in process.directory.queues():
        if queue.sink == sink:
            deliver_once(queue, QueueDestination(process, sink), process.clock)


def violations(world: InterleavingWorld, *, killed: bool) -> list[str]:
    """What must not be, once a new process has handed over and delivered everything."""
    last, sinks = world.another(), (*SINKS, *world.more_sinks)
    for _ in range(ROUNDS):
        last.adopt()
        hand_over(last, sinks)
        for sink in sinks:
            deliver(last, sink)
    left = _left(last.directory)
    last.die()
    found = [f"left behind: {left}"] if left else []
    for sink in sinks:
        mine = [(payload, batch) for payload, batch in world.delivered if batch.startswith(f"{sink} ")]
        counts = Counter(payload for payload, _ in mine)
        lost = world.accepted - counts.keys() - world.excused
        if lost and sink in SINKS:
            found.append(f"{sink} misses {sorted(lost)}")
        if not killed and (twice := [payload for payload, count in counts.items() if count > 1]):
            found.append(f"{sink} is given {twice} twice")
        if len({payload for payload, _ in mine}) != len(set(mine)):
            found.append(f"{sink} is given events in several batches")
    return found


def _left(directory: Directory) -> list[str]:
    queue_dirs = [directory, *directory.queues()]
    kinds = (Kind.SEALED, Kind.ACTIVE, Kind.TEMPORARY)
    files = [
        queue_dir.path_of(name)
        for queue_dir in queue_dirs
        for name, _ in directory.filesystem.list_files(queue_dir.path)
        if layout.kind_of(name) in kinds
    ]
    return files + sorted(directory.requested_queues())


def _prepare(world: InterleavingWorld, *, queues: bool) -> None:
    world.judge = violations
    if queues:
        hand_over(world.another())


def one_hands_over_while_each_sink_is_delivered(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    world.put(layout.sealed_name(1, "x"), 1)
    world.put(layout.sealed_name(2, "x"), 1)
    return [hand_over, lambda two: deliver(two, "a"), lambda three: deliver(three, "b")]


def the_first_queues_are_made_while_one_is_delivered(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=False)
    world.put(layout.sealed_name(1, "x"), 1)
    return [hand_over, lambda two: deliver(two, "a"), InterleavedProcess.adopt]


def a_sink_is_added_while_others_are_delivered(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    world.put(layout.sealed_name(1, "x"), 1)
    hand_over(world.another())
    world.put(layout.sealed_name(2, "x"), 1)
    world.another().directory.request_queue("c")
    world.more_sinks = ("c",)
    return [lambda one: hand_over(one, (*SINKS, "c")), lambda two: deliver(two, "a"), lambda three: deliver(three, "b")]


def one_evicts_while_another_hands_over(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    for stamp in (1, 2, 3):
        world.excused |= world.put(layout.sealed_name(stamp, "x"), 1)
    return [lambda one: one.write(1, evict_above=110), hand_over]


def one_evicts_while_another_delivers_a_queue(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    for stamp in (1, 2, 3):
        world.excused |= world.put(layout.sealed_name(stamp, "x"), 1)
    hand_over(world.another())
    return [lambda one: one.write(1, evict_above=110), lambda two: deliver(two, "a")]


SCENARIOS = (
    one_hands_over_while_each_sink_is_delivered,
    the_first_queues_are_made_while_one_is_delivered,
    a_sink_is_added_while_others_are_delivered,
    one_evicts_while_another_hands_over,
    one_evicts_while_another_delivers_a_queue,
)
