"""Scenarios of `interleave.py` with several sinks: one process fans out while others deliver queues, evict, or add a sink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pillarbox.delivery.fanout import FanOut
from pillarbox.sinks.base import Batch, Delivered, DeliveryResult
from pillarbox.store import layout
from pillarbox.store.directory import Directory
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.queue_changes import request_queue
from pillarbox.testing import RecordingSink
from tests.crash.interleave import InterleavedProcess, InterleavingWorld, Program, deliver_once

SINKS = ("a", "b")
ROUNDS = 3  # of fan-out and delivery by the last process, after which nothing may be pending


class FanOutWithoutLedgers(FanOut):
    """Fans out without writing ledgers, whose many operations do not matter here."""

    def _write_ledgers(self, *_: object) -> None:
        pass

    def _add_adopted_entries(self, *_: object) -> None:
        pass


class QueueDestination(RecordingSink):
    """Accepts everything, and records it for all processes."""

    def __init__(self, process: InterleavedProcess, sink: str) -> None:
        super().__init__()
        self._process = process
        self._sink = sink

    async def deliver(self, batch: Batch) -> DeliveryResult:
        self._process.point("deliver", f"{self._sink} {batch.id}")
        self._process.world.delivered += [(bytes(payload), f"{self._sink} {batch.id}") for payload in batch.payloads]
        return Delivered(len(batch))


def fan_out_once(process: InterleavedProcess, sinks: Sequence[str] = SINKS) -> None:
    """Fan out all batches of the outbox."""
    FanOutWithoutLedgers(
        process.directory, sinks, process.clock, LedgerWriter(process.directory, process.clock)
    ).distribute_all()


def deliver(process: InterleavedProcess, sink: str) -> None:
    """Run the real delivery worker of one queue, if the queue exists."""
    for queue in process.directory.queues():
        if queue.sink == sink:
            deliver_once(queue, QueueDestination(process, sink), process.clock)


def violations(world: InterleavingWorld, *, killed: bool) -> list[str]:
    """Fan out and deliver everything in a new process. Returns what is wrong afterwards."""
    last, sinks = world.new_process(), (*SINKS, *world.added_sinks)
    for _ in range(ROUNDS):
        last.recover_directory()
        fan_out_once(last, sinks)
        for sink in sinks:
            deliver(last, sink)
    remaining = _remaining_files(last.directory)
    last.die()
    problems = [f"left behind: {remaining}"] if remaining else []
    for sink in sinks:
        deliveries = [(payload, batch) for payload, batch in world.delivered if batch.startswith(f"{sink} ")]
        counts = Counter(payload for payload, _ in deliveries)
        lost = world.accepted - counts.keys() - world.deletable
        if lost and sink in SINKS:
            problems.append(f"{sink} misses {sorted(lost)}")
        if not killed and (twice := [payload for payload, count in counts.items() if count > 1]):
            problems.append(f"{sink} received {twice} twice")
        if len({payload for payload, _ in deliveries}) != len(set(deliveries)):
            problems.append(f"{sink} received events in several batches")
    return problems


def _remaining_files(directory: Directory) -> list[str]:
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
    world.find_violations = violations
    if queues:
        fan_out_once(world.new_process())


def one_fans_out_while_both_queues_are_delivered(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    world.put_file(layout.sealed_name(1, "x"), 1)
    world.put_file(layout.sealed_name(2, "x"), 1)
    return [fan_out_once, lambda process: deliver(process, "a"), lambda process: deliver(process, "b")]


def the_first_queues_are_created_while_one_is_delivered(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=False)
    world.put_file(layout.sealed_name(1, "x"), 1)
    return [fan_out_once, lambda process: deliver(process, "a"), InterleavedProcess.recover_directory]


def a_sink_is_added_while_others_are_delivered(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    world.put_file(layout.sealed_name(1, "x"), 1)
    fan_out_once(world.new_process())
    world.put_file(layout.sealed_name(2, "x"), 1)
    request_queue(world.new_process().directory, "c")
    world.added_sinks = ("c",)
    return [
        lambda process: fan_out_once(process, (*SINKS, "c")),
        lambda process: deliver(process, "a"),
        lambda process: deliver(process, "b"),
    ]


def one_evicts_while_another_fans_out(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    for sealed_at in (1, 2, 3):
        world.deletable |= world.put_file(layout.sealed_name(sealed_at, "x"), 1)
    return [lambda process: process.write(1, evict_above=110), fan_out_once]


def one_evicts_while_another_delivers_a_queue(world: InterleavingWorld) -> list[Program]:
    _prepare(world, queues=True)
    for sealed_at in (1, 2, 3):
        world.deletable |= world.put_file(layout.sealed_name(sealed_at, "x"), 1)
    fan_out_once(world.new_process())
    return [lambda process: process.write(1, evict_above=110), lambda process: deliver(process, "a")]


SCENARIOS = (
    one_fans_out_while_both_queues_are_delivered,
    the_first_queues_are_created_while_one_is_delivered,
    a_sink_is_added_while_others_are_delivered,
    one_evicts_while_another_fans_out,
    one_evicts_while_another_delivers_a_queue,
)
