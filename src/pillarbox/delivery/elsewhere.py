"""`deliver="external"`: another process delivers, and what is known of it is its heartbeat."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final

from pillarbox.delivery.deliverer import ONLY_SINK
from pillarbox.delivery.lease import read_heartbeat
from pillarbox.delivery.state import HEARTBEAT_STALE_AFTER_S
from pillarbox.stats import DeliveryCounters, State

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.state import Heartbeat
    from pillarbox.stats import SinkStats
    from pillarbox.store.directory import Directory

log = logging.getLogger("pillarbox")

_NO_DELIVERY: Final = "nobody delivers this directory (is `pillarbox deliver` running?)"


class ExternalRunner:
    """The `Deliverer` of a process that only stores. Counts nothing, for nothing is delivered here."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._started_s = clock.monotonic()
        self._checked_s = self._started_s
        self._is_silent = False

    def start(self) -> None:
        """There is nothing to begin."""

    def stop(self, timeout: float) -> bool:  # noqa: ARG002 - the protocol's
        """Nor to end."""
        return True

    def notify(self) -> None:
        """Whoever delivers looks by itself; a time to see now and then whether anybody does, and to log where that changes."""
        now = self._clock.monotonic()
        if now - self._checked_s < HEARTBEAT_STALE_AFTER_S:
            return
        self._checked_s = now
        silent = self._silent_seconds(read_heartbeat(self._directory)) is not None
        if silent != self._is_silent:
            self._is_silent = silent
            level, what = (logging.WARNING, _NO_DELIVERY) if silent else (logging.INFO, "delivered again")
            log.log(level, "%s: %s", self._directory.path, what)

    def sinks(self) -> dict[str, SinkStats]:
        """What the heartbeat says; of several sinks, each one's."""
        directories = self._directory.queues() or [self._directory]
        return {place.sink or ONLY_SINK: self._stats_from(read_heartbeat(place)) for place in directories}

    def _stats_from(self, heartbeat: Heartbeat | None) -> SinkStats:
        silent = self._silent_seconds(heartbeat)
        if silent is not None:
            state, last_error = State("degraded", f"{_NO_DELIVERY}: silent for {silent:.0f} s"), _NO_DELIVERY
        elif heartbeat is not None:
            state, last_error = heartbeat.state, heartbeat.last_error
        else:
            state, last_error = State("idle"), ""
        return DeliveryCounters().to_stats(state, last_error)

    def wait_for_settlement(self, known_files: int, timeout: float) -> None:  # noqa: ARG002 - the protocol's
        """Wait `timeout` seconds: nobody tells."""
        threading.Event().wait(timeout)

    def _silent_seconds(self, heartbeat: Heartbeat | None) -> float | None:
        """For how many seconds nobody has said anything; None where that is not long."""
        here = self._clock.monotonic() - self._started_s
        silent = here if heartbeat is None else (self._clock.micros() - heartbeat.at_micros) / 1e6
        # Where both begin at once, whoever delivers has as long to say so.
        return silent if min(silent, here) > HEARTBEAT_STALE_AFTER_S else None
