"""How delivery stands, told in every place: `stats()`, the heartbeat that `status` reads, metrics, and a log line a change."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from pillarbox.stats import State, StateName

if TYPE_CHECKING:
    from pillarbox.clock import Clock
    from pillarbox.delivery.lease import Lease
    from pillarbox.stats import DeliveryCounters

log = logging.getLogger("pillarbox")

_LEVELS: Final = {"stopped": logging.ERROR, "waiting": logging.WARNING, "degraded": logging.WARNING}
_HEALTHY_STATES: Final = frozenset({"idle", "draining"})  # going from the one to the other is no news


class StatusReporter:
    """The state that a deliverer is in, and what it last complained of. Written by its thread, read by anyone."""

    def __init__(self, sink_name: str, clock: Clock, counters: DeliveryCounters, lease: Lease) -> None:
        self._sink_name = sink_name
        self._clock = clock
        self._counters = counters
        self._lease = lease
        self.state = State("idle")
        self.last_error = ""
        self.pacing_note = ""  # while the rate is bounded after a failure: what is said of it
        self.warnings: dict[str, str] = {}  # about a file, or the disk; while there are any, all is not well

    def transition(self, name: StateName, reason: str, retry_in: float | None = None) -> None:
        """Be in another state; nothing is logged where only the time of the next try changes."""
        reason = reason.encode(errors="backslashreplace").decode()  # it may quote a file's name, which may be any bytes
        retry_at = None if retry_in is None else self._clock.micros() + int(retry_in * 1e6)
        before, self.state = self.state, State(name, reason, retry_at)
        if reason and name not in _HEALTHY_STATES:
            self.last_error = reason
        if before.is_same_state(self.state):
            self.heartbeat()
            return
        at_work = {before.name, name} <= _HEALTHY_STATES
        if not at_work:
            counters = self._counters
            log.log(
                _LEVELS.get(name, logging.INFO),
                "%s: %s (delivered %d, dead letters %d, failed attempts %d)",
                self._sink_name,
                self.state,
                counters.delivered,
                counters.dead,
                counters.failed_flushes,
            )
        self.heartbeat(now=not at_work)

    def set_healthy(self, name: StateName) -> None:
        """Nothing is wrong with the destination; complaints are still a reason to look."""
        if self.warnings:
            about, what = next(iter(self.warnings.items()))
            more = f", and {len(self.warnings) - 1} more like it" if len(self.warnings) > 1 else ""
            self.transition("degraded", f"{about}: {what}{more}")
        else:
            self.transition(name, self.pacing_note if name == "draining" else "")

    def warn(self, subject: str, text: str) -> bool:
        """Have something that a person should look at; whether that is news."""
        is_new = self.warnings.get(subject) != text
        self.warnings[subject] = text
        return is_new

    def clear_warning(self, subject: str) -> None:
        """What was complained of is well again."""
        self.warnings.pop(subject, None)

    def heartbeat(self, *, now: bool = False) -> None:
        """Let others see that this process lives, at most once a second unless it must be `now`."""
        self._lease.write_heartbeat(self.state, self._counters.delivered, self.last_error, now=now)
