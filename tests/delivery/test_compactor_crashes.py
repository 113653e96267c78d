"""Compression of pending batches with kills, power losses and errors at every operation, and with concurrent processes."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from pillarbox.delivery import compactor
from pillarbox.delivery.compactor import Compactor
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.layout import Kind
from pillarbox.store.quota import QuotaEnforcer
from pillarbox.store.recovery import recover
from pillarbox.store.writer import Writer, WriterLimits
from pillarbox.testing import ManualClock, RecordingSink
from pillarbox.testing.crash import CrashFilesystem, Disk, Killed, State
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import VERBS, Fault, FaultCounter, FaultFilesystem
from tests.crash.interleave import LOCKS, OUTBOX_PATH, deliver_once

FILES: Final = 2
EVENTS: Final = 12  # in each file
USED: Final = {
    "list_files",
    "create",
    "open_existing",
    "lock",
    "read_all",
    "write_all",
    "sync_data",
    "sync_directory",
    "rename",
    "unlink",
}
OPERATIONS_MIN: Final = 20  # number of operations of a complete compression; with fewer, the tests would prove little

Before = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def _set_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All files are eligible for compression. Errors are not logged, because there are thousands."""
    monkeypatch.setattr(compactor, "PLAIN_FILES_AT_HEAD", 0)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def payloads_of(number: int) -> list[bytes]:
    return [b'{"n":%d,"file":%d}' % (event, number) for event in range(EVENTS)]


BATCHES: Final = {
    layout.batch_id(layout.sealed_name(number + 1, "u")): [bytes(one) for one in payloads_of(number)] for number in range(FILES)
}
INITIAL_FILES: Final = {
    f"{OUTBOX_PATH}/{batch}.ndjson": b"".join(record.line(payload) for payload in payloads)
    for batch, payloads in BATCHES.items()
}


class Process:
    """A process that works on the disk."""

    def __init__(self, disk: Disk, before: Before = lambda _verb, _path: None, faults: FaultCounter | None = None) -> None:
        self.filesystem = CrashFilesystem(disk, before)
        self.clock = ManualClock()
        self.directory = Directory(
            OUTBOX_PATH, self.filesystem if faults is None else FaultFilesystem(self.filesystem, faults), self.clock
        )
        self.saved = 0

    def compress(self) -> None:
        """Compress all files, as far as the faults allow."""
        compressor = Compactor(self.directory, self.clock, 60.0, lambda _name: False, self._on_bytes_saved)
        recover(self.directory)
        while compressor.compress_next()[0]:
            self.clock.advance(60.0)

    def _on_bytes_saved(self, saved: int) -> None:
        self.saved += saved

    def deliver(self, sink: RecordingSink) -> None:
        deliver_once(self.directory, sink, self.clock)

    def evict(self) -> int:
        """Evict all files that are not in use; returns the number of events."""
        writer = Writer(self.directory, WriterLimits(1, 1, 1, 10**6), lambda: None)
        usage = self.directory.disk_usage()
        writer.start(usage.pending_bytes, usage.pending_files)
        capacity = QuotaEnforcer(self.directory, writer, self.clock, 0, evicts=True)
        capacity.enforce()
        return capacity.evicted_events


def kinds(state: State) -> list[Kind]:
    return [layout.kind_of(path.rpartition("/")[2]) for path in state]


def check_all_delivered(disk: Disk) -> None:
    """The next process delivers each batch once, in order and unchanged, and leaves no file."""
    sink = RecordingSink()
    Process(disk).deliver(sink)
    assert sink.calls == list(BATCHES)
    assert sink.batches == BATCHES
    assert not {Kind.SEALED, Kind.TEMPORARY, Kind.CORRUPT} & set(kinds(disk.files))


class KillBefore:
    """Kills a process before its n-th operation."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, _verb: str, _path: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def test_without_faults_all_is_compressed_and_delivered() -> None:
    """The other tests depend on this."""
    disk = Disk(INITIAL_FILES)
    process = Process(disk)
    process.compress()
    assert sorted(disk.files) == [f"{OUTBOX_PATH}/{batch}.ndjson.zst" for batch in BATCHES]
    assert process.saved == sum(map(len, INITIAL_FILES.values())) - sum(map(len, disk.files.values()))
    check_all_delivered(disk)


def test_a_kill_at_any_operation_loses_and_duplicates_nothing() -> None:
    """A batch may have both names, only one, or a temporary file. It is delivered once."""
    seen = set()
    for operations in itertools.count():
        disk = Disk(INITIAL_FILES)
        process = Process(disk, KillBefore(operations))
        try:
            process.compress()
        except Killed:
            process.filesystem.kill()
            names = {path.rpartition("/")[2] for path in disk.files}
            seen.add((len(names), any(layout.plain_name(name) in names for name in names)))
            check_all_delivered(disk)
        else:
            break
    assert operations > OPERATIONS_MIN
    assert seen == {(FILES, False), (FILES + 1, False), (FILES + 1, True)}


def test_a_power_loss_at_any_operation_loses_and_duplicates_nothing() -> None:
    """For every possible state of the disk."""
    disk = Disk(INITIAL_FILES)
    Process(disk).compress()
    states = set()
    for end in range(FILES, len(disk.trace) + 1):
        for state in DurabilityModel(disk.trace[:end], ignoring=LOCKS).states():
            key = tuple(sorted(state.items()))
            if key not in states:
                states.add(key)
                check_all_delivered(Disk(state))
    assert len(states) > OPERATIONS_MIN


def test_a_power_loss_during_the_delivery_of_compressed_batches() -> None:
    """A batch that reappears was already delivered, with the same id and content."""
    disk = Disk(INITIAL_FILES)
    process, sink = Process(disk), RecordingSink()
    process.compress()
    process.deliver(sink)
    for end in range(FILES, len(disk.trace) + 1):
        for state in DurabilityModel(disk.trace[:end], ignoring=LOCKS).states():
            again = RecordingSink()
            Process(Disk(state)).deliver(again)
            assert again.batches == {batch: BATCHES[batch] for batch in again.calls}
            assert again.calls == sorted(set(again.calls))
            assert sink.batches | again.batches == BATCHES


def test_a_settled_batch_does_not_come_back_under_its_other_name() -> None:
    """A process dies while both names exist. The worker deletes both, also if there is a power loss afterwards."""
    disk = Disk({**INITIAL_FILES, f"{OUTBOX_PATH}/{next(iter(BATCHES))}.ndjson.zst": b""})
    Process(disk).deliver(RecordingSink())
    disk.mark("done")
    for state in DurabilityModel(disk.trace, ignoring=LOCKS).states():
        assert Kind.SEALED not in kinds(state)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("open_append", "make_directory")])
def test_each_operation_may_fail(verb: str) -> None:
    """With each error, once or permanently: the compactor does not raise, and nothing is lost."""
    for nth in itertools.count(1):
        faults = [Fault(verb, nth, code, permanent=for_good) for code in VERBS[verb] for for_good in (False, True)]
        hits = 0
        for fault in faults:
            disk, meter = Disk(INITIAL_FILES), FaultCounter(fault)
            process = Process(disk, faults=meter)
            compressor = Compactor(process.directory, process.clock, 60.0, lambda _name: False, lambda _size: None)
            for _ in range(FILES * 2):
                compressor.compress_next()
                process.clock.advance(60.0)
            hits += meter.failures
            process.filesystem.close_inherited()
            check_all_delivered(disk)
        if not hits:
            break
    assert nth > 1 or verb not in USED


def run_task(process: Process, task: str, sink: RecordingSink) -> int:
    """Do all of one kind of work; returns the number of evicted events."""
    match task:
        case "compress":
            process.compress()
        case "recover":
            recover(process.directory)
        case "deliver":
            process.deliver(sink)
        case "evict":
            return process.evict()
    return 0


@pytest.mark.parametrize("first", ["compress", "recover", "deliver", "evict"])
@pytest.mark.parametrize("second", ["compress", "recover", "deliver", "evict"])
@pytest.mark.parametrize("begun", [False, True], ids=["", "with a copy that a process has left"])
def test_another_process_may_run_between_any_two_operations(first: str, second: str, *, begun: bool) -> None:
    """It does all of its work there. Each event is delivered once or evicted."""
    oldest = f"{OUTBOX_PATH}/{next(iter(BATCHES))}.ndjson"
    found = INITIAL_FILES
    if begun:
        disk = Disk(INITIAL_FILES)
        Process(disk).compress()
        found = disk.files | {oldest: INITIAL_FILES[oldest]}
    for operations in itertools.count():
        disk, sink = Disk(found), RecordingSink()
        left, evicted = operations, list[int]()

        def before(_verb: str, _path: str, disk: Disk = disk, sink: RecordingSink = sink, evicted: list[int] = evicted) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                loop = asyncio._get_running_loop()
                asyncio._set_running_loop(None)
                evicted.append(run_task(Process(disk), second, sink))
                asyncio._set_running_loop(loop)

        process = Process(disk, before)
        evicted.append(run_task(process, first, sink))
        process.filesystem.close_inherited()
        Process(disk).deliver(sink)
        assert len(sink.calls) == len(set(sink.calls)), operations
        assert len(sink.payloads) + sum(evicted) == FILES * EVENTS, operations
        assert sink.batches == {batch: BATCHES[batch] for batch in sink.calls}
        assert not {Kind.SEALED, Kind.TEMPORARY} & set(kinds(disk.files)), operations
        if left >= 0:
            break
