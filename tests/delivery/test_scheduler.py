"""The order of batches, with and without a share for batches sealed during a drain. Unit tests without files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.delivery.fetcher import Scheduler

BACKLOG = [f"{number:03}" for number in range(100)]
LIVE = [f"{number:03}" for number in range(100, 160)]


def all_of(lineup: Scheduler) -> list[str]:
    taken = []
    while lineup:
        taken.append(lineup.pop_next())
    return taken


@given(st.lists(st.sets(st.sampled_from(BACKLOG + LIVE), min_size=1), max_size=5))
def test_without_a_share_the_given_order_is_kept(looks: list[set[str]]) -> None:
    """Whatever was scheduled before."""
    lineup = Scheduler()
    for names in looks:
        lineup.schedule(sorted(names))
        assert all_of(lineup) == sorted(names)


def test_without_a_share_live_batches_come_last() -> None:
    """If they are listed at all."""
    lineup = Scheduler()
    lineup.schedule(BACKLOG)
    lineup.add_live(BACKLOG[50:] + LIVE)
    assert all_of(lineup) == BACKLOG + LIVE


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_live_batches_have_their_share_and_both_groups_keep_their_order(share: float) -> None:
    """Evenly spread: at any moment, the difference from the share is less than one batch."""
    lineup = Scheduler(share)
    lineup.schedule(BACKLOG)
    lineup.add_live(BACKLOG[50:] + LIVE)
    order = all_of(lineup)
    assert [name for name in order if name in BACKLOG] == BACKLOG
    assert [name for name in order if name in LIVE] == LIVE
    both = min(order.index(BACKLOG[-1]), order.index(LIVE[-1]))
    for taken in range(both):
        assert abs(sum(name in LIVE for name in order[:taken]) - share * taken) <= 1


def test_live_batches_stay_live_until_the_backlog_is_delivered() -> None:
    """Even if everything is listed again after a failure. Batches pending afterwards are the next backlog."""
    lineup = Scheduler(0.5)
    lineup.schedule(["1", "2", "3"])
    lineup.add_live(["1", "2", "3", "4", "5"])
    lineup.clear()
    lineup.schedule(["2", "3", "4", "5"])
    assert all_of(lineup) == ["2", "4", "3", "5"]
    lineup.schedule(["5", "6"])
    assert all_of(lineup) == ["5", "6"]


def test_after_an_outage_all_pending_batches_are_the_backlog() -> None:
    """Batches sealed during the outage are not live, whether it was during a drain or before."""
    lineup = Scheduler(0.5)
    lineup.schedule(["1", "2", "3"])
    lineup.add_live(["3", "4"])
    lineup.start_backlog()
    lineup.add_live(["3", "4", "5", "6"])
    lineup.add_live(["7", "8"])
    assert all_of(lineup) == ["1", "7", "2", "8", "3", "4", "5", "6"]


def test_a_given_order_is_kept_whatever_the_share() -> None:
    """Deferred batches are sent beside others."""
    lineup = Scheduler(1.0)
    lineup.schedule(["1"])
    lineup.schedule_in_order(["3", "1", "4", "2"])
    assert all_of(lineup) == ["3", "1", "4", "2"]


def test_live_batches_are_listed_only_while_there_is_a_backlog() -> None:
    """Or if everything must be listed again."""
    lineup = Scheduler(1.0)
    lineup.schedule(["1", "2"])
    seen = [lineup.is_backlog_done]
    lineup.add_live(["3"])
    assert all_of(lineup) == ["3", "1", "2"]
    lineup.add_live(["4"])
    seen.append(lineup.is_backlog_done)
    lineup.start_backlog()
    seen.append(lineup.is_backlog_done)
    assert seen == [False, True, False]
