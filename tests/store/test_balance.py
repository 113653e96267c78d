"""The account of any entries in any order, and of what is on disk: every event is in it once, or the account says so."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pillarbox.store import reconciliation
from pillarbox.store.reconciliation import (
    Adopted,
    Entry,
    Evicted,
    Found,
    Purged,
    Renamed,
    Repaired,
    Replayed,
    Sealed,
    Settled,
    Shared,
    condensed,
)

COUNTS = st.integers(0, 5)
BATCHES = st.sampled_from(["a", "b", "c"])
MOMENTS = st.integers(0, 9)
ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(Sealed, MOMENTS, BATCHES, st.sampled_from(["v", "w"]), st.none() | COUNTS, COUNTS),
    st.builds(Adopted, MOMENTS, BATCHES, st.just("w")),
    st.builds(Settled, MOMENTS, BATCHES, st.just("sink"), COUNTS, COUNTS, COUNTS, COUNTS),
    st.builds(Evicted, MOMENTS, BATCHES, COUNTS),
    st.builds(Replayed, MOMENTS, BATCHES, COUNTS),
    st.builds(Repaired, MOMENTS, BATCHES, COUNTS),
    st.builds(Purged, MOMENTS, BATCHES, st.sampled_from(["dead", "quarantine"]), COUNTS),
)
FOUND = st.dictionaries(BATCHES, st.builds(Found, COUNTS, COUNTS))
ACTIVE = st.lists(st.builds(Found, COUNTS, COUNTS, st.just("w")), max_size=2)


@given(st.lists(ENTRIES, max_size=12), FOUND, ACTIVE)
def test_accepted_is_the_sum_of_the_parts_and_of_what_is_wrong(
    entries: list[Entry], found: dict[str, Found], active: list[Found]
) -> None:
    """At both ends of every range; and of the whole as of each writer."""
    account = reconciliation.account(entries, found, active)
    low, high = account.total.settled_and_pending
    missing = sum(wrong.events for wrong in account.wrong)
    assert (account.total.accepted, account.total.accepted_max) == (low + missing, high + missing)
    for field in reconciliation.NUMBERS:
        assert getattr(account.total, field) == sum(getattr(row, field) for row in account.writers)


@given(st.lists(ENTRIES, max_size=12, unique_by=lambda entry: (type(entry), getattr(entry, "batch", ""))), st.randoms(), FOUND)
def test_the_order_of_entries_does_not_matter(entries: list[Entry], random: object, found: dict[str, Found]) -> None:
    """But for which of several of a kind is the last."""
    one = reconciliation.account(entries, found, [])
    random.shuffle(entries)  # type: ignore[attr-defined]
    other = reconciliation.account(entries, found, [])
    assert (one.total, one.replayed, one.purged_dead) == (other.total, other.replayed, other.purged_dead)
    assert one.balances == other.balances


@given(st.lists(ENTRIES, max_size=12), FOUND)
def test_what_is_written_twice_counts_once(entries: list[Entry], found: dict[str, Found]) -> None:
    """One after the other: the disk had refused the first."""
    distinct = list(dict.fromkeys(entries))
    twice = [entry for entry in distinct for _ in range(2)]
    assert reconciliation.account(distinct, found, []) == reconciliation.account(twice, found, [])


@given(st.lists(ENTRIES, max_size=12), FOUND)
def test_summed_up_it_is_the_same_account(entries: list[Entry], found: dict[str, Found]) -> None:
    """Whatever is there stays named."""
    recent, reconciliation.RECENT = reconciliation.RECENT, 1  # type: ignore[misc]
    try:
        shorter = condensed(entries, found.keys(), 7)
    finally:
        reconciliation.RECENT = recent  # type: ignore[misc]
    one, other = reconciliation.account(entries, found, []), reconciliation.account(shorter, found, [])
    assert one.total == other.total
    assert (one.replayed, one.repaired, one.purged_dead) == (other.replayed, other.repaired, other.purged_dead)
    assert (one.dead_missing, one.balances) == (other.dead_missing, other.balances)


def test_a_second_settlement_replaces_the_first_and_counts_as_resent() -> None:
    """The first delivery had ended with a kill ahead of the removal."""
    entries: list[Entry] = [Sealed(1, "a", "w", 5, 50), Settled(2, "a", "s", 5, 0, 0, 0), Settled(3, "a", "s", 4, 4, 1, 0)]
    account = reconciliation.account(entries, {}, [], dead_kept=1)
    assert (account.balances, account.total.delivered, account.total.dead, account.total.resent) == (True, 4, 1, 4)


def test_what_was_evicted_and_then_delivered_all_the_same_was_delivered() -> None:
    """A kill between the entry and the removal."""
    entries: list[Entry] = [Sealed(1, "a", "w", 5, 50), Evicted(2, "a", 5), Settled(3, "a", "s", 5, 0, 0, 0)]
    total = reconciliation.account(entries, {}, []).total
    assert (total.accepted, total.delivered, total.evicted) == (5, 5, 0)


def test_what_is_missing_without_damage_is_wrong_and_by_how_much() -> None:
    """Settled or still pending; and so is what is too much."""
    sealed = Sealed(1, "b", "w", 10, 1000)
    for records, spans, wrong in ((9, 0, 1), (9, 1, None), (11, 0, -1), (11, 1, -1), (10, 0, None), (10, 1, None)):
        settled = Settled(2, "b", "s", records, 0, 0, spans)
        looks: list[tuple[list[Entry], dict[str, Found]]] = [([sealed, settled], {}), ([sealed], {"b": Found(records, spans)})]
        for entries, found in looks:
            account = reconciliation.account(entries, found, [])
            assert [one.events for one in account.wrong] == ([] if wrong is None else [wrong]), (records, spans)
            assert account.balances == (wrong is None)


def test_what_was_handed_over_goes_with_a_queue_that_is_renamed_or_removed() -> None:
    """Also where some of it, or all, was summed up before or after that."""
    before: list[Entry] = [Shared(0, str(number), ["a", "b", "c"], 1, 0) for number in range(reconciliation.RECENT + 10)]
    change: list[Entry] = [Renamed(1, "a", "d"), Renamed(1, "b", "")]
    after: list[Entry] = [Shared(2, "late", ["a", "b", "d"], 5, 0)]
    every = reconciliation.RECENT + 10
    for entries in (
        before + change + after,
        condensed(before, set(), 1) + change + after,
        condensed(before + change, set(), 1) + after,
        condensed(condensed(before, set(), 1) + change + after, set(), 2),
    ):
        assert reconciliation.account(entries, {}, []).shared == {"a": 5, "b": 5, "c": every, "d": every + 5}
