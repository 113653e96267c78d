"""The ledger after a crash at any moment: an entry that was durable is in it once, also while it is compacted."""

from __future__ import annotations

import itertools

import pytest

from pillarbox.store import layout, ledger, reconciliation
from pillarbox.store.directory import Directory
from pillarbox.store.ledger import LedgerWriter
from pillarbox.store.ledger_entries import SealedEntry, SettledEntry, parse_ledger
from pillarbox.store.reconciliation import FileCounts
from pillarbox.testing import ManualClock
from pillarbox.testing.crash import Disk, Op, State
from pillarbox.testing.durability_model import DurabilityModel
from tests.crash.compiled_order import crash_filesystem
from tests.crash.enumeration import ENDS

OUTBOX_PATH = "/outbox"
LEDGER = f"{OUTBOX_PATH}/{layout.LEDGER}"
EVENTS = 10  # of a batch
BATCHES = 7
STATES_MIN = 500


def batch(number: int) -> str:
    """The id of the n-th batch."""
    return layout.batch_id(layout.sealed_name(number, "x"))


def history(monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """Batches are sealed and settled, one after the other; the ledger is compacted meanwhile."""
    monkeypatch.setattr(ledger, "COMPACT_BYTES", 1000)
    monkeypatch.setattr(reconciliation, "RECENT_BATCHES_MAX", 1)
    disk, clock = Disk(), ManualClock()
    new_id = map("{:04d}".format, itertools.count(1)).__next__
    outbox_dir = Directory(OUTBOX_PATH, crash_filesystem(disk), clock, new_id)
    outbox_dir.ensure_usable()
    pen = LedgerWriter(outbox_dir, clock)
    for number in range(BATCHES):
        pen.add(SealedEntry(number, batch(number), "w", EVENTS, 100))
        assert pen.write(sync=False)
        pen.add(SettledEntry(number, batch(number), "sink", EVENTS, 0, 0, 0))
        assert pen.write(sync=True)
        disk.mark(("settled", number))
    return list(disk.trace)


def problem_of(state: State, settled: int) -> str:
    """What is wrong with the account after a crash, when `settled` batches were settled; the files of the others are there."""
    entries, _ = parse_ledger(state.get(LEDGER, b""))
    account = reconciliation.reconcile_entries(
        entries, {batch(number): FileCounts(EVENTS, 0) for number in range(settled, BATCHES)}, []
    )
    total = account.total
    if not account.balances or total.resent or total.accepted != BATCHES * EVENTS:
        return f"{settled} settled: {account}"
    if not settled * EVENTS <= total.delivered <= (settled + 1) * EVENTS:
        return f"{settled} settled, and the ledger has {total.delivered} events as delivered"
    return ""


def check_states(trace: list[Op]) -> tuple[int, str]:
    """How many states were checked, and what is wrong with one of them."""
    survivors, settled, states = DurabilityModel(ignoring={layout.LEDGER_LOCK}), 0, 0
    for op in trace:
        survivors.apply(op)
        settled += op.verb == "mark"
        for state in [survivors.complete_state(), *survivors.states(ENDS)]:
            states += 1
            if problem := problem_of(state, settled):
                return states, f"after {op.verb} {op.path}: {problem}"
    return states, ""


@pytest.mark.usefixtures("each_order")
def test_what_was_synced_is_counted_once_whatever_a_crash_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment of appending and of compaction, by a kill or a loss of power."""
    trace = history(monkeypatch)
    assert any(op.verb == "rename" and op.target == LEDGER for op in trace)
    states, problem = check_states(trace)
    assert not problem
    assert states > STATES_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("verb", ["sync_data", "sync_directory"])
def test_without_its_syncs_that_is_not_so(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """The states show the difference."""
    trace = [op for op in history(monkeypatch) if op.verb != verb]
    assert check_states(trace)[1]
