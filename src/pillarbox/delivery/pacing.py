"""Limits the rate at which a destination is sent batches. Pure: times are monotonic seconds; rates are in events/s.

Without failures, only the operator's ceiling limits the rate. A call that fails sets a bound: a share of the rate that the
destination usually takes, and a small share after an outage. Each response in time raises the bound by a fixed step, and each
slow response or failure halves it, until no batch is pending any more. This is additive increase, multiplicative decrease:
with it, many clients share one server evenly without knowing of one another.

Sources: D.-M. Chiu and R. Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance in Computer
Networks", 1989. One cut for all calls in flight, and averages with a gain of an eighth: V. Jacobson, "Congestion Avoidance and
Control", 1988; RFC 5681 and 6298. A slow answer is a sign before any is lost: L. Brakmo and L. Peterson, "TCP Vegas", 1995.
Why a destination that has just come back must not be sent everything at once: N. Bronson et al., "Metastable Failures in
Distributed Systems", 2021. The size of the step was found with `bench/recovery.py`.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

_TIMER_SLACK_S: Final = 0.02  # how much of the lateness of a timer may be made up for


class PacingConfig(NamedTuple):
    """The constants of pacing. Shares refer to the rate that the destination usually takes, as far as it is known."""

    max_rate: float | None = None  # events/s, the operator's ceiling; None: no ceiling
    start_share: float = 1 / 32  # the rate after an outage: about five halvings
    step_share: float = 1 / 128  # the rise with each answer in time; several times as much makes many clients overshoot
    cut_every_s: float = 1.0  # at most one cut: quick calls that fail at random must not hold a destination back for good
    cut: float = 0.5  # factor of the rate after a failure or a slow response
    lift: float = 2.0  # the bound is removed at this multiple of the usual rate, because the destination takes no more anyway
    slow: float = 3.0  # a response is slow if its call takes this multiple of the usual duration
    slow_in_row: int = 2  # consecutive slow responses that cut the rate; a single one may be chance
    slow_least_s: float = 0.1  # a quicker response is never slow
    outage_s: float = 5.0  # calls that fail for so long are an outage
    pause_max_s: float = 30.0  # longest pause between two calls; the same as the longest backoff
    gain: float = 1 / 8  # gain of the averages
    gain_slow: float = 1 / 64  # gain for slow responses while nothing has failed


class _TokenBucket:
    """A token bucket: the events that were sent ahead of the rate."""

    def __init__(self) -> None:
        self._owed = 0.0
        self._advanced_at = -math.inf

    def advance(self, now: float, rate: float) -> None:
        """Pay off as many events as this rate allows for the time since the last call."""
        if now > self._advanced_at:
            self._owed = max(self._owed - (now - self._advanced_at) * rate, -_TIMER_SLACK_S * rate)
            self._advanced_at = now

    def charge(self, records: float, limit: float = math.inf) -> None:
        """Add events that are sent; at most `limit` are owed."""
        self._owed = min(self._owed + records, limit)

    def refund(self, records: float) -> None:
        """Take back events that do not count."""
        self._owed = max(min(self._owed, 0.0), self._owed - records)

    def seconds_until_free(self, rate: float) -> float:
        """Seconds until all events are paid off."""
        return max(0.0, self._owed) / rate


class Pacer:
    """Decides when the next call may begin. It must be told of each call that begins and of each that ends."""

    def __init__(self, config: PacingConfig, max_in_flight: int = 1) -> None:
        self._config = config
        self._max_in_flight = max_in_flight  # calls
        self._bound: float | None = None
        self._paced_bucket, self._ceiling_bucket = _TokenBucket(), _TokenBucket()
        self._usual_s = 0.0  # duration of a call
        self._usual_records = 0.0  # of a call; 0: not known yet
        self._last_records = 1
        self._slow_in_row = 0
        self._is_recovering = False  # from a failure until no batch is pending
        self._failing_since: float | None = None
        self._is_outage = False
        self._cut_at = -math.inf
        self.outages = 0  # number of outages so far

    @property
    def is_paced(self) -> bool:
        """Whether a failure has bounded the rate."""
        return self._bound is not None

    @property
    def rate(self) -> float | None:
        """The highest rate allowed now, in events/s; None: as fast as the destination takes them."""
        bounds = [bound for bound in (self._bound, self._config.max_rate) if bound is not None]
        return min(bounds, default=None)

    @property
    def _usual_rate(self) -> float:
        """The rate that the destination takes unhindered; 0 if not known yet."""
        return self._max_in_flight * self._usual_records / max(self._usual_s, 1e-6)

    @property
    def _ceiling_rate(self) -> float:
        return math.inf if self._config.max_rate is None else self._config.max_rate

    @property
    def _unhindered_rate(self) -> float:
        """The rate of a drain without failures."""
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
        """Count a call that begins."""
        self.seconds_until_next(now)
        self._last_records = max(1, records)
        self._ceiling_bucket.charge(records)
        if self._bound is not None:
            self._paced_bucket.charge(records, self._bound * self._config.pause_max_s)

    def note_accepted(self, began: float, now: float, records: int) -> None:
        """Learn from a call of which records were accepted."""
        config = self._config
        self._failing_since = None
        is_first = not self._usual_records
        seconds = max(0.0, now - began)
        slow = self._is_slow(seconds, records)
        if not slow or self._is_at_lowest:  # the call is slow even at the lowest rate, so the rate is not the cause
            self._update_averages(seconds, max(1, records), config.gain)
        elif not self._is_recovering:
            self._update_averages(seconds, max(1, records), config.gain_slow)
        if is_first and self._bound is not None:  # the bound was set before the destination's usual rate was known
            self._bound = max(self._bound, config.start_share * self._unhindered_rate)
        if not self._is_recovering or began < self._cut_at:
            return  # the call was in flight at the last cut, and says nothing about the rate since then
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
        """Slow down after a call that must be retried; the backoff decides when.

        Leave `records` out if there was no call because nothing could be sent at all.
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
            self._cut_rate(now, self._current_rate)  # if nothing is known yet, the backoff is enough

    def note_rejection(self, records: int) -> None:
        """Take back a call whose records were all rejected: the search for a bad record must not be slowed down."""
        self._paced_bucket.refund(records)

    def note_stall(self, seconds: float, records: int) -> None:
        """Take back a call during which this process stalled: it was suspended, or its event loop was blocked.

        Whatever its result was, the destination may have answered at once. The stall does not count as an outage either.
        """
        self._paced_bucket.refund(records)
        if self._failing_since is not None:
            self._failing_since += seconds

    def note_drained(self) -> None:
        """Remove the bound, because no batch is pending any more."""
        self._bound = None
        self._is_recovering = False

    @property
    def _current_rate(self) -> float:
        return self._unhindered_rate if self._bound is None else self._bound

    @property
    def _lowest_rate(self) -> float:
        """The lowest rate."""
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
