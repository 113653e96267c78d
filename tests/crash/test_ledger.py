"""The ledger after a crash at any moment: a durable entry counts once, even during compaction."""

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
    """Seal and settle batches one after another, with compactions of the ledger. Returns the trace."""
    monkeypatch.setattr(ledger, "COMPACT_BYTES", 1000)
    monkeypatch.setattr(reconciliation, "RECENT_BATCHES_MAX", 1)
    disk, clock = Disk(), ManualClock()
    new_id = map("{:04d}".format, itertools.count(1)).__next__
    outbox_dir = Directory(OUTBOX_PATH, crash_filesystem(disk), clock, new_id)
    outbox_dir.ensure_usable()
    ledger_writer = LedgerWriter(outbox_dir, clock)
    for number in range(BATCHES):
        ledger_writer.add(SealedEntry(number, batch(number), "w", EVENTS, 100))
        assert ledger_writer.write(sync=False)
        ledger_writer.add(SettledEntry(number, batch(number), "sink", EVENTS, 0, 0, 0))
        assert ledger_writer.write(sync=True)
        disk.mark(("settled", number))
    return list(disk.trace)


def problem_of(state: State, settled: int) -> str:
    """The problem of the ledger after a crash, or an empty string. The batches after the first `settled` have files."""
    entries, _ = parse_ledger(state.get(LEDGER, b""))
    account = reconciliation.reconcile_entries(
        entries, {batch(number): FileCounts(EVENTS, 0) for number in range(settled, BATCHES)}, []
    )
    total = account.total
    if not account.balances or total.resent or total.accepted != BATCHES * EVENTS:
        return f"{settled} batches were settled: {account}"
    if not settled * EVENTS <= total.delivered <= (settled + 1) * EVENTS:
        return f"{settled} batches were settled, and the ledger has {total.delivered} delivered events"
    return ""


def check_states(trace: list[Op]) -> tuple[int, str]:
    """The number of checked states, and the first problem."""
    model, settled, states = DurabilityModel(ignoring={layout.LEDGER_LOCK}), 0, 0
    for op in trace:
        model.apply(op)
        settled += op.verb == "mark"
        for state in [model.complete_state(), *model.states(ENDS)]:
            states += 1
            if problem := problem_of(state, settled):
                return states, f"after {op.verb} {op.path}: {problem}"
    return states, ""


@pytest.mark.usefixtures("each_order")
def test_a_synced_entry_counts_once_in_every_state_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill or a power loss at every moment of appends and compactions."""
    trace = history(monkeypatch)
    assert any(op.verb == "rename" and op.target == LEDGER for op in trace)
    states, problem = check_states(trace)
    assert not problem
    assert states > STATES_MIN


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("verb", ["sync_data", "sync_directory"])
def test_without_syncs_entries_are_lost(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """So the states cover what the syncs are for."""
    trace = [op for op in history(monkeypatch) if op.verb != verb]
    assert check_states(trace)[1]
