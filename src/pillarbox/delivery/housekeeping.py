"""What a worker does while it waits: it settles due batches, writes the heartbeat, compresses and prefetches.

The worker, the sender and the confirmer wait through one `Housekeeping`, which also tells them that the worker must end.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.lease import HEARTBEAT_INTERVAL_S
from pillarbox.delivery.settlement import GROUP_S

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.compactor import Compactor
    from pillarbox.delivery.context import DeliveryContext
    from pillarbox.delivery.fetcher import Fetcher
    from pillarbox.delivery.settlement import Settler

_LATENESS_MAX_S: Final = 1.0  # of a timer, on a busy machine
_COMPACT_MIN_PAUSE_S: Final = 0.1  # a shorter pause is not used to compress


class StallMeter:
    """Measures how long this process stalled: it was suspended, or its event loop was blocked.

    Each wait calls `tick` at least once in `HEARTBEAT_INTERVAL_S`. A longer pause is a stall, apart from a little lateness.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ticked_at = clock.monotonic()
        self._total_s = 0.0

    def tick(self) -> float:
        """Record that the loop runs. Returns the total seconds of stalls."""
        now = self._clock.monotonic()
        paused_s, self._ticked_at = now - self._ticked_at, now
        if paused_s > HEARTBEAT_INTERVAL_S + _LATENESS_MAX_S:
            self._total_s += paused_s - HEARTBEAT_INTERVAL_S
        return self._total_s


class Housekeeping:
    """The periodic work of one worker. `end` is set when the worker must end."""

    def __init__(self, context: DeliveryContext, settler: Settler, fetcher: Fetcher, compactor: Compactor | None) -> None:
        self._clock = context.clock
        self._status = context.status
        self._lease = context.lease
        self._settler = settler
        self._fetcher = fetcher
        self._compactor = compactor
        self.end = asyncio.Event()
        self.stalls = StallMeter(context.clock)

    def start_loop(self) -> None:
        """Reset the state for the event loop that runs now."""
        self.end = asyncio.Event()
        self.stalls = StallMeter(self._clock)

    async def wait(self, seconds: float, until: asyncio.Event | None = None) -> bool:
        """Wait for `seconds` or for an event, and do the housekeeping that is due meanwhile.

        Returns:
            False if the worker must end. Not if the event is set too: batches sealed just before the end can be delivered
            without waiting.
        """
        until = until or self.end
        deadline = self._clock.monotonic() + seconds
        while not until.is_set() and not self.end.is_set() and (left := deadline - self._clock.monotonic()) > 0:
            self.stalls.tick()
            if left < GROUP_S:
                self._settler.flush_if_due()
            else:
                self._settler.flush_group()
            self._status.heartbeat()
            next_compaction_s = self._compress_one() if left > _COMPACT_MIN_PAUSE_S else left
            waits = [asyncio.ensure_future(event.wait()) for event in {until, self.end}]
            timeout = min(left, next_compaction_s, HEARTBEAT_INTERVAL_S)
            try:
                await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return not self.end.is_set() or (until is not self.end and until.is_set())

    def during_call(self) -> None:
        """While a request is in flight: settle due batches, and read and prepare the next request."""
        self.stalls.tick()
        self._settler.flush_if_due()
        self._status.heartbeat()
        if self._status.state.name in ("waiting", "stopped"):  # this call may hang like the last one
            self._compress_one()
        self._fetcher.prefetch()

    def while_unconfirmed(self) -> None:
        """While the window of unconfirmed batches is full: settle all confirmed ones."""
        self.stalls.tick()
        self._settler.flush_group()
        self._status.heartbeat()

    def _compress_one(self) -> float:
        """Compress one waiting batch; seconds until there may be another to compress."""
        if self._compactor is None or not self._lease.is_held:
            return math.inf
        done, next_s = self._compactor.compress_next()
        if done:
            self._fetcher.drop_pending()  # a prefetched request may have the batch under its old name
        return next_s
