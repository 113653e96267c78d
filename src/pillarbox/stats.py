"""What `Outbox.stats()` returns, and the counters behind it.

`telemetry.py` makes OpenTelemetry instruments of them; `status`, logs and the exporters use the same states.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

StateName = Literal["idle", "draining", "waiting", "degraded", "stopped", "standby"]


class State(msgspec.Struct, frozen=True):
    """The state of delivery, and the reason.

    Attributes:
        name: "idle": nothing is pending. "draining": delivering. "waiting": the destination is unavailable; it is retried.
            "degraded": delivering, but something needs attention. "stopped": nothing is delivered until the configuration is
            fixed. "standby": another process delivers.
        reason: Why; empty if there is nothing to say.
        retry_at_micros: When the next attempt is due, in microseconds since 1970.
    """

    name: StateName
    reason: str = ""
    retry_at_micros: int | None = None

    def is_same_state(self, other: State) -> bool:
        """Whether name and reason are equal, so that there is nothing to log; the time of the retry does not count."""
        return (self.name, self.reason) == (other.name, other.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


COUNTER_FIELDS: Final = (
    "dead",
    "delivered",
    "discarded",
    "duplicates",
    "failed_flushes",
    "flushed_bytes",
    "flushed_files",
    "quarantined",
)


class DeliveryCounters:
    """Counters of one sink. Only the delivery worker's thread writes them; any thread may read them."""

    __slots__ = (*COUNTER_FIELDS, "rate")

    def __init__(self) -> None:
        self.delivered = 0  # events that the destination has accepted, including duplicates
        self.duplicates = 0  # events that the destination already had
        self.dead = 0  # events that were dead-lettered
        self.quarantined = 0  # damaged byte ranges
        self.discarded = 0  # dead letters and byte ranges that were discarded because of `on_quarantine_full="discard"`
        self.flushed_files = 0  # delivered batch files
        self.flushed_bytes = 0
        self.failed_flushes = 0  # attempts that the destination did not accept
        self.rate: float | None = None  # current limit in events/s; None: no limit

    def to_stats(self, state: State, last_error: str) -> SinkStats:
        """A snapshot for `Outbox.stats`."""
        counts = {name: getattr(self, name) for name in COUNTER_FIELDS}
        return SinkStats(state=state, last_error=last_error, rate=self.rate, **counts)


class SinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the delivery to one sink. This process has counted since it opened the outbox."""

    state: State  # of the delivery
    delivered: int  # events that the destination accepted
    duplicates: int  # of these, what it had already
    dead: int  # events that became dead letters
    quarantined: int  # damaged byte ranges
    discarded: int  # events that the limits of dead letters and quarantine discarded
    flushed_files: int  # batch files settled
    flushed_bytes: int  # their size
    failed_flushes: int  # calls that failed
    rate: float | None  # current limit in events/s; None: no limit
    last_error: str  # the last failure of a call; "" if there was none

    def as_degraded(self, reason: str) -> SinkStats:
        """A copy with the state "degraded", for a problem that is not the sink's."""
        return msgspec.structs.replace(self, state=State("degraded", reason), last_error=reason)


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an outbox. This process has counted since it opened the outbox; `pending_*` are those of the directory.

    The counts of delivery are described at `DeliveryCounters`; with several sinks they are sums.
    """

    state: State
    durability: str
    pending_bytes: int
    pending_files: int
    accepted: int
    dropped: dict[str, int]  # by reason
    sealed: dict[str, int]  # batches, by reason
    evicted: int  # events deleted to make room for newer ones (`when_full="drop_oldest"`)
    delivered: int
    duplicates: int
    dead: int
    quarantined: int
    discarded: int
    flushed_files: int
    flushed_bytes: int
    failed_flushes: int
    rate: float | None  # current limit in events/s; None: no limit
    last_error: str
    hook_failures: dict[str, int]  # exceptions, by hook
    sinks: dict[str, SinkStats]  # by name; empty unless there are several sinks
