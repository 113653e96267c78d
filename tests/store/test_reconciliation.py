"""The account of any entries in any order, and of what is on disk: every event is in it once, or the account says so."""

from __future__ import annotations

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
    SealedEntry,
    SettledEntry,
)
from pillarbox.store.reconciliation import FileCounts, compact_entries

COUNTS = st.integers(0, 5)
BATCHES = st.sampled_from(["a", "b", "c"])
MOMENTS = st.integers(0, 9)
ENTRIES: st.SearchStrategy[LedgerEntry] = st.one_of(
    st.builds(SealedEntry, MOMENTS, BATCHES, st.sampled_from(["v", "w"]), st.none() | COUNTS, COUNTS),
    st.builds(AdoptedEntry, MOMENTS, BATCHES, st.just("w")),
    st.builds(SettledEntry, MOMENTS, BATCHES, st.just("sink"), COUNTS, COUNTS, COUNTS, COUNTS),
    st.builds(EvictedEntry, MOMENTS, BATCHES, COUNTS),
    st.builds(ReplayedEntry, MOMENTS, BATCHES, COUNTS),
    st.builds(RepairedEntry, MOMENTS, BATCHES, COUNTS),
    st.builds(PurgedEntry, MOMENTS, BATCHES, st.sampled_from(["dead", "quarantine"]), COUNTS),
)
FOUND = st.dictionaries(BATCHES, st.builds(FileCounts, COUNTS, COUNTS))
ACTIVE = st.lists(st.builds(FileCounts, COUNTS, COUNTS, st.just("w")), max_size=2)


@given(st.lists(ENTRIES, max_size=12), FOUND, ACTIVE)
def test_accepted_is_the_sum_of_the_parts_and_of_what_is_wrong(
    entries: list[LedgerEntry], found: dict[str, FileCounts], active: list[FileCounts]
) -> None:
    """At both ends of every range; and of the whole as of each writer."""
    account = reconciliation.reconcile_entries(entries, found, active)
    low, high = account.total.accounted_range
    missing = sum(wrong.events for wrong in account.discrepancies)
    assert (account.total.accepted, account.total.accepted_max) == (low + missing, high + missing)
    for field in ledger_entries.NUMBERS:
        assert getattr(account.total, field) == sum(getattr(row, field) for row in account.writers)


@given(st.lists(ENTRIES, max_size=12, unique_by=lambda entry: (type(entry), getattr(entry, "batch", ""))), st.randoms(), FOUND)
def test_the_order_of_entries_does_not_matter(entries: list[LedgerEntry], random: object, found: dict[str, FileCounts]) -> None:
    """But for which of several of a kind is the last."""
    one = reconciliation.reconcile_entries(entries, found, [])
    random.shuffle(entries)  # type: ignore[attr-defined]
    other = reconciliation.reconcile_entries(entries, found, [])
    assert (one.total, one.replayed, one.purged_dead) == (other.total, other.replayed, other.purged_dead)
    assert one.balances == other.balances


@given(st.lists(ENTRIES, max_size=12), FOUND)
def test_what_is_written_twice_counts_once(entries: list[LedgerEntry], found: dict[str, FileCounts]) -> None:
    """One after the other: the disk had refused the first."""
    distinct = list(dict.fromkeys(entries))
    twice = [entry for entry in distinct for _ in range(2)]
    assert reconciliation.reconcile_entries(distinct, found, []) == reconciliation.reconcile_entries(twice, found, [])


@given(st.lists(ENTRIES, max_size=12), FOUND)
def test_summed_up_it_is_the_same_account(entries: list[LedgerEntry], found: dict[str, FileCounts]) -> None:
    """Whatever is there stays named."""
    recent, reconciliation.RECENT_BATCHES_MAX = reconciliation.RECENT_BATCHES_MAX, 1  # type: ignore[misc]
    try:
        shorter = compact_entries(entries, found.keys(), 7)
    finally:
        reconciliation.RECENT_BATCHES_MAX = recent  # type: ignore[misc]
    one, other = reconciliation.reconcile_entries(entries, found, []), reconciliation.reconcile_entries(shorter, found, [])
    assert one.total == other.total
    assert (one.replayed, one.repaired, one.purged_dead) == (other.replayed, other.repaired, other.purged_dead)
    assert (one.dead_missing, one.balances) == (other.dead_missing, other.balances)


def test_a_second_settlement_replaces_the_first_and_counts_as_resent() -> None:
    """The first delivery had ended with a kill ahead of the removal."""
    entries: list[LedgerEntry] = [
        SealedEntry(1, "a", "w", 5, 50),
        SettledEntry(2, "a", "s", 5, 0, 0, 0),
        SettledEntry(3, "a", "s", 4, 4, 1, 0),
    ]
    account = reconciliation.reconcile_entries(entries, {}, [], dead_on_disk=1)
    assert (account.balances, account.total.delivered, account.total.dead, account.total.resent) == (True, 4, 1, 4)


def test_what_was_evicted_and_then_delivered_all_the_same_was_delivered() -> None:
    """A kill between the entry and the removal."""
    entries: list[LedgerEntry] = [
        SealedEntry(1, "a", "w", 5, 50),
        EvictedEntry(2, "a", 5),
        SettledEntry(3, "a", "s", 5, 0, 0, 0),
    ]
    total = reconciliation.reconcile_entries(entries, {}, []).total
    assert (total.accepted, total.delivered, total.evicted) == (5, 5, 0)


def test_what_is_missing_without_damage_is_wrong_and_by_how_much() -> None:
    """Settled or still pending; and so is what is too much."""
    sealed = SealedEntry(1, "b", "w", 10, 1000)
    for records, spans, wrong in ((9, 0, 1), (9, 1, None), (11, 0, -1), (11, 1, -1), (10, 0, None), (10, 1, None)):
        settled = SettledEntry(2, "b", "s", records, 0, 0, spans)
        looks: list[tuple[list[LedgerEntry], dict[str, FileCounts]]] = [
            ([sealed, settled], {}),
            ([sealed], {"b": FileCounts(records, spans)}),
        ]
        for entries, found in looks:
            account = reconciliation.reconcile_entries(entries, found, [])
            assert [one.events for one in account.discrepancies] == ([] if wrong is None else [wrong]), (records, spans)
            assert account.balances == (wrong is None)


def test_what_was_handed_over_goes_with_a_queue_that_is_renamed_or_removed() -> None:
    """Also where some of it, or all, was summed up before or after that."""
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
