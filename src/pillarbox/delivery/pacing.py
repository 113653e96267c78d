"""How fast a destination is sent what waits. Pure: times are passed in, in seconds of a monotonic clock; rates are events/s.

While all is well nothing is held back but by the operator's ceiling. A call that fails makes a bound: a share of what the
destination usually takes, and a small one after an outage. Each answer that comes in time raises it by a fixed step, each slow
one and each failure cuts it by half, until nothing waits any more: additive increase, multiplicative decrease, which many
clients of one server need in order to share it evenly without knowing of one another (D.-M. Chiu and R. Jain, "Analysis of the
Increase and Decrease Algorithms for Congestion Avoidance in Computer Networks", 1989). Cut by half, once for all calls that
were under way, and averaged with a gain of an eighth: V. Jacobson, "Congestion Avoidance and Control", 1988; RFC 5681 and 6298.
A slow answer is a sign before any is lost: L. Brakmo and L. Peterson, "TCP Vegas", 1995. Why a destination that has just come
back must not be sent everything at once: N. Bronson et al., "Metastable Failures in Distributed Systems", 2021. The size of the
step was found with `bench/recovery.py`.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

_TIMER_SLACK_S: Final = 0.02  # a timer that fires late may be made up for by so much, and no more


class PacingConfig(NamedTuple):
    """Bounds. Shares are of the rate that the destination usually takes, as far as it is known."""

    max_rate: float | None = None  # events/s, at all times; None: no ceiling
    start_share: float = 1 / 32  # the rate after an outage: some five failures' worth of halving
    step_share: float = (
        1 / 128
    )  # the rise with each answer in time; several times as much makes many clients overshoot together
    cut_every_s: float = 1.0  # at most: a destination that fails at random, in quick calls, is not held back for good
    cut: float = 0.5  # what is left of the rate after a failure or a slow answer
    lift: float = 2.0  # times the usual rate: the destination takes no more anyway, and the bound goes away
    slow: float = 3.0  # times the usual length of such a call: the answer is slow
    slow_in_row: int = 2  # so many slow answers are a sign; one alone is chance, and of a thousand calls a few are always slow
    slow_least_s: float = 0.1  # an answer that comes sooner is never slow
    outage_s: float = 5.0  # failing for so long is an outage, and no hiccup
    pause_max_s: float = 30.0  # between two calls; as long as the longest pause between two tries
    gain: float = 1 / 8  # of the averages
    gain_slow: float = 1 / 64  # the same for slow answers, while all is well


class _TokenBucket:
    """What was sent and is not paid off yet, at so many events a second."""

    def __init__(self) -> None:
        self._owed = 0.0
        self._advanced_at = -math.inf

    def advance(self, now: float, rate: float) -> None:
        """Let time pass at this rate."""
        if now > self._advanced_at:
            self._owed = max(self._owed - (now - self._advanced_at) * rate, -_TIMER_SLACK_S * rate)
            self._advanced_at = now

    def charge(self, records: float, limit: float = math.inf) -> None:
        """So many are sent; not more than `limit` are owed."""
        self._owed = min(self._owed + records, limit)

    def refund(self, records: float) -> None:
        """So many were sent and are not counted."""
        self._owed = max(min(self._owed, 0.0), self._owed - records)

    def seconds_until_free(self, rate: float) -> float:
        """Seconds until nothing is owed."""
        return max(0.0, self._owed) / rate


class Pacer:
    """When the next call may begin. Told of each call that begins, and of each that ends."""

    def __init__(self, config: PacingConfig, max_in_flight: int = 1) -> None:
        self._config = config
        self._max_in_flight = max_in_flight  # calls under way at the same time
        self._bound: float | None = None
        self._paced_bucket, self._ceiling_bucket = _TokenBucket(), _TokenBucket()
        self._usual_s = 0.0  # of a call, and
        self._usual_records = 0.0  # how many records it has; 0: not known yet
        self._last_records = 1
        self._slow_in_row = 0
        self._is_recovering = False  # from a failure, until nothing waits any more
        self._failing_since: float | None = None
        self._is_outage = False
        self._cut_at = -math.inf
        self.outages = 0  # how often it has failed for so long that it is one

    @property
    def is_paced(self) -> bool:
        """Whether a failure has bounded the rate."""
        return self._bound is not None

    @property
    def rate(self) -> float | None:
        """Events a second that are sent at most; None: as many as the destination takes."""
        bounds = [bound for bound in (self._bound, self._config.max_rate) if bound is not None]
        return min(bounds, default=None)

    @property
    def _usual_rate(self) -> float:
        """What the destination takes unhindered; 0 where that is not known yet."""
        return self._max_in_flight * self._usual_records / max(self._usual_s, 1e-6)

    @property
    def _ceiling_rate(self) -> float:
        return math.inf if self._config.max_rate is None else self._config.max_rate

    @property
    def _unhindered_rate(self) -> float:
        """The rate of a drain that nothing is wrong with."""
        return min(self._usual_rate, self._ceiling_rate)

    def seconds_until_next(self, now: float) -> float:
        """Seconds until the next call may begin."""
        wait = 0.0
        if self._config.max_rate is not None:
            self._ceiling_bucket.advance(now, self._config.max_rate)
            wait = self._ceiling_bucket.seconds_until_free(self._config.max_rate)
        if self._bound is not None:
            self._paced_bucket.advance(now, self._bound)
            wait = max(wait, self._paced_bucket.seconds_until_free(self._bound))
        return wait

    def note_sent(self, now: float, records: int) -> None:
        """A call begins."""
        self.seconds_until_next(now)
        self._last_records = max(1, records)
        self._ceiling_bucket.charge(records)
        if self._bound is not None:
            self._paced_bucket.charge(records, self._bound * self._config.pause_max_s)

    def note_accepted(self, began: float, now: float, records: int) -> None:
        """A call that began then has brought something home."""
        config = self._config
        self._failing_since = None
        is_first = not self._usual_records
        seconds = max(0.0, now - began)
        slow = self._is_slow(seconds, records)
        if not slow or self._is_at_lowest:  # slow at the lowest rate: that is how it is by now, and not our calls' doing
            self._update_averages(seconds, max(1, records), config.gain)
        elif not self._is_recovering:
            self._update_averages(seconds, max(1, records), config.gain_slow)
        if is_first and self._bound is not None:  # it failed before anything was known, and was bounded blindly
            self._bound = max(self._bound, config.start_share * self._unhindered_rate)
        if not self._is_recovering or began < self._cut_at:
            return  # a call that was under way at the last cut says nothing of the rate since
        self._slow_in_row = self._slow_in_row + 1 if slow else 0
        if self._slow_in_row >= config.slow_in_row and now - self._cut_at >= config.cut_every_s:
            self._cut_rate(now, self._current_rate)
        if slow or self._bound is None:
            return
        self._paced_bucket.advance(now, self._bound)
        self._bound += config.step_share * self._unhindered_rate
        if self._bound >= min(config.lift * self._usual_rate, self._ceiling_rate):
            self._bound = None

    def note_failure(self, began: float, now: float, records: float = math.inf) -> None:
        """A call of so many records that began then is to be tried again: when, is the backoff's to say.

        Without a number of records nothing can be sent at all.
        """
        self._paced_bucket.refund(records)
        outage_begins = False
        if self._failing_since is None:
            self._failing_since = began
            self._is_outage = False
        if now - self._failing_since >= self._config.outage_s and not self._is_outage:
            self._is_outage = outage_begins = True
            self.outages += 1
        self._is_recovering = True
        if outage_begins:
            self._cut_rate(now, min(self._current_rate, self._config.start_share / self._config.cut * self._unhindered_rate))
        elif self._current_rate and began >= self._cut_at and now - self._cut_at >= self._config.cut_every_s:
            self._cut_rate(now, self._current_rate)  # where nothing is known yet, the backoff's pause is enough

    def note_rejection(self, records: int) -> None:
        """A call brought nothing home, and was no failure either: looking for what is bad in a batch is not held back."""
        self._paced_bucket.refund(records)

    def note_drained(self) -> None:
        """Nothing waits any more."""
        self._bound = None
        self._is_recovering = False

    @property
    def _current_rate(self) -> float:
        return self._unhindered_rate if self._bound is None else self._bound

    @property
    def _lowest_rate(self) -> float:
        """The lowest rate that there is."""
        return self._last_records / self._config.pause_max_s

    @property
    def _is_at_lowest(self) -> bool:
        return self._bound is not None and self._bound <= self._lowest_rate

    def _cut_rate(self, now: float, rate: float) -> None:
        if self._bound is not None:
            self._paced_bucket.advance(now, self._bound)
        else:
            self._paced_bucket = _TokenBucket()
        self._bound = max(self._config.cut * rate, self._lowest_rate)
        self._paced_bucket.charge(0, self._bound * self._config.pause_max_s)
        self._cut_at = now
        self._slow_in_row = 0

    def _is_slow(self, seconds: float, records: int) -> bool:
        if not self._usual_records or seconds <= self._config.slow_least_s:
            return False
        return seconds > self._config.slow * self._usual_s * max(1.0, records / self._usual_records)

    def _update_averages(self, seconds: float, records: int, gain: float) -> None:
        if not self._usual_records:
            gain = 1.0
        self._usual_s += gain * (seconds - self._usual_s)
        self._usual_records += gain * (records - self._usual_records)
