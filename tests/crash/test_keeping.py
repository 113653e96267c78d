"""Retention, pruning and redelivery, with a crash or a fault at any operation.

Each batch exists once, and the ledger balances.
"""

from __future__ import annotations

import itertools

import pytest

from pillarbox.admin.changes import ChangeReport
from pillarbox.admin.filters import RecordFilter
from pillarbox.admin.redelivery import PendingLimits, Redelivery
from pillarbox.store import layout, record
from pillarbox.store.directory import Directory
from pillarbox.store.filesystem import Filesystem
from pillarbox.store.layout import Kind
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import SealedEntry, SettledEntry
from pillarbox.store.reconciliation import reconcile
from pillarbox.store.retention import Retention
from pillarbox.testing import ManualClock
from pillarbox.testing.crash import CrashFilesystem, Disk, State
from pillarbox.testing.durability_model import DurabilityModel
from pillarbox.testing.fault import VERBS, Fault, FaultCounter
from tests.crash.compiled_order import Order, crash_filesystem, fault_filesystem
from tests.crash.enumeration import ENDS

OUTBOX_PATH = "/outbox"
LOCKS = frozenset({layout.LEDGER_LOCK})
BATCHES = 4  # the first is too old at the end, and is pruned
STATES_MIN = 200
FAILING = ("rename", "unlink", "sync_directory", "sync_data", "write_all", "open_append", "open_existing", "write")
# Operations that an order does not call: the compiled append to the ledger opens and writes in another way.
NOT_CALLED = {"portable": {"write"}, "compiled": {"write_all", "open_append"}}


def content(number: int) -> bytes:
    """The content of the n-th batch."""
    return b"".join(record.line(b'{"n":%d}' % (2 * number + event)) for event in range(2))


def disk_with_batches() -> Disk:
    """A disk with durable pending batches, which have entries in the ledger."""
    disk = Disk({f"{OUTBOX_PATH}/{layout.sealed_name(number + 1, 'u')}": content(number) for number in range(BATCHES)})
    outbox_dir = Directory(OUTBOX_PATH, CrashFilesystem(disk), ManualClock())
    ledger_writer = LedgerWriter(outbox_dir, ManualClock())
    ledger_writer.add(*(SealedEntry(0, layout.batch_id(name), "w", 2, 100) for name in outbox_dir.batch_names()))
    assert ledger_writer.write(sync=True)
    return Disk(disk.files)


def retain_and_redeliver(filesystem: Filesystem) -> None:
    """Do with each file what settlement does, and then what `pillarbox redeliver` does."""
    clock = ManualClock()
    new_id = map("{:04d}".format, itertools.count(1)).__next__
    outbox_dir = Directory(OUTBOX_PATH, filesystem, clock, new_id)
    ledger_writer, retention = LedgerWriter(outbox_dir, clock), Retention(outbox_dir, clock, 10.0, 10**6)
    for name in outbox_dir.batch_names():
        locked_file = outbox_dir.lock_existing(name)
        assert locked_file is not None
        ledger_writer.add(SettledEntry(clock.micros(), layout.batch_id(name), "sink", 2, 0, 0, 0))
        ledger_writer.write(sync=True)
        if not retention.retain(locked_file):
            outbox_dir.remove(name)
        filesystem.close(locked_file.fd)
        clock.advance(3.0)
    filesystem.sync_directory(OUTBOX_PATH)
    retention.prune()
    redelivery = Redelivery(outbox_dir, {"": outbox_dir}, clock, RecordFilter(), ChangeReport(), lambda *_: None)
    redelivery.execute(PendingLimits(10**6, 1000), lambda: False, lambda _: None)


def problem_of(state: State) -> str:
    """The problem of a state, or an empty string. The first batch may be pruned."""
    contents = [
        data for path, data in state.items() if layout.kind_of(path.rpartition("/")[2]) in (Kind.SEALED, Kind.DELIVERED)
    ]
    for number in range(BATCHES):
        copies = contents.count(content(number))
        if copies > 1 or (number and not copies):
            return f"batch {number} exists {copies} times: {sorted(state)}"
    account = reconcile(Directory(OUTBOX_PATH, CrashFilesystem(Disk(state)), ManualClock()))
    return "" if account.balances else f"the ledger does not balance: {account} in {sorted(state)}"


@pytest.mark.usefixtures("each_order")
def test_after_a_kill_or_power_loss_at_any_operation_each_batch_exists_once() -> None:
    """It is either retained or pending, in every state after retention, pruning and redelivery."""
    disk = disk_with_batches()
    retain_and_redeliver(crash_filesystem(disk))
    assert sum(op.verb == "unlink" for op in disk.trace) == 1
    model, states = DurabilityModel(ignoring=LOCKS), 0
    for op in disk.trace:
        model.apply(op)
        for state in [model.complete_state(), *model.states(ENDS)] if op.verb != "found" else ():
            states += 1
            assert not problem_of(state), op
    assert states > STATES_MIN


@pytest.mark.parametrize("verb", FAILING)
def test_after_any_fault_each_remaining_batch_exists_once(verb: str, each_order: Order) -> None:
    """If a rename fails, the delivered file is removed. No batch has two files."""
    faults_met = 0
    for nth, code in itertools.product(range(1, 40), VERBS.get(verb, ())):
        disk, counter = disk_with_batches(), FaultCounter(Fault(verb, nth, code))
        try:
            retain_and_redeliver(fault_filesystem(crash_filesystem(disk), counter))
        except OSError:
            assert verb in ("sync_directory", "open_existing"), verb  # raised to the caller, who tries again
        if not counter.failures:
            break
        faults_met += 1
        contents = [data for path, data in disk.files.items() if b'"n"' in data and "/ledger" not in path]
        assert len(contents) == len(set(contents))
        assert contents.count(content(2)) == 1 or verb == "rename"
    assert bool(faults_met) == (verb not in NOT_CALLED[each_order])
