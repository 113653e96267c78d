"""The current state of delivery. `stats()`, the heartbeat and metrics show it; each change is logged once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pillarbox.stats import State, StateName
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.lease import Lease
    from pillarbox.stats import DeliveryCounters

log = logging.getLogger("pillarbox")

_LEVELS: Final = {"stopped": logging.ERROR, "waiting": logging.WARNING, "degraded": logging.WARNING}
_HEALTHY_STATES: Final = frozenset({"idle", "draining"})  # a change between these is not logged


class StatusReporter:
    """The state of one worker and its last error. Written by the worker's thread, read by any."""

    def __init__(self, sink_name: str, clock: Clock, counters: DeliveryCounters, lease: Lease) -> None:
        self._sink_name = sink_name
        self._clock = clock
        self._counters = counters
        self._lease = lease
        self._state_log = StateLog(clock)
        self.state = State("idle")
        self.last_error = ""
        self.pacing_note = ""  # the reason shown in the state `draining` while the rate is limited after a failure
        self.warnings: dict[str, str] = {}  # by file name or by another subject; any warning makes the state `degraded`

    def transition(self, name: StateName, reason: str, retry_in: float | None = None) -> None:
        """Enter a state. Nothing is logged if only the time of the next attempt changes."""
        reason = reason.encode(errors="backslashreplace").decode()  # it may quote a file name, which may be any bytes
        retry_at = None if retry_in is None else self._clock.micros() + int(retry_in * 1e6)
        before, self.state = self.state, State(name, reason, retry_at)
        if reason and name not in _HEALTHY_STATES:
            self.last_error = reason
        if before.is_same_state(self.state):
            self.heartbeat()
            return
        stays_healthy = {before.name, name} <= _HEALTHY_STATES
        if name not in _HEALTHY_STATES and self._state_log.is_new_problem(f"{name}: {reason}"):
            self._log_state()
        self.heartbeat(now=not stays_healthy)

    def _log_state(self) -> None:
        counters = self._counters
        log.log(
            _LEVELS.get(self.state.name, logging.INFO),
            "%s: %s (delivered %d, dead letters %d, failed attempts %d)",
            self._sink_name,
            self.state,
            counters.delivered,
            counters.dead,
            counters.failed_flushes,
        )

    def set_healthy(self, name: StateName) -> None:
        """The destination works: enter a healthy state, or `degraded` if there are warnings."""
        if self.warnings:
            subject, text = next(iter(self.warnings.items()))
            others = len(self.warnings) - 1
            more = f" ({others} more {'warning' if others == 1 else 'warnings'})" if others else ""
            self.transition("degraded", f"{subject}: {text}{more}")
        else:
            self.transition(name, self.pacing_note if name == "draining" else "")

    def warn(self, subject: str, text: str) -> bool:
        """Add a warning for a person to look at; return whether it is new."""
        is_new = self.warnings.get(subject) != text
        self.warnings[subject] = text
        return is_new

    def clear_warning(self, subject: str) -> None:
        """Remove a warning whose cause is gone."""
        self.warnings.pop(subject, None)

    def heartbeat(self, *, now: bool = False) -> None:
        """Write the heartbeat, at most once a second unless it must be `now`."""
        if self.state.name in _HEALTHY_STATES and self._state_log.is_over():
            self._log_state()
        self._lease.write_heartbeat(self.state, self._counters.delivered, self.last_error, now=now)
