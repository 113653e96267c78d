"""The current state of delivery. `stats()`, the heartbeat and metrics show it; each change is logged once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pillarbox.stats import State, StateName
from pillarbox.store.state_log import StateLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from pillarbox.clock import Clock
    from pillarbox.delivery.lease import Lease
    from pillarbox.stats import DeliveryCounters

log = logging.getLogger("pillarbox")

_LEVELS: Final = {"stopped": logging.ERROR, "waiting": logging.WARNING, "degraded": logging.WARNING}
_NOTED_S: Final = 1.0  # a shorter outage does not replace the one that was noted before
_FAILING_STATES: Final = frozenset({"waiting", "stopped"})  # nothing can be delivered
_HEALTHY_STATES: Final = frozenset({"idle", "draining"})  # a change between these is not logged


class StatusReporter:
    """The state of one worker and its last error. Written by the worker's thread, read by any."""

    def __init__(
        self,
        sink_name: str,
        clock: Clock,
        counters: DeliveryCounters,
        lease: Lease,
        pending: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._pending = pending  # bytes and files that are pending
        self._failing_since_s = 0.0  # monotonic
        self._logged_level = logging.WARNING  # level of the last problem
        self._outage = ""  # duration of the last outage, and how much it delayed; empty once it is logged
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
        self._note_failing(before.name, name)
        if name not in _HEALTHY_STATES and self._state_log.is_new_problem(f"{name}: {reason}"):
            self._logged_level = _LEVELS.get(name, logging.INFO)
            self._log_state("")
        self.heartbeat(now=not stays_healthy)

    def _log_state(self, addition: str) -> None:
        """Log the state, at the level of the problem that began or is over."""
        counters = self._counters
        log.log(
            self._logged_level,
            "%s: %s%s (delivered %d, dead letters %d, failed attempts %d)",
            self._sink_name,
            self.state,
            addition,
            counters.delivered,
            counters.dead,
            counters.failed_flushes,
        )

    def _note_failing(self, before: StateName, name: StateName) -> None:
        """Record since when nothing can be delivered; at the end of an outage, its duration and how much it delayed."""
        if name in _FAILING_STATES:
            if before not in _FAILING_STATES:
                self._failing_since_s = self._clock.monotonic()
                # If the previous process could not deliver either, the outage began in that process.
                inherited = self._lease.failing_since_micros if self._counters.delivered == 0 else None
                self._lease.failing_since_micros = self._clock.micros() if inherited is None else inherited
        elif before in _FAILING_STATES and self._lease.failing_since_micros is not None:
            by_wall_clock = (self._clock.micros() - self._lease.failing_since_micros) / 1e6
            seconds = max(self._clock.monotonic() - self._failing_since_s, by_wall_clock)
            self._lease.failing_since_micros = None
            if seconds >= _NOTED_S or not self._outage:
                pending_bytes, pending_files = self._pending()
                noun = "file" if pending_files == 1 else "files"
                delayed = f"{pending_files} {noun}, {pending_bytes} bytes"
                self._outage = f", works again after {seconds:.0f} s; delayed: {delayed}"

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
            self._log_state(self._outage or f"; {self._state_log.describe_end()}")
            self._outage = ""
        self._lease.write_heartbeat(self.state, self._counters.delivered, self.last_error, now=now)
