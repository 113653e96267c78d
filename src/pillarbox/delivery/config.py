"""The configuration of delivery. `Settings` builds a `DeliveryConfig` from its values; every bound has a field here.

The backoff is "full jitter": a uniform share of an exponentially growing bound. It spreads many waiting clients best (M.
Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

from pillarbox.delivery.pacing import PacingConfig

_MAX_DOUBLINGS: Final = 32  # more than any bound in use needs; keeps the power of two small
jitter = random.SystemRandom().random  # not seeded: forked processes must not wait in step


class Backoff(NamedTuple):
    """How long to wait before the next attempt. Bounds in seconds."""

    base_s: float = 0.5
    max_s: float = 30.0

    def delay(self, attempt: int, jitter_share: float) -> float:
        """Seconds to wait after the `attempt`-th failure in a row (from 1); `jitter_share` is uniform in [0, 1)."""
        return jitter_share * min(self.max_s, self.base_s * 2.0 ** min(attempt, _MAX_DOUBLINGS))


class SettlementLimits(NamedTuple):
    """Limits of dead letters, quarantine and retained batches, and what happens when they are reached."""

    max_dead_bytes: int = 64 * 2**20
    max_quarantine_bytes: int = 64 * 2**20
    discard_when_full: bool = False  # False: the batch is held until somebody frees space
    keep_delivered_s: float | None = None  # how long delivered batches are retained; None: they are deleted
    max_delivered_bytes: int = 2**30  # of retained batches; beyond it the oldest are deleted


DEFAULT_LIMITS: Final = SettlementLimits()


class DeliveryConfig(NamedTuple):
    """The settings of one delivery worker. Times in seconds."""

    poll_interval_s: float = 1.0  # between two scans of an idle directory
    retry_after_max_s: float = 3600.0  # a longer pause that a destination asks for is cut to this
    recheck_s: float = 15.0  # between two attempts at a destination that is set up wrongly
    backoff: Backoff = Backoff()
    stop_after_rejected_batches: int = 3  # consecutive wholly rejected batches; 0: never stop, and every rejection is final
    max_age_s: float | None = None  # a batch that still fails at this age becomes dead letters; None: never
    max_in_flight: int = 1  # requests at a time, if the sink allows several
    call_timeout_s: float = 60.0  # a call to a sink that takes longer is cancelled and retried
    pacing: PacingConfig = PacingConfig()
    page_files: int = 16_384  # listed at a time, 2 MiB of names; each further page lists the directory again
    live_share: float = 0.0  # share of new batches, sealed since the drain began, among those sent while a backlog waits
    compress_after_s: float | None = None  # a batch that has waited for so long is compressed; None: never
    limits: SettlementLimits = DEFAULT_LIMITS
