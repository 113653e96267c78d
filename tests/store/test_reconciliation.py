"""Reconciliation of ledger entries with the files counts every event once, or reports a discrepancy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.store import ledger_entries, reconciliation
from pillarbox.store.ledger_entries import (
    AdoptedEntry,
    EvictedEntry,
    FannedOutEntry,
    LedgerEntry,
    PurgedEntry,
    QueueRenamedEntry,
    RepairedEntry,
    ReplayedEntry,
    ReturnedEntry,
    SealedEntry,
    SettledEntry,
)
from pillarbox.store.reconciliation import FileCounts, compact_entries

COUNTS = st.integers(0, 5)
BATCHES = st.sampled_from(["a", "b", "c"])
TIMES = st.integers(0, 9)
ENTRIES: st.SearchStrategy[LedgerEntry] = st.one_of(
    st.builds(SealedEntry, TIMES, BATCHES, st.sampled_from(["v", "w"]), st.none() | COUNTS, COUNTS),
    st.builds(AdoptedEntry, TIMES, BATCHES, st.just("w")),
    st.builds(SettledEntry, TIMES, BATCHES, st.just("sink"), COUNTS, COUNTS, COUNTS, COUNTS),
    st.builds(EvictedEntry, TIMES, BATCHES, COUNTS),
    st.builds(ReplayedEntry, TIMES, BATCHES, COUNTS),
    st.builds(RepairedEntry, TIMES, BATCHES, COUNTS),
    st.builds(PurgedEntry, TIMES, BATCHES, st.sampled_from(["dead", "quarantine"]), COUNTS),
)
FILE_COUNTS = st.dictionaries(BATCHES, st.builds(FileCounts, COUNTS, COUNTS))
ACTIVE = st.lists(st.builds(FileCounts, COUNTS, COUNTS, st.just("w")), max_size=2)


@given(st.lists(ENTRIES, max_size=12), FILE_COUNTS, ACTIVE)
def test_accepted_is_the_sum_of_the_other_counts_and_the_discrepancies(
    entries: list[LedgerEntry], files: dict[str, FileCounts], active: list[FileCounts]
) -> None:
    """At both ends of every range, for the total and for each writer."""
    account = reconciliation.reconcile_entries(entries, files, active)
    low, high = account.total.accounted_range
    missing = sum(discrepancy.events for discrepancy in account.discrepancies)
    assert (account.total.accepted, account.total.accepted_max) == (low + missing, high + missing)
    for field in ledger_entries.NUMBERS:
        assert getattr(account.total, field) == sum(getattr(row, field) for row in account.writers)


@given(
    st.lists(ENTRIES, max_size=12, unique_by=lambda entry: (type(entry), getattr(entry, "batch", ""))),
    st.randoms(),
    FILE_COUNTS,
)
def test_the_order_of_entries_does_not_matter(entries: list[LedgerEntry], random: object, files: dict[str, FileCounts]) -> None:
    """Except where a later entry of the same kind replaces an earlier one."""
    in_order = reconciliation.reconcile_entries(entries, files, [])
    random.shuffle(entries)  # type: ignore[attr-defined]
    shuffled = reconciliation.reconcile_entries(entries, files, [])
    assert (in_order.total, in_order.replayed, in_order.purged_dead) == (
        shuffled.total,
        shuffled.replayed,
        shuffled.purged_dead,
    )
    assert in_order.balances == shuffled.balances


@given(st.lists(ENTRIES, max_size=12), FILE_COUNTS)
def test_an_entry_that_is_written_twice_counts_once(entries: list[LedgerEntry], files: dict[str, FileCounts]) -> None:
    """An entry is repeated directly after an error of the disk."""
    distinct = list(dict.fromkeys(entries))
    twice = [entry for entry in distinct for _ in range(2)]
    assert reconciliation.reconcile_entries(distinct, files, []) == reconciliation.reconcile_entries(twice, files, [])


@given(st.lists(ENTRIES, max_size=12), FILE_COUNTS)
def test_compacted_entries_give_the_same_result(entries: list[LedgerEntry], files: dict[str, FileCounts]) -> None:
    """Batches whose files exist keep their entries."""
    previous, reconciliation.RECENT_BATCHES_MAX = reconciliation.RECENT_BATCHES_MAX, 1  # type: ignore[misc]
    try:
        compacted = compact_entries(entries, files.keys(), 7)
    finally:
        reconciliation.RECENT_BATCHES_MAX = previous  # type: ignore[misc]
    full, short = reconciliation.reconcile_entries(entries, files, []), reconciliation.reconcile_entries(compacted, files, [])
    assert full.total == short.total
    assert (full.replayed, full.repaired, full.purged_dead) == (short.replayed, short.repaired, short.purged_dead)
    assert (full.dead_missing, full.balances) == (short.dead_missing, short.balances)


def test_a_second_settlement_replaces_the_first_and_counts_as_redelivered() -> None:
    """The worker was killed between the first delivery and the deletion."""
    entries: list[LedgerEntry] = [
        SealedEntry(1, "a", "w", 5, 50),
        SettledEntry(2, "a", "s", 5, 0, 0, 0),
        SettledEntry(3, "a", "s", 4, 4, 1, 0),
    ]
    account = reconciliation.reconcile_entries(entries, {}, [], dead_on_disk=1)
    assert (account.balances, account.total.delivered, account.total.dead, account.total.resent) == (True, 4, 1, 4)


def test_a_batch_that_was_delivered_after_its_eviction_entry_counts_as_delivered() -> None:
    """The process was killed between the entry and the deletion."""
    entries: list[LedgerEntry] = [
        SealedEntry(1, "a", "w", 5, 50),
        EvictedEntry(2, "a", 5),
        SettledEntry(3, "a", "s", 5, 0, 0, 0),
    ]
    total = reconciliation.reconcile_entries(entries, {}, []).total
    assert (total.accepted, total.delivered, total.evicted) == (5, 5, 0)


def test_events_missing_without_damage_are_a_discrepancy_of_that_size() -> None:
    """Whether the batch is settled or pending. Extra events are a discrepancy too."""
    sealed = SealedEntry(1, "b", "w", 10, 1000)
    for records, damaged, missing in ((9, 0, 1), (9, 1, None), (11, 0, -1), (11, 1, -1), (10, 0, None), (10, 1, None)):
        settled = SettledEntry(2, "b", "s", records, 0, 0, damaged)
        cases: list[tuple[list[LedgerEntry], dict[str, FileCounts]]] = [
            ([sealed, settled], {}),
            ([sealed], {"b": FileCounts(records, damaged)}),
        ]
        for entries, files in cases:
            account = reconciliation.reconcile_entries(entries, files, [])
            assert [found.events for found in account.discrepancies] == ([] if missing is None else [missing]), (
                records,
                damaged,
            )
            assert account.balances == (missing is None)


def test_fanned_out_counts_follow_a_queue_that_is_renamed_or_removed() -> None:
    """Also if some or all entries were compacted before or after that."""
    before: list[LedgerEntry] = [
        FannedOutEntry(0, str(number), ["a", "b", "c"], 1, 0) for number in range(reconciliation.RECENT_BATCHES_MAX + 10)
    ]
    change: list[LedgerEntry] = [QueueRenamedEntry(1, "a", "d"), QueueRenamedEntry(1, "b", "")]
    after: list[LedgerEntry] = [FannedOutEntry(2, "late", ["a", "b", "d"], 5, 0)]
    every = reconciliation.RECENT_BATCHES_MAX + 10
    for entries in (
        before + change + after,
        compact_entries(before, set(), 1) + change + after,
        compact_entries(before + change, set(), 1) + after,
        compact_entries(compact_entries(before, set(), 1) + change + after, set(), 2),
    ):
        assert reconciliation.reconcile_entries(entries, {}, []).fanned_out == {"a": 5, "b": 5, "c": every, "d": every + 5}


def test_a_batch_that_came_back_empty_does_not_count_over_the_one_that_was_delivered() -> None:
    """A power loss restored its name without its content, so it is settled, fanned out, evicted and counted once more."""
    sealed = SealedEntry(1, "a", "w", 3, 30)
    delivered, empty = SettledEntry(2, "a", "s", 2, 0, 1, 0), SettledEntry(3, "a", "s", 0, 0, 0, 0)
    orders: list[list[LedgerEntry]] = [
        [sealed, delivered, empty],
        [empty, delivered, sealed],
        [sealed, delivered, empty, empty],
    ]
    for entries in orders:
        account = reconciliation.reconcile_entries(entries, {"a": FileCounts(0, 0)}, [], dead_on_disk=1)
        assert account.balances
        assert (account.total.delivered, account.total.dead, account.total.resent) == (2, 1, 0)
    evicted: list[LedgerEntry] = [sealed, EvictedEntry(2, "a", 3), EvictedEntry(3, "a", 0)]
    assert reconciliation.reconcile_entries(evicted, {}, []).balances
    in_queue: list[LedgerEntry] = [
        SealedEntry(1, "a", "handed over", 3, 30),
        SealedEntry(2, "a", "handed over", 0, 0),
        delivered,
    ]
    assert reconciliation.reconcile_entries(in_queue, {}, [], dead_on_disk=1).balances
    fanned_out: list[LedgerEntry] = [sealed, FannedOutEntry(2, "a", ["x"], 3, 0), FannedOutEntry(3, "a", ["x"], 0, 0)]
    account = reconciliation.reconcile_entries(fanned_out, {}, [])
    assert (account.balances, account.fanned_out) == (True, {"x": 3})


def test_a_returned_batch_is_pending_again_and_missed_if_its_file_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it was summed up as fanned out in between, and if the sums are compacted again."""
    monkeypatch.setattr(reconciliation, "RECENT_BATCHES_MAX", 0)
    entries: list[LedgerEntry] = [SealedEntry(1, "a", "w", 3, 30), FannedOutEntry(2, "a", ["x"], 3, 0)]
    returned = ReturnedEntry(6, "a", 3)
    for before in (entries, compact_entries(entries, set(), 5)):
        afters: list[list[LedgerEntry]] = [[*before, returned], compact_entries([*before, returned], {"a"}, 7)]
        for after in afters:
            there = reconciliation.reconcile_entries(after, {"a": FileCounts(3, 0)}, [])
            assert (there.balances, there.total.accepted, there.total.pending, there.total.shared) == (True, 3, 3, 0)
            lost = reconciliation.reconcile_entries(after, {}, [])
            assert (lost.balances, lost.total.accepted, [wrong.events for wrong in lost.discrepancies]) == (False, 3, [3])
            fanned_out_again: list[LedgerEntry] = [*after, FannedOutEntry(8, "a", ["y"], 3, 0)]
            again = reconciliation.reconcile_entries(fanned_out_again, {}, [])
            assert (again.balances, again.total.shared, again.fanned_out["y"]) == (True, 3, 3)
