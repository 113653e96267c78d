"""How long to wait before another try. Pure, but for the jitter's source.

Full jitter: a uniform share of an exponentially growing bound, which spreads many waiting clients best (M. Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

_MAX_DOUBLINGS: Final = 32  # beyond it any bound in use is reached; keeps the power of two small
jitter = random.SystemRandom().random  # a uniform share for `delay`; forked processes must not wait in step


class Backoff(NamedTuple):
    """Bounds in seconds."""

    base_s: float = 0.5
    max_s: float = 30.0

    def delay(self, attempt: int, jitter_share: float) -> float:
        """Seconds to wait after the `attempt`-th failure in a row (from 1); `jitter_share` is uniform in [0, 1)."""
        return jitter_share * min(self.max_s, self.base_s * 2.0 ** min(attempt, _MAX_DOUBLINGS))
