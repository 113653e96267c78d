"""Retention, pruning and redelivery, cut short or failing at any moment: each batch is retained or waits, once, and it adds up."""

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
BATCHES = 4  # the first is too old at the end, and goes
STATES_MIN = 200
FAILING = ("rename", "unlink", "sync_directory", "sync_data", "write_all", "open_append", "open_existing", "write")
# What an order does not call: the ledger is appended to in one compiled operation, which opens and writes in another way.
NOT_CALLED = {"portable": {"write"}, "compiled": {"write_all", "open_append"}}


def content(number: int) -> bytes:
    """The content of the n-th batch."""
    return b"".join(record.line(b'{"n":%d}' % (2 * number + one)) for one in range(2))


def disk_with_sealed() -> Disk:
    """All batches wait, durably, and the ledger knows of them."""
    disk = Disk({f"{OUTBOX_PATH}/{layout.sealed_name(number + 1, 'u')}": content(number) for number in range(BATCHES)})
    outbox_dir = Directory(OUTBOX_PATH, CrashFilesystem(disk), ManualClock())
    pen = LedgerWriter(outbox_dir, ManualClock())
    pen.add(*(SealedEntry(0, layout.batch_id(name), "w", 2, 100) for name in outbox_dir.batch_names()))
    assert pen.write(sync=True)
    return Disk(disk.files)


def retain_and_redeliver(filesystem: Filesystem) -> None:
    """What the settlement does with each file, and then what `pillarbox redeliver` does."""
    clock = ManualClock()
    new_id = map("{:04d}".format, itertools.count(1)).__next__
    outbox_dir = Directory(OUTBOX_PATH, filesystem, clock, new_id)
    pen, shelf = LedgerWriter(outbox_dir, clock), Retention(outbox_dir, clock, 10.0, 10**6)
    for name in outbox_dir.batch_names():
        taken = outbox_dir.lock_existing(name)
        assert taken is not None
        pen.add(SettledEntry(clock.micros(), layout.batch_id(name), "sink", 2, 0, 0, 0))
        pen.write(sync=True)
        if not shelf.retain(taken):
            outbox_dir.remove(name)
        filesystem.close(taken.fd)
        clock.advance(3.0)
    filesystem.sync_directory(OUTBOX_PATH)
    shelf.prune()
    again = Redelivery(outbox_dir, {"": outbox_dir}, clock, RecordFilter(), ChangeReport(), lambda *_: None)
    again.execute(PendingLimits(10**6, 1000), lambda: False, lambda _: None)


def problem_of(state: State) -> str:
    """What is wrong with a state; the first batch may be gone."""
    found = [data for path, data in state.items() if layout.kind_of(path.rpartition("/")[2]) in (Kind.SEALED, Kind.DELIVERED)]
    for number in range(BATCHES):
        times = found.count(content(number))
        if times > 1 or (number and not times):
            return f"batch {number} is there {times} times: {sorted(state)}"
    account = reconcile(Directory(OUTBOX_PATH, CrashFilesystem(Disk(state)), ManualClock()))
    return "" if account.balances else f"it does not add up: {account} in {sorted(state)}"


@pytest.mark.usefixtures("each_order")
def test_killed_or_without_power_at_any_moment_each_batch_is_kept_or_waits_once() -> None:
    """Every state that is left of retention, pruning and redelivery."""
    disk = disk_with_sealed()
    retain_and_redeliver(crash_filesystem(disk))
    assert sum(op.verb == "unlink" for op in disk.trace) == 1
    survivors, states = DurabilityModel(ignoring=LOCKS), 0
    for op in disk.trace:
        survivors.apply(op)
        for state in [survivors.complete_state(), *survivors.states(ENDS)] if op.verb != "found" else ():
            states += 1
            assert not problem_of(state), op
    assert states > STATES_MIN


@pytest.mark.parametrize("verb", FAILING)
def test_whatever_fails_each_batch_that_is_there_is_there_once(verb: str, each_order: Order) -> None:
    """If a rename fails the file goes, for it is delivered; a file that stays is reported. The account balances."""
    met = 0
    for nth, code in itertools.product(range(1, 40), VERBS.get(verb, ())):
        disk, meter = disk_with_sealed(), FaultCounter(Fault(verb, nth, code))
        try:
            retain_and_redeliver(fault_filesystem(crash_filesystem(disk), meter))
        except OSError:
            assert verb in ("sync_directory", "open_existing"), verb  # raised to the caller, who tries again
        if not meter.failures:
            break
        met += 1
        found = [data for path, data in disk.files.items() if b'"n"' in data and "/ledger" not in path]
        assert len(found) == len(set(found))
        assert found.count(content(2)) == 1 or verb == "rename"
    assert bool(met) == (verb not in NOT_CALLED[each_order])
