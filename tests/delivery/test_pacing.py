"""Pacing: the rate after failures and at a ceiling. These are unit tests that pass in the time."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillarbox.delivery.pacing import Pacer, PacingConfig

CALL = 500  # records
CALL_S = 0.25  # per call: 2,000 events/s
STEP = 2000 / 128


def warmed_up_pacer(bounds: PacingConfig = PacingConfig(), at_once: int = 1) -> Pacer:  # noqa: B008 - immutable
    """A pacer that has measured its destination."""
    pacer = Pacer(bounds, at_once)
    for number in range(50):
        pacer.note_sent(number, CALL)
        pacer.note_accepted(number, number + CALL_S, CALL)
    return pacer


class PacedCall(NamedTuple):
    """The start of a call, and the rate limit at that moment."""

    at: float
    rate: float | None


def drain(pacer: Pacer, now: float, calls: int, takes_s: float = CALL_S) -> list[PacedCall]:
    """Make calls one after the other, each as soon as it is allowed. Each takes `takes_s`."""
    sent = []
    for _ in range(calls):
        now += pacer.seconds_until_next(now)
        sent.append(PacedCall(now, pacer.rate))
        pacer.note_sent(now, CALL)
        pacer.note_accepted(now, now + takes_s, CALL)
        now += takes_s
    return sent


def fail_for(pacer: Pacer, now: float, seconds: float) -> float:
    """Retry every second without success; returns the time afterwards."""
    for _ in range(int(seconds)):
        pacer.note_sent(now, CALL)
        pacer.note_failure(now, now + 0.01, CALL)
        now += 1
    return now


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 100), st.floats(0, 100)), max_size=50))
def test_no_call_is_delayed_while_none_fails(calls: list[tuple[int, float, float]]) -> None:
    """However long or large the calls are."""
    pacer, now = Pacer(PacingConfig()), 0.0
    for records, takes_s, gap_s in calls:
        assert (pacer.seconds_until_next(now), pacer.rate, pacer.is_paced) == (0.0, None, False)
        pacer.note_sent(now, records)
        pacer.note_accepted(now, now + takes_s, records)
        now += takes_s + gap_s


def test_after_an_outage_the_rate_begins_low_and_rises_by_the_same_step_each_time() -> None:
    """Until it is well above the capacity of the destination; then the limit is removed."""
    pacer = warmed_up_pacer()
    sent = drain(pacer, fail_for(pacer, 100, 60), 300)
    rates = [one.rate for one in sent if one.rate is not None]
    assert rates[0] == pytest.approx(CALL / 30)
    assert [b - a for a, b in itertools.pairwise(rates)] == pytest.approx([STEP] * (len(rates) - 1))
    assert 2 * 2000 - STEP <= rates[-1] < 2 * 2000
    assert (sent[-1].rate, pacer.outages) == (None, 1)


def test_one_failure_halves_the_rate_and_is_not_an_outage() -> None:
    """Each further failure halves it again, down to one call in thirty seconds."""
    pacer = warmed_up_pacer(PacingConfig(outage_s=60))
    rates = []
    for number in range(16):
        began = 100 + number / 2  # one cut a second at most
        pacer.note_failure(began, began + 0.01, CALL)
        rates.append(pacer.rate)
    assert rates[::2] == rates[1::2] == pytest.approx([1000, 500, 250, 125, 62.5, 31.25, CALL / 30, CALL / 30])
    assert pacer.outages == 0


def test_calls_in_flight_together_cut_the_rate_once() -> None:
    """Their failures are about the rate before the cut."""
    pacer = warmed_up_pacer(at_once=4)
    for number in range(4):
        pacer.note_failure(100 + number / 100, 101 + number / 100, CALL)
    assert pacer.rate == pytest.approx(4 * 2000 / 2)


def test_a_timeout_is_an_outage() -> None:
    """It takes as long as an outage; the rate begins at a 32nd."""
    pacer = warmed_up_pacer()
    pacer.note_failure(100, 110, CALL)
    assert pacer.rate == pytest.approx(2000 / 32)
    assert pacer.outages == 1


def test_two_slow_responses_halve_the_rate_and_a_normal_one_raises_it() -> None:
    """Slow means three times as long as usual. A single slow response changes nothing."""
    pacer = warmed_up_pacer()
    pacer.note_failure(100, 100.01, CALL)
    rates: list[float] = []
    for number, takes in enumerate([3.1, 1.0, 3.1, 3.1, 3.1, 0.9]):
        began = 110 + 10 * number
        pacer.note_sent(began, CALL)
        pacer.note_accepted(began, began + takes * CALL_S, CALL)
        rates.append(pacer.rate or 0)
    raised = 1000 + STEP
    assert rates[:5] == pytest.approx([1000, raised, raised, raised / 2, raised / 2])
    assert rates[4] < rates[5]


def test_slow_responses_limit_the_rate_again_until_the_backlog_is_empty() -> None:
    """A destination may slow down in the middle of a drain. Before any failure, slow responses have no effect."""
    pacer = warmed_up_pacer()
    pacer.note_failure(100, 100.01, CALL)
    assert drain(pacer, 110, 300)[-1].rate is None
    drain(pacer, 1000, 2, takes_s=10 * CALL_S)
    assert pacer.rate is not None
    pacer.note_drained()
    drain(pacer, 2000, 2, takes_s=10 * CALL_S)
    assert pacer.rate is None


def test_a_destination_that_stays_slower_counts_as_normal_after_a_while() -> None:
    """Then the limit is removed."""
    pacer = warmed_up_pacer()
    sent = drain(pacer, fail_for(pacer, 100, 60), 600, takes_s=10 * CALL_S)
    assert sent[-1].rate is None


def test_a_large_call_may_take_longer_and_a_quick_response_is_never_slow() -> None:
    """Ten times the records may take ten times as long, and a response within milliseconds never cuts the rate."""
    quick = Pacer(PacingConfig())
    for number in range(20):
        quick.note_accepted(number, number + 0.001, 10)
    quick.note_failure(100, 100.001, 10)
    before = quick.rate
    assert before is not None
    for began in (101, 102, 103):
        quick.note_accepted(began, began + 0.09, 10)
    assert quick.rate is None or quick.rate > before
    pacer = warmed_up_pacer()
    pacer.note_failure(100, 100.01, CALL)
    for began in (101, 111, 121):
        pacer.note_accepted(began, began + 10 * CALL_S, 10 * CALL)
    assert pacer.rate is not None
    assert pacer.rate > 1000


def test_for_an_unknown_destination_the_first_pause_is_the_longest() -> None:
    """A process that starts in an outage learns from the first successful calls."""
    pacer = Pacer(PacingConfig())
    now = fail_for(pacer, 0, 60)
    assert pacer.rate == pytest.approx(CALL / 30)
    sent = drain(pacer, now, 300)
    pauses = [b.at - a.at for a, b in itertools.pairwise(sent)]
    assert max(pauses) == pauses[0] < 30
    assert sent[-1].rate is None


def test_one_failure_before_any_success_does_not_limit_the_rate() -> None:
    """There is no known rate that could be halved."""
    pacer = Pacer(PacingConfig())
    pacer.note_sent(0.0, CALL)
    pacer.note_failure(0.0, 0.01, CALL)
    assert pacer.rate is None


def test_after_an_outage_at_the_start_of_a_process_the_first_response_sets_the_rate() -> None:
    """To the same share of the capacity as after any other outage, not to the lowest rate."""
    pacer = Pacer(PacingConfig())
    now = fail_for(pacer, 0.0, 10)
    first, second, third = drain(pacer, now, 3)
    assert first.rate is not None
    assert second.rate is not None
    assert third.rate is not None
    usual = CALL / CALL_S
    assert second.rate >= PacingConfig().start_share * usual > first.rate
    assert third.rate == pytest.approx(second.rate + PacingConfig().step_share * usual)


def test_the_backoff_alone_decides_when_a_failed_call_is_retried() -> None:
    """The rate limit counts only accepted calls and calls in flight."""
    pacer = warmed_up_pacer()
    fail_for(pacer, 100, 60)
    assert pacer.seconds_until_next(161) == 0
    pacer.note_sent(161, CALL)
    assert pacer.seconds_until_next(161) > 0
    pacer.note_rejection(CALL)
    assert pacer.seconds_until_next(161) == 0


def test_the_limit_is_removed_once_the_backlog_is_empty() -> None:
    """The ceiling stays."""
    pacer = warmed_up_pacer(PacingConfig(max_rate=700))
    fail_for(pacer, 100, 60)
    assert pacer.is_paced
    pacer.note_drained()
    assert (pacer.is_paced, pacer.rate) == (False, 700)


@given(
    st.floats(0.1, 1e5),
    st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 20), st.sampled_from(["arrived", "failed", "refused"])), max_size=60),
)
def test_the_ceiling_is_never_exceeded(max_rate: float, calls: list[tuple[int, float, str]]) -> None:
    """In any interval: at most one call more, plus what a late timer may catch up."""
    pacer, now = Pacer(PacingConfig(max_rate=max_rate)), 0.0
    sent: list[tuple[float, int]] = []
    for records, takes_s, end in calls:
        while (left := pacer.seconds_until_next(now)) > 0:
            now = max(now + left, now * (1 + 1e-15))
        pacer.note_sent(now, records)
        sent.append((now, records))
        if end == "arrived":
            pacer.note_accepted(now, now + takes_s, records)
        elif end == "failed":
            pacer.note_failure(now, now + takes_s, records)
        else:
            pacer.note_rejection(records)
        now += takes_s
        assert pacer.rate is not None
        assert pacer.rate <= max_rate
    for first in range(len(sent)):
        total = 0
        for at, records in sent[first:]:
            assert total <= max_rate * (at - sent[first][0] + 0.03) * (1 + 1e-6) + 1e-6
            total += records


@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 20), st.booleans()), max_size=60))
def test_a_pause_is_bounded_whatever_happens(calls: list[tuple[int, float, bool]]) -> None:
    """By thirty seconds; then the destination is called again."""
    pacer, now = Pacer(PacingConfig()), 0.0
    for records, takes_s, well in calls:
        assert pacer.seconds_until_next(now) <= 30 * (1 + 1e-9)
        pacer.note_sent(now, records)
        if well:
            pacer.note_accepted(now, now + takes_s, records)
        else:
            pacer.note_failure(now, now + takes_s, records)
        now += takes_s
