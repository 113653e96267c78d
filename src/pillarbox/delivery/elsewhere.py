"""`deliver="external"`: another process delivers, and what is known of it is its heartbeat."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.deliverer import ONLY
from pillarbox.delivery.lease import last_heartbeat
from pillarbox.delivery.state import HEARTBEAT_STALE_AFTER_S
from pillarbox.stats import DeliveryCounters, State

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.state import Heartbeat
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

_NOBODY: Final = "nobody delivers this directory (is `pillarbox deliver` running?)"


class Elsewhere:
    """The `Deliverer` of a process that only stores. Counts nothing, for nothing is delivered here."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._began = clock.monotonic()
        self._looked = self._began
        self._silent = False

    def start(self) -> None:
        """There is nothing to begin."""

    def stop(self, timeout: float) -> bool:  # noqa: ARG002 - the protocol's
        """Nor to end."""
        return True

    def notify(self) -> None:
        """Whoever delivers looks by itself; a time to see now and then whether anybody does, and to log where that changes."""
        now = self._clock.monotonic()
        if now - self._looked < HEARTBEAT_STALE_AFTER_S:
            return
        self._looked = now
        silent = self._silence(last_heartbeat(self._directory)) is not None
        if silent != self._silent:
            self._silent = silent
            level, what = (logging.WARNING, _NOBODY) if silent else (logging.INFO, "delivered again")
            log.log(level, "%s: %s", self._directory.path, what)

    def sinks(self) -> dict[str, SinkStats]:
        """What the heartbeat says; of several sinks, each one's."""
        places = self._directory.queues() or [self._directory]
        return {place.sink or ONLY: self._stands(last_heartbeat(place)) for place in places}

    def _stands(self, beat: Heartbeat | None) -> SinkStats:
        silent = self._silence(beat)
        if silent is not None:
            state, last_error = State("degraded", f"{_NOBODY}: silent for {silent:.0f} s"), _NOBODY
        elif beat is not None:
            state, last_error = beat.state, beat.last_error
        else:
            state, last_error = State("idle"), ""
        return DeliveryCounters().to_stats(state, last_error)

    def wait_for_settlement(self, seen: int, timeout: float) -> None:  # noqa: ARG002 - the protocol's
        """Wait `timeout` seconds: nobody tells."""
        threading.Event().wait(timeout)

    def _silence(self, beat: Heartbeat | None) -> float | None:
        """For how many seconds nobody has said anything; None where that is not long."""
        here = self._clock.monotonic() - self._began
        silent = here if beat is None else (self._clock.micros() - beat.at_micros) / 1e6
        # Where both begin at once, whoever delivers has as long to say so.
        return silent if min(silent, here) > HEARTBEAT_STALE_AFTER_S else None
